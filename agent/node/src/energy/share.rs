//! Whose the energy was. A pure function.
//!
//! The part of processors is shared out by processor time: of all that there was (processors × time), each VM has what its
//! threads ran, the host what else ran, and *idle* what nobody ran. The part of memory is shared out by bytes, the rest of the
//! memory is idle too. An idle processor takes less than a busy one, so this gives VMs rather too little than too much: the idle
//! share is shown apart and never hidden in somebody's bill.
//!
//! Invariant: the parts add up to the whole, exactly.

use uuid::Uuid;

use super::Sample;

/// What a VM had in the interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Consumer {
    /// The VM.
    pub vm: Uuid,
    /// Processor time of its process, microseconds.
    pub cpu_us: u64,
    /// Of its guest.
    pub memory_bytes: u64,
}

/// What the host had in the interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// Processors × time, microseconds.
    pub capacity_us: u64,
    /// Of that, what anything ran, VMs included.
    pub busy_us: u64,
    /// All memory.
    pub memory_bytes: u64,
}

/// Microjoules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Shares {
    /// In the order of the consumers.
    pub vms: Vec<(Uuid, u64)>,
    /// What ran beside VMs.
    pub host: u64,
    /// Nobody's.
    pub idle: u64,
}

/// Shares out. `memory_share` (0 to 1) counts where memory has no sensor of its own.
#[must_use]
#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped to 0..=total"
)]
pub fn share(sample: Sample, host: Host, memory_share: f64, consumers: &[Consumer]) -> Shares {
    let total = sample.total_uj;
    let by_memory = match sample.memory_uj {
        Some(memory) => memory.min(total),
        None => ((total as f64 * memory_share.clamp(0.0, 1.0)) as u64).min(total),
    };
    let by_cpu = total - by_memory;
    let cpu: u128 = consumers.iter().map(|c| u128::from(c.cpu_us)).sum();
    let memory: u128 = consumers.iter().map(|c| u128::from(c.memory_bytes)).sum();
    // Clocks are read one after the other: what they say need not fit.
    let busy = u128::from(host.busy_us).max(cpu);
    let cpu_all = u128::from(host.capacity_us).max(busy).max(1);
    let memory_all = u128::from(host.memory_bytes).max(memory).max(1);
    let part = |of: u64, mine: u128, all: u128| u64::try_from(u128::from(of) * mine / all).unwrap_or(of);
    let vms: Vec<(Uuid, u64)> = consumers
        .iter()
        .map(|c| {
            let by_time = part(by_cpu, u128::from(c.cpu_us), cpu_all);
            (c.vm, by_time.saturating_add(part(by_memory, u128::from(c.memory_bytes), memory_all)))
        })
        .collect();
    let host = part(by_cpu, busy - cpu, cpu_all);
    let given = vms.iter().map(|(_, uj)| *uj).fold(host, u64::saturating_add);
    // Every part was rounded down, so this is not negative; what rounding left is idle.
    Shares { vms, host, idle: total.saturating_sub(given) }
}
