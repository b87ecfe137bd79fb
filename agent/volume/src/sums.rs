//! Checksums of a sealed layer, kept in its map file behind the bits. Bytes in, values out, and where they lie; who
//! computes and compares them is `scrub.rs`, who drops them before a change is `sealed.rs`.
//!
//! ```text
//! map file  0        8192   R = end of the bits, on a page    R + 4096
//!           │ header │ bits │ region header (512 bytes), … 0 │ sums page 0 │ sums page 1 │ …
//!                                                              one for each page of bits: 64 MiB of the volume
//! ```
//!
//! The unit is a *chunk* of 512 KiB, 128 blocks, whose states are 32 bytes of the map: so a page of bits and its sums
//! page cover the same 128 chunks, and a layer costs 24 bytes for each chunk that holds something (0.005 %). Smaller
//! would tell the place of rot more exactly and cost more of the page cache on each merge; larger would make a
//! merge of a few blocks read more again. A chunk's sum is the first 24 bytes of BLAKE3 over its 32 bytes of states,
//! then its *data* blocks in order, as they are stored (encrypted, if they are): holes cost nothing to read, and a
//! chunk whose sum is right has the right states too. At the bottom, whose bits are not asked, it is BLAKE3 of the
//! bytes, and a chunk of zeros is `Empty`, so that it does not matter whether the file has holes there.
//!
//! Each sums page, and the region header, has a CRC-32C: torn or rotten, it counts as missing. While the region is
//! `building`, a page of zeros says nothing. Once it is `complete` it says that all its chunks are empty.

use std::io;

use crate::{
    header::{BLOCK_BYTES, Header, MAP_OFFSET},
    map::PAGE_BYTES,
    media::Media,
};

/// Blocks of a chunk.
pub(crate) const CHUNK_BLOCKS: u64 = 128;
/// Bytes of a chunk.
pub(crate) const CHUNK_BYTES: u64 = CHUNK_BLOCKS * BLOCK_BYTES;
/// Bytes of the map that hold a chunk's states.
pub(crate) const CHUNK_BITS: usize = 32;
/// Chunks of a page of the map, and of a sums page.
pub(crate) const PAGE_CHUNKS: usize = PAGE_BYTES / CHUNK_BITS;
/// Bytes of the volume that a page of the map speaks of.
pub(crate) const PAGE_COVERS: u64 = PAGE_CHUNKS as u64 * CHUNK_BYTES;

const SUM_BYTES: usize = 24;
const REGION_HEADER_BYTES: usize = 512;
const MAGIC: [u8; 8] = *b"SERIOSUM";
const VERSION: u32 = 1;
const STATE_BUILDING: u32 = 1;
const STATE_COMPLETE: u32 = 2;
/// Flag of a sums page: the sum of the page of bits is there.
const FLAG_MAP: u32 = 1;
const SUMS_AT: usize = 1024;

/// The first bytes of a BLAKE3 hash.
pub(crate) type Sum = [u8; SUM_BYTES];
/// A page of the map.
pub(crate) type Bits = [u8; PAGE_BYTES];

/// The sum of some bytes.
pub(crate) fn finish(hasher: &blake3::Hasher) -> Sum {
    let mut sum = [0; SUM_BYTES];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..SUM_BYTES]);
    sum
}

/// The sum of a page of bits.
pub(crate) fn of_bits(bits: &Bits) -> Sum {
    let mut hasher = blake3::Hasher::new();
    hasher.update(bits);
    finish(&hasher)
}

/// What is known about a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ChunkSum {
    /// Nothing.
    Missing,
    /// The layer holds nothing of it: all blocks are absent; at the bottom, all bytes are zero.
    Empty,
    /// Its sum.
    Sum(Sum),
}

/// Where the sums of a layer are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Region {
    offset: u64,
    /// Pages of bits, and so of sums.
    pub(crate) pages: u64,
    /// The layer has none below: its bits are not asked.
    pub(crate) bottom: bool,
    size_bytes: u64,
}

