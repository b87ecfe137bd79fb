//! The scrub: reads sealed data from the disk, compares them with their checksums (`sums.rs`), adds those that are
//! missing. Runs beside whatever uses the volume, for hours: takes no lock but a map's for moments while it adds,
//! holds a page of bits, a page of sums and a chunk of data.
//!
//! ```text
//! for each sealed layer, for each 64 MiB with something in it:   S = sums page,  then M = page of bits
//!   for each chunk of 512 KiB:  sum(M, data) = S ?    yes: compared
//!                               no: S and M are read again: changed meanwhile (a merge, a release): once more;
//!                                   the same: rot
//! ```
//! Whoever changes a sealed map drops the sums first (`sealed.rs`), so a chunk that changed under our eyes shows it in
//! S; and data that a sealed map names never change. A read error is rot too, told to the block, and the scrub goes on.
//!
//! Sums are added per page, under the map's lock, if its bits still are those that were used; at the bottom, where
//! there are none, if nothing was forgotten meanwhile. When nothing is missing any more and all is synced, the region
//! is marked complete.

use std::{fs::File, io, sync::atomic::AtomicBool};

use crate::{
    chain::walk,
    chunks::{LayerWalk, PageSums, Part, Unreadable, chunk_bits, data_bytes, data_mask, mask_of, state_mask},
    error::OpenError,
    header::{BLOCK_BYTES, HeaderState, MAP_OFFSET},
    media::Media,
    reader::{Pace, Reader},
    sealed::MapLock,
    sums::{
        self, Bits, CHUNK_BITS, CHUNK_BLOCKS, CHUNK_BYTES, ChunkSum, PAGE_CHUNKS, Region, RegionHeader,
        SumsPage,
    },
    volume::{Access, VolumeFiles},
};

/// Rotten ranges that are listed; all are counted.
const ROT_MAX: usize = 1000;
/// Times that a chunk is looked at again because it changed meanwhile.
const TRIES_MAX: u32 = 5;

/// What a scrub does.
#[derive(Debug)]
pub struct ScrubOptions<'a> {
    /// Read what has a checksum, and compare.
    pub compare: bool,
    /// Compute the checksums that are missing. The map files are written.
    pub add_sums: bool,
    /// Compare from here on only: what lies before was compared, and right, by one that was interrupted.
    pub from: Option<ScrubPlace>,
    /// Bytes read a second; 0: as fast as it goes.
    pub bytes_per_s: u64,
    /// Ends it early when set; what was found and added stays.
    pub cancel: &'a AtomicBool,
}

/// A place in the order of a scrub: layers from the oldest on, each from its beginning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ScrubPlace {
    /// Number of the layer.
    pub layer: u64,
    /// Page of its map: 64 MiB of the volume.
    pub page: u64,
}

/// How far a scrub is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScrubProgress {
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
    /// All before this place has been looked at, and is right: a later scrub may go on from here and tells all that this one
    /// would have.
    pub sound: ScrubPlace,
}

/// What is wrong with a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RotKind {
    /// The data are not what was sealed.
    Data,
    /// The map, and so perhaps what is read for data, is not what was sealed.
    Map,
    /// The disk does not give the data: the errno.
    Unreadable(i32),
}

/// A range of a volume of which a layer has lost the right bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rot {
    /// Number of the layer; its data file has the range at the same offset.
    pub layer: u64,
    /// First byte, in the volume: of the first block with data in the chunk that is wrong.
    pub offset: u64,
    /// Bytes, through the last block with data in that chunk.
    pub len: u64,
    /// What is wrong.
    pub kind: RotKind,
    /// The snapshots that read some of these bytes, oldest first; the head is an empty name.
    pub points: Vec<String>,
}

