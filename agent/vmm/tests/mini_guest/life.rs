//! How a machine starts and ends: boot protocols, power-off, reset, triple fault, signals, serial input.

use crate::run::{Done, Entry, kvm_usable, run, start};
use nix::sys::signal::{Signal, kill};
use std::io::Write as _;

const SMALL: &[&str] = &["--memory=64MiB", "--cpus=1"];

fn has(done: &Done, start: &str) -> bool {
    done.lines.iter().any(|line| line.starts_with(start))
}

#[test]
fn boots_by_the_pvh_note() {
    if !kvm_usable() {
        return;
    }
    let done = run(Entry::Pvh, "mini.test=serial,acpi,memory", SMALL);
    done.assert_passed();
    assert!(has(&done, "mini: started by Pvh, "), "{}", done.text());
}

#[test]
fn boots_by_the_linux_64_bit_entry() {
    if !kvm_usable() {
        return;
    }
    let done = run(Entry::Linux64, "mini.test=serial,acpi,memory,pci", SMALL);
    done.assert_passed();
    assert!(has(&done, "mini: started by Linux, "), "{}", done.text());
}

#[test]
fn power_off_exits_0() {
    if !kvm_usable() {
        return;
    }
    let done = run(Entry::Pvh, "mini.test=poweroff", SMALL);
    assert_eq!(done.code, Some(0), "{}", done.text());
    assert!(has(&done, "mini: power off") && !has(&done, "mini: no power-off"), "{}", done.text());
}

#[test]
fn reset_starts_the_same_machine_again() {
    if !kvm_usable() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk");
    std::fs::File::create(&path).expect("a file in our own folder").set_len(1 << 20).expect("sparse");
    let arguments = ["--memory=64MiB", "--cpus=1", "--disk", &path.display().to_string()];
    let done = run(Entry::Pvh, "mini.test=reset", &arguments);
    assert!(has(&done, "mini: resetting"), "{}", done.text());
    assert!(has(&done, "mini: back after reset"), "{}", done.text());
    assert_eq!(done.code, Some(0), "{}", done.text());
}

#[test]
fn a_triple_fault_exits_1_and_says_so() {
    if !kvm_usable() {
        return;
    }
    let done = run(Entry::Pvh, "mini.test=triple", SMALL);
    assert_eq!(done.code, Some(1), "{}", done.text());
    assert!(done.errors.to_lowercase().contains("triple fault"), "{}", done.text());
}

#[test]
fn a_spinning_guest_ends_by_a_signal() {
    if !kvm_usable() {
        return;
    }
    let mut guest = start(Entry::Pvh, "mini.test=spin", SMALL);
    guest.wait_for("mini: spinning");
    kill(guest.pid(), Signal::SIGTERM).expect("our own child");
    let done = guest.finish();
    assert_ne!(done.code, Some(0), "it was stopped, it did not power off\n{}", done.text());
}

#[test]
fn the_heart_beats_in_real_time() {
    if !kvm_usable() {
        return;
    }
    let mut guest = start(Entry::Pvh, "mini.test=heartbeat", SMALL);
    for count in 1..=5 {
        let line = guest.wait_for("heartbeat ");
        assert!(line.starts_with(&format!("heartbeat {count} ")), "{line}");
    }
    kill(guest.pid(), Signal::SIGTERM).expect("our own child");
    guest.finish();
}

#[test]
fn what_a_killed_guest_had_flushed_is_there() {
    if !kvm_usable() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk");
    std::fs::File::create(&path).expect("a file in our own folder").set_len(1 << 20).expect("sparse");
    let arguments = ["--memory=32MiB", "--cpus=1", "--disk", &path.display().to_string()];
    let mut safe = 0u64;
    for rounds in [1, 9, 4] {
        let mut guest = start(Entry::Pvh, "mini.test=writer", &arguments);
        let found = guest.wait_for("writer: ");
        let found: u64 = found.strip_prefix("writer: found ").and_then(|n| n.parse().ok()).expect(&found);
        assert!(found >= safe, "found {found}, flushed {safe}");
        guest.wait_for(&format!("writer: {}", found + rounds));
        kill(guest.pid(), Signal::SIGKILL).expect("our own child");
        // Its last line may be cut off.
        let done = guest.finish();
        assert!(!has(&done, "writer: damaged") && !has(&done, "writer: failed"), "{}", done.text());
        safe = found + rounds;
    }
}

#[test]
fn serial_input_reaches_the_guest() {
    if !kvm_usable() {
        return;
    }
    let mut guest = start(Entry::Pvh, "mini.test=echo", SMALL);
    guest.wait_for("mini: echo");
    let mut input = guest.input();
    // More than the 16 bytes of the port's FIFO.
    let text = "the quick brown fox jumps over the lazy dog";
    input.write_all(format!("{text}\n\x04").as_bytes()).expect("the guest reads");
    let line = guest.wait_for("the ");
    assert_eq!(line, text);
    let done = guest.finish();
    assert_eq!(done.code, Some(0), "{}", done.text());
}
