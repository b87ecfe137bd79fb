//! Pictures and what they are judged to be, word by word; a recorded tree; the floor.

use std::{fs, path::Path};

use super::{
    disks::DiskState,
    judge::filling,
    observe::{Certificate, Clock, Space},
    *,
};

fn well() -> Observed {
    Observed {
        now_s: 1_000_000,
        space: Some(Space { total_bytes: 100 << 30, free_bytes: 50 << 30 }),
        floor_bytes: 64 << 20,
        history: Vec::new(),
        clock: Some(Clock { is_synced: true, error_us: 2_000 }),
        memory_full: Some(0.4),
        disks: vec![DiskState {
            name: "sda".into(),
            state: Some("running".into()),
            errors: 3,
            errors_before: 3,
        }],
        certificates: vec![Certificate { path: "c.pem".into(), end_s: Some(1_000_000 + 90 * 86_400) }],
        kvm: Ok(()),
        kernel: "6.1.0-13-amd64".into(),
    }
}

fn judged(seen: &Observed) -> Vec<String> {
    let line = |f: Finding| format!("{} {} {}", f.kind.as_str(), f.severity.as_str(), f.reason);
    findings(seen).into_iter().map(line).collect()
}

#[test]
fn a_well_node_has_no_conditions() {
    assert_eq!(judged(&well()), [""; 0]);
    let nothing = Observed { space: None, clock: None, memory_full: None, disks: vec![], ..well() };
    assert_eq!(judged(&nothing), [""; 0], "what is not known is not guessed");
}

#[test]
fn a_sick_node_has_all_of_them() {
    let seen = Observed {
        space: Some(Space { total_bytes: 100 << 30, free_bytes: 32 << 20 }),
        clock: Some(Clock { is_synced: false, error_us: 16_000_000 }),
        memory_full: Some(55.0),
        disks: vec![
            DiskState { name: "sda".into(), state: Some("running".into()), errors: 5, errors_before: 3 },
            DiskState { name: "sdb".into(), state: Some("offline".into()), errors: 0, errors_before: 0 },
            DiskState { name: "nvme0".into(), state: Some("live".into()), errors: 0, errors_before: 0 },
        ],
        certificates: vec![
            Certificate { path: "a.pem".into(), end_s: Some(1_000_000 + 5 * 86_400 + 7200) },
            Certificate { path: "b.pem".into(), end_s: Some(999_999) },
            Certificate { path: "c.pem".into(), end_s: None },
        ],
        kvm: Err("No such file or directory".into()),
        kernel: "5.10.0-8-amd64".into(),
        ..well()
    };
    let expected = [
        "disk-filling critical 32MiB of 100GiB are free on the disk of state_dir; nothing new is made or started",
        "failing-disk warning sda had 2 I/O errors since the agent's start, 5 in all",
        "failing-disk critical the kernel says that sdb is offline",
        "memory-pressure critical nothing ran for want of memory in 55% of the last minute",
        "clock-skew warning nothing keeps the host's clock right",
        "certificate-expiring warning a.pem expires in 5 days and 2 hours",
        "certificate-expiring critical b.pem has expired",
        "certificate-expiring warning c.pem cannot be read",
        "kvm-gone critical /dev/kvm cannot be used: No such file or directory",
        "kernel-too-old warning the host runs Linux 5.10.0-8-amd64, older than 6.1",
    ];
    assert_eq!(judged(&seen), expected);
}

#[test]
fn a_disk_that_fills_is_forecast() {
    // 1 MiB a second, half a minute apart, and noise that does not matter.
    let history: Vec<(u64, u64)> = (0..40).map(|i| (i * 30, (i * 30) * (1 << 20) + i % 3)).collect();
    let rate = filling(&history).unwrap();
    assert!((rate - 1_048_576.0).abs() < 1.0, "{rate}");
    let seen = Observed { history: history.clone(), ..well() };
    assert_eq!(
        judged(&seen),
        [
            "disk-filling warning 50GiB of 100GiB are free on the disk of state_dir; full in 14.2 hours as it goes"
        ]
    );
    assert_eq!(filling(&history[..9]), None, "too few looks");
    let shrinks: Vec<(u64, u64)> = (0..40).map(|i| (i * 30, (1 << 40) - i)).collect();
    assert_eq!(filling(&shrinks), None);
    assert_eq!(filling(&[(5, 5); 20]), None, "all at one instant");
}

