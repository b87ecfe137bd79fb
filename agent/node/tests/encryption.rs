//! Encrypted vdcs through the API of a real seriod with real volume processes: what the disk holds, that all which volumes can do
//! works, the rotation of the key that wraps, and the end of a vdc's key. The bytes are looked at by qemu-io, over NBD.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use common::{Seriod, import_image, mini_guest};
use serio_api::v1::{
    CloneVolumeRequest, CreateExportRequest, CreateSnapshotRequest, CreateVdcRequest, CreateVmRequest,
    CreateVolumeRequest, DeleteExportRequest, DeleteSnapshotRequest, DeleteVdcRequest, DeleteVolumeRequest,
    Encryption, EraseVdcRequest, GetVdcRequest, OperationState, Quota, ResizeVolumeRequest,
    RollbackVolumeRequest, RotateVdcKeyRequest, StartVmRequest, StopVmRequest, Vdc, VmSpec, Volume,
    WatchOperationRequest, operation_service_client::OperationServiceClient,
    vdc_service_client::VdcServiceClient, vm_service_client::VmServiceClient,
    volume_service_client::VolumeServiceClient,
};
use tonic::{Code, Status, transport::Channel};

const MIB: u64 = 1 << 20;
const VDC: &str = "vdcs/town-hall";

struct Node {
    seriod: Seriod,
    channel: Channel,
}

fn named(name: &str) -> String {
    format!("{VDC}/volumes/{name}")
}

fn point(volume: &str, name: &str) -> String {
    format!("{VDC}/volumes/{volume}/snapshots/{name}")
}

impl Node {
    /// A node with an encrypted vdc; `None` says why not.
    async fn start() -> Option<Self> {
        let mut seriod = Seriod::new("");
        if let Err(why) = seriod.with_programs() {
            eprintln!("skipped: {why}");
            return None;
        }
        if Command::new("qemu-io").arg("--version").output().is_err() {
            eprintln!("skipped: qemu-io is not installed (apt install qemu-utils)");
            return None;
        }
        for (name, fill) in [("old", 1), ("new", 2)] {
            let path = seriod.dir.path().join(name);
            fs::write(&path, [fill; 32]).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        }
        configure(&seriod, "old", &[]);
        seriod.start();
        let channel = seriod.connect().await.unwrap();
        let node = Self { seriod, channel };
        let made = node.create_vdc(true).await.unwrap();
        assert_eq!(made.encryption(), Encryption::Encrypted);
        Some(node)
    }

    async fn create_vdc(&self, encrypted: bool) -> Result<Vdc, Status> {
        let quota =
            Some(Quota { vcpus: 8, memory_bytes: 256 << 20, storage_bytes: 64 * MIB, ..Default::default() });
        let request = CreateVdcRequest { vdc_id: "town-hall".into(), quota, encrypted, ..Default::default() };
        self.vdcs().create_vdc(request).await.map(tonic::Response::into_inner)
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

    async fn restart(&mut self, source: &str, previous: &[&str]) {
        self.seriod.kill();
        configure(&self.seriod, source, previous);
        self.seriod.start();
        self.channel = self.seriod.connect().await.unwrap();
    }

    async fn create(&self, volume_id: &str, image: &str) -> Volume {
        let request = CreateVolumeRequest {
            parent: VDC.into(),
            volume_id: volume_id.into(),
            size_bytes: 4 * MIB,
            source_image: image.into(),
            ..Default::default()
        };
        self.volumes().create_volume(request).await.unwrap().into_inner()
    }

    async fn seal(&self, volume: &str, snapshot_id: &str) {
        let request = CreateSnapshotRequest {
            volume: named(volume),
            snapshot_id: snapshot_id.into(),
            ..Default::default()
        };
        self.volumes().create_snapshot(request).await.unwrap();
    }

    /// Has qemu-io work on a volume, or on a point of it, over NBD.
    async fn io(&self, volume: &str, snapshot: &str, commands: &[&str]) -> Result<(), Status> {
        let request = CreateExportRequest {
            volume: named(volume),
            snapshot: snapshot.into(),
            writable: snapshot.is_empty(),
            ..Default::default()
        };
        let export = self.volumes().create_export(request).await?.into_inner();
        let mut qemu = Command::new("qemu-io");
        qemu.args(["-f", "raw"]).args(snapshot.is_empty().then_some(()).map_or(&["-r"][..], |()| &[]));
        for command in commands {
            qemu.args(["-c", command]);
        }
        qemu.arg(&export.unix_uri);
        let ran = tokio::task::spawn_blocking(move || qemu.output().unwrap()).await.unwrap();
        let said = String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr);
        let fine = ran.status.success() && !said.contains("failed");
        assert!(fine, "{volume}@{snapshot} {commands:?}: {said}");
        let request = DeleteExportRequest { name: export.name, ..Default::default() };
        self.volumes().delete_export(request).await.map(drop)
    }

