//! What the host has and how it goes, for `serio capacity` and for the scheduler.
//!
//! ```text
//!   /sys /proc ─▶ host ─▶ inventory ┐
//!                 usage ────────────┼─▶ Shared ─▶ current()  (gRPC)
//!   state ──watch::Snapshot─────────┘        └──▶ scheduler  (one stream, reconnecting) ──▶ orders ──▶ state
//! ```
//!
//! Owns: the last inventory with its generation, the last usage, the link's state. Never: promises (the state makes
//! them; here they are only told).
//!
//! An inventory's generation starts from the clock and counts up with each change, so that it does not repeat after a
//! restart. Tasks: one that samples, one that holds the link.

mod digest;
mod host;
mod inventory;
mod orders;
mod scheduler;
mod usage;

#[cfg(test)]
mod capacity_test;
#[cfg(test)]
mod scheduler_test;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, SystemTime},
};

use serio_api::v1::{Allocation, Allocations, Hello, Inventory, NumaNode, SchedulerLink, Usage};
use serio_types::Route;
use serio_vdc::ledger::NumaLimit;
use tokio::{
    sync::watch,
    time::{MissedTickBehavior, interval},
};

use self::{
    host::{Disk, Host},
    inventory::Policy,
    usage::Sampler,
};

pub use digest::digest;

use crate::{
    audit::Trail,
    state::{orders::HostLimits, owner::Client},
};

/// What the state promises; sent by the state whenever it changes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// All promises, in any order.
    pub allocations: Vec<Allocation>,
    /// Names of the images here.
    pub images: Vec<String>,
    /// Promised to volumes, bytes.
    pub provisioned_bytes: u64,
    /// Why nothing new is taken, if so.
    pub drain_reason: Option<String>,
    /// What was promised under a lower one has ended.
    pub fence_generation: u64,
    /// Processes of running VMs, with the memory promised to each guest: their overhead is measured.
    pub running: Vec<(u32, u64)>,
}

/// Who the node is, and how it reports.
#[derive(Debug, Clone)]
pub struct ReporterSettings {
    /// "a".
    pub node_name: String,
    /// Made once, kept in the state.
    pub node_uid: String,
    /// The data centre.
    pub site: String,
    /// What fails together.
    pub failure_domain: String,
    /// The file system of it is the storage pool.
    pub state_dir: PathBuf,
    /// `https://HOST:7450`, or `http://` in tests: all schedulers of the region; none without any.
    pub scheduler_urls: Vec<String>,
    /// ca-cert.pem, client-cert.pem, client-key.pem.
    pub tls_dir: Option<PathBuf>,
    /// Between two usage reports.
    pub usage_interval: Duration,
    /// Between two leases.
    pub lease_interval: Duration,
    /// Memory kept for the host, bytes.
    pub reserve_memory: u64,
    /// Vcpus promised for one logical processor.
    pub overcommit_vcpu: f64,
    /// The inventory's generation begins there: above all that an earlier seriod has given out.
    pub first_generation: u64,
}

/// Everything for NodeService.GetCapacity.
#[derive(Debug, Clone)]
pub struct Report {
    /// What the node has.
    pub inventory: Inventory,
    /// How it goes.
    pub usage: Usage,
    /// What is promised, complete.
    pub allocations: Allocations,
    /// The link to the scheduler.
    pub link: SchedulerLink,
}

/// Reads the host, and tells the scheduler. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Reporter {
    shared: Arc<Shared>,
}

/// What the sampler writes and the others read.
#[derive(Debug)]
struct Shared {
    settings: ReporterSettings,
    host: Host,
    snapshot: watch::Receiver<Snapshot>,
    /// Carries out what the scheduler orders, and promises by what the inventory says.
    state: Option<Client>,
    /// Where those of its orders are noted that change the node itself.
    trail: Option<Trail>,
    now: Mutex<Now>,
    /// Told when the inventory or the promises have changed.
    changes: watch::Sender<()>,
    /// Adds what others measure.
    more: OnceLock<More>,
}

/// Adds to a usage report.
struct More(Box<dyn Fn(&mut Usage) + Send + Sync>);

impl std::fmt::Debug for More {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("More")
    }
}

#[derive(Debug)]
struct Now {
    sampler: Sampler,
    inventory: Inventory,
    usage: Usage,
    link: SchedulerLink,
}

impl Shared {
    fn now(&self) -> MutexGuard<'_, Now> {
        // Values are replaced whole: a panic elsewhere leaves none half-written.
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn inventory(&self) -> Inventory {
        self.now().inventory.clone()
    }

    fn usage(&self) -> Usage {
        self.now().usage
    }

    fn allocations(&self) -> Vec<Allocation> {
        self.snapshot.borrow().allocations.clone()
    }

