//! `volume import` and `volume download`: a disk image into a new volume, and a volume or a point of it into an image.
//!
//! ```text
//! import:   image ──validated here──► CreateVolume (the quota decides) ──► writable export ──NBD──► volume
//! download: point ──► read-only export ──NBD──► image
//! ```
//! So the node never parses what a user brings, an encrypted volume is encrypted as always, and a lost connection is
//! taken up again by the NBD client. The export ends with the copy; what broke off is gone on with by `--resume`, which
//! compares what is there.
//!
//! Threads: the copy has a blocking thread; over TLS, tasks relay between the socket and one end of a pair.

use std::{
    fs::File,
    io::{self, IsTerminal},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use indicatif::ProgressBar;
use pbjson_types::Duration;
use serio_api::v1::{
    CreateExportRequest, CreateVolumeRequest, DeleteExportRequest, DeleteVolumeRequest, Export,
    GetVolumeRequest, ListExportsRequest, Volume, volume_service_client::VolumeServiceClient,
};
use serio_formats::{
    Format, Image,
    raw::RawNbd,
    sinks::{ImageSink, NbdSink, PipeSink, RawSink, Sink},
    transfer::{Watch, transfer},
    {qcow2_out, vmdk_out},
};
use serio_types::VdcName;

use super::{image::progress, request_id, source};
use crate::{
    args::{DownloadArgs, Global, UploadArgs},
    client::{Client, Target},
    error::Failure,
    names,
    nbd::connect,
    output::{self, Output},
};

/// Longest life of an export that a copy makes: it is ended when the copy is.
const TTL_S: i64 = 7 * 24 * 3600;

/// How long a copy may take to hear that it is to stop.
const STOP_WAIT: std::time::Duration = std::time::Duration::from_secs(2);

/// Counts, hashes, and hears a wish to stop.
struct Meter {
    bar: ProgressBar,
    hash: blake3::Hasher,
    stop: Arc<AtomicBool>,
}

static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

impl Watch for Meter {
    fn data(&mut self, data: &[u8]) {
        self.hash.update(data);
    }
    fn zeros(&mut self, len: u64) {
        let mut left = len;
        while left > 0 {
            let part = left.min(ZEROS.len() as u64);
            self.hash.update(ZEROS.get(..part as usize).unwrap_or_default());
            left -= part;
        }
    }
    fn step(&mut self, done: u64) -> bool {
        self.bar.set_position(done);
        !self.stop.load(Ordering::SeqCst)
    }
}

/// Copies on a thread of its own; ctrl-C ends it in order. Gives back the blake3.
async fn copy(
    size: u64,
    work: impl FnOnce(&mut dyn Watch) -> Result<(), Failure> + Send + 'static,
) -> Result<String, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let bar = progress(size);
    let mut meter = Meter { bar: bar.clone(), hash: blake3::Hasher::new(), stop: Arc::clone(&stop) };
    let mut copying = tokio::task::spawn_blocking(move || {
        let result = work(&mut meter);
        meter.bar.finish_and_clear();
        result.map(|()| meter.hash.finalize().to_hex().to_string())
    });
    tokio::select! {
        done = &mut copying => return joined(done),
        _ = tokio::signal::ctrl_c() => stop.store(true, Ordering::SeqCst),
    }
    match tokio::time::timeout(STOP_WAIT, copying).await {
        Ok(done) => joined(done),
        // It waits for who is at the other end of a pipe, who need not ever go on: the process ends without it.
        Err(_) => {
            bar.finish_and_clear();
            Err(Failure::plain("interrupted"))
        }
    }
}

fn joined<T>(result: Result<Result<T, Failure>, tokio::task::JoinError>) -> Result<T, Failure> {
    result.unwrap_or_else(|e| Err(Failure::local("the copy broke off", e)))
}

async fn begin_export(
    client: &Client,
    volume: &VdcName,
    snapshot: String,
    writable: bool,
) -> Result<Export, Failure> {
    let request = CreateExportRequest {
        request_id: request_id(),
        volume: names::volume(volume),
        snapshot,
        writable,
        ttl: Some(Duration { seconds: TTL_S, nanos: 0 }),
        ..CreateExportRequest::default()
    };
    client
        .call(&format!("export volume {volume}"), request, |channel, request| async move {
            VolumeServiceClient::new(channel).create_export(request).await
        })
        .await
}

