//! What a scheduler or an operator orders: reservations, drain, fences. The node's veto is here.
//!
//! ```text
//!   Order ──▶ a copy of the ledger says yes or no ──▶ commit (rows) ──▶ the ledger follows the rows, as the model does
//! ```
//!
//! Owns: the [`Ledger`], which of its promises are written down, and who waits for a fence to be done. Never: the
//! arithmetic (that is the ledger's), clocks.
//! Invariants: a promise that was committed or taken has a row, and no other has one, so that uncommitted ones end with
//! the agent at the latest; what is promised to VMs, volumes and open reservations together is never more than the node
//! has. A fence is answered when nothing runs any more that it ended.

use std::{collections::BTreeSet, time::Duration};

use serio_store::{
    Change, Key,
    record::{NumaWish, OrdersRecord, ReservationClass, ReservationRecord, Run, VdcRecord},
};
use serio_types::{Desired, Quota, VdcName, resource};
use serio_vdc::ledger::{Ask, Class, Ended, Ledger, NumaLimit, Promise, Stage, Veto, Want, Wish};
use uuid::Uuid;

use super::{
    State,
    command::{Answer, Reply},
    effect::{Effect, Timer},
    phase::{After, Op, Phase},
    plan::{self, Fenced, Standing},
};
use crate::{clock::Moment, error::Error};

/// What is ordered.
#[derive(Debug, Clone)]
pub enum Order {
    /// → [`Ordered::Reserved`]. The token is chosen by the caller, and not used if the key is known.
    Reserve(Box<Ask>),
    /// → [`Ordered::Done`].
    Commit(String),
    /// → [`Ordered::Done`].
    Release(String),
    /// → [`Ordered::Blocking`].
    Drain(String),
    /// → [`Ordered::Done`].
    Undrain,
    /// → [`Ordered::Ended`], when nothing runs any more that it ended.
    Fence {
        /// A VM's uid or a token; none: all that is older.
        id: Option<String>,
        /// What is below it ends.
        generation: u64,
    },
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ordered {
    /// Promised.
    Reserved {
        /// The promise.
        promise: Box<Promise>,
        /// What is left of its ttl.
        left_ms: u64,
        /// Of the node's inventory.
        generation: u64,
    },
    /// Done, nothing to say.
    Done,
    /// The node is drained; what is still on it, as the API names it.
    Blocking(Vec<String>),
    /// Ids of what was ended: VMs' uids and tokens.
    Ended(Vec<String>),
}

/// What the host has, as the ledger needs it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostLimits {
    /// Of the inventory.
    pub generation: u64,
    /// What may be promised on each NUMA node.
    pub nodes: Vec<NumaLimit>,
    /// What a VMM takes beside guest memory.
    pub vm_overhead_bytes: u64,
}

/// Somebody who waits for a fence.
#[derive(Debug)]
pub(super) struct Fencing {
    /// Whose end is waited for.
    pub(super) vms: BTreeSet<Uuid>,
    /// The answer then.
    pub(super) ended: Vec<String>,
    /// To whom.
    pub(super) reply: Reply,
}

/// The row of a promise; none while it is not committed.
fn row(promise: &Promise) -> Option<Change> {
    let vm = match &promise.stage {
        Stage::Pending { .. } => return None,
        Stage::Committed => None,
        Stage::Taken(vm) => Some(vm.parse().ok()?),
    };
    let want = &promise.want;
    Some(Change::Reservation(Box::new(ReservationRecord {
        token: promise.token.clone(),
        key: want.key.clone(),
        resource: want.resource.clone(),
        amount: want.amount,
        class: match want.class {
            Class::Normal => ReservationClass::Normal,
            Class::DrHeld => ReservationClass::DrHeld,
        },
        wish: match want.wish {
            Wish::Any => NumaWish::Any,
            Wish::OneNode => NumaWish::OneNode,
            Wish::Node(_) => NumaWish::Node,
        },
        numa_node: promise.numa_node,
        fence_generation: want.fence,
        vm,
    })))
}

/// The promise of a row.
pub(super) fn promise(row: ReservationRecord) -> Promise {
    let wish = match (row.wish, row.numa_node) {
        (NumaWish::OneNode, _) => Wish::OneNode,
        (NumaWish::Node, Some(id)) => Wish::Node(id),
        (NumaWish::Any | NumaWish::Node, _) => Wish::Any,
    };
    let class = match row.class {
        ReservationClass::Normal => Class::Normal,
        ReservationClass::DrHeld => Class::DrHeld,
    };
    let want = Want {
        key: row.key,
        resource: row.resource,
        amount: row.amount,
        class,
        wish,
        fence: row.fence_generation,
    };
    let stage = row.vm.map_or(Stage::Committed, |vm| Stage::Taken(vm.to_string()));
    Promise { token: row.token, want, numa_node: row.numa_node, stage }
}

