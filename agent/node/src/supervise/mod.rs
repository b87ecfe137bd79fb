//! The processes that hold VMs and volumes: started, watched, found again, ended.
//!
//! ```text
//!  RUN/vms/<uuid>/  meta          who: pid, start time, generation, digest of the plan. Written before Launch
//!                   control.sock  the VMM listens here from its birth; seriod connects anew for each question
//!                   console.sock  the serial console, for `attach_console`
//!                   exit          the VMM's last words (EndRecord); empty while it runs
//!                   vmm.log       its standard error, bounded
//!  RUN/exports/     <id>.sock     NBD        <id>.ctl  control        <id>.meta  who
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

mod error;
mod plan;

use std::path::{Path, PathBuf};

use bytes::Bytes;
use tokio::{net::UnixStream, sync::mpsc};
use uuid::Uuid;

pub use error::{AdoptError, FileError, JobError, LaunchError, SpawnError, TalkError, VolumeFilesError};
pub use plan::{
    DiskPlan, DiskSource, EndKind, EndRecord, ExportPlan, ExportReport, ImportedImage, LaunchPlan, NicPlan,
    PointInfo, SupervisorSettings, VmReport, VolumeInfo,
};

/// Starts, finds and ends processes. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Supervisor {}

impl Supervisor {
    /// Makes the directories below RUN and STATE; says once if cgroup v2 cannot be used.
    ///
    /// # Errors
    /// A directory cannot be made.
    pub fn new(settings: SupervisorSettings) -> Result<Self, FileError> {
        let _ = settings;
        Ok(Self {})
    }

    /// Starts a VM; returns when its guest runs. On failure nothing half-made stays.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub async fn launch(&self, plan: LaunchPlan) -> Result<VmHandle, LaunchError> {
        let _ = plan;
        Err(LaunchError::Ending)
    }

    /// Takes over a VMM that an earlier seriod started. `None` when it is gone, or never had its `Launch`
    /// (then it is ended): [`Supervisor::end_record`] tells why.
    ///
    /// # Errors
    /// [`AdoptError`]: it runs but cannot be talked to.
    pub async fn adopt(&self, uid: Uuid) -> Result<Option<VmHandle>, AdoptError> {
        let _ = uid;
        Ok(None)
    }

    /// The VMs that have a run directory.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn found(&self) -> Result<Vec<Uuid>, FileError> {
        Ok(Vec::new())
    }

    /// How a VM's run ended: its last words, or `Died`. `None` while it runs, or without a run directory.
    #[must_use]
    pub fn end_record(&self, uid: Uuid) -> Option<EndRecord> {
        let _ = uid;
        None
    }

    /// Ends what may still run of a VM, and removes its run directory, cgroup and network. Idempotent.
    pub async fn clean(&self, uid: Uuid) {
        let _ = uid;
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
        let _ = (uid, size_bytes, from_image);
        Err(JobError::Ending)
    }

    /// Removes a volume's files. No error when there are none.
    ///
    /// # Errors
    /// [`JobError::File`].
    pub async fn delete_volume(&self, uid: Uuid) -> Result<(), JobError> {
        let _ = uid;
        Err(JobError::Ending)
    }

    /// The volumes that have a directory.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn found_volumes(&self) -> Result<Vec<Uuid>, FileError> {
        Ok(Vec::new())
    }

    /// Bytes that a volume's files take on the host's disk.
    ///
    /// # Errors
    /// The files cannot be looked at.
    pub fn allocated_bytes(&self, uid: Uuid) -> Result<u64, VolumeFilesError> {
        let _ = uid;
        Ok(0)
    }

    /// Reads an image in: chunks in order, gaps are zero, `expected_bytes` in all. Synced when it returns,
    /// nothing at `dest` on failure. Closing the channel early breaks off.
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
        let _ = (dest, format, expected_bytes, data);
        Err(JobError::Ending)
    }

    /// Seals the head of a volume that no process has open.
    ///
    /// # Errors
    /// [`JobError`].
    pub async fn snapshot_stopped(&self, volume: Uuid, name: &str) -> Result<(), JobError> {
        let _ = (volume, name);
        Err(JobError::Ending)
    }

    /// What a volume's headers say; also while it is open elsewhere.
    ///
    /// # Errors
    /// [`JobError`].
    pub async fn volume_info(&self, volume: Uuid) -> Result<VolumeInfo, JobError> {
        let _ = volume;
        Err(JobError::Ending)
    }

    /// Serves a volume over NBD on `RUN/exports/<id>.sock`; returns when clients may connect.
    ///
    /// # Errors
    /// [`JobError`].
    pub async fn start_export(&self, plan: ExportPlan) -> Result<ExportHandle, JobError> {
        let _ = plan;
        Err(JobError::Ending)
    }

    /// Takes over an export that an earlier seriod started; `None` when it is gone (its files are removed then).
    ///
    /// # Errors
    /// [`AdoptError`].
    pub async fn adopt_export(&self, id: &str) -> Result<Option<ExportHandle>, AdoptError> {
        let _ = id;
        Ok(None)
    }

    /// The exports that have files below RUN.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn found_exports(&self) -> Result<Vec<String>, FileError> {
        Ok(Vec::new())
    }

    /// Ends what may still run of an export and removes its files. Idempotent.
    pub async fn clean_export(&self, id: &str) {
        let _ = id;
    }

    /// A VM's serial log (`STATE/vms/<uuid>/serial.log`).
    #[must_use]
    pub fn log_path(&self, uid: Uuid) -> PathBuf {
        PathBuf::from(uid.to_string())
    }
}

