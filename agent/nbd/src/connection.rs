//! One client, one thread: the handshake, then the transmission phase.
//!
//! ```text
//! socket ──► input ──► requests ──► Queue::submit … kick … reap ──► out ──► socket
//! ```
//! Each turn reads what is there, submits up to [`TURN_BYTES`] of it, kicks once, reaps, and sends what is ready with
//! one vectored write; then it polls the socket, the queue's event and the stop event, unless more can be begun at
//! once. Nothing is read while the connection holds [`HELD_BYTES_MAX`], has all its slots in use, or a turn's worth of
//! replies waits for the client, so a client that does not read its replies stops itself and nobody else.

use std::os::{
    fd::{AsFd, BorrowedFd},
    unix::net::UnixStream,
};

use nix::poll::PollFlags;

use crate::{
    backend::{Backend, Command, ExportInfo, Payload, Queue},
    greet::{ConnectionError, handshake, wait},
    handshake::{Negotiated, context_id},
    inbox::{Arrived, Inbox},
    outbox::{Body, Outbox},
    pool::Pool,
    rules,
    wire::{Head, Mode, Request, cmd, cmd_flag, error_value},
};

/// Payloads that one connection may hold, bytes; a single larger request is let through when it is alone.
pub(crate) const HELD_BYTES_MAX: usize = 8 << 20;
/// Payloads that are begun before the answers are sent: what was read is sent while the processor still has it.
const TURN_BYTES: usize = 256 << 10;
/// Operations under way on one connection.
pub(crate) const DEPTH: u16 = 128;
/// Extents in one answer to BLOCK_STATUS.
const EXTENTS_MAX: usize = 4096;
/// Replies that wait to be sent without holding a slot; past it nothing is read.
const OUT_MAX: usize = 1024;

/// Serves one client until it leaves, errs, or `stop` becomes readable.
pub(crate) fn serve<B: Backend>(
    stream: &UnixStream,
    backends: &[B],
    stop: BorrowedFd<'_>,
) -> Result<(), ConnectionError> {
    stream.set_nonblocking(true)?;
    let infos: Vec<ExportInfo> = backends.iter().map(Backend::info).collect();
    let mut input = Vec::new();
    let Some(negotiated) = handshake(stream, &infos, &mut input, stop)? else { return Ok(()) };
    let (Some(backend), Some(info)) = (backends.get(negotiated.export), infos.get(negotiated.export)) else {
        return Ok(());
    };
    let queue = backend.open(DEPTH).map_err(ConnectionError::Queue)?;
    Connection::new(queue, info, negotiated, input).run(stream, stop)
}

/// A request that was submitted.
#[derive(Debug, Clone, Copy)]
struct Pending {
    request: Request,
    /// FUA of a command whose operation does not know it: a flush follows.
    then_flush: bool,
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

struct Connection<'a, Q: Queue> {
    queue: Q,
    info: &'a ExportInfo,
    negotiated: Negotiated,
    input: Inbox,
    receiving: Option<Receiving<Q::Payload>>,
    /// Bytes of refused payloads that are still coming.
    skip: u64,
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    out: Outbox<Q::Payload>,
    /// Bytes of payloads in `receiving`, under way and in `out`.
    held: usize,
    pool: Pool<Q::Payload>,
    again: Vec<usize>,
    extents: Vec<(u64, u32)>,
    /// Something was submitted since the last kick.
    submitted: bool,
    /// Payload bytes that were submitted in this turn.
    turn: usize,
    /// The client said goodbye: what is under way is finished, nothing more is read.
    leaving: bool,
}

impl<'a, Q: Queue> Connection<'a, Q> {
    fn new(queue: Q, info: &'a ExportInfo, negotiated: Negotiated, input: Vec<u8>) -> Self {
        Connection {
            queue,
            info,
            negotiated,
            input: Inbox::new(input),
            receiving: None,
            skip: 0,
            pending: vec![None; usize::from(DEPTH)],
            free: (0..usize::from(DEPTH)).rev().collect(),
            out: Outbox::new(),
            held: 0,
            pool: Pool::new(),
            again: Vec::new(),
            extents: Vec::new(),
            submitted: false,
            turn: 0,
            leaving: false,
        }
    }