/// What a scrub found and did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// At most 1,000.
    pub rot: Vec<Rot>,
    /// How many ranges in all.
    pub rot_count: u64,
    /// Bytes of data that were read and compared, right or wrong.
    pub compared_bytes: u64,
    /// Bytes of data that got their checksum now.
    pub added_bytes: u64,
    /// Bytes of sealed data that have no checksum.
    pub missing_bytes: u64,
    /// Pages of checksums that are damaged: 64 MiB of a layer each. They are computed again when sums are added.
    pub damaged_sums: u64,
    /// It was ended early.
    pub cancelled: bool,
}

impl VolumeFiles {
    /// Scrubs the sealed layers, which may be in use. `progress` is told how far it is, now and then.
    ///
    /// The data files are read past the page cache where that is possible: a flag of the open files while it runs.
    pub fn scrub(
        &self,
        options: &ScrubOptions<'_>,
        progress: impl FnMut(ScrubProgress),
    ) -> Result<ScrubReport, OpenError> {
        let clone = |file: &File| file.try_clone().map(Media::new);
        let files: io::Result<Vec<_>> =
            self.layers.iter().map(|l| Ok((clone(&l.data)?, clone(&l.map)?))).collect();
        let files = files.map_err(|source| OpenError::Io { what: "duplicate a descriptor", source })?;
        scrub_media(&files, options, progress)
    }
}

pub(crate) fn scrub_media(
    files: &[(Media, Media)],
    options: &ScrubOptions<'_>,
    progress: impl FnMut(ScrubProgress),
) -> Result<ScrubReport, OpenError> {
    let chain = chain_of(files)?;
    let mut scrub = Scrub {
        options,
        pace: Pace::new(options.bytes_per_s, options.cancel),
        report: ScrubReport::default(),
        progress,
        done: 0,
        total: 0,
        sound: options.from.unwrap_or_default(),
        comparing: false,
    };
    let sealed = || chain.iter().enumerate().filter(|(_, part)| part.header.state != HeaderState::Head);
    let io = |source| OpenError::Io { what: "read a map file", source };
    for (_, part) in sealed() {
        scrub.total += data_bytes(part).map_err(io)?;
    }
    for (index, part) in sealed() {
        let above = chain.get(index..).unwrap_or_default();
        scrub
            .layer(part, above)
            .map_err(|source| OpenError::Io { what: "read or write a map file", source })?;
    }
    scrub.report.cancelled = scrub.pace.is_cancelled();
    Ok(scrub.report)
}

fn chain_of(files: &[(Media, Media)]) -> Result<Vec<Part<'_>>, OpenError> {
    if files.is_empty() {
        return Err(OpenError::Empty);
    }
    let chain = walk(files, Access::ReadOnly, None)?;
    let parts = chain.into_iter().filter_map(|(index, header)| {
        let (data, map) = files.get(index)?;
        Some(Part { header, data, map })
    });
    Ok(parts.collect())
}

struct Scrub<'a, F> {
    options: &'a ScrubOptions<'a>,
    pace: Pace<'a>,
    report: ScrubReport,
    progress: F,
    done: u64,
    total: u64,
    sound: ScrubPlace,
    /// In the page that is looked at.
    comparing: bool,
}

