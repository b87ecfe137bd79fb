//! `serio-scheduler simulate`: a fleet of simulated agents with real streams and real ledgers against one scheduler.
//!
//! ```text
//!  fleet connects ─▶ settled ─▶ for --duration: leases, usages, faults, and clients that place ─▶ storm ─▶ table
//!                                                          (every stream is cut, all agents come back at once)
//! ```
//! Owns: the nodes, the clients, the measuring. Never: what a node or the scheduler decides: both run their real code.

pub mod agent;
mod chance;
mod measure;
pub mod node;

use std::{
    process::{Child, Command, Stdio},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use serio_api::v1::{
    CommitPlacementRequest, PlaceRequest, Placement, ReleasePlacementRequest,
    scheduler_service_client::SchedulerServiceClient,
};
use tokio::{io::AsyncBufReadExt, sync::watch};
use tonic::transport::{Channel, Endpoint};

use agent::{Counters, Timing};
pub use chance::Chance;
use measure::{Latencies, Process};
use node::{Node, Size};

/// What the fleet gets to settle.
const SETTLE_MAX: Duration = Duration::from_secs(120);

/// A fleet of simulated agents against one scheduler, over real connections.
#[derive(Debug, Clone, clap::Args)]
#[command(
    after_help = "Without --scheduler it starts one of its own, and measures its processor time and memory.

Examples:
  serio-scheduler simulate --nodes 200 --duration 10
  serio-scheduler simulate --nodes 2000 --duration 30 --place-rate 50 --storm
  serio-scheduler simulate --nodes 100 --churn 20 --partition 30 --skew 10 --seed 7"
)]
pub struct Options {
    /// How many agents
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=4000))]
    pub nodes: u32,
    /// Seconds of the measured part
    #[arg(long, default_value_t = 10)]
    pub duration: u64,
    /// An agent restarts about every so many seconds, each for itself; 0: never
    #[arg(long, default_value_t = 0)]
    pub churn: u64,
    /// An agent is cut off for a while about every so many seconds; 0: never
    #[arg(long, default_value_t = 0)]
    pub partition: u64,
    /// Nodes' clocks run up to that many per cent too fast or too slow
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=50))]
    pub skew: u32,
    /// Milliseconds between leases; each lives three times that
    #[arg(long, default_value_t = 2000)]
    pub lease_ms: u64,
    /// Milliseconds between usages
    #[arg(long, default_value_t = 10_000)]
    pub usage_ms: u64,
    /// Placements a second
    #[arg(long, default_value_t = 20)]
    pub place_rate: u32,
    /// Then cut all streams at once, and see how long all take to come back
    #[arg(long)]
    pub storm: bool,
    /// Of all chance
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// A scheduler that runs already, without certificates: HOST:PORT
    #[arg(long, value_name = "HOST:PORT")]
    pub scheduler: Option<String>,
    /// Print the results as JSON
    #[arg(long)]
    pub json: bool,
}

/// A scheduler of our own, with its state in a folder that goes with it.
struct Own {
    child: Child,
    folder: std::path::PathBuf,
}

