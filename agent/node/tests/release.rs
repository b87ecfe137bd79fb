//! TRIM on a snapshot's export, through the API of a real seriod: what only the snapshot holds is given back; the volume, its
//! clone and the next snapshot keep what they have. The client is qemu-io.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{os::unix::fs::MetadataExt, path::PathBuf, process::Command};

use common::Seriod;
use serio_api::v1::{
    CloneVolumeRequest, CreateExportRequest, CreateSnapshotRequest, CreateVdcRequest, CreateVolumeRequest,
    DeleteExportRequest, Quota, Volume, vdc_service_client::VdcServiceClient,
    volume_service_client::VolumeServiceClient,
};
use tonic::{Code, transport::Channel};

const MIB: u64 = 1 << 20;

struct Node {
    seriod: Seriod,
    volumes: VolumeServiceClient<Channel>,
}

fn named(name: &str) -> String {
    format!("vdcs/ardesio/volumes/{name}")
}

impl Node {
    async fn start() -> Option<Node> {
        let mut seriod = Seriod::new("");
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
        Some(Node { seriod, volumes: VolumeServiceClient::new(channel) })
    }

    async fn create(&mut self) -> Volume {
        let request = CreateVolumeRequest {
            parent: "vdcs/ardesio".into(),
            volume_id: "data".into(),
            size_bytes: 8 * MIB,
            ..Default::default()
        };
        self.volumes.create_volume(request).await.unwrap().into_inner()
    }

    async fn seal(&mut self, snapshot_id: &str) {
        let request = CreateSnapshotRequest {
            volume: named("data"),
            snapshot_id: snapshot_id.into(),
            ..Default::default()
        };
        self.volumes.create_snapshot(request).await.unwrap();
    }

    /// Has qemu-io work on an export; what it said, and whether all went well.
    async fn io(
        &mut self,
        volume: &str,
        change: impl FnOnce(&mut CreateExportRequest),
        commands: &[&str],
    ) -> (bool, String) {
        let mut request = CreateExportRequest { volume: named(volume), ..Default::default() };
        change(&mut request);
        let read_only = !request.writable;
        let export = self.volumes.create_export(request).await.unwrap().into_inner();
        assert_eq!(export.read_only, read_only);
        let mut qemu = Command::new("qemu-io");
        qemu.args(["-f", "raw", "-d", "unmap"]).args(read_only.then_some("-r"));
        qemu.args(commands.iter().flat_map(|command| ["-c", command]));
        qemu.arg(&export.unix_uri);
        let ran = tokio::task::spawn_blocking(move || qemu.output().unwrap()).await.unwrap();
        let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
        self.volumes
            .delete_export(DeleteExportRequest { name: export.name, ..Default::default() })
            .await
            .unwrap();
        (ran.status.success() && !said.contains("failed"), said)
    }

    /// TRIM, as a client that minds no flags sends it: qemu-io itself never discards on a read-only disk.
    async fn trim(&mut self, release_on_trim: bool, code: &str) -> (bool, String) {
        let request = CreateExportRequest {
            volume: named("data"),
            snapshot: "one".into(),
            release_on_trim,
            ..Default::default()
        };
        let export = self.volumes.create_export(request).await.unwrap().into_inner();
        let mut shell = Command::new("env");
        shell.args(["PATH=/usr/bin:/bin", "nbdsh", "-u", &export.unix_uri, "-c", code]);
        let ran = tokio::task::spawn_blocking(move || shell.output().unwrap()).await.unwrap();
        self.volumes
            .delete_export(DeleteExportRequest { name: export.name, ..Default::default() })
            .await
            .unwrap();
        (ran.status.success(), String::from_utf8_lossy(&ran.stderr).into_owned())
    }

    fn used(&self, volume: &Volume) -> u64 {
        let dir: PathBuf = self.seriod.dir.path().join("state/volumes").join(&volume.uid);
        std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|e| e == "data"))
            .map(|path| std::fs::metadata(path).unwrap().blocks() * 512)
            .sum()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trim_of_a_snapshot_gives_back_what_only_it_holds() {
    let Some(mut node) = Node::start().await else { return };
    if Command::new("nbdsh").arg("--version").output().is_err() {
        return eprintln!("skipped: nbdsh is not installed (apt install python3-libnbd)");
    }
    let volume = node.create().await;
    let fine = |(fine, said): (bool, String)| assert!(fine, "{said}");
    let writable = |request: &mut CreateExportRequest| request.writable = true;
    fine(node.io("data", writable, &["write -P 1 0 2M"]).await);
    node.seal("one").await;
    // The first MiB is the snapshot's alone now, the second one is the volume's too.
    fine(node.io("data", writable, &["write -P 2 0 1M"]).await);

    // Only a snapshot has something to release.
    let mut head = CreateExportRequest { volume: named("data"), release_on_trim: true, ..Default::default() };
    let refused = node.volumes.create_export(head.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    head.snapshot = "none".into();
    assert_eq!(node.volumes.create_export(head).await.unwrap_err().code(), Code::NotFound);

    // Nobody asked for it: TRIM is refused.
    let before = node.used(&volume);
    let forbidden = "assert h.is_read_only() and not h.can_trim()\nh.set_strict_mode(0)\n\
        try:\n  h.trim(4096, 0)\n  assert False\nexcept nbd.Error as e:\n  assert e.errno == 'EPERM'";
    fine(node.trim(false, forbidden).await);
    assert_eq!(node.used(&volume), before);

    fine(node.trim(true, "assert h.can_trim()\nh.trim(h.get_size(), 0)").await);
    assert_eq!(before - node.used(&volume), MIB, "the space is given back");
    let at = |request: &mut CreateExportRequest| request.snapshot = "one".into();
    fine(node.io("data", at, &["read -P 0 0 1M", "read -P 1 1M 1M"]).await);
    fine(node.io("data", |_| (), &["read -P 2 0 1M", "read -P 1 1M 1M"]).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clone_keeps_what_the_snapshot_releases() {
    let Some(mut node) = Node::start().await else { return };
    if Command::new("nbdsh").arg("--version").output().is_err() {
        return eprintln!("skipped: nbdsh is not installed (apt install python3-libnbd)");
    }
    node.create().await;
    let fine = |(fine, said): (bool, String)| assert!(fine, "{said}");
    let writable = |request: &mut CreateExportRequest| request.writable = true;
    fine(node.io("data", writable, &["write -P 1 0 2M"]).await);
    node.seal("one").await;
    let clone = CloneVolumeRequest {
        source: format!("{}/snapshots/one", named("data")),
        volume_id: "copy".into(),
        ..Default::default()
    };
    node.volumes.clone_volume(clone).await.unwrap();
    fine(node.io("data", writable, &["write -P 2 0 1M"]).await);
    node.seal("two").await;
    fine(node.io("data", writable, &["write -P 3 0 64k"]).await);
    fine(node.trim(true, "h.trim(h.get_size(), 0)").await);
    fine(node.io("copy", |_| (), &["read -P 1 0 2M"]).await);
    let at = |request: &mut CreateExportRequest| request.snapshot = "two".into();
    fine(node.io("data", at, &["read -P 2 0 1M", "read -P 1 1M 1M"]).await);
    fine(node.io("data", |_| (), &["read -P 3 0 64k", "read -P 2 64k 960k", "read -P 1 1M 1M"]).await);
}
