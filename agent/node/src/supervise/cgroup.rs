//! A cgroup (v2) per VM: `serio.slice/vm-<uuid>`. It accounts for the VM, shares processors by vcpus, and ends
//! whatever is in it at once.
//!
//! Owns: those directories. Never: limits yet. Where cgroup v2 cannot be used, one warning is all.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use uuid::Uuid;

const SLICE: &str = "serio.slice";
/// `cpu.weight` of one vcpu; the kernel's default for a group is 100, its bounds are 1 and 10000.
const WEIGHT_PER_VCPU: u32 = 100;
/// How long a group's last process may take to leave after `cgroup.kill`.
const EMPTY_TRIES: u32 = 100;
const EMPTY_PAUSE: Duration = Duration::from_millis(20);

/// The cgroups of this host's VMs.
#[derive(Debug, Clone)]
pub(super) struct Cgroups {
    slice: Option<Arc<PathBuf>>,
}

impl Cgroups {
    /// Looks for a usable cgroup v2 below `root` (`/sys/fs/cgroup` when `None`).
    pub(super) fn new(root: Option<&Path>) -> Self {
        let root = root.unwrap_or(Path::new("/sys/fs/cgroup"));
        match prepare(root) {
            Ok(slice) => Self { slice: Some(Arc::new(slice)) },
            Err(error) => {
                let root = root.display();
                tracing::warn!(%root, %error, "cgroup v2 cannot be used: VMs run without one");
                Self { slice: None }
            }
        }
    }

    fn path(&self, uid: Uuid) -> Option<PathBuf> {
        Some(self.slice.as_ref()?.join(format!("vm-{uid}")))
    }

    /// Makes a VM's group and moves the process into it. Failing is not a reason to refuse the VM.
    pub(super) fn put(&self, uid: Uuid, pid: u32, vcpus: u32) {
        let Some(path) = self.path(uid) else { return };
        let put = || -> io::Result<()> {
            match fs::create_dir(&path) {
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                other => other?,
            }
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

    /// Kills what is in a VM's group and removes it.
    pub(super) async fn remove(&self, uid: Uuid) {
        let Some(path) = self.path(uid) else { return };
        if !path.exists() {
            return;
        }
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
}

fn prepare(root: &Path) -> io::Result<PathBuf> {
    if !root.join("cgroup.controllers").exists() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "there is no cgroup.controllers"));
    }
    let slice = root.join(SLICE);
    match fs::create_dir(&slice) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    // Each by itself: one that is missing does not cost the others.
    for group in [root, &slice] {
        for controller in ["+cpu", "+memory", "+pids", "+io"] {
            if let Err(error) = fs::write(group.join("cgroup.subtree_control"), controller) {
                tracing::debug!(group = %group.display(), controller, %error, "a controller is not there");
            }
        }
    }
    Ok(slice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

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
        let cgroups = Cgroups::new(Some(root));
        if cgroups.slice.is_none() {
            eprintln!("skipped: cgroup v2 is not writable here");
            return;
        }
        let uid = Uuid::new_v4();
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        cgroups.put(uid, child.id(), 2);
        let path = cgroups.path(uid).unwrap();
        let inside = fs::read_to_string(path.join("cgroup.procs")).unwrap();
        assert_eq!(inside.trim(), child.id().to_string());
        let reaper = tokio::task::spawn_blocking(move || child.wait().unwrap());
        cgroups.remove(uid).await;
        assert!(!path.exists());
        assert!(!reaper.await.unwrap().success());
    }

    #[tokio::test]
    async fn without_cgroup_v2_nothing_happens() {
        let dir = tempfile::tempdir().unwrap();
        let cgroups = Cgroups::new(Some(dir.path()));
        cgroups.put(Uuid::new_v4(), 1, 1);
        cgroups.remove(Uuid::new_v4()).await;
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