impl State {
    /// What the node has promised to reservations.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// What time it is; what ends by then is over.
    pub(super) fn set_clock(&mut self, now: Moment) {
        self.now = now.wall;
        self.steady = self.steady.max(now.steady);
        self.changed |= !self.ledger.expire(self.clock_ms()).is_empty();
    }

    /// The steady clock, as the ledger has it.
    fn clock_ms(&self) -> u64 {
        u64::try_from(self.steady.0).unwrap_or_default()
    }

    /// What the reporter has read of the host.
    pub(super) fn host_changed(&mut self, host: HostLimits) {
        let HostLimits { generation, nodes, vm_overhead_bytes } = host;
        let mut capacity = self.ledger.capacity().clone();
        (capacity.generation, capacity.nodes, capacity.vm_overhead_bytes) =
            (generation, nodes, vm_overhead_bytes);
        self.ledger.set_capacity(capacity);
    }

    /// The ledger follows a row that was written.
    pub(super) fn follow(&mut self, change: &Change) {
        match change {
            Change::Reservation(row) => self.ledger.put(promise((**row).clone())),
            Change::Orders(orders) => {
                let OrdersRecord { drain_reason, fence_generation } = orders.clone();
                self.ledger.restore(Vec::new(), drain_reason, fence_generation);
            }
            Change::Delete(Key::Reservation(token)) => self.ledger.remove(token),
            Change::Delete(Key::Vm(vm)) => drop(self.ledger.freed(&vm.to_string())),
            _ => {}
        }
    }

    /// What the node has promised beside open reservations, the VMMs' overhead included.
    fn outside(&self) -> Quota {
        let mut used = self.model.used(None);
        let vms = u64::try_from(self.model.vms.len()).unwrap_or(u64::MAX);
        let overhead = vms.saturating_mul(self.ledger.capacity().vm_overhead_bytes);
        used.memory_bytes = used.memory_bytes.saturating_add(overhead);
        used
    }

    /// What the node has promised in all.
    pub(super) fn promised(&self) -> Quota {
        serio_vdc::add(&self.outside(), &self.ledger.open(None))
    }

    /// Says whether the node takes something new.
    pub(super) fn takes_new(&self) -> Result<(), Error> {
        match self.ledger.drained() {
            Some(reason) => Err(Veto::Drained { reason: reason.to_owned() }.into()),
            None => Ok(()),
        }
    }

    /// Says whether a VM was ended by a fence: then it runs nowhere here again.
    pub(super) fn not_fenced(&self, vm: Uuid) -> Result<(), Error> {
        match self.model.fenced.get(&vm) {
            None => Ok(()),
            Some(generation) => {
                let why = format!(
                    "was ended by the fence of generation {generation}, since it may run elsewhere now: delete it here"
                );
                Err(Error::precondition(self.model.vm_resource(vm), why))
            }
        }
    }

    /// Says whether a new VM fits, and gives the row of the reservation that it takes, if it was made with one.
    pub(super) fn admit_vm(
        &self,
        vdc: &VdcRecord,
        (name, vm): (&VdcName, Uuid),
        ask: &Quota,
    ) -> Result<Option<Change>, Error> {
        self.takes_new()?;
        let [quota, mut node] = self.pools(vdc);
        let Some(token) = &self.taking else {
            // The new one's VMM counts too.
            let overhead = self.ledger.capacity().vm_overhead_bytes;
            node.used.memory_bytes = node.used.memory_bytes.saturating_add(overhead);
            serio_vdc::admit(&[quota, node], ask)?;
            return Ok(None);
        };
        let mut ledger = self.ledger.clone();
        ledger.take(self.clock_ms(), token, &vm.to_string(), (&resource::vm(name), ask))?;
        // The node has promised it already; the vdc has not.
        serio_vdc::admit(&[quota], ask)?;
        Ok(ledger.promise(token).and_then(row))
    }

    /// The row by which a reservation is as before, when the VM that took it was not made.
    pub(super) fn give_back(&self, vm: Uuid) -> Option<Change> {
        let mut ledger = self.ledger.clone();
        let token = ledger.undo(&vm.to_string())?;
        ledger.promise(&token).and_then(row)
    }

