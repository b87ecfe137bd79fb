//! Where the keys of an encrypted vdc must not be: what processes are started with, what they say, what they leave in files, and
//! what they answer. Looked at in the fullest log, while a VM and an export use them.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{
    fs,
    os::unix::{fs::PermissionsExt, net::UnixStream},
    path::{Path, PathBuf},
    time::Duration,
};

use common::{Seriod, import_image, mini_guest};
use prost::Message;
use serio_api::v1::{
    CreateExportRequest, CreateSnapshotRequest, CreateVdcRequest, CreateVmRequest, GetVdcRequest,
    ListExportsRequest, ListVdcsRequest, Quota, StartVmRequest, VmSpec, WatchEventsRequest,
    node_service_client::NodeServiceClient, vdc_service_client::VdcServiceClient,
    vm_service_client::VmServiceClient, volume_service_client::VolumeServiceClient,
};
use serio_control::{
    Channel,
    message::{Body, Empty, InspectVolume},
};
use serio_node::keys::Keys;

const VDC: &str = "vdcs/town-hall";
const KEK: [u8; 32] = *b"\x01the wrapping key of this test\xfe\xff";

/// The forms in which a key may be found: as it is, and as people and programs write bytes.
struct Secret {
    what: &'static str,
    forms: Vec<Vec<u8>>,
}

impl Secret {
    fn new(what: &'static str, bytes: &[u8]) -> Secret {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let listed = bytes[..8].iter().map(u8::to_string).collect::<Vec<_>>().join(", ");
        // A part of it is one too many already.
        let forms = [bytes[..12].to_vec(), hex[..24].into(), hex[..24].to_uppercase().into(), listed.into()];
        Secret { what, forms: forms.into() }
    }

    fn is_in(&self, bytes: &[u8]) -> bool {
        self.forms.iter().any(|form| bytes.windows(form.len()).any(|part| part == form))
    }
}

struct Search {
    secrets: Vec<Secret>,
    looked_at: usize,
}

impl Search {
    fn look(&mut self, place: &str, bytes: &[u8]) {
        self.looked_at += 1;
        for secret in &self.secrets {
            assert!(!secret.is_in(bytes), "{} is in {place}", secret.what);
        }
    }

    /// What they were started with, and what those that are controlled over a socket answer there.
    fn look_at_processes(&mut self, seriod: &Seriod) {
        let pids = processes(seriod);
        assert!(pids.len() >= 3, "seriod, a VM and an export: {pids:?}");
        for pid in pids {
            for file in ["cmdline", "environ", "comm"] {
                let place = format!("/proc/{pid}/{file}");
                self.look(&place, &fs::read(&place).unwrap());
            }
        }
        let sockets = control_sockets(&seriod.dir.path().join("run"));
        assert!(sockets.len() >= 2, "{sockets:?}");
        for socket in sockets {
            let heard = answers(&socket);
            assert!(!heard.is_empty(), "{} says nothing", socket.display());
            heard.iter().for_each(|bytes| self.look(&socket.display().to_string(), bytes));
        }
    }

    /// All files below a directory but sockets and those that `but` names.
    fn look_below(&mut self, dir: &Path, but: &[&Path]) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            if meta.is_dir() {
                self.look_below(&path, but);
            } else if meta.is_file() && !but.contains(&path.as_path()) {
                self.look(&path.display().to_string(), &fs::read(&path).unwrap());
            }
        }
    }
}

/// Numbers of processes whose program lies in this directory, and of seriod.
fn processes(seriod: &Seriod) -> Vec<i32> {
    let ours = |pid: &i32| {
        let exe = fs::read_link(format!("/proc/{pid}/exe"));
        *pid == seriod.pid() || exe.is_ok_and(|exe| exe.starts_with(seriod.dir.path()))
    };
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(ours).collect()
}

/// Sockets below the run directory on which a process is controlled.
fn control_sockets(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(control_sockets(&path));
        } else if path.file_name().is_some_and(|name| name == "control.sock")
            || path.extension().is_some_and(|e| e == "ctl")
        {
            found.push(path);
        }
    }
    found
}

/// What a process answers to whoever may ask it.
fn answers(socket: &Path) -> Vec<Vec<u8>> {
    let asked = [
        Body::Status(Empty {}),
        Body::CountersQuery(Empty {}),
        Body::BalloonQuery(Empty {}),
        Body::InspectVolume(InspectVolume::default()),
    ];
    let mut heard = Vec::new();
    for body in asked {
        let mut channel = Channel::new(UnixStream::connect(socket).unwrap());
        channel.set_timeout(Some(Duration::from_secs(10))).unwrap();
        channel.send(1, body, &[]).unwrap();
        if let Ok((frame, descriptors)) = channel.receive() {
            assert!(descriptors.is_empty(), "{} gives descriptors away", socket.display());
            heard.push(frame.encode_to_vec());
        }
    }
    heard
}

