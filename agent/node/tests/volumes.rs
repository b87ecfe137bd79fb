//! What can be done to volumes beyond making them, through the API of a real seriod with real volume processes and, where
//! the machine has KVM, with a guest that writes meanwhile. The bytes are looked at by qemu-io, over NBD.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use common::{Seriod, import_image, mini_guest, writer::Logs};
use serio_api::v1::{
    CancelOperationRequest, CloneVolumeRequest, CreateExportRequest, CreateSnapshotRequest, CreateVdcRequest,
    CreateVdcSnapshotRequest, CreateVmRequest, CreateVolumeRequest, DeleteExportRequest, DeleteImageRequest,
    DeleteSnapshotRequest, DeleteVdcSnapshotRequest, DeleteVmRequest, DeleteVolumeRequest,
    FlattenVolumeRequest, GetOperationRequest, GetVolumeRequest, ListChangedRangesRequest,
    ListOperationsRequest, ListSnapshotsRequest, ListVdcSnapshotsRequest, Operation, OperationState,
    PointClass, Quota, ResizeVolumeRequest, RollbackVolumeRequest, StartVmRequest, StopVmRequest, VmSpec,
    Volume, WatchOperationRequest, image_service_client::ImageServiceClient,
    operation_service_client::OperationServiceClient, vdc_service_client::VdcServiceClient,
    vm_service_client::VmServiceClient, volume_service_client::VolumeServiceClient,
};
use tonic::{Code, Status, transport::Channel};

const MIB: u64 = 1 << 20;
/// For what takes milliseconds, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two tries of what is refused for a moment.
const LOOK: Duration = Duration::from_millis(20);

struct Node {
    seriod: Seriod,
    channel: Channel,
}

fn named(name: &str) -> String {
    format!("vdcs/ardesio/volumes/{name}")
}

fn point(volume: &str, name: &str) -> String {
    format!("vdcs/ardesio/volumes/{volume}/snapshots/{name}")
}

impl Node {
    /// A node with a vdc; `None` says why not.
    async fn start(more: &str) -> Option<Self> {
        let mut seriod = Seriod::new(more);
        if let Err(why) = seriod.with_programs() {
            eprintln!("skipped: {why}");
            return None;
        }
        if Command::new("qemu-io").arg("--version").output().is_err() {
            eprintln!("skipped: qemu-io is not installed (apt install qemu-utils)");
            return None;
        }
        seriod.start();
        let channel = seriod.connect().await.unwrap();
        let quota =
            Quota { vcpus: 8, memory_bytes: 256 << 20, storage_bytes: 64 * MIB, ..Default::default() };
        let vdc = CreateVdcRequest { vdc_id: "ardesio".into(), quota: Some(quota), ..Default::default() };
        VdcServiceClient::new(channel.clone()).create_vdc(vdc).await.unwrap();
        Some(Self { seriod, channel })
    }

    fn volumes(&self) -> VolumeServiceClient<Channel> {
        VolumeServiceClient::new(self.channel.clone())
    }

    fn vdcs(&self) -> VdcServiceClient<Channel> {
        VdcServiceClient::new(self.channel.clone())
    }

    fn vms(&self) -> VmServiceClient<Channel> {
        VmServiceClient::new(self.channel.clone())
    }

    fn operations(&self) -> OperationServiceClient<Channel> {
        OperationServiceClient::new(self.channel.clone())
    }

    async fn restart(&mut self) {
        self.seriod.kill();
        self.seriod.start();
        self.channel = self.seriod.connect().await.unwrap();
    }

    async fn create(&self, volume_id: &str, size_bytes: u64, image: &str) -> Volume {
        let request = CreateVolumeRequest {
            parent: "vdcs/ardesio".into(),
            volume_id: volume_id.into(),
            size_bytes,
            source_image: image.into(),
            ..Default::default()
        };
        self.volumes().create_volume(request).await.unwrap().into_inner()
    }

    async fn get(&self, volume: &str) -> Volume {
        let request = GetVolumeRequest { name: named(volume) };
        self.volumes().get_volume(request).await.unwrap().into_inner()
    }

