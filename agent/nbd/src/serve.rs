//! One client from its first byte to its last: greeted, given a queue, served by a [`Connection`].

use std::{
    os::{fd::BorrowedFd, unix::net::UnixStream},
    sync::Arc,
};

use nix::sys::socket::{setsockopt, sockopt};

use crate::{
    backend::{Backend, ExportInfo},
    budget::Budget,
    connection::{Connection, DEPTH},
    greet::{ConnectionError, handshake},
    handshake::Handshake,
    places::{Place, Places},
    server::{Event, Limits},
};

/// What may wait in the socket for a client that reads.
const SOCKET_BYTES: usize = 1 << 20;
/// How a connection ended, when nothing went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It was served, and said goodbye.
    Goodbye,
    /// It left without a word, before or after it had an export.
    Vanished,
    /// The server stops.
    Stopped,
}

/// What connections of a server share.
pub(crate) struct Host<'a, B> {
    pub(crate) backends: &'a [B],
    pub(crate) limits: Limits,
    pub(crate) budget: &'a Arc<Budget>,
    pub(crate) places: &'a Places,
    pub(crate) stop: BorrowedFd<'a>,
    pub(crate) log: &'a (dyn Fn(Event<'_>) + Sync),
}

/// Serves one client until it leaves, errs, or the server stops.
pub(crate) fn serve<B: Backend>(
    stream: &UnixStream,
    host: &Host<'_, B>,
    place: &Place,
) -> Result<End, ConnectionError> {
    stream.set_nonblocking(true)?;
    let infos: Vec<ExportInfo> = host.backends.iter().map(Backend::info).collect();
    let mut input = Vec::new();
    let admit = || place.admit();
    let mut machine = Handshake::new(&infos).admitting(&admit);
    let greeted = handshake(stream, &mut machine, &mut input, host.stop, host.limits.handshake)?;
    let Some(negotiated) = greeted else { return Ok(End::Vanished) };
    let (Some(backend), Some(info)) = (host.backends.get(negotiated.export), infos.get(negotiated.export))
    else {
        return Ok(End::Vanished);
    };
    widen(stream);
    (host.log)(Event::Clients(host.places.clients()));
    let queue = backend.open(DEPTH).map_err(ConnectionError::Queue)?;
    let share = host.budget.share()?;
    let mut connection = Connection::new(queue, info, negotiated, input, share);
    connection.stall = host.limits.stall;
    connection.run(stream, host.stop, place)
}

/// Whether an error only says that the client has closed its end, which it may.
pub(crate) fn is_farewell(error: &ConnectionError) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset};
    matches!(error, ConnectionError::Socket(e) if matches!(e.kind(), BrokenPipe | ConnectionReset))
}

/// Lets more bytes wait in the socket: a writer is woken when three quarters of them are gone, and the client should have
/// something to read until it is there. The system may allow less; that costs time only.
fn widen(stream: &UnixStream) {
    if setsockopt(stream, sockopt::SndBufForce, &SOCKET_BYTES).is_err() {
        let _ = setsockopt(stream, sockopt::SndBuf, &SOCKET_BYTES);
    }
}
