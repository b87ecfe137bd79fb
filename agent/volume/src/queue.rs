//! A queue of operations on a volume: takes [`Op`]s, carries them through their stages, gives them back.
//!
//! ```text
//!            ┌────────┐ gate closed or blocks claimed
//!  submit ──►│ Parked │◄──────────────┐
//!            └───┬────┘               │
//!                ▼ enter, plan, claim │
//!   CopyUp ─────────► Transfer ──────────► Sync | Commit ──────► Done ──► reap
//!   (reads of blocks   (reads, writes,     (own fdatasync, or
//!    completed below)   holes)              the keeper's)
//! ```
//!
//! A stage is a list of primitives of which a few are in flight; when all have answered, the next stage follows.
//! Slots, lists and rings are made once: the I/O path allocates nothing once they have grown to what is used.
//! A queue belongs to one thread at a time; what queues share is in `shared.rs`.

use std::{
    collections::VecDeque,
    io,
    os::fd::BorrowedFd,
    sync::{Arc, atomic::Ordering},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use crate::{
    error::IoError,
    keeper::{self, Keeper},
    map::State,
    op::{Full, Op},
    plan::{self, Fill, Range, Verdict, cut, edges, judge, punch_blocks, zero_blocks},
    runs::{self, FileRun},
    shared::{Core, QueueShared, lock},
    slot::{Kind, Slot, Stage},
    stack::Stack,
    uring::{Answer, Body, Buffers, Driver, Io, Span, event_fd, signal},
};

/// Primitives of one operation under way at once; a badly fragmented one takes turns.
const WAVE: u32 = 8;

/// See the head of this file.
pub struct IoQueue {
    // First, so that it is dropped first: it waits for the kernel.
    driver: Driver,
    core: Arc<Core>,
    shared: Arc<QueueShared>,
    stack: Arc<Stack>,
    stack_epoch: u64,
    slots: Vec<Slot>,
    free: Vec<u32>,
    parked: VecDeque<u32>,
    done: Vec<(u32, Result<(), IoError>)>,
    answers: Vec<Answer>,
    mail: Vec<(u32, Result<(), IoError>)>,
    // Keeps the keeper thread while an operation may wait for it.
    _keeper: Option<Arc<Keeper>>,
}

impl std::fmt::Debug for IoQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoQueue({} of {} slots in use)", self.in_use(), self.slots.len())
    }
}

impl IoQueue {
    pub(crate) fn new(core: Arc<Core>, keeper: Option<Arc<Keeper>>, depth: u16) -> io::Result<IoQueue> {
        let event = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let shared = Arc::new(QueueShared::new(Arc::clone(&event)));
        core.add_queue(&shared);
        // The epoch first: if the stack changes in between, the queue only looks again.
        let stack_epoch = core.stack_epoch.load(Ordering::SeqCst);
        let stack = core.stack();
        Ok(IoQueue {
            driver: Driver::new(depth, event, stack.files()),
            core,
            shared,
            stack,
            stack_epoch,
            slots: (0..depth).map(|_| Slot::idle()).collect(),
            free: (0..u32::from(depth)).rev().collect(),
            parked: VecDeque::new(),
            done: Vec::new(),
            answers: Vec::new(),
            mail: Vec::new(),
            _keeper: keeper,
        })
    }

