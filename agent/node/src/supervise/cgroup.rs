//! A cgroup (v2) per vdc, and below it one per VM.
//!
//! ```text
//!   serio.slice/vdcs/NAME           cpu.weight cpu.max memory.max io.weight io.max: what the vdc is promised
//!   serio.slice/vdcs/NAME/vm-UUID   cpu.weight by its vcpus: what it is promised inside the vdc
//!   serio.slice/vm-UUID             where an earlier seriod put them; moved when it is found
//! ```
//!
//! Owns: those directories. Never: what a vdc may have. A VM's group ends whatever is in it at once. Where cgroup v2 or one of
//! its controllers is missing VMs run all the same: what is not enforced is told to the caller.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serio_types::{Name, Quota, VdcLimits};
use uuid::Uuid;

const SLICE: &str = "serio.slice";
const VDCS: &str = "vdcs";
/// `cpu.weight` of one vcpu; the kernel's default for a group is 100, its bounds are 1 and 10000.
const WEIGHT_PER_VCPU: u32 = 100;
/// The period of `cpu.max`, microseconds.
const PERIOD_US: u64 = 100_000;
/// What a VMM may take beside its guest's memory: its own, and the page cache of what it reads. Counted once for each vcpu of
/// the quota, since there are at most that many VMs.
const OVERHEAD_BYTES: u64 = 64 << 20;
/// How long a group's last process may take to leave after `cgroup.kill`.
const EMPTY_TRIES: u32 = 100;
const EMPTY_PAUSE: Duration = Duration::from_millis(20);

/// What a vdc's group shall promise and cap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VdcGroup {
    /// The vdc's name, and the group's.
    pub name: Name,
    /// What it may use.
    pub quota: Quota,
    /// Its share and caps.
    pub limits: VdcLimits,
}

/// The cgroups of this host's VMs.
#[derive(Debug, Clone)]
pub(super) struct Cgroups {
    slice: Option<Arc<PathBuf>>,
    /// `MAJOR:MINOR` of the disk under the volumes, if there is one.
    disk: Option<Arc<str>>,
}

impl Cgroups {
    /// Looks for a usable cgroup v2 below `root` (`/sys/fs/cgroup` when `None`). `disk` is where the volumes are.
    pub(super) fn new(root: Option<&Path>, disk: Option<String>) -> Self {
        let root = root.unwrap_or(Path::new("/sys/fs/cgroup"));
        let disk = disk.map(Arc::from);
        match prepare(root) {
            Ok(slice) => Self { slice: Some(Arc::new(slice)), disk },
            Err(error) => {
                let root = root.display();
                tracing::warn!(%root, %error, "cgroup v2 cannot be used: VMs run without one");
                Self { slice: None, disk }
            }
        }
    }

    fn vdc_path(&self, vdc: &Name) -> Option<PathBuf> {
        Some(self.slice.as_ref()?.join(VDCS).join(vdc.as_str()))
    }

    /// Where a VM's group is, wherever an earlier seriod put it.
    fn find(&self, uid: Uuid) -> Option<PathBuf> {
        let slice = self.slice.as_ref()?;
        let name = group_name(uid);
        let old = slice.join(&name);
        let vdcs = fs::read_dir(slice.join(VDCS)).into_iter().flatten().flatten();
        let below = vdcs.map(|vdc| vdc.path().join(&name));
        std::iter::once(old).chain(below).find(|path| path.is_dir())
    }

    /// Makes a VM's group in its vdc's and moves the process into it. Failing is not a reason to refuse the VM.
    pub(super) fn put(&self, uid: Uuid, vdc: &Name, pid: u32, vcpus: u32) {
        let Some(group) = self.vdc_path(vdc) else { return };
        let path = group.join(group_name(uid));
        let put = || -> io::Result<()> {
            make_group(&group)?;
            make_dir(&path)?;
            // Absent when the controller is not ours to use.
            let weight = WEIGHT_PER_VCPU.saturating_mul(vcpus).clamp(1, 10_000);
            if path.join("cpu.weight").exists() {
                fs::write(path.join("cpu.weight"), weight.to_string())?;
            }
            fs::write(path.join("cgroup.procs"), pid.to_string())
        };
        if let Err(error) = put() {
            tracing::warn!(vm = %uid, pid, path = %path.display(), %error, "a VM runs outside its cgroup");
        }
    }

