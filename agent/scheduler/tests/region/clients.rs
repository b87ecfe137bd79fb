//! The clients: each places, commits, gives back or keeps, and dies in the middle of any of that; sometimes another one goes
//! on with what it left. What they ask and hear is the history that the judge reads.
//!
//! A call that fails is repeated with the same request id, with whoever leads then, until it is answered: what it meant was
//! done at most once. A client that dies drops its call while the schedulers may still work on it.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use serio_api::v1::{
    CommitPlacementRequest, PlaceRequest, Placement, PlacementState, ReleasePlacementRequest,
    scheduler_service_client::SchedulerServiceClient,
};
use serio_scheduler::{error::leader_of, simulate::Chance};
use serio_types::route::{Next, Route};
use tokio::sync::watch;
use tonic::{Code, Status, transport::Channel};

use crate::{
    judge::{At, Call, History, Life, Op},
    processes::connect,
};

/// A call is repeated for that long: where clients wait for each other, one that wants much may wait for minutes.
const PATIENCE: Duration = Duration::from_secs(240);
/// Uncommitted, a placement lives that long: a region's next leader is there by then, mostly.
const TTL_MS: u32 = 4_000;

/// What the clients share.
pub(crate) struct Scene {
    begin: Instant,
    pub(crate) addresses: watch::Receiver<Vec<String>>,
    pub(crate) history: Mutex<History>,
    /// Answers that cannot be meant.
    pub(crate) strange: Mutex<Vec<String>>,
    /// Requests that nobody has begun.
    pub(crate) left: AtomicU64,
    /// Vcpus that may be kept to the end.
    pub(crate) to_keep: AtomicU64,
    /// Calls that were repeated, and clients that died.
    pub(crate) repeated: AtomicU64,
    pub(crate) died: AtomicU64,
}

impl Scene {
    pub(crate) fn new(addresses: watch::Receiver<Vec<String>>, requests: u64, to_keep: u64) -> Self {
        Self {
            begin: Instant::now(),
            addresses,
            history: Mutex::default(),
            strange: Mutex::default(),
            left: AtomicU64::new(requests),
            to_keep: AtomicU64::new(to_keep),
            repeated: AtomicU64::new(0),
            died: AtomicU64::new(0),
        }
    }

    pub(crate) fn now(&self) -> At {
        self.begin.elapsed()
    }

    fn note(&self, id: &str, ops: impl IntoIterator<Item = Op>) {
        self.history.lock().unwrap().entry(id.to_owned()).or_default().ops.extend(ops);
    }

    fn placed(&self, id: &str, placement: &Placement) {
        let node = placement.node.strip_prefix("nodes/").unwrap_or_default().to_owned();
        let place = (node, placement.token.clone());
        let mut history = self.history.lock().unwrap();
        let request = history.entry(id.to_owned()).or_default();
        if !request.places.contains(&place) {
            request.places.push(place);
        }
    }

    fn keeps(&self, vcpus: u64) -> bool {
        self.to_keep
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(vcpus))
            .is_ok()
    }
}

/// How far a placement is.
pub(crate) fn life(placement: &Placement) -> Life {
    match placement.state() {
        PlacementState::Reserved => Life::Reserved,
        PlacementState::Committed => Life::Committed,
        PlacementState::Releasing => Life::Releasing,
        PlacementState::Released => Life::Released,
        PlacementState::Unspecified => Life::None,
    }
}

/// What a status means to the one who called.
enum Meaning {
    /// Commit: too late.
    Over,
    /// To be repeated there, or with another one.
    Again(Next),
    /// It cannot be meant.
    Strange,
}

/// See the head of this file.
pub(crate) struct Client {
    scene: Arc<Scene>,
    addresses: watch::Receiver<Vec<String>>,
    route: Route,
    to: String,
    connection: SchedulerServiceClient<Channel>,
    calling: Call,
    chance: Chance,
}

impl Client {
    pub(crate) fn new(scene: Arc<Scene>, chance: Chance) -> Self {
        let mut addresses = scene.addresses.clone();
        let route = Route::new(addresses.borrow_and_update().clone()).unwrap();
        let to = route.url().to_owned();
        let connection = connect(&to);
        Self { scene, addresses, route, to, connection, calling: Call::Place, chance }
    }

