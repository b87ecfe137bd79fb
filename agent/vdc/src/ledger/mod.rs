//! The ledger of what a node has promised: reservations from their first word to the VM that takes them. Pure.
//!
//! ```text
//!             reserve            commit               take (by a VM)
//!   nothing ─────────▶ Pending ─────────▶ Committed ─────────────────▶ Taken
//!      ▲   ttl, release │ └──────────────── take ────────────────────▶  │
//!      ├────────────────┘                      ▲ │ release, fence       │ freed (its VM is deleted)
//!      ├───────────────────────────────────────┼─┘                      │
//!      └───────────────────────────────────────┼────────────────────────┤
//!                                              └─── undo (its VM was not made)
//! ```
//!
//! Owns: the promises, drain, the fencing generation, and the answer whether something fits. Never: clocks (`now` is
//! any clock that never goes back, milliseconds), randomness (the caller brings the token), I/O.
//!
//! What is promised without the ledger (VMs and volumes) comes in as `outside` at each question, so that nothing is
//! kept twice; a *taken* promise is its VM's, and counts there. A caller that keeps no VMs itself gives [`Ledger::taken`].
//!
//! Invariants: after a reserve that was granted, outside + open promises ≤ the total, and the promises on a NUMA node ≤
//! its limit. What has no NUMA node is a fluid that lies wherever there is room, so these two are also all that is
//! needed. A key has at most one promise, a VM at most one. A refusal changes nothing.

mod capacity;
mod promise;
mod veto;

#[cfg(test)]
mod ledger_test;

use std::collections::{BTreeMap, VecDeque};

use serio_types::Quota;

pub use capacity::{Capacity, NumaLimit, NumaTotal};
pub use promise::{Ask, Class, Ended, Promise, Stage, TEXT_MAX, TTL_MS_MAX, Want, Wish};
use promise::{text, valid};
pub use veto::{Shortage, Veto};

use crate::{Resource, add};

/// Promises that a node keeps at most.
pub const PROMISES_MAX: usize = 4096;
/// Tokens that are remembered as expired, so that their owner hears why.
const EXPIRED_MAX: usize = 1024;

/// See the head of this file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger {
    capacity: Capacity,
    /// The first inventory in which the capacity was what it is now: those since then differ in what is used only.
    capacity_since: u64,
    promises: BTreeMap<String, Promise>,
    /// Key to token.
    keys: BTreeMap<String, String>,
    expired: VecDeque<String>,
    drain: Option<String>,
    fence: u64,
}

impl Ledger {
    /// An empty one.
    #[must_use]
    pub fn new(capacity: Capacity) -> Self {
        Self { capacity_since: capacity.generation, capacity, ..Self::default() }
    }

    /// What may be promised.
    #[must_use]
    pub const fn capacity(&self) -> &Capacity {
        &self.capacity
    }

    /// The host has changed. Promises stay, even if they do not fit any more; nothing new fits then.
    pub fn set_capacity(&mut self, capacity: Capacity) {
        let as_before = Capacity { generation: self.capacity.generation, ..capacity.clone() };
        // A generation that went back is of another life of the inventory.
        if as_before != self.capacity || capacity.generation < self.capacity_since {
            self.capacity_since = capacity.generation;
        }
        self.capacity = capacity;
    }

    /// All promises, by token.
    pub fn promises(&self) -> impl Iterator<Item = &Promise> {
        self.promises.values()
    }

    /// A promise.
    #[must_use]
    pub fn promise(&self, token: &str) -> Option<&Promise> {
        self.promises.get(token)
    }

    /// The promise that a VM has taken.
    #[must_use]
    pub fn of_vm(&self, vm: &str) -> Option<&Promise> {
        self.promises.values().find(|p| matches!(&p.stage, Stage::Taken(by) if by == vm))
    }

    /// Why it takes nothing new, if it does not.
    #[must_use]
    pub fn drained(&self) -> Option<&str> {
        self.drain.as_deref()
    }

    /// The fencing generation in force.
    #[must_use]
    pub const fn fence_generation(&self) -> u64 {
        self.fence
    }

    /// What the promises take that no VM has yet, overhead included; of one class, or of all.
    #[must_use]
    pub fn open(&self, class: Option<Class>) -> Quota {
        self.sum(|p| p.is_open() && class.is_none_or(|class| class == p.want.class))
    }

