//! One client, one thread: the handshake, then the transmission phase.
//!
//! ```text
//! socket ──► input ──► requests ──► Queue::submit … kick … reap ──► out ──► socket
//! ```
//! Each turn reads what is there, submits all of it, kicks once, reaps, and sends what is ready with one vectored
//! write; then it polls the socket, the queue's event and the stop event. Nothing is read while the
//! connection holds [`HELD_BYTES_MAX`] or has all its slots in use, so a client that does not read its replies
//! stops itself and nobody else.

use std::{
    io::{IoSliceMut, Read},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
};

use nix::poll::PollFlags;

use crate::{
    backend::{Backend, Command, ExportInfo, Payload, Queue},
    greet::{ConnectionError, handshake, wait, would_block},
    handshake::{Negotiated, context_id},
    outbox::{Body, Outbox},
    pool::Pool,
    wire::{
        Head, PAYLOAD_BYTES_MAX, REQUEST_BYTES, Request, cmd, cmd_flag, data_chunk, errno, error_chunk,
        error_value, simple_reply, status_chunk,
    },
};

/// Payloads that one connection may hold, bytes; a single larger request is let through when it is alone.
const HELD_BYTES_MAX: usize = 33 << 20;
/// Operations under way on one connection.
pub(crate) const DEPTH: u16 = 128;
const INPUT_BYTES: usize = 64 << 10;
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

struct Connection<'a, Q: Queue> {
    queue: Q,
    info: &'a ExportInfo,
    negotiated: Negotiated,
    input: Vec<u8>,
    input_at: usize,
    receiving: Option<Receiving<Q::Payload>>,
    /// Bytes of refused writes that are still coming.
    skip: usize,
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    out: Outbox<Q::Payload>,
    /// Bytes of payloads in `receiving`, under way and in `out`.
    held: usize,
    pool: Pool<Q::Payload>,
    again: Vec<usize>,
    /// The client said goodbye: what is under way is finished, nothing more is read.
    leaving: bool,
}

impl<'a, Q: Queue> Connection<'a, Q> {
    fn new(queue: Q, info: &'a ExportInfo, negotiated: Negotiated, mut input: Vec<u8>) -> Self {
        input.reserve(INPUT_BYTES);
        Connection {
            queue,
            info,
            negotiated,
            input,
            input_at: 0,
            receiving: None,
            skip: 0,
            pending: vec![None; usize::from(DEPTH)],
            free: (0..usize::from(DEPTH)).rev().collect(),
            out: Outbox::new(),
            held: 0,
            pool: Pool::new(),
            again: Vec::new(),
            leaving: false,
        }
    }

