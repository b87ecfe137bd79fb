//! What VMs have counted, and as text for Prometheus.
//!
//! The VMM is asked once a scrape and answers from memory. What only the host knows is read here: from `/proc` how long the vcpus'
//! threads have run and how long they waited for a processor, and what passed through the cards' taps. [`render`] is a pure function; whoever serves `/metrics`
//! calls it with the names that the state has.

use std::{fmt::Write as _, path::Path};

use serio_control::{
    ChannelError,
    message::{Body, Empty, NicCounters, OpCounters, PacketCounters, VmCounters},
};

use super::{
    TalkError, link,
    vm::{ANSWER_WAIT, VmHandle, peer},
};
use crate::net;

/// The upper bound of the first bucket of request times; each next one is twice the one before.
const FIRST_BOUND_US: u64 = 16;
/// More buckets than any version sends.
const BUCKETS_MAX: usize = 40;

/// What is known of one VM.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct VmCounts {
    /// What its VMM has counted.
    pub counters: VmCounters,
    /// Of all vcpus together.
    pub times: VcpuTimes,
}

/// Times of vcpus' threads since the VM's launch or its last reset.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VcpuTimes {
    /// Nanoseconds on a processor.
    pub run_ns: u64,
    /// Nanoseconds that they could have run and had to wait: what a guest sees as stolen.
    pub steal_ns: u64,
}

/// Whose counters they are.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedCounts {
    /// The vdc's name.
    pub vdc: String,
    /// The VM's name in it.
    pub vm: String,
    /// Its counters.
    pub counts: VmCounts,
}

impl VmHandle {
    /// What the VM has counted.
    ///
    /// # Errors
    /// [`TalkError`]; also from a VMM that an older version started, which does not know the question.
    pub async fn counters(&self) -> Result<VmCounts, TalkError> {
        let body = Body::CountersQuery(Empty {});
        match link::ask(&self.control(), peer(self.pid()), body, ANSWER_WAIT).await? {
            Body::VmCounters(mut counters) => {
                for nic in counters.nics.iter_mut().filter(|nic| net::is_tap_of(self.uid(), &nic.tap)) {
                    count_at_tap(Path::new("/sys/class/net"), nic);
                }
                Ok(VmCounts { counters, times: vcpu_times(self.pid()) })
            }
            _ => Err(ChannelError::Unexpected.into()),
        }
    }
}

/// A card's packets as its tap's interface has counted them: also those that the kernel moved by itself, and those that were lost before
/// they got to the card. Left as they are where the interface is gone.
fn count_at_tap(interfaces: &Path, nic: &mut NicCounters) {
    let statistics = interfaces.join(&nic.tap).join("statistics");
    let number = |name: &str| std::fs::read_to_string(statistics.join(name)).ok()?.trim().parse().ok();
    let direction = |letter: &str| {
        Some(PacketCounters {
            packets: number(&format!("{letter}x_packets"))?,
            bytes: number(&format!("{letter}x_bytes"))?,
            drops: number(&format!("{letter}x_dropped"))?,
        })
    };
    // A tap sends what its guest receives.
    if let (Some(received), Some(sent)) = (direction("t"), direction("r")) {
        (nic.received, nic.sent) = (Some(received), Some(sent));
    }
}

/// Zeros when the process is gone or the kernel keeps no such times.
fn vcpu_times(pid: u32) -> VcpuTimes {
    let mut times = VcpuTimes::default();
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return times };
    for thread in threads.flatten() {
        if let Some(one) = times_of(&thread.path()) {
            times.run_ns = times.run_ns.saturating_add(one.run_ns);
            times.steal_ns = times.steal_ns.saturating_add(one.steal_ns);
        }
    }
    times
}

/// `None`: it is no vcpu, or it has just ended.
fn times_of(thread: &Path) -> Option<VcpuTimes> {
    let name = std::fs::read_to_string(thread.join("comm")).ok()?;
    name.strip_prefix("vcpu")?;
    parse_schedstat(&std::fs::read_to_string(thread.join("schedstat")).ok()?)
}

/// `run wait slices` in nanoseconds (Documentation/scheduler/sched-stats in the kernel's tree).
fn parse_schedstat(text: &str) -> Option<VcpuTimes> {
    let mut numbers = text.split_ascii_whitespace().map(str::parse);
    Some(VcpuTimes { run_ns: numbers.next()?.ok()?, steal_ns: numbers.next()?.ok()? })
}

/// All of it in Prometheus' text format, one family after the other. Nothing for no VMs.
#[must_use]
pub fn render(vms: &[NamedCounts]) -> String {
    let mut text = Text { out: String::new(), vms };
    if !vms.is_empty() {
        text.vcpus();
        text.disks();
        text.nics();
        text.pairs_in_kernel();
        text.failed();
    }
    text.out
}

/// The text as it grows.
struct Text<'a> {
    out: String,
    vms: &'a [NamedCounts],
}