    /// What the promises take that VMs have.
    #[must_use]
    pub fn taken(&self) -> Quota {
        self.sum(|p| !p.is_open())
    }

    fn sum(&self, counts: impl Fn(&Promise) -> bool) -> Quota {
        let costs = self.promises.values().filter(|p| counts(p)).map(|p| self.capacity.cost(&p.want.amount));
        costs.fold(Quota::default(), |sum, one| add(&sum, &one))
    }

    /// Puts back what was kept over a restart: committed and taken ones, drain, fence.
    pub fn restore(&mut self, promises: Vec<Promise>, drain: Option<String>, fence: u64) {
        self.drain = drain;
        self.fence = fence;
        promises.into_iter().for_each(|promise| self.put(promise));
    }

    /// Follows what was written down elsewhere: this promise is so now.
    pub fn put(&mut self, promise: Promise) {
        self.keys.insert(promise.want.key.clone(), promise.token.clone());
        self.promises.insert(promise.token.clone(), promise);
    }

    /// Follows what was written down elsewhere: this promise is no more.
    pub fn remove(&mut self, token: &str) {
        if let Some(promise) = self.promises.remove(token) {
            self.keys.remove(&promise.want.key);
        }
    }

    /// Promises, or says why not. `outside`: all that is promised without an open promise of this ledger.
    ///
    /// # Errors
    /// [`Veto`].
    pub fn reserve(&mut self, now: u64, outside: &Quota, ask: Ask) -> Result<&Promise, Veto> {
        self.expire(now);
        valid(&ask)?;
        if ask.want.fence < self.fence {
            return Err(Veto::Fenced { asked: ask.want.fence, in_force: self.fence });
        }
        let known = self.keys.get(&ask.want.key).and_then(|token| self.promises.get(token));
        let token = match known {
            Some(known) if known.want.fence > ask.want.fence => {
                return Err(Veto::Fenced { asked: ask.want.fence, in_force: known.want.fence });
            }
            Some(known) if same(&known.want, &ask.want) => known.token.clone(),
            Some(known) => {
                let problem =
                    format!("{} has other amounts: use a new key for another reservation", known.want.key);
                return Err(Veto::Invalid { what: "key", problem });
            }
            None => self.promise_anew(now, outside, ask)?,
        };
        self.promises.get(&token).ok_or(Veto::UnknownToken { token })
    }

    fn promise_anew(&mut self, now: u64, outside: &Quota, ask: Ask) -> Result<String, Veto> {
        if let Some(reason) = &self.drain {
            return Err(Veto::Drained { reason: reason.clone() });
        }
        // What is promised meanwhile makes no plan stale: whether it still fits is asked below.
        let (expected, current) = (ask.expected_generation, self.capacity.generation);
        if expected != 0 && !(self.capacity_since..=current).contains(&expected) {
            return Err(Veto::Stale { expected, current });
        }
        if self.promises.len() >= PROMISES_MAX {
            return Err(Veto::TooMany { limit: PROMISES_MAX });
        }
        if self.promises.contains_key(&ask.token) || self.expired.contains(&ask.token) {
            return Err(Veto::Invalid { what: "token", problem: "was used before".to_owned() });
        }
        let numa_node = self.fits(outside, &ask.want.amount, ask.want.wish)?;
        let stage = Stage::Pending { until: now.saturating_add(ask.ttl_ms) };
        self.keys.insert(ask.want.key.clone(), ask.token.clone());
        let promise = Promise { token: ask.token.clone(), want: ask.want, numa_node, stage };
        self.promises.insert(ask.token.clone(), promise);
        Ok(ask.token)
    }