    fn run(mut self, stream: &UnixStream, stop: BorrowedFd<'_>) -> Result<(), ConnectionError> {
        loop {
            // Answers make room for requests that wait in the input, so both until nothing moves.
            while self.parse()? {
                self.queue.kick();
                self.reap();
            }
            self.reap();
            let Connection { out, held, pool, .. } = &mut self;
            out.send(stream, |payload| {
                let len = payload.bytes().len();
                *held -= len;
                pool.give(payload, len);
            })?;
            if self.leaving && self.free.len() == self.pending.len() && self.out.is_empty() {
                return Ok(());
            }
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::POLLIN, self.wants_input());
            flags.set(PollFlags::POLLOUT, !self.out.is_empty());
            if wait(stream.as_fd(), flags, &[self.queue.event_fd(), stop], None)? {
                return Ok(());
            }
            if self.wants_input() && self.read(stream)? == 0 {
                // Gone without a word: nobody is left to answer.
                return Ok(());
            }
        }
    }

    fn has_room(&self, len: usize) -> bool {
        !self.free.is_empty()
            && self.out.len() < OUT_MAX
            && (self.held == 0 || self.held.saturating_add(len) <= HELD_BYTES_MAX)
    }

    fn wants_input(&self) -> bool {
        let parsed = self.input.len() - self.input_at < REQUEST_BYTES;
        !self.leaving && (self.receiving.is_some() || self.skip > 0 || parsed)
    }

    /// Reads what is there: into the payload that is being received, and what follows into `input`.
    fn read(&mut self, mut stream: &UnixStream) -> Result<usize, ConnectionError> {
        self.input.drain(..self.input_at);
        self.input_at = 0;
        let have = self.input.len();
        self.input.resize(INPUT_BYTES.max(have), 0);
        let tail = self.input.get_mut(have..).unwrap_or_default();
        let (into, wanted) = match &mut self.receiving {
            Some(r) => {
                let rest = r.payload.bytes_mut().get_mut(r.filled..).unwrap_or_default();
                let wanted = rest.len();
                (stream.read_vectored(&mut [IoSliceMut::new(rest), IoSliceMut::new(tail)]), wanted)
            }
            None => (stream.read(tail), 0),
        };
        let n = match into {
            Ok(n) => n,
            Err(e) if would_block(&e) => {
                self.input.truncate(have);
                // Anything but zero, which means the end.
                return Ok(1);
            }
            Err(e) => return Err(e.into()),
        };
        if let Some(r) = &mut self.receiving {
            r.filled += n.min(wanted);
        }
        self.input.truncate(have + n.saturating_sub(wanted));
        Ok(n)
    }

    /// Takes requests off the input while there is room; true when something was submitted.
    fn parse(&mut self) -> Result<bool, ConnectionError> {
        let mut submitted = false;
        loop {
            let skipped = self.skip.min(self.input.len() - self.input_at);
            self.input_at += skipped;
            self.skip -= skipped;
            if self.skip > 0 {
                return Ok(submitted);
            }
            if let Some(r) = &mut self.receiving {
                let rest = r.payload.bytes_mut().get_mut(r.filled..).unwrap_or_default();
                let have = self.input.get(self.input_at..).unwrap_or_default();
                let n = rest.len().min(have.len());
                if let (Some(to), Some(from)) = (rest.get_mut(..n), have.get(..n)) {
                    to.copy_from_slice(from);
                }
                let complete = n == rest.len();
                r.filled += n;
                self.input_at += n;
                if !complete {
                    return Ok(submitted);
                }
                if let Some(r) = self.receiving.take() {
                    self.submit_write(r);
                    submitted = true;
                }
            }
            if self.leaving {
                return Ok(submitted);
            }
            let Some(request) = Request::decode(self.input.get(self.input_at..).unwrap_or_default())? else {
                return Ok(submitted);
            };
            let carries = matches!(request.command, cmd::READ | cmd::WRITE);
            if !self.has_room(if carries { request.len as usize } else { 0 }) {
                return Ok(submitted);
            }
            self.input_at += REQUEST_BYTES;
            submitted |= self.request(request);
        }
    }

    /// One request; true when it was submitted.
    fn request(&mut self, request: Request) -> bool {
        if let Err(error) = self.check(&request) {
            if request.command == cmd::WRITE {
                self.skip = request.len as usize;
            }
            self.answer_error(&request, error);
            return false;
        }
        let (offset, len) = (request.offset, u64::from(request.len));
        let fua = request.flags & cmd_flag::FUA != 0 && !self.info.read_only;
        let command = match request.command {
            cmd::READ => {
                self.held += request.len as usize;
                let payload = self.pool.take(&mut self.queue, request.len as usize);
                Command::Read { offset, payload }
            }
            cmd::WRITE => {
                self.held += request.len as usize;
                let payload = self.pool.take(&mut self.queue, request.len as usize);
                self.receiving = Some(Receiving { request, payload, filled: 0 });
                return false;
            }
            cmd::FLUSH => Command::Flush,
            cmd::TRIM => Command::Trim { offset, len },
            cmd::WRITE_ZEROES => {
                Command::WriteZeroes { offset, len, may_hole: request.flags & cmd_flag::NO_HOLE == 0 }
            }
            cmd::BLOCK_STATUS => {
                self.block_status(&request);
                return false;
            }
            cmd::DISC => {
                self.leaving = true;
                return false;
            }
            // CACHE, the only one left: the host's page cache reads ahead by itself.
            _ => {
                self.push(simple_reply(request.cookie, 0), Body::Nothing);
                return false;
            }
        };
        let then_flush = fua && matches!(request.command, cmd::TRIM | cmd::WRITE_ZEROES);
        self.submit(Pending { request, then_flush }, command);
        true
    }

    fn submit(&mut self, pending: Pending, command: Command<Q::Payload>) {
        let slot = self.free.pop().expect("has_room was asked before the request was taken");
        self.pending[slot] = Some(pending);
        self.queue.submit(slot as u64, command);
    }

    fn submit_write(&mut self, received: Receiving<Q::Payload>) {
        let Receiving { request, payload, .. } = received;
        let fua = request.flags & cmd_flag::FUA != 0;
        let command = Command::Write { offset: request.offset, payload, fua };
        self.submit(Pending { request, then_flush: false }, command);
    }

    /// Whether a request may be carried out; the error value otherwise.
    fn check(&self, request: &Request) -> Result<(), u32> {
        let known = match request.command {
            cmd::READ if self.negotiated.structured => cmd_flag::FUA | cmd_flag::DF,
            cmd::WRITE_ZEROES => cmd_flag::FUA | cmd_flag::NO_HOLE,
            cmd::BLOCK_STATUS => cmd_flag::FUA | cmd_flag::REQ_ONE,
            cmd::READ | cmd::WRITE | cmd::DISC | cmd::FLUSH | cmd::TRIM | cmd::CACHE => cmd_flag::FUA,
            _ => return Err(errno::EINVAL),
        };
        if request.flags & !known != 0 {
            return Err(errno::EINVAL);
        }
        if matches!(request.command, cmd::DISC | cmd::FLUSH) {
            return Ok(());
        }
        let changes = matches!(request.command, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES);
        if changes && self.info.read_only {
            return Err(errno::EPERM);
        }
        let carries = matches!(request.command, cmd::READ | cmd::WRITE);
        if carries && request.len > PAYLOAD_BYTES_MAX {
            return Err(errno::EOVERFLOW);
        }
        if request.command == cmd::BLOCK_STATUS && self.negotiated.contexts.is_empty() {
            return Err(errno::EINVAL);
        }
        let end = request.offset.checked_add(u64::from(request.len));
        match end {
            // "a zero-length request is unspecified": refused where data or extents are asked for.
            _ if request.len == 0 && !changes => Err(errno::EINVAL),
            Some(end) if end <= self.info.size_bytes => Ok(()),
            _ if changes => Err(errno::ENOSPC),
            _ => Err(errno::EINVAL),
        }
    }

    fn answer_error(&mut self, request: &Request, error: u32) {
        // With structured replies a read and a block status must not be answered by a simple one.
        let structured =
            self.negotiated.structured && matches!(request.command, cmd::READ | cmd::BLOCK_STATUS);
        let head =
            if structured { error_chunk(request.cookie, error) } else { simple_reply(request.cookie, error) };
        self.push(head, Body::Nothing);
    }

    fn push(&mut self, head: Head, body: Body<Q::Payload>) {
        self.out.push(head, body);
    }

    fn block_status(&mut self, request: &Request) {
        let one = request.flags & cmd_flag::REQ_ONE != 0;
        let contexts = self.negotiated.contexts.len();
        for i in 0..contexts {
            let Some(&context) = self.negotiated.contexts.get(i) else { continue };
            let mut extents: Vec<(u32, u32)> = Vec::new();
            self.queue.status(context, request.offset, u64::from(request.len), |len, flags| {
                // It lies within the request, whose length is a u32.
                let len = u32::try_from(len).unwrap_or(u32::MAX);
                let full = extents.len() == if one { 1 } else { EXTENTS_MAX };
                match extents.last_mut() {
                    Some(last) if last.1 == flags => last.0 = last.0.saturating_add(len),
                    _ if full => return false,
                    _ => extents.push((len, flags)),
                }
                true
            });
            let bytes: Vec<u8> = extents
                .iter()
                .flat_map(|(len, flags)| len.to_be_bytes().into_iter().chain(flags.to_be_bytes()))
                .collect();
            let last = i + 1 == contexts;
            let head = status_chunk(request.cookie, context_id(context), extents.len() as u32, last);
            self.push(head, Body::Bytes(bytes));
        }
    }

    /// Takes what is done and makes replies of it.
    fn reap(&mut self) {
        let mut again = std::mem::take(&mut self.again);
        let structured = self.negotiated.structured;
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
            let error = result.err().map_or(0, error_value);
            let read = request.command == cmd::READ;
            let head = match (read && structured, error) {
                (true, 0) => data_chunk(request.cookie, request.offset, request.len),
                (true, error) => error_chunk(request.cookie, error),
                (false, error) => simple_reply(request.cookie, error),
            };
            let mut body = Body::Nothing;
            match payload {
                Some(payload) if read && error == 0 => body = Body::Payload(payload),
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
