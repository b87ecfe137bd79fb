//! `serio-volumed agent` as seriod uses it: descriptors over the control socket, one job a process.

mod common;

use std::{
    fs::{self, File},
    io::{Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    process::{Child, Command},
};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serio_control::{
    Channel, ChannelError,
    message::{Body, Code, CreateVolume, Empty, Export, ImportImage, InspectVolume, SnapshotStopped},
};
use tempfile::TempDir;

const ID: &str = "0190d7a2-7e6b-7cc0-8a53-0b1d2c3e4f50";

struct Process {
    child: Child,
    channel: Channel,
    socket: std::path::PathBuf,
}

fn start(temp: &Path, name: &str) -> Process {
    let socket = temp.join(name);
    let listener = UnixListener::bind(&socket).expect("bind");
    fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty())).expect("inherit");
    let child = Command::new(common::BIN)
        .args(["agent", "--control-fd", &listener.as_raw_fd().to_string()])
        .spawn()
        .expect("start");
    // It must not be inherited by the next one.
    drop(listener);
    let channel = Channel::new(UnixStream::connect(&socket).expect("connect"));
    Process { child, channel, socket }
}

impl Process {
    fn ends(mut self) -> bool {
        drop(self.channel);
        self.child.wait().expect("wait").success()
    }
}

fn file(path: &Path) -> File {
    File::options().read(true).write(true).create(true).truncate(false).open(path).expect("open")
}

fn fds(files: &[File]) -> Vec<BorrowedFd<'_>> {
    files.iter().map(AsFd::as_fd).collect()
}

fn layer(dir: &Path, number: u32) -> [File; 2] {
    [file(&dir.join(format!("{number:08}.data"))), file(&dir.join(format!("{number:08}.map")))]
}

