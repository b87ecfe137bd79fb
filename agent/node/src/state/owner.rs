//! The thread that owns the state, and the handle by which others ask it.
//!
//! ```text
//!   gRPC ──Client::ask──▶ inputs (bounded) ──▶ owner thread: step, commit ──▶ Executor::begin
//!   executor ────────────▶                            └──▶ watch: last event, snapshot for the capacity report
//! ```
//!
//! A thread of its own, because a commit waits for the disk: the runtime's workers never do.

use std::{io, thread};

use serio_api::v1::{Allocation, AllocationClass, AllocationState};
use serio_store::record::Made;
use serio_types::resource;
use serio_vdc::ledger::{Class, Promise, Stage};
use tokio::sync::{mpsc, oneshot, watch};
use uuid::Uuid;

use super::{
    State,
    command::{Answer, Command, VmState},
    effect::{Effect, Input},
    holdings::Holdings,
    orders::HostLimits,
};
use crate::{capacity::Snapshot, clock::Clock, error::Error};

/// Inputs that may wait; more callers wait for their turn.
pub const INPUTS_MAX: usize = 256;

/// What others may watch.
#[derive(Debug, Clone)]
pub struct Watches {
    /// The newest event's number.
    pub last_event: watch::Receiver<u64>,
    /// Counts the changes of operations.
    pub operations: watch::Receiver<u64>,
    /// What is promised.
    pub snapshot: watch::Receiver<Snapshot>,
    /// What each vdc holds.
    pub holdings: watch::Receiver<Holdings>,
    /// All that ran before the start is known again.
    pub recovered: watch::Receiver<bool>,
}

/// Asks the owner. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    inputs: mpsc::Sender<Input>,
    last_event: watch::Receiver<u64>,
    operations: watch::Receiver<u64>,
}

impl Client {
    /// One that asks over `inputs`.
    #[must_use]
    pub fn new(inputs: mpsc::Sender<Input>, watches: &Watches) -> Self {
        Self { inputs, last_event: watches.last_event.clone(), operations: watches.operations.clone() }
    }

    /// Asks, and waits for the answer. The operation goes on if the caller does not wait.
    ///
    /// # Errors
    /// What the state says, or [`Error::Ending`].
    pub async fn ask(&self, command: Command) -> Result<Answer, Error> {
        let (reply, answer) = oneshot::channel();
        self.inputs.send(Input::Command(command, reply)).await.map_err(|_| Error::Ending)?;
        answer.await.map_err(|_| Error::Ending)?
    }

    /// Says how far an operation is that was begun by [`Command::BeginOperation`]. A few times a second is enough; while the
    /// state has much to do, what it would not hear in time is left out.
    pub fn progress(&self, operation: Uuid, done_bytes: u64, total_bytes: u64) {
        let _ = self.inputs.try_send(Input::Progress { operation, done_bytes, total_bytes });
    }

    /// Tells the state what the reporter has read of the host.
    pub async fn host(&self, host: HostLimits) {
        // A state that is gone has no use for it.
        let _ = self.inputs.send(Input::Host(host)).await;
    }

    /// Changes with each operation.
    #[must_use]
    pub fn operations(&self) -> watch::Receiver<u64> {
        self.operations.clone()
    }

    /// Changes with each event.
    #[must_use]
    pub fn last_event(&self) -> watch::Receiver<u64> {
        self.last_event.clone()
    }
}