impl<F: FnMut(ScrubProgress)> Scrub<'_, F> {
    /// Scrubs one sealed layer; `above` is the chain from it upward.
    fn layer(&mut self, part: &Part<'_>, above: &[Part<'_>]) -> io::Result<()> {
        let region = Region::of(&part.header);
        let mut header = region.header(part.map)?;
        if header.is_none() && self.options.add_sums {
            let _held = MapLock::take(part.map)?;
            let new = RegionHeader { complete: false, generation: 0 };
            region.write_header(part.map, new)?;
            header = Some(new);
        }
        let mut walk = LayerWalk { region, part, above, header, reader: Reader::new(part.data, CHUNK_BYTES) };
        let mut whole = true;
        for page in 0..region.pages {
            if self.pace.is_cancelled() {
                return Ok(());
            }
            let place = ScrubPlace { layer: part.header.layer, page };
            // Before it only sums are added where some are missing.
            self.comparing = self.options.compare && self.options.from.is_none_or(|from| place >= from);
            if self.report.rot_count == 0 {
                self.sound = self.sound.max(place);
            }
            whole &= self.page(&mut walk, page)?;
        }
        match header {
            Some(header) if whole && self.options.add_sums && !header.complete => walk.complete(header),
            _ => Ok(()),
        }
    }

    /// Whether every chunk of the page has its sum now.
    fn page(&mut self, walk: &mut LayerWalk<'_>, index: u64) -> io::Result<bool> {
        let generation = walk.region.header(walk.part.map)?.map(|h| h.generation);
        let PageSums { sums, stored, damaged } = walk.sums(index)?;
        let mut page = Page { index, sums, bits: walk.bits(index)? };
        self.report.damaged_sums += u64::from(damaged);
        // Where nothing is, nothing is kept: once the region is complete, that says it.
        if !stored && walk.is_empty(index, &page.bits) {
            return Ok(true);
        }
        let mut added = [None; PAGE_CHUNKS];
        let mut whole = self.options.add_sums || !damaged;
        for (i, added) in added.iter_mut().enumerate() {
            if walk.chunk_range(index, i).0 >= walk.part.header.size_bytes {
                *added = (page.sums.chunks[i] == ChunkSum::Missing).then_some(ChunkSum::Empty);
                continue;
            }
            if self.pace.is_cancelled() {
                return Ok(false);
            }
            match self.chunk_again(walk, &mut page, i)? {
                Found::Right => {}
                Found::Missing(sum) => {
                    *added = sum;
                    whole &= sum.is_some();
                }
                Found::Wrong(_) => whole &= page.sums.chunks[i] != ChunkSum::Missing,
            }
        }
        // The sum of the bits is missing after a merge, whatever the chunks.
        let anything = added.iter().any(Option::is_some) || (!walk.region.bottom && page.sums.bits.is_none());
        if self.options.add_sums && anything {
            whole &= walk.add(index, &page.bits, &added, generation)?;
        }
        Ok(whole)
    }

    /// Looks at a chunk until it is right, wrong without having changed meanwhile, or has changed too often.
    fn chunk_again(&mut self, walk: &mut LayerWalk<'_>, page: &mut Page, i: usize) -> io::Result<Found> {
        for _ in 0..TRIES_MAX {
            let found = self.chunk(walk, page, i);
            let Found::Wrong(wrong) = &found else { return Ok(found) };
            let (sums, bits) = (walk.sums(page.index)?.sums, walk.bits(page.index)?);
            let same =
                sums.chunks[i] == page.sums.chunks[i] && chunk_bits(&bits, i) == chunk_bits(&page.bits, i);
            (page.sums, page.bits) = (sums, bits);
            if same {
                self.rot(walk, page, i, wrong.as_ref());
                return Ok(found);
            }
        }
        Ok(Found::Missing(None))
    }

    /// Looks at one chunk.
    fn chunk(&mut self, walk: &mut LayerWalk<'_>, page: &Page, i: usize) -> Found {
        let (stored, bits) = (page.sums.chunks[i], &page.bits);
        let wanted = if stored == ChunkSum::Missing { self.options.add_sums } else { self.comparing };
        let data = walk.data_bytes(page.index, i, bits);
        self.done += data;
        if !wanted {
            // Without reading: only whether there is something where nothing should be.
            if stored == ChunkSum::Missing {
                self.report.missing_bytes += data;
                return Found::Missing(None);
            }
            let odd =
                stored == ChunkSum::Empty && !walk.region.bottom && chunk_bits(bits, i) != [0; CHUNK_BITS];
            return if odd { Found::Wrong(None) } else { Found::Right };
        }
        let found = walk.read(page.index, i, bits, &mut self.pace);
        if data > 0 {
            let (done, total) = (self.done.min(self.total), self.total);
            (self.progress)(ScrubProgress { done, total, sound: self.sound });
        }
        match (found, stored) {
            (Err(unreadable), _) => Found::Wrong(Some(unreadable)),
            (Ok(chunk), ChunkSum::Missing) => {
                self.report.added_bytes += chunk.data_bytes;
                Found::Missing(Some(chunk.sum))
            }
            (Ok(chunk), stored) => {
                self.report.compared_bytes += chunk.data_bytes;
                if chunk.sum == stored { Found::Right } else { Found::Wrong(None) }
            }
        }
    }

    fn rot(&mut self, walk: &LayerWalk<'_>, page: &Page, i: usize, unreadable: Option<&Unreadable>) {
        let first = walk.chunk_range(page.index, i).0 / BLOCK_BYTES;
        let map_is_wrong =
            !walk.region.bottom && page.sums.bits.is_some_and(|sum| sum != sums::of_bits(&page.bits));
        let (mask, kind) = match (unreadable, map_is_wrong) {
            (Some(u), _) => {
                let (from, to) = (u.offset / BLOCK_BYTES, (u.offset + u.len).div_ceil(BLOCK_BYTES));
                (mask_of(from - first, to - first), RotKind::Unreadable(u.errno))
            }
            // What the map said, nobody knows.
            (None, true) => (u128::MAX, RotKind::Map),
            (None, false) if walk.region.bottom => (u128::MAX, RotKind::Data),
            (None, false) => match data_mask(&chunk_bits(&page.bits, i)) {
                // There should be some: the states are what is wrong.
                0 => (u128::MAX, RotKind::Map),
                mask => (mask, RotKind::Data),
            },
        };
        let size = walk.part.header.size_bytes;
        let start = (first + u64::from(mask.trailing_zeros())) * BLOCK_BYTES;
        let end = ((first + CHUNK_BLOCKS - u64::from(mask.leading_zeros())) * BLOCK_BYTES).min(size);
        let points = points(walk.above, first, mask);
        let rot = Rot {
            layer: walk.part.header.layer,
            offset: start,
            len: end.saturating_sub(start),
            kind,
            points,
        };
        match self.report.rot.last_mut() {
            Some(last)
                if (last.layer, last.kind, last.offset + last.len) == (rot.layer, rot.kind, rot.offset)
                    && last.points == rot.points =>
            {
                last.len += rot.len;
            }
            _ => {
                self.report.rot_count += 1;
                if self.report.rot.len() < ROT_MAX {
                    self.report.rot.push(rot);
                }
            }
        }
    }
}

