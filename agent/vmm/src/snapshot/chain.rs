//! A memory from a full snapshot and the diffs that follow it.
//!
//! ```text
//!   newest   ··██····█··········     each page from the newest that holds it:
//!   diff     █·····█·█··██······     long runs are mapped over the full one, short runs are copied
//!   full     ████████████████████    into it before the VM runs
//! ```
//!
//! A diff names the snapshot that it goes on from by its id and by the checksum of its machine: another one is refused. So is
//! a chain with too many links, a link of another size, and one that ends in a diff.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use serio_hv::vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};
use serio_hv::{GuestMemory, lay_over};

use super::memory::PAGE;
use super::{Link, PageSet, ReadError, Snapshot};

/// More links than any node makes.
pub const LINKS_MAX: usize = 32;
/// Shorter runs are copied: reading 64 KiB costs less than a mapping does.
const MAPPED_PAGES_MIN: u64 = 16;
/// The kernel grants a process 65,530 by default, each cut of a long one costs two, and the devices want some.
const MAPPED_MAX: u32 = 16_384;

/// Snapshots that do not belong together.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// The last one is a diff.
    #[error("the snapshot holds only what changed since snapshot {base}, which was not given: it is missing")]
    Missing {
        /// What the last one names.
        base: Link,
    },
    /// One names another than the next.
    #[error(
        "the snapshot goes on from snapshot {base}, but {found} was given in its place: it is another one"
    )]
    Other {
        /// What it names.
        base: Link,
        /// What was given.
        found: String,
    },
    /// Something follows a full one.
    #[error("a snapshot was given to go on from, but this one is whole")]
    Whole,
    /// More than [`LINKS_MAX`].
    #[error("{0} snapshots that go on from each other: at most {LINKS_MAX} are read")]
    Long(usize),
    /// Another memory.
    #[error("the snapshot has {bytes} bytes of memory, the one that it goes on from {base_bytes}")]
    Size {
        /// Of the diff.
        bytes: u64,
        /// Of the other.
        base_bytes: u64,
    },
}

/// A snapshot and its memory's file; the newest first.
pub type Layer = (Snapshot, File);

/// Opens the memory of the first, to be written to by this VM only. Checks that all belong together, not what the files hold:
/// that do [`Snapshot::sums`].
pub fn open(layers: &[Layer]) -> Result<GuestMemory, ReadError> {
    let bytes = check(layers)?;
    let Some((full, newer)) = layers.split_last() else { return Err(ChainError::Long(0).into()) };
    let memory = serio_hv::open_private_memory(full.1.try_clone().map_err(ReadError::Io)?.into(), bytes)?;
    let mut covered = PageSet::none(bytes);
    let mut mapped = 0;
    for (snapshot, file) in newer {
        let Some((_, pages)) = &snapshot.base else { continue };
        let mut own = pages.clone();
        own.remove(&covered);
        for run in own.runs() {
            place(&memory, file, &run, &mut mapped).map_err(ReadError::Io)?;
        }
        covered.add(pages);
    }
    Ok(memory)
}

fn check(layers: &[Layer]) -> Result<u64, ChainError> {
    if layers.len() > LINKS_MAX {
        return Err(ChainError::Long(layers.len()));
    }
    let mut layers = layers.iter().map(|(snapshot, _)| snapshot);
    let mut snapshot = layers.next().ok_or(ChainError::Long(0))?;
    for next in layers {
        let (base, _) = snapshot.base.as_ref().ok_or(ChainError::Whole)?;
        if next.link.as_ref() != Some(base) {
            let found = next.link.map_or_else(|| "one without a name".to_owned(), |link| link.to_string());
            return Err(ChainError::Other { base: *base, found });
        }
        if next.memory_bytes != snapshot.memory_bytes {
            return Err(ChainError::Size { bytes: snapshot.memory_bytes, base_bytes: next.memory_bytes });
        }
        snapshot = next;
    }
    match &snapshot.base {
        Some((base, _)) => Err(ChainError::Missing { base: *base }),
        None => Ok(snapshot.memory_bytes),
    }
}

/// Puts a run of pages in its place.
fn place(memory: &GuestMemory, file: &File, run: &Range<u64>, mapped: &mut u32) -> io::Result<()> {
    let (from, to) = (run.start.saturating_mul(PAGE as u64), run.end.saturating_mul(PAGE as u64));
    let len = to.saturating_sub(from);
    if run.end.saturating_sub(run.start) >= MAPPED_PAGES_MIN && *mapped < MAPPED_MAX {
        *mapped = mapped.saturating_add(1);
        return lay_over(memory, file, from, len);
    }
    let mut bytes = [0; PAGE];
    for at in (from..to).step_by(PAGE) {
        file.read_exact_at(&mut bytes, at)?;
        let address = address(memory, at).ok_or(io::ErrorKind::InvalidData)?;
        memory.write_slice(&bytes, address).map_err(io::Error::other)?;
    }
    Ok(())
}

/// Where the guest finds what lies at `offset` of the memory's file.
fn address(memory: &GuestMemory, offset: u64) -> Option<GuestAddress> {
    let mut left = offset;
    for region in memory.iter() {
        match left.checked_sub(region.len()) {
            Some(rest) => left = rest,
            None => return region.start_addr().0.checked_add(left).map(GuestAddress),
        }
    }
    None
}
