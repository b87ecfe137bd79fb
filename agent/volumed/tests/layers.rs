//! Growing, cloning, rolling back, changes: as seriod asks for them, and from the command line.

mod common;

use std::{
    fs::{self, File},
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    process::Command,
};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serio_control::{
    Channel, ChannelError,
    message::{Body, ChangedRange, CloneVolume, Code, ListChanges, MergeLayer, ResizeVolume, RollbackVolume},
};
use serio_volume::{Access, Buffers, Op, Volume, VolumeDir};
use tempfile::TempDir;

const ID: &str = "0190d7a2-7e6b-7cc0-8a53-0b1d2c3e4f50";
const MIB: u64 = 1 << 20;

/// One job in a process of its own.
fn job(temp: &Path, ask: Body, files: &[File]) -> Result<Body, ChannelError> {
    let socket = temp.join("job.sock");
    let listener = UnixListener::bind(&socket).expect("bind");
    fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty())).expect("inherit");
    let mut child = Command::new(common::BIN)
        .args(["agent", "--control-fd", &listener.as_raw_fd().to_string()])
        .spawn()
        .expect("start");
    drop(listener);
    let mut channel = Channel::new(UnixStream::connect(&socket).expect("connect"));
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let answer = channel.call(ask, &fds);
    drop(channel);
    child.wait().expect("wait");
    fs::remove_file(&socket).expect("remove");
    answer
}

fn file(path: &Path) -> File {
    File::options().read(true).write(true).create(true).truncate(false).open(path).expect("open")
}

/// The files of layers, as descriptors are passed: data, map of each.
fn layers(dir: &VolumeDir, numbers: &[u64]) -> Vec<File> {
    let path = |n: &u64, suffix| dir.path().join(format!("{n:08}.{suffix}"));
    numbers.iter().flat_map(|n| [file(&path(n, "data")), file(&path(n, "map"))]).collect()
}

fn write(volume: &Volume, offset: u64, bytes: &[u8]) {
    let mut buffers = Buffers::owned(bytes.len());
    buffers.as_mut_slice().expect("owned").copy_from_slice(bytes);
    volume.queue(1).expect("queue").run(Op::Write { offset, buffers, fua: false }).0.expect("write");
}

fn read(volume: &Volume, offset: u64, len: usize) -> Vec<u8> {
    let (result, buffers) =
        volume.queue(1).expect("queue").run(Op::Read { offset, buffers: Buffers::owned(len) });
    result.expect("read");
    buffers.as_slice().expect("owned").to_vec()
}

/// A volume of 1 MiB with the snapshots `a` (all ones) and `b` (a few twos), and threes in its head.
fn volume(dir: &VolumeDir) {
    dir.create(MIB).expect("create");
    let volume = dir.open(Access::ReadWrite).expect("open");
    write(&volume, 0, &[1; MIB as usize]);
    dir.snapshot(&volume, "a").expect("snapshot");
    write(&volume, 8192, &[2; 5000]);
    volume.queue(1).expect("queue").run(Op::Discard { offset: 16384, len: 8192 }).0.expect("discard");
    dir.snapshot(&volume, "b").expect("snapshot");
    write(&volume, 0, &[3; 100]);
}

