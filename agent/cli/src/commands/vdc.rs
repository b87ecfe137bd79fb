//! `vdc`: the quota of a tenant.

use serio_api::v1::{
    CreateVdcRequest, CreateVdcSnapshotRequest, DeleteVdcRequest, DeleteVdcSnapshotRequest, GetVdcRequest,
    ListVdcSnapshotsRequest, ListVdcsRequest, PointClass, Quota, Share, UpdateVdcRequest, Vdc,
    vdc_service_client::VdcServiceClient,
};
use serio_types::{Name, VdcName};

use super::{keys, operation, request_id, usage, volume};
use crate::{
    args::{ConsistencyArg, UpdateArgs, VdcSnapshotArgs, VdcVerb},
    client::Client,
    error::Failure,
    names, output,
    output::Output,
};

pub(super) async fn run(client: &Client, verb: VdcVerb, output: Output) -> Result<(), Failure> {
    match verb {
        VdcVerb::Create { name, quota, limits, encrypted } => {
            let quota = Quota {
                vcpus: quota.vcpus,
                memory_bytes: quota.memory.bytes(),
                storage_bytes: quota.storage.bytes(),
                iops: limits.iops.unwrap_or(0),
                bandwidth_bytes_per_second: limits.bandwidth.map_or(0, |b| b.bytes()),
                snapshots: limits.snapshots.unwrap_or(0),
            };
            let share =
                Share { weight: limits.weight.unwrap_or(0), burst_percent: limits.burst.unwrap_or(0) };
            let request = CreateVdcRequest {
                request_id: request_id(),
                vdc_id: name.to_string(),
                quota: Some(quota),
                encrypted,
                share: Some(share),
            };
            let vdc = client
                .call(&format!("create vdc {name}"), request, |channel, request| async move {
                    VdcServiceClient::new(channel).create_vdc(request).await
                })
                .await?;
            let how = if encrypted { ", encrypted" } else { "" };
            output.done(&vdc, &format!("created vdc {name}: {}{how}", quota_text(vdc.quota.as_ref())))
        }
        VdcVerb::List => {
            let answer = client
                .call("list the vdcs", ListVdcsRequest::default(), |channel, request| async move {
                    VdcServiceClient::new(channel).list_vdcs(request).await
                })
                .await?;
            output.list(&answer.vdcs, &["NAME", "VCPUS", "MEMORY", "STORAGE", "CREATED"], row)
        }
        VdcVerb::Show { name } => show(&get(client, &name).await?, output),
        VdcVerb::Update { name, change } => update(client, &name, change, output).await,
        VdcVerb::Usage(args) => usage::run(client, args, output).await,
        VdcVerb::RotateKey { name } => keys::rotate(client, &name, output).await,
        VdcVerb::Erase { name, yes: _ } => keys::erase(client, &name, output).await,
        VdcVerb::Snapshot(args) => snapshot(client, args, output).await,
        VdcVerb::Snapshots { name } => snapshots(client, &name, output).await,
        VdcVerb::DeleteSnapshot { name, snapshot, wait } => {
            let shown = format!("{name}@{snapshot}");
            let resource = names::vdc_snapshot(&VdcName { vdc: name, name: snapshot });
            let request = DeleteVdcSnapshotRequest { request_id: request_id(), name: resource };
            let begun = client
                .call(&format!("delete vdc snapshot {shown}"), request, |channel, request| async move {
                    VdcServiceClient::new(channel).delete_vdc_snapshot(request).await
                })
                .await?;
            let sentence = format!("deleted vdc snapshot {shown}");
            operation::follow(client, begun, wait.no_wait, &sentence, output).await
        }
        VdcVerb::Delete { name } => {
            let request =
                DeleteVdcRequest { request_id: request_id(), name: names::vdc(&name), ..Default::default() };
            let answer = client
                .call(&format!("delete vdc {name}"), request, |channel, request| async move {
                    VdcServiceClient::new(channel).delete_vdc(request).await
                })
                .await?;
            output.done(&answer, &format!("deleted vdc {name}"))
        }
    }
}

/// Changes what is named.
async fn update(client: &Client, name: &Name, change: UpdateArgs, output: Output) -> Result<(), Failure> {
    let doing = format!("update vdc {name}");
    let now = get(client, name).await?;
    let (quota, share) = (now.quota.unwrap_or_default(), now.share.unwrap_or_default());
    let bandwidth = quota.bandwidth_bytes_per_second;
    // Without both the share stays; a weight that came from the vcpus is not frozen by a new cap.
    let new_share = (change.weight.is_some() || change.burst.is_some()).then(|| Share {
        weight: change.weight.unwrap_or(if share.weight == quota.vcpus.saturating_mul(100) {
            0
        } else {
            share.weight
        }),
        burst_percent: change.burst.unwrap_or(share.burst_percent),
    });
    let request = UpdateVdcRequest {
        request_id: request_id(),
        name: names::vdc(name),
        quota: Some(Quota {
            vcpus: change.vcpus.unwrap_or(quota.vcpus),
            memory_bytes: change.memory.map_or(quota.memory_bytes, |m| m.bytes()),
            storage_bytes: change.storage.map_or(quota.storage_bytes, |s| s.bytes()),
            iops: change.iops.unwrap_or(quota.iops),
            bandwidth_bytes_per_second: change.bandwidth.map_or(bandwidth, |b| b.bytes()),
            snapshots: change.snapshots.unwrap_or(quota.snapshots),
        }),
        share: new_share,
        // What is not named stays as it was read: nobody may have changed it in between.
        expected_generation: now.generation,
    };
    let vdc = client
        .call(&doing, request, |channel, request| async move {
            VdcServiceClient::new(channel).update_vdc(request).await
        })
        .await?;
    output.done(&vdc, &format!("updated vdc {name}: {}", quota_text(vdc.quota.as_ref())))
}

