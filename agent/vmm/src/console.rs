//! The way of the serial port's bytes: from vcpu threads to whoever shows or keeps them, and back.
//!
//! ```text
//!   vcpu ── SerialPort ──► Output (bounded) ──► the process' event loop ──► terminal | log file, clients
//!   vcpu ◄── SerialPort ◄───────────────────────────────────────────────── keyboard | clients
//! ```
//!
//! Who drains an [`Output`] decides the pace: while it is full the vcpu waits, as on a slow serial line. A drain that
//! must not slow its guest (the agent's) therefore never blocks itself.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::{EfdFlags, EventFd};
use serio_devices::serial::SerialSink;

/// Output bytes that may wait.
const OUTPUT_BYTES_MAX: usize = 64 * 1024;

/// Bytes that the guest has sent and nobody has taken yet.
#[derive(Debug)]
pub struct Output {
    state: Mutex<State>,
    room: Condvar,
    event: EventFd,
}

#[derive(Debug, Default)]
struct State {
    bytes: VecDeque<u8>,
    closed: bool,
}

impl Output {
    /// An empty one.
    pub fn new() -> std::io::Result<Output> {
        let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Output { state: Mutex::default(), room: Condvar::new(), event })
    }

    /// Takes everything that waits.
    pub fn take(&self) -> Vec<u8> {
        let _ = self.event.read();
        let taken = Vec::from(std::mem::take(&mut self.lock().bytes));
        self.room.notify_all();
        taken
    }

    /// Lets nobody wait any more: the drain is gone.
    pub fn close(&self) {
        self.lock().closed = true;
        self.room.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SerialSink for Output {
    /// Adds a byte; waits while there is no room. After [`Output::close`] it is dropped.
    fn push(&self, byte: u8) {
        let state = self.lock();
        let mut state = self
            .room
            .wait_while(state, |state| state.bytes.len() >= OUTPUT_BYTES_MAX && !state.closed)
            .unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            return;
        }
        // One wake-up for a run of bytes: the drain takes all that is there.
        if state.bytes.is_empty() {
            let _ = self.event.write(1);
        }
        state.bytes.push_back(byte);
    }
}

/// Readable while bytes wait.
impl AsFd for Output {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn nothing_is_lost_and_nobody_waits_for_ever() {
        let output = Arc::new(Output::new().expect("eventfd"));
        let writer = {
            let output = output.clone();
            std::thread::spawn(move || (0..3 * OUTPUT_BYTES_MAX).for_each(|i| output.push(i as u8)))
        };
        let mut got = Vec::new();
        while got.len() < 3 * OUTPUT_BYTES_MAX {
            got.extend(output.take());
            std::thread::yield_now();
        }
        writer.join().expect("no panic");
        assert!(got.iter().enumerate().all(|(i, byte)| *byte == i as u8));

        let writer = {
            let output = output.clone();
            std::thread::spawn(move || (0..2 * OUTPUT_BYTES_MAX).for_each(|_| output.push(0)))
        };
        output.close();
        writer.join().expect("no panic");
    }
}