    async fn seal(&self, volume: &str, snapshot_id: &str) {
        let request = CreateSnapshotRequest {
            volume: named(volume),
            snapshot_id: snapshot_id.into(),
            ..Default::default()
        };
        self.volumes().create_snapshot(request).await.unwrap();
    }

    async fn delete_snapshot(&self, volume: &str, name: &str) -> Result<Operation, Status> {
        let request = DeleteSnapshotRequest { name: point(volume, name), ..Default::default() };
        self.volumes().delete_snapshot(request).await.map(tonic::Response::into_inner)
    }

    async fn resize(&self, volume: &str, size_bytes: u64) -> Result<Volume, Status> {
        let request = ResizeVolumeRequest { name: named(volume), size_bytes, ..Default::default() };
        self.volumes().resize_volume(request).await.map(tonic::Response::into_inner)
    }

    async fn rollback(&self, volume: &str, to: &str, discard_later: bool) -> Result<Volume, Status> {
        let request =
            RollbackVolumeRequest { snapshot: point(volume, to), discard_later, ..Default::default() };
        self.volumes().rollback_volume(request).await.map(tonic::Response::into_inner)
    }

    async fn clone(&self, volume: &str, from: &str, to: &str) -> Volume {
        let request =
            CloneVolumeRequest { source: point(volume, from), volume_id: to.into(), ..Default::default() };
        self.volumes().clone_volume(request).await.unwrap().into_inner()
    }

    /// Follows an operation to its end.
    async fn end_of(&self, operation: &Operation) -> Operation {
        let request = WatchOperationRequest { name: operation.name.clone() };
        let mut stream = self.operations().watch_operation(request).await.unwrap().into_inner();
        let mut last = None;
        let all = async {
            while let Some(next) = stream.message().await.unwrap() {
                last = Some(next);
            }
        };
        tokio::time::timeout(PATIENCE, all).await.expect("an operation ends");
        last.unwrap()
    }

    async fn done(&self, operation: &Operation) {
        let end = self.end_of(operation).await;
        assert_eq!(end.state(), OperationState::Done, "{end:?}");
    }

    /// Has qemu-io work on a volume, or on a point of it, over NBD.
    async fn io(&self, volume: &str, snapshot: &str, commands: &[&str]) {
        let request = CreateExportRequest {
            volume: named(volume),
            snapshot: snapshot.into(),
            writable: snapshot.is_empty(),
            ..Default::default()
        };
        // After a start of seriod a volume is looked at first, and who comes too early is told to come again.
        let export = loop {
            match self.volumes().create_export(request.clone()).await {
                Ok(export) => break export.into_inner(),
                Err(status) if status.code() == Code::Aborted => tokio::time::sleep(LOOK).await,
                Err(status) => panic!("{status}"),
            }
        };
        let mut qemu = Command::new("qemu-io");
        qemu.args(["-f", "raw"]).args(snapshot.is_empty().then_some(()).map_or(&["-r"][..], |()| &[]));
        qemu.args(commands.iter().flat_map(|command| ["-c", command]));
        qemu.arg(&export.unix_uri);
        let ran = tokio::task::spawn_blocking(move || qemu.output().unwrap()).await.unwrap();
        let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
        let fine = ran.status.success() && !said.contains("failed");
        assert!(fine, "{volume}@{snapshot} {commands:?}: {said}");
        let request = DeleteExportRequest { name: export.name, ..Default::default() };
        self.volumes().delete_export(request).await.unwrap();
    }

    /// Changed ranges as (offset, length) in KiB.
    async fn changes(&self, volume: &str, from: &str, to: &str) -> Vec<(u64, u64)> {
        let mut request = ListChangedRangesRequest {
            volume: named(volume),
            from_snapshot: from.into(),
            to_snapshot: to.into(),
            // Many pages.
            page_size: 1,
            page_token: String::new(),
        };
        let mut ranges = Vec::new();
        loop {
            let page = self.volumes().list_changed_ranges(request.clone()).await.unwrap().into_inner();
            ranges.extend(page.ranges.iter().map(|r| (r.offset_bytes >> 10, r.length_bytes >> 10)));
            if page.next_page_token.is_empty() {
                return ranges;
            }
            request.page_token = page.next_page_token;
        }
    }

