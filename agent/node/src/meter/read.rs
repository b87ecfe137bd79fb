//! Looking at the processes of VMs, below a given root: /proc, the cgroup's io.stat, the taps' statistics.
//!
//! Owns: the readers. A file that is missing or odd costs the number that it would have given, nothing else.

use std::{
    fs,
    path::{Path, PathBuf},
};

use uuid::Uuid;

use super::count::{Look, ProcessLook, Raw, VdcLook, VmLook};
use crate::{
    net::tap_name,
    state::holdings::{Holdings, VmHolding},
};

/// Milliseconds in a tick of /proc: USER_HZ is 100 on this architecture (proc(5)).
const TICK_MS: u64 = 10;

/// Where a VM's cgroup is.
pub(super) type GroupOf<'a> = &'a dyn Fn(Uuid) -> Option<PathBuf>;

/// What the host did since boot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct HostTimes {
    /// All processors' time.
    pub(super) capacity_us: u64,
    /// Of that, not idle.
    pub(super) busy_us: u64,
    /// MemTotal.
    pub(super) memory_bytes: u64,
}

fn text(path: PathBuf) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// All vdcs as they are.
pub(super) fn look(root: &Path, holdings: &Holdings, group_of: GroupOf<'_>) -> Option<Look> {
    let uptime = text(root.join("proc/uptime"))?;
    let seconds: f64 = uptime.split_ascii_whitespace().next()?.parse().ok()?;
    let boot_id = text(root.join("proc/sys/kernel/random/boot_id"))?.trim().to_owned();
    let vdcs = holdings.vdcs.iter().map(|vdc| VdcLook {
        uid: vdc.uid,
        name: vdc.name.clone(),
        storage_bytes: vdc.storage_bytes,
        vms: vdc.vms.iter().map(|vm| look_at(root, vm, group_of)).collect(),
    });
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a saturating cast")]
    let boot_ms = (seconds * 1000.0) as u64;
    Some(Look { boot_id, boot_ms, vdcs: vdcs.collect() })
}

fn look_at(root: &Path, vm: &VmHolding, group_of: GroupOf<'_>) -> VmLook {
    let process = vm.pid.and_then(|pid| process(root, vm, pid, group_of));
    VmLook { uid: vm.uid, vcpus: vm.vcpus, memory_bytes: vm.memory_bytes, process }
}

fn process(root: &Path, vm: &VmHolding, pid: u32, group_of: GroupOf<'_>) -> Option<ProcessLook> {
    let dir = root.join("proc").join(pid.to_string());
    let (cpu_us, start_ticks) = parse_stat(&text(dir.join("stat"))?)?;
    let io = text(dir.join("io")).unwrap_or_default();
    let ops = group_of(vm.uid).and_then(|group| text(group.join("io.stat"))).map(|stat| operations(&stat));
    let mut raw = Raw {
        cpu_us,
        read_bytes: field(&io, "read_bytes:"),
        write_bytes: field(&io, "write_bytes:").saturating_sub(field(&io, "cancelled_write_bytes:")),
        read_ops: ops.map(|(reads, _)| reads),
        write_ops: ops.map(|(_, writes)| writes),
        ..Raw::default()
    };
    for index in 0..vm.nics {
        let statistics = root.join("sys/class/net").join(tap_name(vm.uid, index)).join("statistics");
        let count = |name: &str| {
            text(statistics.join(name)).and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0)
        };
        // A tap receives what its guest sends.
        raw.net_tx_bytes = raw.net_tx_bytes.saturating_add(count("rx_bytes"));
        raw.net_rx_bytes = raw.net_rx_bytes.saturating_add(count("tx_bytes"));
    }
    let start_ms = start_ticks.saturating_mul(TICK_MS);
    Some(ProcessLook { key: format!("{pid}:{start_ticks}"), start_ms, raw })
}

