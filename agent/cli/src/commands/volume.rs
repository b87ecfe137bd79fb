//! `volume`: virtual disks, their points and exports.

use pbjson_types::Duration;
use serio_api::v1::{
    CreateExportRequest, CreateSnapshotRequest, CreateVolumeRequest, DeleteExportRequest,
    DeleteVolumeRequest, Export, GetVolumeRequest, ListExportsRequest, ListSnapshotsRequest,
    ListVolumesRequest, PointClass, Volume, volume_service_client::VolumeServiceClient,
};
use serio_types::{Name, VdcName};

use super::{check, layers, request_id, transfer};
use crate::{
    args::{ExportArgs, Format, Global, VolumeVerb},
    client::{Client, Target},
    error::Failure,
    names, output,
    output::Output,
};

pub(super) async fn run(
    client: &Client,
    global: &Global,
    verb: VolumeVerb,
    output: Output,
) -> Result<(), Failure> {
    match verb {
        VolumeVerb::Create { name, size, image } => {
            create(client, &name, size.map_or(0, |s| s.bytes()), image, output).await
        }
        VolumeVerb::Import(args) => transfer::import(client, global, args, output).await,
        VolumeVerb::Download(args) => transfer::download(client, global, args, output).await,
        VolumeVerb::List { vdc } => list(client, vdc, output).await,
        VolumeVerb::Show { name } => {
            let request = GetVolumeRequest { name: names::volume(&name) };
            let volume = client
                .call(&format!("show volume {name}"), request, |channel, request| async move {
                    VolumeServiceClient::new(channel).get_volume(request).await
                })
                .await?;
            show(&volume, output)
        }
        VolumeVerb::Snapshot { volume, name } => {
            let request = CreateSnapshotRequest {
                request_id: request_id(),
                volume: names::volume(&volume),
                snapshot_id: name.to_string(),
            };
            let snapshot = client
                .call(&format!("snapshot volume {volume}"), request, |channel, request| async move {
                    VolumeServiceClient::new(channel).create_snapshot(request).await
                })
                .await?;
            output.done(&snapshot, &format!("sealed point {name} of volume {volume}"))
        }
        VolumeVerb::Snapshots { volume } => snapshots(client, &volume, output).await,
        VolumeVerb::DeleteSnapshot(args) => layers::delete_snapshot(client, args, output).await,
        VolumeVerb::Resize(args) => layers::resize(client, args, output).await,
        VolumeVerb::Clone(args) => layers::clone(client, args, output).await,
        VolumeVerb::Rollback(args) => layers::rollback(client, args, output).await,
        VolumeVerb::Flatten(args) => layers::flatten(client, args, output).await,
        VolumeVerb::Check(args) => check::run(client, args, output).await,
        VolumeVerb::Changes(args) => layers::changes(client, args, output).await,
        VolumeVerb::Export(args) => export(client, global, args, output).await,
        VolumeVerb::Exports => exports(client, output).await,
        VolumeVerb::Unexport { id } => {
            let id = id.strip_prefix("exports/").unwrap_or(&id);
            let request = DeleteExportRequest { request_id: request_id(), name: format!("exports/{id}") };
            let answer = client
                .call(&format!("end export {id}"), request, |channel, request| async move {
                    VolumeServiceClient::new(channel).delete_export(request).await
                })
                .await?;
            output.done(&answer, &format!("ended export {id}"))
        }
        VolumeVerb::Delete { name } => {
            let request = DeleteVolumeRequest {
                request_id: request_id(),
                name: names::volume(&name),
                ..Default::default()
            };
            let answer = client
                .call(&format!("delete volume {name}"), request, |channel, request| async move {
                    VolumeServiceClient::new(channel).delete_volume(request).await
                })
                .await?;
            output.done(&answer, &format!("deleted volume {name}"))
        }
    }
}

async fn create(
    client: &Client,
    name: &VdcName,
    size_bytes: u64,
    image: Option<Name>,
    output: Output,
) -> Result<(), Failure> {
    let request = CreateVolumeRequest {
        request_id: request_id(),
        parent: names::vdc(&name.vdc),
        volume_id: name.name.to_string(),
        size_bytes,
        source_image: image.as_ref().map(names::image).unwrap_or_default(),
    };
    let volume = client
        .call(&format!("create volume {name}"), request, |channel, request| async move {
            VolumeServiceClient::new(channel).create_volume(request).await
        })
        .await?;
    output.done(&volume, &format!("created volume {name}: {}", output::size(volume.size_bytes)))
}

async fn list(client: &Client, vdc: Option<Name>, output: Output) -> Result<(), Failure> {
    let request =
        ListVolumesRequest { parent: vdc.as_ref().map(names::vdc).unwrap_or_default(), ..Default::default() };
    let answer = client
        .call("list the volumes", request, |channel, request| async move {
            VolumeServiceClient::new(channel).list_volumes(request).await
        })
        .await?;
    output.list(
        &answer.volumes,
        &["NAME", "SIZE", "ALLOCATED", "SHARED", "IMAGE", "VM", "SNAPSHOTS"],
        |volume| {
            vec![
                names::short(&volume.name),
                output::size(volume.size_bytes),
                output::size(volume.allocated_bytes),
                output::size(volume.shared_bytes),
                names::short(&volume.source_image),
                names::short(&volume.attached_to),
                volume.snapshots.len().to_string(),
            ]
        },
    )
}