    pub(super) fn reserve(&mut self, ask: Ask) -> Result<Ordered, Error> {
        self.parsable(&ask)?;
        let outside = self.outside();
        let now = self.clock_ms();
        let promise = Box::new(self.ledger.reserve(now, &outside, ask)?.clone());
        let generation = self.ledger.capacity().generation;
        Ok(Ordered::Reserved { left_ms: promise.left(now), promise, generation })
    }

    /// What is kept must be readable again: SQLite's integers are signed.
    fn parsable(&self, ask: &Ask) -> Result<(), Error> {
        if i64::try_from(ask.want.fence).is_err() {
            return Err(Error::invalid("fence_generation", "is too large: at most 2^63-1"));
        }
        resource::parse_vm(&ask.want.resource)
            .map(drop)
            .map_err(|error| Error::invalid("resource", format!("{error}; name the VM that it is for")))
    }

    pub(super) fn commit_promise(&mut self, token: &str) -> Result<Ordered, Error> {
        let mut ledger = self.ledger.clone();
        let change = row(ledger.commit(self.clock_ms(), token)?);
        self.commit(change.into_iter().collect())?;
        Ok(Ordered::Done)
    }

    pub(super) fn release(&mut self, token: &str) -> Result<Ordered, Error> {
        self.ledger.clone().release(self.clock_ms(), token)?;
        let pending = self.ledger.promise(token).is_some_and(|p| matches!(p.stage, Stage::Pending { .. }));
        if pending {
            self.ledger.remove(token);
        } else {
            self.commit(vec![Change::Delete(Key::Reservation(token.to_owned()))])?;
        }
        Ok(Ordered::Done)
    }

    pub(super) fn drain(&mut self, reason: &str, remember: Option<Change>) -> Result<Ordered, Error> {
        self.ledger.clone().drain(reason)?;
        let mut changes: Vec<Change> = remember.into_iter().collect();
        if self.ledger.drained() != Some(reason) {
            changes.push(self.orders(Some(reason.to_owned()), self.ledger.fence_generation()));
            let told = format!("it takes no new VMs and starts: {reason}");
            changes.push(self.event("node".to_owned(), "drained", told));
        }
        self.commit(changes)?;
        Ok(Ordered::Blocking(self.blocking()))
    }

    /// What is still on the node, as the API names it.
    pub(super) fn blocking(&self) -> Vec<String> {
        let busy = |vm: &&serio_store::record::VmRecord| {
            !matches!(self.phases.get(&vm.uid), None | Some(Phase::Off))
        };
        let mut blocking: Vec<String> =
            self.model.vms.values().filter(busy).map(|vm| self.model.vm_resource(vm.uid)).collect();
        blocking.extend(self.model.exports.keys().map(|id| format!("exports/{id}")));
        blocking.sort_unstable();
        blocking
    }

    pub(super) fn undrain(&mut self, remember: Option<Change>) -> Result<Ordered, Error> {
        let mut changes: Vec<Change> = remember.into_iter().collect();
        if self.ledger.drained().is_some() {
            changes.push(self.orders(None, self.ledger.fence_generation()));
            changes.push(self.event("node".to_owned(), "undrained", "it takes VMs and starts again"));
        }
        self.commit(changes)?;
        Ok(Ordered::Done)
    }

    fn orders(&self, drain_reason: Option<String>, fence_generation: u64) -> Change {
        Change::Orders(OrdersRecord { drain_reason, fence_generation })
    }