    fn hello(&self) -> Hello {
        Hello {
            node_id: self.settings.node_name.clone(),
            node_uid: self.settings.node_uid.clone(),
            boot_id: self.host.boot_id(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            site: self.settings.site.clone(),
            failure_domain: self.settings.failure_domain.clone(),
        }
    }

    fn link_changed(&self, url: &str, connected: bool, last_error: String) {
        let mut now = self.now();
        url.clone_into(&mut now.link.url);
        if now.link.connected != connected || now.link.since.is_none() {
            now.link.since = Some(usage::timestamp(SystemTime::now()));
        }
        now.link.connected = connected;
        // The last failure is of use also while the link stands.
        if !last_error.is_empty() {
            now.link.last_error = last_error;
        }
    }

    /// Reads what the node has; a new generation when it differs.
    fn read_inventory(&self) {
        let disk = host::disk(&self.settings.state_dir).unwrap_or_else(|error| {
            tracing::warn!(path = %self.settings.state_dir.display(), %error, "the state's file system cannot be read");
            Disk::default()
        });
        let policy = Policy {
            reserve_memory: self.settings.reserve_memory,
            overcommit_vcpu: self.settings.overcommit_vcpu,
        };
        let snapshot = self.snapshot.borrow().clone();
        let mut inventory = inventory::read(&self.host, disk, policy, &snapshot);
        let mut now = self.now();
        inventory.generation = now.inventory.generation;
        if inventory::differs(&now.inventory, &inventory) {
            inventory.generation += 1;
            now.inventory = inventory;
        }
    }

    fn read_usage(&self) {
        let running = u32::try_from(self.snapshot.borrow().running.len()).unwrap_or(u32::MAX);
        let mut now = self.now();
        now.usage = now.sampler.sample(&self.host, running, SystemTime::now());
        if let Some(more) = self.more.get() {
            (more.0)(&mut now.usage);
        }
    }
}

impl Reporter {
    /// Reads the host once. [`Reporter::run`] keeps it fresh.
    #[must_use]
    pub fn new(settings: ReporterSettings, snapshot: watch::Receiver<Snapshot>) -> Self {
        Self::with_host(settings, snapshot, Host::new("/"))
    }

    fn with_host(settings: ReporterSettings, snapshot: watch::Receiver<Snapshot>, host: Host) -> Self {
        let start = settings.first_generation;
        let link = SchedulerLink {
            url: settings.scheduler_urls.first().cloned().unwrap_or_default(),
            ..SchedulerLink::default()
        };
        let now = Now {
            sampler: Sampler::default(),
            inventory: Inventory { generation: start, ..Inventory::default() },
            usage: Usage::default(),
            link,
        };
        let shared = Shared {
            settings,
            host,
            snapshot,
            state: None,
            trail: None,
            now: Mutex::new(now),
            changes: watch::Sender::new(()),
            more: OnceLock::new(),
        };
        shared.read_inventory();
        shared.read_usage();
        Self { shared: Arc::new(shared) }
    }

    /// With a state that hears what the host has, and that carries out the scheduler's orders; those that change the node
    /// itself are noted in the trail. Call it first.
    #[must_use]
    pub fn with_state(mut self, state: Client, trail: Option<Trail>) -> Self {
        if let Some(shared) = Arc::get_mut(&mut self.shared) {
            shared.state = Some(state);
            shared.trail = trail;
        }
        self
    }

    /// The state makes promises by what the inventory says.
    async fn tell_state(&self, told: &mut u64) {
        let Some(state) = &self.shared.state else { return };
        let inventory = self.shared.inventory();
        if inventory.generation == *told {
            return;
        }
        *told = inventory.generation;
        let node = |node: &NumaNode| NumaLimit {
            id: node.id,
            vcpus: node.cpus.unwrap_or_default().allocatable,
            memory_bytes: node.memory.unwrap_or_default().allocatable,
        };
        let host = HostLimits {
            generation: inventory.generation,
            nodes: inventory.numa_nodes.iter().map(node).collect(),
            vm_overhead_bytes: inventory.vm_overhead_bytes,
        };
        state.host(host).await;
    }

    /// Has what others measure added to each usage report; once.
    pub fn add_to_usage(&self, more: impl Fn(&mut Usage) + Send + Sync + 'static) {
        // A second one changes nothing.
        let _ = self.shared.more.set(More(Box::new(more)));
    }

    /// Samples, and holds the link to the scheduler, until dropped.
    pub async fn run(self) {
        let link = async {
            match Route::new(self.shared.settings.scheduler_urls.clone()) {
                Some(route) => scheduler::run(Arc::clone(&self.shared), route).await,
                None => std::future::pending().await,
            }
        };
        tokio::join!(self.sample(), link);
    }

    async fn sample(&self) {
        let mut snapshot = self.shared.snapshot.clone();
        let mut tick = interval(self.shared.settings.usage_interval);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The first tick is at once, and was done by `new`.
        tick.tick().await;
        let mut told = 0;
        loop {
            self.tell_state(&mut told).await;
            let state_lives = tokio::select! {
                _ = tick.tick() => {
                    self.shared.read_usage();
                    true
                }
                changed = snapshot.changed() => changed.is_ok(),
            };
            if !state_lives {
                return;
            }
            self.shared.read_inventory();
            self.shared.changes.send_replace(());
        }
    }

    /// Why the node takes nothing new (empty: it does), and its fencing generation.
    #[must_use]
    pub fn orders(&self) -> (String, u64) {
        let snapshot = self.shared.snapshot.borrow();
        (snapshot.drain_reason.clone().unwrap_or_default(), snapshot.fence_generation)
    }

    /// What is known now.
    #[must_use]
    pub fn current(&self) -> Report {
        let allocations = self.shared.allocations();
        let now = self.shared.now();
        Report {
            inventory: now.inventory.clone(),
            usage: now.usage,
            allocations: Allocations { digest: digest(&allocations), allocations, complete: true },
            link: now.link.clone(),
        }
    }
}
