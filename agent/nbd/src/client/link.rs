//! One connection of a client: connected and greeted within a deadline, then non-blocking.
//!
//! Owns the socket, what is on its way out, and the decoder of what comes in. It never connects again by itself.

use std::{
    collections::{HashMap, VecDeque},
    io::{self, IoSlice, Read, Write},
    os::fd::AsFd,
    sync::Arc,
    time::{Duration, Instant},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::EventFd,
};

use super::{
    ClientError, ConnectError, Options, Terms,
    greet::{self, Wanted},
    reply::{Answered, Expected, ProtocolError, Replies},
    stream::{Stream, Timed},
    window::Op,
};
use crate::wire::{Head, Mode, Request, cmd, cmd_flag};

/// Heads of replies and small answers are read in pieces of this; larger data go straight to their place.
const SCRATCH_BYTES: usize = 64 << 10;
const DIRECT_BYTES: usize = 16 << 10;
/// Answers that are taken before something is sent again.
const ANSWERS_MAX: usize = 64;
/// Bytes that are read before something is sent again.
const TURN_BYTES: usize = 8 << 20;

/// Why a link cannot be used any more.
#[derive(Debug)]
pub(super) enum LinkError {
    /// The socket: another one may do better.
    Lost(io::Error),
    /// The server is not to be believed.
    Protocol(ProtocolError),
    /// Something that no new link can make good.
    Fatal(ClientError),
}

impl From<ProtocolError> for LinkError {
    fn from(error: ProtocolError) -> Self {
        LinkError::Protocol(error)
    }
}

impl From<io::Error> for LinkError {
    fn from(error: io::Error) -> Self {
        LinkError::Lost(error)
    }
}