#[test]
fn seriod_grows_clones_and_rolls_back() {
    let temp = TempDir::new().expect("tempdir");
    let source = VolumeDir::new(temp.path().join("source"));
    volume(&source);
    let resize =
        |size_bytes| Body::ResizeVolume(ResizeVolume { volume_id: ID.into(), size_bytes, key: None });
    job(temp.path(), resize(2 * MIB), &layers(&source, &[0, 1, 2])).expect("resize");
    match job(temp.path(), resize(MIB), &layers(&source, &[0, 1, 2])) {
        Err(ChannelError::Refused(failed)) => assert_eq!(
            (failed.code(), failed.field.as_str()),
            (Code::Precondition, "size_bytes"),
            "{}",
            failed.message
        ),
        other => panic!("{other:?}"),
    }
    assert_eq!(source.open(Access::ReadOnly).expect("open").size_bytes(), 2 * MIB);

    let dir = VolumeDir::new(temp.path().join("clone"));
    fs::create_dir(dir.path()).expect("mkdir");
    for n in 0..2 {
        let name = format!("{n:08}.data");
        fs::hard_link(source.path().join(&name), dir.path().join(&name)).expect("link");
    }
    let mut files = layers(&source, &[0, 1]);
    files.extend([0, 1].map(|n| file(&dir.path().join(format!("{n:08}.map")))));
    files.extend(layers(&dir, &[2]));
    let clone = |snapshot: &str, image| {
        let snapshot = snapshot.to_owned();
        let (volume_id, size_bytes) = (ID.to_owned(), 3 * MIB);
        Body::CloneVolume(CloneVolume { volume_id, size_bytes, image, snapshot, key: None })
    };
    job(temp.path(), clone("b", false), &files).expect("clone");
    let cloned = dir.open(Access::ReadWrite).expect("open");
    assert_eq!(cloned.size_bytes(), 3 * MIB);
    let point = source.open_snapshot("b").expect("open");
    assert!(read(&cloned, 0, MIB as usize) == read(&point, 0, MIB as usize));

    let image = temp.path().join("disk.raw");
    fs::write(&image, [5; 5000]).expect("write");
    let dir = VolumeDir::new(temp.path().join("from-image"));
    fs::create_dir(dir.path()).expect("mkdir");
    fs::hard_link(&image, dir.path().join("00000000.data")).expect("link");
    job(temp.path(), clone("", true), &layers(&dir, &[0, 1])).expect("clone an image");
    assert!(read(&dir.open(Access::ReadWrite).expect("open"), 0, 5001) == [vec![5; 5000], vec![0]].concat());

    let rollback = |discard_later| {
        let (volume_id, snapshot) = (ID.to_owned(), "a".to_owned());
        Body::RollbackVolume(RollbackVolume { volume_id, snapshot, discard_later, key: None })
    };
    let files = layers(&source, &[0, 1, 2, 3]);
    match job(temp.path(), rollback(false), &files) {
        Err(ChannelError::Refused(failed)) => assert_eq!(failed.field, "discard_later"),
        other => panic!("{other:?}"),
    }
    job(temp.path(), rollback(true), &layers(&source, &[0, 1, 2, 3])).expect("rollback");
    let back = source.open(Access::ReadWrite).expect("open");
    assert!(read(&back, 0, MIB as usize) == vec![1; MIB as usize]);
    assert_eq!(source.files(Access::ReadOnly).expect("files").inspect().expect("inspect").chain, [0, 3]);
}

#[test]
fn seriod_merges_a_layer_and_may_ask_twice() {
    let temp = TempDir::new().expect("tempdir");
    let dir = VolumeDir::new(temp.path().join("volume"));
    volume(&dir);
    let merge = |layer, bytes_per_s| {
        Body::MergeLayer(MergeLayer { volume_id: ID.into(), layer, bytes_per_s, key: None })
    };
    let files = || layers(&dir, &[0, 1, 2]);
    let before = read(&dir.open_snapshot("b").expect("open"), 0, MIB as usize);
    job(temp.path(), merge(0, 64 * MIB), &files()).expect("merge");
    job(temp.path(), merge(0, 0), &files()).expect("it is merged already");
    assert_eq!(dir.files(Access::ReadOnly).expect("files").inspect().expect("inspect").chain, [1, 2]);
    assert!(read(&dir.open_snapshot("b").expect("open"), 0, MIB as usize) == before);
    match job(temp.path(), merge(2, 0), &files()) {
        Err(ChannelError::Refused(failed)) => assert_eq!(failed.field, "layer"),
        other => panic!("{other:?}"),
    }
}

/// Runs the command line; what it printed, or what it complained of.
fn run(dir: &Path, args: &[&str]) -> Result<String, String> {
    let out = Command::new(common::BIN).current_dir(dir).args(args).output().expect("run");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    if out.status.success() { Ok(text(out.stdout)) } else { Err(text(out.stderr)) }
}