    fn run(mut self, stream: &UnixStream, stop: BorrowedFd<'_>) -> Result<(), ConnectionError> {
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
            let Connection { out, held, pool, .. } = &mut self;
            out.send(stream, |payload| {
                let len = payload.bytes().len();
                *held -= len;
                pool.give(payload, len);
            })?;
            self.turn = 0;
            if self.leaving && self.free.len() == self.pending.len() && self.out.is_empty() {
                return Ok(());
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
            let reads = pause == Pause::Input && !self.leaving;
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, reads);
            flags.set(PollFlags::POLLOUT, !self.out.is_empty());
            let ready = wait(stream.as_fd(), flags, &[self.queue.event_fd(), stop], None)?;
            let [event, stopping] = ready.events;
            if stopping {
                return Ok(());
            }
            answered = event;
            if reads && ready.socket && !self.read(stream)? {
                // Gone without a word: nobody is left to answer.
                return Ok(());
            }
        }
    }

    fn has_room(&self, len: usize) -> bool {
        !self.free.is_empty()
            && self.out.len() < OUT_MAX
            && self.out.bytes() < TURN_BYTES
            && (self.held == 0 || self.held.saturating_add(len) <= HELD_BYTES_MAX)
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
            if self.skip > 0 || !self.receive() {
                return Ok(Pause::Input);
            }
            if self.leaving {
                return Ok(Pause::Input);
            }
            let Some(request) = Request::decode(self.input.rest(), mode)? else { return Ok(Pause::Input) };
            if self.turn >= TURN_BYTES {
                return Ok(Pause::Turn);
            }
            // Refused later if it is longer than any may be, so what does not fit is of no matter here.
            let len = usize::try_from(request.len).unwrap_or(usize::MAX);
            let len = if rules::carries(&request) { len } else { 0 };
            if !self.has_room(len) {
                return Ok(Pause::Room(len));
            }
            self.input.consume(Request::encoded_bytes(mode));
            self.request(request);
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
            cmd::BLOCK_STATUS => return self.block_status(&request),
            cmd::DISC => {
                self.leaving = true;
                return;
            }
            // CACHE, the only one left: the host's page cache reads ahead by itself.
            _ => return self.out.push(mode.done(&request), Body::Nothing),
        };
        let then_flush = fua && matches!(request.command, cmd::TRIM | cmd::WRITE_ZEROES);
        self.submit(Pending { request, then_flush }, command);
    }

    fn payload(&mut self, request: &Request) -> Q::Payload {
        // The rules let at most PAYLOAD_BYTES_MAX through.
        let len = request.len as usize;
        self.held += len;
        self.turn += len;
        self.pool.take(&mut self.queue, len)
    }

    fn submit(&mut self, pending: Pending, command: Command<Q::Payload>) {
        let slot = self.free.pop().expect("has_room was asked before the request was taken");
        self.pending[slot] = Some(pending);
        self.queue.submit(slot as u64, command);
        self.submitted = true;
    }

    fn block_status(&mut self, request: &Request) {
        let mode = self.negotiated.mode;
        let full = if request.flags & cmd_flag::REQ_ONE != 0 { 1 } else { EXTENTS_MAX };
        let contexts = self.negotiated.contexts.len();
        let extents = &mut self.extents;
        for (i, &context) in self.negotiated.contexts.iter().enumerate() {
            extents.clear();
            self.queue.status(context, request.offset, request.len, |len, flags| {
                let count = extents.len();
                match extents.last_mut() {
                    Some(last) if last.1 == flags => last.0 = last.0.saturating_add(len),
                    _ if count == full => return false,
                    _ => extents.push((len, flags)),
                }
                true
            });
            let mut bytes = Vec::with_capacity(extents.len() * mode.extent_bytes() as usize);
            for &(len, flags) in extents.iter() {
                if mode == Mode::Extended {
                    bytes.extend(len.to_be_bytes());
                    bytes.extend(u64::from(flags).to_be_bytes());
                } else {
                    // It lies within the request, whose length is of 32 bits.
                    bytes.extend(u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
                    bytes.extend(flags.to_be_bytes());
                }
            }
            let head = mode.status(request, context_id(context), extents.len() as u32, i + 1 == contexts);
            self.out.push(head, Body::Bytes(bytes));
        }
    }

    /// Takes what is done and makes replies of it.
    fn reap(&mut self) {
        let mut again = std::mem::take(&mut self.again);
        let mode = self.negotiated.mode;
        let Connection { queue, pending, free, out, held, pool, .. } = self;
        queue.reap(|tag, result, payload| {
            let slot = tag as usize;
            let Some(Pending { request, then_flush }) = pending.get(slot).copied().flatten() else { return };
            if then_flush && result.is_ok() {
                again.push(slot);
                return;
            }
            pending[slot] = None;
            free.push(slot);
            let read = request.command == cmd::READ;
            let head: Head = match result {
                Ok(()) if read => mode.data(&request),
                Ok(()) => mode.done(&request),
                Err(host) => mode.error(&request, error_value(host)),
            };
            let mut body = Body::Nothing;
            match payload {
                Some(payload) if read && result.is_ok() => body = Body::Payload(payload),
                Some(payload) => {
                    *held -= request.len as usize;
                    pool.give(payload, request.len as usize);
                }
                None => {}
            }
            out.push(head, body);
        });
        for slot in again.drain(..) {
            if let Some(Some(pending)) = self.pending.get_mut(slot) {
                pending.then_flush = false;
            }
            self.queue.submit(slot as u64, Command::Flush);
            self.queue.kick();
        }
        self.again = again;
    }
}