    /// Moves a VM that an earlier seriod put elsewhere into its vdc's group.
    pub(super) fn adopt(&self, uid: Uuid, vdc: &Name, vcpus: u32) {
        let (Some(found), Some(group)) = (self.find(uid), self.vdc_path(vdc)) else { return };
        if found.parent() == Some(&group) {
            return;
        }
        let procs = fs::read_to_string(found.join("cgroup.procs")).unwrap_or_default();
        for pid in procs.lines().filter_map(|line| line.trim().parse().ok()) {
            self.put(uid, vdc, pid, vcpus);
        }
        if let Err(error) = fs::remove_dir(&found) {
            tracing::warn!(vm = %uid, path = %found.display(), %error, "the VM's old cgroup stays");
        }
    }

    /// Applies what a vdc is promised; gives what of it this host does not enforce, for the person.
    pub(super) fn share(&self, vdc: &VdcGroup) -> Vec<String> {
        let Some(path) = self.vdc_path(&vdc.name) else {
            return asked(vdc).map(|what| format!("{what}: this host has no cgroup v2")).collect();
        };
        if let Err(error) = make_group(&path) {
            return asked(vdc).map(|what| format!("{what}: {}: {error}", path.display())).collect();
        }
        let mut missing = Vec::new();
        for (file, value, what) in self.settings(vdc, &mut missing) {
            // A cap that was lifted is written too, so that it goes.
            let file = path.join(file);
            match fs::write(&file, &value) {
                Ok(()) => {}
                Err(error) => {
                    tracing::debug!(file = %file.display(), value, %error, "not set");
                    missing.extend(what.map(|what| format!("{what}: {}: {error}", file.display())));
                }
            }
        }
        missing
    }

    /// File, value, and what the vdc was promised by it: nothing when that is only a default.
    fn settings(
        &self,
        vdc: &VdcGroup,
        missing: &mut Vec<String>,
    ) -> Vec<(&'static str, String, Option<&'static str>)> {
        let VdcLimits { weight, burst_percent, iops, bandwidth_bytes, .. } = vdc.limits;
        let asked_weight = (weight > 0).then_some("weight");
        let share = vdc.limits.weight_of(vdc.quota.vcpus);
        let memory = vdc
            .quota
            .memory_bytes
            .saturating_add(OVERHEAD_BYTES.saturating_mul(vdc.quota.vcpus.saturating_add(1)));
        let burst = match burst_percent {
            0 => format!("max {PERIOD_US}"),
            percent => format!("{} {PERIOD_US}", u64::from(percent).saturating_mul(PERIOD_US / 100)),
        };
        let mut settings = vec![
            ("cpu.weight", share.to_string(), asked_weight),
            ("cpu.max", burst, (burst_percent > 0).then_some("burst")),
            ("memory.max", memory.to_string(), None),
            ("io.weight", format!("default {share}"), None),
        ];
        let io = (iops > 0 || bandwidth_bytes > 0).then_some("iops and bandwidth");
        match (&self.disk, io) {
            (Some(disk), io) => {
                let cap = |value: u64| if value == 0 { "max".to_owned() } else { value.to_string() };
                let (bytes, ops) = (cap(bandwidth_bytes), cap(iops));
                let line = format!("{disk} rbps={bytes} wbps={bytes} riops={ops} wiops={ops}");
                settings.push(("io.max", line, io));
            }
            (None, Some(what)) => {
                missing.push(format!("{what}: state_dir lies on no disk that cgroups know"))
            }
            (None, None) => {}
        }
        settings
    }

