//! What has changed since a snapshot, as strangers' tools ask for it: `qemu:dirty-bitmap:NAME`.

mod common;

use std::{fs, path::Path, process::Command};

use common::{Serving, have, image, noise, run, volumed};
use tempfile::TempDir;

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are text")
}

/// (offset, length) of what nbdinfo says has changed since a snapshot.
fn dirty(serving: &Serving, since: &str) -> Vec<(u64, u64)> {
    let context = format!("--map=qemu:dirty-bitmap:{since}");
    let output = run("nbdinfo", &["--json", &context, &serving.uri()]);
    let map: serde_json::Value = serde_json::from_slice(&output.stdout).expect("json");
    let extents = map.as_array().expect("a list").iter();
    extents
        .filter(|extent| extent["type"] == 1)
        .map(|extent| {
            (extent["offset"].as_u64().expect("offset"), extent["length"].as_u64().expect("length"))
        })
        .collect()
}

/// A volume with the points monday (the image), tuesday (with three changes) and a head with one more.
fn volume(temp: &Path) -> std::path::PathBuf {
    let (volume, disk) = (temp.join("vol"), temp.join("in"));
    fs::write(&disk, image()).expect("write");
    volumed(&["import", text(&volume), text(&disk)]);
    volumed(&["snapshot", text(&volume), "monday"]);
    let change = |commands: &[&str]| {
        let serving = Serving::start(&volume, &temp.join("s"), &[]);
        let mut args = vec!["-f", "raw"];
        args.extend(commands.iter().flat_map(|command| ["-c", command]));
        let uri = serving.uri();
        args.push(&uri);
        run("qemu-io", &args);
        assert!(serving.stop().success());
    };
    change(&["write -P 0x11 8192 4096", "write -P 0x22 1000001 5000", "discard 2M 64k"]);
    volumed(&["snapshot", text(&volume), "tuesday"]);
    change(&["write -P 0x33 30M 64k"]);
    volume
}

#[test]
fn the_map_names_what_was_written_and_nothing_else() {
    if !(have("nbdinfo") && have("qemu-io")) {
        return;
    }
    let temp = TempDir::new().expect("tempdir");
    let volume = volume(temp.path());
    let changed = [(8192, 4096), (999_424, 8192), (2 << 20, 64 << 10)];
    let more = (30 << 20, 64 << 10);
    let serving = Serving::start(&volume, &temp.path().join("s"), &["--read-only"]);
    assert_eq!(dirty(&serving, "monday"), [&changed[..], &[more]].concat());
    assert_eq!(dirty(&serving, "tuesday"), [more]);
    drop(serving);
    let serving = Serving::start(&volume, &temp.path().join("s"), &["--snapshot", "tuesday"]);
    assert_eq!(dirty(&serving, "monday"), changed);
    assert_eq!(dirty(&serving, "tuesday"), []);
    let output = run("nbdinfo", &["--json", &serving.uri()]);
    let info: serde_json::Value = serde_json::from_slice(&output.stdout).expect("json");
    let contexts = ["base:allocation", "qemu:dirty-bitmap:monday", "qemu:dirty-bitmap:tuesday"];
    assert_eq!(info["exports"][0]["contexts"], serde_json::json!(contexts));
}

#[test]
fn an_incremental_copy_rebuilds_the_disk_byte_by_byte() {
    if !(have("nbdsh") && have("nbdcopy") && have("qemu-io")) {
        return;
    }
    let temp = TempDir::new().expect("tempdir");
    let at = |name: &str| temp.path().join(name);
    let volume = volume(temp.path());
    let serving = Serving::start(&volume, &at("s"), &["--snapshot", "monday"]);
    run("nbdcopy", &[&serving.uri(), text(&at("copy"))]);
    drop(serving);
    assert!(fs::read(at("copy")).expect("read") == image());
    let serving = Serving::start(&volume, &at("s"), &["--read-only"]);
    // Two contexts at once: changed, and of that what is a hole.
    let script = format!(
        r#"
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:dirty-bitmap:monday")
h.connect_unix("{}")
size, at, copied = h.get_size(), 0, 0
with open("{}", "r+b") as copy:
    while at < size:
        found = {{}}
        h.block_status(size - at, at, lambda c, o, e, err: found.__setitem__(c, list(e)))
        assert set(found) == {{"base:allocation", "qemu:dirty-bitmap:monday"}}, found
        for length, dirty in zip(*[iter(found["qemu:dirty-bitmap:monday"])] * 2):
            if dirty:
                copy.seek(at)
                copy.write(h.pread(length, at))
                copied += length
            at += length
assert copied < 200000, copied
"#,
        serving.socket.display(),
        at("copy").display()
    );
    let output =
        Command::new("nbdsh").args(["-c", &script]).env("PATH", "/usr/bin:/bin").output().expect("nbdsh");
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("No module named nbd") {
        println!("skipped: python3-libnbd is not installed");
        return;
    }
    assert!(output.status.success(), "{said}");
    run("nbdcopy", &[&serving.uri(), text(&at("whole"))]);
    let whole = fs::read(at("whole")).expect("read");
    assert!(whole == fs::read(at("copy")).expect("read"), "the copy is the disk as it is now");
    assert!(whole[30 << 20..(30 << 20) + (64 << 10)].iter().all(|b| *b == 0x33));
    assert_ne!(whole[8192..12288], noise(12288, 1)[8192..], "and not as it was");
}
