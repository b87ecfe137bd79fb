//! The thread of a vcpu, and the gate that all of them pass before they enter guest code.
//!
//! ```text
//!   Paused ⇄ Running ──► Over      the gate; Over is final
//! ```
//!
//! Whoever changes the gate kicks all vcpus afterwards, so that none of them stays in guest code unaware. A vcpu that waits at
//! the gate is *parked*: the outcome of its last access is in its registers, and its state can be saved. That is done on
//! its own thread, which is the only one that may use it.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use serio_hv::{ExitReason, RunError, Vcpu, VcpuKick, VcpuState, VmError};
use serio_sandbox::{Kind, threads};

use super::bus::{Bus, BusHandle, Exits};
use crate::end::{End, EndSlot, chain};

/// Enough for the exit path and the devices it calls; measured use is below a third.
const STACK_BYTES: usize = 128 * 1024;

/// Whether vcpus may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum GateState {
    Running = 0,
    Paused = 1,
    Over = 2,
}

/// What vcpus look at between two entries into the guest.
pub(super) struct Gate {
    /// The same as in `inner`, for the look that takes no lock.
    fast: AtomicU8,
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    state: GateState,
    /// Vcpus that wait at the gate, with the outcome of their last access in their registers.
    parked: usize,
    /// Where parked vcpus put their state, by their number, while somebody wants it.
    wanted: Option<Vec<Option<Result<VcpuState, VmError>>>>,
}

impl Gate {
    pub(super) fn new(state: GateState) -> Gate {
        Gate {
            fast: AtomicU8::new(state as u8),
            inner: Mutex::new(Inner { state, parked: 0, wanted: None }),
            changed: Condvar::new(),
        }
    }

    /// Changes the state; nothing changes any more once it is over.
    pub(super) fn set(&self, new: GateState) {
        let mut inner = self.lock();
        if inner.state != GateState::Over {
            inner.state = new;
            self.fast.store(new as u8, Ordering::SeqCst);
            self.changed.notify_all();
        }
    }

    pub(super) fn get(&self) -> GateState {
        self.lock().state
    }

    /// Whether a vcpu may enter the guest at once.
    fn is_open(&self) -> bool {
        self.fast.load(Ordering::SeqCst) == GateState::Running as u8
    }

    /// Waits while paused, and gives the vcpu's state to whoever wants it; `false`: it is over.
    fn pass(&self, vcpu: &Vcpu) -> bool {
        let mut inner = self.lock();
        inner.parked = inner.parked.saturating_add(1);
        self.changed.notify_all();
        while inner.state == GateState::Paused {
            let place = usize::try_from(vcpu.id()).unwrap_or(usize::MAX);
            if let Some(slot) = inner.wanted.as_mut().and_then(|all| all.get_mut(place))
                && slot.is_none()
            {
                *slot = Some(vcpu.save());
                self.changed.notify_all();
            }
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.parked = inner.parked.saturating_sub(1);
        inner.state == GateState::Running
    }

    /// Waits until `count` vcpus are parked; `false`: the gate is not (or no longer) closed for a pause.
    fn wait_parked(&self, count: usize) -> bool {
        let inner = self.lock();
        let waits = |inner: &mut Inner| inner.state == GateState::Paused && inner.parked < count;
        let inner = self.changed.wait_while(inner, waits).unwrap_or_else(PoisonError::into_inner);
        inner.state == GateState::Paused
    }

    /// The state of all `count` vcpus, which are parked. `None`: the pause is over.
    fn collect(&self, count: usize) -> Option<Result<Vec<VcpuState>, VmError>> {
        let mut inner = self.lock();
        inner.wanted = Some((0..count).map(|_| None).collect());
        self.changed.notify_all();
        let waits = |inner: &mut Inner| {
            inner.state == GateState::Paused && inner.wanted.iter().flatten().any(Option::is_none)
        };
        let mut inner = self.changed.wait_while(inner, waits).unwrap_or_else(PoisonError::into_inner);
        inner.wanted.take()?.into_iter().collect::<Option<Vec<_>>>().map(|all| all.into_iter().collect())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").field("state", &self.get()).finish_non_exhaustive()
    }
}

/// All vcpus' handles, for whoever changes the gate.
#[derive(Debug, Clone)]
pub(super) struct Vcpus {
    pub(super) gate: Arc<Gate>,
    pub(super) kicks: Arc<[VcpuKick]>,
    /// Why each has left the guest, how often.
    pub(super) exits: Arc<[Exits]>,
}

impl Vcpus {
    pub(super) fn set(&self, state: GateState) {
        self.gate.set(state);
        self.kicks.iter().for_each(VcpuKick::kick);
    }

    /// Waits until no vcpu is in guest code any more, after [`GateState::Paused`] was set. `false`: it is not paused.
    pub(super) fn wait_parked(&self) -> bool {
        self.gate.wait_parked(self.kicks.len())
    }

    /// The state of all vcpus in the order of their numbers, while they are parked. `None`: the pause is over.
    pub(super) fn save(&self) -> Option<Result<Vec<VcpuState>, VmError>> {
        self.gate.collect(self.kicks.len())
    }
}

/// Starts the thread of one vcpu.
pub(super) fn spawn(
    vcpu: Vcpu,
    bus: Arc<Bus>,
    all: Vcpus,
    end: Arc<EndSlot>,
) -> std::io::Result<JoinHandle<()>> {
    let name = format!("vcpu{}", vcpu.id());
    threads::spawn(Kind::Vcpu, name, STACK_BYTES, move || {
        run(vcpu, bus, &all, &end);
        // One vcpu's end is the VM's: the others must not run on without it.
        all.set(GateState::Over);
    })
}

fn run(mut vcpu: Vcpu, bus: Arc<Bus>, all: &Vcpus, end: &EndSlot) {
    vcpu.bind_to_this_thread();
    let mut io = BusHandle::new(bus, all.exits.clone(), vcpu.id());
    loop {
        if !all.gate.is_open() {
            // An access that was answered has to be in the registers before anybody looks at them. Before the first run
            // there is none, and KVM returns at once all the same.
            match vcpu.complete(&mut io) {
                Ok(ExitReason::Kicked) => io.count(|exits| &exits.kicks),
                other => {
                    over(other, &vcpu).map(|over| end.set(over));
                    return;
                }
            }
            if !all.gate.pass(&vcpu) {
                return;
            }
        }
        let result = vcpu.run(&mut io);
        if let Ok(ExitReason::Kicked) = result {
            io.count(|exits| &exits.kicks);
        }
        match over(result, &vcpu) {
            None if io.is_over() => return,
            None => {}
            Some(over) => {
                end.set(over);
                return;
            }
        }
    }
}

/// What ends the VM; `None`: the vcpu runs on, or the reason is told already.
fn over(result: Result<ExitReason, RunError>, vcpu: &Vcpu) -> Option<End> {
    Some(match result {
        Ok(ExitReason::Handled | ExitReason::Kicked) => return None,
        Ok(ExitReason::Reset) => End::Reset,
        Ok(ExitReason::PowerOff) => End::PowerOff,
        Ok(ExitReason::Crash) => End::GuestError("the guest reported a crash of its kernel".to_owned()),
        Ok(ExitReason::TripleFault) => End::GuestError(format!(
            "triple fault: the guest faulted while handling a fault ({}); often a kernel for another machine, or \
             a damaged one",
            vcpu.state()
        )),
        Err(error @ RunError::Internal { .. }) => End::GuestError(chain(&error)),
        Err(error) => End::HostError(chain(&error)),
    })
}
