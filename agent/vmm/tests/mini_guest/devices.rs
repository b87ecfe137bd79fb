//! Every case of the mini guest, with disks that are checked from the host's side afterwards.

use crate::run::{Entry, kvm_usable, run};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

fn disk(folder: &Path, name: &str, bytes: u64) -> PathBuf {
    let path = folder.join(name);
    let file = File::create(&path).expect("a file in our own folder");
    file.set_len(bytes).expect("sparse");
    path
}

fn argument(path: &Path, options: &str) -> String {
    format!("{}{options}", path.display())
}

#[test]
fn all_cases_with_three_disks_and_two_processors() {
    if !kvm_usable() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (first, second) = (disk(folder.path(), "first", 8 << 20), disk(folder.path(), "second", 8 << 20));
    let sealed = disk(folder.path(), "sealed", 8 << 20);
    fs::write(&sealed, vec![0x5a; 8 << 20]).expect("our own file");
    let done = run(
        Entry::Pvh,
        "mini.test=all mini.cpus=2 mini.memory_mib=256 mini.disk_sectors=16384",
        &[
            "--memory=256MiB",
            "--cpus=2",
            "--disk",
            &argument(&first, ""),
            "--disk",
            &argument(&second, ""),
            "--disk",
            &argument(&sealed, ",readonly"),
        ],
    );
    done.assert_passed();
    done.assert_ok(&["cpu.start-others", "irq.msix", "irq.serial-line", "pci.bar-move", "virtio.bad-ring"]);
    done.assert_ok(&[
        "rng.bytes",
        "blk.flush",
        "blk.readonly",
        "blk.distinct",
        "blk.depth",
        "blk.multi-queue",
    ]);
    for (path, text) in [(&first, "serio mini disk 0\n"), (&second, "serio mini disk 1\n")] {
        let bytes = fs::read(path).expect("our own file");
        assert!(bytes.starts_with(text.as_bytes()), "{} does not begin with {text:?}", path.display());
    }
    assert!(
        fs::read(&sealed).expect("our own file").iter().all(|&byte| byte == 0x5a),
        "the read-only disk changed"
    );
}

#[test]
fn a_machine_without_disks() {
    if !kvm_usable() {
        return;
    }
    let done = run(Entry::Pvh, "mini.test=all mini.cpus=1", &["--memory=64MiB", "--cpus=1"]);
    done.assert_passed();
    done.assert_ok(&["serial.scratch", "acpi.checksums", "irq.timer"]);
}

#[test]
fn four_processors() {
    if !kvm_usable() {
        return;
    }
    let done = run(Entry::Pvh, "mini.test=acpi,cpu mini.cpus=4", &["--memory=64MiB", "--cpus=4"]);
    done.assert_passed();
    done.assert_ok(&["cpu.start-others"]);
}

#[test]
fn memory_above_4_gib() {
    if !kvm_usable() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = disk(folder.path(), "disk", 8 << 20);
    for entry in [Entry::Pvh, Entry::Linux64] {
        let done = run(
            entry,
            "mini.test=acpi,memory,pci,blk mini.memory_mib=4096",
            &["--memory=4GiB", "--cpus=1", "--disk", &argument(&path, "")],
        );
        done.assert_passed();
        done.assert_ok(&["memory.above-4g", "memory.reachable", "memory.hole", "blk.high-memory"]);
    }
}

#[test]
fn memory_up_to_the_hole() {
    if !kvm_usable() {
        return;
    }
    for mib in [3071, 3072, 3073] {
        let cmdline = format!("mini.test=memory,pci mini.memory_mib={mib}");
        run(Entry::Pvh, &cmdline, &[&format!("--memory={mib}MiB"), "--cpus=1"]).assert_passed();
    }
}
