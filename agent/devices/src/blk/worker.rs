//! One queue of a disk: its thread, and the requests under way.
//!
//! ```text
//!  asleep ── kick or completions ──► drain the ring → submit → one system call
//!    ▲                                reap → status bytes, used ring → one interrupt, if the driver wants it
//!    └── nothing left, kicks on ◄──── again; if sleep was short of late, a few µs longer
//! ```
//!
//! - A slot is a request under way; its number is the tag. There are as many slots as descriptors, so only a
//!   driver that offers one head twice can fill them: then the ring waits.
//! - A broken ring sets DEVICE_NEEDS_RESET. The ring is not touched again; requests under way still end in peace.
//! - Limits are asked before a request is taken off the ring. What they hold back stays there, and the thread sleeps on a
//!   timer; requests of other disks do not wait for it.
//! - A request that lacks room on the host's disk is held and tried again: see `held.rs`. Any other error of the host is
//!   VIRTIO_BLK_S_IOERR for the guest, and a notice for the operator.
//! - On stop nothing is answered any more: the thread waits until the kernel has let go of guest memory. Told to finish, it
//!   takes no new requests and answers those under way, but for those that are held.

use std::sync::Arc;
use std::time::Instant;

use serio_hv::{GuestMemory, mark_written};
use serio_sandbox::Kind;
use serio_virtio::{ActivateError, ActiveQueue, Chain, DeviceFailure, QueueError, Segment};
use serio_volume::{Buffers, Full, IoError, IoQueue, Op, Volume};
use vm_memory::{Bytes, GuestAddress};

use super::held::{Held, is_full};
use super::request::{Limits, Malformed, Parsed, Request, S_IOERR, S_OK, parse};
use super::slot::{Slot, kind_of};
use super::{QueueLeft, SERIAL_BYTES};
use crate::count::{DiskOp, DiskQueueCounts, QueueHandle};
use crate::limit::{Gate, Limiter};
use crate::patience::Patience;
use crate::worker::{Poller, STOP, Worker};
use crate::{Notices, Trouble};

const KICK: u64 = 0;
const COMPLETIONS: u64 = 1;
/// The limits let requests through again.
const LIMITS: u64 = 2;
/// Held requests may be tried again.
const HELD: u64 = 3;

/// What holds for all requests of a disk.
pub(super) struct Rules {
    /// Says how large the disk is now.
    pub(super) volume: Volume,
    pub(super) serial: [u8; SERIAL_BYTES],
    pub(super) write_through: bool,
    pub(super) limiter: Arc<Limiter>,
    /// For errors of the host.
    pub(super) notices: Notices,
    /// For a full disk of the host.
    pub(super) trouble: Trouble,
    /// Of this queue.
    pub(super) counts: Option<QueueHandle>,
}

impl Rules {
    fn count(&self, act: impl FnOnce(&DiskQueueCounts)) {
        if let Some(counts) = self.counts.as_ref().and_then(QueueHandle::get) {
            act(counts);
        }
    }
}

/// Why the ring is not touched any more.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("a request has no header, or no memory for its status")]
    Request,
}

impl From<Malformed> for Broken {
    fn from(Malformed: Malformed) -> Self {
        Broken::Request
    }
}

pub(super) struct QueueWorker {
    ring: ActiveQueue,
    io: IoQueue,
    requests: Requests,
    chain: Chain,
    rules: Rules,
    failure: DeviceFailure,
    gate: Gate,
    held: Held,
    patience: Patience,
    /// Held requests may be tried now.
    probe: bool,
    /// The volume's event was reported and not yet answered with a reap.
    completions: bool,
    broken: bool,
}

/// Slots, and the buffers that are free to be used again.
struct Requests {
    memory: GuestMemory,
    slots: Vec<Slot>,
    free: Vec<u16>,
    spare: Vec<Buffers>,
    /// Answers since the last interrupt.
    answered: u32,
}

