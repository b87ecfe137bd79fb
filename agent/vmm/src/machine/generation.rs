//! The generation identifier (VMGenID): sixteen random bytes in a page of their own, which change whenever the guest goes on
//! from a moment that another VM may go on from too: a snapshot's clones, a restore.
//!
//! A new machine gets a new one before it boots. Whoever restores one writes another with [`place`] before the vcpus run and
//! then raises the event with [`super::Handle::generation_changed`]: the guest mixes the bytes into its random numbers.

use rustix::rand::{GetRandomFlags, getrandom};
use serio_hv::GuestMemory;
use serio_hv::vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::layout;

/// Why a generation identifier could not be set.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// The host's kernel has no randomness.
    #[error("the host gives no random numbers")]
    Random(#[source] std::io::Error),
    /// Its page is no memory.
    #[error("the page of the generation identifier is no memory")]
    Write(#[source] GuestMemoryError),
}

/// Writes a new identifier; returns it.
pub fn place(memory: &GuestMemory) -> Result<[u8; 16], GenerationError> {
    let mut id = [0; 16];
    // Sixteen bytes are never given in part. The system call itself: nothing is opened, as a sealed process must not.
    getrandom(&mut id, GetRandomFlags::empty()).map_err(|error| GenerationError::Random(error.into()))?;
    memory.write_slice(&id, GuestAddress(layout::GENERATION_ID)).map_err(GenerationError::Write)?;
    Ok(id)
}
