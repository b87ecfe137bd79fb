//! The rings of a pair in the kernel's hands: where the host has vhost-net, packets pass without our thread.
//!
//! ```text
//!            nothing needs the packets to pass here, and the interrupts can be lent
//!   ours ───────────────────────────────────────────────────────────────────────────► the kernel's
//!    ▲                                                                                     │
//!    └── limits are set, the tap is gone, a suspension, a reset, a chain that makes no sense ┘
//! ```
//!
//! What keeps them here: limits, which the kernel does not know; a log of the guest's memory, which it does not keep; a driver
//! that polls or has its interrupts masked when the card starts. A chain that makes no sense to the kernel is looked at here too: what is
//! answered and what breaks the device is the same for both. The control queue is ours in any case. The pair's thread sleeps
//! meanwhile, woken by none of the pair's events but those that end it.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use serio_hv::{GuestMemory, VhostNet, VhostRing};
use serio_virtio::{ActivateError, ActiveQueue, LentLine, QueueError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Link;
use crate::limit::Limiter;
use crate::worker::Poller;

/// What a kernel must know that takes over rings which use it: mergeable buffers, indirect descriptors, event indexes, version 1.
const RING_FEATURES: u64 = 1 << 15 | 1 << 28 | 1 << 29 | 1 << 32;

/// Moves packets between a cable and two rings past this process.
pub trait Shortcut: Send + Sync {
    /// The feature bits that it knows.
    fn features(&self) -> u64;

    /// Begins, with the ring for receiving first. On an error nothing has begun.
    fn start(
        &self,
        memory: &GuestMemory,
        features: u64,
        link: BorrowedFd<'_>,
        rings: &[VhostRing<'_>; 2],
    ) -> io::Result<()>;

    /// Ends, and returns when the rings are no longer touched. What was taken has been given back, in its order.
    fn stop(&self);
}

impl Shortcut for VhostNet {
    fn features(&self) -> u64 {
        VhostNet::features(self)
    }

    fn start(
        &self,
        memory: &GuestMemory,
        features: u64,
        link: BorrowedFd<'_>,
        rings: &[VhostRing<'_>; 2],
    ) -> io::Result<()> {
        VhostNet::start(self, memory, features, link, rings)
    }

    fn stop(&self) {
        VhostNet::stop(self);
    }
}

/// One pair's way into the kernel and back.
pub(super) struct Handover {
    features: u64,
    /// Signalled by the kernel: a chain makes no sense.
    error: EventFd,
    /// Rung when limits change, as long as somebody holds it.
    _changed: Arc<EventFd>,
    /// The interrupts, while the kernel has the rings.
    lines: Option<[LentLine; 2]>,
    /// It may be worth another attempt.
    pub(super) due: bool,
}

impl Handover {
    /// For a pair whose driver and device agreed on these features. `None`: the kernel does not know some of them.
    pub(super) fn new(
        shortcut: &dyn Shortcut,
        features: u64,
        limiters: [&Limiter; 2],
        (poller, error_token, changed_token): (&Poller, u64, u64),
    ) -> Result<Option<Handover>, ActivateError> {
        let features = features & RING_FEATURES;
        if features & !shortcut.features() != 0 {
            return Ok(None);
        }
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let made = ActivateError::io("make an eventfd for the kernel's network device");
        let (error, changed) = event().and_then(|error| Ok((error, Arc::new(event()?)))).map_err(made)?;
        poller
            .add_event(&error, error_token)
            .and_then(|()| poller.add_event(&changed, changed_token))
            .map_err(ActivateError::io("watch the kernel's network device"))?;
        limiters.into_iter().for_each(|limiter| limiter.watch(&changed));
        Ok(Some(Handover { features, error, _changed: changed, lines: None, due: true }))
    }

    /// Whether the kernel has the rings.
    pub(super) fn is_taken(&self) -> bool {
        self.lines.is_some()
    }

    /// Hands the rings over, if their interrupts can be lent now.
    pub(super) fn give(&mut self, link: &dyn Link, rings: [&ActiveQueue; 2]) -> io::Result<()> {
        self.due = false;
        let [rx, tx] = rings;
        let (Some(shortcut), Some(rx_line), Some(tx_line)) =
            (link.shortcut(), rx.interrupt.lend(), tx.interrupt.lend())
        else {
            return Ok(());
        };
        let rings = [ring(rx, &rx_line, &self.error), ring(tx, &tx_line, &self.error)];
        shortcut.start(rx.queue.memory(), self.features, link.as_fd(), &rings)?;
        self.lines = Some([rx_line, tx_line]);
        Ok(())
    }

    /// Takes them back.
    pub(super) fn take(&mut self, link: &dyn Link, rings: [&mut ActiveQueue; 2]) -> Result<(), QueueError> {
        let (Some(_lines), Some(shortcut)) = (self.lines.take(), link.shortcut()) else { return Ok(()) };
        shortcut.stop();
        rings.into_iter().try_for_each(|ring| ring.queue.catch_up())
    }
}

fn ring<'a>(active: &'a ActiveQueue, line: &'a LentLine, error: &'a EventFd) -> VhostRing<'a> {
    let [descriptors, avail, used] = active.queue.places();
    VhostRing {
        size: active.queue.size(),
        next_avail: active.queue.next_avail(),
        descriptors,
        avail,
        used,
        kick: &active.kick,
        call: line.event(),
        error,
    }
}
