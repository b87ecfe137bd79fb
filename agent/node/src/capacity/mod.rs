//! What the host has and how it goes, for `serio capacity` and for the scheduler.

use std::{path::PathBuf, time::Duration};

use serio_api::v1::{Allocation, Allocations, Inventory, SchedulerLink, Usage};
use tokio::sync::watch;

/// What the state promises; sent by the state whenever it changes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Snapshot {
    /// All promises, in any order.
    pub allocations: Vec<Allocation>,
    /// Names of the images here.
    pub images: Vec<String>,
    /// Promised to volumes, bytes.
    pub provisioned_bytes: u64,
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
    /// `https://HOST:7450`, or `http://` in tests; no scheduler when `None`.
    pub scheduler_url: Option<String>,
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
    snapshot: watch::Receiver<Snapshot>,
}

impl Reporter {
    /// Reads the host once. [`Reporter::run`] keeps it fresh.
    #[must_use]
    pub fn new(settings: ReporterSettings, snapshot: watch::Receiver<Snapshot>) -> Self {
        let _ = settings;
        Self { snapshot }
    }

    /// Samples, and holds the link to the scheduler, until dropped.
    pub async fn run(self) {
        let _ = self.snapshot.borrow();
    }

    /// What is known now.
    #[must_use]
    pub fn current(&self) -> Report {
        Report {
            inventory: Inventory::default(),
            usage: Usage::default(),
            allocations: Allocations::default(),
            link: SchedulerLink::default(),
        }
    }
}

/// The promises' digest: blake3, lower-case hex.
#[must_use]
pub fn digest(allocations: &[Allocation]) -> String {
    let _ = allocations;
    String::new()
}
