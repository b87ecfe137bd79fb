//! What the node offers: the host's numbers, less what is kept, beside what is promised. Pure.
//!
//! VMs are not pinned to NUMA nodes yet, so promises are shared out over the nodes by their size; their sum is
//! exact.

use serio_api::v1::{Amount, Inventory, NumaNode, StoragePool};

use super::{
    Snapshot,
    host::{Disk, Host, Node},
};

/// The pool that volumes lie in.
const POOL: &str = "state";

/// What is kept and stretched.
#[derive(Debug, Clone, Copy)]
pub(super) struct Policy {
    /// Memory kept for the host, bytes.
    pub(super) reserve_memory: u64,
    /// Vcpus promised for one logical processor.
    pub(super) overcommit_vcpu: f64,
}

/// Reads the host and makes the inventory; the generation is the caller's.
pub(super) fn read(host: &Host, disk: Disk, policy: Policy, snapshot: &Snapshot) -> Inventory {
    let (cpu_model, cpu_baseline) = host.processor();
    let overhead = snapshot.running.iter().filter_map(|(pid, _)| host.overhead(*pid)).max();
    let mut images = snapshot.images.clone();
    images.sort_unstable();
    Inventory {
        generation: 0,
        numa_nodes: numa_nodes(&host.nodes(), policy, snapshot),
        storage_pools: vec![StoragePool {
            name: POOL.to_owned(),
            physical_bytes: disk.physical_bytes,
            provisioned_bytes: snapshot.provisioned_bytes,
            used_bytes: disk.used_bytes,
        }],
        nics: host.cards(),
        cpu_baseline,
        cpu_model,
        images,
        vm_overhead_bytes: overhead.unwrap_or(0),
        draining: snapshot.drain_reason.is_some(),
        drain_reason: snapshot.drain_reason.clone().unwrap_or_default(),
        fence_generation: snapshot.fence_generation,
    }
}

fn numa_nodes(nodes: &[Node], policy: Policy, snapshot: &Snapshot) -> Vec<NumaNode> {
    let sum = |amount: fn(&serio_api::v1::Allocation) -> u64| {
        snapshot.allocations.iter().map(amount).fold(0, u64::saturating_add)
    };
    let cpus: Vec<u64> = nodes.iter().map(|node| node.cpus).collect();
    let memory: Vec<u64> = nodes.iter().map(|node| node.memory_bytes).collect();
    let vcpus_taken = share(sum(|a| u64::from(a.vcpus)), &cpus);
    let memory_taken = share(sum(|a| a.memory_bytes), &memory);
    let memory_kept = share(policy.reserve_memory, &memory);
    let shares = vcpus_taken.into_iter().zip(memory_taken).zip(memory_kept);
    nodes
        .iter()
        .zip(shares)
        .map(|(node, ((vcpus, taken), kept))| numa_node(node, policy, vcpus, taken, kept))
        .collect()
}

fn numa_node(node: &Node, policy: Policy, vcpus: u64, taken: u64, kept: u64) -> NumaNode {
    // Pages in the huge pool cannot be had as ordinary memory.
    let reserved = kept.saturating_add(node.huge_bytes).min(node.memory_bytes);
    NumaNode {
        id: node.id,
        cpus: Some(Amount {
            total: node.cpus,
            reserved: 0,
            // A float to an integer saturates: no policy makes this wrap.
            allocatable: (node.cpus as f64 * policy.overcommit_vcpu) as u64,
            allocated: vcpus,
        }),
        memory: Some(Amount {
            total: node.memory_bytes,
            reserved,
            allocatable: node.memory_bytes.saturating_sub(reserved),
            allocated: taken,
        }),
        hugepages: Some(Amount {
            total: node.huge_bytes,
            reserved: 0,
            allocatable: node.huge_bytes,
            allocated: node.huge_bytes.saturating_sub(node.huge_free_bytes),
        }),
    }
}

/// Parts of `amount` in proportion to the weights, which sum up to it; all to the first where no weight is known.
fn share(amount: u64, weights: &[u64]) -> Vec<u64> {
    let mut weight_left: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
    let mut left = amount;
    let parts = weights.iter().map(|weight| {
        let part = (u128::from(left) * u128::from(*weight)).checked_div(weight_left);
        // At most `left`, since no weight is more than what is left of them.
        let part = part.map_or(left, |part| part as u64);
        weight_left -= u128::from(*weight);
        left -= part;
        part
    });
    parts.collect()
}

/// Whether the scheduler should hear of it. What moves all the time (disk use, measured overhead) counts only when it
/// has moved by more than a hundredth of the disk, or a quarter of itself.
pub(super) fn differs(old: &Inventory, new: &Inventory) -> bool {
    let moved = |old: &Inventory, new: &Inventory| {
        let pools = old.storage_pools.iter().zip(&new.storage_pools);
        let mut used =
            pools.map(|(old, new)| old.used_bytes.abs_diff(new.used_bytes) > new.physical_bytes / 100);
        let overhead = old.vm_overhead_bytes.abs_diff(new.vm_overhead_bytes) > old.vm_overhead_bytes / 4;
        used.any(|moved| moved) || overhead
    };
    let still = |inventory: &Inventory| {
        let mut still = inventory.clone();
        still.generation = 0;
        still.vm_overhead_bytes = 0;
        still.storage_pools.iter_mut().for_each(|pool| pool.used_bytes = 0);
        still
    };
    still(old) != still(new) || moved(old, new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn parts_sum_up(amount in any::<u64>(), weights in proptest::collection::vec(any::<u64>(), 1..9)) {
            let parts = share(amount, &weights);
            prop_assert_eq!(parts.iter().map(|part| u128::from(*part)).sum::<u128>(), u128::from(amount));
        }
    }

    #[test]
    fn parts_are_in_proportion() {
        assert_eq!(share(10, &[1, 1]), [5, 5]);
        assert_eq!(share(10, &[3, 1]), [7, 3]);
        assert_eq!(share(10, &[0, 0]), [10, 0]);
        assert_eq!(share(10, &[]), [0_u64; 0]);
    }
}
