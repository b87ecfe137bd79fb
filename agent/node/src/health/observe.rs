//! Looking at the host's health below a given root, so that tests bring recorded trees.
//!
//! Owns: the readers. What cannot be read is absent and makes no finding; a kernel without PSI has no memory pressure.

use std::{fs, path::Path};

use super::disks::DiskState;

/// The file system of state_dir.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Space {
    /// All.
    pub total_bytes: u64,
    /// What root may still write.
    pub free_bytes: u64,
}

/// The kernel's clock (adjtimex(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    /// Something keeps it right.
    pub is_synced: bool,
    /// How wrong it may be.
    pub error_us: i64,
}

/// A certificate that the agent uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// Its file.
    pub path: String,
    /// Until when it is good, seconds since 1970; `None`: it cannot be read.
    pub end_s: Option<i64>,
}

/// All that is judged.
#[derive(Debug, Clone, PartialEq)]
pub struct Observed {
    /// Seconds since 1970.
    pub now_s: i64,
    /// The file system of state_dir.
    pub space: Option<Space>,
    /// Below that nothing new is made.
    pub floor_bytes: u64,
    /// Used bytes by seconds of a clock that never jumps, oldest first.
    pub history: Vec<(u64, u64)>,
    /// The kernel's clock.
    pub clock: Option<Clock>,
    /// PSI "full avg60" of memory, percent.
    pub memory_full: Option<f64>,
    /// Disks that tell.
    pub disks: Vec<DiskState>,
    /// Those in use.
    pub certificates: Vec<Certificate>,
    /// Why KVM cannot be used.
    pub kvm: Result<(), String>,
    /// "6.1.0-13-cloud-amd64".
    pub kernel: String,
}

pub(super) fn text(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// The file system that holds a directory.
pub(super) fn space(dir: &Path) -> Option<Space> {
    let stat = rustix::fs::statvfs(dir).ok()?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    Some(Space { total_bytes: bytes(stat.f_blocks), free_bytes: bytes(stat.f_bavail) })
}

/// Percent (Documentation/accounting/psi.rst).
pub(super) fn memory_full(root: &Path) -> Option<f64> {
    let pressure = text(&root.join("proc/pressure/memory"))?;
    let full = pressure.lines().find_map(|line| line.strip_prefix("full "))?;
    full.split_ascii_whitespace().find_map(|field| field.strip_prefix("avg60=")?.parse().ok())
}

pub(super) fn kernel(root: &Path) -> String {
    text(&root.join("proc/sys/kernel/osrelease")).unwrap_or_default()
}

pub(super) fn kvm(root: &Path) -> Result<(), String> {
    let opened = fs::OpenOptions::new().read(true).write(true).open(root.join("dev/kvm"));
    opened.map(drop).map_err(|error| error.to_string())
}

/// The first certificate of a PEM file.
pub(super) fn certificate(path: &Path) -> Certificate {
    let end = || {
        let pem = fs::read(path).ok()?;
        let (_, pem) = x509_parser::pem::parse_x509_pem(&pem).ok()?;
        let certificate = pem.parse_x509().ok()?;
        Some(certificate.validity().not_after.timestamp())
    };
    Certificate { path: path.display().to_string(), end_s: end() }
}
