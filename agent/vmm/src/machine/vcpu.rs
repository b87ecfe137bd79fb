//! The thread of a vcpu, and the gate that all of them pass before they enter guest code.
//!
//! ```text
//!   Paused ⇄ Running ──► Over      the gate; Over is final
//! ```
//!
//! Whoever changes the gate kicks all vcpus afterwards, so that none of them stays in guest code unaware.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use serio_hv::{ExitReason, RunError, Vcpu, VcpuKick};
use serio_sandbox::{Kind, threads};

use super::bus::{Bus, BusHandle};
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
#[derive(Debug)]
pub(super) struct Gate {
    /// The same as in `state`, for the look that takes no lock.
    fast: AtomicU8,
    state: Mutex<GateState>,
    changed: Condvar,
}

impl Gate {
    pub(super) fn new() -> Gate {
        Gate {
            fast: AtomicU8::new(GateState::Running as u8),
            state: Mutex::new(GateState::Running),
            changed: Condvar::new(),
        }
    }

    /// Changes the state; nothing changes any more once it is over.
    pub(super) fn set(&self, new: GateState) {
        let mut state = self.lock();
        if *state != GateState::Over {
            *state = new;
            self.fast.store(new as u8, Ordering::SeqCst);
            self.changed.notify_all();
        }
    }

    pub(super) fn get(&self) -> GateState {
        *self.lock()
    }

    /// Waits while paused; `false`: it is over.
    fn pass(&self) -> bool {
        if self.fast.load(Ordering::SeqCst) == GateState::Running as u8 {
            return true;
        }
        let state = self
            .changed
            .wait_while(self.lock(), |state| *state == GateState::Paused)
            .unwrap_or_else(PoisonError::into_inner);
        *state == GateState::Running
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All vcpus' handles, for whoever changes the gate.
#[derive(Debug, Clone)]
pub(super) struct Vcpus {
    pub(super) gate: Arc<Gate>,
    pub(super) kicks: Arc<[VcpuKick]>,
}

impl Vcpus {
    pub(super) fn set(&self, state: GateState) {
        self.gate.set(state);
        self.kicks.iter().for_each(VcpuKick::kick);
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
    let mut io = BusHandle(bus);
    while all.gate.pass() {
        let over = match vcpu.run(&mut io) {
            Ok(ExitReason::Handled) => {
                // An access of this very vcpu may have been the guest's last: power-off, reset.
                if !io.0.end.is_set() {
                    continue;
                }
                return;
            }
            Ok(ExitReason::Kicked) => continue,
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
        };
        end.set(over);
        return;
    }
}
