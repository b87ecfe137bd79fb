//! What the kernel knows of the host's disks, below a given root.
//!
//! ```text
//!   sys/block/sda/device/{ioerr_cnt, state}        SCSI and ATA: errors (hexadecimal), "running" or "offline"
//!   sys/class/nvme/nvme0/state                     NVMe controllers: "live" or "dead"
//!   sys/block/md0/md/{degraded, dev-*/errors}      software RAID: members that are missing, errors of the others
//!   sys/fs/ext4/sda1/errors_count                  errors that the file system found, kept in it until it is repaired
//!   sys/fs/btrfs/UUID/devinfo/1/error_stats        the same for each device of a btrfs
//! ```
//! Owns: the readers. What is not there makes no disk. The disk's own opinion (SMART) is not asked: that needs a command to the
//! disk, which may hang where it fails; `smartctl` asks it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::observe::text;

/// A disk of the host, or what lies on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskState {
    /// "sda", "nvme0", "md0", "ext4 on sda1".
    pub name: String,
    /// As the kernel has it: "running", "live", "offline"; "degraded" for a RAID that misses a disk.
    pub state: Option<String>,
    /// I/O errors that were counted, and how many there were at the agent's start.
    pub errors: u64,
    /// See `errors`.
    pub errors_before: u64,
}

impl DiskState {
    fn new(name: String, state: Option<String>, errors: u64) -> Self {
        Self { name, state, errors, errors_before: 0 }
    }
}

/// Names in a directory, in order.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

fn number(path: PathBuf) -> Option<u64> {
    text(&path)?.parse().ok()
}

/// All that tell.
pub(super) fn disks(root: &Path) -> Vec<DiskState> {
    let block = root.join("sys/block");
    let of_block = names(&block).into_iter().filter_map(|name| {
        let dir = block.join(&name);
        scsi(&name, &dir.join("device")).or_else(|| raid(&name, &dir.join("md")))
    });
    let nvme = root.join("sys/class/nvme");
    let controllers = names(&nvme).into_iter().filter_map(|name| {
        let state = Some(text(&nvme.join(&name).join("state"))?);
        Some(DiskState::new(name, state, 0))
    });
    of_block.chain(controllers).chain(ext4(root)).chain(btrfs(root)).collect()
}

fn scsi(name: &str, device: &Path) -> Option<DiskState> {
    let count = text(&device.join("ioerr_cnt"))?;
    let errors = u64::from_str_radix(count.trim_start_matches("0x"), 16).ok()?;
    Some(DiskState::new(name.to_owned(), text(&device.join("state")), errors))
}

/// Documentation/admin-guide/md.rst. A level without redundancy has no `degraded`.
fn raid(name: &str, md: &Path) -> Option<DiskState> {
    let missing = number(md.join("degraded"))?;
    let members = names(md).into_iter().filter(|member| member.starts_with("dev-"));
    let errors =
        members.filter_map(|member| number(md.join(member).join("errors"))).fold(0, u64::saturating_add);
    let state = if missing > 0 { "degraded" } else { "running" };
    Some(DiskState::new(name.to_owned(), Some(state.to_owned()), errors))
}

/// Documentation/ABI/testing/sysfs-fs-ext4.
fn ext4(root: &Path) -> Vec<DiskState> {
    let dir = root.join("sys/fs/ext4");
    let errors = |name: String| {
        let errors = number(dir.join(&name).join("errors_count"))?;
        Some(DiskState::new(format!("ext4 on {name}"), None, errors))
    };
    names(&dir).into_iter().filter_map(errors).collect()
}

fn btrfs(root: &Path) -> Vec<DiskState> {
    let dir = root.join("sys/fs/btrfs");
    let mut found = Vec::new();
    for uuid in names(&dir) {
        let devices = dir.join(&uuid).join("devinfo");
        for device in names(&devices) {
            let Some(stats) = text(&devices.join(&device).join("error_stats")) else { continue };
            // Lines `read_errs 3`, one for each sort of error.
            let counts = stats.lines().filter_map(|line| line.split_once(' ')?.1.trim().parse::<u64>().ok());
            let errors = counts.fold(0, u64::saturating_add);
            found.push(DiskState::new(format!("device {device} of btrfs {uuid}"), None, errors));
        }
    }
    found
}