    async fn rotate(&self) -> Result<(String, String), Status> {
        let answer = self
            .vdcs()
            .rotate_vdc_key(RotateVdcKeyRequest { name: VDC.into(), ..Default::default() })
            .await?
            .into_inner();
        Ok((answer.from_kek, answer.to_kek))
    }

    fn state(&self) -> PathBuf {
        self.seriod.dir.path().join("state")
    }
}

fn configure(seriod: &Seriod, source: &str, previous: &[&str]) {
    let path = seriod.dir.path().join("seriod.toml");
    let text = fs::read_to_string(&path).unwrap();
    let named = |name: &str| format!("\"file:{}\"", seriod.dir.path().join(name).display());
    let previous: Vec<_> = previous.iter().map(|name| named(name)).collect();
    let before = text.split("[keys]").next().unwrap();
    let keys = format!("[keys]\nsource = {}\nprevious = [{}]\n", named(source), previous.join(", "));
    fs::write(path, format!("{before}{keys}")).unwrap();
}

/// Whether a file below the directory has the bytes.
fn found(dir: &Path, bytes: &[u8]) -> bool {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).any(|path| match path.is_dir() {
        true => found(&path, bytes),
        false => fs::read(&path).unwrap().windows(bytes.len()).any(|part| part == bytes),
    })
}