#[test]
fn conditions_keep_their_time_and_only_changes_are_told() {
    let gone = Observed { kvm: Err("x".into()), ..well() };
    let (first, told) = follow(&[], findings(&gone), 100);
    assert_eq!((first[0].since_s, told.len(), told[0].0), (100, 1, "unhealthy"));
    let (second, told) = follow(&first, findings(&gone), 200);
    assert_eq!((second[0].since_s, told.len()), (100, 0));
    let (third, told) = follow(&second, findings(&well()), 300);
    assert!(third.is_empty() && told[0].0 == "healthy" && told[0].1.contains("kvm-gone"), "{told:?}");
}

fn put(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, format!("{text}\n")).unwrap();
}

#[test]
fn a_recorded_tree_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    put(
        root,
        "proc/pressure/memory",
        "some avg10=1.00 avg60=2.00 avg300=3.00 total=4\nfull avg10=5.00 avg60=12.50 avg300=7.00 total=8",
    );
    put(root, "proc/sys/kernel/osrelease", "6.12.0-1-amd64");
    put(root, "sys/block/sda/device/ioerr_cnt", "0x1f");
    put(root, "sys/block/sda/device/state", "running");
    put(root, "sys/block/loop0/size", "0");
    put(root, "sys/class/nvme/nvme0/state", "dead");
    assert_eq!(observe::memory_full(root), Some(12.5));
    let disks = disks::disks(root);
    assert_eq!((disks.len(), disks[0].errors), (2, 31));
    assert_eq!(disks[1].state.as_deref(), Some("dead"));
    assert!(observe::kvm(root).is_err());
    put(root, "dev/kvm", "");
    assert_eq!((observe::kvm(root), observe::kernel(root).as_str()), (Ok(()), "6.12.0-1-amd64"));
    assert_eq!(observe::certificate(&root.join("none.pem")).end_s, None);
    let key = rcgen::generate_simple_self_signed(vec!["a".into()]).unwrap();
    put(root, "c.pem", &key.cert.pem());
    assert!(observe::certificate(&root.join("c.pem")).end_s.unwrap() > 1_700_000_000);
}

#[test]
fn raids_and_file_systems_tell_of_their_disks() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    put(root, "sys/block/md0/md/degraded", "1");
    put(root, "sys/block/md0/md/dev-sda1/errors", "2");
    put(root, "sys/block/md0/md/dev-sdb1/errors", "40");
    put(root, "sys/block/md1/md/degraded", "0");
    // Without redundancy, and not understood.
    put(root, "sys/block/md2/md/level", "raid0");
    put(root, "sys/block/md3/md/degraded", "x");
    put(root, "sys/fs/ext4/sda1/errors_count", "3");
    put(root, "sys/fs/ext4/features/lazy_itable_init", "supported");
    let stats =
        "write_errs 1\nread_errs 2\nflush_errs 0\ncorruption_errs 18446744073709551615\ngeneration_errs 0";
    put(root, "sys/fs/btrfs/5f1b/devinfo/1/error_stats", stats);
    put(root, "sys/fs/btrfs/features/raid56", "0");
    let mut disks = disks::disks(root);
    let seen: Vec<_> = disks.iter().map(|d| (d.name.as_str(), d.state.as_deref(), d.errors)).collect();
    assert_eq!(
        seen,
        [
            ("md0", Some("degraded"), 42),
            ("md1", Some("running"), 0),
            ("ext4 on sda1", None, 3),
            ("device 1 of btrfs 5f1b", None, u64::MAX)
        ]
    );
    disks[3].errors_before = u64::MAX;
    let said = judged(&Observed { disks, ..well() });
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(said[0].contains("critical the kernel says that md0 is degraded"), "{said:?}");
    assert!(said[1].contains("ext4 on sda1 had 3 I/O errors since the agent's start"), "{said:?}");
}

#[test]
fn below_the_floor_nothing_is_made_and_everything_may_be_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let settings = |floor_bytes| HealthSettings {
        root: dir.path().to_owned(),
        resource: "nodes/a".into(),
        state_dir: dir.path().to_owned(),
        floor_bytes,
        certificates: Vec::new(),
        interval: Duration::from_secs(1),
    };
    let name: serio_types::VdcName = "ardesio/web".parse().unwrap();
    let start = Mutation::StartVm { name: name.clone() };
    let create = Mutation::CreateVolume { name: name.clone(), size: None, image: None }.at(3);
    let delete = Mutation::DeleteVolume { name };
    let full = Health::new(settings(u64::MAX));
    assert!(full.admit(&start).unwrap_err().to_string().contains("nodes/a is full: "));
    assert!(full.admit(&create).is_err());
    assert!(full.admit(&delete).is_ok());
    let conditions = full.conditions();
    assert!(conditions.iter().any(|c| c.finding.kind == Kind::DiskFilling), "{conditions:?}");
    let fine = Health::new(settings(0));
    assert!(fine.admit(&start).is_ok() && fine.admit(&create).is_ok());
}