async fn end_export(client: &Client, export: &Export) -> Result<(), Failure> {
    let request = DeleteExportRequest { request_id: request_id(), name: export.name.clone() };
    client
        .call(&format!("end {}", export.name), request, |channel, request| async move {
            VolumeServiceClient::new(channel).delete_export(request).await
        })
        .await
        .map(drop)
}

/// Connects to an export from where the user is.
async fn nbd(
    client: &Client,
    global: &Global,
    export: &Export,
) -> Result<serio_nbd::client::Client, Failure> {
    let uri = match client.target() {
        Target::Unix(_) => &export.unix_uri,
        _ if export.tls_uri.is_empty() => {
            return Err(Failure::plain(
                "this node has no NBD listener for other hosts: set [nbd] listen in its seriod.toml, or run this on the node",
            ));
        }
        _ => &export.tls_uri,
    };
    connect(uri, global).await
}

/// `volume import`.
pub(super) async fn import(
    client: &Client,
    global: &Global,
    args: UploadArgs,
    output: Output,
) -> Result<(), Failure> {
    let format = args.format.clone();
    let mut image = source::open(&args.source, &format, &args.backing, global).await?;
    let content = image.size_bytes().next_multiple_of(512);
    let size_bytes = args.size.map_or(content, |size| size.bytes());
    if size_bytes < content {
        return Err(Failure::Usage(format!(
            "--size is smaller than the image's disk, which has {content} bytes"
        )));
    }
    let volume = match args.resume {
        true => found(client, &args.name, size_bytes).await?,
        false => created(client, &args.name, size_bytes).await?,
    };
    let export = match begin_export(client, &args.name, String::new(), true).await {
        Ok(export) => export,
        Err(failure) => {
            match args.resume {
                true => say_not_whole(&args.name),
                false => delete(client, &args.name).await,
            }
            return Err(failure);
        }
    };
    let copied = async {
        let target = nbd(client, global, &export).await?;
        let doing = format!("cannot import {} into volume {}", args.source, args.name);
        copy(content, move |watch| {
            let mut sink = NbdSink::new(target, args.resume);
            transfer(image.as_mut(), &mut sink, watch).map_err(|e| Failure::local(doing, e))
        })
        .await
    }
    .await;
    let ended = end_export(client, &export).await;
    match copied.and_then(|blake3| ended.map(|()| blake3)) {
        Ok(blake3) => output.done(
            &volume,
            &format!("imported volume {}: {}, blake3 {blake3}", args.name, output::size(volume.size_bytes)),
        ),
        Err(failure) => {
            say_not_whole(&args.name);
            Err(failure)
        }
    }
}

fn say_not_whole(name: &VdcName) {
    eprintln!(
        "note: volume {name} is not whole: the same command with --resume goes on, `serio volume delete {name}` gives up"
    );
}

async fn created(client: &Client, name: &VdcName, size_bytes: u64) -> Result<Volume, Failure> {
    let request = CreateVolumeRequest {
        request_id: request_id(),
        parent: names::vdc(&name.vdc),
        volume_id: name.name.to_string(),
        size_bytes,
        ..CreateVolumeRequest::default()
    };
    client
        .call(&format!("create volume {name}"), request, |channel, request| async move {
            VolumeServiceClient::new(channel).create_volume(request).await
        })
        .await
}

/// The volume of an import that broke off, which nobody writes any more.
async fn found(client: &Client, name: &VdcName, size_bytes: u64) -> Result<Volume, Failure> {
    let request = GetVolumeRequest { name: names::volume(name) };
    let volume: Volume = client
        .call(&format!("show volume {name}"), request, |channel, request| async move {
            VolumeServiceClient::new(channel).get_volume(request).await
        })
        .await?;
    if volume.size_bytes != size_bytes {
        return Err(Failure::plain(format!(
            "volume {name} has {} bytes and the image {size_bytes}: it is not of an import of this image",
            volume.size_bytes
        )));
    }
    let exports = client
        .call("list the exports", ListExportsRequest::default(), |channel, request| async move {
            VolumeServiceClient::new(channel).list_exports(request).await
        })
        .await?
        .exports;
    // A client that was killed could not end its own.
    for export in exports.iter().filter(|export| export.volume == volume.name && !export.read_only) {
        if export.clients > 0 {
            return Err(Failure::plain(format!(
                "volume {name} is being written through {}: if that is nobody any more, `serio volume unexport {}` first",
                export.name,
                names::short(&export.name)
            )));
        }
        end_export(client, export).await?;
    }
    Ok(volume)
}