/// A page of a map and its sums, as they were read last.
struct Page {
    index: u64,
    sums: SumsPage,
    bits: Bits,
}

/// What a look at a chunk found.
enum Found {
    Right,
    /// It had no sum; this is it, if it was to be computed.
    Missing(Option<ChunkSum>),
    /// Not as it was sealed, or not to be read.
    Wrong(Option<Unreadable>),
}

/// The points that read some of the blocks `mask` of the chunk that starts at block `first` from the layer at the
/// bottom of `above`: a point does if no layer between, up to its own, has the block.
fn points(above: &[Part<'_>], first: u64, mask: u128) -> Vec<String> {
    let (mut mask, mut points) = (mask, Vec::new());
    for (i, part) in above.iter().enumerate() {
        let blocks = part.header.blocks();
        mask &= mask_of(0, blocks.saturating_sub(first).min(CHUNK_BLOCKS));
        if i > 0 {
            mask &= absent(part, first);
        }
        if mask == 0 {
            break;
        }
        match part.header.state {
            HeaderState::Head => points.push(String::new()),
            HeaderState::Sealed { .. } if part.header.snapshot.is_empty() => {}
            HeaderState::Sealed { .. } => points.push(part.header.snapshot.clone()),
        }
    }
    points
}

/// Which blocks of a chunk a layer does not have. All, if that cannot be read: too many points are named then.
fn absent(part: &Part<'_>, first: u64) -> u128 {
    let mut states = [0; CHUNK_BITS];
    match part.map.read_exact_at(&mut states, MAP_OFFSET + first / 4) {
        Ok(()) => state_mask(&states, |state| state == 0),
        Err(_) => u128::MAX,
    }
}
