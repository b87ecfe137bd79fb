//! The processes that hold VMs and volumes: started, watched, found again, ended.
//!
//! ```text
//!  RUN/vms/<uuid>/  meta          who: pid, start time, generation, digest of the plan. Written before Launch
//!                   control.sock  the VMM listens here from its birth; seriod connects anew for each question
//!                   console.sock  the serial console, for `attach_console`
//!                   vsock.sock    clients of the guest's vsock ports;  vsock_PORT   whoever waits for the guest
//!                   exit          the VMM's last words (EndRecord); empty while it runs
//!                   vmm.log       its standard error, bounded
//!  RUN/exports/     <id>.sock     NBD        <id>.ctl  control        <id>.meta  who
//!                   <id>.user     the fingerprint of the certificate that has it for itself
//! ```
//!
//! Owns: run directories, cgroups, taps and bridges of running VMs, and these processes' lives.
//! Never: what should run (the state says), volume bytes, guest memory.
//!
//! Invariants
//! - seriod may die at any instant. A VMM that has had its `Launch` goes on and is found by `meta`; one that has
//!   not ends by itself after [`serio_control::LAUNCH_WAIT`]. A job of `serio-volumed` ends with the connection
//!   that asked for it; an export goes on and is found.
//! - A process number is only believed together with its start time, and acted on through a pidfd.
//! - Each wait for a process is bounded. A VMM that hangs costs its own callers time, nobody else.
//!
//! Threads: none of its own; tokio tasks: one per watched process, one per launch and job (they are not broken
//! off half-way when the caller goes).

mod bootdisk;
mod cgroup;
mod check;
pub mod counters;
mod error;
mod export;
mod files;
mod follow;
mod gate;
mod jobs;
mod launch;
mod link;
mod machine;
mod merge;
mod oom;
mod plan;
mod plug;
mod process;
mod reshape;
mod rundir;
mod save;
mod saved;
mod spawn;
mod vdc_snapshot;
mod vm;
mod vsock;

#[cfg(test)]
mod supervise_test;

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, OnceLock},
};

use bytes::Bytes;
use serio_control::message::VdcKey;
use serio_types::Name;
use tokio::sync::mpsc;
use uuid::Uuid;

use self::{cgroup::Cgroups, gate::VolumeGate, process::Exit, rundir::RunDir, spawn::Watched};
use crate::{
    keys::{Keys, KeysError},
    net::Net,
};

pub use cgroup::VdcGroup;
pub use check::{CheckAsk, CheckRecord, ProblemRecord, ScrubRecord};
pub use error::{AdoptError, FileError, JobError, LaunchError, SpawnError, TalkError, VolumeFilesError};
pub use export::ExportHandle;
pub use files::Allocated;
pub use follow::{TroubleKind, TroubleReport};
pub use jobs::is_in_use;
pub use merge::{MergeEnd, MergeGoal, MergePlan};
pub use plan::{
    BootPlan, DevicePlan, DiskPlan, DiskSource, EndKind, EndRecord, ExportPlan, ExportReport, ImportedImage,
    LaunchPlan, NicPlan, PointInfo, SupervisorSettings, VmReport, VolumeInfo,
};
pub use reshape::{ChangesAsk, CloneSource, is_unlinkable};
pub use save::SavePlan;
pub use saved::SavedFiles;
pub use vdc_snapshot::{SealedVolume, VdcPart, VdcSnapshotPlan};
pub use vm::VmHandle;

/// Starts, finds and ends processes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Supervisor {
    inner: Arc<Inner>,
}

/// What all share.
#[derive(Debug)]
struct Inner {
    settings: SupervisorSettings,
    cgroups: Cgroups,
    net: Net,
    gates: Mutex<HashMap<Uuid, Arc<VolumeGate>>>,
    /// None in a node whose volumes are all plain ones.
    keys: OnceLock<Keys>,
}

impl Inner {
    /// The key that opens a volume; none if it is a plain one.
    async fn key_of(&self, volume: Uuid) -> Result<Option<VdcKey>, KeysError> {
        match self.keys.get() {
            Some(keys) => keys.key_of(volume).await,
            None => Ok(None),
        }
    }

