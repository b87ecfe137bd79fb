//! What a volume boots with, found by the job of `seriod`: over the control socket, into files that are passed.

mod common;

use std::{
    fs::{self, File},
    io::Read,
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
    message::{Body, Code, CreateVolume, FindKernel},
};
use tempfile::TempDir;

const ID: &str = "0190d7a2-7e6b-7cc0-8a53-0b1d2c3e4f50";
const NOBODY: u32 = 65_534;

/// One job in a process of its own.
fn ask(dir: &Path, body: Body, files: &[File]) -> Result<Body, ChannelError> {
    let socket = dir.join("control");
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).expect("bind");
    fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty())).expect("inherit");
    let mut child: Child = Command::new(common::BIN)
        .args(["agent", "--control-fd", &listener.as_raw_fd().to_string()])
        .spawn()
        .expect("start");
    drop(listener);
    let mut channel = Channel::new(UnixStream::connect(&socket).expect("connect"));
    let fds: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    let answer = channel.call(body, &fds);
    drop(channel);
    child.wait().expect("wait");
    answer
}

fn file(path: &Path) -> File {
    File::options().read(true).write(true).create(true).truncate(false).open(path).expect("open")
}

fn layers(dir: &Path, count: u32) -> Vec<File> {
    let names = (0..count).flat_map(|number| [format!("{number:08}.data"), format!("{number:08}.map")]);
    names.map(|name| file(&dir.join(name))).collect()
}

fn find(dir: &Path, max: u64) -> Result<Body, ChannelError> {
    let outputs = ["kernel", "initrd"].map(|name| {
        let path = dir.join(name);
        fs::write(&path, b"").expect("write");
        file(&path)
    });
    let uid = if nix::unistd::geteuid().is_root() { NOBODY } else { 0 };
    let ask_for =
        FindKernel { volume_id: ID.into(), key: None, kernel_bytes_max: max, initrd_bytes_max: 1 << 20, uid };
    ask(dir, Body::FindKernel(ask_for), &outputs.into_iter().chain(layers(dir, 1)).collect::<Vec<_>>())
}

/// An ext4 disk with an entry.
fn disk(dir: &Path, kernel: &[u8]) -> File {
    let tree = dir.join("tree");
    fs::create_dir_all(tree.join("boot/loader/entries")).expect("folders");
    fs::write(tree.join("boot/vmlinuz-6.1"), kernel).expect("write");
    fs::write(tree.join("boot/initrd-6.1"), b"initrd").expect("write");
    let entry =
        "title Debian\nlinux /boot/vmlinuz-6.1\ninitrd /boot/initrd-6.1\noptions root=LABEL=root ro\n";
    fs::write(tree.join("boot/loader/entries/debian.conf"), entry).expect("write");
    let disk = dir.join("disk.raw");
    let _ = fs::remove_file(&disk);
    let (tree, path) = (tree.to_str().expect("text"), disk.to_str().expect("text"));
    common::run("/usr/sbin/mke2fs", &["-q", "-t", "ext4", "-d", tree, path, "16m"]);
    file(&disk)
}

fn kernel() -> Vec<u8> {
    let mut bytes = common::noise(200_000, 3);
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes
}

#[test]
fn a_kernel_is_found_in_a_volume_and_copied() {
    if !Path::new("/usr/sbin/mke2fs").exists() {
        println!("skipped: mke2fs is not installed");
        return;
    }
    let temp = TempDir::new().expect("tempdir");
    let dir = temp.path();
    let image = disk(dir, &kernel());
    let create = CreateVolume { volume_id: ID.into(), size_bytes: 32 << 20, from_image: true, key: None };
    let files: Vec<File> = layers(dir, 1).into_iter().chain([image]).collect();
    ask(dir, Body::CreateVolume(create), &files).expect("create");
    // The lock of the head goes with its last descriptor.
    drop(files);

    let Ok(Body::FoundKernel(found)) = find(dir, 1 << 20) else { panic!("not found") };
    assert_eq!((found.kernel_path.as_str(), found.version.as_str()), ("/boot/vmlinuz-6.1", "6.1"));
    assert_eq!((found.kernel_bytes, found.initrd_bytes, found.partition), (200_000, 6, 0));
    assert_eq!(found.cmdline, "root=LABEL=root ro console=ttyS0");
    assert_eq!(found.source, "/boot/loader/entries/debian.conf");
    let mut copied = Vec::new();
    file(&dir.join("kernel")).read_to_end(&mut copied).expect("read");
    assert!(copied == kernel(), "another kernel was copied");
    assert_eq!(fs::read(dir.join("initrd")).expect("read"), b"initrd");

    match find(dir, 1000) {
        Err(ChannelError::Refused(failed)) => {
            assert_eq!((failed.code(), failed.field.as_str()), (Code::Precondition, "kernel"));
            assert!(failed.message.contains("at most 1000"), "{}", failed.message);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_volume_without_a_kernel_says_what_is_missing() {
    let temp = TempDir::new().expect("tempdir");
    let dir = temp.path();
    let create = CreateVolume { volume_id: ID.into(), size_bytes: 1 << 20, from_image: false, key: None };
    ask(dir, Body::CreateVolume(create), &layers(dir, 1)).expect("create");
    match find(dir, 1 << 20) {
        Err(ChannelError::Refused(failed)) => {
            assert_eq!(failed.code(), Code::Precondition);
            assert!(failed.message.contains("grub.cfg"), "{}", failed.message);
        }
        other => panic!("{other:?}"),
    }
}
