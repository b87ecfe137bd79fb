//! What all threads of the agent share: where the VM is in its life, and who wants to hear of changes.
//!
//! ```text
//!   Waiting ──Launch──► Launching ──► Running ⇄ (paused) ──► Over
//!      │                    └── failed ───────────────────────►│
//!      └── no Launch in time, Stop ────────────────────────────►┘
//! ```

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use nix::sys::eventfd::{EfdFlags, EventFd};
use serio_control::message::{EndRecord, VmState, VmStatus};

use super::cut::Cuts;
use super::launch::Launched;
use super::merge::Merges;
use crate::devices::Devices;
use crate::end::End;
use crate::machine::Handle;

/// A connection's bell: rung when there is an event to send.
pub(super) type Bell = Arc<EventFd>;

/// The shared state.
pub(super) struct State {
    inner: Mutex<Inner>,
    /// Wakes the main thread.
    wake: EventFd,
    cuts: Arc<Cuts>,
    merges: Merges,
    plugging: Mutex<()>,
}

struct Inner {
    phase: Phase,
    vm_id: String,
    resets: u64,
    since: Option<Instant>,
    bells: Vec<Weak<EventFd>>,
}

enum Phase {
    Waiting,
    Launching,
    Running { handle: Handle, devices: Arc<Devices>, launched: Option<Box<Launched>> },
    Over(EndRecord),
}

/// A new non-blocking eventfd.
pub(super) fn bell() -> std::io::Result<EventFd> {
    Ok(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?)
}

impl State {
    pub(super) fn new() -> std::io::Result<State> {
        let inner =
            Inner { phase: Phase::Waiting, vm_id: String::new(), resets: 0, since: None, bells: Vec::new() };
        Ok(State {
            inner: Mutex::new(inner),
            wake: bell()?,
            cuts: Arc::default(),
            merges: Merges::default(),
            plugging: Mutex::default(),
        })
    }

    /// Held while a device comes, and while a machine is made anew after a reset: so it is in each of them.
    pub(super) fn plugging(&self) -> MutexGuard<'_, ()> {
        self.plugging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Merges of layers.
    pub(super) fn merges(&self) -> &Merges {
        &self.merges
    }

    /// Snapshots that are prepared.
    pub(super) fn cuts(&self) -> &Arc<Cuts> {
        &self.cuts
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable when the main thread has something to look at.
    pub(super) fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    pub(super) fn clear_wake(&self) {
        let _ = self.wake.read();
    }

    /// Tells everyone that something changed. Eventfds of ours never overflow: they are read before each wait.
    fn announce(&self, inner: &mut Inner) {
        inner.bells.retain(|bell| bell.upgrade().is_some_and(|bell| bell.write(1).is_ok()));
        let _ = self.wake.write(1);
    }

    /// Rings `bell` at each change from now on, as long as it lives.
    pub(super) fn subscribe(&self, bell: &Bell) {
        self.lock().bells.push(Arc::downgrade(bell));
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(self.lock().phase, Phase::Over(_))
    }

    /// The right to launch: given once.
    pub(super) fn begin_launch(&self, vm_id: &str) -> bool {
        let mut inner = self.lock();
        let free = matches!(inner.phase, Phase::Waiting);
        if free {
            inner.phase = Phase::Launching;
            inner.vm_id = vm_id.to_owned();
        }
        free
    }

    /// The VM runs. The main thread takes `launched` from here.
    pub(super) fn launched(&self, launched: Launched) {
        let mut inner = self.lock();
        inner.since = Some(Instant::now());
        inner.phase = Phase::Running {
            handle: launched.handle(),
            devices: launched.devices.clone(),
            launched: Some(Box::new(launched)),
        };
        self.announce(&mut inner);
    }

    pub(super) fn take_launched(&self) -> Option<Launched> {
        match &mut self.lock().phase {
            Phase::Running { launched, .. } => launched.take().map(|boxed| *boxed),
            _ => None,
        }
    }

    /// It boots again, as another machine.
    pub(super) fn rebooted(&self, new: Handle) {
        let mut inner = self.lock();
        inner.resets = inner.resets.saturating_add(1);
        if let Phase::Running { handle, .. } = &mut inner.phase {
            *handle = new;
        }
        self.announce(&mut inner);
    }

    pub(super) fn ended(&self, record: EndRecord) {
        let mut inner = self.lock();
        inner.phase = Phase::Over(record);
        self.announce(&mut inner);
    }

    /// Ends a process that nobody gave a VM; `false`: somebody just did.
    pub(super) fn give_up_waiting(&self) -> bool {
        let mut inner = self.lock();
        let waiting = matches!(inner.phase, Phase::Waiting);
        if waiting {
            inner.phase = Phase::Over(End::Stopped.record());
            self.announce(&mut inner);
        }
        waiting
    }

    /// The running VM, if there is one.
    pub(super) fn running(&self) -> Option<(Handle, Arc<Devices>)> {
        match &self.lock().phase {
            Phase::Running { handle, devices, .. } => Some((handle.clone(), devices.clone())),
            _ => None,
        }
    }

    /// Ends the VM, or the process that waits for one. `false`: it is being launched right now.
    pub(super) fn stop(&self, end: End) -> bool {
        if let Some((handle, _)) = self.running() {
            handle.stop(end);
            return true;
        }
        self.give_up_waiting() || self.is_over()
    }

    /// Something that `status` shows was changed.
    pub(super) fn changed(&self) {
        let mut inner = self.lock();
        self.announce(&mut inner);
    }

    /// The VM's status now.
    pub(super) fn status(&self) -> VmStatus {
        let inner = self.lock();
        let (state, end) = match &inner.phase {
            Phase::Waiting | Phase::Launching => (VmState::Waiting, None),
            Phase::Running { handle, .. } if handle.is_paused() => (VmState::Paused, None),
            Phase::Running { .. } => (VmState::Running, None),
            Phase::Over(record) => (VmState::Ended, Some(record.clone())),
        };
        let devices = match &inner.phase {
            Phase::Running { devices, .. } => Some(devices),
            _ => None,
        };
        let (disks, nics) = devices.map(|devices| (devices.disks(), devices.nics())).unwrap_or_default();
        VmStatus {
            vm_id: inner.vm_id.clone(),
            state: state.into(),
            end,
            resets: inner.resets,
            uptime_ns: inner
                .since
                .map_or(0, |since| u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            troubles: devices.map(|devices| devices.troubles()).unwrap_or_default(),
            disks: disks.iter().map(|disk| disk.name.clone()).collect(),
            nics: nics.iter().map(|nic| nic.name()).collect(),
        }
    }
}
