//! Heads past the page cache (O_DIRECT): for who asks for it.
//!
//! ```text
//! head          direct     its guest has a cache of its own; what it writes goes to the disk once, without a copy here
//! sealed, image buffered   many volumes read them, and share them in the page cache
//! ```
//!
//! The flag lies in the one descriptor of the data file that the engine has, so a head is direct for everybody here or for nobody.
//! - **Place and memory** of a direct primitive are multiples of a sector, 512 bytes; `Layer::go_direct` tries out by a read whether
//!   the file system is content with that. What is not aligned goes through a piece of the driver's memory (`uring/crypt.rs`).
//! - **Parts of sectors** are completed and claimed like those of an encrypted head (`plan.rs`, `shared.rs`): two writes into one
//!   sector are never under way together, and nothing is ever written through the page cache beside a direct write.
//! - **Only a head above others** is direct. A bottom is written in place, without claims. A size that is not of whole blocks ends
//!   in a part of a sector, which cannot be written so. Both stay buffered, and a head that becomes either goes back.
//! - The change itself happens with nothing under way: behind the gate, before a queue sees the layer.
//!
//! Sealed processes must be allowed `fcntl` with `F_GETFL` and `F_SETFL` for this, and only then are they called.

use std::sync::atomic::Ordering;

use crate::{header::BLOCK_BYTES, layer::Layer, snapshot::DRAIN_LIMIT, stack::Stack, volume::Volume};

/// Why a head stays in the page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotDirect {
    /// The volume is only read.
    #[error("the volume is only read")]
    ReadOnly,
    /// Nothing is below it.
    #[error("its head is its only layer: the one after its first snapshot can")]
    Bottom,
    /// Its last block is cut.
    #[error("its size is not a multiple of 4 KiB")]
    Size,
    /// No O_DIRECT, or only for larger steps.
    #[error("its file system has no O_DIRECT in steps of 512 bytes")]
    FileSystem,
    /// I/O under way did not end.
    #[error("I/O under way did not end")]
    Busy,
}

impl Volume {
    /// Lets the head, and those after it, go past the page cache where they can; whether this one does now, or why not. Of a
    /// volume that is only read nothing changes.
    ///
    /// Waits for I/O under way in every queue, so it must not be called by a thread that has to reap one.
    pub fn go_direct(&self) -> Result<(), NotDirect> {
        if self.core.read_only {
            return Err(NotDirect::ReadOnly);
        }
        let Some(closed) = self.core.close(DRAIN_LIMIT) else { return Err(NotDirect::Busy) };
        self.core.direct.store(true, Ordering::SeqCst);
        let stack = self.core.stack();
        stack.head().go_direct();
        // The same layers; but the queues must look at them anew.
        closed.replace_stack(Stack { layers: stack.layers.clone() });
        let head = stack.head();
        match () {
            () if head.is_direct() => Ok(()),
            () if head.map.is_none() => Err(NotDirect::Bottom),
            () if !head.size_bytes.is_multiple_of(BLOCK_BYTES) => Err(NotDirect::Size),
            () => Err(NotDirect::FileSystem),
        }
    }

    /// One head follows another, or a grown one the one that it was, which may have the same file. Behind the gate.
    pub(crate) fn hand_over(&self, from: &Layer, to: &Layer) {
        from.end_direct();
        if self.core.direct.load(Ordering::SeqCst) {
            to.go_direct();
        }
    }
}