/// A running VM. Cheap to clone; dropping it does nothing to the VM.
#[derive(Debug, Clone)]
pub struct VmHandle {}

impl VmHandle {
    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        0
    }

    /// The generation that it was launched with.
    #[must_use]
    pub fn generation(&self) -> u64 {
        0
    }

    /// Asks the VMM.
    ///
    /// # Errors
    /// [`TalkError`].
    pub async fn status(&self) -> Result<VmReport, TalkError> {
        Ok(VmReport { paused: false, resets: 0, uptime: std::time::Duration::ZERO, version: String::new() })
    }

    /// Presses the ACPI power button.
    ///
    /// # Errors
    /// [`TalkError`].
    pub async fn power_button(&self) -> Result<(), TalkError> {
        Ok(())
    }

    /// Resets the machine.
    ///
    /// # Errors
    /// [`TalkError`].
    pub async fn reset(&self) -> Result<(), TalkError> {
        Ok(())
    }

    /// Pulls the plug: asks the VMM to end, kills it if it does not; returns when it is gone.
    pub async fn stop(&self) -> EndRecord {
        EndRecord { kind: EndKind::Stopped, reason: String::new() }
    }

    /// Seals a volume of the running VM at a point.
    ///
    /// # Errors
    /// [`JobError`].
    pub async fn snapshot_volume(&self, volume: Uuid, name: &str) -> Result<(), JobError> {
        let _ = (volume, name);
        Err(JobError::Ending)
    }

    /// Resolves when the process is gone (also of an adopted one, and also when it is gone already).
    pub async fn ended(&self) -> EndRecord {
        EndRecord { kind: EndKind::Died, reason: String::new() }
    }

    /// The serial console: bytes both ways.
    ///
    /// # Errors
    /// The VMM does not listen any more.
    pub async fn attach_console(&self) -> Result<UnixStream, FileError> {
        let path = PathBuf::new();
        UnixStream::connect(&path).await.map_err(FileError::at("connect to", path))
    }

    /// The serial log.
    #[must_use]
    pub fn log_path(&self) -> PathBuf {
        PathBuf::new()
    }
}

/// A running export. Cheap to clone; dropping it does nothing to the export.
#[derive(Debug, Clone)]
pub struct ExportHandle {}

impl ExportHandle {
    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        0
    }

    /// The NBD socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        Path::new("")
    }

    /// Asks it.
    ///
    /// # Errors
    /// [`TalkError`].
    pub async fn report(&self) -> Result<ExportReport, TalkError> {
        Ok(ExportReport { clients: 0 })
    }

    /// Ends it and removes its files; its clients are disconnected.
    pub async fn stop(&self) {}

    /// Resolves when the process is gone; with how.
    pub async fn ended(&self) -> String {
        String::new()
    }
}