/// A seriod with a key encryption key, that logs all it can.
fn start() -> Option<Seriod> {
    let mut seriod = Seriod::new("");
    if let Err(why) = seriod.with_programs() {
        println!("skipped: {why}");
        return None;
    }
    let dir = seriod.dir.path().to_owned();
    let kek = dir.join("kek");
    fs::write(&kek, KEK).unwrap();
    fs::set_permissions(&kek, fs::Permissions::from_mode(0o600)).unwrap();
    let config = dir.join("seriod.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("{text}[keys]\nsource = \"file:{}\"\n", kek.display())).unwrap();
    seriod.more_env.push(("SERIOD_LOG", "trace"));
    seriod.start();
    Some(seriod)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_nowhere_but_where_they_are_used() {
    let Some(seriod) = start() else { return };
    let kernel = match mini_guest() {
        Ok(kernel) => kernel,
        Err(why) => return println!("skipped: {why}"),
    };
    let channel = seriod.connect().await.unwrap();
    import_image(channel.clone(), "base", "mini.test=heartbeat", &kernel, &vec![0; 1 << 20]).await;
    let (mut vdcs, mut vms) = (VdcServiceClient::new(channel.clone()), VmServiceClient::new(channel.clone()));
    let mut volumes = VolumeServiceClient::new(channel.clone());
    let quota = Quota { vcpus: 8, memory_bytes: 256 << 20, storage_bytes: 64 << 20, ..Default::default() };
    let request = CreateVdcRequest {
        vdc_id: "town-hall".into(),
        quota: Some(quota),
        encrypted: true,
        ..Default::default()
    };
    let made = vdcs.create_vdc(request).await.unwrap().into_inner();
    let spec = VmSpec {
        vcpus: 1,
        memory_bytes: 64 << 20,
        image: "images/base".into(),
        root_disk_bytes: 1 << 20,
        ..VmSpec::default()
    };
    let request =
        CreateVmRequest { parent: VDC.into(), vm_id: "web".into(), spec: Some(spec), ..Default::default() };
    let vm = vms.create_vm(request).await.unwrap().into_inner();
    vms.start_vm(StartVmRequest { name: vm.name, ..Default::default() }).await.unwrap();
    let root = format!("{VDC}/volumes/web-root");
    let request =
        CreateSnapshotRequest { volume: root.clone(), snapshot_id: "one".into(), ..Default::default() };
    volumes.create_snapshot(request).await.unwrap();
    let request = CreateExportRequest { volume: root, snapshot: "one".into(), ..Default::default() };
    volumes.create_export(request).await.unwrap();

    let state = seriod.dir.path().join("state");
    let source = format!("file:{}", seriod.dir.path().join("kek").display());
    let key = Keys::new(&state, &source, &[]).unwrap().open(made.uid.parse().unwrap()).await.unwrap();
    let secrets = vec![Secret::new("the vdc's key", &key.secret), Secret::new("the wrapping key", &KEK)];
    let mut search = Search { secrets, looked_at: 0 };

    search.look_at_processes(&seriod);
    let mut node = NodeServiceClient::new(channel);
    let request = WatchEventsRequest { from: 0, follow: false, ..Default::default() };
    let mut events = node.watch_events(request).await.unwrap().into_inner();
    while let Some(event) = events.message().await.unwrap() {
        search.look("an event", &event.encode_to_vec());
    }
    let shown = vdcs.get_vdc(GetVdcRequest { name: VDC.into() }).await.unwrap().into_inner();
    search.look("the vdc", &shown.encode_to_vec());
    let listed = vdcs.list_vdcs(ListVdcsRequest::default()).await.unwrap().into_inner();
    search.look("the list of vdcs", &listed.encode_to_vec());
    let exports = volumes.list_exports(ListExportsRequest::default()).await.unwrap().into_inner();
    search.look("the list of exports", &exports.encode_to_vec());
    search.look_below(seriod.dir.path(), &[&seriod.dir.path().join("kek")]);
    let log = seriod.log.lock().unwrap().clone();
    assert!(log.contains("TRACE") || log.contains("DEBUG"), "the log was not asked for all");
    search.look("seriod's log", log.as_bytes());
    println!("{} places hold no key", search.looked_at);
}

#[test]
fn the_search_finds_what_is_there() {
    let secret = Secret::new("a key", &KEK);
    for found in [
        &b"..\x01the wrapping key of.."[..],
        b"key=01746865207772617070696e",
        b"[1, 116, 104, 101, 32, 119, 114, 97]",
    ] {
        assert!(secret.is_in(found), "{found:?}");
    }
    assert!(!secret.is_in(b"the wrapping"));
}
