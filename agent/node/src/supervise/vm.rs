//! A running VM, from the outside.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serio_control::{
    ChannelError,
    message::{
        BalloonStats, Body, DiskLimits, Empty, NicLimits, SetBalloon, SetLimits, SnapshotVolume, VmState,
        VmStatus,
    },
};
use serio_types::{BootedKernel, IoLimits};
use tokio::net::UnixStream;
use uuid::Uuid;

use super::{
    DevicePlan, EndKind, EndRecord, FileError, Inner, JobError, TalkError, VmReport,
    files::{self, Descriptors},
    jobs, link, machine, oom,
    process::Exit,
    rundir::{self, RunDir},
    spawn::Watched,
    vsock,
};

/// For a question that is answered from memory.
pub(super) const ANSWER_WAIT: Duration = Duration::from_secs(5);
/// For what is only shown.
const STATS_WAIT: Duration = Duration::from_millis(500);
/// For pausing: what its devices are doing is finished first.
const PAUSE_WAIT: Duration = Duration::from_secs(30);
/// For sealing a volume: it drains what is in flight and syncs.
const SNAPSHOT_WAIT: Duration = Duration::from_secs(60);
/// How long a VMM may take to end after `Stop` before it is killed.
const STOP_GRACE: Duration = Duration::from_secs(3);

/// A running VM. Cheap to clone; dropping it does nothing to the VM.
#[derive(Debug, Clone)]
pub struct VmHandle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    inner: Arc<Inner>,
    uid: Uuid,
    generation: u64,
    run: RunDir,
    watched: Watched,
    /// We asked it to end: a silent death is then no failure.
    stopping: AtomicBool,
    /// Processes that the host had killed for want of memory when this one was new.
    oom_kills: u64,
    /// What it booted, if it was started here from a disk.
    booted: OnceLock<BootedKernel>,
}

impl VmHandle {
    pub(super) fn new(inner: Arc<Inner>, uid: Uuid, generation: u64, watched: Watched) -> Self {
        let run = inner.run_of(uid);
        Self {
            shared: Arc::new(Shared {
                inner,
                uid,
                generation,
                run,
                watched,
                stopping: AtomicBool::new(false),
                oom_kills: oom::kills(),
                booted: OnceLock::new(),
            }),
        }
    }

    pub(super) fn booted(self, kernel: Option<BootedKernel>) -> Self {
        if let Some(kernel) = kernel {
            // It is new: nobody has set it.
            let _ = self.shared.booted.set(kernel);
        }
        self
    }

    /// The VM's.
    pub(super) fn uid(&self) -> Uuid {
        self.shared.uid
    }

    /// What it booted; `None` if not from its disk, or if an earlier seriod started it.
    #[must_use]
    pub fn kernel(&self) -> Option<&BootedKernel> {
        self.shared.booted.get()
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.shared.watched.process().pid()
    }

    pub(super) fn run(&self) -> &RunDir {
        &self.shared.run
    }

    pub(super) fn inner(&self) -> &Arc<Inner> {
        &self.shared.inner
    }

    /// Where its VMM is asked.
    pub(super) fn control(&self) -> PathBuf {
        self.shared.run.control()
    }