    /// Readable when [`IoQueue::reap`] has something to do.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        event_fd(&self.shared.event)
    }

    /// Whether io_uring carries the queue; else it makes plain system calls in `kick` and `reap`.
    pub fn uses_io_uring(&self) -> bool {
        self.driver.is_ring()
    }

    /// Operations that were submitted and not yet given back.
    pub fn in_use(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Takes an operation; it may start now, it has started after [`IoQueue::kick`]. All answers, also that of a
    /// bad range, come from [`IoQueue::reap`] with the same `tag`.
    pub fn submit(&mut self, tag: u64, op: Op) -> Result<(), Full> {
        let Some(index) = self.free.pop() else { return Err(Full(op)) };
        let (kind, offset, len, buffers) = match op {
            Op::Read { offset, buffers } => (Kind::Read, offset, buffers.len(), buffers),
            Op::Write { offset, buffers, fua } => (Kind::Write { fua }, offset, buffers.len(), buffers),
            Op::Flush => (Kind::Flush, 0, 0, Buffers::empty()),
            Op::Discard { offset, len } => (Kind::Discard, offset, len, Buffers::empty()),
            Op::WriteZeroes { offset, len, unmap } => {
                (Kind::WriteZeroes { unmap }, offset, len, Buffers::empty())
            }
        };
        self.driver.load(index, buffers);
        let slot = &mut self.slots[index as usize];
        slot.tag = tag;
        slot.kind = kind;
        slot.range = Range { offset, len };
        slot.stage = Stage::Parked;
        slot.error = None;
        let size = self.core.size_bytes();
        if offset.checked_add(len).is_none_or(|end| end > size) {
            self.finish(index, Err(IoError::OutOfRange { offset, len, size }));
        } else if kind.changes() && kind != Kind::Flush && self.core.read_only {
            self.finish(index, Err(IoError::ReadOnly));
        } else if !self.start(index) {
            self.parked.push_back(index);
        }
        Ok(())
    }

    /// Starts what was submitted: one system call at most.
    pub fn kick(&mut self) {
        self.driver.submit();
        if !self.done.is_empty() {
            signal(&self.shared.event);
        }
    }

    /// Gives back what is done: `each(tag, result, buffers)`. Also carries operations on to their next stage, so
    /// it must be called whenever [`IoQueue::event_fd`] is readable.
    pub fn reap(&mut self, mut each: impl FnMut(u64, Result<(), IoError>, Buffers)) {
        crate::uring::clear(&self.shared.event);
        loop {
            self.take_answers();
            self.take_mail();
            for _ in 0..self.parked.len() {
                let Some(index) = self.parked.pop_front() else { break };
                if !self.start(index) {
                    self.parked.push_back(index);
                }
            }
            self.driver.submit();
            if !self.done.is_empty() && self.driver.is_behind() {
                // What follows those that are done can be under way while the others are decrypted.
                signal(&self.shared.event);
                break;
            }
            // Inline calls have answered already; with a ring this looks once more and mostly finds nothing.
            self.driver.poll(&mut self.answers);
            if self.answers.is_empty() {
                break;
            }
        }
        while let Some((index, result)) = self.done.pop() {
            let buffers = self.driver.unload(index);
            let slot = &mut self.slots[index as usize];
            slot.stage = Stage::Idle;
            self.free.push(index);
            each(slot.tag, result, buffers);
        }
    }

    /// Where the bytes of a range are, so that they can be sent without a copy: see [`crate::runs`].
    pub fn runs(&mut self, offset: u64, len: u64, max: usize, runs: &mut Vec<FileRun>) -> bool {
        if !self.core.enter(&self.shared) {
            return false;
        }
        self.refresh_stack();
        let found = runs::find(&self.stack, Range { offset, len }, max, runs);
        self.core.leave(&self.shared);
        found
    }

    /// Submits one operation and waits for it: for tools. The queue must have nothing else under way.
    pub fn run(&mut self, op: Op) -> (Result<(), IoError>, Buffers) {
        assert_eq!(self.in_use(), 0, "run is for a queue that is used for nothing else");
        self.submit(0, op).expect("an idle queue has a free slot");
        self.kick();
        let mut answer = None;
        loop {
            self.reap(|_, result, buffers| answer = Some((result, buffers)));
            if let Some(answer) = answer.take() {
                return answer;
            }
            self.wait();
        }
    }

    /// Whether the kernel has answered something that [`IoQueue::reap`] has not seen yet. Costs no system call, so it can be asked
    /// again and again for a moment. `false` proves nothing: what else is to be reaped, only [`IoQueue::event_fd`] says.
    pub fn has_answer(&mut self) -> bool {
        self.driver.has_answer()
    }

    /// Waits until [`IoQueue::event_fd`] is readable.
    pub fn wait(&self) {
        // An interruption only means one look too many.
        let _ = poll(&mut [PollFd::new(self.event_fd(), PollFlags::POLLIN)], PollTimeout::NONE);
    }

    fn take_answers(&mut self) {
        let mut answers = std::mem::take(&mut self.answers);
        self.driver.poll(&mut answers);
        for answer in answers.drain(..) {
            self.answered(answer);
        }
        self.answers = answers;
    }

    fn take_mail(&mut self) {
        let mut mail = std::mem::take(&mut self.mail);
        std::mem::swap(&mut mail, &mut lock(&self.shared.mailbox));
        for (index, result) in mail.drain(..) {
            debug_assert_eq!(self.slots[index as usize].stage, Stage::Commit);
            self.finish(index, result);
        }
        self.mail = mail;
    }

    /// Goes in and begins; false when the operation has to wait outside.
    fn start(&mut self, index: u32) -> bool {
        if !self.core.enter(&self.shared) {
            return false;
        }
        self.refresh_stack();
        let kind = self.slots[index as usize].kind;
        self.slots[index as usize].entered = true;
        if kind.changes() && self.core.is_poisoned() {
            self.finish(index, Err(IoError::Poisoned));
            return true;
        }
        if !self.take_claim(index) {
            self.slots[index as usize].entered = false;
            self.core.leave(&self.shared);
            return false;
        }
        self.plan(index);
        true
    }

    /// Inside the gate the stack does not change; it may have since this queue was last inside.
    fn refresh_stack(&mut self) {
        let epoch = self.core.stack_epoch.load(Ordering::SeqCst);
        if epoch != self.stack_epoch {
            self.stack = self.core.stack();
            self.stack_epoch = epoch;
            self.driver.set_files(self.stack.files());
        }
    }

    /// Claims the blocks whose bits the operation will change; false when others have some of them.
    fn take_claim(&mut self, index: u32) -> bool {
        let Some(map) = self.stack.head_map() else { return true };
        let slot = &mut self.slots[index as usize];
        if slot.range.len == 0 {
            return true;
        }
        let touched = slot.range.touched();
        let is_data = || map.all_data(touched.first, touched.count);
        let unit = self.stack.head().unit_bytes();
        if matches!(slot.kind, Kind::Write { .. }) && slot.range.is_aligned(unit) && is_data() {
            // In place, and nothing is read first. Of encrypted sectors others may be completing some.
            if unit == 1 {
                return true;
            }
            if !self.core.share(&self.shared, touched) {
                return false;
            }
            if is_data() {
                slot.claim = Some(touched);
                return true;
            }
            // A discard was quicker.
            self.core.release(touched);
        }
        let claim = match slot.kind {
            Kind::Read | Kind::Flush => return true,
            Kind::Write { .. } | Kind::WriteZeroes { .. } => touched,
            Kind::Discard => slot.range.covered(self.stack.head().size_bytes),
        };
        if claim.count == 0 {
            return true;
        }
        if self.core.claim(&self.shared, claim) {
            slot.claim = Some(claim);
        }
        slot.claim.is_some()
    }

    /// Fills in the primitives and starts the first.
    fn plan(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        slot.ios.clear();
        slot.then.clear();
        slot.next = 0;
        let (range, driver, stack) = (slot.range, &mut self.driver, &*self.stack);
        let mut fill = |fill| match fill {
            Fill::Buffers { start, len } => driver.zero(index, start, len),
            Fill::Bounce(part) => driver.zero_bounce(index, part),
        };
        let file = stack.head_index() as u32;
        let layered = stack.head_map().is_some();
        let covered = range.covered(stack.head().size_bytes);
        let hole = |mode| Io::Allocate { file, mode, offset: range.offset, len: range.len };
        slot.stage = Stage::Transfer;
        match slot.kind {
            Kind::Flush => return self.sync(index),
            _ if range.len == 0 => {}
            Kind::Read => plan::read(stack, range, &mut slot.ios, fill),
            Kind::Write { .. } if layered => {
                let body = Body::Buffers { start: 0, len: range.len };
                slot.then.extend(cut(stack, plan::write(stack, range, body, 0, &mut slot.ios, &mut fill)));
                slot.stage = Stage::CopyUp;
            }
            Kind::Write { .. } => {
                let span = Span::buffers(0, range.len);
                slot.ios.push(Io::Write { file, offset: range.offset, span });
            }
            Kind::Discard if layered => slot.ios.extend(punch_blocks(file, covered)),
            Kind::Discard => slot.ios.push(hole(plan::punch())),
            Kind::WriteZeroes { unmap: false } if layered && stack.head().cipher.is_some() => {
                // Zeros that have their space are ciphertext like all others.
                let body = Body::Zeros { len: range.len };
                slot.then.extend(cut(stack, plan::write(stack, range, body, 0, &mut slot.ios, &mut fill)));
                slot.stage = Stage::CopyUp;
            }
            Kind::WriteZeroes { unmap } if layered => {
                for (edge, bounce) in edges(range, covered) {
                    let body = Body::Zeros { len: edge.len };
                    let write = plan::write(stack, edge, body, bounce, &mut slot.ios, &mut fill);
                    slot.then.extend(cut(stack, write));
                }
                slot.then.extend(if unmap {
                    punch_blocks(file, covered)
                } else {
                    zero_blocks(stack, covered)
                });
                slot.stage = Stage::CopyUp;
            }
            Kind::WriteZeroes { unmap } => {
                slot.ios.push(hole(if unmap { plan::punch() } else { plan::zero_range() }));
            }
        }
        self.pump(index);
    }

    /// Issues primitives of the current stage, up to the wave; goes on to the next stage when all have answered.
    fn pump(&mut self, index: u32) {
        loop {
            let slot = &mut self.slots[index as usize];
            while slot.error.is_none() && slot.in_flight < WAVE && slot.next < slot.ios.len() {
                self.driver.issue(index, slot.next as u32, &slot.ios[slot.next]);
                slot.next += 1;
                slot.in_flight += 1;
            }
            if slot.in_flight > 0 {
                return;
            }
            if let Some(error) = slot.error {
                if slot.stage == Stage::Sync {
                    self.core.poison();
                }
                return self.finish(index, Err(error));
            }
            match slot.stage {
                Stage::CopyUp => {
                    std::mem::swap(&mut slot.ios, &mut slot.then);
                    slot.next = 0;
                    slot.stage = Stage::Transfer;
                }
                Stage::Transfer => return self.transferred(index),
                Stage::Sync => return self.finish(index, Ok(())),
                Stage::Idle | Stage::Parked | Stage::Commit | Stage::Done => {
                    unreachable!("these stages have no primitives")
                }
            }
        }
    }

    /// The bytes are in the file: now, and not before, the map may say so.
    fn transferred(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        if let (Some(map), Some(claim)) = (self.stack.head_map(), slot.claim) {
            match slot.kind {
                Kind::Discard => map.set(claim.first, claim.count, State::Zero),
                Kind::WriteZeroes { unmap: true } => {
                    let covered = slot.range.covered(self.stack.head().size_bytes);
                    for (edge, _) in edges(slot.range, covered) {
                        let touched = edge.touched();
                        map.set(touched.first, touched.count, State::Data);
                    }
                    map.set(covered.first, covered.count, State::Zero);
                }
                _ => map.set(claim.first, claim.count, State::Data),
            }
        }
        if let Some(claim) = slot.claim.take() {
            self.core.release(claim);
        }
        match self.slots[index as usize].kind {
            Kind::Write { fua: true } => self.sync(index),
            _ => self.finish(index, Ok(())),
        }
    }

    /// Makes everything before durable: by an fdatasync of our own when the map has nothing to commit.
    fn sync(&mut self, index: u32) {
        if self.core.read_only {
            return self.finish(index, Ok(()));
        }
        let slot = &mut self.slots[index as usize];
        if self.stack.head_map().is_some() {
            // Before asking: the keeper may answer at once.
            slot.stage = Stage::Commit;
            if keeper::ask(&self.core, &self.shared, index) {
                return;
            }
        }
        slot.stage = Stage::Sync;
        slot.next = 0;
        slot.ios.clear();
        slot.ios.push(Io::SyncData { file: self.stack.head_index() as u32 });
        self.pump(index);
    }

    fn answered(&mut self, answer: Answer) {
        let slot = &mut self.slots[answer.slot as usize];
        slot.in_flight -= 1;
        let io = &mut slot.ios[answer.token as usize];
        let layered = self.stack.head_map().is_some();
        let excused =
            slot.kind == Kind::Discard || (layered && slot.kind != Kind::WriteZeroes { unmap: false });
        match judge(io, answer.result, excused) {
            Verdict::Done => {}
            Verdict::Again => {
                self.driver.issue(answer.slot, answer.token, io);
                slot.in_flight += 1;
            }
            Verdict::Failed(error) => slot.error = slot.error.or(Some(error)),
        }
        self.pump(answer.slot);
    }

    fn finish(&mut self, index: u32, result: Result<(), IoError>) {
        self.slots[index as usize].stage = Stage::Done;
        self.leave(index);
        self.done.push((index, result));
    }

    fn leave(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        if let Some(claim) = slot.claim.take() {
            self.core.release(claim);
        }
        if std::mem::take(&mut slot.entered) {
            self.core.leave(&self.shared);
        }
    }
}

impl Drop for IoQueue {
    fn drop(&mut self) {
        // Blocks stay claimed until the kernel no longer writes them.
        self.driver.wait_idle();
        for index in 0..self.slots.len() as u32 {
            self.leave(index);
        }
    }
}