    fn vms_dir(&self) -> PathBuf {
        self.settings.run_dir.join("vms")
    }

    fn exports_dir(&self) -> PathBuf {
        self.settings.run_dir.join("exports")
    }

    fn jobs_dir(&self) -> PathBuf {
        self.settings.run_dir.join("jobs")
    }

    fn volumes_dir(&self) -> PathBuf {
        self.settings.state_dir.join("volumes")
    }

    fn run_of(&self, uid: Uuid) -> RunDir {
        RunDir::new(self.vms_dir().join(uid.to_string()))
    }

    fn volume_dir(&self, uid: Uuid) -> PathBuf {
        self.volumes_dir().join(uid.to_string())
    }

    fn log_path(&self, uid: Uuid) -> PathBuf {
        self.settings.state_dir.join("vms").join(uid.to_string()).join("serial.log")
    }

    /// Ends what may run of a VM and removes its files, cgroup and network.
    async fn clean(&self, uid: Uuid) {
        let run = self.run_of(uid);
        let bridges = rundir::read_meta(&run.meta()).map(|meta| meta.bridges).unwrap_or_default();
        match launch::living(&run.meta(), &self.settings.vmm_path) {
            Ok(Some((_, process))) => {
                Watched::new(process, run.stderr()).kill().await;
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(vm = %uid, error = &error as &dyn std::error::Error, "cleaning"),
        }
        self.cgroups.remove(uid).await;
        self.net.release(&bridges).await;
        rundir::remove_quietly(run.path());
    }
}

impl Supervisor {
    /// Makes the directories below RUN and STATE; says once if cgroup v2 cannot be used. Removes what jobs of an
    /// earlier seriod left: they ended with it.
    ///
    /// # Errors
    /// A directory cannot be made.
    pub fn new(settings: SupervisorSettings) -> Result<Self, FileError> {
        let disk = cgroup::disk_of(Path::new("/sys"), &settings.state_dir);
        let cgroups = Cgroups::new(settings.cgroup_root.as_deref(), disk);
        let inner =
            Inner { settings, cgroups, net: Net::default(), gates: Mutex::default(), keys: OnceLock::new() };
        rundir::remove(&inner.jobs_dir())?;
        let state = |name: &str| inner.settings.state_dir.join(name);
        for dir in [inner.vms_dir(), inner.exports_dir(), inner.jobs_dir()] {
            rundir::make_dir(&dir)?;
        }
        for dir in [inner.volumes_dir(), state("images"), state("vms")] {
            rundir::make_dir(&dir)?;
        }
        for name in names(&inner.volumes_dir())?.iter().filter(|name| name.starts_with(".deleted-")) {
            rundir::remove_quietly(&inner.volumes_dir().join(name));
        }
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Where the keys of encrypted volumes come from. Once, before anything is started.
    #[must_use]
    pub fn with_keys(self, keys: Keys) -> Self {
        // A second one changes nothing.
        let _ = self.inner.keys.set(keys);
        self
    }

    /// Notes whose key a new volume is encrypted under, before it is made.
    ///
    /// # Errors
    /// [`JobError::Key`].
    pub async fn assign_key(&self, volume: Uuid, vdc: Option<Uuid>) -> Result<(), JobError> {
        let Some(vdc) = vdc else { return Ok(()) };
        let keys = self.inner.keys.get().ok_or(KeysError::NotConfigured)?;
        Ok(keys.assign(volume, vdc).await?)
    }

    /// Starts a VM; returns when its guest runs. On failure nothing half-made stays.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn launch(&self, plan: LaunchPlan) -> Result<VmHandle, LaunchError> {
        let inner = Arc::clone(&self.inner);
        let uid = plan.uid;
        let run = inner.run_of(uid);
        if let Some((meta, _)) = launch::living(&run.meta(), &inner.settings.vmm_path)? {
            return Err(LaunchError::Running { pid: meta.pid });
        }
        // A task: a caller that goes away leaves a whole VM or none.
        let launched = tokio::spawn(async move {
            // Merges give way: the VMM wants the heads.
            let volumes = plan.disks.iter().filter_map(|disk| match disk.source {
                DiskSource::Volume(volume) => Some(volume),
                DiskSource::File { .. } => None,
            });
            let _entered = inner.enter_all(volumes).await;
            // What an earlier run may have left.
            inner.clean(uid).await;
            let launched = launch::launch(&inner, plan).await;
            if launched.is_err() {
                inner.clean(uid).await;
            }
            launched
        });
        launched.await.unwrap_or(Err(LaunchError::Ending))
    }

