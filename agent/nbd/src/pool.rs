//! Payload memory that is used again: by size class, bounded.

use crate::{
    backend::{Payload, Queue},
    connection::HELD_BYTES_MAX,
};

/// Memory that idle payloads may hold, bytes, for one connection: what was used at once is used again.
const IDLE_BYTES_MAX: usize = HELD_BYTES_MAX;
/// Classes are powers of two from 4 KiB.
const CLASSES: usize = 14;

/// See the head of this file.
pub(crate) struct Pool<P> {
    classes: [Vec<P>; CLASSES],
    idle_bytes: usize,
}

impl<P: Payload> Pool<P> {
    pub(crate) fn new() -> Pool<P> {
        Pool { classes: std::array::from_fn(|_| Vec::new()), idle_bytes: 0 }
    }

    fn class(len: usize) -> usize {
        (len.next_power_of_two().trailing_zeros().saturating_sub(12) as usize).min(CLASSES - 1)
    }

    fn class_bytes(class: usize) -> usize {
        4096 << class
    }

    /// A payload of `len` bytes.
    pub(crate) fn take<Q: Queue<Payload = P>>(&mut self, queue: &mut Q, len: usize) -> P {
        let class = Pool::<P>::class(len);
        let mut payload = match self.classes[class].pop() {
            Some(payload) => {
                self.idle_bytes -= Pool::<P>::class_bytes(class);
                payload
            }
            // Of the class's size, so that it fits the next one too.
            None => queue.payload(Pool::<P>::class_bytes(class).max(len)),
        };
        payload.resize(len);
        payload
    }

    /// Keeps a payload for later, or frees it.
    pub(crate) fn give(&mut self, payload: P, len: usize) {
        let class = Pool::<P>::class(len);
        let bytes = Pool::<P>::class_bytes(class);
        if self.idle_bytes + bytes <= IDLE_BYTES_MAX {
            self.idle_bytes += bytes;
            self.classes[class].push(payload);
        }
    }
}