/// The header of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RegionHeader {
    /// Every page has been looked at; one of zeros is empty.
    pub(crate) complete: bool,
    /// Counts the times that sums were forgotten.
    pub(crate) generation: u64,
}

/// What lies in the place of a sums page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stored {
    /// Zeros, or past the end of the file.
    Nothing,
    /// No sums page: torn or rotten.
    Damaged,
    /// A sums page.
    Page(Box<SumsPage>),
}

/// The sums of one page of the map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SumsPage {
    /// Of the page of bits; never at the bottom.
    pub(crate) bits: Option<Sum>,
    /// Of its chunks.
    pub(crate) chunks: [ChunkSum; PAGE_CHUNKS],
}

impl SumsPage {
    /// A page on which all chunks are known as `sum` says.
    pub(crate) fn all(sum: ChunkSum) -> SumsPage {
        SumsPage { bits: None, chunks: [sum; PAGE_CHUNKS] }
    }

    fn encode(&self, salt: [u8; 16]) -> Bits {
        let mut page = [0; PAGE_BYTES];
        let (mut present, mut empty) = (0u128, 0u128);
        for (i, (chunk, at)) in
            self.chunks.iter().zip(page[SUMS_AT..].chunks_exact_mut(SUM_BYTES)).enumerate()
        {
            match chunk {
                ChunkSum::Missing => {}
                ChunkSum::Empty => empty |= 1 << i,
                ChunkSum::Sum(sum) => {
                    present |= 1 << i;
                    at.copy_from_slice(sum);
                }
            }
        }
        if let Some(sum) = &self.bits {
            page[4..8].copy_from_slice(&FLAG_MAP.to_le_bytes());
            page[48..48 + SUM_BYTES].copy_from_slice(sum);
        }
        page[16..32].copy_from_slice(&present.to_le_bytes());
        page[32..48].copy_from_slice(&empty.to_le_bytes());
        let crc = page_crc(&page, salt).to_le_bytes();
        page[..4].copy_from_slice(&crc);
        page
    }

    fn decode(page: &Bits, salt: [u8; 16]) -> Option<SumsPage> {
        let word = |at: usize| page.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
        let wide = |at: usize| page.get(at..at + 16)?.try_into().ok().map(u128::from_le_bytes);
        let (present, empty) = (wide(16)?, wide(32)?);
        if word(0)? != page_crc(page, salt) || present & empty != 0 {
            return None;
        }
        let mut sums = SumsPage::all(ChunkSum::Missing);
        let stored = page.get(SUMS_AT..)?.as_chunks::<SUM_BYTES>().0;
        for (i, (chunk, sum)) in sums.chunks.iter_mut().zip(stored).enumerate() {
            match ((present >> i) & 1, (empty >> i) & 1) {
                (1, _) => *chunk = ChunkSum::Sum(*sum),
                (_, 1) => *chunk = ChunkSum::Empty,
                _ => {}
            }
        }
        if word(4)? & FLAG_MAP != 0 {
            sums.bits = page.get(48..48 + SUM_BYTES)?.try_into().ok();
        }
        Some(sums)
    }
}

/// The salt says where the page belongs, so that one in a wrong place is no page.
fn page_crc(page: &Bits, salt: [u8; 16]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&page[4..]), &salt)
}

impl Region {
    /// Of the layer with this header.
    pub(crate) fn of(header: &Header) -> Region {
        let pages = header.blocks().div_ceil(4).div_ceil(PAGE_BYTES as u64);
        let offset = MAP_OFFSET + pages * PAGE_BYTES as u64;
        Region { offset, pages, bottom: header.parent.is_none(), size_bytes: header.size_bytes }
    }

    fn bytes(&self) -> u64 {
        (self.pages + 1) * PAGE_BYTES as u64
    }

    /// Where it lies in the map file.
    pub(crate) fn range(&self) -> std::ops::Range<u64> {
        self.offset..self.offset + self.bytes()
    }

    /// A layer that became the bottom has sums that mean something else: they must not be taken for its own.
    fn salt(&self, page: u64) -> [u8; 16] {
        let mut salt = [0; 16];
        salt[..8].copy_from_slice(&page.to_le_bytes());
        salt[8] = u8::from(self.bottom);
        salt
    }