    /// Until there are no requests left.
    pub(crate) async fn run(mut self) {
        loop {
            let next = |left: u64| left.checked_sub(1);
            let Ok(number) = self.scene.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next) else {
                return;
            };
            let id = format!("r{number}");
            let vcpus = 1 + self.chance.below(4);
            self.scene.history.lock().unwrap().entry(id.clone()).or_default().vcpus = vcpus;
            // One that dies has an heir, who begins anew with the same id; without one, what was only placed ends by itself.
            while self.live(&id, vcpus).await.is_none() {
                if self.calling == Call::Place && self.chance.one_in(2) {
                    break;
                }
            }
        }
    }

    /// None: died.
    async fn live(&mut self, id: &str, vcpus: u64) -> Option<()> {
        let mut life = self.told(Call::Place, id, vcpus).await?;
        tokio::time::sleep(self.chance.up_to(Duration::from_millis(20))).await;
        if life == Life::Reserved {
            if self.chance.one_in(20) {
                // Nobody commits: it ends by itself.
                return Some(());
            }
            let call = if self.chance.one_in(20) { Call::Release } else { Call::Commit };
            life = self.told(call, id, vcpus).await?;
        }
        if life == Life::Committed && !(self.chance.one_in(6) && self.scene.keeps(vcpus)) {
            self.told(Call::Release, id, vcpus).await?;
        }
        Some(())
    }

    /// What the region says of it; none when this client dies.
    async fn told(&mut self, call: Call, id: &str, vcpus: u64) -> Option<Life> {
        let invoked = self.scene.now();
        self.calling = call;
        // When something may have been done whose answer nobody heard.
        let mut unheard: Option<At> = None;
        let mut last = String::new();
        while self.scene.now().saturating_sub(invoked) < PATIENCE {
            let begun = self.scene.now();
            let lost = |from| Op { call, invoked: from, answer: None };
            if self.chance.one_in(40) {
                let death = self.chance.up_to(Duration::from_millis(10));
                // Whatever comes of it: nobody hears.
                let _ = tokio::time::timeout(death, send(self.connection.clone(), call, id, vcpus)).await;
                self.scene.note(id, [lost(unheard.unwrap_or(begun))]);
                self.scene.died.fetch_add(1, Ordering::Relaxed);
                self.connect();
                return None;
            }
            let heard = match send(self.connection.clone(), call, id, vcpus).await {
                Ok(placement) => {
                    self.scene.placed(id, &placement);
                    life(&placement)
                }
                Err(status) => match self.meaning(call, &status) {
                    Meaning::Over => Life::Released,
                    Meaning::Again(next) => {
                        unheard = unheard.or(Some(begun));
                        last = status.to_string();
                        self.again(next).await;
                        continue;
                    }
                    Meaning::Strange => {
                        self.scene.strange.lock().unwrap().push(format!("{call:?} {id}: {status}"));
                        Life::None
                    }
                },
            };
            let answer = Some((self.scene.now(), heard));
            self.scene.note(id, unheard.map(lost).into_iter().chain([Op { call, invoked, answer }]));
            return Some(heard);
        }
        panic!(
            "{call:?} {id} was repeated for {} s, in vain; the last answer of {}: {last}",
            PATIENCE.as_secs(),
            self.to
        );
    }

    fn meaning(&mut self, call: Call, status: &Status) -> Meaning {
        if let Some(leader) = leader_of(status) {
            return Meaning::Again(self.route.named(&leader));
        }
        match status.code() {
            Code::FailedPrecondition if call == Call::Commit => Meaning::Over,
            // Made up on this side: the connection broke, or there was no answer in time.
            _ if std::error::Error::source(status).is_some() => Meaning::Again(self.route.failed()),
            Code::Cancelled | Code::DeadlineExceeded | Code::Unknown => Meaning::Again(self.route.failed()),
            // A node does not answer, the request is being placed, there is no room now.
            Code::Unavailable | Code::Aborted | Code::ResourceExhausted => Meaning::Again(Next::Later(0)),
            _ => Meaning::Strange,
        }
    }

    async fn again(&mut self, next: Next) {
        self.scene.repeated.fetch_add(1, Ordering::Relaxed);
        let pause = match next {
            Next::AtOnce => 0,
            Next::Soon => 300,
            Next::Later(rounds) => 100_u64 << rounds.min(4),
        };
        tokio::time::sleep(self.chance.up_to(Duration::from_millis(pause))).await;
        if self.addresses.has_changed().unwrap_or(false) {
            self.route = Route::new(self.addresses.borrow_and_update().clone()).unwrap();
        }
        if self.route.url() != self.to {
            self.connect();
        }
    }

    fn connect(&mut self) {
        self.to = self.route.url().to_owned();
        self.connection = connect(&self.to);
    }
}

async fn send(
    mut scheduler: SchedulerServiceClient<Channel>,
    call: Call,
    id: &str,
    vcpus: u64,
) -> Result<Placement, Status> {
    let name = format!("placements/{id}");
    let placement = match call {
        Call::Place => {
            let request = PlaceRequest {
                request_id: id.to_owned(),
                vdc: "ardesio".to_owned(),
                vcpus: u32::try_from(vcpus).unwrap(),
                memory_bytes: 1 << 20,
                ttl_ms: TTL_MS,
                ..PlaceRequest::default()
            };
            scheduler.place(request).await
        }
        Call::Commit => scheduler.commit_placement(CommitPlacementRequest { name }).await,
        Call::Release | Call::Read => scheduler.release_placement(ReleasePlacementRequest { name }).await,
    };
    placement.map(tonic::Response::into_inner)
}
