//! The agent of a simulated node: one real stream, as seriod holds it, with the faults that hosts and networks have.
//!
//! ```text
//!  connect ─▶ Hello ─▶ Welcome ─▶ Inventory, Allocations where they differ ─▶ Lease · Usage and digest · Answers
//!     ▲                                                                        │ churn, partition, any failure
//!     └── pause, full jitter; the leader that is named, or the next scheduler ◀┘
//! ```

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use serio_api::v1::{
    AgentMessage, Allocations, Answer, Hello, Inventory, Lease, SchedulerMessage, Usage, agent_message::What,
    scheduler_message, scheduler_service_client::SchedulerServiceClient,
};
use serio_types::route::{Next, Route, authority};
use tokio::{
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval_at, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming, transport::Endpoint};

use super::chance::Chance;
use crate::error::leader_of;

const PAUSE_MIN_MS: u64 = 500;
const PAUSE_MAX_MS: u64 = 5_000;
const PEER_WAIT: Duration = Duration::from_secs(10);

/// When an agent speaks.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Between leases; each lives three times that.
    pub lease: Duration,
    /// Between usages and digests.
    pub usage: Duration,
    /// A session is ended by its agent's restart about that often; zero: never.
    pub churn: Duration,
    /// A session is cut off for a while about that often; zero: never.
    pub partition: Duration,
}

/// What all agents count together.
#[derive(Debug, Default)]
pub struct Counters {
    /// Streams with a Welcome now.
    pub connected: AtomicUsize,
    /// Streams that got a Welcome, ever.
    pub welcomes: AtomicU64,
    /// Orders that were answered.
    pub answers: AtomicU64,
    /// Agents that restarted.
    pub restarts: AtomicU64,
}

/// What an agent speaks for: a simulated node, or one that a test has broken.
pub trait Peer: Send + Sync + 'static {
    /// Its name.
    fn name(&self) -> &str;
    /// Who it is.
    fn hello(&self) -> Hello;
    /// What it has.
    fn inventory(&self) -> Inventory;
    /// What it has promised; the list, or its digest alone.
    fn allocations(&self, complete: bool) -> Allocations;
    /// Does what the scheduler orders; none for what is no order.
    fn order(&self, message: SchedulerMessage) -> Option<Answer>;
    /// Its agent starts anew.
    fn restart(&self);
}

/// Why a stream ended.
#[derive(Debug)]
enum Ended {
    /// That scheduler does not lead: HOST:PORT of the one that does.
    NotLeader(String),
    /// Anything else.
    Broken(String),
}

impl From<String> for Ended {
    fn from(why: String) -> Self {
        Self::Broken(why)
    }
}

impl From<&str> for Ended {
    fn from(why: &str) -> Self {
        Self::Broken(why.to_owned())
    }
}

impl From<Status> for Ended {
    fn from(status: Status) -> Self {
        leader_of(&status).map_or_else(|| Self::Broken(status.to_string()), Self::NotLeader)
    }
}

/// Holds the stream until told to end. The addresses are those of all schedulers, as HOST:PORT; when they change, the
/// stream is begun anew.
pub async fn run(
    node: Arc<impl Peer>,
    mut addresses: watch::Receiver<Vec<String>>,
    timing: Timing,
    counters: Arc<Counters>,
    mut chance: Chance,
) {
    let mut route = Route::new(addresses.borrow_and_update().clone());
    loop {
        let Some(way) = &mut route else {
            if addresses.changed().await.is_err() {
                return;
            }
            route = Route::new(addresses.borrow_and_update().clone());
            continue;
        };
        let to = way.url().to_owned();
        let mut welcomed = false;
        let session = session(&*node, &to, (timing, &counters, &mut chance), &mut welcomed);
        let ended = tokio::select! {
            ended = session => Some(ended),
            changed = addresses.changed() => if changed.is_err() { return } else { None },
        };
        if welcomed {
            way.welcomed();
            way.held_well();
        }
        let next = match ended {
            Some(Err(Ended::NotLeader(leader))) => way.named(&leader),
            Some(Err(Ended::Broken(error))) => {
                tracing::debug!(node = node.name(), to, error, "the stream ended");
                way.failed()
            }
            Some(Ok(never)) => match never {},
            None => {
                route = Route::new(addresses.borrow_and_update().clone());
                Next::Later(0)
            }
        };
        tokio::time::sleep(pause(next, &mut chance)).await;
    }
}

fn pause(next: Next, chance: &mut Chance) -> Duration {
    let bound = match next {
        Next::AtOnce => 0,
        Next::Soon => PAUSE_MIN_MS,
        Next::Later(rounds) => {
            PAUSE_MIN_MS.saturating_mul(1_u64.checked_shl(rounds).unwrap_or(u64::MAX)).min(PAUSE_MAX_MS)
        }
    };
    Duration::from_millis(chance.below(bound))
}

/// Counts a stream for as long as it lives.
struct Connected<'a>(&'a Counters);

