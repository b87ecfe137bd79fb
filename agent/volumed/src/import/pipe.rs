//! A stream that can be left: a read waits for bytes, or for the wish to stop.
//!
//! Signals are blocked in every thread (see [`Wish::listen`]), so none of them would end a read of a pipe that is silent: it is
//! looked at whether there is something first, and now and then whether anybody wants to wait any longer. The descriptor is read
//! without a buffer, which poll would not see.

use std::{
    io::{self, Read},
    os::fd::AsFd,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::bar::Wish;

/// Between two looks at the wish, milliseconds.
const LOOK_MS: u8 = 100;

/// See the head of this file.
#[derive(Debug)]
pub(super) struct Pipe<F> {
    from: F,
    wish: Wish,
}

impl<F: AsFd> Pipe<F> {
    /// Reads from `from` until the wish.
    pub(super) fn new(from: F, wish: Wish) -> Pipe<F> {
        Pipe { from, wish }
    }
}

impl<F: AsFd> Read for Pipe<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.wish.stops() {
                return Err(io::Error::other("interrupted"));
            }
            let mut fds = [PollFd::new(self.from.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::from(LOOK_MS)) {
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                // Bytes, the end, or an error: the read says which.
                Ok(_) => return Ok(rustix::io::read(&self.from, buffer)?),
                Err(e) => return Err(e.into()),
            }
        }
    }
}
