//! `vm snapshot`, `snapshots`, `restore` and `delete-snapshot`: VMs with their memory at an instant.

use serio_api::v1::{
    DeleteVmSnapshotRequest, ListVmSnapshotsRequest, RestoreVmRequest, SnapshotVmRequest, Vm,
    vm_service_client::VmServiceClient,
};
use serio_types::{Name, VdcName};

use super::{operation, request_id};
use crate::{
    args::{RestoreArgs, WaitArgs},
    client::Client,
    error::Failure,
    names, output,
    output::Output,
};

pub(super) async fn snapshot(
    client: &Client,
    vm: VdcName,
    name: Option<Name>,
    output: Output,
) -> Result<(), Failure> {
    // Sortable, and one a second.
    let name = name.map_or_else(|| format!("s{}", output::now_compact()), |name| name.to_string());
    let request = SnapshotVmRequest { request_id: request_id(), vm: names::vm(&vm), snapshot_id: name };
    let made = client
        .call(&format!("snapshot vm {vm}"), request, |channel, request| async move {
            VmServiceClient::new(channel).snapshot_vm(request).await
        })
        .await?;
    let pause =
        made.pause.as_ref().map_or(0, |pause| pause.seconds * 1000 + i64::from(pause.nanos) / 1_000_000);
    let sentence = format!(
        "saved vm {vm} as {}: {} of memory{} and {} volumes; it stood still for {pause} ms",
        names::short_point(&made.name),
        output::size(made.memory_bytes),
        if made.incremental { " that had changed" } else { "" },
        made.volume_snapshots.len()
    );
    output.done(&made, &sentence)
}

pub(super) async fn snapshots(client: &Client, vm: &VdcName, output: Output) -> Result<(), Failure> {
    let request = ListVmSnapshotsRequest { vm: names::vm(vm), ..Default::default() };
    let answer = client
        .call(&format!("list the snapshots of vm {vm}"), request, |channel, request| async move {
            VmServiceClient::new(channel).list_vm_snapshots(request).await
        })
        .await?;
    output.list(&answer.snapshots, &["NAME", "MEMORY", "SINCE", "VOLUMES", "CREATED", "STATE"], |whole| {
        vec![
            names::short_point(&whole.name),
            output::size(whole.memory_bytes),
            match (whole.incremental, whole.parent.as_str()) {
                (false, _) => "whole".to_owned(),
                (true, "") => "a deleted one".to_owned(),
                (true, parent) => names::short_point(parent),
            },
            whole.volume_snapshots.len().to_string(),
            output::time(whole.create_time.as_ref()),
            if whole.deleting { "deleting" } else { "ready" }.to_owned(),
        ]
    })
}

pub(super) async fn restore(client: &Client, args: RestoreArgs) -> Result<Vm, Failure> {
    let RestoreArgs { vm, snapshot, as_new, discard_later } = args;
    let request = RestoreVmRequest {
        request_id: request_id(),
        name: names::vm_snapshot(&vm, &snapshot),
        as_new: as_new.map(String::from).unwrap_or_default(),
        discard_later,
        ..RestoreVmRequest::default()
    };
    client
        .call(&format!("restore vm {vm} at {snapshot}"), request, |channel, request| async move {
            VmServiceClient::new(channel).restore_vm(request).await
        })
        .await
}

pub(super) async fn delete(
    client: &Client,
    (vm, snapshot): (&VdcName, &Name),
    wait: WaitArgs,
    output: Output,
) -> Result<(), Failure> {
    let request =
        DeleteVmSnapshotRequest { request_id: request_id(), name: names::vm_snapshot(vm, snapshot) };
    let begun = client
        .call(&format!("delete vm snapshot {vm}@{snapshot}"), request, |channel, request| async move {
            VmServiceClient::new(channel).delete_vm_snapshot(request).await
        })
        .await?;
    operation::follow(client, begun, wait.no_wait, &format!("deleted vm snapshot {vm}@{snapshot}"), output)
        .await
}
