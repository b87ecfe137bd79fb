//! TRIM on an export of a snapshot: refused, unless the export was made to release what only the snapshot holds.

mod common;

use std::{fs, os::unix::fs::MetadataExt};

use common::{Serving, have, run, volumed};
use tempfile::TempDir;

#[test]
fn a_trim_of_a_snapshot_frees_what_only_it_has() {
    if !have("nbdsh") {
        return;
    }
    let temp = TempDir::new().expect("tempdir");
    let (volume, image) = (temp.path().join("vol"), temp.path().join("disk.raw"));
    fs::write(&image, common::image()).expect("write");
    let name = volume.to_str().expect("temporary paths are text");
    volumed(&["import", name, image.to_str().expect("text")]);
    volumed(&["snapshot", name, "monday"]);
    // The system's python has libnbd's module, another one in PATH may not.
    let shell = |serving: &Serving, code: &str| {
        run("env", &["PATH=/usr/bin:/bin", "nbdsh", "-u", &serving.uri(), "-c", code])
    };

    // The head overwrites the first MiB, and the second half of the second block after it.
    let head = Serving::start(&volume, &temp.path().join("head"), &[]);
    shell(&head, "h.pwrite(b'h' * (1 << 20), 0); h.pwrite(b'i' * 2048, (1 << 20) + 6144); h.flush()");

    let plain = Serving::start(&volume, &temp.path().join("plain"), &["--snapshot", "monday"]);
    shell(&plain, "assert h.is_read_only() and not h.can_trim()");
    shell(
        &plain,
        "h.set_strict_mode(0)\ntry:\n  h.trim(4096, 0)\n  assert False\nexcept nbd.Error as e:\n  assert e.errno == 'EPERM'",
    );
    assert!(plain.stop().success());

    // While the head is in use.
    let used = || fs::metadata(volume.join("00000000.data")).expect("there").blocks() * 512;
    let before = used();
    let point = Serving::start(&volume, &temp.path().join("point"), &["--snapshot", "monday", "--release"]);
    shell(&point, "assert h.can_trim() and not h.can_zero() and not h.is_read_only()");
    shell(
        &point,
        "try:\n  h.pwrite(b'x' * 512, 0)\n  assert False\nexcept nbd.Error as e:\n  assert e.errno == 'EPERM'",
    );
    shell(&point, "h.trim(h.get_size(), 0)");
    shell(
        &point,
        "b = h.pread(2 << 20, 0)\nz = bytes(1 << 20)\nassert b[:1 << 20] == z\n\
         assert b[(1 << 20) + 4096:(1 << 20) + 8192] == bytes(4096)\n\
         assert bytes(4096) not in (b[1 << 20:(1 << 20) + 4096], b[(1 << 20) + 8192:(1 << 20) + 12288])",
    );
    assert!(point.stop().success());
    assert_eq!(before - used(), (1 << 20) + 4096);
    let whole = "b = h.pread(2 << 20, 0)\nassert b[:1 << 20] == b'h' * (1 << 20)\nassert b[(1 << 20) + 6144:(1 << 20) + 8192] == b'i' * 2048\nassert bytes(2048) != b[(1 << 20) + 4096:(1 << 20) + 6144]";
    shell(&head, whole);
    assert!(head.stop().success());
    volumed(&["scrub", name]);
}
