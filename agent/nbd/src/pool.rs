//! Payload memory that is used again: by size class, and counted, whether it is in use or lies ready.

use crate::{
    backend::{Payload, Queue},
    budget::OWN_BYTES,
};

/// Memory that idle payloads may hold, bytes, for one connection: what was used at once is used again.
const IDLE_BYTES_MAX: usize = 8 << 20;
/// Classes are powers of two from 4 KiB.
const CLASSES: usize = 14;

/// See the head of this file.
pub(crate) struct Pool<P> {
    classes: [Vec<P>; CLASSES],
    idle_bytes: usize,
    used_bytes: usize,
}

impl<P: Payload> Pool<P> {
    pub(crate) fn new() -> Pool<P> {
        Pool { classes: std::array::from_fn(|_| Vec::new()), idle_bytes: 0, used_bytes: 0 }
    }

    fn class(len: usize) -> usize {
        (len.next_power_of_two().trailing_zeros().saturating_sub(12) as usize).min(CLASSES - 1)
    }

    /// Bytes that a payload of `len` bytes takes.
    fn bytes_for(len: usize) -> usize {
        (4096 << Self::class(len)).max(len)
    }

    /// Bytes of all payloads, in use or not.
    pub(crate) fn bytes(&self) -> usize {
        self.idle_bytes + self.used_bytes
    }

    /// Bytes of the payloads that are in use.
    pub(crate) fn used_bytes(&self) -> usize {
        self.used_bytes
    }

    /// Bytes of all payloads once one of `len` bytes is taken.
    pub(crate) fn bytes_with(&self, len: usize) -> usize {
        let ready = self.classes.get(Self::class(len)).is_some_and(|ready| !ready.is_empty());
        self.bytes() + if ready { 0 } else { Self::bytes_for(len) }
    }

    /// A payload of `len` bytes.
    pub(crate) fn take<Q: Queue<Payload = P>>(&mut self, queue: &mut Q, len: usize) -> P {
        let bytes = Self::bytes_for(len);
        let mut payload = match self.classes.get_mut(Self::class(len)).and_then(Vec::pop) {
            Some(payload) => {
                self.idle_bytes -= bytes;
                payload
            }
            // Of the class's size, so that it fits the next one too.
            None => queue.payload(bytes),
        };
        self.used_bytes += bytes;
        payload.resize(len);
        payload
    }

    /// Keeps a payload of `len` bytes for later, or frees it.
    pub(crate) fn give(&mut self, payload: P, len: usize) {
        let bytes = Self::bytes_for(len);
        self.used_bytes -= bytes;
        if let Some(ready) = self.classes.get_mut(Self::class(len))
            && self.idle_bytes + bytes <= IDLE_BYTES_MAX
        {
            self.idle_bytes += bytes;
            ready.push(payload);
        }
    }

    /// Frees what lies ready; a little of it only if it is more than a connection may have anyway.
    pub(crate) fn trim(&mut self) {
        if self.bytes() > OWN_BYTES {
            self.clear();
        }
    }

    /// Frees what lies ready.
    pub(crate) fn clear(&mut self) {
        self.classes = std::array::from_fn(|_| Vec::new());
        self.idle_bytes = 0;
    }
}
