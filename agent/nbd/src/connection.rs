//! One client's transmission phase, on its own thread.
//!
//! ```text
//! socket ──► input ──► requests ──► Queue::submit … kick … reap ──► out ──► socket
//!                         └── a long read of plain files ──────────► out ──► socket, by sendfile
//! ```
//! Each turn reads what is there, submits up to [`TURN_BYTES`] of it, kicks once, reaps, and sends what is ready; then
//! it polls the socket, the queue's event, the stop event and the budget's, unless more can be begun at once. Nothing is
//! read while the connection may hold no more memory, has all its slots in use, or a turn's worth of replies waits for
//! the client, so a client that does not read its replies stops itself and nobody else.
//!
//! A client that is gone (`POLLHUP`) ends its connection at once, with whatever is under way; one that has said goodbye
//! before is served to the end, and its socket is not waited for any more. [`answer`](crate::answer) has the replies.

use std::{
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use nix::poll::PollFlags;

use crate::{
    backend::{Command, ExportInfo, Payload, Queue, Run},
    budget::Share,
    greet::{ConnectionError, Ready, wait},
    handshake::Negotiated,
    inbox::{Arrived, Inbox},
    outbox::{Body, Outbox},
    places::Place,
    pool::Pool,
    rules,
    serve::End,
    wire::{Mode, PAYLOAD_BYTES_MAX, Request, cmd, cmd_flag},
};

/// Payloads that one connection may hold, bytes; a single larger request is let through when it is alone.
const HELD_BYTES_MAX: usize = 8 << 20;
/// Payloads that are begun before the answers are sent: what was read is sent while the processor still has it.
const TURN_BYTES: usize = 256 << 10;
/// Bytes in files that wait to be sent: what is not in the page cache is read ahead meanwhile.
const AHEAD_BYTES: usize = 8 << 20;
/// Reads at least so long are sent from files, if they can be: below, a copy costs less than the calls.
const SEND_BYTES_MIN: u64 = 32 << 10;
/// Operations under way on one connection.
pub(crate) const DEPTH: u16 = 128;
/// Replies that wait to be sent without holding a slot; past it nothing is read.
const OUT_MAX: usize = 1024;
/// A client that owes something must move so much in [`Connection::stall`]: single bytes do not count.
const PROGRESS_BYTES_MIN: usize = 4 << 10;
/// After so long without a request, memory that lies ready is freed.
const TRIM_AFTER: Duration = Duration::from_secs(1);

/// A request that was submitted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pending {
    pub(crate) request: Request,
    /// FUA of a command whose operation does not know it: a flush follows.
    pub(crate) then_flush: bool,
}

/// A write whose payload is still coming.
struct Receiving<P> {
    request: Request,
    payload: P,
    filled: usize,
}

/// Why no more requests are taken for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pause {
    /// The next one has not come, or not whole.
    Input,
    /// Answers must come or go first: the next one holds so many bytes.
    Room(usize),
    /// Enough was begun in this turn.
    Turn,
}

pub(crate) struct Connection<'a, Q: Queue> {
    pub(crate) queue: Q,
    info: &'a ExportInfo,
    pub(crate) negotiated: Negotiated,
    input: Inbox,
    receiving: Option<Receiving<Q::Payload>>,
    /// Bytes of refused payloads that are still coming.
    skip: u64,
    pub(crate) pending: Vec<Option<Pending>>,
    pub(crate) free: Vec<usize>,
    pub(crate) out: Outbox<Q::Payload>,
    pub(crate) pool: Pool<Q::Payload>,
    share: Share,
    pub(crate) again: Vec<usize>,
    pub(crate) extents: Vec<(u64, u32)>,
    runs: Vec<Run>,
    /// Something was submitted since the last kick.
    submitted: bool,
    /// Payload bytes that were submitted in this turn.
    turn: usize,
    /// The client said goodbye: what is under way is finished, nothing more is read.
    leaving: bool,
    /// It has closed the socket after that.
    pub(crate) gone: bool,
    /// The client owes something: to take replies, or to send what it has announced.
    owes: bool,
    /// Bytes that came or went since `moved_at`.
    moved: usize,
    moved_at: Instant,
    /// How long a client may owe something and move nothing.
    pub(crate) stall: Duration,
}

