//! VMs that go to another node: an archive that is ten bytes.

use serio_api::v1::{ImportVmSnapshotRequest, VmArchivePiece, VmSnapshot, import_vm_snapshot_request::What};
use tonic::{Status, Streaming};

/// The snapshot `cut` breaks off.
pub(super) fn export(name: &str) -> Vec<Result<VmArchivePiece, Status>> {
    let piece = |data: &[u8]| Ok(VmArchivePiece { data: data.to_vec(), estimated_bytes: 0 });
    let mut pieces = vec![piece(b"an arch"), piece(b"ive")];
    if name.ends_with("/cut") {
        pieces.push(Err(Status::internal("the disk is gone")));
    }
    pieces
}

pub(super) async fn import(mut input: Streaming<ImportVmSnapshotRequest>) -> Result<VmSnapshot, Status> {
    let (mut archive, mut name) = (Vec::new(), String::new());
    while let Some(message) = input.message().await? {
        match message.what {
            Some(What::Target(target)) => {
                name = format!("{}/vms/{}/snapshots/before", target.parent, target.vm_id);
            }
            Some(What::Data(data)) => archive.extend(data),
            None => {}
        }
    }
    if archive != b"an archive" {
        return Err(Status::invalid_argument("the archive broke off"));
    }
    Ok(VmSnapshot { name, ..VmSnapshot::default() })
}
