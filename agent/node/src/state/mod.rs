//! The one owner of the node's state: what is promised, what should run, what does.
//!
//! ```text
//!   Input ──▶ State::step ──▶ Vec<Effect>        one input at a time, no waiting inside
//!                │   ▲                            Executor does the effects; their results are inputs again
//!         commit ▼   │ contents at start
//!              Store (SQLite)
//! ```
//!
//! Owns: the rows ([`model`]), and for each VM the phase it is in ([`phase`]). Every change is committed *before* its
//! effects are handed out, together with the wish (`desired`), so that a `seriod` that dies anywhere is continued by
//! the next one ([`recover`]):
//!
//! ```text
//!   row says            found at start          what the next seriod does
//!   creating            anything                undo: remove files, then the row (its client got no answer)
//!   starting            no process              start it
//!   running             process                 adopt it;  none: record its end, policy decides
//!   paused              process                 adopt it, pause it if it runs;  none: as running
//!   stopping            process                 adopt it, press the button again;  none: record its end
//!   killing             process                 pull the plug;  none: record its end
//!   deleting            anything                go on deleting
//!   off, failed         run files               remove them
//!   (no row)            process or run files    end it, remove them
//! ```
//!
//! Never: I/O but the store's, clocks, randomness that matters to decisions.
//! Invariants: at most one operation a VM and a volume at a time; a VM has at most one process; quotas are never
//! exceeded; each accepted command is answered exactly once.
//! Threads: one, which may block on the disk; see [`owner`].

pub mod command;
pub mod effect;
mod executor;
mod exports;
mod given_root;
pub mod holdings;
mod images;
mod merges;
pub mod model;
mod operations;
mod ordered;
pub mod orders;
pub mod owner;
mod phase;
mod plan;
mod plugs;
pub mod recover;
mod reshape;
mod run;
mod save_work;
mod troubles;
mod update;
mod vdc_snapshots;
mod vdcs;
mod views;
mod vm_imports;
mod vm_orders;
mod vm_restore;
mod vm_snapshots;
mod vms;
mod volume_work;
mod volumes;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serio_store::{
    Change, Store,
    record::{self, EventRecord, Millis},
};
use serio_types::{Name, Quota};
use serio_vdc::ledger::{Capacity, Ledger};
use uuid::Uuid;

use command::{Answer, Command, Mutation, Reply, Request};
use effect::{Effect, Input, Timer};
pub use executor::{Executor, Handles};
use merges::Work;
use model::Model;
use phase::{Op, Phase, VolumeOp};
use run::Streak;
use vm_orders::{Order, Pending};

use crate::{clock::Moment, error::Error};

/// The state of a node.
pub struct State {
    store: Store,
    model: Model,
    /// What the node may promise in all.
    capacity: Quota,
    /// Of each VM that has a row.
    phases: BTreeMap<Uuid, Phase>,
    /// Of each VM that has run or failed since the start of seriod.
    streaks: BTreeMap<Uuid, Streak>,
    /// Volumes with an operation.
    volume_ops: BTreeMap<Uuid, VolumeOp>,
    /// Running VMs being reset, paused or resumed.
    vm_orders: BTreeMap<Uuid, Pending>,
    /// What of running VMs does not work.
    troubles: BTreeMap<Uuid, Vec<troubles::TroubleView>>,
    /// Exports being started or ended.
    export_ops: BTreeMap<Name, Op>,
    /// Images being removed.
    image_ops: BTreeMap<Uuid, Op>,
    /// Layers to be merged away, by volume, in order.
    works: BTreeMap<Uuid, VecDeque<Work>>,
    /// Volumes whose headers are to be read when they are free.
    look: BTreeSet<Uuid>,
    /// Operations that were asked to end.
    cancelled: BTreeSet<Uuid>,
    /// Points of whole vdcs being sealed.
    group_ops: BTreeMap<Uuid, Op>,
    /// Counts the changes of operations.
    operations_version: u64,
    /// Files of VMs that no row knows, being removed.
    strangers: u32,
    ticket: u64,
    /// Promises that no VM has yet, drain and fence.
    ledger: Ledger,
    /// The reservation that the creation under way takes.
    taking: Option<String>,
    /// Fences that wait for the end of VMs.
    fencings: Vec<orders::Fencing>,
    /// When a timer for the end of reservations is set.
    wake_at: Option<u64>,
    /// Something may be otherwise than when [`State::take_changed`] was last asked.
    changed: bool,
    /// For people.
    now: Millis,
    /// By it everything ends that ends after a while.
    steady: Millis,
    out: Vec<Effect>,
}

