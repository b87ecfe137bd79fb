//! One sealed layer under a scrub: a page of its map, the chunks that the page speaks of, their sums as they are stored and
//! as they are computed anew. Decides nothing; `scrub.rs` does.

use std::io;

use crate::{
    header::{BLOCK_BYTES, Header},
    map::PAGE_BYTES,
    media::Media,
    reader::{Pace, Reader},
    scan,
    sealed::MapLock,
    sums::{
        self, Bits, CHUNK_BITS, CHUNK_BLOCKS, CHUNK_BYTES, ChunkSum, PAGE_CHUNKS, PAGE_COVERS, Region,
        RegionHeader, Stored, SumsPage,
    },
};

/// A layer of the chain.
pub(crate) struct Part<'a> {
    pub(crate) header: Header,
    pub(crate) data: &'a Media,
    pub(crate) map: &'a Media,
}

/// Bytes of data that a layer names, as its map or, at the bottom, the file system says.
pub(crate) fn data_bytes(part: &Part<'_>) -> io::Result<u64> {
    let region = Region::of(&part.header);
    if region.bottom {
        return Ok(scan::allocated(part.data, 0, part.header.size_bytes));
    }
    let mut blocks = 0;
    for page in 0..region.pages {
        let bits = region.bits(part.map, page)?;
        blocks += bits.iter().map(|byte| u64::from((byte & 0x55).count_ones())).sum::<u64>();
    }
    Ok((blocks * BLOCK_BYTES).min(part.header.size_bytes))
}

/// What reading a chunk gave.
pub(crate) struct Chunk {
    pub(crate) sum: ChunkSum,
    pub(crate) data_bytes: u64,
}

/// Why a chunk could not be read: the blocks, and the errno.
pub(crate) struct Unreadable {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) errno: i32,
}

/// What is known about a page.
pub(crate) struct PageSums {
    pub(crate) sums: SumsPage,
    /// It is in the file; else it follows from the region's header.
    pub(crate) stored: bool,
    /// What should be in the file is not.
    pub(crate) damaged: bool,
}

pub(crate) struct LayerWalk<'a> {
    pub(crate) region: Region,
    pub(crate) part: &'a Part<'a>,
    pub(crate) above: &'a [Part<'a>],
    pub(crate) header: Option<RegionHeader>,
    pub(crate) reader: Reader<'a>,
}