    /// The generation that it was launched with.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.shared.generation
    }

    /// Asks the VMM.
    ///
    /// # Errors
    /// [`TalkError`].
    pub async fn status(&self) -> Result<VmReport, TalkError> {
        let status = ask_status(&self.shared.run, self.pid()).await?;
        Ok(VmReport {
            paused: status.state() == VmState::Paused,
            resets: status.resets,
            uptime: Duration::from_nanos(status.uptime_ns),
            version: status.version,
            volumes: status.disks.iter().filter_map(|disk| disk.parse().ok()).collect(),
            nics: status.nics.iter().filter_map(|nic| nic.parse().ok()).collect(),
        })
    }

    /// Asks the VMM anything.
    pub(super) async fn ask(&self, body: Body, fds: &[OwnedFd], wait: Duration) -> Result<Body, TalkError> {
        link::ask_with(&self.shared.run.control(), self.peer(), body, fds, wait).await
    }

    /// Its name in messages.
    pub(super) fn peer(&self) -> String {
        peer(self.pid())
    }

    /// Whether its process is gone within that time.
    pub(super) async fn exit_within(&self, wait: Duration) -> bool {
        self.shared.watched.exit_within(wait).await.is_some()
    }

    pub(super) fn watched(&self) -> &Watched {
        &self.shared.watched
    }

    async fn order(&self, body: Body, wait: Duration) -> Result<(), TalkError> {
        match link::ask(&self.shared.run.control(), peer(self.pid()), body, wait).await? {
            Body::Done(_) => Ok(()),
            _ => Err(ChannelError::Unexpected.into()),
        }
    }

    /// Presses the ACPI power button.
    ///
    /// # Errors
    /// [`TalkError`].
    pub async fn power_button(&self) -> Result<(), TalkError> {
        self.order(Body::PowerButton(Empty {}), ANSWER_WAIT).await
    }

    /// Resets the machine.
    ///
    /// # Errors
    /// [`TalkError`].
    pub async fn reset(&self) -> Result<(), TalkError> {
        self.order(Body::Reset(Empty {}), ANSWER_WAIT).await
    }

    /// Stops the guest where it is; returns when nothing of it runs.
    ///
    /// # Errors
    /// [`TalkError`].
    pub async fn pause(&self) -> Result<(), TalkError> {
        self.order(Body::Pause(Empty {}), PAUSE_WAIT).await
    }

    /// Asks the guest to have so much in its balloon.
    ///
    /// # Errors
    /// [`TalkError`].
    pub async fn set_balloon(&self, target_bytes: u64) -> Result<(), TalkError> {
        self.order(Body::SetBalloon(SetBalloon { target_bytes }), ANSWER_WAIT).await
    }

    /// Has disks and cards keep to these limits from now on.
    ///
    /// # Errors
    /// [`TalkError`].
    pub async fn set_limits(&self, plan: &DevicePlan) -> Result<(), TalkError> {
        let disk = |(volume, limits): &(Uuid, IoLimits)| DiskLimits {
            volume_id: volume.to_string(),
            limits: machine::limits(limits),
        };
        let nic = |(mac, limits): &([u8; 6], IoLimits)| NicLimits {
            mac: mac.to_vec(),
            limits: machine::limits(limits),
        };
        let request = SetLimits {
            disks: plan.disks.iter().map(disk).collect(),
            nics: plan.nics.iter().map(nic).collect(),
        };
        self.order(Body::SetLimits(request), ANSWER_WAIT).await
    }

    /// How the guest's balloon and memory stand.
    ///
    /// # Errors
    /// [`TalkError`].
    pub async fn balloon_stats(&self) -> Result<BalloonStats, TalkError> {
        match self.ask(Body::BalloonQuery(Empty {}), &[], STATS_WAIT).await? {
            Body::BalloonStats(stats) => Ok(stats),
            _ => Err(ChannelError::Unexpected.into()),
        }
    }

    /// The socket for clients of the guest's vsock ports, if it has them.
    #[must_use]
    pub fn vsock_path(&self) -> Option<PathBuf> {
        Some(self.shared.run.vsock()).filter(|path| path.exists())
    }

    /// Gives a VMM that was taken over a broker for its guest's vsock connections. Without one they are refused: a failure is
    /// logged, not told.
    pub(super) async fn offer_broker(&self) {
        if self.vsock_path().is_none() {
            return;
        }
        let offered = async {
            let (ours, theirs) = machine::broker_pair().map_err(|e| e.to_string())?;
            match self.ask(Body::SetVsockBroker(Empty {}), &[theirs], ANSWER_WAIT).await {
                Ok(_) => {
                    vsock::serve(ours, self.shared.run.clone());
                    Ok(())
                }
                Err(error) => Err(crate::error::chain(&error)),
            }
        };
        if let Err(why) = offered.await {
            tracing::warn!(vm = %self.shared.uid, "its guest's vsock connections are refused: {why}");
        }
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// [`TalkError`].
    pub async fn resume(&self) -> Result<(), TalkError> {
        self.order(Body::Resume(Empty {}), ANSWER_WAIT).await
    }

    /// Pulls the plug: asks the VMM to end, kills it if it does not; returns when it is gone.
    pub async fn stop(&self) -> EndRecord {
        self.shared.stopping.store(true, Ordering::Relaxed);
        let asked = self.order(Body::Stop(Empty {}), STOP_GRACE);
        let gone = async {
            tokio::select! {
                _ = self.shared.watched.exit() => true,
                answer = asked => answer.is_ok() && self.shared.watched.exit_within(STOP_GRACE).await.is_some(),
            }
        };
        if !gone.await {
            self.shared.watched.kill().await;
        }
        self.ended().await
    }

    /// Resolves when the process is gone (also of an adopted one, and also when it is gone already).
    pub async fn ended(&self) -> EndRecord {
        let exit = self.shared.watched.exit().await;
        let shared = &self.shared;
        let mut record = end_record(&shared.run, exit);
        if record.kind != EndKind::Died {
            return record;
        }
        if shared.stopping.load(Ordering::Relaxed) {
            return EndRecord {
                kind: EndKind::Stopped,
                reason: "stopped; it did not answer and was killed".to_owned(),
            };
        }
        // Of one that was taken over only its parent knows the signal.
        if matches!(exit, Exit::Signal(libc::SIGKILL) | Exit::Unknown) {
            let group = shared.inner.cgroups.group_of(shared.uid);
            if let Some(why) = oom::why_killed(group.as_deref(), shared.oom_kills) {
                record.reason = with_tail(&format!("serio-vmm {why}"), &shared.run.stderr());
            }
        }
        record
    }

    /// Seals a volume of the running VM at a point.
    ///
    /// # Errors
    /// [`JobError`].
    pub async fn snapshot_volume(&self, volume: Uuid, name: &str) -> Result<(), JobError> {
        let this = self.clone();
        let name = name.to_owned();
        // A task: the new layer's files and the answer belong together even when the caller goes.
        tokio::spawn(async move { this.seal(volume, name).await }).await.unwrap_or(Err(JobError::Ending))
    }

    async fn seal(&self, volume: Uuid, name: String) -> Result<(), JobError> {
        let shared = &self.shared;
        let mut gate = shared.inner.enter_sure(volume).await?;
        let layers = jobs::inspect(&shared.inner, volume).await?.next_number();
        let dir = shared.inner.volume_dir(volume);
        let (data, map) = files::new_layer(&dir, layers)?;
        let mut descriptors = Descriptors::default();
        let body = Body::SnapshotVolume(SnapshotVolume {
            volume_id: volume.to_string(),
            snapshot: name,
            data_fd: descriptors.push(data),
            map_fd: descriptors.push(map),
        });
        let control = shared.run.control();
        let asked =
            link::ask_with(&control, peer(self.pid()), body, descriptors.as_slice(), SNAPSHOT_WAIT).await;
        match asked {
            Ok(Body::Done(_)) => Ok(()),
            Err(error) if error.refusal().is_some() => {
                jobs::drop_unused_layer(&shared.inner, volume, layers).await;
                Err(error.into())
            }
            // It may still be at it: the new layer's files must not be touched while it lives.
            other => {
                gate.in_doubt = Some(shared.watched.clone());
                match other {
                    Err(error) => Err(error.into()),
                    Ok(_) => Err(TalkError::from(ChannelError::Unexpected).into()),
                }
            }
        }
    }

    /// The serial console: bytes both ways.
    ///
    /// # Errors
    /// The VMM does not listen any more.
    pub async fn attach_console(&self) -> Result<UnixStream, FileError> {
        let path = self.shared.run.console();
        UnixStream::connect(&path).await.map_err(FileError::at("connect to", path))
    }

    /// The serial log.
    #[must_use]
    pub fn log_path(&self) -> PathBuf {
        self.shared.inner.log_path(self.shared.uid)
    }
}

/// A VMM's name in messages.
pub(super) fn peer(pid: u32) -> String {
    format!("serio-vmm (process {pid})")
}

/// Asks a VMM how it is.
pub(super) async fn ask_status(run: &RunDir, pid: u32) -> Result<VmStatus, TalkError> {
    match link::ask(&run.control(), peer(pid), Body::Status(Empty {}), ANSWER_WAIT).await? {
        Body::VmStatus(status) => Ok(status),
        _ => Err(ChannelError::Unexpected.into()),
    }
}

/// How a run ended: its last words, or what the kernel said, with the end of its standard error.
pub(super) fn end_record(run: &RunDir, exit: Exit) -> EndRecord {
    run.last_words().unwrap_or_else(|| EndRecord {
        kind: EndKind::Died,
        reason: with_tail(&format!("serio-vmm {exit}"), &run.stderr()),
    })
}

/// A message with the end of a log, when there is any.
pub(super) fn with_tail(text: &str, log: &Path) -> String {
    match rundir::log_tail(log).as_str() {
        "" => text.to_owned(),
        tail => format!("{text}; its last words: {tail}"),
    }
}