    fn files(&self, volume: &Volume) -> Vec<String> {
        let dir = self.seriod.dir.path().join("state/volumes").join(&volume.uid);
        let entries = std::fs::read_dir(dir).unwrap();
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name.ends_with(".data") || name.ends_with(".map"));
        names.sort();
        names
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_volume_grows_is_cloned_goes_back_and_loses_snapshots() {
    let Some(mut node) = Node::start("").await else { return };
    let kernel = match mini_guest() {
        Ok(kernel) => kernel,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    import_image(node.channel.clone(), "base", "", &kernel, &vec![0xba; MIB as usize]).await;
    let data = node.create("data", 4 * MIB, "images/base").await;
    assert!(data.shared_bytes >= MIB && data.allocated_bytes < MIB, "an image is shared: {data:?}");
    node.io("data", "", &["read -P 0xba 0 1M", "read -P 0 1M 3M", "write -P 1 0 64k"]).await;
    node.seal("data", "a").await;
    node.io("data", "", &["write -P 2 64k 64k"]).await;
    node.seal("data", "b").await;
    node.io("data", "", &["write -P 3 128k 64k"]).await;
    assert_eq!(node.changes("data", "a", "b").await, [(64, 64)]);
    assert_eq!(node.changes("data", "a", "").await, [(64, 128)]);

    let copy = node.clone("data", "b", "copy").await;
    assert_eq!((copy.size_bytes, copy.source_snapshot.as_str()), (4 * MIB, point("data", "b").as_str()));
    let as_b = ["read -P 1 0 64k", "read -P 2 64k 64k", "read -P 0xba 128k 896k", "read -P 0 1M 3M"];
    node.io("copy", "", &as_b).await;
    node.io("copy", "", &["write -P 9 0 4k"]).await;

    // A snapshot goes: all others, and the clone, read as before; its files are gone.
    node.done(&node.delete_snapshot("data", "a").await.unwrap()).await;
    assert_eq!(node.get("data").await.snapshots, ["b"]);
    assert_eq!(node.files(&data).len(), 6, "{:?}", node.files(&data));
    node.io("data", "b", &as_b).await;
    node.io("data", "", &["read -P 1 0 64k", "read -P 2 64k 64k", "read -P 3 128k 64k"]).await;
    node.io("copy", "", &["read -P 9 0 4k", "read -P 1 4k 60k", "read -P 2 64k 64k"]).await;
    assert_eq!(node.delete_snapshot("data", "a").await.unwrap_err().code(), Code::NotFound);

    // It grows, within the quota, and does not shrink.
    assert_eq!(node.resize("data", 8 * MIB).await.unwrap().size_bytes, 8 * MIB);
    node.io("data", "", &["read -P 0 4M 4M", "write -P 4 7M 1M"]).await;
    assert_eq!(node.resize("data", MIB).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(node.resize("data", 1 << 40).await.unwrap_err().code(), Code::ResourceExhausted);

    // It goes back, and is as large as it was.
    node.seal("data", "c").await;
    assert_eq!(node.rollback("data", "b", false).await.unwrap_err().code(), Code::FailedPrecondition);
    let back = node.rollback("data", "b", true).await.unwrap();
    assert_eq!((back.size_bytes, back.snapshots), (4 * MIB, vec!["b".to_owned()]));
    node.io("data", "", &as_b).await;

    // The image goes, what was made of it stays; then a volume stands alone.
    let delete = DeleteImageRequest { name: "images/base".into(), ..Default::default() };
    ImageServiceClient::new(node.channel.clone()).delete_image(delete).await.unwrap();
    let flatten = FlattenVolumeRequest { name: named("copy"), ..Default::default() };
    let flatten = node.volumes().flatten_volume(flatten).await.unwrap().into_inner();
    node.done(&flatten).await;
    let copy = node.get("copy").await;
    // The layer that its source has lost meanwhile was the copy's own already, and stays.
    assert_eq!((copy.shared_bytes, node.files(&copy).len()), (0, 4), "{:?}", node.files(&copy));
    let delete = DeleteVolumeRequest { name: named("data"), ..Default::default() };
    node.volumes().delete_volume(delete).await.unwrap();
    node.restart().await;
    node.io(
        "copy",
        "",
        &["read -P 9 0 4k", "read -P 1 4k 60k", "read -P 2 64k 64k", "read -P 0xba 128k 896k"],
    )
    .await;
    let ended =
        node.operations().list_operations(ListOperationsRequest::default()).await.unwrap().into_inner();
    assert!(ended.operations.iter().all(|o| o.state() == OperationState::Done && o.end_time.is_some()));
    assert_eq!(ended.operations.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_merge_survives_seriod_gives_way_and_can_be_cancelled() {
    // 4 MiB at this pace take half a minute: longer than the test.
    let Some(mut node) = Node::start("[volumes]\nmerge_pace = \"128KiB\"\n").await else { return };
    node.create("data", 8 * MIB, "").await;
    node.io("data", "", &["write -P 1 0 4M"]).await;
    node.seal("data", "a").await;
    node.io("data", "", &["write -P 2 0 4k"]).await;
    let operation = node.delete_snapshot("data", "a").await.unwrap();
    let request = GetOperationRequest { name: operation.name.clone() };
    let moves = async |node: &Node| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = node.operations().get_operation(request.clone()).await.unwrap().into_inner();
            assert_eq!(now.state(), OperationState::Running, "{now:?}");
            if now.done_bytes > 0 {
                return;
            }
            assert!(Instant::now() < deadline, "no progress: {now:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    moves(&node).await;
    node.restart().await;
    moves(&node).await;
    // Who wants the volume has it, and the merge goes on afterwards.
    node.seal("data", "b").await;
    node.resize("data", 12 * MIB).await.unwrap();
    moves(&node).await;
    let again = node.delete_snapshot("data", "a").await.unwrap_err();
    assert_eq!(again.code(), Code::Aborted, "{again}");
    let cancel = CancelOperationRequest { name: operation.name.clone() };
    node.operations().cancel_operation(cancel).await.unwrap();
    assert_eq!(node.end_of(&operation).await.state(), OperationState::Cancelled);
    node.io("data", "a", &["read -P 1 0 4M", "read -P 0 4M 4M"]).await;
    node.io("data", "", &["read -P 2 0 4k", "read -P 1 4k 4092k", "read -P 0 4M 8M"]).await;
    assert_eq!(node.get("data").await.snapshots, ["a", "b"]);
    // A volume may be deleted whatever is going on in it.
    let operation = node.delete_snapshot("data", "a").await.unwrap();
    let delete = DeleteVolumeRequest { name: named("data"), ..Default::default() };
    node.volumes().delete_volume(delete).await.unwrap();
    assert_eq!(node.end_of(&operation).await.state(), OperationState::Cancelled);
}

async fn run_writer(node: &Node, name: &str) {
    let spec = VmSpec {
        vcpus: 1,
        memory_bytes: 32 << 20,
        image: "images/mini".into(),
        root_disk_bytes: MIB,
        ..Default::default()
    };
    let request = CreateVmRequest {
        parent: "vdcs/ardesio".into(),
        vm_id: name.into(),
        spec: Some(spec),
        start: true,
        ..Default::default()
    };
    node.vms().create_vm(request).await.unwrap();
}

/// Waits until each guest has flushed more.
async fn wait_for_rounds(logs: &mut Logs, vms: &Path, more: u64) {
    let (deadline, before) = (Instant::now() + PATIENCE, logs.rounds());
    while logs.rounds() < before + more {
        assert!(Instant::now() < deadline, "the guests do not write");
        tokio::time::sleep(Duration::from_millis(20)).await;
        logs.look(vms);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vdc_is_sealed_and_merged_while_its_guests_write() {
    let Some(mut node) = Node::start("").await else { return };
    let kernel = match mini_guest() {
        Ok(kernel) => kernel,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    import_image(node.channel.clone(), "mini", "mini.test=writer", &kernel, &[]).await;
    node.create("still", 2 * MIB, "").await;
    node.io("still", "", &["write -P 5 0 64k"]).await;
    run_writer(&node, "one").await;
    run_writer(&node, "two").await;
    let (mut logs, vms) = (Logs::default(), node.seriod.dir.path().join("state/vms"));
    wait_for_rounds(&mut logs, &vms, 4).await;
    for name in ["m", "n"] {
        let request = CreateVdcSnapshotRequest {
            vdc: "vdcs/ardesio".into(),
            snapshot_id: name.into(),
            consistency: PointClass::App.into(),
            ..Default::default()
        };
        let whole = node.vdcs().create_vdc_snapshot(request).await.unwrap().into_inner();
        assert_eq!((whole.snapshots.len(), whole.class()), (3, PointClass::Crash));
        assert!(whole.snapshots.iter().all(|s| !s.class_reason.is_empty()), "{whole:?}");
        wait_for_rounds(&mut logs, &vms, 4).await;
    }
    // The mini guest has no agent.
    let strict = CreateVdcSnapshotRequest {
        vdc: "vdcs/ardesio".into(),
        snapshot_id: "strict".into(),
        consistency: PointClass::App.into(),
        require_app: true,
        ..Default::default()
    };
    assert_eq!(node.vdcs().create_vdc_snapshot(strict).await.unwrap_err().code(), Code::FailedPrecondition);
    let parts = ListSnapshotsRequest { volume: named("one-root"), ..Default::default() };
    let parts = node.volumes().list_snapshots(parts).await.unwrap().into_inner().snapshots;
    let names: Vec<&str> = parts.iter().map(|p| p.vdc_snapshot.as_str()).collect();
    assert_eq!(&names[..2], ["vdcs/ardesio/snapshots/m", "vdcs/ardesio/snapshots/n"]);
    assert_eq!(node.delete_snapshot("one-root", "m").await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(node.resize("one-root", 2 * MIB).await.unwrap().size_bytes, 2 * MIB);

    // Merged away under the guests' hands; one is stopped and started meanwhile, and seriod is killed.
    let request = DeleteVdcSnapshotRequest { name: "vdcs/ardesio/snapshots/m".into(), ..Default::default() };
    let operation = node.vdcs().delete_vdc_snapshot(request).await.unwrap().into_inner();
    let stop = StopVmRequest { name: "vdcs/ardesio/vms/two".into(), force: true, ..Default::default() };
    node.vms().stop_vm(stop).await.unwrap();
    node.restart().await;
    let start = StartVmRequest { name: "vdcs/ardesio/vms/two".into(), ..Default::default() };
    node.vms().start_vm(start).await.unwrap();
    node.done(&operation).await;
    let left = ListVdcSnapshotsRequest { vdc: "vdcs/ardesio".into(), ..Default::default() };
    let left = node.vdcs().list_vdc_snapshots(left).await.unwrap().into_inner().snapshots;
    assert_eq!(left.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["vdcs/ardesio/snapshots/n"]);
    wait_for_rounds(&mut logs, &vms, 4).await;
    // Nothing flushed was lost: a start after all this finds it.
    for name in ["one", "two"] {
        let name = format!("vdcs/ardesio/vms/{name}");
        let stop = StopVmRequest { name: name.clone(), force: true, ..Default::default() };
        node.vms().stop_vm(stop).await.unwrap();
        node.vms().start_vm(StartVmRequest { name, ..Default::default() }).await.unwrap();
    }
    wait_for_rounds(&mut logs, &vms, 4).await;
    node.io("still", "n", &["read -P 5 0 64k"]).await;
    for name in ["one", "two"] {
        let name = format!("vdcs/ardesio/vms/{name}");
        let delete = DeleteVmRequest { name, force: true, ..Default::default() };
        node.vms().delete_vm(delete).await.unwrap();
    }
}
