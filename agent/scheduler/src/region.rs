//! One of several schedulers of a region: it leads, or it follows the one that does.
//!
//! ```text
//!           lease ─▶ candidate's key ─▶ copy of everything ─▶ FOLLOWS: a watch feeds the copy
//!             ▲                              ▲ watch broke ────────┤
//!             │ 0.1 s                                              │ its key is the oldest
//!             └── lease lost, deposed, etcd silent for 5 s ◀── LEADS: reads everything anew, then writes
//! ```
//! Owns: the lease and the role. Never: decides what is written: the owner does, and each of its transactions holds only
//! as long as this scheduler's key is there. So two that believe to lead for a moment do no harm.
//! A leader that dies is replaced when its lease is over, after 3 s; one that ends gives its lease back.

use std::{collections::BTreeMap, future::Future, time::Duration};

use tokio::time::{Instant, MissedTickBehavior, interval, timeout, timeout_at};

use crate::{
    owner::{Handle, Role},
    store::{
        Change, State, StoreError,
        etcd::{
            self, Candidate, Client, Etcd, Key,
            wire::{Event, KeyValue},
        },
    },
};

/// Of a lease, in seconds.
const TTL_S: i64 = 3;
/// Between two signs of life.
const KEEP_ALIVE: Duration = Duration::from_millis(600);
/// Without a sign from etcd for that long this scheduler does not believe to lead any more.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// Before standing again.
const PAUSE: Duration = Duration::from_millis(100);
/// To give a lease back.
const REVOKE_WAIT: Duration = Duration::from_secs(1);

/// Leads or follows until it is ended. `address` is where agents and clients reach this scheduler.
pub async fn run(client: Client, owner: Handle, address: String, ended: impl Future<Output = ()>) {
    tokio::pin!(ended);
    loop {
        let lease = tokio::select! {
            lease = client.grant(TTL_S) => lease,
            () = &mut ended => return,
        };
        let (over, lease) = match lease {
            Ok(lease) => {
                let over = tokio::select! {
                    over = term(&client, &owner, &address, lease) => Some(over),
                    error = stay_alive(&client, lease) => Some(error),
                    () = &mut ended => None,
                };
                (over, Some(lease))
            }
            Err(error) => (Some(error.into()), None),
        };
        if owner.step_down().await.is_err() {
            return;
        }
        if let Some(lease) = lease {
            // It ends by itself as well.
            let _ = timeout(REVOKE_WAIT, client.revoke(lease)).await;
        }
        let Some(error) = over else { return };
        tracing::warn!(%error, "this scheduler neither leads nor follows: it tries again");
        tokio::time::sleep(PAUSE).await;
    }
}

/// Until the lease is lost.
async fn stay_alive(client: &Client, lease: i64) -> StoreError {
    let mut ticks = interval(KEEP_ALIVE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    loop {
        ticks.tick().await;
        match timeout_at(heard + SILENCE_MAX, client.keep_alive(lease)).await {
            Ok(Ok(true)) => heard = Instant::now(),
            Ok(Ok(false)) => return StoreError::Deposed,
            Ok(Err(error)) => tracing::debug!(%error, "no sign of life to etcd"),
            Err(_) => return StoreError::Unreachable(format!("silent for {} s", SILENCE_MAX.as_secs())),
        }
    }
}

/// Follows, then leads, then says why it does not any more.
async fn term(client: &Client, owner: &Handle, address: &str, lease: i64) -> StoreError {
    match try_term(client, owner, address, lease).await {
        Ok(()) => StoreError::Deposed,
        Err(error) => error,
    }
}

async fn try_term(client: &Client, owner: &Handle, address: &str, lease: i64) -> Result<(), StoreError> {
    let candidate = client.stand(lease, address).await?;
    let mut seen = tokio::time::Instant::now();
    while let Err(error) = follow(client, owner, &candidate).await {
        if matches!(error, StoreError::Deposed | StoreError::Row { .. }) {
            return Err(error);
        }
        tracing::info!(%error, "lost sight of the region: it looks again");
        tokio::time::sleep_until(seen + PAUSE).await;
        seen = Instant::now();
    }
    let mut deposed = owner.deposed();
    deposed.borrow_and_update();
    let (all, revision) = client.everything().await?;
    let state = State::decode(&etcd::records(all))?;
    let store = Etcd::new(client.clone(), candidate);
    if owner.take_role(Role::Leader, state, Some(Box::new(store))).await.is_err() {
        return Ok(());
    }
    tracing::info!(address, revision, "leads the region");
    // An owner that is gone deposes nobody.
    let _ = deposed.changed().await;
    Ok(())
}

/// Until it is this one's turn to lead.
async fn follow(client: &Client, owner: &Handle, candidate: &Candidate) -> Result<(), StoreError> {
    let (all, revision) = client.everything().await?;
    let mut candidates = Candidates::default();
    for kv in &all {
        candidates.see(kv);
    }
    if candidates.turn_of(candidate)? {
        return Ok(());
    }
    let mut events = client.events(revision.saturating_add(1)).await?;
    let state = State::decode(&etcd::records(all))?;
    let leader = candidates.leader();
    tracing::info!(leader, revision, "follows");
    let gone = |_| StoreError::Deposed;
    owner.take_role(Role::Follower(leader), state, None).await.map_err(gone)?;
    loop {
        let changes = events.next().await?.into_iter().filter_map(|event| candidates.take(event)).collect();
        if candidates.turn_of(candidate)? {
            return Ok(());
        }
        owner.learn(candidates.leader(), changes).await.map_err(gone)?;
    }
}

/// Who stands, by the age of their keys.
#[derive(Debug, Default)]
struct Candidates {
    by_age: BTreeMap<i64, (String, String)>,
}

impl Candidates {
    fn see(&mut self, kv: &KeyValue) {
        if let Key::Leader(name) = Key::parse(&kv.key) {
            let address = String::from_utf8_lossy(&kv.value).into_owned();
            self.by_age.insert(kv.create_revision, (name, address));
        }
    }

    /// What an event means for the records; nothing when it is about a candidate.
    fn take(&mut self, event: Event) -> Option<Change> {
        let removed = event.kind != 0;
        let kv = event.kv?;
        match Key::parse(&kv.key) {
            Key::Leader(name) if removed => self.by_age.retain(|_, (other, _)| *other != name),
            Key::Leader(_) => self.see(&kv),
            Key::Record(kind, key) => {
                return Some(Change { kind, key, value: (!removed).then_some(kv.value) });
            }
            Key::Other => {}
        }
        None
    }

    fn leader(&self) -> String {
        self.by_age.values().next().map(|(_, address)| address.clone()).unwrap_or_default()
    }

    /// Whether the oldest key is this one's. When it is not among them, its lease is over.
    fn turn_of(&self, candidate: &Candidate) -> Result<bool, StoreError> {
        if !self.by_age.contains_key(&candidate.create_revision) {
            return Err(StoreError::Deposed);
        }
        Ok(self.by_age.keys().next() == Some(&candidate.create_revision))
    }
}
