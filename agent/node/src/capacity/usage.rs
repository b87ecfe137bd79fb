//! How it goes on the host: shares over the last interval, pressure, memory.
//!
//! Owns: the last reading of the counters. What cannot be measured here is absent, never guessed.

use std::time::SystemTime;

use pbjson_types::Timestamp;
use serio_api::v1::Usage;

use super::host::Host;

/// Turns counters into shares.
#[derive(Debug, Default)]
pub(super) struct Sampler {
    last: Option<Ticks>,
}

/// The first line of /proc/stat, in ticks of all processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ticks {
    busy: u64,
    steal: u64,
    total: u64,
}

impl Sampler {
    /// Reads the host; shares are of the time since the last call (since boot, the first time).
    pub(super) fn sample(&mut self, host: &Host, vms_running: u32, now: SystemTime) -> Usage {
        let ticks = host.read("proc/stat").as_deref().and_then(parse_ticks);
        let shares = ticks.map(|ticks| shares(self.last, ticks));
        self.last = ticks.or(self.last);
        Usage {
            time: Some(timestamp(now)),
            cpu_busy: shares.map_or(0.0, |(busy, _)| busy),
            steal: shares.map(|(_, steal)| steal),
            memory_available_bytes: host.meminfo("MemAvailable"),
            cpu_pressure: pressure(host, "cpu"),
            memory_pressure: pressure(host, "memory"),
            io_pressure: pressure(host, "io"),
            vms_running,
            ..Usage::default()
        }
    }
}

/// As protobuf writes a time; before 1970 it is 1970.
pub(super) fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
    }
}

/// proc(5): `cpu user nice system idle iowait irq softirq steal guest guest_nice`; guest is within user.
fn parse_ticks(text: &str) -> Option<Ticks> {
    let line = text.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<u64> =
        line.split_ascii_whitespace().take(8).map_while(|field| field.parse().ok()).collect();
    let [user, nice, system, idle, iowait, irq, softirq, steal] = fields.try_into().ok()?;
    let busy = [user, nice, system, irq, softirq].into_iter().fold(0, u64::saturating_add);
    let total = [busy, idle, iowait, steal].into_iter().fold(0, u64::saturating_add);
    Some(Ticks { busy, steal, total })
}

/// Shares of busy and stolen time, 0 to 1.
fn shares(last: Option<Ticks>, now: Ticks) -> (f64, f64) {
    let since = last.unwrap_or(Ticks { busy: 0, steal: 0, total: 0 });
    // iowait and steal may run backwards (proc(5)).
    let total = now.total.saturating_sub(since.total).max(1) as f64;
    let share = |now: u64, then: u64| (now.saturating_sub(then) as f64 / total).clamp(0.0, 1.0);
    (share(now.busy, since.busy), share(now.steal, since.steal))
}

/// Percent of the last ten seconds in which some task waited (Documentation/accounting/psi.rst).
fn pressure(host: &Host, what: &str) -> Option<f64> {
    let text = host.read(&format!("proc/pressure/{what}"))?;
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    some.split_ascii_whitespace().find_map(|field| field.strip_prefix("avg10=")?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_of_the_last_interval() {
        let first = parse_ticks("cpu  100 0 100 700 50 0 0 50 90 0\ncpu0 1").unwrap();
        assert_eq!(first, Ticks { busy: 200, steal: 50, total: 1000 });
        assert_eq!(shares(None, first), (0.2, 0.05));
        let second = Ticks { busy: 250, steal: 60, total: 1100 };
        assert_eq!(shares(Some(first), second), (0.5, 0.1));
        assert_eq!(shares(Some(second), first), (0.0, 0.0), "counters that run backwards");
        for odd in ["", "cpu", "cpu  1 2 3", "cpu  a b c d e f g h", "intr 7"] {
            assert_eq!(parse_ticks(odd), None, "{odd:?}");
        }
    }
}