    /// Removes the groups of vdcs that are not among those, if nothing is in them.
    pub(super) fn keep_only(&self, vdcs: &[Name]) {
        let Some(slice) = &self.slice else { return };
        for entry in fs::read_dir(slice.join(VDCS)).into_iter().flatten().flatten() {
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let name = entry.file_name();
            if is_dir && !vdcs.iter().any(|vdc| name.to_str() == Some(vdc.as_str())) {
                // With VMs in it, it is not empty, and stays.
                let _ = fs::remove_dir(entry.path());
            }
        }
    }

    /// Kills what is in a VM's group and removes it.
    pub(super) async fn remove(&self, uid: Uuid) {
        let Some(path) = self.find(uid) else { return };
        if let Err(error) = fs::write(path.join("cgroup.kill"), "1") {
            tracing::warn!(vm = %uid, %error, "cgroup.kill does not work on this host");
        }
        for _ in 0..EMPTY_TRIES {
            match fs::remove_dir(&path) {
                Ok(()) => return,
                Err(e) if e.kind() == io::ErrorKind::NotFound => return,
                Err(_) => tokio::time::sleep(EMPTY_PAUSE).await,
            }
        }
        tracing::warn!(vm = %uid, path = %path.display(), "a VM's cgroup cannot be removed: see its cgroup.procs");
    }

    /// A VM's group.
    pub(super) fn group_of(&self, uid: Uuid) -> Option<PathBuf> {
        self.find(uid)
    }
}

/// What a vdc was promised in words, beyond the defaults.
fn asked(vdc: &VdcGroup) -> impl Iterator<Item = &'static str> {
    let VdcLimits { weight, burst_percent, iops, bandwidth_bytes, .. } = vdc.limits;
    let wanted = [
        (weight > 0, "weight"),
        (burst_percent > 0, "burst"),
        (iops > 0 || bandwidth_bytes > 0, "iops and bandwidth"),
    ];
    wanted.into_iter().filter_map(|(is_asked, what)| is_asked.then_some(what))
}

fn group_name(uid: Uuid) -> String {
    format!("vm-{uid}")
}

fn make_dir(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

/// A group whose children have controllers. Each by itself: one that is missing does not cost the others.
fn make_group(path: &Path) -> io::Result<()> {
    make_dir(path)?;
    enable(path);
    Ok(())
}

fn enable(group: &Path) {
    for controller in ["+cpu", "+memory", "+pids", "+io"] {
        if let Err(error) = fs::write(group.join("cgroup.subtree_control"), controller) {
            tracing::debug!(group = %group.display(), controller, %error, "a controller is not there");
        }
    }
}

fn prepare(root: &Path) -> io::Result<PathBuf> {
    if !root.join("cgroup.controllers").exists() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "there is no cgroup.controllers"));
    }
    let slice = root.join(SLICE);
    enable(root);
    make_group(&slice)?;
    make_group(&slice.join(VDCS))?;
    Ok(slice)
}

/// `MAJOR:MINOR` of the whole disk that a directory lies on, as `io.max` wants it; `sys` is `/sys`.
pub(super) fn disk_of(sys: &Path, dir: &Path) -> Option<String> {
    use std::os::unix::fs::MetadataExt;
    let dev = fs::metadata(dir).ok()?.dev();
    whole_disk(sys, nix::sys::stat::major(dev), nix::sys::stat::minor(dev))
}

fn whole_disk(sys: &Path, major: u64, minor: u64) -> Option<String> {
    let link = sys.join("dev/block").join(format!("{major}:{minor}"));
    // A partition's directory lies in its disk's.
    let device = fs::canonicalize(link).ok()?;
    let disk = if device.join("partition").exists() { device.parent()? } else { &device };
    Some(fs::read_to_string(disk.join("dev")).ok()?.trim().to_owned())
}

#[cfg(test)]
#[path = "cgroup_test.rs"]
mod tests;