impl State {
    /// Takes over what the store has. Call [`State::recover`] next.
    #[must_use]
    pub fn new(store: Store, mut model: Model, capacity: Quota) -> Self {
        let mut ledger = Ledger::new(Capacity { total: capacity, ..Capacity::default() });
        let kept = std::mem::take(&mut model.reservations).into_iter().map(orders::promise).collect();
        let record::OrdersRecord { drain_reason, fence_generation } = std::mem::take(&mut model.orders);
        ledger.restore(kept, drain_reason, fence_generation);
        Self {
            store,
            model,
            capacity,
            phases: BTreeMap::new(),
            streaks: BTreeMap::new(),
            volume_ops: BTreeMap::new(),
            vm_orders: BTreeMap::new(),
            troubles: BTreeMap::new(),
            export_ops: BTreeMap::new(),
            image_ops: BTreeMap::new(),
            works: BTreeMap::new(),
            look: BTreeSet::new(),
            cancelled: BTreeSet::new(),
            group_ops: BTreeMap::new(),
            operations_version: 0,
            strangers: 0,
            ticket: 0,
            ledger,
            taking: None,
            fencings: Vec::new(),
            wake_at: None,
            changed: true,
            now: Millis::default(),
            steady: Millis::default(),
            out: Vec::new(),
        }
    }

    /// The rows, to read.
    #[must_use]
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Takes one input; returns what is to be done now.
    pub fn step(&mut self, now: Moment, input: Input) -> Vec<Effect> {
        self.set_clock(now);
        self.changed |= !matches!(input, Input::Command(Command::Query(_), _));
        match input {
            Input::Command(command, reply) => self.command(command, reply),
            Input::VolumeCreated { volume, result } => self.volume_created(volume, result),
            Input::VolumeDeleted { volume, result } => self.volume_deleted(volume, result),
            Input::Launched { vm, result } => self.launched(vm, result),
            Input::Adopted { vm, found } => self.adopted(vm, found),
            Input::Ended { vm, pid, end } => self.ended(vm, pid, end),
            Input::Troubled { vm, pid, troubles } => self.troubled(vm, pid, troubles),
            Input::Ordered { vm, order, result } => self.ordered(vm, order, result),
            Input::Plugged { vm, device, result } => self.plugged(vm, device, result),
            Input::Unplugged { vm, device, result } => self.unplugged(vm, device, result),
            Input::Cleaned { vm } => self.cleaned(vm),
            Input::VmRemoved { vm, result } => self.vm_removed(vm, result),
            Input::Snapshotted { volume, result } => self.snapshotted(volume, result),
            Input::Inspected { volume, result } => self.inspected(volume, result),
            Input::Resized { volume, result } => self.resized(volume, result),
            Input::RolledBack { volume, result } => self.rolled_back(volume, result),
            Input::MergeProgress { volume, operation, done_bytes, total_bytes } => {
                self.merge_progress(volume, operation, done_bytes, total_bytes);
            }
            Input::Merged { volume, operation, outcome } => self.merged(volume, operation, outcome),
            Input::Progress { operation, done_bytes, total_bytes } => {
                self.operation_progress(operation, done_bytes, total_bytes);
            }
            Input::VdcSnapshotted { group, result } => self.vdc_snapshotted(group, result),
            Input::VmSaved { group, result } => self.vm_saved(group, result),
            Input::ExportStarted { id, result } => self.export_started(id, result),
            Input::ExportAdopted { id, runs } => self.export_adopted(&id, runs),
            Input::ExportEnded { id } => self.export_ended(&id),
            Input::ImageRemoved { image, result } => self.image_removed(image, result),
            Input::Timer(timer) => self.timer(timer),
            Input::Host(host) => self.host_changed(host),
        }
        self.pump_works();
        self.pump_fences();
        self.wake_for_expiry();
        std::mem::take(&mut self.out)
    }

    /// Whether anything but questions came since this was last asked, so that the pictures of it may be old.
    pub(super) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    fn command(&mut self, command: Command, reply: Reply) {
        match command {
            Command::Query(query) => answer(reply, self.query(&query)),
            Command::FinishImport(files) => answer(reply, self.finish_import(files)),
            Command::BeginOperation { kind, target, subject, request } => {
                answer(reply, self.begin_operation(kind, (target, subject), request));
            }
            Command::EndOperation(uid, result) => {
                self.end_operation(uid, result, Vec::new());
                answer(reply, Ok(Answer::Nothing));
            }
            Command::Note { resource, kind, message } => {
                let note = self.event(resource, kind, message);
                answer(reply, self.commit(vec![note]).map(|_| Answer::Nothing));
            }
            Command::Order(order, request) => self.order(order, request.as_ref(), reply),
            Command::CancelOperation(uid) => answer(reply, self.cancel_operation(uid)),
            Command::FinishVmImport(vm) => answer(reply, self.finish_vm_import(vm)),
            Command::AbortVmImport(vm, why) => {
                self.abort_vm_import(vm, why, Op { replies: vec![reply], request: None });
            }
            Command::AbortImport(uid) => self.abort_import(uid, Op { replies: vec![reply], request: None }),
            Command::Mutate(mutation, request) => {
                let op = Op { replies: vec![reply], request };
                match self.replay(op) {
                    Ok(Some(op)) => self.mutate(mutation, op),
                    Ok(None) => {}
                    Err(refused) => refused.answer(),
                }
            }
        }
    }

