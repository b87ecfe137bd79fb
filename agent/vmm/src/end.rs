//! How a VM ends: the reasons, and the place where the first of them is kept.
//!
//! Any thread may say that the VM is over; the first one wins, because what comes later is usually its consequence.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};
use serio_control::message::{EndKind, EndRecord};

/// Why a VM is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// Somebody outside asked for its end.
    Stopped,
    /// The guest broke itself; says how and where.
    GuestError(String),
    /// KVM or the host failed it; says how and where.
    HostError(String),
}

impl End {
    /// The record that outlives the process.
    pub fn record(&self) -> EndRecord {
        let (kind, reason) = match self {
            End::PowerOff => (EndKind::PowerOff, "the guest powered off"),
            End::Reset => (EndKind::Reset, "the guest reset, and its policy is to end then"),
            End::Stopped => (EndKind::Stopped, "stopped on request"),
            End::GuestError(reason) => (EndKind::GuestError, reason.as_str()),
            End::HostError(reason) => (EndKind::HostError, reason.as_str()),
        };
        EndRecord { kind: kind.into(), reason: reason.to_owned() }
    }
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.record().reason)
    }
}

/// An error with all its causes, in one line: what a person reads, at the top of a process.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Holds the first [`End`], and wakes whoever waits for one.
#[derive(Debug)]
pub struct EndSlot {
    end: Mutex<Option<End>>,
    over: AtomicBool,
    event: EventFd,
}

impl EndSlot {
    /// An empty slot.
    pub fn new() -> std::io::Result<EndSlot> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(EndSlot { end: Mutex::default(), over: AtomicBool::new(false), event })
    }

    /// Says that the VM is over. `false`: somebody else said so before.
    pub fn set(&self, end: End) -> bool {
        let mut slot = self.lock();
        if slot.is_some() {
            return false;
        }
        *slot = Some(end);
        self.over.store(true, Ordering::Release);
        // Fails only when the counter overflows, and it counts to one.
        let _ = self.event.write(1);
        true
    }

    /// Whether somebody has said so. Takes no lock: vcpus ask after each exit.
    pub fn is_set(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// The end, if there is one.
    pub fn get(&self) -> Option<End> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<End>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Readable once the VM is over.
impl AsFd for EndSlot {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_stays() {
        let slot = EndSlot::new().expect("eventfd");
        assert_eq!(slot.get(), None);
        assert!(slot.set(End::PowerOff));
        assert!(!slot.set(End::HostError("later".into())));
        assert_eq!(slot.get(), Some(End::PowerOff));
    }
}
