//! From what was observed to what is wrong. Pure: the same picture gives the same findings, in the same order.

use super::{
    Kind, Severity,
    disks::DiskState,
    observe::{Certificate, Observed, Space},
};

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub kind: Kind,
    /// Which one, where there may be several: a disk, a certificate; else empty.
    pub subject: String,
    /// How bad.
    pub severity: Severity,
    /// What was seen.
    pub reason: String,
    /// What to do.
    pub remedy: String,
}

/// Less free than that part of the disk is worth a word, and than that: bad.
const FREE_WARN: f64 = 0.10;
const FREE_BAD: f64 = 0.05;
/// A forecast nearer than that is worth a word.
const FULL_IN_S: f64 = 24.0 * 3600.0;
/// A forecast wants so many looks over so long.
const LOOKS_MIN: usize = 10;
const LOOKS_S: f64 = 600.0;
/// The clock's possible error that is worth a word; leases are counted in seconds.
const CLOCK_ERROR_US: i64 = 500_000;
/// Share of the last minute in which nothing ran for want of memory, percent.
const PRESSURE_WARN: f64 = 10.0;
const PRESSURE_BAD: f64 = 40.0;
const DAY_S: i64 = 24 * 3600;
const CERTIFICATE_WARN_S: i64 = 30 * DAY_S;
const CERTIFICATE_BAD_S: i64 = 3 * DAY_S;
/// The oldest kernel that Serio is made for: that of Debian 12.
const KERNEL_MIN: (u32, u32) = (6, 1);

/// What is wrong.
#[must_use]
pub fn findings(seen: &Observed) -> Vec<Finding> {
    let mut found = Vec::new();
    found.extend(seen.space.and_then(|space| disk_filling(space, &seen.history, seen.floor_bytes)));
    found.extend(seen.disks.iter().filter_map(failing_disk));
    found.extend(memory_pressure(seen.memory_full));
    found.extend(clock(seen));
    found.extend(seen.certificates.iter().filter_map(|c| certificate(c, seen.now_s)));
    found.extend(seen.kvm.as_ref().err().map(|why| {
        Finding {
            kind: Kind::KvmGone,
            subject: String::new(),
            severity: Severity::Critical,
            reason: format!("/dev/kvm cannot be used: {why}"),
            remedy:
                "no VM can be started: load kvm_intel or kvm_amd, or enable virtualization in the firmware"
                    .to_owned(),
        }
    }));
    found.extend(kernel(&seen.kernel));
    found
}

/// Bytes a second by which the disk fills, by least squares; `None` without enough looks, or when it does not fill.
pub(super) fn filling(history: &[(u64, u64)]) -> Option<f64> {
    let (first, last) = (history.first()?, history.last()?);
    if history.len() < LOOKS_MIN || (last.0.saturating_sub(first.0) as f64) < LOOKS_S {
        return None;
    }
    let count = history.len() as f64;
    let at = |point: &(u64, u64)| (point.0.saturating_sub(first.0) as f64, point.1 as f64);
    let (sum_x, sum_y) = history.iter().map(at).fold((0.0, 0.0), |sum, (x, y)| (sum.0 + x, sum.1 + y));
    let (mean_x, mean_y) = (sum_x / count, sum_y / count);
    let (covariance, variance) = history.iter().map(at).fold((0.0, 0.0), |sum, (x, y)| {
        (sum.0 + (x - mean_x) * (y - mean_y), sum.1 + (x - mean_x) * (x - mean_x))
    });
    let slope = covariance / variance;
    (slope.is_finite() && slope > 0.0).then_some(slope)
}

