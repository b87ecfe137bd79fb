//! Strangers' tools against `serio-volumed serve`: what they write is what they and we read back.

mod common;

use std::{fs, os::unix::fs::FileExt, path::Path, process::Command};

use common::{Serving, have, image, noise, run, volumed};
use tempfile::TempDir;

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are text")
}

/// Writes a file whose zeros are holes.
fn sparse(path: &Path, bytes: &[u8]) {
    let file = fs::File::create(path).expect("create");
    file.set_len(bytes.len() as u64).expect("size");
    for (i, part) in bytes.chunks(64 << 10).enumerate() {
        if part.iter().any(|&b| b != 0) {
            file.write_all_at(part, i as u64 * (64 << 10)).expect("write");
        }
    }
}

#[test]
fn nbdinfo_sees_what_an_export_is() {
    if !have("nbdinfo") {
        return;
    }
    let temp = TempDir::new().expect("tempdir");
    let (volume, socket) = (temp.path().join("vol"), temp.path().join("s"));
    volumed(&["create", text(&volume), "--size", "10MiB"]);
    let info = |more: &[&str], name: &str| -> serde_json::Value {
        let serving = Serving::start(&volume, &socket, more);
        let uri = format!("nbd+unix:///{name}?socket={}", serving.socket.display());
        let output = run("nbdinfo", &["--json", &uri]);
        assert!(serving.stop().success());
        serde_json::from_slice::<serde_json::Value>(&output.stdout).expect("json")["exports"][0].clone()
    };
    let writable = info(&[], "");
    assert_eq!(writable["export-size"], 10 << 20);
    for can in ["can_df", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero", "can_cache"] {
        assert_eq!(writable[can], true, "{can}");
    }
    assert_eq!(writable["is_read_only"], false);
    assert_eq!(writable["contexts"][0], "base:allocation");
    assert_eq!(writable["block_size_maximum"], 32 << 20);
    volumed(&["snapshot", text(&volume), "monday"]);
    let point = info(&["--snapshot", "monday", "--export-name", "m"], "m");
    assert_eq!((&point["is_read_only"], &point["can_trim"]), (&true.into(), &false.into()));
}

#[test]
fn nbdcopy_both_ways_with_four_connections() {
    if !have("nbdcopy") {
        return;
    }
    let temp = TempDir::new().expect("tempdir");
    let at = |name: &str| temp.path().join(name);
    fs::write(at("in"), image()).expect("write");
    volumed(&["create", text(&at("vol")), "--size", "32MiB"]);
    // Once into the bottom layer, and once over a snapshot of other content.
    for round in 0..2 {
        let serving = Serving::start(&at("vol"), &at("s"), &[]);
        run("nbdcopy", &["--flush", "--connections=4", text(&at("in")), &serving.uri()]);
        run("nbdcopy", &["--connections=4", &serving.uri(), text(&at("out"))]);
        assert!(fs::read(at("out")).expect("read") == fs::read(at("in")).expect("read"), "round {round}");
        assert!(serving.stop().success());
        if round == 0 {
            volumed(&["snapshot", text(&at("vol")), "first"]);
            let mut other = image();
            other[1 << 20..3 << 20].fill(0);
            other[20 << 20..21 << 20].copy_from_slice(&noise(1 << 20, 9));
            fs::write(at("in"), other).expect("write");
        }
    }
    let serving = Serving::start(&at("vol"), &at("s"), &["--snapshot", "first"]);
    run("nbdcopy", &["--connections=4", &serving.uri(), text(&at("out"))]);
    assert!(fs::read(at("out")).expect("read") == image(), "the point keeps what it had");
}

