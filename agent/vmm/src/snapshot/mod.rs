//! A whole VM in two files, and back.
//!
//! - `state`: all but memory, in sections with checksums ([`format`]). Small: 12 KiB a vcpu, about 1 KiB a device.
//! - `memory`: RAM at the offsets that it has in the VM's own memory file (0 to 3 GiB, then what lies above the PCI hole);
//!   pages of zeros are holes ([`memory`]).
//!
//! A VM is restored by mapping `memory` privately: it runs before its memory is read, and any number of VMs can run from one
//! snapshot, each of which keeps for itself what it writes. So the file must stay as it is while one of them runs.
//!
//! **Damage.** The state has a checksum for each section, and for each 2 MiB of the memory ([`Sums`]). By default all of the memory
//! that is no hole is read once and compared before the guest runs: a byte that has changed on the disk is never executed. That
//! costs the time of reading it. Who cannot wait asks for the check to run beside the guest: it then starts at once, and is ended as
//! soon as damage is found, with the place as the reason; what it did until then it may have done with damaged memory. Snapshots
//! of older programs have no sums, and are not checked.
//!
//! The two belong together: who keeps them keeps them together. Nothing in them is trusted: a damaged or forged state is refused, or makes a VM that breaks itself and nothing else.

mod format;
mod memory;
mod sums;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use serio_hv::GuestMemory;

use crate::machine::MachineState;
pub use format::FormatError;
pub use sums::{CheckError, Sums};

/// Why a snapshot was not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The memory.
    #[error("cannot write the memory of the VM: is the file system full?")]
    Memory(#[source] io::Error),
    /// The state.
    #[error("cannot write the state of the VM: is the file system full?")]
    State(#[source] io::Error),
}

/// Why a snapshot cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A file cannot be read.
    #[error("cannot read the saved state")]
    Io(#[source] io::Error),
    /// The state is none.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The memory cannot be mapped, or is too short.
    #[error("cannot use the saved memory")]
    Memory(#[from] serio_hv::MemoryError),
    /// It is not what was saved.
    #[error(transparent)]
    Check(#[from] CheckError),
}

/// What was read.
#[derive(Debug)]
pub struct Snapshot {
    /// Bytes of RAM.
    pub memory_bytes: u64,
    /// All but memory.
    pub machine: MachineState,
    /// Of the memory; `None`: an older program saved it.
    pub sums: Option<Sums>,
}

/// Writes both files, from their beginning; returns the bytes of memory that are no hole. Does not sync them.
pub fn write(
    memory: &GuestMemory,
    machine: &MachineState,
    (state_file, memory_file): (&File, &File),
) -> Result<u64, WriteError> {
    let (written, sums) = memory::write(memory, memory_file).map_err(WriteError::Memory)?;
    let bytes = format::encode(memory::len(memory), Some(&sums), machine);
    memory::replace(state_file, &bytes).map_err(WriteError::State)?;
    Ok(written)
}

/// Makes what [`write`] has written last: the memory first, since the state says that it is there.
pub fn sync((state_file, memory_file): (&File, &File)) -> Result<(), WriteError> {
    memory_file.sync_data().map_err(WriteError::Memory)?;
    state_file.sync_data().map_err(WriteError::State)
}

/// Reads and checks a state.
pub fn read(file: &File) -> Result<Snapshot, ReadError> {
    let bytes = memory::read_bounded(file, format::BYTES_MAX).map_err(ReadError::Io)?;
    Ok(decode(&bytes)?)
}

/// The same of a state that is in memory.
pub fn decode(bytes: &[u8]) -> Result<Snapshot, FormatError> {
    let (memory_bytes, sums, machine) = format::decode(bytes)?;
    Ok(Snapshot { memory_bytes, machine, sums })
}

impl Snapshot {
    /// The memory, as it was, to be written to by this VM only.
    pub fn open_memory(&self, file: OwnedFd) -> Result<GuestMemory, ReadError> {
        Ok(serio_hv::open_private_memory(file, self.memory_bytes)?)
    }
}

#[cfg(test)]
mod snapshot_test;
