//! `serio-volumed scrub`, `check --data` and the job behind them: rot is found and told, while the volume is in use, and
//! also after a scrub was killed.

mod common;

use std::{
    fs,
    os::{fd::AsRawFd, unix::fs::FileExt, unix::net::UnixListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use common::{BIN, Serving, noise, volumed};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serio_control::{
    Channel,
    message::{Body, CheckVolume},
};
use tempfile::TempDir;

/// A volume of 32 MiB in layers `monday` (an image), `tuesday` (empty), head.
fn volume(temp: &Path) -> PathBuf {
    let (volume, image) = (temp.join("vol"), temp.join("disk.raw"));
    fs::write(&image, common::image()).expect("write");
    let name = volume.to_str().expect("temporary paths are text");
    volumed(&["import", name, image.to_str().expect("text")]);
    volumed(&["snapshot", name, "monday"]);
    volumed(&["snapshot", name, "tuesday"]);
    volume
}

fn json(volume: &Path, args: &[&str]) -> (bool, serde_json::Value) {
    let output = Command::new(BIN).args(args).arg(volume).arg("--json").output().expect("run");
    let value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&output.stderr)));
    (output.status.success(), value)
}

fn flip(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[!byte[0]], at).expect("write");
}

#[test]
fn a_flipped_byte_is_named_with_the_points_that_read_it() {
    let temp = TempDir::new().expect("tempdir");
    let volume = volume(temp.path());
    let (clean, report) = json(&volume, &["scrub"]);
    assert!(clean && report["added_bytes"].as_u64() >= Some(5 << 20), "{report}");
    assert_eq!(report["layers"][0]["checksums"], true);

    // Also while it is in use.
    let serving = Serving::start(&volume, &temp.path().join("s"), &[]);
    flip(&volume.join("00000000.data"), (12 << 20) + 65_000);
    let (clean, report) = json(&volume, &["check", "--data"]);
    assert!(!clean && report["problem_count"] == 1, "{report}");
    let problem = &report["problems"][0];
    assert_eq!(
        (&problem["layer"], &problem["offset"], &problem["len"]),
        (&0.into(), &(12 << 20).into(), &(512 << 10).into())
    );
    assert_eq!(problem["points"], serde_json::json!(["monday", "tuesday", ""]));
    let words = problem["message"].as_str().expect("text");
    assert!(
        words.ends_with(
            "read by snapshot monday, snapshot tuesday, the volume as it is now; restore them from a backup"
        ),
        "{words}"
    );
    assert!(serving.stop().success());

    let (quick, _) = json(&volume, &["check"]);
    assert!(quick, "without --data only maps are compared");
    let output = Command::new(BIN).arg("scrub").arg(&volume).output().expect("run");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.code() == Some(1) && text.contains("problem: bytes 12582912+524288 of layer 0"),
        "{text}"
    );
}

#[test]
fn a_scrub_that_was_killed_leaves_nothing_wrong() {
    let temp = TempDir::new().expect("tempdir");
    let volume = volume(temp.path());
    for round in 0..6u64 {
        let mut child = Command::new(BIN)
            .args(["scrub", "--pace", "8MiB"])
            .arg(&volume)
            .stdout(Stdio::null())
            .spawn()
            .expect("start");
        // Whenever that is: any moment must do.
        let moment = noise(8, round)[3];
        std::thread::sleep(std::time::Duration::from_millis(u64::from(moment)));
        // It may have ended.
        let _ = child.kill();
        child.wait().expect("wait");
        let (clean, report) = json(&volume, &["check", "--data"]);
        assert!(clean && report["problem_count"] == 0, "{report}");
    }
    assert!(json(&volume, &["scrub"]).0);
    assert_eq!(json(&volume, &["scrub"]).1["added_bytes"], 0);
}

#[test]
fn the_job_of_seriod_reports_the_same() {
    let temp = TempDir::new().expect("tempdir");
    let volume = volume(temp.path());
    let check = |data, add_sums| {
        let socket = temp.path().join(format!("{data}{add_sums}{}", noise(8, 3)[0]));
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).expect("bind");
        fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty())).expect("inherit");
        let mut child = Command::new(BIN)
            .args(["agent", "--control-fd", &listener.as_raw_fd().to_string()])
            .spawn()
            .expect("start");
        drop(listener);
        let mut channel = Channel::new(std::os::unix::net::UnixStream::connect(&socket).expect("connect"));
        let names = (0..3).flat_map(|n| [format!("{n:08}.data"), format!("{n:08}.map")]);
        let files: Vec<_> = names
            .map(|name| {
                let write = name.ends_with("map");
                fs::File::options().read(true).write(write).open(volume.join(name)).expect("open")
            })
            .collect();
        let fds: Vec<_> = files.iter().map(std::os::fd::AsFd::as_fd).collect();
        let ask = CheckVolume { volume_id: "any".into(), data, add_sums, ..CheckVolume::default() };
        let reply = channel.call(Body::CheckVolume(ask), &fds).expect("check");
        drop(channel);
        assert!(child.wait().expect("wait").success());
        let Body::VolumeReport(report) = reply else { panic!("{reply:?}") };
        report
    };
    let report = check(false, true);
    assert!(report.problem_count == 0 && report.added_bytes > 5 << 20, "{report:?}");
    flip(&volume.join("00000000.data"), 9);
    let report = check(true, true);
    assert_eq!((report.problem_count, report.problems[0].offset, report.added_bytes), (1, Some(0), 0));
}
