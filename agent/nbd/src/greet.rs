//! The handshake over a socket, with a deadline; and how a connection waits.

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{
    handshake::{Handshake, HandshakeError, Negotiated, greeting},
    wire::BadMagic,
};

/// Why a connection ended other than by the client's wish.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The handshake failed.
    #[error("handshake failed")]
    Handshake(#[from] HandshakeError),
    /// The client is too slow.
    #[error("it did not finish its handshake within {0:?}")]
    HandshakeTimeout(Duration),
    /// It keeps memory and does nothing.
    #[error("it took none of its replies, or sent nothing of what it had announced, for {0:?}")]
    Stalled(Duration),
    /// Another one needed the place.
    #[error("it was idle, or had asked for nothing, and another client needed its place")]
    Displaced,
    /// A payload that no request may have.
    #[error("it announced a payload of {0} bytes")]
    PayloadTooLong(u64),
    /// Simple replies cannot say that the rest of the data cannot be read.
    #[error("the export could not be read in the middle of a reply")]
    Read(#[source] io::Error),
    /// The stream makes no sense any more.
    #[error("the stream is damaged")]
    Magic(#[from] BadMagic),
    /// The socket.
    #[error("the socket failed")]
    Socket(#[from] io::Error),
    /// The export could not be opened once more.
    #[error("no queue for the connection")]
    Queue(#[source] io::Error),
}

/// `Ok(None)`: the client left, or the server stops.
pub(crate) fn handshake(
    stream: &UnixStream,
    machine: &mut Handshake<'_>,
    input: &mut Vec<u8>,
    stop: BorrowedFd<'_>,
    limit: Duration,
) -> Result<Option<Negotiated>, ConnectionError> {
    let deadline = Instant::now() + limit;
    let mut out = greeting().to_vec();
    let mut chunk = [0; 4096];
    loop {
        let result = machine.advance(input, &mut out);
        send_all(stream, &mut out, deadline, limit, stop)?;
        match result {
            Ok(None) => {}
            Ok(done) => return Ok(done),
            Err(HandshakeError::Aborted) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        let ready = wait(Some((stream.as_fd(), PollFlags::POLLIN)), &[stop], Some(deadline))?;
        if ready.late {
            return Err(ConnectionError::HandshakeTimeout(limit));
        }
        if ready.events[0] {
            return Ok(None);
        }
        let mut reader = stream;
        match reader.read(&mut chunk) {
            Ok(0) => return Ok(None),
            Ok(n) => input.extend_from_slice(chunk.get(..n).unwrap_or_default()),
            Err(e) if would_block(&e) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

pub(crate) fn would_block(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Sends the handshake's small answers; a client that does not read them runs into the deadline.
fn send_all(
    mut stream: &UnixStream,
    out: &mut Vec<u8>,
    deadline: Instant,
    limit: Duration,
    stop: BorrowedFd<'_>,
) -> Result<(), ConnectionError> {
    while !out.is_empty() {
        match stream.write(out) {
            Ok(n) => drop(out.drain(..n)),
            Err(e) if would_block(&e) => {
                let ready = wait(Some((stream.as_fd(), PollFlags::POLLOUT)), &[stop], Some(deadline))?;
                if ready.late || ready.events[0] {
                    return Err(ConnectionError::HandshakeTimeout(limit));
                }
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// What [`wait`] found.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ready {
    /// The socket: what was asked for, its end (`POLLHUP`), or its failure.
    pub(crate) socket: PollFlags,
    /// The events, in their order.
    pub(crate) events: [bool; EVENTS_MAX],
    /// Nothing came in time.
    pub(crate) late: bool,
}

/// Events that can be waited for besides a socket.
pub(crate) const EVENTS_MAX: usize = 3;

/// Waits for `flags` on the socket, if there is one, for one of at most [`EVENTS_MAX`] events, or for the deadline.
pub(crate) fn wait(
    socket: Option<(BorrowedFd<'_>, PollFlags)>,
    events: &[BorrowedFd<'_>],
    deadline: Option<Instant>,
) -> io::Result<Ready> {
    let timeout = match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
        None => PollTimeout::NONE,
        Some(left) => PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX),
    };
    let mut none = Ready { socket: PollFlags::empty(), events: [false; EVENTS_MAX], late: false };
    let Some((first, rest)) = events.split_first() else { return Ok(none) };
    // What is missing repeats the first event, waiting for nothing; it is not looked at.
    let event = |i: usize| match rest.get(i) {
        Some(event) => PollFd::new(*event, PollFlags::POLLIN),
        None => PollFd::new(*first, PollFlags::empty()),
    };
    let (socket, flags) = socket.unwrap_or((*first, PollFlags::empty()));
    let mut fds = [PollFd::new(*first, PollFlags::POLLIN), event(0), event(1), PollFd::new(socket, flags)];
    match poll(&mut fds, timeout) {
        Ok(0) => Ok(Ready { late: true, ..none }),
        Ok(_) => {
            none.events = std::array::from_fn(|i| i < events.len() && fds[i].any() == Some(true));
            none.socket = fds[EVENTS_MAX].revents().unwrap_or(PollFlags::POLLERR);
            Ok(none)
        }
        Err(nix::errno::Errno::EINTR) => Ok(none),
        Err(e) => Err(e.into()),
    }
}