async fn snapshot(client: &Client, args: VdcSnapshotArgs, output: Output) -> Result<(), Failure> {
    let consistency = match args.consistency {
        ConsistencyArg::Crash => PointClass::Crash,
        ConsistencyArg::App => PointClass::App,
    };
    let request = CreateVdcSnapshotRequest {
        request_id: request_id(),
        vdc: names::vdc(&args.vdc),
        snapshot_id: args.name.to_string(),
        consistency: consistency.into(),
        require_app: args.require_app,
    };
    let whole = client
        .call(&format!("snapshot vdc {}", args.vdc), request, |channel, request| async move {
            VdcServiceClient::new(channel).create_vdc_snapshot(request).await
        })
        .await?;
    let mut sentence =
        format!("sealed {} volumes of vdc {} as {}", whole.snapshots.len(), args.vdc, args.name);
    for part in whole.snapshots.iter().filter(|part| !part.class_reason.is_empty()) {
        let (name, class) = (names::short(&part.name), volume::class(part.class()));
        sentence
            .push_str(&format!("\n{name} is {class}-consistent only: {}", output::clean(&part.class_reason)));
    }
    output.done(&whole, &sentence)
}

async fn snapshots(client: &Client, name: &Name, output: Output) -> Result<(), Failure> {
    let request = ListVdcSnapshotsRequest { vdc: names::vdc(name), ..Default::default() };
    let answer = client
        .call(&format!("list the snapshots of vdc {name}"), request, |channel, request| async move {
            VdcServiceClient::new(channel).list_vdc_snapshots(request).await
        })
        .await?;
    output.list(&answer.snapshots, &["NAME", "VOLUMES", "CLASS", "CREATED", "STATE"], |whole| {
        vec![
            names::short_point(&whole.name),
            whole.snapshots.len().to_string(),
            volume::class(whole.class()).to_owned(),
            output::time(whole.create_time.as_ref()),
            if whole.deleting { "deleting" } else { "ready" }.to_owned(),
        ]
    })
}

pub(super) async fn get(client: &Client, name: &Name) -> Result<Vdc, Failure> {
    client
        .call(
            &format!("show vdc {name}"),
            GetVdcRequest { name: names::vdc(name) },
            |channel, request| async move { VdcServiceClient::new(channel).get_vdc(request).await },
        )
        .await
}

fn row(vdc: &Vdc) -> Vec<String> {
    let used = vdc.used.unwrap_or_default();
    let quota = vdc.quota.unwrap_or_default();
    vec![
        names::short(&vdc.name),
        format!("{}/{}", used.vcpus, quota.vcpus),
        format!("{}/{}", output::size(used.memory_bytes), output::size(quota.memory_bytes)),
        format!("{}/{}", output::size(used.storage_bytes), output::size(quota.storage_bytes)),
        output::time(vdc.create_time.as_ref()),
    ]
}

fn show(vdc: &Vdc, output: Output) -> Result<(), Failure> {
    let [name, vcpus, memory, storage, created] = row(vdc).try_into().unwrap_or_default();
    let (used, quota) = (vdc.used.unwrap_or_default(), vdc.quota.unwrap_or_default());
    let share = vdc.share.unwrap_or_default();
    output.one(
        vdc,
        &[
            ("name", name),
            ("uid", vdc.uid.clone()),
            ("generation", vdc.generation.to_string()),
            ("created", created),
            ("vcpus", format!("{vcpus} used")),
            ("memory", format!("{memory} used")),
            ("storage", format!("{storage} used")),
            ("volumes", keys::encryption(vdc.encryption()).to_owned()),
            ("snapshots", of(used.snapshots.to_string(), u64::from(quota.snapshots), |n| n.to_string())),
            ("iops", cap(quota.iops, |n| format!("{n} reads and {n} writes a second"))),
            (
                "bandwidth",
                cap(quota.bandwidth_bytes_per_second, |n| {
                    format!("{0} read and {0} written a second", output::size(n))
                }),
            ),
            ("weight", share.weight.to_string()),
            ("burst", cap(u64::from(share.burst_percent), |n| format!("{n}% of one processor"))),
        ],
    )
}

/// A cap, in words.
fn cap(limit: u64, show: impl Fn(u64) -> String) -> String {
    if limit == 0 { "no limit".to_owned() } else { show(limit) }
}

fn of(used: String, limit: u64, show: impl Fn(u64) -> String) -> String {
    if limit == 0 { format!("{used} used, no limit") } else { format!("{used}/{} used", show(limit)) }
}

fn quota_text(quota: Option<&Quota>) -> String {
    let quota = quota.copied().unwrap_or_default();
    let mut text = format!(
        "{} vcpus, {} memory, {} storage",
        quota.vcpus,
        output::size(quota.memory_bytes),
        output::size(quota.storage_bytes)
    );
    if quota.iops > 0 {
        text.push_str(&format!(", {} iops", quota.iops));
    }
    if quota.bandwidth_bytes_per_second > 0 {
        text.push_str(&format!(", {} a second", output::size(quota.bandwidth_bytes_per_second)));
    }
    if quota.snapshots > 0 {
        text.push_str(&format!(", {} snapshots", quota.snapshots));
    }
    text
}
