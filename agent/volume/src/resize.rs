//! Growing a volume, also while it is used.
//!
//! ```text
//! data file   │■■■■■■│··········│   1  longer, and zeros behind the old end; synced
//! map file    │header│bits│·····│   2  room for the new blocks, all absent; synced
//! header of the head: size        3  the other slot, synced                     ◄── the commit point
//! stack in memory, gate opened    4
//! ```
//!
//! Only the head grows. The sealed layers keep their sizes: they answer zeros for what lies behind their ends. A crash before
//! 3 leaves files that are longer than the header asks for, of which nobody reads more than before. A volume never shrinks:
//! what a guest has there would be lost, and the layers below would have to be cut with it.

use std::{io, sync::Arc};

use crate::{
    error::ResizeError,
    header::{BLOCK_BYTES, Header, SIZE_BYTES_MAX},
    layer::Layer,
    shared::lock,
    snapshot::DRAIN_LIMIT,
    stack::Stack,
    volume::Volume,
};

fn io_error(what: &'static str) -> impl Fn(io::Error) -> ResizeError {
    move |source| ResizeError::Io { what, source }
}

impl Volume {
    /// Grows the volume to `size_bytes`, durably; all its queues take the new size at once. What is new reads as zeros.
    /// The size that it has already is no error.
    ///
    /// Waits for I/O under way in every queue, so it must not be called by a thread that has to reap one.
    pub fn resize(&self, size_bytes: u64) -> Result<(), ResizeError> {
        let old = self.checked_for(size_bytes)?;
        if size_bytes == old.size_bytes {
            return Ok(());
        }
        let closed = self.core.close(DRAIN_LIMIT).ok_or(ResizeError::NotDrained)?;
        // With the gate closed nobody else changes the stack; before that somebody may have.
        let old = self.checked_for(size_bytes)?;
        let header = Header { size_bytes, ..old.clone() };
        let _no_commit = lock(&self.core.commit);
        let stack = self.core.stack();
        let head = stack.head();
        let Some(map_file) = &head.map_file else { return Err(ResizeError::Raw) };
        // Whatever lies behind the end until now must not appear.
        head.data.set_len(old.size_bytes).map_err(io_error("cut the data file to its size"))?;
        head.data.set_len(size_bytes).map_err(io_error("make the data file longer"))?;
        head.data.sync_data().map_err(io_error("sync the data file"))?;
        map_file.set_len(header.map_file_bytes()).map_err(io_error("make the map file longer"))?;
        map_file.sync_data().map_err(io_error("sync the map file"))?;
        if let Err(e) = head.update_header(|h| h.size_bytes = size_bytes) {
            // Whether it is on disk is unknown: only a reopening tells.
            self.core.poison();
            return Err(io_error("write the new size")(e));
        }
        let Some(header) = head.header() else { return Err(ResizeError::Raw) };
        let map = head.map.as_ref().map(|map| map.grown(header.blocks()));
        let mut layers = stack.layers.clone();
        layers.pop();
        let grown = Layer::new(head.data.clone(), map_file.clone(), header, map, head.cipher.clone());
        self.hand_over(head, &grown);
        layers.push(Arc::new(grown));
        closed.replace_stack(Stack { layers });
        Ok(())
    }

    /// The head's header, if it may grow to `size_bytes`.
    fn checked_for(&self, size_bytes: u64) -> Result<Header, ResizeError> {
        if self.core.read_only {
            return Err(ResizeError::ReadOnly);
        }
        if self.core.is_poisoned() {
            return Err(ResizeError::Poisoned);
        }
        let header = self.head_header().ok_or(ResizeError::Raw)?;
        if size_bytes < header.size_bytes {
            return Err(ResizeError::Shrink { from: header.size_bytes, to: size_bytes });
        }
        if size_bytes > SIZE_BYTES_MAX {
            return Err(ResizeError::TooLarge(size_bytes));
        }
        if header.key.is_some() && !size_bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(ResizeError::Unaligned(size_bytes));
        }
        Ok(header)
    }
}
