//! `--key FILE`: an encrypted volume from its making to its clone, as a person without seriod has it.

mod common;

use std::{fs, os::unix::fs::OpenOptionsExt, path::Path, process::Command};

use common::{BIN, Serving, have, run, volumed};
use tempfile::TempDir;

fn key(path: &Path, bytes: &[u8]) {
    use std::io::Write;
    let mut file = fs::File::options().write(true).create_new(true).mode(0o600).open(path).expect("key");
    file.write_all(bytes).expect("write");
}

/// What it says when it refuses.
fn refused(args: &[&str]) -> String {
    let ran = Command::new(BIN).args(args).output().expect("run");
    assert!(!ran.status.success(), "{args:?}");
    String::from_utf8_lossy(&ran.stderr).into_owned()
}

#[test]
fn an_encrypted_volume_is_made_served_and_cloned_with_its_key() {
    if !have("nbdsh") {
        return;
    }
    let temp = TempDir::new().expect("tempdir");
    let at = |name: &str| temp.path().join(name).to_str().expect("text").to_owned();
    let (volume, good, other) = (at("vol"), at("good.key"), at("other.key"));
    key(Path::new(&good), &[0x5a; 32]);
    key(Path::new(&other), "0f".repeat(32).as_bytes());
    volumed(&["create", &volume, "--size", "8MiB", "--key", &good]);
    let pattern = b"to be kept from others ".repeat(1000);
    let shell = |serving: &Serving, code: &str| {
        run("env", &["PATH=/usr/bin:/bin", "nbdsh", "-u", &serving.uri(), "-c", code])
    };

    let head = Serving::start(Path::new(&volume), &temp.path().join("s1"), &["--key", &good]);
    shell(&head, "h.pwrite(b'to be kept from others ' * 1000, 8192); h.flush()");
    assert!(head.stop().success());
    volumed(&["snapshot", &volume, "monday", "--key", &good]);
    let (clone, point) = (at("vol2"), format!("{volume}@monday"));
    volumed(&["clone", &point, &clone, "--key", &good]);
    volumed(&["export", &clone, &at("copy.raw"), "--key", &good]);
    let copy = fs::read(at("copy.raw")).expect("copy");
    assert!(copy[8192..8192 + pattern.len()] == pattern && copy[..8192].iter().all(|b| *b == 0));
    volumed(&["resize", &volume, "16MiB", "--key", &good]);
    volumed(&["flatten", &clone, "--key", &good]);
    volumed(&["delete-snapshot", &point, "--key", &good]);

    // Nothing of it is to be read on the disk, and nothing is opened without the key.
    for dir in [&volume, &clone] {
        for entry in fs::read_dir(dir).expect("list") {
            let bytes = fs::read(entry.expect("entry").path()).expect("read");
            assert!(!bytes.windows(11).any(|part| part == b"kept from o"));
        }
    }
    let socket = at("s2");
    assert!(refused(&["serve", &volume, "--socket", &socket]).contains("no key was given"));
    let wrong = refused(&["serve", &volume, "--socket", &socket, "--key", &other]);
    assert!(wrong.contains("it is encrypted under the vdc key"), "{wrong}");
    assert!(
        refused(&["import", &at("vol3"), &at("copy.raw"), "--key", &good]).contains("create one with --key")
    );
    // What needs no key.
    volumed(&["check", &volume]);
    volumed(&["info", &volume]);
}