impl Drop for Own {
    fn drop(&mut self) {
        // It may have ended by itself, and the folder with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

async fn start_own() -> anyhow::Result<(Own, String)> {
    let folder = std::env::temp_dir().join(format!("serio-simulate-{}", uuid::Uuid::new_v4()));
    let child = Command::new(std::env::current_exe().context("where is this program?")?)
        .args(["--insecure", "--listen", "127.0.0.1:0", "--state-dir"])
        .arg(&folder)
        .env("RUST_LOG", "warn")
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start a scheduler")?;
    let mut own = Own { child, folder };
    let stderr = own.child.stderr.take().context("it has a standard error")?;
    let mut lines = tokio::io::BufReader::new(tokio::process::ChildStderr::from_std(stderr)?).lines();
    while let Some(line) = lines.next_line().await? {
        if let Some(address) = line.split("address=").nth(1) {
            let address = address.split_whitespace().next().unwrap_or_default().to_owned();
            // What it says later must not fill the pipe.
            tokio::spawn(async move {
                while let Ok(Some(line)) = lines.next_line().await {
                    eprintln!("{line}")
                }
            });
            return Ok((own, address));
        }
    }
    bail!("the scheduler ended before it listened")
}

/// Nodes with their clocks.
#[must_use]
pub fn fleet(count: usize, skew_percent: u32, size: Size, chance: &mut Chance) -> Vec<Arc<Node>> {
    let skew = u64::from(skew_percent);
    (0..count)
        .map(|number| {
            let percent = 100_u64.saturating_sub(skew).saturating_add(chance.below(skew * 2 + 1));
            let rate = f64::from(u32::try_from(percent).unwrap_or(100)) / 100.0;
            Arc::new(Node::new(number, size, rate))
        })
        .collect()
}

/// Runs it, and prints what came of it.
///
/// # Errors
/// When the scheduler cannot be started or reached, or the fleet does not settle.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let (own, address) = match &options.scheduler {
        Some(address) => (None, address.clone()),
        None => {
            let (own, address) = start_own().await?;
            (Some(own), address)
        }
    };
    let process = own.as_ref().map(|own| Process::new(own.child.id()));
    let bare = process.as_ref().and_then(Process::resident).unwrap_or(0);
    let mut chance = Chance::new(options.seed);
    let count = usize::try_from(options.nodes)?;
    let nodes = fleet(count, options.skew, Size::default(), &mut chance);
    let counters = Arc::new(Counters::default());
    let timing = Timing {
        lease: Duration::from_millis(options.lease_ms),
        usage: Duration::from_millis(options.usage_ms),
        churn: Duration::from_secs(options.churn),
        partition: Duration::from_secs(options.partition),
    };
    let (to, at) = watch::channel(vec![address.clone()]);
    let begin = Instant::now();
    for node in &nodes {
        let agent = agent::run(Arc::clone(node), at.clone(), timing, Arc::clone(&counters), chance.fork());
        tokio::spawn(agent);
    }
    let settled = settle(&counters, count).await?;
    eprintln!("seed {}: {count} agents connected in {:.1} s", options.seed, settled.as_secs_f64());
    let before = process.as_ref().and_then(Process::cpu_time);
    let measured = Instant::now();
    let load = load(&address, &options, &mut chance).await?;
    let span = measured.elapsed();
    let busy = process
        .as_ref()
        .and_then(Process::cpu_time)
        .zip(before)
        .map(|(now, before)| now.saturating_sub(before));
    let storm = if options.storm {
        let again = Instant::now();
        to.send(vec![address.clone()]).context("the agents are there")?;
        // They notice in their own time; then all come at once.
        while counters.connected.load(Ordering::Relaxed) > count / 10
            && again.elapsed() < Duration::from_secs(5)
        {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        settle(&counters, count).await?;
        Some(again.elapsed())
    } else {
        None
    };
    let rss = process.as_ref().and_then(Process::resident);
    over_capacity(&nodes)?;
    let rows = measure::rows(&measure::Outcome {
        nodes: count,
        settled,
        span,
        busy,
        bare,
        rss,
        storm,
        load: &load,
        restarts: counters.restarts.load(Ordering::Relaxed),
        answers: counters.answers.load(Ordering::Relaxed),
    });
    eprintln!("ran {:.1} s in all", begin.elapsed().as_secs_f64());
    measure::print(&rows, options.json)
}

async fn settle(counters: &Counters, count: usize) -> anyhow::Result<Duration> {
    let begin = Instant::now();
    // With churn a few are always away.
    let enough = count - count / 20;
    while counters.connected.load(Ordering::Relaxed) < enough {
        ensure!(
            begin.elapsed() < SETTLE_MAX,
            "{} of {count} agents are connected after {} s",
            counters.connected.load(Ordering::Relaxed),
            SETTLE_MAX.as_secs()
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(begin.elapsed())
}

/// No node has promised more than it has.
///
/// # Errors
/// Which has.
pub fn over_capacity(nodes: &[Arc<Node>]) -> anyhow::Result<()> {
    for node in nodes {
        let (open, total) = node.filled();
        ensure!(
            open.vcpus <= total.vcpus && open.memory_bytes <= total.memory_bytes,
            "{} is over capacity: {open:?} of {total:?}",
            node.name
        );
    }
    Ok(())
}

/// What the clients saw.
#[derive(Debug, Default)]
pub struct Load {
    latencies: Latencies,
    failed: u64,
    vetoes: u64,
    first_failure: String,
}

async fn client(address: &str) -> anyhow::Result<SchedulerServiceClient<Channel>> {
    let channel = Endpoint::from_shared(format!("http://{address}"))?.connect().await?;
    Ok(SchedulerServiceClient::new(channel))
}

/// Places at the rate; each is committed and released again after it.
async fn load(address: &str, options: &Options, chance: &mut Chance) -> anyhow::Result<Load> {
    let mut load = Load::default();
    let end = tokio::time::Instant::now() + Duration::from_secs(options.duration);
    if options.place_rate == 0 {
        tokio::time::sleep_until(end).await;
        return Ok(load);
    }
    let client = client(address).await?;
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / options.place_rate);
    let mut running = tokio::task::JoinSet::new();
    while tokio::time::Instant::now() < end {
        ticks.tick().await;
        let request = PlaceRequest {
            request_id: format!("sim-{:016x}", chance.any()),
            vdc: "simulated".to_owned(),
            vcpus: u32::try_from(1 + chance.below(4)).unwrap_or(1),
            memory_bytes: (1 + chance.below(8)) << 30,
            storage_bytes: 10 << 30,
            ..PlaceRequest::default()
        };
        running.spawn(one(client.clone(), request));
        while let Some(done) = running.try_join_next() {
            load.count(done?);
        }
    }
    while let Some(done) = running.join_next().await {
        load.count(done?);
    }
    Ok(load)
}

type Placed = Result<(Duration, Placement), tonic::Status>;

async fn one(mut client: SchedulerServiceClient<Channel>, request: PlaceRequest) -> Placed {
    let begin = Instant::now();
    let placement = client.place(request).await?.into_inner();
    let took = begin.elapsed();
    client.commit_placement(CommitPlacementRequest { name: placement.name.clone() }).await?;
    client.release_placement(ReleasePlacementRequest { name: placement.name.clone() }).await?;
    Ok((took, placement))
}

impl Load {
    fn count(&mut self, placed: Placed) {
        match placed {
            Ok((took, placement)) => {
                self.latencies.add(took);
                self.vetoes = self.vetoes.saturating_add(u64::try_from(placement.vetoes.len()).unwrap_or(0));
            }
            Err(status) => {
                self.failed = self.failed.saturating_add(1);
                if self.first_failure.is_empty() {
                    self.first_failure = status.message().to_owned();
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "simulate_test.rs"]
mod tests;
