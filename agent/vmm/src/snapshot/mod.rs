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
//! **Diffs.** A snapshot that follows another one of the same VM may hold only the pages that changed since ([`PageSet`]), and names
//! that one, its base: by an id that whoever keeps them has given, and by a checksum. It is opened together with
//! all that it goes on from, down to one that is whole ([`chain`]). Pages that are dropped, or zero now, are in the list and a hole
//! in the file. What lies in its file outside of the list is nobody's: so pages of the base may be copied there, while VMs run from
//! it, before it is made whole.
//!
//! The two belong together: who keeps them keeps them together. Nothing in them is trusted: a damaged or forged state is refused, or makes a VM that breaks itself and nothing else.

pub mod chain;
mod format;
mod memory;
mod pages;
mod sums;

use std::fmt;
use std::fs::File;
use std::io;

use serio_hv::GuestMemory;

use crate::machine::MachineState;
pub use chain::ChainError;
pub use format::FormatError;
pub use pages::PageSet;
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
    /// They do not belong together.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// It is not what was saved.
    #[error(transparent)]
    Check(#[from] CheckError),
}

/// How another snapshot names this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Whoever keeps it has given it this.
    pub id: [u8; 16],
    /// CRC-32C of all of the state that is the machine's: it stays when a diff is made whole.
    pub crc: u32,
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.id.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        write!(f, " (checksum {:08x})", self.crc)
    }
}

/// What a snapshot is besides the machine and its memory.
#[derive(Debug, Clone, Copy, Default)]
pub struct Point<'a> {
    /// Its id, if others shall go on from it.
    pub id: Option<[u8; 16]>,
    /// Only these pages, which have changed since that one.
    pub since: Option<(Link, &'a PageSet)>,
}

/// What [`write`] has written.
#[derive(Debug, Clone, Copy)]
pub struct Written {
    /// Bytes of memory that are no hole.
    pub memory_bytes: u64,
    /// How others name it, if it has an id.
    pub link: Option<Link>,
}

/// What was read.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// Bytes of RAM.
    pub memory_bytes: u64,
    /// All but memory.
    pub machine: MachineState,
    /// Of the memory, of a diff of its pages; `None`: an older program saved it.
    pub sums: Option<Sums>,
    /// How others name it; `None`: none goes on from it.
    pub link: Option<Link>,
    /// Of a diff: what it goes on from, and the pages that it holds.
    pub base: Option<(Link, PageSet)>,
}

/// Writes both files, from their beginning. Does not sync them.
pub fn write(
    memory: &GuestMemory,
    machine: MachineState,
    point: Point<'_>,
    (state_file, memory_file): (&File, &File),
) -> Result<Written, WriteError> {
    let pages = point.since.map(|(_, pages)| pages);
    let (memory_bytes, sums) = memory::write(memory, pages, memory_file).map_err(WriteError::Memory)?;
    let snapshot = Snapshot {
        memory_bytes: memory::len(memory),
        machine,
        sums: Some(sums),
        link: point.id.map(|id| Link { id, crc: 0 }),
        base: point.since.map(|(link, pages)| (link, pages.clone())),
    };
    let (bytes, crc) = format::encode(&snapshot);
    memory::replace(state_file, &bytes).map_err(WriteError::State)?;
    Ok(Written { memory_bytes, link: point.id.map(|id| Link { id, crc }) })
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
    format::decode(bytes)
}

#[cfg(test)]
mod chain_test;
#[cfg(test)]
mod snapshot_test;