impl QueueWorker {
    /// Starts the thread.
    pub(super) fn start(
        name: String,
        QueueLeft { ring, held: heads }: QueueLeft,
        io: IoQueue,
        rules: Rules,
        failure: DeviceFailure,
    ) -> Result<Worker<QueueLeft>, ActivateError> {
        let poller = Poller::new().map_err(ActivateError::io("make an epoll"))?;
        poller.add_event(&ring.kick, KICK).map_err(ActivateError::io("watch a queue"))?;
        poller
            .add_readable(io.event_fd(), COMPLETIONS)
            .map_err(ActivateError::io("watch a volume's completions"))?;
        let gate = Gate::new(rules.limiter.clone(), &poller, LIMITS)?;
        let held = Held::new((rules.trouble.clone(), rules.notices.clone()), &poller, HELD)?;
        let size = ring.queue.size();
        let (op, begun) = (DiskOp::Read, Instant::now());
        let (request, tried) = (Request::Flush, false);
        let status = GuestAddress(0);
        let nowhere = Slot { head: 0, status, written: 0, op, bytes: 0, begun, request, tried };
        let requests = Requests {
            memory: ring.queue.memory().clone(),
            slots: vec![nowhere; usize::from(size)],
            free: (0..size).rev().collect(),
            spare: Vec::with_capacity(usize::from(size)),
            answered: 0,
        };
        let worker = QueueWorker {
            ring,
            io,
            requests,
            chain: Chain::default(),
            rules,
            failure,
            gate,
            held,
            patience: Patience::default(),
            probe: false,
            completions: false,
            broken: false,
        };
        Worker::spawn(Kind::Blk, name, poller, move |poller| worker.run(&poller, &heads))
    }

    fn run(mut self, poller: &Poller, heads: &[u16]) -> QueueLeft {
        if self.take_again(heads).is_err() {
            self.broken = true;
            self.failure.mark();
        }
        // The driver may have offered requests before it kicked.
        let mut stop = false;
        while !stop {
            if !self.broken && self.turn().is_err() {
                self.broken = true;
                self.failure.mark();
            }
            if self.broken {
                self.discard_completions();
            }
            let (completions, probe) = (&mut self.completions, &mut self.probe);
            let waited = poller.wait(|token, _| {
                stop |= token == STOP;
                *completions |= token == COMPLETIONS;
                *probe |= token == HELD;
            });
            self.patience.woken();
            if waited.is_err() {
                self.failure.mark();
                break;
            }
        }
        if poller.finishing() && !self.broken && self.finish(poller).is_err() {
            self.failure.mark();
        }
        // Nothing is left to do after a clean finish.
        self.settle(poller);
        let slots = &self.requests.slots;
        let head = |tag| slots.get(usize::from(tag)).map(|slot| slot.head);
        QueueLeft { held: self.held.tags().filter_map(head).collect(), ring: self.ring }
    }

    /// Asks again for what was held when the device was suspended.
    fn take_again(&mut self, heads: &[u16]) -> Result<(), Broken> {
        let now = Instant::now();
        for head in heads {
            let Some(tag) = self.requests.free.last().copied() else { return Err(Broken::Request) };
            self.ring.queue.take_again(*head, &mut self.chain)?;
            self.serve(tag, now)?;
        }
        self.io.kick();
        Ok(())
    }

    /// Answers what is under way. Takes nothing off the ring any more.
    fn finish(&mut self, poller: &Poller) -> Result<(), Broken> {
        self.io.kick();
        loop {
            self.reap()?;
            // As in `settle`, which then waits in its own way.
            if self.io.in_use() == 0 || poller.wait(|_, _| {}).is_err() {
                break;
            }
        }
        self.requests.answered = 0;
        if self.ring.queue.interrupt_wanted()? {
            self.ring.interrupt.trigger();
        }
        Ok(())
    }

    /// Does all that can be done now, and asks for kicks before it returns.
    fn turn(&mut self) -> Result<(), Broken> {
        loop {
            self.ring.queue.disable_kicks()?;
            let taken = self.try_held() | self.drain()?;
            if taken {
                self.io.kick();
            }
            // Right after a submission much of it may be done already; else the volume's event says when to look.
            let reaped = (taken || self.completions) && self.reap()?;
            if self.requests.answered > 0 {
                self.requests.answered = 0;
                if self.ring.queue.interrupt_wanted()? {
                    self.ring.interrupt.trigger();
                }
            }
            if taken || reaped || self.look() {
                continue;
            }
            // With all slots taken the next completion brings us back here, behind a closed gate its timer.
            if self.requests.free.is_empty() || self.gate.is_closed() || !self.ring.queue.enable_kicks()? {
                return Ok(());
            }
        }
    }

    /// Looks a little longer before the thread sleeps, if that was worth it of late: the guest need not kick meanwhile, and nobody has to
    /// wake us. `true`: there is something to do.
    fn look(&mut self) -> bool {
        let takes = !self.requests.free.is_empty() && !self.gate.is_closed();
        let (io, queue, completions) = (&mut self.io, &self.ring.queue, &mut self.completions);
        self.patience.look(|| {
            *completions |= io.has_answer();
            // An error is met again, and told, by whoever takes the next request.
            *completions || takes && queue.waiting().is_ok_and(|waiting| waiting > 0)
        })
    }

