//! The host's end of a port: two bounded buffers, and who is there.
//!
//! ```text
//!   Session::send ──► to_guest  ──► DeviceEnd::take    (device thread) ──► the guest's buffers
//!   Session::receive ◄── from_guest ◄── DeviceEnd::offer (device thread) ◄── what the guest sends
//! ```
//!
//! - One [`Session`] at a time. Without one, what the guest sends is thrown away.
//! - What waits for the guest outlives the session: a last request (a thaw) shall arrive even when nobody waits for its
//!   answer. It is thrown away when the guest closes the port, since another program may open it next.
//! - No call waits longer than it was told to, whatever the guest does.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Bytes that may wait in each direction.
pub const BUFFER_BYTES_MAX: usize = 64 << 10;

/// Why nothing comes or goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// No program in the guest has the port open, or it has closed it meanwhile.
    #[error("no program in the guest has the port open")]
    NotOpen,
    /// The time was up.
    #[error("the guest did not answer in time")]
    TimedOut,
    /// The guest takes nothing: what waits for it fills the buffer.
    #[error("the guest does not read what it is sent")]
    Full,
    /// Somebody else talks with the guest.
    #[error("somebody else is talking with the guest")]
    Busy,
    /// The VM is at its end.
    #[error("the VM is ending")]
    Ended,
}

/// The host's end. Clones share it.
#[derive(Clone)]
pub struct HostPort {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// Something in `state` changed that a session may wait for.
    changed: Condvar,
    /// Wakes the device's thread.
    bell: EventFd,
}

#[derive(Debug, Default)]
struct State {
    to_guest: VecDeque<u8>,
    from_guest: VecDeque<u8>,
    /// A program in the guest has the port open; `opened` counts how often one has begun to.
    open: bool,
    opened: u64,
    session: bool,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        // Fails only when the counter is full, and then the thread is about to look anyway.
        let _ = self.bell.write(1);
    }

    /// Waits while `condition` holds; false: `deadline` has passed and it still does.
    fn wait_while<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        deadline: Instant,
        condition: impl Fn(&State) -> bool,
    ) -> (MutexGuard<'a, State>, bool) {
        while condition(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return (state, false);
            }
            state =
                self.changed.wait_timeout(state, left).map_or_else(|broken| broken.into_inner().0, |it| it.0);
        }
        (state, true)
    }
}

impl std::fmt::Debug for HostPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostPort").field("open", &self.is_open()).finish_non_exhaustive()
    }
}

impl HostPort {
    /// A port that no guest has yet.
    pub fn new() -> io::Result<HostPort> {
        let bell = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let shared = Shared { state: Mutex::default(), changed: Condvar::new(), bell };
        Ok(HostPort { shared: Arc::new(shared) })
    }

    /// Whether a program in the guest has the port open, as far as the guest says.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.shared.lock().open
    }

    /// How often a program in the guest has opened the port.
    #[must_use]
    pub fn times_opened(&self) -> u64 {
        self.shared.lock().opened
    }

    /// Waits until a program in the guest opens the port again, after it was opened `seen` times.
    pub fn wait_opened(&self, seen: u64, deadline: Instant) -> Result<(), PortError> {
        let state = self.shared.lock();
        let (state, done) = self.shared.wait_while(state, deadline, |s| !s.ended && s.opened <= seen);
        match (state.ended, done) {
            (true, _) => Err(PortError::Ended),
            (false, true) => Ok(()),
            (false, false) => Err(PortError::TimedOut),
        }
    }

    /// Begins to listen, when nobody else does any more; what the guest has sent until then is gone.
    pub fn session(&self, deadline: Instant) -> Result<Session, PortError> {
        let state = self.shared.lock();
        let (mut state, free) = self.shared.wait_while(state, deadline, |s| s.session && s.open && !s.ended);
        if state.ended {
            return Err(PortError::Ended);
        }
        if !free {
            return Err(PortError::Busy);
        }
        if !state.open {
            return Err(PortError::NotOpen);
        }
        state.session = true;
        state.from_guest.clear();
        Ok(Session { shared: self.shared.clone(), opened: state.opened })
    }

    /// The VM is at its end: whoever waits for the guest gets [`PortError::Ended`], now and later.
    pub fn end(&self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
    }

    /// The device's side.
    #[must_use]
    pub fn device(&self) -> DeviceEnd {
        DeviceEnd { shared: self.shared.clone() }
    }
}

