//! Clock, watchdog, generation identifier and balloon.

use crate::run::{Entry, kvm_usable, run, start};

#[test]
fn small_devices() {
    if !kvm_usable() {
        return;
    }
    let cmdline = "mini.test=clock,watchdog,generation,balloon,acpi";
    let done = [(); 2].map(|()| run(Entry::Pvh, cmdline, &["--memory=64MiB"]));
    for done in &done {
        done.assert_passed();
        done.assert_ok(&["clock.date", "watchdog.runs-and-stops", "balloon.inflate", "balloon.report"]);
    }
    let ids = done.map(|done| done.lines.into_iter().find(|line| line.starts_with("mini: generation ")));
    assert!(ids[0].is_some() && ids[0] != ids[1], "{ids:?}");
}

#[test]
fn a_guest_that_does_not_pet_its_watchdog() {
    if !kvm_usable() {
        return;
    }
    let cmdline = "mini.test=watchdog.bites mini.watchdog=bites";
    let done = run(Entry::Pvh, cmdline, &["--memory=64MiB", "--watchdog=end"]);
    assert!(
        done.code == Some(1) && done.errors.contains("did not pet its watchdog for 1 s"),
        "{}",
        done.text()
    );
    let done = run(Entry::Pvh, cmdline, &["--memory=64MiB", "--watchdog=reset", "--on-reset=exit"]);
    assert!(done.code == Some(0) && done.errors.contains("did not pet"), "{}", done.text());
}

#[test]
fn sixty_four_processors_start() {
    if !kvm_usable() {
        return;
    }
    let mut guest = start(Entry::Pvh, "mini.test=acpi,cpu mini.cpus=64", &["--memory=64MiB", "--cpus=64"]);
    guest.wait_for("mini: started");
    let done = guest.finish();
    done.assert_passed();
    done.assert_ok(&["acpi.processors", "cpu.start-others"]);
}