/// Starts the owner; `first` are the effects of the recovery, by the clock. It ends when all senders of `inputs` are gone.
///
/// # Errors
/// The thread cannot be made.
pub fn spawn(
    mut state: State,
    (clock, first): (Clock, Vec<Effect>),
    mut inputs: mpsc::Receiver<Input>,
    begin: impl Fn(Effect) + Send + 'static,
) -> io::Result<Watches> {
    let (last_event, watch_event) = watch::channel(state.model().last_event);
    let (operations, watch_operations) = watch::channel(state.operations_version());
    let (snapshot, watch_snapshot) = watch::channel(state.snapshot());
    let (holdings, watch_holdings) = watch::channel(state.holdings());
    let (recovered, watch_recovered) = watch::channel(state.recovered());
    thread::Builder::new().name("state".to_owned()).spawn(move || {
        first.into_iter().for_each(&begin);
        while let Some(input) = inputs.blocking_recv() {
            state.step(clock.now(), input).into_iter().for_each(&begin);
            let newest = state.model().last_event;
            last_event.send_if_modified(|known| std::mem::replace(known, newest) != newest);
            let version = state.operations_version();
            operations.send_if_modified(|known| std::mem::replace(known, version) != version);
            let promised = state.snapshot();
            snapshot.send_if_modified(|known| {
                let changed = *known != promised;
                *known = promised;
                changed
            });
            let held = state.holdings();
            holdings.send_if_modified(|known| {
                let changed = *known != held;
                *known = held;
                changed
            });
            let settled = state.recovered();
            recovered.send_if_modified(|known| std::mem::replace(known, settled) != settled);
        }
    })?;
    Ok(Watches {
        last_event: watch_event,
        operations: watch_operations,
        snapshot: watch_snapshot,
        holdings: watch_holdings,
        recovered: watch_recovered,
    })
}

/// What an allocation has of the reservation that it is, or that its VM has taken.
fn reserved(promise: Option<&Promise>) -> Allocation {
    let class = match promise.map(|p| p.want.class) {
        None | Some(Class::Normal) => AllocationClass::Normal,
        Some(Class::DrHeld) => AllocationClass::DrHeld,
    };
    Allocation {
        class: class.into(),
        numa_node: promise.and_then(|p| p.numa_node),
        token: promise.map(|p| p.token.clone()).unwrap_or_default(),
        key: promise.map(|p| p.want.key.clone()).unwrap_or_default(),
        fence_generation: promise.map_or(0, |p| p.want.fence),
        ..Allocation::default()
    }
}

/// A reservation that no VM has yet.
fn open_reservation(promise: &Promise) -> Option<Allocation> {
    let state = match promise.stage {
        Stage::Pending { .. } => AllocationState::Pending,
        Stage::Committed => AllocationState::Reserved,
        Stage::Taken(_) => return None,
    };
    Some(Allocation {
        id: promise.token.clone(),
        resource: promise.want.resource.clone(),
        state: state.into(),
        vcpus: u32::try_from(promise.want.amount.vcpus).unwrap_or(u32::MAX),
        memory_bytes: promise.want.amount.memory_bytes,
        storage_bytes: promise.want.amount.storage_bytes,
        ..reserved(Some(promise))
    })
}

impl State {
    /// What the node promises now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let views: Vec<_> = self.model().vms.values().map(|r| self.vm_view(r)).collect();
        let allocation = |view: &super::command::VmView| {
            let state = match view.state {
                VmState::Stopped | VmState::Failed => AllocationState::Reserved,
                VmState::Starting | VmState::Running | VmState::Paused | VmState::Stopping => {
                    AllocationState::Active
                }
            };
            Allocation {
                id: view.record.uid.to_string(),
                generation: view.record.generation.0,
                resource: resource::vm(&view.name),
                state: state.into(),
                vcpus: view.record.spec.vcpus.get(),
                memory_bytes: view.record.spec.memory.bytes(),
                ..reserved(self.ledger().of_vm(&view.record.uid.to_string()))
            }
        };
        let open = self.ledger().promises().filter_map(open_reservation);
        let images = self.model().images.values().filter(|r| r.state == Made::Ready);
        Snapshot {
            allocations: views.iter().map(allocation).chain(open).collect(),
            drain_reason: self.ledger().drained().map(str::to_owned),
            fence_generation: self.ledger().fence_generation(),
            images: images.map(|r| r.name.to_string()).collect(),
            provisioned_bytes: self.model().volumes.values().map(|v| v.size_bytes).sum(),
            running: views
                .iter()
                .filter_map(|v| v.pid.map(|pid| (pid, v.record.spec.memory.bytes())))
                .collect(),
        }
    }
}