fn disk_filling(space: Space, history: &[(u64, u64)], floor: u64) -> Option<Finding> {
    let free = space.free_bytes as f64 / space.total_bytes.max(1) as f64;
    let full_in = filling(history).map(|rate| space.free_bytes as f64 / rate);
    let severity = if space.free_bytes < floor || free < FREE_BAD {
        Severity::Critical
    } else if free < FREE_WARN || full_in.is_some_and(|seconds| seconds < FULL_IN_S) {
        Severity::Warning
    } else {
        return None;
    };
    let mut reason = format!(
        "{} of {} are free on the disk of state_dir",
        serio_types::ByteSize::from_bytes(space.free_bytes),
        serio_types::ByteSize::from_bytes(space.total_bytes),
    );
    if let Some(seconds) = full_in.filter(|seconds| *seconds < 30.0 * FULL_IN_S) {
        reason.push_str(&format!("; full in {:.1} hours as it goes", seconds / 3600.0));
    }
    if space.free_bytes < floor {
        reason.push_str("; nothing new is made or started");
    }
    let remedy = "delete snapshots, volumes or images that nobody needs, move VMs away, or enlarge the disk"
        .to_owned();
    Some(Finding { kind: Kind::DiskFilling, subject: String::new(), severity, reason, remedy })
}

fn failing_disk(disk: &DiskState) -> Option<Finding> {
    let odd = disk.state.as_deref().filter(|state| !matches!(*state, "running" | "live" | "created" | ""));
    let more = disk.errors.saturating_sub(disk.errors_before);
    let (severity, reason) = match (odd, more) {
        (Some(state), _) => (Severity::Critical, format!("the kernel says that {} is {state}", disk.name)),
        (None, 1..) => (
            Severity::Warning,
            format!("{} had {more} I/O errors since the agent's start, {} in all", disk.name, disk.errors),
        ),
        (None, 0) => return None,
    };
    let remedy = "see dmesg and smartctl -a; move VMs away and replace the disk".to_owned();
    Some(Finding { kind: Kind::FailingDisk, subject: disk.name.clone(), severity, reason, remedy })
}

fn memory_pressure(full: Option<f64>) -> Option<Finding> {
    let full = full.filter(|full| *full >= PRESSURE_WARN)?;
    Some(Finding {
        kind: Kind::MemoryPressure,
        subject: String::new(),
        severity: if full >= PRESSURE_BAD { Severity::Critical } else { Severity::Warning },
        reason: format!("nothing ran for want of memory in {full:.0}% of the last minute"),
        remedy: "move VMs away, or raise capacity.reserve_memory so that fewer are promised".to_owned(),
    })
}

fn clock(seen: &Observed) -> Option<Finding> {
    let clock = seen.clock?;
    let reason = if !clock.is_synced {
        "nothing keeps the host's clock right".to_owned()
    } else if clock.error_us > CLOCK_ERROR_US {
        format!("the host's clock may be wrong by {:.1} s", clock.error_us as f64 / 1e6)
    } else {
        return None;
    };
    let remedy = "run chrony or systemd-timesyncd, and look whether its servers are reached".to_owned();
    Some(Finding {
        kind: Kind::ClockSkew,
        subject: String::new(),
        severity: Severity::Warning,
        reason,
        remedy,
    })
}

fn certificate(certificate: &Certificate, now_s: i64) -> Option<Finding> {
    let (severity, reason) = match certificate.end_s {
        None => (Severity::Warning, "cannot be read".to_owned()),
        Some(end) if end <= now_s => (Severity::Critical, "has expired".to_owned()),
        Some(end) if end - now_s < CERTIFICATE_WARN_S => {
            let left = end - now_s;
            let severity = if left < CERTIFICATE_BAD_S { Severity::Critical } else { Severity::Warning };
            (severity, format!("expires in {} days and {} hours", left / DAY_S, left % DAY_S / 3600))
        }
        Some(_) => return None,
    };
    Some(Finding {
        kind: Kind::CertificateExpiring,
        subject: certificate.path.clone(),
        severity,
        reason: format!("{} {reason}", certificate.path),
        remedy:
            "issue a new one (`serio pki issue`) and put it in the same place: it is used without a restart"
                .to_owned(),
    })
}

fn kernel(release: &str) -> Option<Finding> {
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next()?, numbers.next()?);
    (version < KERNEL_MIN).then(|| Finding {
        kind: Kind::KernelTooOld,
        subject: String::new(),
        severity: Severity::Warning,
        reason: format!("the host runs Linux {release}, older than {}.{}", KERNEL_MIN.0, KERNEL_MIN.1),
        remedy: "boot a newer kernel: drain the node first".to_owned(),
    })
}