#[test]
fn qemu_img_converts_maps_and_compares() {
    if !have("qemu-img") {
        return;
    }
    let temp = TempDir::new().expect("tempdir");
    let at = |name: &str| temp.path().join(name);
    sparse(&at("in"), &image());
    volumed(&["import", text(&at("vol")), text(&at("in"))]);
    let serving = Serving::start(&at("vol"), &at("s"), &["--read-only"]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&at("in")), &serving.uri()]);
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &serving.uri()]);
    let map: serde_json::Value = serde_json::from_slice(&map.stdout).expect("json");
    let zeros: u64 = map
        .as_array()
        .expect("a list")
        .iter()
        .filter(|extent| extent["zero"] == true)
        .filter_map(|extent| extent["length"].as_u64())
        .sum();
    assert!(zeros > 20 << 20, "holes are told: {map}");
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &serving.uri(), text(&at("copy.qcow2"))]);
    drop(serving);
    volumed(&["create", text(&at("two")), "--size", "32MiB"]);
    let serving = Serving::start(&at("two"), &at("s"), &[]);
    run("qemu-img", &["convert", "-n", "-f", "qcow2", "-O", "raw", text(&at("copy.qcow2")), &serving.uri()]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&at("in")), &serving.uri()]);
}

#[test]
fn qemu_io_finds_its_patterns_over_a_snapshot() {
    if !have("qemu-io") {
        return;
    }
    let temp = TempDir::new().expect("tempdir");
    let at = |name: &str| temp.path().join(name);
    let io_with = |options: &[&str], serving: &Serving, commands: &[&str]| {
        let mut args = options.to_vec();
        args.extend(commands.iter().flat_map(|c| ["-c", c]));
        let uri = serving.uri();
        args.push(&uri);
        let output = run("qemu-io", &args);
        let said = String::from_utf8_lossy(&output.stdout).to_lowercase();
        assert!(!said.contains("failed") && !said.contains("error"), "{said}");
    };
    let io = |serving: &Serving, commands: &[&str]| io_with(&["-f", "raw"], serving, commands);
    volumed(&["create", text(&at("vol")), "--size", "8MiB"]);
    let serving = Serving::start(&at("vol"), &at("s"), &[]);
    io(&serving, &["write -P 0x11 0 4M", "write -P 0x22 5000 70001", "flush", "read -P 0x22 5000 70001"]);
    drop(serving);
    volumed(&["snapshot", text(&at("vol")), "a"]);
    let serving = Serving::start(&at("vol"), &at("s"), &[]);
    io(
        &serving,
        &[
            "read -P 0x11 0 5000",
            "write -P 0x33 -f 513 1000",
            "read -P 0x11 0 513",
            "read -P 0x33 513 1000",
            "read -P 0x11 1513 3000",
            "write -z 6000 9000",
            "write -z -u 1M 64k",
            "discard 2M 128k",
            "read -P 0 6000 9000",
            "read -P 0x22 5000 1000",
            "read -P 0 1M 64k",
            "aio_write -P 0x44 3M 4097",
            "aio_write -P 0x55 3149825 511",
            "aio_flush",
            "read -P 0x44 3M 4097",
            "read -P 0x55 3149825 511",
        ],
    );
    assert!(serving.stop().success());
    // A new process reads the maps that were committed.
    let serving = Serving::start(&at("vol"), &at("s"), &[]);
    io(
        &serving,
        &["read -P 0x33 513 1000", "read -P 0 6000 9000", "read -P 0x55 3149825 511", "read -P 0 1M 64k"],
    );
    drop(serving);
    let serving = Serving::start(&at("vol"), &at("s"), &["--snapshot", "a"]);
    let reads = ["read -P 0x22 5000 70001", "read -P 0x11 80000 4000000"];
    io_with(&["-r", "-f", "raw"], &serving, &reads);
}

