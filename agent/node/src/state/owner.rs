//! The thread that owns the state, and the handle by which others ask it.
//!
//! ```text
//!   gRPC ──Client::ask──▶ inputs (bounded) ──▶ owner thread: step, commit ──▶ Executor::begin
//!   executor ────────────▶                            └──▶ watch: last event, snapshot for the capacity report
//! ```
//!
//! A thread of its own, because a commit waits for the disk: the runtime's workers never do.
//!
//! The pictures of everything (capacity report, holdings) cost in proportion to everything. So a question makes none, and of
//! inputs that wait in a row the last one does, or each sixty-fourth: a node with a thousand VMs still answers at once.

use std::{collections::BTreeMap, io, thread};

use serio_api::v1::{Allocation, AllocationClass, AllocationState};
use serio_store::record::{Made, VmRecord};
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

/// So many inputs share one picture at most.
const UNSEEN_MAX: u32 = 64;

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
    let pictures = Pictures { snapshot, holdings, recovered };
    thread::Builder::new().name("state".to_owned()).spawn(move || {
        first.into_iter().for_each(&begin);
        let mut unseen = 0;
        while let Some(input) = inputs.blocking_recv() {
            // Who asks after a change was answered, and then looks, sees that change.
            if unseen > 0 && matches!(input, Input::Command(Command::Query(_), _)) {
                pictures.make(&state);
                unseen = 0;
            }
            state.step(clock.now(), input).into_iter().for_each(&begin);
            let newest = state.model().last_event;
            last_event.send_if_modified(|known| std::mem::replace(known, newest) != newest);
            let version = state.operations_version();
            operations.send_if_modified(|known| std::mem::replace(known, version) != version);
            if state.take_changed() || unseen > 0 {
                unseen += 1;
            }
            if unseen >= UNSEEN_MAX || (unseen > 0 && inputs.is_empty()) {
                pictures.make(&state);
                unseen = 0;
            }
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

/// Pictures of everything, for those who watch.
struct Pictures {
    snapshot: watch::Sender<Snapshot>,
    holdings: watch::Sender<Holdings>,
    recovered: watch::Sender<bool>,
}

/// Tells who watches, if it is news.
fn tell<T: PartialEq>(watched: &watch::Sender<T>, new: T) {
    watched.send_if_modified(|known| {
        let changed = *known != new;
        *known = new;
        changed
    });
}

impl Pictures {
    fn make(&self, state: &State) {
        tell(&self.snapshot, state.snapshot());
        tell(&self.holdings, state.holdings());
        tell(&self.recovered, state.recovered());
    }
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

/// A reservation that a VM has.
fn taken(promise: &Promise) -> Option<(&str, &Promise)> {
    match &promise.stage {
        Stage::Taken(vm) => Some((vm, promise)),
        Stage::Pending { .. } | Stage::Committed => None,
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
        let model = self.model();
        let taken: BTreeMap<&str, &Promise> = self.ledger().promises().filter_map(taken).collect();
        let mut running = Vec::new();
        let mut allocation = |vm: &VmRecord| {
            let (state, pid) = self.standing(vm);
            let state = match state {
                VmState::Stopped | VmState::Failed => AllocationState::Reserved,
                VmState::Starting | VmState::Running | VmState::Paused | VmState::Stopping => {
                    AllocationState::Active
                }
            };
            running.extend(pid.map(|pid| (pid, vm.spec.memory.bytes())));
            let id = vm.uid.to_string();
            let reserved = reserved(taken.get(id.as_str()).copied());
            Allocation {
                id,
                generation: vm.generation.0,
                resource: model.vm_resource(vm.uid),
                state: state.into(),
                vcpus: vm.spec.vcpus.get(),
                memory_bytes: vm.spec.memory.bytes(),
                ..reserved
            }
        };
        let vms: Vec<Allocation> = model.vms.values().map(&mut allocation).collect();
        let open = self.ledger().promises().filter_map(open_reservation);
        let images = model.images.values().filter(|r| r.state == Made::Ready);
        Snapshot {
            allocations: vms.into_iter().chain(open).collect(),
            drain_reason: self.ledger().drained().map(str::to_owned),
            fence_generation: self.ledger().fence_generation(),
            images: images.map(|r| r.name.to_string()).collect(),
            provisioned_bytes: model.volumes.values().map(|v| v.size_bytes).sum(),
            running,
        }
    }
}
