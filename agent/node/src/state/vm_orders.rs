//! What is asked of a running machine and soon done: reset, pause, resume.
//!
//! ```text
//!   row `running` ── Pause ──▶ row `paused` (first), then the VMM   ── Resume ──▶ the VMM, then row `running`
//! ```
//! While a VM may be standing still its row says `paused`: a seriod that dies between the two finds a row that it can make
//! true ([`super::plan::found`]), and one that is told `running` never stands still.
//!
//! Invariant: one order a VM at a time. An order knows the process that it was for: its word about one that has ended
//! since changes nothing.

use serio_store::{
    Change,
    record::{Run, VmRecord},
};
use serio_types::{VdcName, resource};
use uuid::Uuid;

use super::{
    Refused, State, check,
    effect::Effect,
    phase::{Op, Phase},
    refuse,
};
use crate::error::Error;

/// What a running machine can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As by the reset button.
    Reset,
    /// Stand still.
    Pause,
    /// Go on.
    Resume,
    /// Be saved: asked by its own effect, and kept here so that nothing else is asked meanwhile.
    Save,
    /// Get a device or give one back: the same.
    Plug,
}

impl Order {
    const fn operation(self) -> &'static str {
        match self {
            Self::Reset => "a reset",
            Self::Pause => "a pause",
            Self::Resume => "a resume",
            Self::Save => "a snapshot",
            Self::Plug => "a change of its disks or cards",
        }
    }
}

/// An order that is not answered yet.
#[derive(Debug)]
pub(super) struct Pending {
    order: Order,
    /// The process that has it.
    pid: u32,
    op: Op,
}

impl Pending {
    /// Where a repeated request can join.
    pub(super) fn op_mut(&mut self) -> &mut Op {
        &mut self.op
    }
}

impl State {
    /// Says whether the guest could hear a power button.
    pub(super) fn listening(&self, vm: &VmRecord) -> Result<(), Error> {
        let resource = resource::vm(&self.model.vm_name(vm));
        if let Some(pending) = self.vm_orders.get(&vm.uid) {
            return Err(Error::Busy { resource, operation: pending.order.operation() });
        }
        if vm.run == Run::Paused {
            let why = "is paused and cannot hear that: resume it first, or stop it with force";
            return Err(Error::precondition(resource, why));
        }
        Ok(())
    }

    /// What is being done to a running VM, that other work has to wait for.
    pub(super) fn order_under_way(&self, vm: Uuid) -> Option<&'static str> {
        self.vm_orders.get(&vm).map(|pending| pending.order.operation())
    }

    pub(super) fn order_vm(&mut self, name: &VdcName, order: Order, op: Op) -> Result<(), Refused> {
        let record = check!(op, self.idle_vm(name)).clone();
        let (uid, resource) = (record.uid, resource::vm(name));
        let Some(Phase::Running { pid }) = self.phases.get(&uid) else {
            let why = if order == Order::Reset { "does not run: start it instead" } else { "does not run" };
            return refuse(op, Error::precondition(resource, why));
        };
        let pid = *pid;
        if let Some(operation) = self.order_under_way(uid) {
            return refuse(op, Error::Busy { resource, operation });
        }
        let paused = record.run == Run::Paused;
        match order {
            Order::Reset => check!(op, self.listening(&record)),
            Order::Pause if paused => return refuse(op, Error::precondition(resource, "is paused already")),
            Order::Resume if !paused => return refuse(op, Error::precondition(resource, "is not paused")),
            Order::Pause | Order::Resume | Order::Save | Order::Plug => {}
        }
        let mut changes: Vec<Change> = self.remember(&op, resource).into_iter().collect();
        if order == Order::Pause {
            changes.push(Self::run_as(record, Run::Paused));
        }
        check!(op, self.commit(changes));
        self.give_order(uid, pid, order, op);
        Ok(())
    }

    pub(super) fn give_order(&mut self, uid: Uuid, pid: u32, order: Order, op: Op) {
        self.vm_orders.insert(uid, Pending { order, pid, op });
        self.out.push(Effect::Order { vm: uid, pid, order });
    }

    fn run_as(mut record: VmRecord, run: Run) -> Change {
        record.run = run;
        record.generation = record.generation.next();
        Change::Vm(Box::new(record))
    }

    pub(super) fn ordered(&mut self, uid: Uuid, order: Order, result: Result<(), Error>) {
        let Some(Pending { pid, op, .. }) = self.vm_orders.remove(&uid) else { return };
        let same = matches!(self.phases.get(&uid), Some(Phase::Running { pid: now }) if *now == pid);
        let record = self.model.vms.get(&uid).cloned().filter(|_| same);
        let forget = Self::forget(op.request.as_ref());
        let Some(record) = record else {
            self.record(forget.into_iter().collect());
            let ended = Error::precondition(self.model.vm_resource(uid), "ended meanwhile");
            return op.finish(Err(result.err().unwrap_or(ended)));
        };
        let resource = self.model.vm_resource(uid);
        let event = |kind, message: &str| self.event(resource, kind, message);
        match (order, result) {
            (Order::Reset, Ok(())) => {
                let event = event("reset", "it was reset");
                self.record(vec![event]);
            }
            (Order::Pause, Ok(())) => {
                let event = event("paused", "its guest stands still");
                self.record(vec![event]);
            }
            (Order::Resume, Ok(())) => {
                let event = event("resumed", "its guest goes on");
                self.record(vec![Self::run_as(record, Run::Running), event]);
            }
            (Order::Save | Order::Plug, Ok(())) => {}
            (_, Err(error)) => {
                self.record(forget.into_iter().collect());
                op.finish(Err(error));
                if order == Order::Pause {
                    // Perhaps it stands still nevertheless; the row says so until it surely does not.
                    self.give_order(uid, pid, Order::Resume, Op::default());
                }
                return;
            }
        }
        op.finish(self.answer_vm(uid));
    }

    /// Keeps other orders away while a VM is saved or its devices change.
    pub(super) fn hold_orders(&mut self, uid: Uuid, pid: u32, order: Order, op: Op) {
        self.vm_orders.insert(uid, Pending { order, pid, op });
    }

    /// That is done, or not: the process that it was for, and who waits for it.
    pub(super) fn release_orders(&mut self, uid: Uuid, order: Order) -> Option<(u32, Op)> {
        if self.vm_orders.get(&uid)?.order != order {
            return None;
        }
        self.vm_orders.remove(&uid).map(|Pending { pid, op, .. }| (pid, op))
    }
}