    /// Starts a change. What is refused is answered here, at once; the rest answers when it is done.
    fn mutate(&mut self, mutation: Mutation, op: Op) {
        let refused = match mutation {
            Mutation::CreateVdc { name, quota, limits, encrypted } => {
                self.create_vdc(name, (quota, limits), encrypted, op)
            }
            Mutation::EraseVdc { name, uid } => self.erase_vdc(&name, uid, op),
            Mutation::UpdateVdc { name, quota, limits, expected_generation } => {
                self.update_vdc(&name, (quota, limits), expected_generation, op)
            }
            Mutation::DeleteVdc { name } => self.delete_vdc(&name, op),
            Mutation::CreateVm { name, spec, start } => self.create_vm(name, *spec, start, op),
            Mutation::CreateVmOn { name, spec, root, start } => {
                self.create_vm_on(&name, (*spec, &root), start, op)
            }
            Mutation::UpdateVm { name, changes } => self.update_vm(&name, &changes, op),
            Mutation::AttachVolume { name, volume } => self.attach_volume(&name, &volume, op),
            Mutation::DetachVolume { name, volume, wait } => self.detach_volume(&name, &volume, wait, op),
            Mutation::AttachNic { name, nic } => self.attach_nic(&name, nic, op),
            Mutation::DetachNic { name, mac, wait } => self.detach_nic(&name, mac, wait, op),
            Mutation::StartVm { name } => self.start_vm(&name, op),
            Mutation::StopVm { name, force, timeout } => self.stop_vm(&name, force, timeout, op),
            Mutation::RebootVm { name } => self.order_vm(&name, Order::Reset, op),
            Mutation::SnapshotVm { name, point } => self.snapshot_vm(&name, point, op),
            Mutation::DeleteVmSnapshot { name, point } => self.delete_vm_snapshot(&name, &point, op),
            Mutation::RestoreVm { name, point, discard_later } => {
                self.restore_vm(&name, &point, discard_later, op)
            }
            Mutation::CloneVm { name, point, clone } => self.clone_vm(&name, &point, clone, op),
            Mutation::BeginVmImport(import) => self.begin_vm_import(*import, op),
            Mutation::PauseVm { name } => self.order_vm(&name, Order::Pause, op),
            Mutation::ResumeVm { name } => self.order_vm(&name, Order::Resume, op),
            Mutation::DeleteVm { name, keep_root_volume, force } => {
                self.delete_vm(&name, keep_root_volume, force, op)
            }
            Mutation::CreateVolume { name, size, image } => self.create_volume(name, size, image, op),
            Mutation::DeleteVolume { name } => self.delete_volume(&name, op),
            Mutation::CreateSnapshot { name } => self.create_snapshot(&name, op),
            Mutation::DeleteSnapshot { name } => self.delete_snapshot(&name, op),
            Mutation::ResizeVolume { name, size } => self.resize_volume(&name, size, op),
            Mutation::CloneVolume { source, name, size } => self.clone_volume(&source, name, size, op),
            Mutation::RollbackVolume { name, discard_later } => {
                self.rollback_volume(&name, discard_later, op)
            }
            Mutation::FlattenVolume { name } => self.flatten_volume(&name, op),
            Mutation::CreateVdcSnapshot { name, consistency } => {
                self.create_vdc_snapshot(&name, consistency, op)
            }
            Mutation::DeleteVdcSnapshot { name } => self.delete_vdc_snapshot(&name, op),
            Mutation::CreateExport { volume, snapshot, writable, once, release, ttl } => {
                self.create_export(&volume, snapshot, (writable, once, release), ttl, op)
            }
            Mutation::DeleteExport { id } => self.delete_export(&id, op),
            Mutation::BeginImport { name, cmdline } => self.begin_import(name, &cmdline, op),
            Mutation::DeleteImage { name } => self.delete_image(&name, op),
            Mutation::Taking { token, mutation } => {
                self.taking = Some(token);
                self.mutate(*mutation, op);
                self.taking = None;
                return;
            }
            Mutation::At { expected, mutation } => match self.at_generation(&mutation, expected) {
                Ok(()) => return self.mutate(*mutation, op),
                Err(error) => refuse(op, error),
            },
        };
        if let Err(refused) = refused {
            refused.answer();
        }
    }

