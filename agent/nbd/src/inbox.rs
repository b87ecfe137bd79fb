//! Bytes from the socket that are not yet understood: one buffer, made once.

use std::{
    io::{self, IoSliceMut, Read},
    os::unix::net::UnixStream,
};

use crate::greet::would_block;

/// Enough for two thousand requests at once.
const BYTES: usize = 64 << 10;

/// What a read brought.
pub(crate) enum Arrived {
    /// The client is gone.
    End,
    /// Nothing yet.
    Nothing,
    /// Bytes, of which so many went where `into` of [`Inbox::read`] points.
    Bytes(usize),
}

/// See the head of this file.
pub(crate) struct Inbox {
    // Invariant: at <= end <= bytes.len(); the length never changes, so nothing is cleared twice.
    bytes: Vec<u8>,
    at: usize,
    end: usize,
}

impl Inbox {
    /// Starts with what came after the handshake.
    pub(crate) fn new(mut early: Vec<u8>) -> Inbox {
        let end = early.len();
        early.resize(BYTES.max(end), 0);
        Inbox { bytes: early, at: 0, end }
    }

    /// What is there.
    pub(crate) fn rest(&self) -> &[u8] {
        self.bytes.get(self.at..self.end).unwrap_or_default()
    }

    /// Forgets the first `n` bytes.
    pub(crate) fn consume(&mut self, n: usize) {
        self.at = self.at.saturating_add(n).min(self.end);
    }

    /// Reads once: first into `into`, then here.
    pub(crate) fn read(&mut self, mut stream: &UnixStream, into: &mut [u8]) -> io::Result<Arrived> {
        self.bytes.copy_within(self.at..self.end, 0);
        self.end -= self.at;
        self.at = 0;
        let tail = self.bytes.get_mut(self.end..).unwrap_or_default();
        let result = match into.is_empty() {
            true => stream.read(tail),
            false => stream.read_vectored(&mut [IoSliceMut::new(into), IoSliceMut::new(tail)]),
        };
        match result {
            Ok(0) => Ok(Arrived::End),
            Ok(n) => {
                self.end += n.saturating_sub(into.len());
                Ok(Arrived::Bytes(n.min(into.len())))
            }
            Err(e) if would_block(&e) => Ok(Arrived::Nothing),
            Err(e) => Err(e),
        }
    }
}
