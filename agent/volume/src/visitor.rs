//! Who works inside the gate without being a queue: a merge. It enters and leaves like an operation, claims blocks like one,
//! and waits, where an operation would be parked.

use std::{io, sync::Arc};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use crate::{
    shared::{Claim, Core, QueueShared},
    uring::{clear, event_fd},
};

/// A wake-up that got lost would only cost so long, milliseconds.
const LOOK_MS: u8 = 10;

/// See the head of this file.
pub(crate) struct Visitor {
    core: Arc<Core>,
    shared: Arc<QueueShared>,
}

impl std::fmt::Debug for Visitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Visitor")
    }
}

/// Inside the gate until it is dropped.
pub(crate) struct Inside<'a>(&'a Visitor);

/// Some blocks, claimed until it is dropped.
pub(crate) struct Claimed<'a> {
    core: &'a Core,
    claim: Claim,
}

impl Visitor {
    pub(crate) fn new(core: &Arc<Core>) -> io::Result<Visitor> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let shared = Arc::new(QueueShared::new(Arc::new(event)));
        core.add_queue(&shared);
        Ok(Visitor { core: Arc::clone(core), shared })
    }

    /// Waits until the gate is open, and goes in.
    pub(crate) fn enter(&self) -> Inside<'_> {
        while !self.core.enter(&self.shared) {
            self.wait();
        }
        Inside(self)
    }

    fn wait(&self) {
        // An interruption only means one look too many.
        let mut fds = [PollFd::new(event_fd(&self.shared.event), PollFlags::POLLIN)];
        let _ = poll(&mut fds, PollTimeout::from(LOOK_MS));
        clear(&self.shared.event);
    }
}

impl Inside<'_> {
    /// Waits until nobody has any of these blocks, and takes them.
    pub(crate) fn claim(&self, claim: Claim) -> Claimed<'_> {
        let Visitor { core, shared } = self.0;
        while !core.claim(shared, claim) {
            self.0.wait();
        }
        Claimed { core, claim }
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.core.leave(&self.0.shared);
    }
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        self.core.release(self.claim);
    }
}