#[test]
fn nbdsh_is_refused_what_it_should_be() {
    if !have("nbdsh") {
        return;
    }
    let temp = TempDir::new().expect("tempdir");
    let (disk, socket) = (temp.path().join("raw"), temp.path().join("s"));
    fs::write(&disk, image()).expect("write");
    let serving = Serving::start(&disk, &socket, &["--read-only", "--export-name", "disk"]);
    let script = format!(
        r#"
import errno
def refused(f, *wanted):
    try:
        f()
    except nbd.Error as e:
        assert e.errnum in wanted, (e.errnum, wanted)
        return
    raise AssertionError("not refused")
path = "{}"
h.set_export_name("nope")
refused(lambda: h.connect_unix(path), errno.ENOENT, 0)
h = nbd.NBD()
h.set_export_name("disk")
h.add_meta_context("base:allocation")
h.connect_unix(path)
h.set_strict_mode(0)
refused(lambda: h.pwrite(b"x" * 512, 0), errno.EPERM)
refused(lambda: h.trim(512, 0), errno.EPERM)
refused(lambda: h.pread(512, h.get_size()), errno.EINVAL)
refused(lambda: h.pread(0, 0), errno.EINVAL)
assert len(h.pread(70000, 12345, flags=nbd.CMD_FLAG_DF)) == 70000
h.cache(4096, 0)
h.flush()
got = []
h.block_status(32 << 20, 0, lambda c, o, e, err: got.append(list(e)), nbd.CMD_FLAG_REQ_ONE)
assert len(got[0]) == 2 and got[0][1] == 0, got
h.shutdown()
"#,
        socket.display()
    );
    // With Debian's Python, for which its module is installed, whichever comes first in PATH.
    let output =
        Command::new("nbdsh").args(["-c", &script]).env("PATH", "/usr/bin:/bin").output().expect("nbdsh");
    let said = String::from_utf8_lossy(&output.stderr);
    if said.contains("No module named nbd") {
        println!("skipped: python3-libnbd is not installed");
        return;
    }
    assert!(output.status.success(), "{said}");
    drop(serving);
}

#[test]
fn nbdkit_reads_and_writes_through_delays_and_errors() {
    if !(have("nbdkit") && have("nbdcopy")) {
        return;
    }
    let temp = TempDir::new().expect("tempdir");
    let at = |name: &str| temp.path().join(name);
    fs::write(at("in"), image()).expect("write");
    volumed(&["create", text(&at("vol")), "--size", "32MiB"]);
    let serving = Serving::start(&at("vol"), &at("s"), &["--export-name", "disk"]);
    let through = |filters: &[&str], options: &[&str], from: &str, to: &str| {
        let mut args = vec!["-U", "-"];
        args.extend(filters);
        let socket = format!("socket={}", at("s").display());
        let copy = format!("--run=nbdcopy --connections=4 {from} {to}");
        args.extend(["nbd", &socket, "export=disk"]);
        args.extend(options);
        args.push(&copy);
        run("nbdkit", &args);
    };
    let again = ["--filter=retry-request", "--filter=error", "--filter=delay"];
    let flaky = [
        "retry-request-retries=9",
        "retry-request-delay=1",
        "error=EIO",
        "error-rate=3%",
        "delay-read=1ms",
        "delay-write=1ms",
    ];
    through(&again, &flaky, text(&at("in")), "$uri");
    through(&again, &flaky, "$uri", text(&at("out")));
    assert!(fs::read(at("out")).expect("read") == image());
    // The retry filter opens a new connection for each failure.
    let reopen = ["--filter=retry", "--filter=error"];
    let rarely = ["retries=10", "retry-delay=1", "error-pread=EIO", "error-pread-rate=2%"];
    fs::remove_file(at("out")).expect("remove");
    through(&reopen, &rarely, "$uri", text(&at("out")));
    assert!(fs::read(at("out")).expect("read") == image());
    assert!(serving.stop().success());
}

#[test]
fn qemu_img_bench_and_nbd_client() {
    let temp = TempDir::new().expect("tempdir");
    let at = |name: &str| temp.path().join(name);
    volumed(&["create", text(&at("vol")), "--size", "32MiB"]);
    let serving = Serving::start(&at("vol"), &at("s"), &["--export-name", "disk"]);
    let uri = format!("nbd+unix:///disk?socket={}", at("s").display());
    if have("qemu-img") {
        run(
            "qemu-img",
            &["bench", "-f", "raw", "-w", "-c", "300", "-d", "16", "-s", "64k", "--flush-interval=30", &uri],
        );
        run("qemu-img", &["bench", "-f", "raw", "-c", "300", "-d", "32", "-s", "128k", &uri]);
        run("qemu-img", &["bench", "-f", "raw", "-w", "-c", "300", "-d", "8", "-s", "777", "-o", "3", &uri]);
    }
    if have("nbd-client") {
        let output = run("nbd-client", &["-l", "-unix", text(&at("s"))]);
        assert!(String::from_utf8_lossy(&output.stdout).contains("disk"), "{output:?}");
    }
    assert!(serving.stop().success());
}
