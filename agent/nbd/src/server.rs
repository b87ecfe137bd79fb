//! Accepts clients on a Unix socket: one thread each, at most so many, all ended by one event.

use std::{
    fmt, io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use crate::{backend::Backend, connection, greet::ConnectionError};

/// Bounds of a server.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Clients at once; more are closed at once.
    pub clients_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        // Each may hold some 8 MiB of payloads, or one of 32 MiB.
        Limits { clients_max: 16 }
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
    /// A client came; how many there are now.
    Connected(usize),
    /// A client was turned away since there are too many.
    Refused,
    /// A client left, or was dropped for a reason; how many are left.
    Ended(usize, Option<&'a ConnectionError>),
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

    /// Serves until `stop`; returns when the last connection has ended.
    pub fn run(
        &self,
        listener: &UnixListener,
        stop: &Stop,
        log: &(dyn Fn(Event<'_>) + Sync),
    ) -> Result<(), ServerError> {
        listener.set_nonblocking(true).map_err(ServerError::Accept)?;
        let clients = AtomicUsize::new(0);
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
                let Some(stream) = accept(listener)? else { continue };
                if clients.load(Ordering::SeqCst) >= self.limits.clients_max {
                    log(Event::Refused);
                    continue;
                }
                let now = clients.fetch_add(1, Ordering::SeqCst) + 1;
                log(Event::Connected(now));
                let clients = &clients;
                let spawned =
                    std::thread::Builder::new().name("nbd-client".into()).spawn_scoped(scope, move || {
                        let result = connection::serve(&stream, &self.backends, stop.event_fd());
                        drop(stream);
                        let left = clients.fetch_sub(1, Ordering::SeqCst) - 1;
                        log(Event::Ended(left, result.as_ref().err()));
                    });
                if spawned.is_err() {
                    // No thread for it: as if there were too many clients.
                    clients.fetch_sub(1, Ordering::SeqCst);
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