/// The word for what a point is good for.
pub(super) const fn class(class: PointClass) -> &'static str {
    match class {
        PointClass::Unspecified => "",
        PointClass::Crash => "crash",
        PointClass::App => "app",
    }
}

async fn snapshots(client: &Client, volume: &VdcName, output: Output) -> Result<(), Failure> {
    let request = ListSnapshotsRequest { volume: names::volume(volume), ..Default::default() };
    let answer = client
        .call(&format!("list the snapshots of volume {volume}"), request, |channel, request| async move {
            VolumeServiceClient::new(channel).list_snapshots(request).await
        })
        .await?;
    output.list(&answer.snapshots, &["NAME", "SIZE", "CLASS", "VDC SNAPSHOT", "CREATED"], |snapshot| {
        vec![
            names::short_point(&snapshot.name),
            output::size(snapshot.size_bytes),
            class(snapshot.class()).to_owned(),
            names::short_point(&snapshot.vdc_snapshot),
            output::time(snapshot.create_time.as_ref()),
        ]
    })
}

fn show(volume: &Volume, output: Output) -> Result<(), Failure> {
    let [checked, scrubbed] = check::lines(volume);
    output.one(
        volume,
        &[
            ("name", names::short(&volume.name)),
            ("uid", volume.uid.clone()),
            ("generation", volume.generation.to_string()),
            ("created", output::time(volume.create_time.as_ref())),
            ("size", output::size(volume.size_bytes)),
            ("allocated", output::size(volume.allocated_bytes)),
            ("shared", output::size(volume.shared_bytes)),
            ("image", names::short(&volume.source_image)),
            ("cloned from", names::short(&volume.source_snapshot)),
            ("vm", names::short(&volume.attached_to)),
            (
                "snapshots",
                volume.snapshots.iter().map(|name| names::short_point(name)).collect::<Vec<_>>().join(", "),
            ),
            checked,
            scrubbed,
        ],
    )
}

async fn exports(client: &Client, output: Output) -> Result<(), Failure> {
    let answer = client
        .call("list the exports", ListExportsRequest::default(), |channel, request| async move {
            VolumeServiceClient::new(channel).list_exports(request).await
        })
        .await?;
    output.list(&answer.exports, &["ID", "VOLUME", "POINT", "MODE", "CLIENTS", "EXPIRES"], |export| {
        vec![
            names::short(&export.name),
            names::short(&export.volume),
            names::short_point(&export.snapshot),
            if export.read_only { "read-only" } else { "read-write" }.to_owned(),
            export.clients.to_string(),
            output::time(export.expire_time.as_ref()),
        ]
    })
}

async fn export(client: &Client, global: &Global, args: ExportArgs, output: Output) -> Result<(), Failure> {
    let request = CreateExportRequest {
        request_id: request_id(),
        volume: names::volume(&args.volume),
        snapshot: args.snapshot.map(|s| s.to_string()).unwrap_or_default(),
        writable: args.writable,
        ttl: args.ttl.map(|ttl| Duration::from(ttl.0)),
        once: args.once,
        release_on_trim: args.release_on_trim,
    };
    let mut export = client
        .call(&format!("export volume {}", args.volume), request, |channel, request| async move {
            VolumeServiceClient::new(channel).create_export(request).await
        })
        .await?;
    if !export.tls_uri.is_empty() {
        export.tls_uri = with_certificates(&export.tls_uri, global);
    }
    if output.format() != Format::Table {
        return output.value(&export);
    }
    output::text(&format!("{}\n", uri(&export, client.target())))
}

/// The URI that works from where the user is.
fn uri<'a>(export: &'a Export, target: &Target) -> &'a str {
    if matches!(target, Target::Unix(_)) {
        return &export.unix_uri;
    }
    if export.tls_uri.is_empty() {
        eprintln!(
            "note: this node has no NBD listener for other hosts ([nbd] listen in its seriod.toml): the URI works on that node only"
        );
        return &export.unix_uri;
    }
    &export.tls_uri
}

/// Adds the folder of the user's certificate, as libnbd and qemu look for it (NBD URI, "tls-certificates").
fn with_certificates(uri: &str, global: &Global) -> String {
    let Some(folder) =
        global.cert.as_ref().and_then(|cert| std::path::absolute(cert).ok()?.parent().map(ToOwned::to_owned))
    else {
        return uri.to_owned();
    };
    let mark = if uri.contains('?') { '&' } else { '?' };
    format!("{uri}{mark}tls-certificates={}", percent_encode(&folder.to_string_lossy()))
}

/// As RFC 3986 wants it in a query: everything but unreserved characters and `/`.
fn percent_encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::Cli;

    #[test]
    fn certificates_are_named_in_the_uri() {
        let cli = Cli::parse_from(["serio", "--cert", "/etc/my pki/op/client-cert.pem", "volume", "exports"]);
        assert_eq!(
            with_certificates("nbds://a:10809/token", &cli.global),
            "nbds://a:10809/token?tls-certificates=/etc/my%20pki/op"
        );
        let mut none = cli.global;
        none.cert = None;
        assert_eq!(with_certificates("nbds://a:10809/token", &none), "nbds://a:10809/token");
    }
}
