//! A node as placement sees it: sums made once for each change, so that a thousand nodes are looked at in microseconds.
//!
//! Invariant: what is promised is counted from the node's own list; every memory is with the overhead of its VMM.

use std::collections::{BTreeMap, BTreeSet};

use serio_api::v1::{Allocation, AllocationClass, Hello, Inventory, NodeRecord};

/// An amount of each of what is promised.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Need {
    /// Virtual processors.
    pub vcpus: u64,
    /// Bytes, with the VMM's overhead where it lies on a node.
    pub memory: u64,
    /// Bytes of new volumes.
    pub storage: u64,
}

impl Need {
    /// Both.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            vcpus: self.vcpus.saturating_add(other.vcpus),
            memory: self.memory.saturating_add(other.memory),
            storage: self.storage.saturating_add(other.storage),
        }
    }

    /// What is left; never below nothing.
    #[must_use]
    pub const fn minus(self, other: Self) -> Self {
        Self {
            vcpus: self.vcpus.saturating_sub(other.vcpus),
            memory: self.memory.saturating_sub(other.memory),
            storage: self.storage.saturating_sub(other.storage),
        }
    }

    /// Whether it fits into that.
    #[must_use]
    pub const fn within(self, room: Self) -> bool {
        self.vcpus <= room.vcpus && self.memory <= room.memory && self.storage <= room.storage
    }
}

/// A promise on a node, as far as placement cares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promise {
    /// "vdcs/ardesio/vms/web".
    pub resource: String,
    /// Overhead included.
    pub need: Need,
    /// Held for a recovery.
    pub dr_held: bool,
}

/// See the head of this file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeView {
    /// Where it stands.
    pub site: String,
    /// What fails together with it.
    pub failure_domain: String,
    /// Its processors' feature level.
    pub baseline: String,
    /// Names of the images it has, without `images/`.
    pub images: BTreeSet<String>,
    /// It takes nothing new.
    pub draining: bool,
    /// The fencing generation that is in force there.
    pub fence_generation: u64,
    /// Bytes of a VMM beside guest memory.
    pub overhead: u64,
    /// What may be promised in all.
    pub allocatable: Need,
    /// What its list promises, recoveries included.
    pub promised: Need,
    /// The part of it that is held for recoveries.
    pub dr_held: Need,
    /// Of the inventory.
    pub generation: u64,
    /// One by one.
    pub promises: Vec<Promise>,
    /// Keys of the reservations in the list.
    pub keys: BTreeSet<String>,
    /// Whom it promised something, and by which reservation's key.
    pub resources: BTreeMap<String, String>,
}

impl NodeView {
    /// From what the node said.
    #[must_use]
    pub fn of(hello: &Hello, inventory: Option<&Inventory>, allocations: &[Allocation]) -> Self {
        let empty = Inventory::default();
        let inventory = inventory.unwrap_or(&empty);
        let mut view = Self {
            site: hello.site.clone(),
            failure_domain: hello.failure_domain.clone(),
            baseline: inventory.cpu_baseline.clone(),
            images: inventory.images.iter().map(|image| image_name(image).to_owned()).collect(),
            draining: inventory.draining,
            fence_generation: inventory.fence_generation,
            overhead: inventory.vm_overhead_bytes,
            generation: inventory.generation,
            allocatable: allocatable(inventory),
            ..Self::default()
        };
        for allocation in allocations {
            view.promise(allocation);
        }
        view
    }

    fn promise(&mut self, allocation: &Allocation) {
        let need = Need {
            vcpus: u64::from(allocation.vcpus),
            memory: allocation.memory_bytes.saturating_add(self.overhead),
            storage: allocation.storage_bytes,
        };
        let dr_held = allocation.class() == AllocationClass::DrHeld;
        self.promised = self.promised.plus(need);
        if dr_held {
            self.dr_held = self.dr_held.plus(need);
        }
        if !allocation.key.is_empty() {
            self.keys.insert(allocation.key.clone());
        }
        if !allocation.resource.is_empty() {
            self.resources.insert(allocation.resource.clone(), allocation.key.clone());
        }
        self.promises.push(Promise { resource: allocation.resource.clone(), need, dr_held });
    }
}

/// What may be promised: pools count what volumes do not have yet.
fn allocatable(inventory: &Inventory) -> Need {
    let mut sum = Need::default();
    for numa in &inventory.numa_nodes {
        let (cpus, memory) = (numa.cpus.unwrap_or_default(), numa.memory.unwrap_or_default());
        sum.vcpus = sum.vcpus.saturating_add(cpus.allocatable);
        sum.memory = sum.memory.saturating_add(memory.allocatable);
    }
    for pool in &inventory.storage_pools {
        sum.storage = sum.storage.saturating_add(pool.physical_bytes.saturating_sub(pool.provisioned_bytes));
    }
    sum
}

/// An image's name, however it is written.
#[must_use]
pub fn image_name(text: &str) -> &str {
    text.strip_prefix("images/").unwrap_or(text)
}

/// The view of a record.
#[must_use]
pub fn of_record(record: &NodeRecord) -> NodeView {
    let hello = record.hello.clone().unwrap_or_default();
    let allocations = record.allocations.as_ref().map(|a| a.allocations.as_slice()).unwrap_or_default();
    NodeView::of(&hello, record.inventory.as_ref(), allocations)
}