/// Processor time in microseconds, and when it started in ticks. The name in field 2 may hold anything, so fields count from
/// after its last `)`.
fn parse_stat(text: &str) -> Option<(u64, u64)> {
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    // The first of these is field 3; utime is 14, stime 15, starttime 22.
    let number = |field: usize| fields.get(field.checked_sub(3)?)?.parse::<u64>().ok();
    let ticks = number(14)?.saturating_add(number(15)?);
    Some((ticks.saturating_mul(TICK_MS * 1000), number(22)?))
}

fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

/// Reads and writes of all devices (cgroup-v2, io.stat: `8:0 rbytes=1 wbytes=2 rios=3 wios=4 …`).
fn operations(stat: &str) -> (u64, u64) {
    let sum = |name: &str| {
        let values =
            stat.split_ascii_whitespace().filter_map(|word| word.strip_prefix(name)?.parse::<u64>().ok());
        values.fold(0, u64::saturating_add)
    };
    (sum("rios="), sum("wios="))
}

/// What the host's processors did.
pub(super) fn host_times(root: &Path) -> Option<HostTimes> {
    let stat = text(root.join("proc/stat"))?;
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<u64> = line.split_ascii_whitespace().take(8).map_while(|f| f.parse().ok()).collect();
    let [user, nice, system, idle, iowait, irq, softirq, steal] = fields.try_into().ok()?;
    let us = |ticks: u64| ticks.saturating_mul(TICK_MS * 1000);
    let busy = [user, nice, system, irq, softirq, steal].into_iter().fold(0, u64::saturating_add);
    let all = busy.saturating_add(idle).saturating_add(iowait);
    let memory = text(root.join("proc/meminfo")).unwrap_or_default();
    let memory = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap_or_default();
    let kib: u64 = memory.trim().trim_end_matches("kB").trim().parse().unwrap_or(0);
    Some(HostTimes { capacity_us: us(all), busy_us: us(busy), memory_bytes: kib.saturating_mul(1024) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn a_process_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let uid = Uuid::new_v4();
        put(root, "proc/7/stat", "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 150 50 7 8 20 0 1 0 4242 1 2");
        put(
            root,
            "proc/7/io",
            "rchar: 1\nread_bytes: 4096\nwrite_bytes: 8192\ncancelled_write_bytes: 4096\n",
        );
        put(
            root,
            "group/io.stat",
            "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n8:16 rios=10 wios=20\n",
        );
        let tap = format!("sys/class/net/{}/statistics", tap_name(uid, 0));
        put(root, &format!("{tap}/rx_bytes"), "100\n");
        put(root, &format!("{tap}/tx_bytes"), "200\n");
        let vm =
            VmHolding { uid, name: "web".parse().unwrap(), vcpus: 1, memory_bytes: 1, nics: 1, pid: Some(7) };
        let group = root.join("group");
        let found = process(root, &vm, 7, &|_| Some(group.clone())).unwrap();
        assert_eq!((found.key.as_str(), found.start_ms), ("7:4242", 42_420));
        let raw = Raw {
            cpu_us: 2_000_000,
            read_bytes: 4096,
            write_bytes: 4096,
            read_ops: Some(13),
            write_ops: Some(24),
            net_rx_bytes: 200,
            net_tx_bytes: 100,
        };
        assert_eq!(found.raw, raw);
        assert_eq!(process(root, &vm, 7, &|_| None).unwrap().raw.read_ops, None, "not measured");
        assert!(process(root, &vm, 8, &|_| None).is_none());
        assert!(look(root, &Holdings::default(), &|_| None).is_none(), "no clock");
    }

    #[test]
    fn this_host_is_read() {
        let look = look(Path::new("/"), &Holdings::default(), &|_| None).unwrap();
        assert!(look.boot_ms > 0 && !look.boot_id.is_empty());
        let times = host_times(Path::new("/")).unwrap();
        assert!(times.capacity_us >= times.busy_us && times.memory_bytes > 0);
    }
}