    /// Takes requests off the ring while there is room. `true`: there was at least one.
    fn drain(&mut self) -> Result<bool, Broken> {
        let mut taken = false;
        let now = Instant::now();
        while let Some(tag) = self.requests.free.last().copied() {
            if !self.gate.is_open() || !self.ring.queue.pop(&mut self.chain)? {
                break;
            }
            taken = true;
            self.serve(tag, now)?;
        }
        Ok(taken)
    }

    /// Submits or answers what is in the chain.
    fn serve(&mut self, tag: u16, now: Instant) -> Result<(), Broken> {
        let head = self.chain.head();
        // Asked for each request: whoever knows that the disk has grown may use all of it.
        let limits = Limits::of(&self.rules.volume);
        let parsed = parse(&mut self.chain, &self.requests.memory, &limits)?;
        self.gate.charge(match parsed.request {
            Request::Read { .. } => self.chain.writable_len(),
            Request::Write { .. } => self.chain.readable_len(),
            _ => 0,
        });
        match self.operation(parsed.request) {
            Prepared::Submit(op) => self.submit(tag, (head, parsed), op, now),
            Prepared::Answer { status, written } => {
                if status != S_OK {
                    self.rules.count(|counts| counts.refused());
                }
                self.requests.memory.write_obj(status, parsed.status).map_err(|_| Broken::Request)?;
                self.ring.queue.push_used(head, written)?;
                self.requests.answered = self.requests.answered.saturating_add(1);
                Ok(())
            }
        }
    }

    /// Submits held requests that may be tried. `true`: there was at least one.
    fn try_held(&mut self) -> bool {
        let first = if std::mem::take(&mut self.probe) { self.held.probe() } else { None };
        let mut next = first.or_else(|| self.held.release());
        let any = next.is_some();
        while let Some((tag, op)) = next {
            if let Some(slot) = self.requests.slots.get_mut(usize::from(tag)) {
                slot.tried = true;
            }
            // It has its slot still, so the queue has room for it.
            let submitted = self.io.submit(u64::from(tag), op);
            debug_assert!(submitted.is_ok(), "as many slots as the queue is deep");
            next = self.held.release();
        }
        any
    }

    fn submit(
        &mut self,
        tag: u16,
        (head, parsed): (u16, Parsed),
        op: Op,
        begun: Instant,
    ) -> Result<(), Broken> {
        let (kind, bytes) = kind_of(&op);
        let written = match kind {
            DiskOp::Read => u32::try_from(bytes).unwrap_or(u32::MAX).saturating_add(1),
            _ => 1,
        };
        let slot = self.requests.slots.get_mut(usize::from(tag)).ok_or(Broken::Request)?;
        let Parsed { request, status } = parsed;
        *slot = Slot { head, status, written, op: kind, bytes, begun, request, tried: false };
        match self.io.submit(u64::from(tag), op) {
            Ok(()) => {
                self.requests.free.pop();
                Ok(())
            }
            // As many slots as the queue is deep: this does not happen. If it did, the guest would get an error.
            Err(Full(_)) => self.requests.answer(&mut self.ring, tag, S_IOERR),
        }
    }

    fn operation(&mut self, request: Request) -> Prepared {
        match request {
            Request::Read { offset } => self.with_data(false, |buffers, _| Op::Read { offset, buffers }),
            Request::Write { offset } => {
                self.with_data(true, |buffers, fua| Op::Write { offset, buffers, fua })
            }
            Request::Flush => Prepared::Submit(Op::Flush),
            Request::Discard { len: 0, .. } | Request::WriteZeroes { len: 0, .. } => Prepared::status(S_OK),
            Request::Discard { offset, len } => Prepared::Submit(Op::Discard { offset, len }),
            Request::WriteZeroes { offset, len, unmap } => {
                Prepared::Submit(Op::WriteZeroes { offset, len, unmap })
            }
            Request::GetId => self.get_id(),
            Request::Refused { status } => Prepared::status(status),
        }
    }

    fn with_data(&mut self, write: bool, op: impl FnOnce(Buffers, bool) -> Op) -> Prepared {
        let segments = if write { self.chain.readable() } else { self.chain.writable() };
        let mut buffers = self.requests.spare.pop().unwrap_or_default();
        let filled = buffers.refill_guest(&self.requests.memory, segments.iter().filter_map(as_range));
        if filled.is_err() {
            self.requests.keep(buffers);
            return Prepared::status(S_IOERR);
        }
        if buffers.is_empty() {
            self.requests.keep(buffers);
            return Prepared::status(S_OK);
        }
        Prepared::Submit(op(buffers, self.rules.write_through))
    }

