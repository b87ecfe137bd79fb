//! What a vdc is promised beside its amounts: its share when all want more than there is, and the caps on what it may take.

use serde::{Deserialize, Serialize};

/// Shares and caps of a vdc. 0 is no cap, and for the weight: by its vcpus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VdcLimits {
    /// Its part of processors and disks when all are busy, against the others' weights; 100 for each vcpu of its quota when 0.
    pub weight: u32,
    /// Processor time that it may take at most, percent of one processor: 250 is two and a half.
    pub burst_percent: u32,
    /// Reads a second, and as many writes, on the node's disk.
    pub iops: u64,
    /// Bytes a second read, and as many written, on the node's disk.
    pub bandwidth_bytes: u64,
    /// Snapshots of its volumes that may be kept.
    pub snapshots: u32,
}

impl VdcLimits {
    /// The weight of one vcpu; cgroup v2 gives a group 100 when nothing is said.
    pub const WEIGHT_PER_VCPU: u64 = 100;
    /// The most that cgroup v2 takes.
    pub const WEIGHT_MAX: u32 = 10_000;

    /// The weight that counts, 1 to 10000, of a vdc with so many vcpus.
    #[must_use]
    pub fn weight_of(&self, vcpus: u64) -> u32 {
        let by_vcpus =
            || u32::try_from(vcpus.saturating_mul(Self::WEIGHT_PER_VCPU)).unwrap_or(Self::WEIGHT_MAX);
        let weight = if self.weight == 0 { by_vcpus() } else { self.weight };
        weight.clamp(1, Self::WEIGHT_MAX)
    }
}