impl LayerWalk<'_> {
    pub(crate) fn sums(&self, page: u64) -> io::Result<PageSums> {
        let unknown = |damaged| PageSums { sums: SumsPage::all(ChunkSum::Missing), stored: false, damaged };
        let Some(was) = self.header else { return Ok(unknown(false)) };
        // It may have been complete when we began, and no longer be.
        let complete = was.complete && self.region.header(self.part.map)?.is_some_and(|now| now.complete);
        Ok(match self.region.page(self.part.map, page)? {
            Stored::Page(sums) => PageSums { sums: *sums, stored: true, damaged: false },
            Stored::Nothing if complete => {
                PageSums { sums: SumsPage::all(ChunkSum::Empty), stored: false, damaged: false }
            }
            Stored::Nothing => unknown(false),
            // While they are built, a crash may have torn it.
            Stored::Damaged => unknown(complete),
        })
    }

    pub(crate) fn bits(&self, page: u64) -> io::Result<Bits> {
        if self.region.bottom { Ok([0; PAGE_BYTES]) } else { self.region.bits(self.part.map, page) }
    }

    /// Whether there is nothing to look at.
    pub(crate) fn is_empty(&self, page: u64, bits: &Bits) -> bool {
        if !self.region.bottom {
            return bits.iter().all(|b| *b == 0);
        }
        let (start, size) = (page * PAGE_COVERS, self.part.header.size_bytes);
        let len = PAGE_COVERS.min(size.saturating_sub(start));
        self.part.data.extent_at(start, start + len) == (len, true)
    }

    pub(crate) fn chunk_range(&self, page: u64, i: usize) -> (u64, u64) {
        let start = page * PAGE_COVERS + i as u64 * CHUNK_BYTES;
        (start, (start + CHUNK_BYTES).min(self.part.header.size_bytes))
    }

    pub(crate) fn data_bytes(&self, page: u64, i: usize, bits: &Bits) -> u64 {
        let (start, end) = self.chunk_range(page, i);
        if self.region.bottom {
            return scan::allocated(self.part.data, start, end);
        }
        let blocks = u64::from(data_mask(&chunk_bits(bits, i)).count_ones());
        (blocks * BLOCK_BYTES).min(end.saturating_sub(start))
    }

    pub(crate) fn read(
        &mut self,
        page: u64,
        i: usize,
        bits: &Bits,
        pace: &mut Pace<'_>,
    ) -> Result<Chunk, Unreadable> {
        let (start, end) = self.chunk_range(page, i);
        let mut hasher = blake3::Hasher::new();
        if self.region.bottom {
            if self.part.data.extent_at(start, end) == (end - start, true) {
                return Ok(Chunk { sum: ChunkSum::Empty, data_bytes: 0 });
            }
            let bytes = self.run(start, end - start, pace)?;
            if bytes.iter().all(|b| *b == 0) {
                return Ok(Chunk { sum: ChunkSum::Empty, data_bytes: end - start });
            }
            hasher.update(bytes);
            return Ok(Chunk { sum: ChunkSum::Sum(sums::finish(&hasher)), data_bytes: end - start });
        }
        let states = chunk_bits(bits, i);
        if states == [0; CHUNK_BITS] {
            return Ok(Chunk { sum: ChunkSum::Empty, data_bytes: 0 });
        }
        hasher.update(&states);
        let (mut mask, mut data_bytes) = (data_mask(&states), 0);
        while mask != 0 {
            let first = mask.trailing_zeros();
            let count = (mask >> first).trailing_ones();
            mask &= !mask_of(first.into(), u64::from(first) + u64::from(count));
            let at = start + u64::from(first) * BLOCK_BYTES;
            // A map that names blocks past the end was caught by its own sum, or has none yet.
            let len = (u64::from(count) * BLOCK_BYTES).min(end.saturating_sub(at));
            hasher.update(self.run(at, len, pace)?);
            data_bytes += len;
        }
        Ok(Chunk { sum: ChunkSum::Sum(sums::finish(&hasher)), data_bytes })
    }

    /// Reads a run of blocks; when that fails, block by block, to tell which cannot be read.
    pub(crate) fn run(&mut self, at: u64, len: u64, pace: &mut Pace<'_>) -> Result<&[u8], Unreadable> {
        if len == 0 {
            return Ok(&[]);
        }
        let Err(e) = self.reader.read(at, len, pace) else {
            return Ok(self.reader.bytes(len));
        };
        let errno = |e: &io::Error| e.raw_os_error().unwrap_or(libc::EIO);
        let mut bad: Option<Unreadable> = None;
        let mut block = at;
        while block < at + len {
            let part = BLOCK_BYTES.min(at + len - block);
            if let Err(e) = self.reader.read(block, part, pace) {
                let first = bad.as_ref().map_or(block, |bad| bad.offset);
                bad = Some(Unreadable { offset: first, len: block + part - first, errno: errno(&e) });
            }
            block += part;
        }
        // It went well now, block by block; but the bytes of a disk that fails at times are not to be blessed.
        Err(bad.unwrap_or(Unreadable { offset: at, len, errno: errno(&e) }))
    }

    /// Writes what was computed, if what it was computed from is still so. Whether it was.
    pub(crate) fn add(
        &self,
        page: u64,
        used: &Bits,
        added: &[Option<ChunkSum>; PAGE_CHUNKS],
        generation: Option<u64>,
    ) -> io::Result<bool> {
        let map = self.part.map;
        let _held = MapLock::take(map)?;
        // Gone: the layer has become the bottom, and its sums are others now.
        let Some(header) = self.region.header(map)? else { return Ok(false) };
        if self.region.bottom && Some(header.generation) != generation {
            return Ok(false);
        }
        let now = self.bits(page)?;
        let mut sums = self.sums(page)?.sums;
        let mut all = true;
        for (i, sum) in added.iter().enumerate() {
            let Some(sum) = sum else { continue };
            if chunk_bits(&now, i) == chunk_bits(used, i) && sums.chunks[i] == ChunkSum::Missing {
                sums.chunks[i] = *sum;
            } else {
                all = false;
            }
        }
        if !self.region.bottom && sums.bits.is_none() {
            sums.bits = Some(sums::of_bits(&now));
        }
        self.region.write_page(map, page, &sums)?;
        Ok(all)
    }

    /// Marks the region as complete, if nothing was forgotten since `header`.
    pub(crate) fn complete(&self, header: RegionHeader) -> io::Result<()> {
        let map = self.part.map;
        map.sync_data()?;
        let _held = MapLock::take(map)?;
        if self.region.header(map)? == Some(header) {
            self.region.write_header(map, RegionHeader { complete: true, ..header })?;
            map.sync_data()?;
        }
        Ok(())
    }
}

pub(crate) fn chunk_bits(bits: &Bits, i: usize) -> [u8; CHUNK_BITS] {
    let mut states = [0; CHUNK_BITS];
    states.copy_from_slice(&bits[i * CHUNK_BITS..(i + 1) * CHUNK_BITS]);
    states
}

/// One bit for each block of a chunk that is data: state 1.
pub(crate) fn data_mask(states: &[u8; CHUNK_BITS]) -> u128 {
    state_mask(states, |state| state == 1)
}

pub(crate) fn state_mask(states: &[u8; CHUNK_BITS], is: impl Fn(u8) -> bool) -> u128 {
    let block = |b: usize| (states[b / 4] >> (2 * (b % 4))) & 3;
    (0..CHUNK_BLOCKS as usize).fold(0, |mask, b| mask | (u128::from(is(block(b))) << b))
}

/// The bits `[from, to)`; both at most 128.
pub(crate) fn mask_of(from: u64, to: u64) -> u128 {
    let below = |n: u64| if n >= 128 { u128::MAX } else { (1 << n) - 1 };
    below(to) & !below(from)
}