    /// Writes the serial number, cut to what the driver has room for.
    fn get_id(&mut self) -> Prepared {
        let mut rest: &[u8] = &self.rules.serial;
        let mut written = 1u32;
        for segment in self.chain.writable() {
            let n = rest.len().min(usize::try_from(segment.len).unwrap_or(usize::MAX));
            let (part, left) = rest.split_at_checked(n).unwrap_or((rest, &[]));
            if self.requests.memory.write_slice(part, segment.address).is_err() {
                return Prepared::status(S_IOERR);
            }
            written = written.saturating_add(u32::try_from(n).unwrap_or(0));
            rest = left;
        }
        Prepared::Answer { status: S_OK, written }
    }

    /// Answers what the volume has finished. `true`: there was something.
    fn reap(&mut self) -> Result<bool, Broken> {
        self.completions = false;
        let mut any = false;
        let mut result = Ok(());
        let (ring, requests, rules) = (&mut self.ring, &mut self.requests, &self.rules);
        let held = &mut self.held;
        let mut now = None;
        self.io.reap(|tag, outcome, buffers| {
            any = true;
            let Ok(tag) = u16::try_from(tag) else { return requests.keep(buffers) };
            let slot = requests.slots.get(usize::from(tag)).copied();
            requests.log_read(tag, &buffers);
            let tried = slot.is_some_and(|slot| slot.tried);
            let buffers = match (&outcome, slot) {
                (Err(error), Some(slot)) if is_full(error) => match slot.redo(buffers, rules.write_through) {
                    Ok(op) => return held.hold(tag, op, tried, error),
                    Err(buffers) => buffers,
                },
                _ => buffers,
            };
            requests.keep(buffers);
            requests.free.push(tag);
            if tried {
                held.answered();
            }
            if let Err(error) = &outcome {
                rules.notices.tell(error);
            }
            if let Some(slot) = slot {
                let now = *now.get_or_insert_with(Instant::now);
                let took = now.saturating_duration_since(slot.begun);
                rules.count(|counts| counts.done(slot.op, slot.bytes, took, outcome.is_ok()));
            }
            if result.is_ok() {
                result = requests.answer(ring, tag, status_of(outcome));
            }
        });
        result.map(|()| any)
    }

    /// Takes completions without answering, for when the ring must not be touched.
    fn discard_completions(&mut self) {
        let requests = &mut self.requests;
        self.io.reap(|tag, _, buffers| {
            let tag = u16::try_from(tag).ok();
            tag.inspect(|tag| requests.log_read(*tag, &buffers));
            requests.keep(buffers);
            requests.free.extend(tag);
        });
    }

    /// Waits until no request is under way: then the kernel does not know guest memory any more.
    fn settle(&mut self, poller: &Poller) {
        // What was submitted but not kicked has to end too.
        self.io.kick();
        loop {
            self.discard_completions();
            // If the wait fails, dropping the queue waits in its own way.
            if self.io.in_use() == 0 || poller.wait(|_, _| {}).is_err() {
                return;
            }
        }
    }
}

impl Requests {
    /// Keeps buffers for the next request. Those of a flush are empty, and came from nowhere: hence the bound.
    fn keep(&mut self, buffers: Buffers) {
        if self.spare.len() < self.slots.len() {
            self.spare.push(buffers);
        }
    }

    /// A request has ended: if it was a read, the kernel has written to guest memory, however it ended.
    fn log_read(&self, tag: u16, buffers: &Buffers) {
        if self.slots.get(usize::from(tag)).is_some_and(|slot| slot.op == DiskOp::Read) {
            buffers.guest_parts().for_each(|(at, len)| mark_written(&self.memory, at, len));
        }
    }

    /// Writes the status and gives the chain back.
    fn answer(&mut self, ring: &mut ActiveQueue, tag: u16, status: u8) -> Result<(), Broken> {
        let slot = self.slots.get(usize::from(tag)).copied().ok_or(Broken::Request)?;
        self.memory.write_obj(status, slot.status).map_err(|_| Broken::Request)?;
        ring.queue.push_used(slot.head, slot.written)?;
        self.answered = self.answered.saturating_add(1);
        Ok(())
    }
}

/// A request for the volume, or one that is answered at once.
enum Prepared {
    Submit(Op),
    Answer { status: u8, written: u32 },
}

impl Prepared {
    fn status(status: u8) -> Self {
        Prepared::Answer { status, written: 1 }
    }
}

fn as_range(segment: &Segment) -> Option<(GuestAddress, usize)> {
    Some((segment.address, usize::try_from(segment.len).ok()?))
}

fn status_of(outcome: Result<(), IoError>) -> u8 {
    if outcome.is_ok() { S_OK } else { S_IOERR }
}
