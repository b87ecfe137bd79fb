//! Giving back what a snapshot holds and nobody else reads: TRIM on an export of the point. A released block reads as zeros
//! in that snapshot; its space is freed if it lies in the snapshot's own layer.
//!
//! ```text
//!   layer j   sealed or head   │ data ■ │ absent │ zero 0 │     only blocks that j has are released: everything above
//!   layer k   snapshot "S"     │ data ■ │ data ■ │ absent │     S reads them from j or higher, and goes on doing so
//!   after a release of S       │ zero 0 │ data ■ │ zero 0 │
//! ```
//! A TRIM of other blocks, and of parts of blocks, does nothing: the head would lose what it reads.
//!
//! **Nobody is harmed.** A block that j has never becomes absent in j again; and a rollback, which replaces j, writes k's
//! header under k's map lock, as we read it. So a view of a later point that was opened before, with its older maps in
//! memory, found the block above k already then: points are constant, so it was there when the view was opened, or the view
//! is the head's own writer, which has set its bits before they reach the file. Views of S itself that were opened before
//! may read either bytes for what is released.
//!
//! **Order of syncs**, under k's map lock:
//! ```text
//! 1  bits of j read, then j's map synced: they may be a head's, not yet durable. Its data were synced before they were written
//! 2  k's sums of these chunks forgotten, synced; k's map says zero, synced                  (`sealed.rs`)
//! 3  k's data file has one name: holes punched. More: clones read from it, so the space stays theirs
//! ```
//! A crash before 2 is done leaves old or zero for each block; before 3, space that a TRIM again frees. A clone that links
//! the file after the look in 3 copies the map after that, and so has zero too. At the bottom, whose bits are not asked,
//! 2 only forgets the sums, and a block whose hole cannot be made stays as it was.

use std::{io, sync::Mutex};

use nix::fcntl::FallocateFlags;

use crate::{
    chain::{stands_on, walk},
    error::{IoError, OpenError},
    header::{BLOCK_BYTES, Header, HeaderState},
    layer,
    map::State,
    media::Media,
    plan::Range,
    sealed::{MapLock, edit_locked},
    shared::{Claim, lock},
    sums::{Bits, CHUNK_BLOCKS, PAGE_COVERS, Region},
    volume::{Access, Volume, VolumeFiles},
};

/// Blocks that a page of a map speaks of.
const PAGE_BLOCKS: u64 = PAGE_COVERS / BLOCK_BYTES;
/// Pages of a map that are changed together: 1 GiB of the volume.
const PAGES_MAX: u64 = 16;

/// A snapshot that may be released from. Clones share one.
pub struct Release {
    files: Vec<(Media, Media)>,
    /// Position of the snapshot's layer in `files`, and its number.
    at: usize,
    layer: u64,
    name: String,
    /// One at a time in this process: the map's lock is the open file's, which all share.
    alone: Mutex<()>,
}

impl std::fmt::Debug for Release {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Release({} in layer {})", self.name, self.layer)
    }
}

impl VolumeFiles {
    /// Prepares releases of the snapshot `name`. Its layer's files are open for writing, and the files of the layer above
    /// are among these.
    pub fn release(&self, name: &str) -> Result<Release, OpenError> {
        let files =
            self.media().map_err(|source| OpenError::Io { what: "duplicate a descriptor", source })?;
        Release::new(files, name)
    }
}

impl Release {
    pub(crate) fn new(files: Vec<(Media, Media)>, name: &str) -> Result<Release, OpenError> {
        let chain = walk(&files, Access::ReadOnly, Some(name))?;
        let (at, layer) = chain.last().map(|(at, h)| (*at, h.layer)).ok_or(OpenError::Empty)?;
        Ok(Release { files, at, layer, name: name.to_owned(), alone: Mutex::new(()) })
    }

    /// Releases `[offset, offset + len)`, as far as that is possible, durably. `view` is the snapshot as the caller has it
    /// open: it reads zeros afterwards.
    pub fn release(&self, view: &Volume, offset: u64, len: u64) -> Result<(), IoError> {
        let host = |e: io::Error| IoError::host("release", &e);
        let size = view.size_bytes();
        if offset.checked_add(len).is_none_or(|end| end > size) {
            return Err(IoError::OutOfRange { offset, len, size });
        }
        let covered = Range { offset, len }.covered(size);
        let (mut first, end) = (covered.first, covered.first + covered.count);
        let _one = lock(&self.alone);
        while first < end {
            let stop = end.min((first / PAGE_BLOCKS + PAGES_MAX) * PAGE_BLOCKS);
            self.part(view, first, stop).map_err(host)?;
            first = stop;
        }
        Ok(())
    }

