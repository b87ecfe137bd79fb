//! A hostile guest: the table of misuses in images/mini/src/cases/hostile, each on each device that it fits.
//!
//! A few processes, each of which goes through its share of them all. What counts afterwards: each case's own line, how many there were, that the
//! process came to an orderly end, and that it had little to say.

use crate::net::Tap;
use crate::run::{Done, Entry, kvm_usable, run};
use std::collections::BTreeMap;
use std::fs::File;

/// The least that counts as a table.
const CASES_MIN: usize = 150;
/// Machines that share the work: most of the time goes into the kernel's waits when doorbells come and go.
const PARTS: usize = 4;
/// Lines on standard error: hostile guests do not fill logs.
const ERROR_LINES_MAX: usize = 50;

fn cases(done: &Done) -> Vec<&str> {
    done.lines.iter().filter_map(|line| line.strip_prefix("ok hostile.")).collect()
}

/// The device, as in `ROW.DEVICE` and `ROW.DEVICE.QUEUE`.
fn devices(cases: &[&str]) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for case in cases {
        *counts.entry(case.split('.').nth(1).unwrap_or("").to_owned()).or_default() += 1;
    }
    counts
}

/// One machine with its share of the rows.
fn share(part: usize) -> (Done, bool) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    for name in ["disk", "console"] {
        File::create(path(name)).expect("a file in our own folder").set_len(8 << 20).expect("sparse");
    }
    let tap = Tap::make(&format!("mh{part}n"), true);
    let (disk, console) = (path("disk"), path("console"));
    let mut arguments =
        vec!["--memory=256MiB", "--cpus=2", "--on-reset=exit", "--disk", &disk, "--console", &console];
    arguments.extend(tap.iter().flat_map(|tap| ["--net", tap.name()]));
    (run(Entry::Pvh, &format!("mini.test=hostile mini.part={part}/{PARTS}"), &arguments), tap.is_some())
}

#[test]
fn every_misuse_on_every_device() {
    if !kvm_usable() {
        return;
    }
    let runs: Vec<_> = (0..PARTS).map(|part| std::thread::spawn(move || share(part))).collect();
    let mut all = Vec::new();
    for run in runs {
        let (done, with_net) = run.join().expect("a share does not panic");
        for line in done.lines.iter().filter(|line| line.contains("ok hostile.")) {
            println!("{line}");
        }
        done.assert_passed();
        let lines = done.errors.lines().count();
        assert!(lines <= ERROR_LINES_MAX, "{lines} lines on standard error:\n{}", done.errors);
        let counts = devices(&cases(&done));
        if !with_net {
            println!("skipped: the network card's part, since no tap can be made here");
        }
        assert!(!with_net || counts.contains_key("net"), "{counts:?}");
        let of_commands = |case: &&str| case.ends_with(".net.2");
        assert!(!with_net || cases(&done).iter().any(of_commands), "no misuse of the control queue");
        all.extend(cases(&done).into_iter().map(str::to_owned));
    }
    assert!(all.len() >= CASES_MIN, "{} cases, at least {CASES_MIN} are wanted", all.len());
    let counts = devices(&all.iter().map(String::as_str).collect::<Vec<_>>());
    println!("{} cases: {counts:?}", all.len());
    for device in ["blk", "rng", "console", "ports"] {
        assert!(counts.get(device).is_some_and(|count| *count >= 50), "{device}: {counts:?}");
    }
}