/// Deletes a snapshot, and waits until its layer is gone.
async fn merge_away(node: &Node, snapshot: String) {
    let request = DeleteSnapshotRequest { name: snapshot, ..Default::default() };
    let operation = node.volumes().delete_snapshot(request).await.unwrap().into_inner();
    let request = WatchOperationRequest { name: operation.name };
    let mut stream = OperationServiceClient::new(node.channel.clone())
        .watch_operation(request)
        .await
        .unwrap()
        .into_inner();
    let mut last = None;
    while let Some(next) = stream.message().await.unwrap() {
        last = Some(next);
    }
    assert_eq!(last.map(|end| end.state()), Some(OperationState::Done));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_of_an_encrypted_vdc_do_all_that_others_do_and_hold_no_plaintext() {
    let Some(mut node) = Node::start().await else { return };
    let kernel = match mini_guest() {
        Ok(kernel) => kernel,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    import_image(node.channel.clone(), "base", "", &kernel, &vec![0xba; MIB as usize]).await;
    node.create("data", "images/base").await;
    node.create("empty", "").await;
    node.io("empty", "", &["read -P 0 0 4M", "write -P 0x5e 1M 64k", "read -P 0x5e 1M 64k"]).await.unwrap();
    node.io("data", "", &["read -P 0xba 0 1M", "read -P 0 1M 3M", "write -P 0x5e 1000 64000"]).await.unwrap();
    node.seal("data", "a").await;
    node.io("data", "", &["read -P 0x5e 1000 64000", "read -P 0xba 0 1000", "write -P 0x5f 64k 64k"])
        .await
        .unwrap();
    node.seal("data", "b").await;
    let request =
        CloneVolumeRequest { source: point("data", "a"), volume_id: "copy".into(), ..Default::default() };
    node.volumes().clone_volume(request).await.unwrap();
    node.io("copy", "", &["read -P 0x5e 1000 64000", "read -P 0xba 65000 983576", "write -P 0x60 0 4k"])
        .await
        .unwrap();

    // A running guest has the key, too.
    let spec = VmSpec {
        vcpus: 1,
        memory_bytes: 64 << 20,
        image: "images/base".into(),
        root_disk_bytes: MIB,
        ..VmSpec::default()
    };
    let request =
        CreateVmRequest { parent: VDC.into(), vm_id: "web".into(), spec: Some(spec), ..Default::default() };
    let made = node.vms().create_vm(request).await.unwrap().into_inner();
    let request = StartVmRequest { name: made.name.clone(), ..Default::default() };
    // The VMM opens its disks before this is answered.
    node.vms().start_vm(request).await.unwrap();
    let refused = node
        .vdcs()
        .erase_vdc(EraseVdcRequest { name: VDC.into(), uid: String::new(), ..Default::default() })
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let request = StopVmRequest { name: made.name, force: true, ..Default::default() };
    // This guest ends by itself, perhaps already.
    let _ = node.vms().stop_vm(request).await;

    // A layer is merged away, the volume grows and goes back, over a restart.
    merge_away(&node, point("data", "a")).await;
    node.restart("old", &[]).await;
    let as_b =
        ["read -P 0x5e 1000 64000", "read -P 0x5f 64k 64k", "read -P 0xba 128k 896k", "read -P 0 1M 3M"];
    node.io("data", "b", &as_b).await.unwrap();
    let request = ResizeVolumeRequest { name: named("data"), size_bytes: 8 * MIB, ..Default::default() };
    node.volumes().resize_volume(request).await.unwrap();
    node.io("data", "", &["read -P 0 4M 4M", "write -P 0x5e 7M 1M"]).await.unwrap();
    let request =
        RollbackVolumeRequest { snapshot: point("data", "b"), discard_later: true, ..Default::default() };
    node.volumes().rollback_volume(request).await.unwrap();
    node.io("data", "", &as_b).await.unwrap();
    node.io("copy", "", &["read -P 0x60 0 4k", "read -P 0x5e 4k 59k"]).await.unwrap();

    let volumes = node.state().join("volumes");
    for fill in [0x5e, 0x5f, 0x60] {
        assert!(!found(&volumes, &[fill; 16]), "{fill:#x} was written, and is on the disk");
    }
    assert!(found(&volumes, &[0xba; 16]), "an image's bytes are no secret, and show that the search finds");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_wrapping_key_is_rotated_and_a_vdc_is_erased() {
    let Some(mut node) = Node::start().await else { return };
    let volume = node.create("data", "").await;
    node.io("data", "", &["write -P 7 0 64k"]).await.unwrap();

    // Another key encryption key: not without the old one.
    node.restart("new", &[]).await;
    let error = node.io("data", "", &["read -P 7 0 64k"]).await.unwrap_err();
    assert!(error.message().contains("previous"), "{error:?}");
    assert_eq!(error.code(), Code::FailedPrecondition);
    node.restart("new", &["old"]).await;
    node.io("data", "", &["read -P 7 0 64k"]).await.unwrap();
    let (from, to) = node.rotate().await.unwrap();
    assert_ne!(from, to);
    node.restart("new", &[]).await;
    node.io("data", "", &["read -P 7 0 64k"]).await.unwrap();

    // The end.
    let uid = node.vdcs().get_vdc(GetVdcRequest { name: VDC.into() }).await.unwrap().into_inner().uid;
    let key_file = node.state().join("keys").join(&uid);
    let wrapped = fs::read(&key_file).unwrap();
    let other = EraseVdcRequest { name: VDC.into(), uid: volume.uid.clone(), ..Default::default() };
    assert_eq!(node.vdcs().erase_vdc(other).await.unwrap_err().code(), Code::InvalidArgument);
    let request_id = uuid::Uuid::new_v4().to_string();
    let erase = EraseVdcRequest { name: VDC.into(), uid: uid.clone(), request_id };
    let erased = node.vdcs().erase_vdc(erase.clone()).await.unwrap().into_inner();
    assert_eq!(erased.vdc.map(|vdc| vdc.encryption()), Some(Encryption::Erased));
    assert!(!key_file.exists());
    let repeated = node.vdcs().erase_vdc(erase.clone()).await.unwrap().into_inner();
    assert_eq!((&repeated.receipt, &repeated.destroyed_blake3), (&erased.receipt, &erased.destroyed_blake3));
    let again = EraseVdcRequest { request_id: String::new(), ..erase };
    let again = node.vdcs().erase_vdc(again).await.unwrap_err();
    assert!(again.message().contains("erased before"), "{again:?}");
    let error = node.io("data", "", &["read 0 64k"]).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.message().contains("erased"), "{error:?}");
    assert!(node.rotate().await.is_err());

    // As after a crash between the decision and the destruction: the next start does it.
    fs::write(&key_file, &wrapped).unwrap();
    node.restart("new", &[]).await;
    assert!(!key_file.exists());

    // The receipt is in the log, and the log is whole.
    let receipt = erased.receipt.unwrap();
    let mut lines = Vec::new();
    let files = serio_audit::files_of(&node.state()).unwrap();
    serio_audit::verify(&files, |entry, _| lines.push(entry)).unwrap();
    let line = &lines[usize::try_from(receipt.number).unwrap() - 1];
    assert_eq!((line.what.as_str(), line.who.as_str()), ("VdcErased", "uid 0"));
    assert_eq!(line.detail["destroyed_blake3"], erased.destroyed_blake3);
    assert_eq!(lines[usize::try_from(receipt.number).unwrap()].prev, receipt.hash);
    let results = lines.iter().filter_map(|entry| Some((entry.what.as_str(), entry.result.as_deref()?)));
    let erasures: Vec<_> = results.filter(|(what, _)| *what == "EraseVdc").collect();
    assert_eq!(erasures.iter().filter(|(_, result)| *result == "OK").count(), 2, "{erasures:?}");
    assert!(erasures.iter().any(|(_, result)| result.contains("erased before")), "{erasures:?}");
    let own = |what: &str| lines.iter().filter(|entry| entry.what == what).count();
    assert_eq!((own("VdcKeyRotated"), own("VdcErased")), (1, 2), "the second erasure is the next start's");

    let delete = DeleteVdcRequest { name: VDC.into(), ..Default::default() };
    let left = node.vdcs().delete_vdc(delete.clone()).await.unwrap_err();
    assert_eq!(left.code(), Code::FailedPrecondition);

    let delete = DeleteVolumeRequest { name: named("data"), ..Default::default() };
    node.volumes().delete_volume(delete).await.unwrap();
    assert!(!node.state().join("volumes").join(volume.uid).exists(), "a husk can be deleted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_a_key_makes_no_encrypted_vdc() {
    let Some(node) = Node::start().await else { return };
    fs::remove_file(node.seriod.dir.path().join("old")).unwrap();
    let quota = Some(Quota { vcpus: 1, memory_bytes: 64 << 20, storage_bytes: MIB, ..Default::default() });
    let request = CreateVdcRequest { vdc_id: "other".into(), quota, encrypted: true, ..Default::default() };
    let refused = node.vdcs().create_vdc(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("cannot read the key"), "{refused:?}");
    assert!(node.vdcs().get_vdc(GetVdcRequest { name: "vdcs/other".into() }).await.is_err());
    assert_eq!(node.create_vdc(false).await.unwrap_err().code(), Code::AlreadyExists);
}
