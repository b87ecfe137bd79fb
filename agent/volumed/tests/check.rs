//! `serio-volumed check` as people run it.

mod common;

use std::{fs, os::unix::fs::FileExt, path::Path, process::Command};

use common::{BIN, Serving, volumed};
use tempfile::TempDir;

/// Exit code and both outputs.
fn check(volume: &Path) -> (Option<i32>, String, String) {
    let output = Command::new(BIN).arg("check").arg(volume).output().expect("run");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn clean_in_use_damaged() {
    let temp = TempDir::new().expect("tempdir");
    let volume = temp.path().join("vol");
    let name = volume.to_str().expect("temporary paths are text");
    volumed(&["create", name, "--size", "10MiB"]);
    volumed(&["snapshot", name, "monday\u{1b}[2J"]);
    let (code, out, _) = check(&volume);
    assert_eq!(code, Some(0), "{out}");
    assert!(out.contains("clean: 10MiB in 2 layers") && out.contains("(head)"), "{out}");
    assert!(out.contains("monday") && !out.contains('\u{1b}'), "{out}");

    let serving = Serving::start(&volume, &temp.path().join("s"), &[]);
    let (code, out, _) = check(&volume);
    assert!(code == Some(0) && out.contains("in use: not compared"), "{out}");
    assert!(serving.stop().success());

    let map = fs::File::options().write(true).open(volume.join("00000001.map")).expect("open");
    map.write_all_at(&[0xff; 8], 8192).expect("write");
    let (code, out, err) = check(&volume);
    assert_eq!(code, Some(1), "{out}");
    assert!(out.contains("problem: the map of layer 1 is damaged: 32 blocks"), "{out}");
    assert!(!out.contains("clean") && err.contains("has 1 problem"), "{out}{err}");

    let (code, _, err) = check(temp.path());
    assert!(code == Some(1) && err.contains("not a volume directory"), "{err}");
    let help = volumed(&["check", "--help"]);
    assert!(String::from_utf8_lossy(&help.stdout).contains("Examples:\n  serio-volumed check vol"));
}
