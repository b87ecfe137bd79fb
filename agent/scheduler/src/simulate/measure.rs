//! What was measured, and how it is printed.

use std::time::Duration;

use super::Load;

/// Of calls.
#[derive(Debug, Default)]
pub(super) struct Latencies(Vec<Duration>);

impl Latencies {
    pub(super) fn add(&mut self, took: Duration) {
        self.0.push(took);
    }

    fn percentile(&self, percent: usize) -> Option<Duration> {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let index = sorted.len().saturating_mul(percent).div_ceil(100).saturating_sub(1);
        sorted.get(index).copied()
    }
}

/// A process, by what the kernel says of it.
#[derive(Debug)]
pub(super) struct Process(u32);

/// Of /proc/PID/stat on Linux: USER_HZ is 100 on every architecture that we run on.
const TICK: Duration = Duration::from_millis(10);

impl Process {
    pub(super) const fn new(pid: u32) -> Self {
        Self(pid)
    }

    /// User and system time so far (proc(5): fields 14 and 15, after the name in brackets).
    pub(super) fn cpu_time(&self) -> Option<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0)).ok()?;
        let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
        let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<u32>().ok());
        TICK.checked_mul(ticks(11)?.checked_add(ticks(12)?)?)
    }

    /// Resident bytes.
    pub(super) fn resident(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
    }
}

/// Everything.
pub(super) struct Outcome<'a> {
    pub(super) nodes: usize,
    pub(super) settled: Duration,
    pub(super) span: Duration,
    pub(super) busy: Option<Duration>,
    pub(super) bare: u64,
    pub(super) rss: Option<u64>,
    pub(super) storm: Option<Duration>,
    pub(super) load: &'a Load,
    pub(super) restarts: u64,
    pub(super) answers: u64,
}

/// A line of the table.
#[derive(Debug, serde::Serialize)]
pub(super) struct Row {
    case: &'static str,
    value: f64,
    unit: &'static str,
}

#[allow(clippy::cast_precision_loss, reason = "for people")]
pub(super) fn rows(outcome: &Outcome<'_>) -> Vec<Row> {
    let load = outcome.load;
    let mut rows = Vec::new();
    let mut row = |case, value, unit| rows.push(Row { case, value, unit });
    row("agents", outcome.nodes as f64, "");
    row("all connected after", outcome.settled.as_secs_f64(), "s");
    row("placements", load.latencies.0.len() as f64, "");
    row("placements that failed", load.failed as f64, "");
    row("vetoes", load.vetoes as f64, "");
    for (case, percent) in [("Place, median", 50), ("Place, p99", 99), ("Place, longest", 100)] {
        if let Some(took) = load.latencies.percentile(percent) {
            row(case, took.as_secs_f64() * 1000.0, "ms");
        }
    }
    row("orders answered", outcome.answers as f64, "");
    row("agents restarted", outcome.restarts as f64, "");
    if let Some(busy) = outcome.busy {
        row("scheduler's share of a core", busy.as_secs_f64() / outcome.span.as_secs_f64() * 100.0, "%");
    }
    if let Some(rss) = outcome.rss {
        row("scheduler's memory", rss as f64 / 1_048_576.0, "MiB");
        row(
            "its memory per node",
            rss.saturating_sub(outcome.bare) as f64 / 1024.0 / outcome.nodes as f64,
            "KiB",
        );
    }
    if let Some(storm) = outcome.storm {
        row("all back after a storm", storm.as_secs_f64(), "s");
    }
    rows
}

#[allow(clippy::print_stdout, reason = "the result of the command")]
pub(super) fn print(rows: &[Row], json: bool) -> anyhow::Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(rows)?)?;
        return Ok(());
    }
    for row in rows {
        writeln!(out, "{:<30} {:>12.2} {}", row.case, row.value, row.unit)?;
    }
    Ok(())
}
