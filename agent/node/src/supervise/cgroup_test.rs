//! The groups on a tree of plain files, and, where this host has cgroup v2, for real.

use std::{
    os::unix::fs::symlink,
    process::{Command, Stdio},
};

use super::*;

fn vdc(name: &str, limits: VdcLimits) -> VdcGroup {
    let quota = Quota { vcpus: 4, memory_bytes: 1 << 30, storage_bytes: 1 };
    VdcGroup { name: name.parse().unwrap(), quota, limits }
}

/// A directory that looks like the root of cgroup v2; the files of groups are made by who writes them.
fn tree() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("cgroup.controllers"), "cpu io memory").unwrap();
    dir
}

#[test]
fn a_vdc_gets_what_it_is_promised_and_caps_are_lifted() {
    let dir = tree();
    let cgroups = Cgroups::new(Some(dir.path()), Some("8:0".into()));
    let limits =
        VdcLimits { weight: 300, burst_percent: 250, iops: 1000, bandwidth_bytes: 1 << 20, snapshots: 0 };
    assert_eq!(cgroups.share(&vdc("ardesio", limits)), [""; 0]);
    let read =
        |file: &str| fs::read_to_string(dir.path().join("serio.slice/vdcs/ardesio").join(file)).unwrap();
    assert_eq!(read("cpu.weight"), "300");
    assert_eq!(read("cpu.max"), "250000 100000");
    assert_eq!(read("memory.max"), ((1_u64 << 30) + 5 * (64 << 20)).to_string());
    assert_eq!(read("io.weight"), "default 300");
    assert_eq!(read("io.max"), "8:0 rbps=1048576 wbps=1048576 riops=1000 wiops=1000");
    cgroups.share(&vdc("ardesio", VdcLimits::default()));
    assert_eq!((read("cpu.weight"), read("cpu.max")), ("400".into(), "max 100000".into()));
    assert_eq!(read("io.max"), "8:0 rbps=max wbps=max riops=max wiops=max");
}

#[test]
fn what_is_not_enforced_is_said_and_only_if_it_was_asked() {
    let dir = tree();
    let limits = VdcLimits { iops: 5, ..VdcLimits::default() };
    let cgroups = Cgroups::new(Some(dir.path()), None);
    assert_eq!(cgroups.share(&vdc("a", VdcLimits::default())), [""; 0]);
    let missing = cgroups.share(&vdc("a", limits));
    assert!(matches!(missing.as_slice(), [one] if one.starts_with("iops and bandwidth: ")), "{missing:?}");
    // As when the controller is missing: the file cannot be written.
    let cgroups = Cgroups::new(Some(dir.path()), Some("8:0".into()));
    fs::create_dir(dir.path().join("serio.slice/vdcs/a/io.max")).unwrap();
    assert_eq!(cgroups.share(&vdc("a", limits)).len(), 1);
    assert_eq!(cgroups.share(&vdc("a", VdcLimits::default())), [""; 0]);
    let none = tempfile::tempdir().unwrap();
    let cgroups = Cgroups::new(Some(none.path()), None);
    let all = VdcLimits { weight: 1, burst_percent: 1, iops: 1, ..VdcLimits::default() };
    assert_eq!(cgroups.share(&vdc("a", all)).len(), 3);
}

#[tokio::test]
async fn a_vm_at_the_old_place_is_moved_and_groups_of_deleted_vdcs_go() {
    let dir = tree();
    let cgroups = Cgroups::new(Some(dir.path()), None);
    let (uid, name) = (Uuid::new_v4(), "ardesio".parse::<Name>().unwrap());
    let old = dir.path().join("serio.slice").join(format!("vm-{uid}"));
    fs::create_dir(&old).unwrap();
    fs::write(old.join("cgroup.procs"), "77\n").unwrap();
    cgroups.adopt(uid, &name, 2);
    let new = dir.path().join("serio.slice/vdcs/ardesio").join(format!("vm-{uid}"));
    assert_eq!(fs::read_to_string(new.join("cgroup.procs")).unwrap(), "77");
    // The old one holds a plain file here, which a cgroup's directory does not.
    fs::remove_dir_all(&old).unwrap();
    assert_eq!(cgroups.group_of(uid), Some(new.clone()));
    cgroups.adopt(uid, &name, 2);
    cgroups.share(&vdc("empty", VdcLimits::default()));
    let gone = dir.path().join("serio.slice/vdcs/gone");
    fs::create_dir(&gone).unwrap();
    cgroups.keep_only(&[name]);
    assert!(new.exists() && !gone.exists());
}

#[test]
fn a_partition_is_capped_by_its_disk() {
    let sys = tempfile::tempdir().unwrap();
    let part = sys.path().join("devices/pci/sda/sda1");
    fs::create_dir_all(&part).unwrap();
    fs::write(part.join("partition"), "1").unwrap();
    fs::write(part.join("dev"), "8:1\n").unwrap();
    fs::write(part.parent().unwrap().join("dev"), "8:0\n").unwrap();
    fs::create_dir_all(sys.path().join("dev/block")).unwrap();
    symlink("../../devices/pci/sda/sda1", sys.path().join("dev/block/8:1")).unwrap();
    symlink("../../devices/pci/sda", sys.path().join("dev/block/8:0")).unwrap();
    assert_eq!(whole_disk(sys.path(), 8, 1).as_deref(), Some("8:0"));
    assert_eq!(whole_disk(sys.path(), 8, 0).as_deref(), Some("8:0"));
    assert_eq!(whole_disk(sys.path(), 0, 25), None);
}

#[tokio::test]
async fn a_group_holds_its_process_and_ends_it() {
    let Some(root) = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .map(Path::new)
        .into_iter()
        .find(|root| root.join("cgroup.controllers").exists())
    else {
        eprintln!("skipped: no cgroup v2 here");
        return;
    };
    let cgroups = Cgroups::new(Some(root), None);
    if cgroups.slice.is_none() {
        eprintln!("skipped: cgroup v2 is not writable here");
        return;
    }
    let uid = Uuid::new_v4();
    let name: Name = format!("t{}", uid.simple().to_string().get(..12).unwrap()).parse().unwrap();
    let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
    cgroups.put(uid, &name, child.id(), 2);
    let path = cgroups.group_of(uid).unwrap();
    let inside = fs::read_to_string(path.join("cgroup.procs")).unwrap();
    assert_eq!(inside.trim(), child.id().to_string());
    let reaper = tokio::task::spawn_blocking(move || child.wait().unwrap());
    cgroups.remove(uid).await;
    assert!(!path.exists());
    assert!(!reaper.await.unwrap().success());
    fs::remove_dir(path.parent().unwrap()).unwrap();
}

#[tokio::test]
async fn without_cgroup_v2_nothing_happens() {
    let dir = tempfile::tempdir().unwrap();
    let cgroups = Cgroups::new(Some(dir.path()), None);
    cgroups.put(Uuid::new_v4(), &"a".parse().unwrap(), 1, 1);
    cgroups.remove(Uuid::new_v4()).await;
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}
