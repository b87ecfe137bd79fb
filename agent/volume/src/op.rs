//! What can be asked of a volume, and the answer when there is no room to ask.

use crate::uring::Buffers;

/// One operation. It owns its memory until [`crate::IoQueue::reap`] gives it back.
#[derive(Debug)]
pub enum Op {
    /// Reads `buffers.len()` bytes from `offset`.
    Read {
        /// First byte of the volume.
        offset: u64,
        /// Where the bytes go.
        buffers: Buffers,
    },
    /// Writes `buffers.len()` bytes at `offset`.
    Write {
        /// First byte of the volume.
        offset: u64,
        /// What is written.
        buffers: Buffers,
        /// Durable before it is answered (forced unit access).
        fua: bool,
    },
    /// Makes every write that was answered before this was submitted durable.
    Flush,
    /// The range is no longer needed: whole blocks in it read as zeros afterwards or as they were, and free space.
    Discard {
        /// First byte of the volume.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The range reads as zeros afterwards.
    WriteZeroes {
        /// First byte of the volume.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Space may be freed.
        unmap: bool,
    },
}

/// The queue has `depth` operations under way: reap some, then submit this one again.
#[derive(Debug)]
pub struct Full(pub Op);