    /// Whether an amount fits beside all that is promised, and on which NUMA node if one was wished for.
    ///
    /// # Errors
    /// [`Veto::Full`], or [`Veto::Invalid`] for a NUMA node that is not there.
    pub fn fits(&self, outside: &Quota, amount: &Quota, wish: Wish) -> Result<Option<u32>, Veto> {
        let cost = self.capacity.cost(amount);
        room(None, &self.capacity.total, &add(outside, &self.open(None)), &cost)?;
        match wish {
            Wish::Any => Ok(None),
            Wish::Node(id) => {
                let limit = self.capacity.nodes.iter().find(|node| node.id == id);
                let limit = limit.ok_or_else(|| Veto::Invalid {
                    what: "numa_node",
                    problem: format!("{id} is not there: see the inventory"),
                })?;
                self.fits_node(limit, &cost).map(|()| Some(id))
            }
            Wish::OneNode => {
                let mut fullest: Option<(u64, u32)> = None;
                let mut veto = None;
                for node in &self.capacity.nodes {
                    match self.fits_node(node, &cost) {
                        // The fullest that holds it: large rooms stay whole.
                        Ok(()) => {
                            let left = node.memory_bytes.saturating_sub(self.on(node.id).memory_bytes);
                            fullest = Some(fullest.map_or((left, node.id), |f| f.min((left, node.id))));
                        }
                        Err(short) => veto = Some(veto.map_or(short.clone(), |old| roomier(old, short))),
                    }
                }
                let none = || Veto::Invalid {
                    what: "one_numa_node",
                    problem: "the node knows no NUMA nodes".to_owned(),
                };
                fullest.map(|(_, id)| Some(id)).ok_or_else(|| veto.unwrap_or_else(none))
            }
        }
    }

    fn fits_node(&self, node: &NumaLimit, cost: &Quota) -> Result<(), Veto> {
        let limit = Quota { vcpus: node.vcpus, memory_bytes: node.memory_bytes, storage_bytes: u64::MAX };
        room(Some(node.id), &limit, &self.on(node.id), &Quota { storage_bytes: 0, ..*cost })
    }

    /// What lies on a NUMA node, VMs' included.
    fn on(&self, id: u32) -> Quota {
        Quota { storage_bytes: 0, ..self.sum(|p| p.numa_node == Some(id)) }
    }

    /// Keeps a promise. Repeated, or of one that a VM has: nothing changes.
    ///
    /// # Errors
    /// [`Veto::UnknownToken`], [`Veto::Expired`].
    pub fn commit(&mut self, now: u64, token: &str) -> Result<&Promise, Veto> {
        let promise = self.living(now, token)?;
        if matches!(promise.stage, Stage::Pending { .. }) {
            promise.stage = Stage::Committed;
        }
        Ok(promise)
    }

    /// Gives a promise back.
    ///
    /// # Errors
    /// [`Veto::Taken`], [`Veto::UnknownToken`], [`Veto::Expired`].
    pub fn release(&mut self, now: u64, token: &str) -> Result<(), Veto> {
        let promise = self.living(now, token)?;
        if let Stage::Taken(vm) = &promise.stage {
            return Err(Veto::Taken { token: token.to_owned(), vm: vm.clone() });
        }
        self.remove(token);
        Ok(())
    }

    /// A VM takes a promise: from here on it counts in `outside`. It may be smaller than what was promised, not larger; what
    /// is left over is free again.
    ///
    /// # Errors
    /// [`Veto::Drained`], [`Veto::UnknownToken`], [`Veto::Expired`], [`Veto::Taken`], [`Veto::Invalid`] for another name or
    /// a larger VM.
    pub fn take(&mut self, now: u64, token: &str, vm: &str, want: (&str, &Quota)) -> Result<(), Veto> {
        if let Some(reason) = &self.drain {
            return Err(Veto::Drained { reason: reason.clone() });
        }
        let promise = self.living(now, token)?;
        if let Stage::Taken(by) = &promise.stage {
            return Err(Veto::Taken { token: token.to_owned(), vm: by.clone() });
        }
        let (resource, asked) = want;
        if promise.want.resource != resource {
            let problem = format!("is for {}, not for {resource}", promise.want.resource);
            return Err(Veto::Invalid { what: "reservation", problem });
        }
        for kind in Resource::ALL {
            let (promised, asked) = (kind.of(&promise.want.amount), kind.of(asked));
            if asked > promised {
                let (promised, asked) = (kind.show(promised), kind.show(asked));
                let problem =
                    format!("promises {promised} of {}, the VM needs {asked}: reserve anew", kind.name());
                return Err(Veto::Invalid { what: "reservation", problem });
            }
        }
        promise.stage = Stage::Taken(vm.to_owned());
        Ok(())
    }

    /// The VM was not made after all: its promise is as if committed. Its token, if it had one.
    pub fn undo(&mut self, vm: &str) -> Option<String> {
        let token = self.of_vm(vm)?.token.clone();
        self.promises.get_mut(&token)?.stage = Stage::Committed;
        Some(token)
    }

    /// The VM is deleted, and its promise with it. The token, if it had one.
    pub fn freed(&mut self, vm: &str) -> Option<String> {
        let token = self.of_vm(vm)?.token.clone();
        self.remove(&token);
        Some(token)
    }