impl Text<'_> {
    /// A family: its head, then the lines of each VM.
    fn family(&mut self, name: &str, kind: &str, help: &str, lines: impl Fn(&VmCounts, &mut Lines<'_>)) {
        // A String takes everything.
        let _ = writeln!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for NamedCounts { vdc, vm, counts } in self.vms {
            let who = format!("vdc=\"{}\",vm=\"{}\"", escape(vdc), escape(vm));
            lines(counts, &mut Lines { out: &mut self.out, name, who });
        }
    }

    fn vcpus(&mut self) {
        let help = "Times that vcpus left the guest for the VMM, since its boot.";
        self.family("serio_vm_exits_total", "counter", help, |counts, lines| {
            for (number, vcpu) in counts.counters.vcpus.iter().enumerate() {
                for (kind, count) in [
                    ("port_read", vcpu.port_reads),
                    ("port_write", vcpu.port_writes),
                    ("memory_read", vcpu.memory_reads),
                    ("memory_write", vcpu.memory_writes),
                    ("kick", vcpu.kicks),
                ] {
                    lines.add("", &format!("vcpu=\"{number}\",kind=\"{kind}\""), count);
                }
            }
        });
        let help = "Time that vcpus ran on a processor of the host.";
        self.family("serio_vm_vcpu_run_seconds_total", "counter", help, |counts, lines| {
            lines.add("", "", seconds(counts.times.run_ns, 1_000_000_000));
        });
        let help = "Time that vcpus waited for a processor of the host.";
        self.family("serio_vm_vcpu_steal_seconds_total", "counter", help, |counts, lines| {
            lines.add("", "", seconds(counts.times.steal_ns, 1_000_000_000));
        });
    }

    fn disks(&mut self) {
        type Number = fn(&OpCounters) -> u64;
        let families: [(&str, &str, Number); 2] = [
            ("serio_vm_disk_bytes_total", "Bytes of requests that were done.", |op| op.bytes),
            ("serio_vm_disk_errors_total", "Requests that failed because of the host.", |op| op.errors),
        ];
        for (name, help, number) in families {
            self.family(name, "counter", help, |counts, lines| {
                each_op(&counts.counters, |labels, op| lines.add("", labels, number(op)));
            });
        }
        let help = "Requests that made no sense to the disk.";
        self.family("serio_vm_disk_refused_total", "counter", help, |counts, lines| {
            for disk in &counts.counters.disks {
                lines.add("", &format!("device=\"{}\"", escape(&disk.volume_id)), disk.refused);
            }
        });
        let help = "Time from the queue to the answer.";
        self.family("serio_vm_disk_request_seconds", "histogram", help, |counts, lines| {
            each_op(&counts.counters, |labels, op| histogram(lines, labels, op));
        });
    }

    fn nics(&mut self) {
        type Number = fn(&PacketCounters) -> u64;
        let families: [(&str, &str, Number); 3] = [
            ("serio_vm_nic_packets_total", "Packets that got through the card.", |counts| counts.packets),
            ("serio_vm_nic_bytes_total", "Their bytes.", |counts| counts.bytes),
            ("serio_vm_nic_drops_total", "Packets that were lost at the card.", |counts| counts.drops),
        ];
        for (name, help, number) in families {
            self.family(name, "counter", help, |counts, lines| {
                for nic in &counts.counters.nics {
                    for (direction, packets) in [("receive", &nic.received), ("send", &nic.sent)] {
                        let labels = format!("device=\"{}\",direction=\"{direction}\"", escape(&nic.mac));
                        lines.add("", &labels, number(&packets.unwrap_or_default()));
                    }
                }
            });
        }
    }

    fn pairs_in_kernel(&mut self) {
        let help = "Queue pairs whose packets the host's kernel moves by itself (vhost-net).";
        self.family("serio_vm_nic_pairs_in_kernel", "gauge", help, |counts, lines| {
            for nic in &counts.counters.nics {
                lines.add("", &format!("device=\"{}\"", escape(&nic.mac)), nic.pairs_in_kernel);
            }
        });
    }

    fn failed(&mut self) {
        let help = "Devices that do not work until the guest resets them.";
        self.family("serio_vm_devices_failed", "gauge", help, |counts, lines| {
            lines.add("", "", counts.counters.failed.len());
        });
    }
}

/// The lines of one VM in one family.
struct Lines<'a> {
    out: &'a mut String,
    name: &'a str,
    who: String,
}

impl Lines<'_> {
    fn add(&mut self, suffix: &str, labels: &str, value: impl std::fmt::Display) {
        let comma = if labels.is_empty() { "" } else { "," };
        // A String takes everything.
        let _ = writeln!(self.out, "{}{suffix}{{{}{comma}{labels}}} {value}", self.name, self.who);
    }
}

fn each_op(counters: &VmCounters, mut act: impl FnMut(&str, &OpCounters)) {
    for disk in &counters.disks {
        let ops = [
            ("read", &disk.reads),
            ("write", &disk.writes),
            ("flush", &disk.flushes),
            ("discard", &disk.discards),
        ];
        for (name, op) in ops {
            if let Some(op) = op {
                act(&format!("device=\"{}\",op=\"{name}\"", escape(&disk.volume_id)), op);
            }
        }
    }
}

/// Cumulative, as Prometheus wants it. The last bucket has no bound.
fn histogram(lines: &mut Lines<'_>, labels: &str, op: &OpCounters) {
    let (mut count, mut bound_us) = (0u64, FIRST_BOUND_US);
    let bounded = op.buckets.len().saturating_sub(1).min(BUCKETS_MAX);
    for bucket in op.buckets.iter().take(bounded) {
        count = count.saturating_add(*bucket);
        lines.add("_bucket", &format!("{labels},le=\"{}\"", seconds(bound_us, 1_000_000)), count);
        bound_us = bound_us.saturating_mul(2);
    }
    let all = op.buckets.iter().fold(0u64, |sum, bucket| sum.saturating_add(*bucket));
    lines.add("_bucket", &format!("{labels},le=\"+Inf\""), all);
    lines.add("_sum", labels, seconds(op.sum_us, 1_000_000));
    lines.add("_count", labels, all);
}

fn seconds(number: u64, a_second: u32) -> f64 {
    // Exact up to 2^53, which is 104 days of nanoseconds; beyond, the error is below a microsecond.
    number as f64 / f64::from(a_second)
}

/// A label's value (Prometheus' text format 0.0.4).
pub(crate) fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
#[path = "counters_test.rs"]
mod tests;
