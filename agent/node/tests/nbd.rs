//! Exports of a real seriod, over TLS and Unix sockets, used by strangers' tools: tokens, their first user, expiry, `once`,
//! and restarts of seriod in the middle of a copy.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use common::Seriod;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serio_api::v1::{
    CreateExportRequest, CreateSnapshotRequest, CreateVdcRequest, CreateVolumeRequest, DeleteExportRequest,
    Export, ListExportsRequest, Quota, vdc_service_client::VdcServiceClient,
    volume_service_client::VolumeServiceClient,
};
use tonic::transport::Channel;

const VOLUME: &str = "vdcs/ardesio/volumes/data";
const SIZE: usize = 24 << 20;

/// Certificates of one authority: `pki/` for seriod, `NAME/` for each client.
fn certificates(dir: &Path, clients: &[&str]) {
    let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let issue = |folder: &str, kind: &str| {
        let folder = dir.join(folder);
        fs::create_dir_all(&folder).unwrap();
        let key = KeyPair::generate().unwrap();
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &authority).unwrap();
        fs::write(folder.join("ca-cert.pem"), authority.pem()).unwrap();
        fs::write(folder.join(format!("{kind}-cert.pem")), certificate.pem()).unwrap();
        fs::write(folder.join(format!("{kind}-key.pem")), key.serialize_pem()).unwrap();
    };
    issue("pki", "server");
    for client in clients {
        issue(client, "client");
    }
}

struct Bench {
    seriod: Seriod,
}

/// A seriod with an NBD listener and an empty volume; `None`, and why is said, where this cannot run.
async fn bench() -> Option<Bench> {
    for tool in ["nbdcopy", "nbdinfo", "qemu-img"] {
        if Command::new(tool).arg("--version").output().is_err() {
            println!("skipped: {tool} is not installed");
            return None;
        }
    }
    let volumed = Path::new(env!("CARGO_BIN_EXE_seriod")).with_file_name("serio-volumed");
    if !volumed.is_file() {
        println!("skipped: {} is not built", volumed.display());
        return None;
    }
    // The same port after a restart: one that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut seriod = Seriod::new("");
    let dir = seriod.dir.path().to_owned();
    certificates(&dir, &["mine", "other"]);
    let config = format!(
        "[grpc]\ntls_dir = \"{}/pki\"\n[nbd]\nlisten = \"127.0.0.1:{port}\"\nadvertise = \"localhost\"\n",
        dir.display()
    );
    let path = dir.join("seriod.toml");
    fs::write(&path, fs::read_to_string(&path).unwrap() + &config).unwrap();
    fs::copy(&volumed, dir.join("serio-volumed")).unwrap();
    seriod.start();
    let channel = seriod.connect().await.unwrap();
    let quota = Quota { vcpus: 1, memory_bytes: 1 << 30, storage_bytes: 1 << 30, ..Default::default() };
    let vdc = CreateVdcRequest { vdc_id: "ardesio".to_owned(), quota: Some(quota), ..Default::default() };
    VdcServiceClient::new(channel.clone()).create_vdc(vdc).await.unwrap();
    let volume = CreateVolumeRequest {
        parent: "vdcs/ardesio".to_owned(),
        volume_id: "data".to_owned(),
        size_bytes: SIZE as u64,
        ..Default::default()
    };
    VolumeServiceClient::new(channel).create_volume(volume).await.unwrap();
    Some(Bench { seriod })
}

impl Bench {
    fn at(&self, name: &str) -> PathBuf {
        self.seriod.dir.path().join(name)
    }

    async fn volumes(&self) -> VolumeServiceClient<Channel> {
        VolumeServiceClient::new(self.seriod.connect().await.unwrap())
    }

    async fn export(&self, change: impl FnOnce(&mut CreateExportRequest)) -> Export {
        let mut request =
            CreateExportRequest { volume: VOLUME.to_owned(), writable: true, ..Default::default() };
        change(&mut request);
        self.volumes().await.create_export(request).await.unwrap().into_inner()
    }

    async fn exports(&self) -> usize {
        self.volumes()
            .await
            .list_exports(ListExportsRequest::default())
            .await
            .unwrap()
            .into_inner()
            .exports
            .len()
    }

    async fn end(&self, export: Export) {
        let request = DeleteExportRequest { name: export.name, ..Default::default() };
        self.volumes().await.delete_export(request).await.unwrap();
    }

