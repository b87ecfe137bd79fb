//! The stream to the scheduler: Hello first, then what changes, as it changes.
//!
//! ```text
//!            connect ──▶ Hello ──▶ (Welcome) ──▶ Inventory, Allocations where the scheduler's differ
//!   ▲                      │ NOT_LEADER             │
//!   │ the one that leads ◀─┘                        ▼   Inventory on change · Usage and digest each interval
//!   │ the next one, after a pause                Lease · Allocations on change or when asked
//!   └───── (0.5 s doubling to 30 s, full jitter) ◀── any failure
//! ```
//!
//! Owns: the connection and its pauses. Never: what is said (that is `Shared`), and which scheduler is next (that is
//! [`Route`]). Each send and the Welcome have a deadline, so a scheduler that stops reading is a failure like any other.
//! While a region looks for its next leader the one that follows is asked again over the same connection: no handshake
//! of two thousand nodes each second. Certificates are read anew for each connection.

use std::{convert::Infallible, error::Error, fs, path::Path, sync::Arc, time::Duration};

use rand::Rng;
use serio_api::v1::{
    AgentMessage, Allocations, Lease, SchedulerMessage, Welcome, agent_message::What,
    scheduler_message::What as Said, scheduler_service_client::SchedulerServiceClient,
};
use serio_types::route::{Next, Route};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Streaming,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use tonic_types::StatusExt;

use super::{
    Shared,
    digest::digest,
    orders::{self, Carrier},
};

const PAUSE_MIN: Duration = Duration::from_millis(500);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// While a region looks for its next leader, which takes it a few seconds.
const PAUSE_SOON: Duration = Duration::from_secs(1);
/// A connection that held for so long was a good one: the next pause is short again.
const HELD_WELL: Duration = Duration::from_secs(30);
/// For a TCP connection: a host that is gone does not answer, and another scheduler may lead.
const CONNECT_WAIT: Duration = Duration::from_secs(3);
/// For the Welcome, for a TLS handshake, for each send.
const PEER_WAIT: Duration = Duration::from_secs(10);
/// HTTP/2 pings, so that a scheduler whose host is gone is noticed.
const PING: Duration = Duration::from_secs(10);
/// Messages under way; one that does not fit waits, and past `PEER_WAIT` the connection is given up.
const QUEUE: usize = 16;
/// Orders under way; more wait in the stream.
const ORDERS_MAX: usize = 64;
/// A lease outlives that many intervals: two may be lost.
const LEASE_INTERVALS: u32 = 3;

/// `google.rpc.ErrorInfo` of a scheduler that follows: its reason, and the key of the leader's HOST:PORT.
const NOT_LEADER: &str = "NOT_LEADER";
const LEADER: &str = "leader";

/// Why a connection ended or was not made.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("the scheduler's address {url} is not a URL")]
    Url { url: String, source: tonic::transport::Error },
    #[error("cannot read {path}")]
    Certificate { path: std::path::PathBuf, source: std::io::Error },
    #[error("cannot connect to the scheduler at {url}")]
    Connect { url: String, source: tonic::transport::Error },
    #[error("the scheduler refused or broke off")]
    Stream(#[source] Box<tonic::Status>),
    #[error("the scheduler there does not lead: {}", if .0.is_empty() { "nobody does at the moment" } else { .0 })]
    NotLeader(String),
    #[error("the scheduler closed the connection")]
    Closed,
    #[error("the scheduler did not answer within {} s", PEER_WAIT.as_secs())]
    Silent,
    #[error("the scheduler's first answer was not a Welcome")]
    NoWelcome,
}

impl From<tonic::Status> for LinkError {
    fn from(status: tonic::Status) -> Self {
        let info = status.get_details_error_info().filter(|info| info.reason == NOT_LEADER);
        match info {
            Some(mut info) => Self::NotLeader(info.metadata.remove(LEADER).unwrap_or_default()),
            None => Self::Stream(Box::new(status)),
        }
    }
}

/// Where the link goes, and what is kept of it from one attempt to the next.
struct Link {
    route: Route,
    /// A connection to a scheduler that follows.
    open: Option<(String, Channel)>,
}