impl<'a, Q: Queue> Connection<'a, Q> {
    pub(crate) fn new(
        queue: Q,
        info: &'a ExportInfo,
        negotiated: Negotiated,
        input: Vec<u8>,
        share: Share,
    ) -> Self {
        let mode = negotiated.mode;
        Connection {
            queue,
            info,
            negotiated,
            input: Inbox::new(input),
            receiving: None,
            skip: 0,
            pending: vec![None; usize::from(DEPTH)],
            free: (0..usize::from(DEPTH)).rev().collect(),
            out: Outbox::new(mode),
            pool: Pool::new(),
            share,
            again: Vec::new(),
            extents: Vec::new(),
            runs: Vec::new(),
            submitted: false,
            turn: 0,
            leaving: false,
            gone: false,
            owes: false,
            moved: 0,
            moved_at: Instant::now(),
            stall: Duration::MAX,
        }
    }

    pub(crate) fn run(
        mut self,
        stream: &UnixStream,
        stop: BorrowedFd<'_>,
        place: &Place,
    ) -> Result<End, ConnectionError> {
        let mut answered = false;
        loop {
            let pause = self.parse()?;
            if std::mem::take(&mut self.submitted) {
                self.queue.kick();
                answered = true;
            }
            if std::mem::take(&mut answered) {
                self.reap();
            }
            self.send(stream)?;
            self.turn = 0;
            let at_rest = self.free.len() == self.pending.len() && self.out.is_empty();
            if self.leaving && at_rest {
                return Ok(End::Goodbye);
            }
            // Requests that wait in the input announce themselves by nothing but this. Where the client does not take
            // its answers as fast as they come, the socket is waited for instead.
            let goes_on = match pause {
                Pause::Input => false,
                Pause::Room(len) => self.has_room(len),
                Pause::Turn => true,
            };
            if goes_on && self.out.is_empty() {
                continue;
            }
            let idle = at_rest && pause == Pause::Input && self.receiving.is_none() && self.skip == 0;
            if idle {
                place.idle()
            } else {
                place.busy()
            }
            let reads = pause == Pause::Input && !self.leaving;
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, reads);
            flags.set(PollFlags::POLLOUT, !self.out.is_empty());
            let socket = (!self.gone).then_some((stream.as_fd(), flags));
            let deadline = self.deadline(idle);
            let events = [self.queue.event_fd(), stop, self.share.event_fd()];
            let ready = wait(socket, &events, deadline)?;
            if ready.late {
                self.late(idle)?;
                continue;
            }
            if ready.events[1] {
                return Ok(End::Stopped);
            }
            answered = ready.events[0];
            if !ready.socket.is_empty() && !self.heard(stream, ready, reads)? {
                return Ok(End::Vanished);
            }
        }
    }

    /// The socket has something to say. False: nobody is left to answer.
    fn heard(&mut self, stream: &UnixStream, ready: Ready, reads: bool) -> Result<bool, ConnectionError> {
        if reads {
            return self.read(stream);
        }
        if !ready.socket.intersects(PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL) {
            return Ok(true);
        }
        if self.leaving {
            self.forget_client();
        }
        // Else, were it kept, it would be reported again and again until its last request is done.
        Ok(self.leaving)
    }

    /// It said goodbye and does not wait for what is under way, which is carried out all the same.
    fn forget_client(&mut self) {
        self.gone = true;
        self.out.clear();
    }

    fn send(&mut self, stream: &UnixStream) -> Result<(), ConnectionError> {
        let Connection { out, pool, .. } = self;
        let sent = out.send(stream, |payload| {
            let len = payload.bytes().len();
            pool.give(payload, len);
        });
        match sent {
            Ok(moved) => self.moved = self.moved.saturating_add(moved),
            Err(ConnectionError::Socket(_)) if self.leaving => self.forget_client(),
            Err(e) => return Err(e),
        }
        if self.share.is_wanted() {
            self.pool.trim();
        }
        self.share.shrink(self.pool.bytes());
        Ok(())
    }

    /// When to look again though nothing happens.
    fn deadline(&mut self, idle: bool) -> Option<Instant> {
        let owes = !self.out.is_empty() || self.receiving.is_some() || self.skip > 0;
        let enough = if owes { PROGRESS_BYTES_MIN } else { 1 };
        if self.moved >= enough || owes != self.owes {
            (self.owes, self.moved, self.moved_at) = (owes, 0, Instant::now());
        }
        let after = match idle {
            _ if owes => self.stall,
            true if self.pool.bytes() > 0 => TRIM_AFTER,
            _ => return None,
        };
        self.moved_at.checked_add(after)
    }

    fn late(&mut self, idle: bool) -> Result<(), ConnectionError> {
        if !idle {
            return Err(ConnectionError::Stalled(self.stall));
        }
        self.pool.clear();
        self.share.shrink(0);
        Ok(())
    }

    fn has_room(&mut self, len: usize) -> bool {
        if self.free.is_empty()
            || self.out.len() >= OUT_MAX
            || self.out.bytes() >= TURN_BYTES
            || self.out.file_bytes() >= AHEAD_BYTES
        {
            return false;
        }
        let used = self.pool.used_bytes();
        if len == 0 || (used > 0 && used.saturating_add(len) > HELD_BYTES_MAX) {
            return len == 0;
        }
        if self.share.covers(self.pool.bytes_with(len)) {
            return true;
        }
        // What lies ready is of other sizes: better to free it than to ask for more.
        self.pool.trim();
        self.share.covers(self.pool.bytes_with(len))
    }

    /// Reads what is there: into the payload that is being received, and what follows into the input. False: the end.
    fn read(&mut self, stream: &UnixStream) -> Result<bool, ConnectionError> {
        let into = match &mut self.receiving {
            Some(r) => r.payload.bytes_mut().get_mut(r.filled..).unwrap_or_default(),
            None => &mut [],
        };
        match self.input.read(stream, into)? {
            Arrived::End => return Ok(false),
            Arrived::Nothing => {}
            Arrived::Bytes(n) => {
                self.moved = self.moved.saturating_add(n.max(1));
                if let Some(r) = &mut self.receiving {
                    r.filled += n;
                }
            }
        }
        Ok(true)
    }

    /// Takes requests off the input while there is room.
    fn parse(&mut self) -> Result<Pause, ConnectionError> {
        let mode = self.negotiated.mode;
        loop {
            let here = self.input.rest().len();
            let skipped = usize::try_from(self.skip).unwrap_or(usize::MAX).min(here);
            self.input.consume(skipped);
            self.skip -= skipped as u64;
            if self.skip > 0 || !self.receive() || self.leaving {
                return Ok(Pause::Input);
            }
            let Some(request) = Request::decode(self.input.rest(), mode)? else { return Ok(Pause::Input) };
            if self.turn >= TURN_BYTES {
                return Ok(Pause::Turn);
            }
            let announced = request.payload_bytes(mode);
            // "A server SHOULD initiate hard disconnect": so much is not even passed over.
            if mode == Mode::Extended && announced > u64::from(PAYLOAD_BYTES_MAX) {
                return Err(ConnectionError::PayloadTooLong(announced));
            }
            let filter = self.input.rest().get(Request::encoded_bytes(mode)..).unwrap_or_default();
            let filtered = match rules::filter(&request, filter, &self.negotiated) {
                rules::Filter::More => return Ok(Pause::Input),
                filtered => filtered,
            };
            // Refused later if it is longer than any may be, so what does not fit is of no matter here.
            let len = usize::try_from(request.len).unwrap_or(usize::MAX);
            let len = if rules::carries(&request) { len } else { 0 };
            // What goes from files to the socket holds no memory.
            let long = request.command == cmd::READ && request.len >= SEND_BYTES_MIN;
            if long && self.has_room(0) && self.send_runs(&request) {
                self.input.consume(Request::encoded_bytes(mode));
                continue;
            }
            if !self.has_room(len) {
                return Ok(Pause::Room(len));
            }
            self.input.consume(Request::encoded_bytes(mode));
            match filtered {
                rules::Filter::Some(request, contexts) => {
                    self.input.consume(usize::try_from(announced).unwrap_or(usize::MAX));
                    self.filtered_status(&request, &contexts);
                }
                _ => self.request(request),
            }
        }
    }

    /// Completes a write from the input; false while its payload is still coming.
    fn receive(&mut self) -> bool {
        let Some(r) = &mut self.receiving else { return true };
        let rest = r.payload.bytes_mut().get_mut(r.filled..).unwrap_or_default();
        let have = self.input.rest();
        let n = rest.len().min(have.len());
        if let (Some(to), Some(from)) = (rest.get_mut(..n), have.get(..n)) {
            to.copy_from_slice(from);
        }
        let complete = n == rest.len();
        r.filled += n;
        self.input.consume(n);
        if complete && let Some(Receiving { request, payload, .. }) = self.receiving.take() {
            let fua = request.flags & cmd_flag::FUA != 0;
            let command = Command::Write { offset: request.offset, payload, fua };
            self.submit(Pending { request, then_flush: false }, command);
        }
        complete
    }

    /// One request: submits it, answers it, or begins to receive its payload.
    fn request(&mut self, request: Request) {
        let mode = self.negotiated.mode;
        if let Err(error) = rules::check(&request, self.info, &self.negotiated) {
            self.skip = request.payload_bytes(mode);
            return self.out.push(mode.error(&request, error), Body::Nothing);
        }
        let (offset, len) = (request.offset, request.len);
        let fua = request.flags & cmd_flag::FUA != 0 && !self.info.read_only;
        let command = match request.command {
            cmd::READ => Command::Read { offset, payload: self.payload(&request) },
            cmd::WRITE => {
                let payload = self.payload(&request);
                self.receiving = Some(Receiving { request, payload, filled: 0 });
                return;
            }
            cmd::FLUSH => Command::Flush,
            cmd::TRIM => Command::Trim { offset, len },
            cmd::WRITE_ZEROES => {
                Command::WriteZeroes { offset, len, may_hole: request.flags & cmd_flag::NO_HOLE == 0 }
            }
            cmd::BLOCK_STATUS => {
                let contexts = std::mem::take(&mut self.negotiated.contexts);
                self.block_status(&request, &contexts);
                self.negotiated.contexts = contexts;
                return;
            }
            cmd::DISC => {
                self.leaving = true;
                return;
            }
            // CACHE, the only one left.
            _ => {
                self.runs.clear();
                // It has them read ahead; whether it could is of no matter.
                self.queue.runs(offset, len.min(u64::from(PAYLOAD_BYTES_MAX)), &mut self.runs);
                return self.out.push(mode.done(&request), Body::Nothing);
            }
        };
        let then_flush = fua && matches!(request.command, cmd::TRIM | cmd::WRITE_ZEROES);
        self.submit(Pending { request, then_flush }, command);
    }

    /// Answers a read straight from files, if it may and can be.
    fn send_runs(&mut self, request: &Request) -> bool {
        if rules::check(request, self.info, &self.negotiated).is_err() {
            return false;
        }
        self.runs.clear();
        let can = self.queue.runs(request.offset, request.len, &mut self.runs);
        if can {
            self.out.push_runs(request, &self.runs);
        }
        can
    }

    /// BLOCK_STATUS with a list of contexts.
    fn filtered_status(&mut self, request: &Request, contexts: &[usize]) {
        match rules::check(request, self.info, &self.negotiated) {
            Ok(()) => self.block_status(request, contexts),
            Err(error) => self.out.push(self.negotiated.mode.error(request, error), Body::Nothing),
        }
    }

    fn payload(&mut self, request: &Request) -> Q::Payload {
        // The rules let at most PAYLOAD_BYTES_MAX through.
        let len = request.len as usize;
        self.turn += len;
        self.pool.take(&mut self.queue, len)
    }

    fn submit(&mut self, pending: Pending, command: Command<Q::Payload>) {
        let slot = self.free.pop().expect("has_room was asked before the request was taken");
        self.pending[slot] = Some(pending);
        self.queue.submit(slot as u64, command);
        self.submitted = true;
    }
}

#[cfg(test)]
#[path = "connection_test.rs"]
mod tests;
