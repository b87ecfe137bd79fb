//! What may be promised: the host's totals, less what is kept, stretched by policy. Pure arithmetic that saturates.

use serio_types::Quota;

/// Processors and memory of a NUMA node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NumaTotal {
    /// As the kernel numbers it.
    pub id: u32,
    /// Logical processors that are online.
    pub cpus: u64,
    /// All memory, bytes.
    pub memory_bytes: u64,
    /// Kept for the host, bytes.
    pub reserved_bytes: u64,
}

/// What may be promised on a NUMA node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NumaLimit {
    /// As the kernel numbers it.
    pub id: u32,
    /// Virtual processors.
    pub vcpus: u64,
    /// Memory, bytes.
    pub memory_bytes: u64,
}

/// What may be promised in all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Of the inventory that says it; 0 before the first.
    pub generation: u64,
    /// Over all NUMA nodes. What no NUMA node is wished for is measured by this alone.
    pub total: Quota,
    /// Of each NUMA node. Without any, a promise on a NUMA node is refused.
    pub nodes: Vec<NumaLimit>,
    /// Measured bytes that a VMM takes beside guest memory: added to every promise with a vcpu.
    pub vm_overhead_bytes: u64,
}

impl Capacity {
    /// From a host's totals: allocatable = total − reserved, and `overcommit` vcpus for one logical processor.
    #[must_use]
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a saturating cast: no ratio makes it wrap, one that is no number gives none"
    )]
    pub fn of(nodes: &[NumaTotal], overcommit: f64, storage_bytes: u64) -> Self {
        let limit = |node: &NumaTotal| NumaLimit {
            id: node.id,
            vcpus: (node.cpus as f64 * overcommit) as u64,
            memory_bytes: node.memory_bytes.saturating_sub(node.reserved_bytes),
        };
        let nodes: Vec<NumaLimit> = nodes.iter().map(limit).collect();
        let total = Quota {
            vcpus: nodes.iter().fold(0, |sum, node| sum.saturating_add(node.vcpus)),
            memory_bytes: nodes.iter().fold(0, |sum, node| sum.saturating_add(node.memory_bytes)),
            storage_bytes,
        };
        Self { generation: 0, total, nodes, vm_overhead_bytes: 0 }
    }

    /// What a promise takes: the VMM's overhead is added where there is a vcpu.
    #[must_use]
    pub const fn cost(&self, amount: &Quota) -> Quota {
        let overhead = if amount.vcpus > 0 { self.vm_overhead_bytes } else { 0 };
        Quota { memory_bytes: amount.memory_bytes.saturating_add(overhead), ..*amount }
    }
}
