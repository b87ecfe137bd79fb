//! What callers and the engine share: the queue of operations, its bounds, and where each answer is put.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{ClientError, reply::Run};

/// One operation. Ranges lie within the export, are whole blocks, and hold at most one payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Fills the buffer from `offset`.
    Read {
        /// First byte.
        offset: u64,
        /// As long as what is read.
        buffer: Vec<u8>,
    },
    /// Writes the bytes at `offset`.
    Write {
        /// First byte.
        offset: u64,
        /// What is written.
        data: Arc<Vec<u8>>,
    },
    /// What was answered before it is submitted is durable when it is answered.
    Flush,
    /// The range is not needed any more.
    Trim {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The range reads as zeros.
    WriteZeroes {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Space may be freed.
        may_hole: bool,
    },
    /// What the contexts say of a range; the answer may cover less.
    Status {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

impl Op {
    /// First byte and length; nothing for a flush.
    pub(super) fn range(&self) -> Option<(u64, u64)> {
        match self {
            Op::Read { offset, buffer } => Some((*offset, buffer.len() as u64)),
            Op::Write { offset, data } => Some((*offset, data.len() as u64)),
            Op::Flush => None,
            Op::Trim { offset, len } | Op::WriteZeroes { offset, len, .. } | Op::Status { offset, len } => {
                Some((*offset, *len))
            }
        }
    }

    /// Whether it changes the export, so that a flush must cover it.
    pub(super) fn changes(&self) -> bool {
        matches!(self, Op::Write { .. } | Op::Trim { .. } | Op::WriteZeroes { .. })
    }

    /// Bytes of memory that it holds.
    pub(super) fn memory(&self) -> usize {
        match self {
            Op::Read { buffer, .. } => buffer.len(),
            Op::Write { data, .. } => data.len(),
            _ => 0,
        }
    }
}

/// What an operation brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// A read's buffer, filled.
    Data(Vec<u8>),
    /// Nothing more to say.
    Done,
    /// For each context, by its position in [`super::Terms::contexts`], its runs from the range's start.
    Runs(Vec<Vec<Run>>),
}

pub(super) type Outcome = Result<Answer, ClientError>;

/// Where an answer is put.
#[derive(Debug, Default)]
pub(super) struct Slot {
    outcome: Mutex<Option<Outcome>>,
    there: Condvar,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing is left half-changed under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Slot {
    pub(super) fn put(&self, outcome: Outcome) {
        *lock(&self.outcome) = Some(outcome);
        self.there.notify_all();
    }

    pub(super) fn take(&self) -> Outcome {
        let mut outcome = lock(&self.outcome);
        loop {
            if let Some(outcome) = outcome.take() {
                return outcome;
            }
            outcome = self.there.wait(outcome).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// An operation and who waits for it; nobody, if the engine made it.
#[derive(Debug)]
pub(super) struct Entry {
    /// Its place in the order of submission.
    pub(super) sequence: u64,
    pub(super) op: Op,
    pub(super) slot: Option<Arc<Slot>>,
}

impl Entry {
    pub(super) fn answer(self, outcome: Outcome) {
        if let Some(slot) = self.slot {
            slot.put(outcome);
        }
    }
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Entry>,
    sequence: u64,
    /// Operations that are not answered, and their memory.
    ops: usize,
    bytes: usize,
    closed: bool,
    dead: Option<ClientError>,
}

/// See the head of this file.
#[derive(Debug)]
pub(super) struct Window {
    state: Mutex<State>,
    room: Condvar,
    wake: EventFd,
    ops_max: usize,
    bytes_max: usize,
}

impl Window {
    pub(super) fn new(ops_max: usize, bytes_max: usize) -> io::Result<Window> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Window { state: Mutex::default(), room: Condvar::new(), wake, ops_max: ops_max.max(1), bytes_max })
    }

    /// Readable when there is something new.
    pub(super) fn event(&self) -> &EventFd {
        &self.wake
    }

    fn wake(&self) {
        // It fails only when nobody has looked for 2^64 times.
        let _ = self.wake.write(1);
    }

    /// Takes an operation; waits while the window is full.
    pub(super) fn submit(&self, op: Op) -> Result<Arc<Slot>, ClientError> {
        let memory = op.memory();
        let mut state = lock(&self.state);
        loop {
            if let Some(error) = &state.dead {
                return Err(error.clone());
            }
            let fits = state.ops < self.ops_max && state.bytes.saturating_add(memory) <= self.bytes_max;
            if fits || state.ops == 0 {
                break;
            }
            state = self.room.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let slot = Arc::new(Slot::default());
        state.ops += 1;
        state.bytes += memory;
        state.sequence += 1;
        let entry = Entry { sequence: state.sequence, op, slot: Some(Arc::clone(&slot)) };
        state.queue.push_back(entry);
        drop(state);
        self.wake();
        Ok(slot)
    }

    /// What is new; true: nobody will ask any more.
    pub(super) fn collect(&self, into: &mut VecDeque<Entry>) -> bool {
        let _ = self.wake.read();
        let mut state = lock(&self.state);
        into.append(&mut state.queue);
        state.closed
    }

    /// An operation of this much memory is answered.
    pub(super) fn answered(&self, memory: usize) {
        let mut state = lock(&self.state);
        state.ops = state.ops.saturating_sub(1);
        state.bytes = state.bytes.saturating_sub(memory);
        drop(state);
        self.room.notify_all();
    }

    /// All that is asked from now on fails; gives back what was not collected.
    pub(super) fn die(&self, error: &ClientError) -> VecDeque<Entry> {
        let mut state = lock(&self.state);
        state.dead.get_or_insert_with(|| error.clone());
        let left = std::mem::take(&mut state.queue);
        drop(state);
        self.room.notify_all();
        left
    }

    pub(super) fn close(&self) {
        lock(&self.state).closed = true;
        self.wake();
    }
}