fn refused(result: Result<Body, ChannelError>) -> (Code, String) {
    match result {
        Err(ChannelError::Refused(failed)) => (failed.code(), failed.field),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn an_image_becomes_a_volume_a_snapshot_and_an_export() {
    let temp = TempDir::new().expect("tempdir");
    let dir = temp.path();
    let image = common::image();

    let mut job = start(dir, "import");
    let (reader, mut writer) = std::io::pipe().expect("pipe");
    let disk = file(&dir.join("disk.raw"));
    let bytes = image.clone();
    let feeding = std::thread::spawn(move || writer.write_all(&bytes).expect("feed"));
    let ask = ImportImage { format: "raw".into(), expected_bytes: image.len() as u64, size_bytes_max: 0 };
    let reply = job.channel.call(Body::ImportImage(ask), &[reader.as_fd(), disk.as_fd()]).expect("import");
    feeding.join().expect("feeding");
    let Body::JobStatus(status) = reply else { panic!("{reply:?}") };
    assert_eq!((status.size_bytes, status.blake3), (32 << 20, blake3::hash(&image).as_bytes().to_vec()));
    assert!(job.ends(), "with its connection");

    let mut job = start(dir, "create");
    let [data, map] = layer(dir, 0);
    let ask = |size_bytes| CreateVolume { volume_id: ID.into(), size_bytes, from_image: true, key: None };
    let files = [data, map, file(&dir.join("disk.raw"))];
    job.channel.call(Body::CreateVolume(ask(40 << 20)), &fds(&files)).expect("create");
    assert_eq!(refused(job.channel.call(Body::CreateVolume(ask(1)), &fds(&files))).0, Code::Precondition);
    assert!(job.ends());
    let mut job = start(dir, "small");
    let small = refused(job.channel.call(Body::CreateVolume(ask(1 << 20)), &fds(&files)));
    assert_eq!(small, (Code::Invalid, "size_bytes".into()));
    drop((job.ends(), files));

    let mut job = start(dir, "snapshot");
    let ask = SnapshotStopped { volume_id: ID.into(), snapshot: "monday".into(), key: None };
    let files = [layer(dir, 0), layer(dir, 1)].into_iter().flatten().collect::<Vec<_>>();
    job.channel.call(Body::SnapshotStopped(ask), &fds(&files)).expect("snapshot");
    assert!(job.ends());

    let mut job = start(dir, "inspect");
    let reply = job
        .channel
        .call(Body::InspectVolume(InspectVolume { volume_id: ID.into() }), &fds(&files))
        .expect("inspect");
    let Body::VolumeInfo(info) = reply else { panic!("{reply:?}") };
    assert_eq!((info.size_bytes, info.layers, info.snapshots[0].name.as_str()), (40 << 20, 2, "monday"));
    assert!(job.ends());
    drop(files);
    export(dir, &image);
}

#[test]
fn a_qcow2_file_becomes_a_disk_or_nothing() {
    if !common::have("qemu-img") {
        return;
    }
    let temp = TempDir::new().expect("tempdir");
    let dir = temp.path();
    let (raw, qcow2) = (dir.join("raw"), dir.join("qcow2"));
    std::fs::write(&raw, common::image()).expect("write");
    let (from, to) = (raw.to_str().expect("text"), qcow2.to_str().expect("text"));
    common::run("qemu-img", &["convert", "-c", "-O", "qcow2", from, to]);
    let len = std::fs::metadata(&qcow2).expect("metadata").len();
    for (expected_bytes, field) in [(len, None), (len - 1, Some("data"))] {
        let mut job = start(dir, &format!("import{expected_bytes}"));
        let disk = file(&dir.join(format!("disk{expected_bytes}")));
        let ask = ImportImage { format: "qcow2".into(), expected_bytes, size_bytes_max: 0 };
        let reply = job.channel.call(Body::ImportImage(ask), &[file(&qcow2).as_fd(), disk.as_fd()]);
        if let Some(field) = field {
            assert_eq!(refused(reply), (Code::Invalid, field.into()));
            assert_eq!(disk.metadata().expect("metadata").len(), 0, "something was written");
        } else {
            let Ok(Body::JobStatus(status)) = reply else { panic!("{reply:?}") };
            let sum = blake3::hash(&common::image()).as_bytes().to_vec();
            assert_eq!((status.size_bytes, status.blake3), (32 << 20, sum));
        }
        job.ends();
    }
    // An image that says that it leans on a file of the host.
    std::fs::write(dir.join("base"), b"secret").expect("write");
    let top = dir.join("top");
    let base = dir.join("base");
    let args = ["create", "-q", "-f", "qcow2", "-u", "-b", base.to_str().expect("text"), "-F", "raw"];
    common::run("qemu-img", &[&args[..], &[top.to_str().expect("text"), "1M"]].concat());
    let mut job = start(dir, "leaning");
    let ask = ImportImage { format: "qcow2".into(), expected_bytes: 0, size_bytes_max: 0 };
    let files = [file(&top), file(&dir.join("disk"))];
    assert_eq!(
        refused(job.channel.call(Body::ImportImage(ask), &fds(&files))),
        (Code::Invalid, "data".into())
    );
    job.ends();
}

/// The point while the head is served for writing by another process.
fn export(dir: &Path, image: &[u8]) {
    let files = || [layer(dir, 0), layer(dir, 1)].into_iter().flatten();
    let serve = |name: &str, snapshot: &str| {
        let nbd = dir.join(format!("{name}.nbd"));
        let listener = UnixListener::bind(&nbd).expect("bind");
        let mut process = start(dir, name);
        let mut all = vec![File::from(std::os::fd::OwnedFd::from(listener))];
        all.extend(files());
        let ask = Export {
            key: None,
            volume_id: ID.into(),
            export_name: "token".into(),
            snapshot: snapshot.into(),
            read_only: !snapshot.is_empty(),
            uid: 0,
            once: false,
            release: false,
        };
        let result = process.channel.call(Body::Export(ask), &fds(&all));
        (process, result, format!("nbd+unix:///token?socket={}", nbd.display()))
    };
    let (head, result, _) = serve("head", "");
    result.expect("the head");
    let (second, result, _) = serve("second", "");
    assert_eq!(refused(result).0, Code::InUse);
    let (nameless, result, _) = serve("nameless", "tuesday");
    assert_eq!(refused(result), (Code::Precondition, "snapshot".into()));
    let (mut point, result, uri) = serve("point", "monday");
    result.expect("the point");
    // seriod may go and come again: an export stays.
    point.channel = Channel::new(UnixStream::connect(&point.socket).expect("connect again"));
    if common::have("nbdcopy") {
        let out = dir.join("out");
        common::run("nbdcopy", &[&uri, out.to_str().expect("text")]);
        let got = fs::read(&out).expect("read");
        assert!(got[..image.len()] == *image && got[image.len()..].iter().all(|&b| b == 0));
    }
    for mut process in [head, point, second, nameless] {
        process.channel.call(Body::Stop(Empty {}), &[]).expect("stop");
        assert!(process.child.wait().expect("wait").success());
    }
}

#[test]
fn a_job_ends_with_its_connection_and_garbage_with_its_own() {
    let temp = TempDir::new().expect("tempdir");
    let mut job = start(temp.path(), "job");
    let mut garbage = UnixStream::connect(&job.socket).expect("connect");
    garbage.write_all(&[0xff; 64]).expect("write");
    // Closed, or reset since not all was read.
    assert!(!matches!(garbage.read(&mut [0; 1]), Ok(1)));
    let refusal = job
        .channel
        .call(Body::ImportImage(ImportImage { format: "vhdx".into(), ..ImportImage::default() }), &[]);
    assert_eq!(refused(refusal), (Code::Invalid, "format".into()));
    job.ends();

    // Half-way: the pipe stays open, the connection does not.
    let mut job = start(temp.path(), "half");
    let (reader, mut writer) = std::io::pipe().expect("pipe");
    writer.write_all(&[1; 4096]).expect("feed");
    let ask = ImportImage { format: "raw".into(), ..ImportImage::default() };
    let to = file(&temp.path().join("to"));
    job.channel.send(1, Body::ImportImage(ask), &[reader.as_fd(), to.as_fd()]).expect("send");
    let mut status = Channel::new(UnixStream::connect(&job.socket).expect("connect"));
    assert!(matches!(status.call(Body::Status(Empty {}), &[]), Ok(Body::JobStatus(_))));
    assert!(!job.ends(), "broken off is not success");
    drop(writer);
}