/// Holds the link for ever.
pub(super) async fn run(shared: Arc<Shared>, route: Route) {
    let mut link = Link { route, open: None };
    loop {
        let start = Instant::now();
        let url = link.route.url().to_owned();
        let error = match session(&shared, &mut link).await {
            Ok(never) => match never {},
            Err(error) => error,
        };
        if start.elapsed() >= HELD_WELL {
            link.route.held_well();
        }
        let text = chain(&error);
        let next = if let LinkError::NotLeader(leader) = &error {
            tracing::info!(url, leader, "the scheduler there does not lead");
            link.route.named(leader)
        } else {
            link.open = None;
            link.route.failed()
        };
        if next == Next::Later(0) {
            tracing::warn!(url, error = text, "the scheduler is not reached: trying again");
        }
        shared.link_changed(link.route.url(), false, text);
        let pause = pause(next, &mut rand::rng());
        tokio::time::sleep(pause).await;
    }
}

/// Full jitter: anything between nothing and a bound, which doubles where nobody answers.
fn pause(next: Next, random: &mut impl Rng) -> Duration {
    let bound = match next {
        Next::AtOnce => Duration::ZERO,
        Next::Soon => PAUSE_SOON,
        Next::Later(rounds) => {
            PAUSE_MIN.saturating_mul(1_u32.checked_shl(rounds).unwrap_or(u32::MAX)).min(PAUSE_MAX)
        }
    };
    bound.mul_f64(random.random::<f64>())
}

fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

async fn connect(shared: &Shared, url: &str) -> Result<Channel, LinkError> {
    let endpoint = Endpoint::from_shared(url.to_owned())
        .map_err(|source| LinkError::Url { url: url.to_owned(), source })?
        .connect_timeout(CONNECT_WAIT)
        .http2_keep_alive_interval(PING)
        .keep_alive_timeout(PING)
        .keep_alive_while_idle(true);
    let connect = |source| LinkError::Connect { url: url.to_owned(), source };
    let endpoint = match &shared.settings.tls_dir {
        Some(dir) if url.starts_with("https:") => endpoint.tls_config(tls(dir)?).map_err(connect)?,
        _ => endpoint,
    };
    match timeout(PEER_WAIT, endpoint.connect()).await {
        Ok(channel) => channel.map_err(connect),
        Err(_) => Err(LinkError::Silent),
    }
}

fn tls(dir: &Path) -> Result<ClientTlsConfig, LinkError> {
    let read = |name: &str| {
        let path = dir.join(name);
        fs::read(&path).map_err(|source| LinkError::Certificate { path, source })
    };
    let identity = Identity::from_pem(read("client-cert.pem")?, read("client-key.pem")?);
    Ok(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read("ca-cert.pem")?)).identity(identity))
}

/// One stream, from Hello to its end, which is always an error.
async fn session(shared: &Shared, link: &mut Link) -> Result<Infallible, LinkError> {
    let url = link.route.url().to_owned();
    let channel = match link.open.take().filter(|(to, _)| *to == url) {
        Some((_, channel)) => channel,
        None => connect(shared, &url).await?,
    };
    link.open = Some((url.clone(), channel.clone()));
    let (sender, receiver) = mpsc::channel(QUEUE);
    let mut out = Out { sender, lease: 0, digest: String::new(), inventory_generation: 0 };
    out.send(What::Hello(shared.hello())).await?;
    let mut client = SchedulerServiceClient::new(channel);
    let mut incoming = within(client.connect(ReceiverStream::new(receiver))).await??.into_inner();
    let welcome = welcome(&mut incoming).await?;
    link.route.welcomed();
    tracing::info!(url, scheduler = welcome.scheduler_id, "connected to the scheduler");
    shared.link_changed(&url, true, String::new());
    let carrier = Carrier {
        state: shared.state.clone(),
        trail: shared.trail.clone(),
        node: format!("nodes/{}", shared.settings.node_name),
        who: format!("scheduler {} at {url}", welcome.scheduler_id),
    };
    talk(shared, &mut out, &mut incoming, (welcome, carrier)).await
}

async fn within<T>(future: impl Future<Output = T>) -> Result<T, LinkError> {
    timeout(PEER_WAIT, future).await.map_err(|_| LinkError::Silent)
}

async fn welcome(incoming: &mut Streaming<SchedulerMessage>) -> Result<Welcome, LinkError> {
    match within(incoming.message()).await?? {
        Some(SchedulerMessage { what: Some(Said::Welcome(welcome)) }) => Ok(welcome),
        Some(_) => Err(LinkError::NoWelcome),
        None => Err(LinkError::Closed),
    }
}