    /// Waits until the last export has ended by itself.
    async fn until_ended(&self) {
        let since = Instant::now();
        while self.exports().await > 0 {
            assert!(since.elapsed() < Duration::from_secs(30), "the export does not end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The URI for the holder of a certificate.
    fn tls(&self, export: &Export, who: &str) -> String {
        format!("{}?tls-certificates={}", export.tls_uri, self.at(who).display())
    }

    /// Brings the file `copy` up to date by [`INCREMENT`]; what it says, or nothing where it cannot run.
    fn increment(&self, uri: &str) -> Option<String> {
        // The system's python has libnbd's module, another one in PATH may not.
        let mut shell = Command::new("nbdsh");
        shell
            .args(["-c", INCREMENT])
            .env("PATH", "/usr/bin:/bin")
            .env("URI", uri)
            .env("COPY", self.at("copy"));
        let done = match shell.stdin(Stdio::null()).output() {
            Ok(done) => done,
            Err(error) => {
                println!("skipped: nbdsh (python3-libnbd): {error}");
                return None;
            }
        };
        let said = String::from_utf8_lossy(&done.stderr);
        if said.contains("No module named nbd") {
            println!("skipped: nbdsh (python3-libnbd) is not installed");
            return None;
        }
        assert!(done.status.success(), "{said}");
        Some(String::from_utf8_lossy(&done.stdout).trim().to_owned())
    }

    /// As qemu's tools take it, going on for a minute when the connection is lost.
    fn qemu(&self, export: &Export) -> [String; 4] {
        let (_, rest) = export.tls_uri.split_once("//localhost:").unwrap();
        let (port, token) = rest.split_once('/').unwrap();
        let dir = self.at("mine");
        [
            "--object".to_owned(),
            format!("tls-creds-x509,id=t,endpoint=client,dir={}", dir.display()),
            "--image-opts".to_owned(),
            format!(
                "driver=nbd,server.type=inet,server.host=localhost,server.port={port},export={token},tls-creds=t,\
                 reconnect-delay=60"
            ),
        ]
    }
}

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn succeeds(program: &str, arguments: &[&str]) {
    let output = run(program, arguments);
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Bytes that are different in each block.
fn noise() -> Vec<u8> {
    (0..SIZE as u32 / 4).flat_map(|n| n.wrapping_mul(2_654_435_761).rotate_left(7).to_le_bytes()).collect()
}

fn starts(program: &str, arguments: &[String]) -> Child {
    Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_go_on_after_a_restart() {
    let Some(mut bench) = bench().await else { return };
    let export = bench.export(|_| ()).await;
    fs::write(bench.at("disk"), noise()).unwrap();
    succeeds("nbdcopy", &["--connections=4", text(&bench.at("disk")), &bench.tls(&export, "mine")]);

    // Slow readers, so that seriod dies in the middle: qemu-img through it, nbdcopy past it.
    let mut through = vec!["convert".to_owned(), "-r".into(), "8M".into(), "-m".into(), "1".into()];
    through.extend(bench.qemu(&export));
    through.extend(["-O".into(), "raw".into(), text(&bench.at("through")).to_owned()]);
    let through = starts("qemu-img", &through);
    let mut past: Vec<String> = "convert -r 8M -m 1 -f raw -O raw".split(' ').map(str::to_owned).collect();
    past.extend([export.unix_uri.clone(), text(&bench.at("past")).to_owned()]);
    let past = starts("qemu-img", &past);
    // A part of the copy is there; its length is set from the start.
    let part = |name: &str| {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(bench.at(name)).is_ok_and(|m| m.blocks() * 512 > (2 << 20))
    };
    let since = Instant::now();
    while !(part("through") && part("past")) {
        assert!(since.elapsed() < Duration::from_secs(60), "the copies do not begin");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    bench.seriod.kill();
    bench.seriod.start();
    for (child, name) in [(through, "through"), (past, "past")] {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(fs::read(bench.at(name)).unwrap() == noise(), "{name}");
    }

    // The token is still its first user's, and nobody else's.
    succeeds("nbdinfo", &["--size", &bench.tls(&export, "mine")]);
    let taken = run("nbdinfo", &["--size", &bench.tls(&export, "other")]);
    let said = String::from_utf8_lossy(&taken.stderr);
    assert!(!taken.status.success() && said.contains("No such file or directory"), "{said}");
    assert_eq!(bench.exports().await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn exports_end() {
    let Some(bench) = bench().await else { return };
    // Once: with the last connection of its first user.
    let once = bench.export(|request| request.once = true).await;
    let uri = bench.tls(&once, "mine");
    succeeds("nbdcopy", &["--connections=4", &uri, "null:"]);
    bench.until_ended().await;
    let gone = run("nbdinfo", &["--size", &uri]);
    let said = String::from_utf8_lossy(&gone.stderr);
    assert!(!gone.status.success() && said.contains("No such file or directory"), "{said}");
    // On the Unix socket too.
    let once = bench.export(|request| request.once = true).await;
    succeeds("nbdinfo", &["--size", &once.unix_uri]);
    bench.until_ended().await;

    // When its time is over, connected or not.
    let ttl = Duration::from_secs(2).into();
    let short = bench.export(|request| request.ttl = Some(ttl)).await;
    let uri = bench.tls(&short, "mine");
    succeeds("nbdinfo", &["--size", &uri]);
    let mut long: Vec<String> = "convert -r 1M -m 1 -f raw -O raw".split(' ').map(str::to_owned).collect();
    long.extend([short.unix_uri.clone(), text(&bench.at("cut")).to_owned()]);
    let connected = starts("qemu-img", &long);
    bench.until_ended().await;
    assert!(!run("nbdinfo", &["--size", &uri]).status.success());
    drop(connected.wait_with_output());
}

/// Bytes that a backup program copies: what `qemu:dirty-bitmap:monday` calls dirty, several requests under way, into the file of
/// the last full copy. Prints how many.
const INCREMENT: &str = r#"
import os
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:dirty-bitmap:monday")
h.set_uri_allow_local_file(True)
h.connect_uri(os.environ["URI"])
assert h.get_tls_negotiated()
size, at, copied = h.get_size(), 0, 0
with open(os.environ["COPY"], "r+b") as copy:
    while at < size:
        found = {}
        h.block_status(size - at, at, lambda c, o, e, err: found.__setitem__(c, list(e)))
        assert set(found) == {"base:allocation", "qemu:dirty-bitmap:monday"}, found
        for length, dirty in zip(*[iter(found["qemu:dirty-bitmap:monday"])] * 2):
            end = at + length
            parts = [(o, nbd.Buffer(min(65536, end - o))) for o in range(at, end, 65536)] if dirty else []
            for offset, part in parts:
                while h.aio_in_flight() >= 16:
                    h.poll(-1)
                h.aio_pread(part, offset)
            while h.aio_in_flight() > 0:
                h.poll(-1)
            for offset, part in parts:
                copy.seek(offset)
                copy.write(part.to_bytearray())
            copied += length if dirty else 0
            at = end
h.shutdown()
print(copied)
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_incremental_backup_over_tls_rebuilds_the_disk() {
    let Some(bench) = bench().await else { return };
    let seal = async |snapshot_id: &str| {
        let request = CreateSnapshotRequest {
            volume: VOLUME.to_owned(),
            snapshot_id: snapshot_id.to_owned(),
            ..Default::default()
        };
        bench.volumes().await.create_snapshot(request).await.unwrap();
    };
    let at_point = async |snapshot: &str| {
        let (snapshot, writable) = (snapshot.to_owned(), false);
        bench.export(|request| (request.snapshot, request.writable) = (snapshot, writable)).await
    };
    fs::write(bench.at("disk"), noise()).unwrap();
    let head = bench.export(|_| ()).await;
    succeeds("nbdcopy", &["--connections=4", "--flush", text(&bench.at("disk")), &bench.tls(&head, "mine")]);
    bench.end(head).await;
    seal("monday").await;
    let monday = at_point("monday").await;
    succeeds("nbdcopy", &["--connections=4", &bench.tls(&monday, "mine"), text(&bench.at("copy"))]);
    assert!(fs::read(bench.at("copy")).unwrap() == noise(), "the full copy");

    let head = bench.export(|_| ()).await;
    let qemu = bench.qemu(&head);
    let mut write: Vec<&str> = qemu.iter().map(String::as_str).collect();
    for command in ["write -P 0x11 8k 4k", "write -P 0x22 1000001 5000", "write -z 2M 64k", "discard 9M 1M"] {
        write.extend(["-c", command]);
    }
    succeeds("qemu-io", &write);
    bench.end(head).await;
    seal("tuesday").await;

    let tuesday = at_point("tuesday").await;
    let uri = bench.tls(&tuesday, "mine");
    // What qemu takes for dirty are the extents that it calls no data.
    let mut qemu = bench.qemu(&tuesday);
    qemu[3].push_str(",x-dirty-bitmap=qemu:dirty-bitmap:monday");
    let mut map = vec!["map", "--output=json"];
    map.extend(qemu.iter().map(String::as_str));
    let map = run("qemu-img", &map);
    let extents: serde_json::Value = serde_json::from_slice(&map.stdout).unwrap();
    let dirty = extents.as_array().unwrap().iter().filter(|extent| extent["data"] == false);
    let dirty: u64 = dirty.filter_map(|extent| extent["length"].as_u64()).sum();
    assert_eq!(dirty, 4096 + 8192 + (64 << 10) + (1 << 20), "{extents}");

    let Some(copied) = bench.increment(&uri) else { return };
    assert_eq!(copied, dirty.to_string());
    succeeds("nbdcopy", &["--connections=4", &uri, text(&bench.at("whole"))]);
    let whole = fs::read(bench.at("whole")).unwrap();
    assert!(whole == fs::read(bench.at("copy")).unwrap(), "the copy is the disk of tuesday");
    assert!(whole[8192..12288].iter().all(|byte| *byte == 0x11) && whole != noise());
    // And qemu agrees over its own connection.
    let mut compare = vec!["compare"];
    let qemu = bench.qemu(&tuesday);
    let copy = format!("driver=raw,file.driver=file,file.filename={}", bench.at("copy").display());
    compare.extend(qemu.iter().map(String::as_str));
    compare.push(&copy);
    succeeds("qemu-img", &compare);
}
