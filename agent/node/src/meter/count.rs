//! From two looks at the host to what each vdc used in between. Pure.
//!
//! What a process counts (processor time, I/O, network) is a counter: the difference to the last look is added; one that runs
//! backwards was reset, and what it shows since is added. What a VM holds (vcpus, memory) is added up over the time in which
//! its process ran, by the clock that counts from the host's boot: the wall clock only names the hour. Time in which seriod was
//! down is made up for at the next look; time in which the host was down is nobody's.
//!
//! Invariants: nothing is ever taken away; nothing is added twice; what is lost is what a process did after the last look
//! before its end, so at most one interval.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serio_store::meter::Amounts;
use serio_types::Name;
use uuid::Uuid;

/// Counters of a process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Raw {
    /// User and system time.
    pub cpu_us: u64,
    /// From disks.
    pub read_bytes: u64,
    /// To disks.
    pub write_bytes: u64,
    /// That reached a disk.
    pub read_ops: Option<u64>,
    /// That reached a disk.
    pub write_ops: Option<u64>,
    /// To the guest.
    pub net_rx_bytes: u64,
    /// From the guest.
    pub net_tx_bytes: u64,
}

fn more(then: u64, now: u64) -> u64 {
    now.checked_sub(then).unwrap_or(now)
}

fn more_of(then: Option<u64>, now: Option<u64>) -> Option<u64> {
    now.map(|now| more(then.unwrap_or(0), now))
}

impl Raw {
    /// What was counted since.
    fn since(self, then: Self) -> Self {
        Self {
            cpu_us: more(then.cpu_us, self.cpu_us),
            read_bytes: more(then.read_bytes, self.read_bytes),
            write_bytes: more(then.write_bytes, self.write_bytes),
            read_ops: more_of(then.read_ops, self.read_ops),
            write_ops: more_of(then.write_ops, self.write_ops),
            net_rx_bytes: more(then.net_rx_bytes, self.net_rx_bytes),
            net_tx_bytes: more(then.net_tx_bytes, self.net_tx_bytes),
        }
    }
}

/// A process that runs a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessLook {
    /// Tells it from every other one of this boot.
    pub key: String,
    /// When it started, milliseconds after boot.
    pub start_ms: u64,
    /// What it has counted.
    pub raw: Raw,
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmLook {
    /// Its id.
    pub uid: Uuid,
    /// Of its guest.
    pub vcpus: u32,
    /// Of its guest.
    pub memory_bytes: u64,
    /// None: it does not run, or cannot be read just now.
    pub process: Option<ProcessLook>,
}

/// A vdc.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VdcLook {
    /// Its id.
    pub uid: Uuid,
    /// Its name.
    pub name: Name,
    /// Promised to its volumes.
    pub storage_bytes: u64,
    /// Its VMs.
    pub vms: Vec<VmLook>,
}

/// The host at one instant.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Look {
    /// Of the host's boot.
    pub boot_id: String,
    /// Milliseconds since then.
    pub boot_ms: u64,
    /// All that there are.
    pub vdcs: Vec<VdcLook>,
}

/// What a VM's process showed when it was last seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    key: String,
    at_ms: u64,
    raw: Raw,
}

/// What the next look goes on from; kept with what was counted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carry {
    boot_id: String,
    at_ms: u64,
    /// In the boot in which the meter was first there: when that was.
    since_ms: u64,
    /// By VM.
    vms: BTreeMap<String, Seen>,
    /// By vdc, what is left below one MiB × s: of memory, of storage, in KiB × ms.
    rest: BTreeMap<String, (u64, u64)>,
}

/// What was used between two looks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counted {
    /// By vdc.
    pub vdcs: Vec<(Uuid, Name, Amounts)>,
    /// Processor time by VM, for the energy: microseconds, and the memory of those that ran.
    pub vms: Vec<(Uuid, Uuid, u64, u64)>,
}

/// KiB × ms in a MiB × s.
const UNIT: u64 = 1024 * 1000;