async fn talk(
    shared: &Shared,
    out: &mut Out,
    incoming: &mut Streaming<SchedulerMessage>,
    (welcome, carrier): (Welcome, Carrier),
) -> Result<Infallible, LinkError> {
    let mut changes = shared.changes.subscribe();
    let mut usage = interval(shared.settings.usage_interval);
    let mut lease = interval(shared.settings.lease_interval);
    // After a pause of the whole host: one message, not one for each interval missed.
    usage.set_missed_tick_behavior(MissedTickBehavior::Delay);
    lease.set_missed_tick_behavior(MissedTickBehavior::Delay);
    out.inventory_generation = welcome.inventory_generation;
    out.digest = welcome.allocations_digest;
    out.lease(shared).await?;
    out.what_changed(shared).await?;
    // With the connection go those that wait for their answer: what they have done stays, and is in the allocations.
    let mut orders = JoinSet::new();
    loop {
        tokio::select! {
            said = incoming.message(), if orders.len() < ORDERS_MAX => match said?.ok_or(LinkError::Closed)?.what {
                Some(Said::SendAllocations(_)) => out.allocations(shared, true).await?,
                Some(said) => if let Some(order) = orders::parse(said) {
                    orders.spawn(orders::carry_out(carrier.clone(), order, shared.inventory().generation));
                },
                // What a newer scheduler says.
                None => {}
            },
            Some(answer) = orders.join_next(), if !orders.is_empty() => {
                out.send(What::Answer(answer.map_err(|_| LinkError::Closed)?)).await?;
            }
            _ = changes.changed() => out.what_changed(shared).await?,
            _ = lease.tick() => out.lease(shared).await?,
            _ = usage.tick() => {
                out.send(What::Usage(shared.usage())).await?;
                out.allocations(shared, false).await?;
            }
        }
    }
}

/// The sending side, with what the scheduler has of us.
struct Out {
    sender: mpsc::Sender<AgentMessage>,
    lease: u64,
    digest: String,
    inventory_generation: u64,
}

impl Out {
    async fn send(&mut self, what: What) -> Result<(), LinkError> {
        let message = AgentMessage { what: Some(what) };
        within(self.sender.send(message)).await?.map_err(|_| LinkError::Closed)
    }

    async fn lease(&mut self, shared: &Shared) -> Result<(), LinkError> {
        self.lease += 1;
        let ttl = shared.settings.lease_interval.saturating_mul(LEASE_INTERVALS);
        let ttl_ms = u32::try_from(ttl.as_millis()).unwrap_or(u32::MAX);
        self.send(What::Lease(Lease { sequence: self.lease, ttl_ms })).await
    }

    /// What the scheduler does not have yet.
    async fn what_changed(&mut self, shared: &Shared) -> Result<(), LinkError> {
        let inventory = shared.inventory();
        if inventory.generation != self.inventory_generation {
            self.inventory_generation = inventory.generation;
            self.send(What::Inventory(inventory)).await?;
        }
        let current = digest(&shared.allocations());
        if current != self.digest { self.allocations(shared, true).await } else { Ok(()) }
    }

    /// The list, or its digest alone where that is not asked for and the scheduler has the list.
    async fn allocations(&mut self, shared: &Shared, asked: bool) -> Result<(), LinkError> {
        let allocations = shared.allocations();
        let current = digest(&allocations);
        let complete = asked || current != self.digest;
        self.digest = current;
        let message = Allocations {
            digest: self.digest.clone(),
            allocations: if complete { allocations } else { Vec::new() },
            complete,
        };
        self.send(What::Allocations(message)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_are_spread() {
        let mut random = rand::rng();
        for rounds in [0, 1, 6, 7, 31, 32, u32::MAX] {
            let bound =
                PAUSE_MIN.saturating_mul(1_u32.checked_shl(rounds).unwrap_or(u32::MAX)).min(PAUSE_MAX);
            let pauses: Vec<Duration> = (0..64).map(|_| pause(Next::Later(rounds), &mut random)).collect();
            assert!(pauses.iter().all(|pause| *pause <= bound));
            assert!(
                pauses.iter().any(|pause| *pause > bound / 2)
                    && pauses.iter().any(|pause| *pause < bound / 2)
            );
        }
        assert_eq!(pause(Next::AtOnce, &mut random), Duration::ZERO);
        assert!((0..64).all(|_| pause(Next::Soon, &mut random) <= PAUSE_SOON));
        assert_eq!(PAUSE_MIN.saturating_mul(64).min(PAUSE_MAX), PAUSE_MAX);
    }
}