    /// Takes over a VMM that an earlier seriod started, and says whether its guest is paused. `None` when it is gone, or never had its `Launch`
    /// (then it is ended): [`Supervisor::end_record`] tells why.
    ///
    /// # Errors
    /// [`AdoptError`]: it runs but cannot be talked to.
    pub async fn adopt(&self, uid: Uuid) -> Result<Option<(VmHandle, bool)>, AdoptError> {
        launch::adopt(&self.inner, uid).await
    }

    /// The VMs that have a run directory.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn found(&self) -> Result<Vec<Uuid>, FileError> {
        Ok(names(&self.inner.vms_dir())?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// How a VM's run ended: its last words, or `Died`. `None` while it runs, or without a run directory.
    #[must_use]
    pub fn end_record(&self, uid: Uuid) -> Option<EndRecord> {
        let run = self.inner.run_of(uid);
        if !run.path().exists() {
            return None;
        }
        match launch::living(&run.meta(), &self.inner.settings.vmm_path) {
            Ok(None) => Some(vm::end_record(&run, Exit::Unknown)),
            Ok(Some(_)) | Err(_) => None,
        }
    }

    /// Ends what may still run of a VM, and removes its run directory, cgroup and network. Idempotent.
    pub async fn clean(&self, uid: Uuid) {
        let inner = Arc::clone(&self.inner);
        let _ = tokio::spawn(async move { inner.clean(uid).await }).await;
    }

    /// Makes a volume, empty or from an image's raw file; synced when it returns, nothing left on failure.
    ///
    /// # Errors
    /// [`JobError`].
    pub async fn create_volume(
        &self,
        uid: Uuid,
        size_bytes: u64,
        from_image: Option<PathBuf>,
    ) -> Result<(), JobError> {
        let job = jobs::create_volume(Arc::clone(&self.inner), uid, size_bytes, from_image);
        tokio::spawn(job).await.unwrap_or(Err(JobError::Ending))
    }

    /// Removes a volume's files. No error when there are none.
    ///
    /// # Errors
    /// [`JobError::File`].
    pub async fn delete_volume(&self, uid: Uuid) -> Result<(), JobError> {
        let inner = Arc::clone(&self.inner);
        let _entered = inner.enter(uid).await;
        // Freeing a large file's blocks takes time.
        let job = tokio::task::spawn_blocking(move || jobs::delete_volume(&inner, uid));
        job.await.unwrap_or(Err(JobError::Ending))
    }

    /// The volumes that have a directory.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn found_volumes(&self) -> Result<Vec<Uuid>, FileError> {
        Ok(names(&self.inner.volumes_dir())?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Bytes that a volume's files take on the host's disk: its own, and those that it shares.
    ///
    /// # Errors
    /// The files cannot be looked at.
    pub fn allocated_bytes(&self, uid: Uuid) -> Result<Allocated, FileError> {
        files::allocated_bytes(&self.inner.volume_dir(uid))
    }

    /// Reads an image in: chunks in order, gaps are zero. The whole has `expected_bytes`: a sender whose image ends
    /// in zeros says so by a last chunk `(expected_bytes, empty)`; a channel that closes before that has broken off.
    /// Synced when it returns, nothing at `dest` on failure.
    ///
    /// # Errors
    /// [`JobError`].
    pub async fn import_image(
        &self,
        dest: &Path,
        format: &str,
        expected_bytes: u64,
        data: mpsc::Receiver<(u64, Bytes)>,
    ) -> Result<ImportedImage, JobError> {
        let inner = Arc::clone(&self.inner);
        let job = jobs::import_image(inner, dest.to_owned(), format.to_owned(), expected_bytes, data);
        tokio::spawn(job).await.unwrap_or(Err(JobError::Ending))
    }

    /// Reads an image file of a format (raw, qcow2, vmdk) in. Synced when it returns, nothing at `dest` on failure.
    ///
    /// # Errors
    /// [`JobError`].
    pub async fn convert_image(
        &self,
        dest: &Path,
        format: &str,
        from: &Path,
    ) -> Result<ImportedImage, JobError> {
        let inner = Arc::clone(&self.inner);
        let job = jobs::convert_image(inner, dest.to_owned(), format.to_owned(), from.to_owned());
        tokio::spawn(job).await.unwrap_or(Err(JobError::Ending))
    }

    /// Seals the head of a volume that no process has open.
    ///
    /// # Errors
    /// [`JobError`].
    pub async fn snapshot_stopped(&self, volume: Uuid, name: &str) -> Result<(), JobError> {
        let job = jobs::snapshot_stopped(Arc::clone(&self.inner), volume, name.to_owned());
        tokio::spawn(job).await.unwrap_or(Err(JobError::Ending))
    }

    /// What a volume's headers say; also while it is open elsewhere.
    ///
    /// # Errors
    /// [`JobError`].
    pub async fn volume_info(&self, volume: Uuid) -> Result<VolumeInfo, JobError> {
        jobs::inspect(&self.inner, volume).await
    }

    /// Serves a volume over NBD on `RUN/exports/<id>.sock`; returns when clients may connect.
    ///
    /// # Errors
    /// [`JobError`].
    pub async fn start_export(&self, plan: ExportPlan) -> Result<ExportHandle, JobError> {
        let inner = Arc::clone(&self.inner);
        let job = async move {
            // A merge gives way: its files may go at any moment, and an export of the head wants the lock.
            let _entered = inner.enter(plan.volume).await;
            export::start(Arc::clone(&inner), plan).await
        };
        tokio::spawn(job).await.unwrap_or(Err(JobError::Ending))
    }

    /// Takes over an export that an earlier seriod started; `None` when it is gone (its files are removed then).
    ///
    /// # Errors
    /// [`AdoptError`].
    pub async fn adopt_export(&self, id: &str) -> Result<Option<ExportHandle>, AdoptError> {
        export::adopt(&self.inner, id).await
    }

    /// The exports that have files below RUN.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn found_exports(&self) -> Result<Vec<String>, FileError> {
        let files = names(&self.inner.exports_dir())?;
        let mut ids: Vec<String> =
            files.iter().filter_map(|name| Some(name.rsplit_once('.')?.0.to_owned())).collect();
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// Ends what may still run of an export and removes its files. Idempotent.
    pub async fn clean_export(&self, id: &str) {
        export::clean(&self.inner, id).await;
    }

    /// Gives a vdc what it is promised, and takes it from vdcs that are gone (`all` are those that there are). Gives what of it
    /// this host does not enforce. Writes files: not for a thread that serves others.
    #[must_use]
    pub fn share(&self, vdc: &VdcGroup) -> Vec<String> {
        self.inner.cgroups.share(vdc)
    }

    /// Removes what is left of vdcs that are not among those.
    pub fn keep_vdcs(&self, vdcs: &[Name]) {
        self.inner.cgroups.keep_only(vdcs);
    }

    /// Puts a VM that an earlier seriod started into its vdc's cgroup.
    pub fn place(&self, vm: Uuid, vdc: &Name, vcpus: u32) {
        self.inner.cgroups.adopt(vm, vdc, vcpus);
    }

    /// A VM's cgroup, if there is one.
    #[must_use]
    pub fn cgroup(&self, vm: Uuid) -> Option<PathBuf> {
        self.inner.cgroups.group_of(vm)
    }

    /// A VM's serial log (`STATE/vms/<uuid>/serial.log`).
    #[must_use]
    pub fn log_path(&self, uid: Uuid) -> PathBuf {
        self.inner.log_path(uid)
    }
}

/// The names in a directory; none when it is not there.
fn names(dir: &Path) -> Result<Vec<String>, FileError> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(FileError::at("read", dir))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.map_err(FileError::at("read", dir))?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}
