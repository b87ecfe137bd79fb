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
    backend::ExportInfo,
    handshake::{Handshake, HandshakeError, Negotiated, greeting},
    wire::BadMagic,
};

/// How long a client may take for its handshake.
const HANDSHAKE_MAX: Duration = Duration::from_secs(15);

/// Why a connection ended other than by the client's wish.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The handshake failed.
    #[error("handshake failed")]
    Handshake(#[from] HandshakeError),
    /// The client is too slow.
    #[error("the client did not finish its handshake within {} s", HANDSHAKE_MAX.as_secs())]
    HandshakeTimeout,
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
    infos: &[ExportInfo],
    input: &mut Vec<u8>,
    stop: BorrowedFd<'_>,
) -> Result<Option<Negotiated>, ConnectionError> {
    let deadline = Instant::now() + HANDSHAKE_MAX;
    let mut machine = Handshake::new(infos);
    let mut out = greeting().to_vec();
    let mut chunk = [0; 4096];
    loop {
        let result = machine.advance(input, &mut out);
        send_all(stream, &mut out, deadline)?;
        match result {
            Ok(None) => {}
            Ok(done) => return Ok(done),
            Err(HandshakeError::Aborted) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        if wait(stream.as_fd(), PollFlags::POLLIN, &[stop], Some(deadline))?.events[0] {
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
fn send_all(mut stream: &UnixStream, out: &mut Vec<u8>, deadline: Instant) -> Result<(), ConnectionError> {
    while !out.is_empty() {
        match stream.write(out) {
            Ok(n) => drop(out.drain(..n)),
            Err(e) if would_block(&e) => {
                wait(stream.as_fd(), PollFlags::POLLOUT, &[], Some(deadline))?;
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// What [`wait`] found.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ready {
    /// The socket: what was asked for, its end, or its failure.
    pub(crate) socket: bool,
    /// The events, in their order.
    pub(crate) events: [bool; 2],
}

/// Waits for `flags` on the socket or for one of at most two events.
pub(crate) fn wait(
    socket: BorrowedFd<'_>,
    flags: PollFlags,
    events: &[BorrowedFd<'_>],
    deadline: Option<Instant>,
) -> Result<Ready, ConnectionError> {
    let timeout = match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
        None => PollTimeout::NONE,
        Some(left) if left.is_zero() => return Err(ConnectionError::HandshakeTimeout),
        Some(left) => PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX),
    };
    // A missing event repeats the socket, waiting for nothing; it is not looked at.
    let event = |i: usize| match events.get(i) {
        Some(event) => PollFd::new(*event, PollFlags::POLLIN),
        None => PollFd::new(socket, PollFlags::empty()),
    };
    let mut fds = [PollFd::new(socket, flags), event(0), event(1)];
    let used = fds.get_mut(..=events.len()).unwrap_or_default();
    match poll(used, timeout) {
        Ok(_) => {}
        Err(nix::errno::Errno::EINTR) => return Ok(Ready::default()),
        Err(e) => return Err(io::Error::from(e).into()),
    }
    let ready = |i: usize| used.get(i).is_some_and(|fd| fd.any() == Some(true));
    Ok(Ready { socket: ready(0), events: [ready(1), ready(2)] })
}