/// Bytes × ms, into whole MiB × s and the rest.
fn mib_s(bytes: u64, ms: u64, rest: &mut u64) -> u64 {
    let all = u128::from(bytes / 1024) * u128::from(ms) + u128::from(*rest);
    *rest = u64::try_from(all % u128::from(UNIT)).unwrap_or(0);
    u64::try_from(all / u128::from(UNIT)).unwrap_or(u64::MAX)
}

/// Counts what was used since the last look.
pub fn count(carry: &mut Carry, look: &Look) -> Counted {
    let is_first = carry.boot_id.is_empty();
    if carry.boot_id != look.boot_id {
        // Another boot: no process of before lives, and clocks start anew.
        carry.boot_id.clone_from(&look.boot_id);
        carry.since_ms = if is_first { look.boot_ms } else { 0 };
        carry.at_ms = carry.since_ms;
        carry.vms.clear();
    }
    let window = look.boot_ms.saturating_sub(carry.at_ms);
    let mut counted = Counted::default();
    for vdc in &look.vdcs {
        let mut amounts = Amounts { metered_ms: window, ..Amounts::default() };
        let (memory_rest, storage_rest) = carry.rest.entry(vdc.uid.to_string()).or_default();
        amounts.storage_mib_s = mib_s(vdc.storage_bytes, window, storage_rest);
        let mut memory = (0, *memory_rest);
        for vm in &vdc.vms {
            let Some(process) = &vm.process else { continue };
            let (ms, raw) =
                of_process(carry.vms.get(&vm.uid.to_string()), process, look.boot_ms, carry.since_ms);
            amounts.vcpu_ms = amounts.vcpu_ms.saturating_add(ms.saturating_mul(u64::from(vm.vcpus)));
            memory.0 += mib_s(vm.memory_bytes, ms, &mut memory.1);
            amounts = amounts.plus(counters(raw));
            counted.vms.push((vdc.uid, vm.uid, raw.cpu_us, vm.memory_bytes));
            let seen = Seen { key: process.key.clone(), at_ms: look.boot_ms, raw: process.raw };
            carry.vms.insert(vm.uid.to_string(), seen);
        }
        amounts.memory_mib_s = memory.0;
        if let Some(rest) = carry.rest.get_mut(&vdc.uid.to_string()) {
            rest.0 = memory.1;
        }
        counted.vdcs.push((vdc.uid, vdc.name.clone(), amounts));
    }
    let vms: BTreeSet<String> = look.vdcs.iter().flat_map(|v| &v.vms).map(|vm| vm.uid.to_string()).collect();
    let vdcs: BTreeSet<String> = look.vdcs.iter().map(|vdc| vdc.uid.to_string()).collect();
    carry.vms.retain(|vm, _| vms.contains(vm));
    carry.rest.retain(|vdc, _| vdcs.contains(vdc));
    carry.at_ms = carry.at_ms.max(look.boot_ms);
    counted
}

/// How long a process ran since it was last seen, and what it counted.
fn of_process(seen: Option<&Seen>, process: &ProcessLook, now_ms: u64, since_ms: u64) -> (u64, Raw) {
    match seen {
        Some(seen) if seen.key == process.key => {
            (now_ms.saturating_sub(seen.at_ms), process.raw.since(seen.raw))
        }
        // What ran before the meter was there is not metered until it was seen once.
        None if process.start_ms < since_ms => (0, Raw::default()),
        // It began after the last look, or it would have been seen.
        _ => (now_ms.saturating_sub(process.start_ms), process.raw),
    }
}

fn counters(raw: Raw) -> Amounts {
    Amounts {
        cpu_us: raw.cpu_us,
        read_bytes: raw.read_bytes,
        write_bytes: raw.write_bytes,
        read_ops: raw.read_ops,
        write_ops: raw.write_ops,
        net_rx_bytes: raw.net_rx_bytes,
        net_tx_bytes: raw.net_tx_bytes,
        ..Amounts::default()
    }
}