/// A volume without its content is of no use.
async fn delete(client: &Client, name: &VdcName) {
    let request =
        DeleteVolumeRequest { request_id: request_id(), name: names::volume(name), ..Default::default() };
    let deleted = client
        .call(&format!("delete volume {name}"), request, |channel, request| async move {
            VolumeServiceClient::new(channel).delete_volume(request).await
        })
        .await;
    if let Err(failure) = deleted {
        eprintln!("note: volume {name} is not whole, and could not be deleted: {failure}");
    }
}

/// `volume download`.
pub(super) async fn download(
    client: &Client,
    global: &Global,
    args: DownloadArgs,
    output: Output,
) -> Result<(), Failure> {
    let (name, snapshot) = match args.volume.split_once('@') {
        Some((name, snapshot)) => (name, snapshot.to_owned()),
        None => (args.volume.as_str(), String::new()),
    };
    let volume: VdcName = name.parse().map_err(|e| Failure::Usage(format!("{e}")))?;
    let format: Format = args.format.parse().map_err(|e| Failure::Usage(format!("{e}")))?;
    let to_stdout = args.file.as_os_str() == "-";
    if to_stdout && format != Format::Raw {
        return Err(Failure::Usage(format!(
            "--format {format}: to standard output a disk goes as raw; give a file"
        )));
    }
    if to_stdout && io::stdout().is_terminal() {
        return Err(Failure::Usage("standard output is a terminal: a disk is not for reading".to_owned()));
    }
    let request = GetVolumeRequest { name: names::volume(&volume) };
    let about: Volume = client
        .call(&format!("show volume {volume}"), request, |channel, request| async move {
            VolumeServiceClient::new(channel).get_volume(request).await
        })
        .await?;
    let file = if to_stdout { None } else { Some(create(&args.file)?) };
    let export = begin_export(client, &volume, snapshot, false).await?;
    let copied = async {
        let source = nbd(client, global, &export).await?;
        let doing = format!("cannot download volume {}", args.volume);
        copy(source.size_bytes(), move |watch| {
            let mut image = RawNbd::new(source);
            let size = image.size_bytes();
            let failed = |e| Failure::local(doing, e);
            match (&file, format) {
                (None, _) => copy_to(&mut image, &mut PipeSink(io::stdout().lock()), watch, failed),
                (Some(file), Format::Raw) => {
                    let file = file.try_clone().map_err(|e| Failure::local("cannot use the file", e))?;
                    copy_to(&mut image, &mut RawSink { file, size, used: false }, watch, failed)
                }
                (Some(file), Format::Qcow2) => {
                    let mut sink = ImageSink::Qcow2(Some(qcow2_out::Writer::new(file, size)));
                    copy_to(&mut image, &mut sink, watch, failed)
                }
                (Some(file), Format::Vmdk) => {
                    let writer = vmdk_out::Writer::new(file, size);
                    let writer = writer.map_err(|e| Failure::local("cannot write a vmdk", e))?;
                    copy_to(&mut image, &mut ImageSink::Vmdk(Some(writer)), watch, failed)
                }
            }
        })
        .await
    }
    .await;
    let ended = end_export(client, &export).await;
    if copied.is_err() && !to_stdout {
        // It is no image, and nobody shall take it for one.
        let _ = std::fs::remove_file(&args.file);
    }
    let blake3 = copied?;
    ended?;
    let sentence = format!("downloaded volume {}: blake3 {blake3}", args.volume);
    if to_stdout {
        eprintln!("{sentence}");
        return Ok(());
    }
    output.done(&about, &sentence)
}

fn copy_to(
    image: &mut dyn Image,
    sink: &mut dyn Sink,
    watch: &mut dyn Watch,
    failed: impl FnOnce(serio_formats::transfer::TransferError) -> Failure,
) -> Result<(), Failure> {
    transfer(image, sink, watch).map_err(failed)
}

fn create(path: &Path) -> Result<File, Failure> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(|e| Failure::local(format!("cannot create {}", path.display()), e))
}