impl<'a> Connected<'a> {
    fn new(counters: &'a Counters) -> Self {
        counters.connected.fetch_add(1, Ordering::Relaxed);
        counters.welcomes.fetch_add(1, Ordering::Relaxed);
        Self(counters)
    }
}

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        self.0.connected.fetch_sub(1, Ordering::Relaxed);
    }
}

type Told = Result<(), Ended>;
/// When it speaks, what it counts, its chance.
type Manner<'a> = (Timing, &'a Counters, &'a mut Chance);

async fn session(
    node: &impl Peer,
    address: &str,
    (timing, counters, chance): Manner<'_>,
    welcomed: &mut bool,
) -> Result<Infallible, Ended> {
    let url = format!("http://{}", authority(address));
    let endpoint = Endpoint::from_shared(url).map_err(|error| error.to_string())?;
    let channel = timeout(PEER_WAIT, endpoint.connect())
        .await
        .map_err(|_| "no connection in time".to_owned())?
        .map_err(|error| error.to_string())?;
    let (sender, receiver) = mpsc::channel(64);
    let out = Out { sender };
    out.send(What::Hello(node.hello())).await?;
    let mut client = SchedulerServiceClient::new(channel);
    let connecting = timeout(PEER_WAIT, client.connect(ReceiverStream::new(receiver))).await;
    let mut incoming = connecting.map_err(|_| "no stream in time")??.into_inner();
    let first = timeout(PEER_WAIT, incoming.message()).await.map_err(|_| "no welcome in time")??;
    let Some(SchedulerMessage { what: Some(scheduler_message::What::Welcome(welcome)) }) = first else {
        return Err(format!("no welcome: {first:?}").into());
    };
    let _connected = Connected::new(counters);
    *welcomed = true;
    let inventory = node.inventory();
    if inventory.generation != welcome.inventory_generation {
        out.send(What::Inventory(inventory)).await?;
    }
    if node.allocations(false).digest != welcome.allocations_digest {
        out.send(What::Allocations(node.allocations(true))).await?;
    }
    talk(node, &out, &mut incoming, (timing, counters, chance)).await
}

async fn talk(
    node: &impl Peer,
    out: &Out,
    incoming: &mut Streaming<SchedulerMessage>,
    (timing, counters, chance): Manner<'_>,
) -> Result<Infallible, Ended> {
    let now = tokio::time::Instant::now();
    // Agents do not speak in step.
    let mut lease = interval_at(now, timing.lease);
    let mut usage = interval_at(now + chance.up_to(timing.usage), timing.usage);
    lease.set_missed_tick_behavior(MissedTickBehavior::Delay);
    usage.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let churn = tokio::time::sleep(chance.about(timing.churn));
    let partition = tokio::time::sleep(chance.about(timing.partition));
    tokio::pin!(churn, partition);
    let ttl_ms = u32::try_from(timing.lease.as_millis().saturating_mul(3)).unwrap_or(u32::MAX);
    let mut sequence = 0_u64;
    loop {
        tokio::select! {
            heard = incoming.message() => {
                let message = heard?.ok_or("closed")?;
                if matches!(message.what, Some(scheduler_message::What::SendAllocations(_))) {
                    out.send(What::Allocations(node.allocations(true))).await?;
                } else {
                    heed(node, out, message, counters).await?;
                }
            }
            _ = lease.tick() => {
                sequence = sequence.wrapping_add(1);
                out.send(What::Lease(Lease { sequence, ttl_ms })).await?;
            }
            _ = usage.tick() => {
                out.send(What::Usage(Usage::default())).await?;
                out.send(What::Allocations(node.allocations(false))).await?;
            }
            () = &mut churn => {
                node.restart();
                counters.restarts.fetch_add(1, Ordering::Relaxed);
                return Err("restarted".into());
            }
            () = &mut partition => {
                // Cut off: neither side hears of the other until TCP or the lease gives up.
                tokio::time::sleep(chance.up_to(timing.lease.saturating_mul(6))).await;
                return Err("was cut off".into());
            }
        }
    }
}

async fn heed(node: &impl Peer, out: &Out, message: SchedulerMessage, counters: &Counters) -> Told {
    let fence = matches!(message.what, Some(scheduler_message::What::Fence(_)));
    let Some(answer) = node.order(message) else { return Ok(()) };
    out.send(What::Answer(answer)).await?;
    counters.answers.fetch_add(1, Ordering::Relaxed);
    if fence {
        out.send(What::Inventory(node.inventory())).await?;
    }
    out.send(What::Allocations(node.allocations(true))).await
}

struct Out {
    sender: mpsc::Sender<AgentMessage>,
}

impl Out {
    async fn send(&self, what: What) -> Told {
        let sent = timeout(PEER_WAIT, self.sender.send(AgentMessage { what: Some(what) })).await;
        sent.map_err(|_| "the scheduler does not read")?.map_err(|_| "closed".into())
    }
}