    /// The region's header; None when there is none for this layer, or it is damaged.
    pub(crate) fn header(&self, map: &Media) -> io::Result<Option<RegionHeader>> {
        if map.len()? < self.offset + REGION_HEADER_BYTES as u64 {
            return Ok(None);
        }
        let mut bytes = [0; REGION_HEADER_BYTES];
        map.read_exact_at(&mut bytes, self.offset)?;
        Ok(self.decode_header(&bytes))
    }

    fn decode_header(&self, bytes: &[u8; REGION_HEADER_BYTES]) -> Option<RegionHeader> {
        let (body, crc) = bytes.split_last_chunk::<4>()?;
        let word = |at: usize| body.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
        let long = |at: usize| body.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes);
        let ours = body.get(..8)? == MAGIC
            && crc32c::crc32c(body) == u32::from_le_bytes(*crc)
            && word(8)? == VERSION
            && word(16)? == u32::from(self.bottom)
            && u64::from(word(20)?) == CHUNK_BYTES
            && long(24)? == self.size_bytes;
        let complete = match word(12)? {
            STATE_BUILDING => false,
            STATE_COMPLETE => true,
            _ => return None,
        };
        ours.then_some(RegionHeader { complete, generation: long(32)? })
    }

    /// Writes the region's header, without a sync; makes the file long enough first.
    pub(crate) fn write_header(&self, map: &Media, header: RegionHeader) -> io::Result<()> {
        let end = self.offset + self.bytes();
        if map.len()? < end {
            map.set_len(end)?;
        }
        let state = if header.complete { STATE_COMPLETE } else { STATE_BUILDING };
        let mut bytes = [0; REGION_HEADER_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&state.to_le_bytes());
        bytes[16..20].copy_from_slice(&u32::from(self.bottom).to_le_bytes());
        bytes[20..24].copy_from_slice(&(CHUNK_BYTES as u32).to_le_bytes());
        bytes[24..32].copy_from_slice(&self.size_bytes.to_le_bytes());
        bytes[32..40].copy_from_slice(&header.generation.to_le_bytes());
        let (body, crc) = bytes.split_at_mut(REGION_HEADER_BYTES - 4);
        crc.copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
        map.write_all_at(&bytes, self.offset)
    }

    fn page_offset(&self, page: u64) -> u64 {
        self.offset + (page + 1) * PAGE_BYTES as u64
    }

    /// What lies in the place of sums page `page`.
    pub(crate) fn page(&self, map: &Media, page: u64) -> io::Result<Stored> {
        let at = self.page_offset(page);
        if map.len()? < at + PAGE_BYTES as u64 {
            return Ok(Stored::Nothing);
        }
        let mut bytes = [0; PAGE_BYTES];
        map.read_exact_at(&mut bytes, at)?;
        if bytes.iter().all(|b| *b == 0) {
            return Ok(Stored::Nothing);
        }
        Ok(SumsPage::decode(&bytes, self.salt(page))
            .map_or(Stored::Damaged, |sums| Stored::Page(Box::new(sums))))
    }

    /// Writes sums page `page`, without a sync. The region's header is there.
    pub(crate) fn write_page(&self, map: &Media, page: u64, sums: &SumsPage) -> io::Result<()> {
        map.write_all_at(&sums.encode(self.salt(page)), self.page_offset(page))
    }

    /// Page `page` of the bits; what the file has not is absent.
    pub(crate) fn bits(&self, map: &Media, page: u64) -> io::Result<Bits> {
        let mut bits = [0; PAGE_BYTES];
        let at = MAP_OFFSET + page * PAGE_BYTES as u64;
        let len = map.len()?.min(self.offset).saturating_sub(at).min(PAGE_BYTES as u64);
        map.read_exact_at(&mut bits[..len as usize], at)?;
        Ok(bits)
    }

    /// Drops the sums of some chunks (`(page, one bit for each of its chunks)`) and of their pages' bits, durably. Must
    /// be called, under the map's lock, before bits or data of these chunks change.
    pub(crate) fn forget(&self, map: &Media, chunks: &[(u64, u128)]) -> io::Result<()> {
        if map.len()? <= self.offset {
            return Ok(());
        }
        // A page of zeros stops meaning "empty" with this.
        let was = self.header(map)?.unwrap_or(RegionHeader { complete: false, generation: 0 });
        let generation = was.generation.wrapping_add(1);
        self.write_header(map, RegionHeader { complete: false, generation })?;
        if was.complete {
            // Before pages are written, which a crash may tear: in a complete region that would be rot.
            map.sync_data()?;
        }
        for (page, mask) in chunks {
            let Stored::Page(mut sums) = self.page(map, *page)? else { continue };
            sums.bits = None;
            for (i, chunk) in sums.chunks.iter_mut().enumerate() {
                if (mask >> i) & 1 == 1 {
                    *chunk = ChunkSum::Missing;
                }
            }
            self.write_page(map, *page, &sums)?;
        }
        map.sync_data()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::header::HeaderState;

    fn header(size_bytes: u64, parent: Option<u64>) -> Header {
        Header {
            volume: [1; 16],
            layer: 3,
            size_bytes,
            parent,
            state: HeaderState::Sealed { successor: 4 },
            snapshot: String::new(),
            time_s: 0,
            generation: 0,
            sequence: 0,
            key: None,
        }
    }

    fn file() -> Media {
        Media::new(tempfile::tempfile().expect("tempfile"))
    }

    #[test]
    fn a_region_is_what_was_written_and_only_for_its_layer() {
        let map = file();
        let region = Region::of(&header(PAGE_COVERS + 1, Some(2)));
        assert_eq!((region.pages, region.offset), (2, MAP_OFFSET + 8192));
        assert_eq!(region.header(&map).expect("read"), None);
        let head = RegionHeader { complete: true, generation: 7 };
        region.write_header(&map, head).expect("write");
        assert_eq!(region.header(&map).expect("read"), Some(head));
        let mut page = SumsPage::all(ChunkSum::Missing);
        (page.chunks[0], page.chunks[127], page.bits) =
            (ChunkSum::Sum([5; 24]), ChunkSum::Empty, Some([9; 24]));
        region.write_page(&map, 1, &page).expect("write");
        assert_eq!(region.page(&map, 1).expect("read"), Stored::Page(Box::new(page.clone())));
        assert_eq!(region.page(&map, 0).expect("read"), Stored::Nothing);

        // As the bottom, or in another place, it is nothing.
        let bottom = Region::of(&header(PAGE_COVERS + 1, None));
        assert_eq!(bottom.header(&map).expect("read"), None);
        assert_eq!(bottom.page(&map, 1).expect("read"), Stored::Damaged);
        assert_eq!(Region::of(&header(PAGE_COVERS + 2, Some(2))).header(&map).expect("read"), None);

        region.forget(&map, &[(1, 1)]).expect("forget");
        (page.chunks[0], page.bits) = (ChunkSum::Missing, None);
        assert_eq!(region.page(&map, 1).expect("read"), Stored::Page(Box::new(page)));
        let head = RegionHeader { complete: false, generation: 8 };
        assert_eq!(region.header(&map).expect("read"), Some(head));
    }

    proptest! {
        #[test]
        fn any_bytes_are_answered_and_any_flip_is_seen(bytes in proptest::collection::vec(any::<u8>(), 4096), at in 0usize..4096, bit in 0u8..8) {
            let page: Bits = bytes.try_into().expect("as long");
            prop_assert_eq!(SumsPage::decode(&page, [0; 16]), None);
            let mut chunks = [ChunkSum::Empty; PAGE_CHUNKS];
            chunks[at % PAGE_CHUNKS] = ChunkSum::Sum([bit; 24]);
            let mut encoded = SumsPage { bits: Some([bit; 24]), chunks }.encode([3; 16]);
            prop_assert!(SumsPage::decode(&encoded, [3; 16]).is_some());
            encoded[at] ^= 1 << bit;
            prop_assert_eq!(SumsPage::decode(&encoded, [3; 16]), None);
        }
    }
}