#[test]
fn people_clone_flatten_delete_and_roll_back() {
    let temp = TempDir::new().expect("tempdir");
    let at = temp.path();
    volume(&VolumeDir::new(at.join("vol")));
    run(at, &["clone", "vol@b", "two", "--size", "2MiB"]).expect("clone");
    let bytes = |dir: &str| {
        read(&VolumeDir::new(at.join(dir)).open(Access::ReadOnly).expect("open"), 0, MIB as usize)
    };
    let before = bytes("two");
    run(at, &["delete-snapshot", "vol@b"]).expect("delete");
    run(at, &["delete-snapshot", "vol@a", "--pace", "100MiB"]).expect("delete");
    assert!(run(at, &["delete-snapshot", "vol@a"]).expect_err("gone").contains("no snapshot named `a`"));
    assert!(bytes("two") == before, "a clone does not notice");
    run(at, &["flatten", "two"]).expect("flatten");
    assert!(bytes("two") == before);
    let files = |dir: &str| fs::read_dir(at.join(dir)).expect("list").count();
    assert_eq!((files("vol"), files("two")), (2, 2), "data and map of one layer each");
    for dir in ["vol", "two"] {
        assert!(run(at, &["check", dir]).expect("check").contains("clean: "));
    }

    fs::write(at.join("disk.raw"), [5; 5000]).expect("write");
    run(at, &["clone", "disk.raw", "three", "--size", "1MiB"]).expect("clone an image");
    run(at, &["snapshot", "three", "s"]).expect("snapshot");
    run(at, &["resize", "three", "3MiB"]).expect("resize");
    assert!(run(at, &["resize", "three", "1MiB"]).expect_err("smaller").contains("cannot shrink"));
    run(at, &["rollback", "three@s"]).expect("rollback");
    assert!(run(at, &["info", "three"]).expect("info").contains("1048576 bytes"));
    run(at, &["flatten", "three"]).expect("flatten");
    assert!(bytes("three")[..5001] == [vec![5; 5000], vec![0]].concat());
    assert_eq!(fs::read(at.join("disk.raw")).expect("read"), [5; 5000]);
    assert!(run(at, &["clone", "nothing", "x"]).expect_err("no source").contains("VOLUME-DIR@SNAPSHOT"));
}

#[test]
fn people_list_changes() {
    let temp = TempDir::new().expect("tempdir");
    volume(&VolumeDir::new(temp.path().join("vol")));
    let table = run(temp.path(), &["changes", "vol", "--from", "a", "--to", "b"]).expect("changes");
    let cells: Vec<Vec<&str>> = table.lines().skip(1).map(|l| l.split_whitespace().collect()).collect();
    assert_eq!(cells, [["8192", "8192", "data"], ["16384", "8192", "zeros"]]);
    let json = run(temp.path(), &["changes", "vol", "--from", "b", "--json"]).expect("changes");
    let line: serde_json::Value = serde_json::from_str(json.trim()).expect("JSON");
    assert_eq!(line, serde_json::json!({"offset": 0, "len": 4096, "zero": false}));
    assert!(run(temp.path(), &["changes", "vol", "--from", "x"]).expect_err("unknown").contains("`x`"));
}

#[test]
fn seriod_pages_through_changes() {
    let temp = TempDir::new().expect("tempdir");
    let dir = VolumeDir::new(temp.path().join("volume"));
    volume(&dir);
    let ask = |to: &str, offset, ranges_max| {
        let (volume_id, from, to) = (ID.to_owned(), "a".to_owned(), to.to_owned());
        let ask = Body::ListChanges(ListChanges { volume_id, from, to, offset, ranges_max });
        match job(temp.path(), ask, &layers(&dir, &[0, 1, 2])) {
            Ok(Body::ChangedRanges(page)) => (page.ranges, page.next_offset),
            other => panic!("{other:?}"),
        }
    };
    let data = |offset, len| ChangedRange { offset, len, zero: false };
    let zeros = ChangedRange { offset: 16384, len: 8192, zero: true };
    // A VM may run above the later point.
    let running = dir.open(Access::ReadWrite).expect("open");
    assert_eq!(ask("b", 0, 100), (vec![data(8192, 8192), zeros], None));
    assert_eq!(ask("b", 0, 1), (vec![data(8192, 8192)], Some(16384)));
    assert_eq!(ask("b", 16384, 1), (vec![zeros], None));
    drop(running);
    assert_eq!(ask("", 0, 100).0[0], data(0, 4096));
}