/// The right to talk with the guest, until dropped.
pub struct Session {
    shared: Arc<Shared>,
    /// The program that opened the port when the session began; another one is not who was talked with.
    opened: u64,
}

impl Session {
    fn check(&self, state: &State) -> Result<(), PortError> {
        if state.ended {
            Err(PortError::Ended)
        } else if !state.open || state.opened != self.opened {
            Err(PortError::NotOpen)
        } else {
            Ok(())
        }
    }

    /// Gives bytes to the guest, all or none. Does not wait: a guest that takes nothing has a full buffer.
    pub fn send(&self, bytes: &[u8]) -> Result<(), PortError> {
        let mut state = self.shared.lock();
        self.check(&state)?;
        if bytes.len() > BUFFER_BYTES_MAX.saturating_sub(state.to_guest.len()) {
            return Err(PortError::Full);
        }
        state.to_guest.extend(bytes);
        drop(state);
        self.shared.ring();
        Ok(())
    }

    /// Appends what the guest sends, at least a byte and at most `bytes_max`, to `into`.
    pub fn receive(&self, into: &mut Vec<u8>, bytes_max: usize, deadline: Instant) -> Result<(), PortError> {
        let state = self.shared.lock();
        let (mut state, done) =
            self.shared.wait_while(state, deadline, |s| s.from_guest.is_empty() && self.check(s).is_ok());
        if state.from_guest.is_empty() {
            self.check(&state)?;
        }
        // Also when there is something: who only sends and never says what is asked for must not win time.
        if !done || Instant::now() >= deadline {
            return Err(PortError::TimedOut);
        }
        let count = state.from_guest.len().min(bytes_max);
        into.extend(state.from_guest.drain(..count));
        drop(state);
        // There is room now for a chain that waits.
        self.shared.ring();
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.session = false;
        state.from_guest.clear();
        drop(state);
        self.shared.changed.notify_all();
        self.shared.ring();
    }
}

/// What the device's thread does with the buffers. Never waits. Public for tests that play the guest.
pub struct DeviceEnd {
    shared: Arc<Shared>,
}

impl DeviceEnd {
    /// Rung when there is something to carry, or room again.
    #[must_use]
    pub fn bell(&self) -> &EventFd {
        &self.shared.bell
    }

    /// The guest says whether a program has the port open. What was meant for the one before is gone.
    pub fn set_open(&self, open: bool) {
        let mut state = self.shared.lock();
        if open && !state.open {
            state.opened = state.opened.wrapping_add(1);
        }
        if !open {
            state.to_guest.clear();
            state.from_guest.clear();
        }
        state.open = open;
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Whether something waits for the guest.
    #[must_use]
    pub fn has_some(&self) -> bool {
        !self.shared.lock().to_guest.is_empty()
    }

    /// Takes what waits for the guest, as far as it fits; the number of bytes.
    pub fn take(&self, into: &mut [u8]) -> usize {
        let mut state = self.shared.lock();
        let count = state.to_guest.len().min(into.len());
        for (byte, value) in into.iter_mut().zip(state.to_guest.drain(..count)) {
            *byte = value;
        }
        count
    }

    /// How many bytes a session takes now; `None`: nobody listens, and all of them may be dropped.
    #[must_use]
    pub fn room(&self) -> Option<usize> {
        let state = self.shared.lock();
        (state.session && state.open).then(|| BUFFER_BYTES_MAX.saturating_sub(state.from_guest.len()))
    }

    /// Gives the session what the guest has sent, at most [`DeviceEnd::room`] bytes.
    pub fn offer(&self, bytes: &[u8]) {
        let mut state = self.shared.lock();
        // It may have gone since it was asked.
        if state.session && state.open {
            state.from_guest.extend(bytes);
            drop(state);
            self.shared.changed.notify_all();
        }
    }
}
