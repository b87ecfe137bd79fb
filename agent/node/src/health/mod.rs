//! Health: what is wrong with this node, since when, why, and what to do.
//!
//! ```text
//!   /proc /sys, statvfs, adjtimex ─▶ observe ─▶ judge (pure) ─▶ conditions ─▶ GetNode, Usage, metrics
//!                                                                    └─ each change ─▶ an event of the node
//! ```
//!
//! Owns: the list of conditions, the floor below which a full disk refuses new work. Never: what goes on already: guests of a
//! node with a full disk run on, and what was promised is not taken back.
//! Threads: looks run on blocking threads.

pub mod disks;
pub mod judge;
pub mod observe;

#[cfg(test)]
mod health_test;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use tokio::time::{MissedTickBehavior, interval};

use self::{
    judge::{Finding, findings},
    observe::Observed,
};
use crate::{
    error::Error,
    state::{
        command::{Command, Mutation},
        owner::Client,
    },
};

/// What can be wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The disk of state_dir is nearly full, or will be soon.
    DiskFilling,
    /// A disk of the host has errors.
    FailingDisk,
    /// There is too little memory.
    MemoryPressure,
    /// The clock may be wrong.
    ClockSkew,
    /// A certificate is about to expire.
    CertificateExpiring,
    /// VMs cannot be started.
    KvmGone,
    /// The kernel is older than what Serio is made for.
    KernelTooOld,
}

impl Kind {
    /// As the API, events and metrics have it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::DiskFilling => "disk-filling",
            Self::FailingDisk => "failing-disk",
            Self::MemoryPressure => "memory-pressure",
            Self::ClockSkew => "clock-skew",
            Self::CertificateExpiring => "certificate-expiring",
            Self::KvmGone => "kvm-gone",
            Self::KernelTooOld => "kernel-too-old",
        }
    }
}

/// How bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// It works; somebody should look.
    Warning,
    /// Something does not work, or will not soon.
    Critical,
}

impl Severity {
    /// As events and metrics have it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

/// A finding, and since when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// What.
    pub finding: Finding,
    /// Seconds since 1970.
    pub since_s: i64,
}

/// How health is watched.
#[derive(Debug, Clone)]
pub struct HealthSettings {
    /// `/`, or a recorded tree.
    pub root: PathBuf,
    /// The node as events name it: "nodes/a".
    pub resource: String,
    /// Its file system is watched.
    pub state_dir: PathBuf,
    /// With less free than that nothing new is made.
    pub floor_bytes: u64,
    /// Those in use.
    pub certificates: Vec<PathBuf>,
    /// Between two looks.
    pub interval: Duration,
}

/// Looks that are kept for the forecast: two hours at the default interval.
const HISTORY_MAX: usize = 240;

/// Watches. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Health {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    settings: HealthSettings,
    began: Instant,
    errors_before: Vec<(String, u64)>,
    now: Mutex<Now>,
}

#[derive(Debug, Default)]
struct Now {
    conditions: Vec<Condition>,
    history: Vec<(u64, u64)>,
}