    /// Ends what is older; what was ended, and the VMs whose end is to be waited for.
    pub(super) fn fence(
        &mut self,
        id: Option<&str>,
        generation: u64,
        remember: Option<Change>,
    ) -> Result<(Vec<String>, BTreeSet<Uuid>), Error> {
        if i64::try_from(generation).is_err() {
            return Err(Error::invalid("generation", "is too large: at most 2^63-1"));
        }
        let mut ledger = self.ledger.clone();
        let before = ledger.fence_generation();
        let known = |id: &str| id.parse::<Uuid>().ok().filter(|uid| self.model.vms.contains_key(uid));
        let mut vms: BTreeSet<Uuid> = BTreeSet::new();
        let ended = match id {
            None => {
                let ended = ledger.fence(generation)?;
                let unreserved = |uid: &&Uuid| ledger.of_vm(&uid.to_string()).is_none();
                if generation > before {
                    vms.extend(self.model.vms.keys().filter(unreserved));
                }
                ended
            }
            // One that no reservation was made for is at 0.
            Some(id) if known(id).is_some() && ledger.of_vm(id).is_none() => {
                if generation == 0 {
                    return Err(Veto::Fenced { asked: 0, in_force: 0 }.into());
                }
                Ended { tokens: Vec::new(), vms: vec![id.to_owned()] }
            }
            Some(id) => ledger.fence_one(id, generation)?,
        };
        vms.extend(ended.vms.iter().filter_map(|vm| known(vm)));
        let rows = |token: &String| Change::Delete(Key::Reservation(token.clone()));
        let mut changes: Vec<Change> = ended.tokens.iter().map(rows).chain(remember).collect();
        changes.push(self.orders(ledger.drained().map(str::to_owned), ledger.fence_generation()));
        changes.extend(vms.iter().map(|vm| Change::Fenced(*vm, generation)));
        for vm in &vms {
            let message = format!("it is ended by the fence of generation {generation}");
            changes.push(self.event(self.model.vm_resource(*vm), "fenced", message));
        }
        self.commit(changes)?;
        vms.iter().for_each(|vm| self.end_fenced(*vm));
        // A repetition waits for what the first call began, too.
        vms.extend(self.ended_by(generation));
        let ids = vms.iter().map(Uuid::to_string).chain(ended.tokens).collect();
        Ok((ids, vms))
    }

    /// VMs that a fence of that generation has ended.
    pub(super) fn ended_by(&self, generation: u64) -> impl Iterator<Item = Uuid> + '_ {
        self.model.fenced.iter().filter(move |(_, at)| **at == generation).map(|(vm, _)| *vm)
    }

    /// Pulls the plug of a VM that a fence has ended, if it runs; one that is just starting comes here when it does.
    pub(super) fn end_fenced(&mut self, uid: Uuid) {
        if !self.model.fenced.contains_key(&uid) {
            return;
        }
        let Some(mut vm) = self.model.vms.get(&uid).cloned() else { return };
        vm.desired = Desired::Stopped;
        let standing = match self.phases.get(&uid) {
            Some(Phase::Running { .. }) => Standing::Runs,
            Some(Phase::Stopping { force: false, .. }) => Standing::Stops,
            Some(Phase::Pausing { .. }) => Standing::Pauses,
            _ => Standing::Other,
        };
        match plan::fenced(standing) {
            Fenced::Nothing => {}
            Fenced::Rest => {
                vm.run = Run::Failed;
                self.record(vec![Change::Vm(Box::new(vm))]);
                self.phases.insert(uid, Phase::Off);
            }
            Fenced::Kill => {
                vm.run = Run::Killing;
                self.record(vec![Change::Vm(Box::new(vm))]);
                self.kill(uid);
            }
        }
    }

    /// Pulls the plug of what runs, or was asked to power off.
    fn kill(&mut self, uid: Uuid) {
        match self.phases.get_mut(&uid) {
            Some(Phase::Running { pid }) => {
                let pid = *pid;
                self.stopping(uid, pid, None, After::Rest(Op::default()));
            }
            Some(Phase::Stopping { force, .. }) => {
                *force = true;
                self.out.push(Effect::Stop { vm: uid });
            }
            _ => {}
        }
    }

    /// Answers the fences whose VMs have all ended.
    pub(super) fn pump_fences(&mut self) {
        let runs =
            |uid: &Uuid| !matches!(self.phases.get(uid), None | Some(Phase::Off | Phase::Pausing { .. }));
        let (waiting, done): (Vec<Fencing>, Vec<Fencing>) =
            std::mem::take(&mut self.fencings).into_iter().partition(|f| f.vms.iter().any(runs));
        self.fencings = waiting;
        for fencing in done {
            super::answer(fencing.reply, Ok(Answer::Ordered(Ordered::Ended(fencing.ended))));
        }
    }

    /// Has the state woken when the next reservation ends by itself, so that others hear of it.
    pub(super) fn wake_for_expiry(&mut self) {
        let Some(next) = self.ledger.next_expiry() else { return };
        if self.wake_at.is_none_or(|at| next < at) {
            self.wake_at = Some(next);
            let after = Duration::from_millis(next.saturating_sub(self.clock_ms()).max(1));
            self.out.push(Effect::Timer { after, timer: Timer::ReservationsEnd });
        }
    }
}
