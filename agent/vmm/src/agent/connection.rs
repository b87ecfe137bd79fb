//! Control connections: one thread each, few of them, each worth exactly what its peer is.
//!
//! A thread waits for its peer or for an event to tell it, without limit; once a frame has begun the peer has
//! [`FRAME_WAIT`] for the rest, and as long to take an answer. Past it, or on anything that is no frame, the connection
//! is closed and the reason logged.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serio_control::message::{Body, VmState};
use serio_control::{Channel, ChannelError};
use serio_sandbox::{Kind, threads};

use super::requests;
use super::state::{Bell, State, bell};
use crate::end::chain;

/// How long a peer may take for one frame.
const FRAME_WAIT: Duration = Duration::from_secs(5);
/// Connections at once; `seriod` needs one, a restarted one a second while the first is noticed to be gone.
const CONNECTIONS_MAX: usize = 8;
/// Frames of 256 KiB are on the heap; the stack only holds the descriptors' buffer.
const STACK_BYTES: usize = 256 * 1024;

/// All connections.
pub(super) struct Connections {
    state: Arc<State>,
    open: Arc<Open>,
}

#[derive(Default)]
struct Open {
    count: Mutex<usize>,
    fewer: Condvar,
}

/// One more, as long as it lives.
struct Counted(Arc<Open>);

impl Counted {
    fn new(open: &Arc<Open>) -> Option<Counted> {
        let mut count = open.count.lock().unwrap_or_else(PoisonError::into_inner);
        if *count >= CONNECTIONS_MAX {
            return None;
        }
        *count = count.saturating_add(1);
        Some(Counted(open.clone()))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut count = self.0.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count = count.saturating_sub(1);
        self.0.fewer.notify_all();
    }
}

impl Connections {
    pub(super) fn new(state: Arc<State>) -> Connections {
        Connections { state, open: Arc::default() }
    }

    /// Takes in whoever waits at the door.
    pub(super) fn accept(&self, listener: &UnixListener) {
        loop {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    // The peer was gone before we came, or we have no descriptor left: it may try again.
                    super::say(format_args!("a control connection was not accepted: {error}"));
                    return;
                }
            };
            let Some(counted) = Counted::new(&self.open) else {
                super::say(format_args!(
                    "a control connection was refused: {CONNECTIONS_MAX} are open already"
                ));
                continue;
            };
            let state = self.state.clone();
            let spawned = stream.set_nonblocking(false).and_then(|()| {
                threads::spawn(Kind::Control, "control", STACK_BYTES, move || {
                    let _counted = counted;
                    if let Err(error) = serve(Channel::new(stream), &state) {
                        super::say(format_args!("a control connection was closed: {}", chain(&error)));
                    }
                })
            });
            if let Err(error) = spawned {
                super::say(format_args!("a control connection got no thread: {error}"));
            }
        }
    }

    /// Waits until all have said their last word, or `limit` has passed.
    pub(super) fn wait_all(&self, limit: Duration) {
        let count = self.open.count.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self.open.fewer.wait_timeout_while(count, limit, |count| *count > 0);
    }
}

/// Serves one peer until it goes, errs, or the VM is over.
fn serve(mut channel: Channel, state: &Arc<State>) -> Result<(), ChannelError> {
    let io = |doing| move |source| ChannelError::Io { doing, source };
    channel.set_timeout(Some(FRAME_WAIT)).map_err(io("setting its timeouts"))?;
    let bell: Bell = Arc::new(bell().map_err(io("making an eventfd"))?);
    state.subscribe(&bell);
    if state.is_over() {
        // It ended before this peer could be told: nothing will ring any more.
        tell(&mut channel, state)?;
        return Ok(());
    }
    loop {
        let (frame_waits, event_waits) = wait(&channel, &bell).map_err(io("waiting"))?;
        if event_waits {
            let _ = bell.read();
            if tell(&mut channel, state)? {
                return Ok(());
            }
        }
        if frame_waits {
            let (frame, descriptors) = match channel.receive() {
                Err(ChannelError::Closed) => return Ok(()),
                other => other?,
            };
            let answer = requests::answer(state, frame.body, descriptors);
            channel.send(frame.id, answer, &[])?;
        }
    }
}

/// Sends the news; `true`: they were the last.
fn tell(channel: &mut Channel, state: &State) -> Result<bool, ChannelError> {
    let status = state.status();
    let over = status.state == i32::from(VmState::Ended);
    channel.send(0, Body::VmChanged(status), &[])?;
    Ok(over)
}

/// Whether the peer, and whether the bell has something.
fn wait(channel: &Channel, bell: &Bell) -> io::Result<(bool, bool)> {
    loop {
        let mut fds =
            [PollFd::new(channel.as_fd(), PollFlags::POLLIN), PollFd::new(bell.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => {
                let [peer, bell] = fds.map(|fd| fd.any().unwrap_or(false));
                return Ok((peer, bell));
            }
        }
    }
}