fn would_block(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

struct Out {
    head: Head,
    body: Option<Arc<Vec<u8>>>,
}

impl Out {
    fn body(&self) -> &[u8] {
        self.body.as_ref().map_or(&[], |body| body.as_slice())
    }
}

/// See the head of this file.
pub(super) struct Link {
    stream: Stream,
    mode: Mode,
    replies: Replies,
    out: VecDeque<Out>,
    /// Bytes of the first of `out` that are sent.
    sent: usize,
    scratch: Box<[u8]>,
    /// When the server said something, or was first asked.
    heard: Instant,
}

impl Link {
    pub(super) fn connect(options: &Options, limit: Duration) -> Result<(Link, Terms), ConnectError> {
        let until = Instant::now() + limit;
        let mut stream = Stream::connect(&options.address, limit).map_err(ConnectError::Socket)?;
        let mut timed = Timed { stream: &mut stream, until };
        let greeting = greet::begin(&mut timed)?;
        if let Some(tls) = &options.tls {
            greet::start_tls(&mut timed, greeting)?;
            stream = tls.wrap(stream).map_err(ConnectError::Tls)?;
        }
        let wanted = Wanted {
            export: options.export.clone(),
            contexts: options.contexts.clone(),
            mode_max: options.mode_max,
        };
        let terms = greet::negotiate(&mut Timed { stream: &mut stream, until }, greeting, &wanted)?;
        stream.set_nonblocking(true).map_err(ConnectError::Socket)?;
        let contexts = terms.contexts.iter().map(|(id, _)| *id).collect();
        let link = Link {
            stream,
            mode: terms.mode,
            replies: Replies::new(terms.mode, contexts),
            out: VecDeque::new(),
            sent: 0,
            scratch: vec![0; SCRATCH_BYTES].into(),
            heard: Instant::now(),
        };
        Ok((link, terms))
    }

    /// Puts an operation into the queue of what is sent. A read's buffer is here until its answer.
    pub(super) fn send(&mut self, cookie: u64, op: &mut Op) {
        let (offset, len) = op.range().unwrap_or_default();
        let (command, flags) = match op {
            Op::Read { .. } => (cmd::READ, 0),
            Op::Write { .. } if self.mode == Mode::Extended => (cmd::WRITE, cmd_flag::PAYLOAD_LEN),
            Op::Write { .. } => (cmd::WRITE, 0),
            Op::Flush => (cmd::FLUSH, 0),
            Op::Trim { .. } => (cmd::TRIM, 0),
            Op::WriteZeroes { may_hole: true, .. } => (cmd::WRITE_ZEROES, 0),
            Op::WriteZeroes { .. } => (cmd::WRITE_ZEROES, cmd_flag::NO_HOLE),
            Op::Status { .. } => (cmd::BLOCK_STATUS, 0),
        };
        let request = Request { flags, command, cookie, offset, len };
        let (mut buffer, mut body) = (Vec::new(), None);
        match op {
            Op::Read { buffer: into, .. } => buffer = std::mem::take(into),
            Op::Write { data, .. } => body = Some(Arc::clone(data)),
            _ => {}
        }
        if self.replies.waiting() == 0 {
            self.heard = Instant::now();
        }
        self.replies.expect(cookie, Expected::new(&request, buffer));
        self.out.push_back(Out { head: request.encode(self.mode), body });
    }

    /// Sends until the socket is full or nothing is left.
    pub(super) fn flush_out(&mut self) -> io::Result<()> {
        while let Some(first) = self.out.front() {
            let head = first.head.bytes();
            let parts = [
                IoSlice::new(head.get(self.sent..).unwrap_or_default()),
                IoSlice::new(first.body().get(self.sent.saturating_sub(head.len())..).unwrap_or_default()),
            ];
            match self.stream.write_vectored(&parts) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => self.sent += n,
                Err(e) if would_block(&e) => return Ok(()),
                Err(e) => return Err(e),
            }
            if self.sent >= head.len() + first.body().len() {
                self.sent = 0;
                self.out.pop_front();
            }
        }
        Ok(())
    }

    /// Waits for the socket or the event. With `stall`, a server that says nothing for so long is given up.
    pub(super) fn wait(&self, event: &EventFd, stall: Option<Duration>) -> io::Result<()> {
        let limit = stall.map(|stall| (self.heard + stall).saturating_duration_since(Instant::now()));
        if limit == Some(Duration::ZERO) {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the server does not answer"));
        }
        let mut flags = PollFlags::POLLIN;
        flags.set(PollFlags::POLLOUT, !self.out.is_empty());
        let mut fds =
            [PollFd::new(self.stream.as_fd(), flags), PollFd::new(event.as_fd(), PollFlags::POLLIN)];
        poll_for(&mut fds, limit)
    }

    /// Takes what the server has sent.
    pub(super) fn receive(&mut self, answers: &mut Vec<Answered>) -> Result<(), LinkError> {
        let mut turn = 0;
        while turn < TURN_BYTES && answers.len() < ANSWERS_MAX {
            let target = self.replies.target();
            let direct = target.len() >= DIRECT_BYTES;
            let into: &mut [u8] = if direct { target } else { &mut self.scratch };
            let n = match self.stream.read(into) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(n) => n,
                Err(e) if would_block(&e) => return Ok(()),
                Err(e) => return Err(e.into()),
            };
            turn += n;
            self.heard = Instant::now();
            if direct {
                answers.extend(self.replies.advance(n)?);
                continue;
            }
            let mut rest = self.scratch.get(..n).unwrap_or_default();
            feed(&mut self.replies, &mut rest, answers)?;
        }
        Ok(())
    }

    /// What no answer came for.
    pub(super) fn into_expected(self) -> HashMap<u64, Expected> {
        self.replies.into_expected()
    }

    /// Says goodbye, as far as the socket takes it at once.
    pub(super) fn leave(mut self) {
        let request = Request { flags: 0, command: cmd::DISC, cookie: 0, offset: 0, len: 0 };
        self.out.push_back(Out { head: request.encode(self.mode), body: None });
        // A server that is gone need not be told.
        let _ = self.flush_out();
    }
}

/// Gives bytes to the decoder.
pub(super) fn feed(
    replies: &mut Replies,
    rest: &mut &[u8],
    answers: &mut Vec<Answered>,
) -> Result<(), ProtocolError> {
    while !rest.is_empty() {
        let target = replies.target();
        let n = target.len().min(rest.len());
        let (now, later) = rest.split_at_checked(n).unwrap_or_default();
        if n == 0 {
            return Err(ProtocolError("bytes that nothing asked for"));
        }
        target.get_mut(..n).unwrap_or_default().copy_from_slice(now);
        *rest = later;
        answers.extend(replies.advance(n)?);
    }
    Ok(())
}

fn poll_for(fds: &mut [PollFd<'_>], limit: Option<Duration>) -> io::Result<()> {
    let timeout = match limit {
        None => PollTimeout::NONE,
        Some(limit) => PollTimeout::try_from(limit + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX),
    };
    match poll(fds, timeout) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Waits for the event alone.
pub(super) fn wait_event(event: &EventFd, limit: Option<Duration>) -> io::Result<()> {
    poll_for(&mut [PollFd::new(event.as_fd(), PollFlags::POLLIN)], limit)
}