    /// Releases the blocks `[first, end)`.
    fn part(&self, view: &Volume, first: u64, end: u64) -> io::Result<()> {
        let Some((data, map)) = self.files.get(self.at) else { return Ok(()) };
        let held = MapLock::take(map)?;
        let gone = || io::Error::from_raw_os_error(libc::ESTALE);
        // What it is now: a merge may have taken layers away beside it.
        let header = layer::read_header(map).map_err(|_| gone())?;
        let HeaderState::Sealed { successor } = header.state else { return Err(gone()) };
        let above = self.above(&header, successor).ok_or_else(gone)?;
        let runs = shadowed(&above.0, above.1, first, end.min(header.blocks()))?;
        above.1.sync_data()?;

        let region = Region::of(&header);
        if !region.bottom {
            let mut pages: Vec<u64> = runs.iter().map(|run| run.first / PAGE_BLOCKS).collect();
            pages.dedup();
            edit_locked(&held, &header, pages, |page, bits| {
                for run in runs.iter().filter(|run| run.first / PAGE_BLOCKS == page) {
                    set_zero(bits, run.first % PAGE_BLOCKS, run.count);
                }
            })?;
        }
        if let Some(map) = view.stack().head_map() {
            runs.iter().for_each(|run| map.set(run.first, run.count, State::Zero));
        }
        // The look comes after the map: who links the file from now on finds zeros in it.
        if data.identity()?.2 > 1 {
            return Ok(());
        }
        if region.bottom {
            region.forget(map, &chunks(&runs))?;
        }
        runs.iter().try_for_each(|run| punch(data, run))
    }

    /// The layer that the snapshot's names as its successor, if it is among the files.
    fn above(&self, header: &Header, successor: u64) -> Option<(Header, &Media)> {
        self.files.iter().find_map(|(_, map)| {
            let above = layer::read_header(map).ok()?;
            let fits =
                above.layer == successor && above.volume == header.volume && stands_on(&above, header.layer);
            fits.then_some((above, map))
        })
    }
}

/// The runs of blocks of `[first, end)` that a layer has, as data or zero; none reaches over a page of its map.
fn shadowed(header: &Header, map: &Media, first: u64, end: u64) -> io::Result<Vec<Claim>> {
    let region = Region::of(header);
    let end = end.min(header.blocks());
    let mut runs: Vec<Claim> = Vec::new();
    for page in first / PAGE_BLOCKS..end.div_ceil(PAGE_BLOCKS) {
        let bits = region.bits(map, page)?;
        let start = page * PAGE_BLOCKS;
        for block in first.max(start)..end.min(start + PAGE_BLOCKS) {
            let (byte, shift) = ((block - start) / 4, (block % 4) * 2);
            if (bits[byte as usize] >> shift) & 3 == 0 {
                continue;
            }
            match runs.last_mut() {
                Some(last) if last.first + last.count == block && block > start => last.count += 1,
                _ => runs.push(Claim { first: block, count: 1 }),
            }
        }
    }
    Ok(runs)
}

/// Sets blocks of a page of bits to zero.
fn set_zero(bits: &mut Bits, first: u64, count: u64) {
    for block in first..first + count {
        let (byte, shift) = ((block / 4) as usize, (block % 4) * 2);
        bits[byte] = bits[byte] & !(3 << shift) | (2 << shift);
    }
}

/// The chunks that the runs touch, by page.
fn chunks(runs: &[Claim]) -> Vec<(u64, u128)> {
    let mut chunks: Vec<(u64, u128)> = Vec::new();
    for run in runs {
        let (page, first) = (run.first / PAGE_BLOCKS, run.first % PAGE_BLOCKS);
        let (from, to) = (first / CHUNK_BLOCKS, (first + run.count).div_ceil(CHUNK_BLOCKS));
        let mask = (from..to).fold(0, |mask, chunk| mask | (1 << chunk));
        match chunks.last_mut() {
            Some((last, masks)) if *last == page => *masks |= mask,
            _ => chunks.push((page, mask)),
        }
    }
    chunks
}

/// The last block is punched whole, too, where the file ends inside it: of a part of a block no space is given back.
fn punch(data: &Media, run: &Claim) -> io::Result<()> {
    let (start, len) = (run.first * BLOCK_BYTES, run.count * BLOCK_BYTES);
    let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match data.fallocate(mode, start, len) {
        // A file system without holes keeps the space; the map says zero all the same.
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
        other => other,
    }
}