/// Conditions that were there keep their time; gives what is to be told: kind and sentence.
fn follow(
    before: &[Condition],
    found: Vec<Finding>,
    now_s: i64,
) -> (Vec<Condition>, Vec<(&'static str, String)>) {
    let same = |a: &Finding, b: &Finding| a.kind == b.kind && a.subject == b.subject;
    let mut told = Vec::new();
    for old in before.iter().filter(|old| !found.iter().any(|new| same(&old.finding, new))) {
        told.push((
            "healthy",
            format!("{}: over; it was: {}", old.finding.kind.as_str(), old.finding.reason),
        ));
    }
    let conditions = found.into_iter().map(|finding| {
        let old = before.iter().find(|old| same(&old.finding, &finding));
        if old.is_none_or(|old| old.finding.severity != finding.severity) {
            let Finding { kind, severity, reason, remedy, .. } = &finding;
            told.push((
                "unhealthy",
                format!("{} ({}): {reason}; {remedy}", kind.as_str(), severity.as_str()),
            ));
        }
        Condition { since_s: old.map_or(now_s, |old| old.since_s), finding }
    });
    (conditions.collect(), told)
}

impl Health {
    /// Looks once, and tells nobody yet.
    #[must_use]
    pub fn new(settings: HealthSettings) -> Self {
        let disks = disks::disks(&settings.root);
        let errors_before = disks.into_iter().map(|disk| (disk.name, disk.errors)).collect();
        let inner = Inner { settings, began: Instant::now(), errors_before, now: Mutex::default() };
        let (conditions, _) = follow(&[], findings(&inner.observe()), now_s());
        inner.now().conditions = conditions;
        Self { inner: Arc::new(inner) }
    }

    /// Looks again and again, and tells the state of each change.
    pub async fn run(self, state: Client) {
        let mut tick = interval(self.inner.settings.interval);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The first is at once.
        tick.tick().await;
        let mut told_before: Vec<Condition> = Vec::new();
        loop {
            tick.tick().await;
            let inner = Arc::clone(&self.inner);
            let Ok(seen) = tokio::task::spawn_blocking(move || inner.observe()).await else { return };
            let found = findings(&seen);
            let (conditions, _) = follow(&self.conditions(), found.clone(), seen.now_s);
            self.inner.now().conditions = conditions;
            let (known, told) = follow(&told_before, found, seen.now_s);
            told_before = known;
            for (kind, message) in told {
                let resource = self.inner.settings.resource.clone();
                if let Err(Error::Ending) = state.ask(Command::Note { resource, kind, message }).await {
                    return;
                }
            }
        }
    }

    /// What is wrong now, as of the last look.
    #[must_use]
    pub fn conditions(&self) -> Vec<Condition> {
        self.inner.now().conditions.clone()
    }

    /// Refuses what would make a full disk fuller. What runs goes on, and what frees space is always allowed.
    ///
    /// # Errors
    /// [`Error::Precondition`].
    pub fn admit(&self, mutation: &Mutation) -> Result<(), Error> {
        if !makes_something(mutation) {
            return Ok(());
        }
        let settings = &self.inner.settings;
        // Asked now: the last look may be half a minute old.
        let free = observe::space(&settings.state_dir).map(|space| space.free_bytes);
        let Some(free) = free.filter(|free| *free < settings.floor_bytes) else { return Ok(()) };
        let size = serio_types::ByteSize::from_bytes;
        let why = format!(
            "is full: {} are free on the disk of {}, and below {} (health.disk_floor) nothing new is made or started; delete \
             snapshots, volumes or images that nobody needs, or use another node",
            size(free),
            settings.state_dir.display(),
            size(settings.floor_bytes),
        );
        Err(Error::precondition(settings.resource.clone(), why))
    }
}

fn makes_something(mutation: &Mutation) -> bool {
    match mutation {
        Mutation::CreateVdc { .. }
        | Mutation::CreateVm { .. }
        | Mutation::CreateVmOn { .. }
        | Mutation::StartVm { .. }
        | Mutation::CreateVolume { .. }
        | Mutation::CreateSnapshot { .. }
        | Mutation::CreateVdcSnapshot { .. }
        | Mutation::CloneVolume { .. }
        | Mutation::ResizeVolume { .. }
        | Mutation::BeginImport { .. }
        | Mutation::BeginVmImport(_) => true,
        Mutation::At { mutation, .. } => makes_something(mutation),
        _ => false,
    }
}

impl Inner {
    fn now(&self) -> MutexGuard<'_, Now> {
        // Values are replaced whole: a panic elsewhere leaves none half-written.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn observe(&self) -> Observed {
        let root = &self.settings.root;
        let space = observe::space(&self.settings.state_dir);
        let mut disks = disks::disks(root);
        for disk in &mut disks {
            let known = self.errors_before.iter().find(|(name, _)| *name == disk.name);
            disk.errors_before = known.map_or(0, |(_, errors)| *errors);
        }
        let history = {
            let mut now = self.now();
            if let Some(space) = space {
                let used = space.total_bytes.saturating_sub(space.free_bytes);
                now.history.push((self.began.elapsed().as_secs(), used));
            }
            let too_many = now.history.len().saturating_sub(HISTORY_MAX);
            now.history.drain(..too_many);
            now.history.clone()
        };
        Observed {
            now_s: now_s(),
            space,
            floor_bytes: self.settings.floor_bytes,
            history,
            clock: crate::sys::kernel_clock(),
            memory_full: observe::memory_full(root),
            disks,
            certificates: self.settings.certificates.iter().map(|path| observe::certificate(path)).collect(),
            kvm: observe::kvm(root),
            kernel: observe::kernel(root),
        }
    }
}

fn now_s() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