    fn timer(&mut self, timer: Timer) {
        match timer {
            Timer::Restart { vm, ticket } => self.restart_due(vm, ticket),
            Timer::StopDeadline { vm, ticket } => self.stop_deadline(vm, ticket),
            Timer::AdoptAgain { vm } => self.adopt_again(vm),
            Timer::ExportExpired { id } => self.export_expired(&id),
            Timer::MergeAgain { volume } => self.merge_again(volume),
            // What has ended is gone by now: see `set_clock`.
            Timer::ReservationsEnd => self.wake_at = None,
        }
    }

    fn next_ticket(&mut self) -> u64 {
        self.ticket += 1;
        self.ticket
    }

    /// An event for [`State::commit`], which numbers it.
    fn event(&self, resource: String, kind: &str, message: impl Into<String>) -> Change {
        let message = message.into();
        if resource.contains("/vms/") {
            tracing::info!(vm = resource, kind, "{message}");
        } else if resource.contains("/volumes/") {
            tracing::info!(volume = resource, kind, "{message}");
        } else if resource.starts_with("vdcs/") {
            tracing::info!(vdc = resource, kind, "{message}");
        } else {
            tracing::info!(resource, kind, "{message}");
        }
        Change::Event(EventRecord { number: 0, time: self.now, resource, kind: kind.to_owned(), message })
    }

    fn number_events(&self, changes: &mut [Change]) {
        let mut number = self.model.last_event;
        for change in changes {
            if let Change::Event(event) = change {
                number += 1;
                event.number = number;
            }
        }
    }

    /// Writes changes, then follows them. On an error nothing has changed.
    fn commit(&mut self, mut changes: Vec<Change>) -> Result<(), Error> {
        self.number_events(&mut changes);
        self.store.commit(&changes)?;
        changes.iter().for_each(|change| self.follow(change));
        changes.into_iter().for_each(|change| self.model.apply(change));
        Ok(())
    }

    /// Writes what has *happened*: memory follows even if the disk does not take it. The next start then finds the
    /// older row and reconciles it with what is.
    fn record(&mut self, mut changes: Vec<Change>) {
        self.number_events(&mut changes);
        let stored = self.store.commit(&changes);
        if let Err(error) = &stored {
            tracing::error!("{}; what happened is kept in memory only", crate::error::chain(error));
        }
        for change in changes {
            if stored.is_ok() || !matches!(change, Change::Event(_)) {
                self.follow(&change);
                self.model.apply(change);
            }
        }
    }

    /// The row that remembers a request, if the client gave an id.
    fn remember(&self, op: &Op, resource: String) -> Option<Change> {
        op.request.as_ref().map(|request| Change::Request(request.record(resource, self.steady)))
    }

    /// The change that forgets a request whose work was undone, so that it may be tried again.
    fn forget(request: Option<&Request>) -> Option<Change> {
        request.map(|r| Change::Delete(serio_store::Key::Request(r.id)))
    }
}

/// Sends an answer; a client that is gone does not matter.
fn answer(reply: Reply, result: Result<Answer, Error>) {
    let _ = reply.send(result);
}

/// A refusal gives the operation back, so that no reply is lost.
struct Refused(Box<(Op, Error)>);

impl Refused {
    fn answer(self) {
        let (op, error) = *self.0;
        op.finish(Err(error));
    }
}

fn refuse<T>(op: Op, error: Error) -> Result<T, Refused> {
    Err(Refused(Box::new((op, error))))
}

/// Runs a fallible piece; on an error returns it with the operation.
macro_rules! check {
    ($op:ident, $result:expr) => {
        match $result {
            Ok(value) => value,
            Err(error) => return $crate::state::refuse($op, error),
        }
    };
}
use check;

#[cfg(test)]
mod agree_test;
#[cfg(test)]
mod bootdisk_test;
#[cfg(test)]
mod clock_test;
#[cfg(test)]
mod crash_test;
#[cfg(test)]
pub(crate) mod orders_test;
#[cfg(test)]
mod plugs_test;
#[cfg(test)]
mod sim_test;
#[cfg(test)]
mod state_test;
#[cfg(test)]
mod update_test;
#[cfg(test)]
mod vm_imports_test;
#[cfg(test)]
mod vm_orders_test;
#[cfg(test)]
mod vm_snapshots_test;
#[cfg(test)]
mod world_test;
