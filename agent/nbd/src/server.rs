//! Accepts clients on a Unix socket: one thread each, bounded in number, time and memory, all ended by one event.
//!
//! | bound | what happens at it |
//! |---|---|
//! | [`Limits::clients_max`] | the longest idle client is dropped; if all are at work the newcomer is told so (`ERR_POLICY`) |
//! | 64 clients in the handshake | the one that came first is dropped |
//! | 16 threads of dropped clients | the next client is accepted when one of them has ended |
//! | [`Limits::handshake`], [`Limits::stall`] | that client is dropped |
//! | [`Limits::memory_bytes_max`] | requests wait for their turn: nothing is refused |

use std::{
    fmt, io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use crate::{
    backend::Backend,
    budget::Budget,
    greet::ConnectionError,
    places::Places,
    serve::{End, Host, is_farewell, serve},
};

/// A connection's thread needs little: buffers lie on the heap.
const STACK_BYTES: usize = 256 << 10;

/// Bounds of a server.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Clients that have an export, at once.
    pub clients_max: usize,
    /// Memory for payloads that all clients share; each has 512 KiB besides.
    pub memory_bytes_max: usize,
    /// How long a client may take for its handshake.
    pub handshake: Duration,
    /// How long a client may take none of its replies, or send nothing of a payload that it has announced.
    pub stall: Duration,
    /// The server ends when a client has said goodbye and no other is left.
    pub once: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            clients_max: 16,
            memory_bytes_max: 64 << 20,
            handshake: Duration::from_secs(15),
            stall: Duration::from_secs(60),
            once: false,
        }
    }
}

/// Ends a server and all its connections. Clones share it.
#[derive(Clone)]
pub struct Stop(Arc<EventFd>);

impl fmt::Debug for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stop")
    }
}

impl Stop {
    /// A new one, not yet stopped.
    pub fn new() -> io::Result<Stop> {
        Ok(Stop(Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?)))
    }

    /// Stops; never undone.
    pub fn stop(&self) {
        // It fails only when it was stopped 2^64 times.
        let _ = self.0.write(1);
    }

    /// Readable once stopped.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Why a server could not go on.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The listening socket.
    #[error("cannot accept connections")]
    Accept(#[source] io::Error),
}

/// What happens, for a log.
#[derive(Debug)]
pub enum Event<'a> {
    /// A client has its export, or has left: how many have one now.
    Clients(usize),
    /// A client was turned away: there was no thread for it.
    Refused,
    /// A client was dropped.
    Dropped(&'a ConnectionError),
}

/// See the head of this file.
#[derive(Debug)]
pub struct Server<B> {
    backends: Vec<B>,
    limits: Limits,
}

impl<B: Backend> Server<B> {
    /// A server of these exports.
    pub fn new(backends: Vec<B>, limits: Limits) -> Server<B> {
        Server { backends, limits }
    }

    /// Serves until `stop`, or, with [`Limits::once`], until the first user has gone; returns when the last connection
    /// has ended.
    pub fn run(
        &self,
        listener: &UnixListener,
        stop: &Stop,
        log: &(dyn Fn(Event<'_>) + Sync),
    ) -> Result<(), ServerError> {
        listener.set_nonblocking(true).map_err(ServerError::Accept)?;
        let places = Places::new(self.limits.clients_max);
        let budget = Arc::new(Budget::new(self.limits.memory_bytes_max));
        let served = AtomicBool::new(false);
        let host = Host {
            backends: &self.backends,
            limits: self.limits,
            budget: &budget,
            places: &places,
            stop: stop.event_fd(),
            log,
        };
        std::thread::scope(|scope| {
            loop {
                let mut fds = [
                    PollFd::new(listener.as_fd(), PollFlags::POLLIN),
                    PollFd::new(stop.event_fd(), PollFlags::POLLIN),
                ];
                match poll(&mut fds, PollTimeout::NONE) {
                    Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                    Err(e) => return Err(ServerError::Accept(e.into())),
                }
                if fds[1].any() == Some(true) {
                    return Ok(());
                }
                if !places.let_leave() {
                    continue;
                }
                let Some(stream) = accept(listener)? else { continue };
                let stream = Arc::new(stream);
                let place = places.enter(Arc::clone(&stream));
                let (places, host, served) = (&places, &host, &served);
                let client = move || {
                    let result = serve(&stream, host, &place);
                    let displaced = place.was_dropped().then_some(ConnectionError::Displaced);
                    // Before its place is free: whoever leaves last must know of it.
                    served.fetch_or(matches!(result, Ok(End::Goodbye)), Ordering::SeqCst);
                    drop((stream, place));
                    let left = places.clients();
                    log(Event::Clients(left));
                    match (displaced, &result) {
                        (Some(error), _) => log(Event::Dropped(&error)),
                        (None, Err(error)) if !is_farewell(error) => log(Event::Dropped(error)),
                        (None, _) => {}
                    }
                    if self.limits.once && left == 0 && served.load(Ordering::SeqCst) {
                        stop.stop();
                    }
                };
                let thread = std::thread::Builder::new().name("nbd-client".into()).stack_size(STACK_BYTES);
                if thread.spawn_scoped(scope, client).is_err() {
                    log(Event::Refused);
                }
            }
        })
    }
}

/// `Ok(None)`: nobody there any more, or no descriptor is free now.
fn accept(listener: &UnixListener) -> Result<Option<UnixStream>, ServerError> {
    use nix::libc::{ECONNABORTED, EINTR, EMFILE, ENFILE, ENOMEM};
    match listener.accept() {
        Ok((stream, _)) => Ok(Some(stream)),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(e) if matches!(e.raw_os_error(), Some(EINTR | ECONNABORTED)) => Ok(None),
        Err(e) if matches!(e.raw_os_error(), Some(EMFILE | ENFILE | ENOMEM)) => {
            // The connection stays in the backlog; looking again at once would only burn time.
            std::thread::sleep(std::time::Duration::from_millis(20));
            Ok(None)
        }
        Err(e) => Err(ServerError::Accept(e)),
    }
}
