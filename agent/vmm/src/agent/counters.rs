//! What this process has counted, as a message.

use serio_control::message::{DiskCounters, NicCounters, OpCounters, PacketCounters, VmCounters};
use serio_devices::count::{OpTotals, PacketTotals};

use crate::devices::{Devices, Disk, Nic};
use crate::machine::Handle;

/// All of it. Nobody is stopped for it: each number is some recent one.
pub(super) fn counters(vm: &Handle, devices: &Devices) -> VmCounters {
    let (vcpus, failed) = vm.counters();
    let disks = devices.disks().iter().map(|one| disk(one)).collect();
    let nics = devices.nics().iter().map(|one| nic(one)).collect();
    VmCounters { vcpus, disks, nics, failed }
}

fn disk(disk: &Disk) -> DiskCounters {
    let totals = disk.counts.totals();
    DiskCounters {
        volume_id: disk.name.clone(),
        reads: Some(op(&totals.reads)),
        writes: Some(op(&totals.writes)),
        flushes: Some(op(&totals.flushes)),
        discards: Some(op(&totals.discards)),
        refused: totals.refused,
    }
}

fn op(totals: &OpTotals) -> OpCounters {
    OpCounters {
        done: totals.done,
        bytes: totals.bytes,
        errors: totals.errors,
        buckets: totals.times.buckets.to_vec(),
        sum_us: totals.times.sum_us,
    }
}

fn nic(nic: &Nic) -> NicCounters {
    let packets = |totals: PacketTotals| PacketCounters {
        packets: totals.packets,
        bytes: totals.bytes,
        drops: totals.drops,
    };
    let totals = nic.counts.totals();
    NicCounters {
        mac: nic.name(),
        received: Some(packets(totals.received)),
        sent: Some(packets(totals.sent)),
        tap: nic.tap().to_owned(),
        pairs_in_kernel: totals.in_kernel.into(),
    }
}