    /// Ends what was not committed in time; the tokens.
    pub fn expire(&mut self, now: u64) -> Vec<String> {
        let dead: Vec<String> =
            self.promises.values().filter(|p| p.dead(now)).map(|p| p.token.clone()).collect();
        for token in &dead {
            self.remove(token);
            if self.expired.len() >= EXPIRED_MAX {
                self.expired.pop_front();
            }
            self.expired.push_back(token.clone());
        }
        dead
    }

    /// When the next promise ends by itself.
    #[must_use]
    pub fn next_expiry(&self) -> Option<u64> {
        let until = |p: &Promise| match p.stage {
            Stage::Pending { until } => Some(until),
            Stage::Committed | Stage::Taken(_) => None,
        };
        self.promises.values().filter_map(until).min()
    }

    /// Takes nothing new from here on.
    ///
    /// # Errors
    /// [`Veto::Invalid`] without a reason, or with a very long one.
    pub fn drain(&mut self, reason: &str) -> Result<(), Veto> {
        text("reason", reason, TEXT_MAX)?;
        self.drain = Some(reason.to_owned());
        Ok(())
    }

    /// Takes new promises again.
    pub fn undrain(&mut self) {
        self.drain = None;
    }

    /// Ends what was promised under a lower generation, and refuses such from here on. At the generation in force nothing
    /// more is ended. VMs without a promise are the caller's to end, when the generation has risen.
    ///
    /// # Errors
    /// [`Veto::Fenced`]: a higher one is in force.
    pub fn fence(&mut self, generation: u64) -> Result<Ended, Veto> {
        if generation < self.fence {
            return Err(Veto::Fenced { asked: generation, in_force: self.fence });
        }
        self.fence = generation;
        Ok(self.end(|p| p.want.fence < generation))
    }

    /// The same for one promise, by its token or its VM's uid; the node's generation stays.
    ///
    /// # Errors
    /// [`Veto::Fenced`]: it was promised under that generation or a higher one. [`Veto::UnknownToken`]: it is none of a
    /// reservation.
    pub fn fence_one(&mut self, id: &str, generation: u64) -> Result<Ended, Veto> {
        let found = self.promises.get(id).or_else(|| self.of_vm(id));
        let promise = found.ok_or_else(|| Veto::UnknownToken { token: id.to_owned() })?;
        if promise.want.fence >= generation {
            return Err(Veto::Fenced { asked: generation, in_force: promise.want.fence });
        }
        let token = promise.token.clone();
        Ok(self.end(|p| p.token == token))
    }

    fn end(&mut self, ends: impl Fn(&Promise) -> bool) -> Ended {
        let mut ended = Ended::default();
        for promise in self.promises.values().filter(|p| ends(p)) {
            match &promise.stage {
                Stage::Taken(vm) => ended.vms.push(vm.clone()),
                Stage::Pending { .. } | Stage::Committed => ended.tokens.push(promise.token.clone()),
            }
        }
        ended.tokens.iter().for_each(|token| self.remove(token));
        ended
    }

    fn living(&mut self, now: u64, token: &str) -> Result<&mut Promise, Veto> {
        self.expire(now);
        let token = token.to_owned();
        if self.expired.contains(&token) {
            return Err(Veto::Expired { token });
        }
        self.promises.get_mut(&token).ok_or(Veto::UnknownToken { token })
    }
}

/// Whether it is the same question; who asks may have a newer fencing generation by now.
fn same(known: &Want, asked: &Want) -> bool {
    *known == Want { fence: known.fence, ..asked.clone() }
}

fn room(numa_node: Option<u32>, limit: &Quota, used: &Quota, cost: &Quota) -> Result<(), Veto> {
    for resource in Resource::ALL {
        let (limit, used, asked) = (resource.of(limit), resource.of(used), resource.of(cost));
        if asked > 0 && used.checked_add(asked).is_none_or(|sum| sum > limit) {
            return Err(Veto::Full(Shortage { resource, numa_node, asked, limit, used }));
        }
    }
    Ok(())
}

/// Of two shortages the smaller one: the nearer to what could be had.
fn roomier(old: Veto, new: Veto) -> Veto {
    match (&old, &new) {
        (Veto::Full(a), Veto::Full(b)) if b.available() > a.available() => new,
        _ => old,
    }
}
