//! The map of one layer in memory: two bits a block, which pages of it are not on disk yet.
//!
//! A page is 4 KiB of the map file, 16,384 blocks, 64 MiB of the volume. Pages exist only where a bit was ever
//! set, so an empty map of a 1 TiB volume costs 0.5 MiB. Bits change by atomic operations from any queue's
//! thread; a page is marked dirty *after* its bits changed, and the keeper clears the mark *before* it copies
//! the page: no change is missed.

use std::sync::{
    OnceLock,
    atomic::{AtomicU64, Ordering},
};

use crate::{error::OpenError, header::MAP_OFFSET, media::Media};

/// Bytes of one page of the map file.
pub(crate) const PAGE_BYTES: usize = 4096;
const WORDS: usize = PAGE_BYTES / 8;
const BLOCKS_PER_WORD: u64 = 32;
const BLOCKS_PER_PAGE: u64 = PAGE_BYTES as u64 * 4;
/// The low bit of each of a word's 32 states.
const LOW: u64 = 0x5555_5555_5555_5555;

/// What a layer knows about a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Ask the layer below.
    Absent,
    /// In this layer's data file.
    Data,
    /// Zeros, whatever lies below or in the data file.
    Zero,
}

impl State {
    fn bits(self) -> u64 {
        match self {
            State::Absent => 0,
            State::Data => 1,
            State::Zero => 2,
        }
    }
}

type Page = Box<[AtomicU64]>;

/// See the head of this file.
pub(crate) struct BlockMap {
    blocks: u64,
    pages: Box<[OnceLock<Page>]>,
    dirty: Box<[AtomicU64]>,
}

impl BlockMap {
    /// A map in which every block is absent.
    pub(crate) fn new(blocks: u64) -> BlockMap {
        let pages = blocks.div_ceil(BLOCKS_PER_PAGE) as usize;
        BlockMap {
            blocks,
            pages: (0..pages).map(|_| OnceLock::new()).collect(),
            dirty: (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// The map as its file has it. Bytes past the end of the file count as absent.
    pub(crate) fn load(file: &Media, blocks: u64, layer: u64) -> Result<BlockMap, OpenError> {
        let io = |source| OpenError::Io { what: "read a map file", source };
        let map = BlockMap::new(blocks);
        let len = file.len().map_err(io)?.saturating_sub(MAP_OFFSET).min(blocks.div_ceil(4));
        let mut buffer = vec![0; 256 * PAGE_BYTES];
        let mut at = 0;
        while at < len {
            // Most of the map of a large volume was never written.
            let (run, hole) = file.extent_at(MAP_OFFSET + at, MAP_OFFSET + len);
            if hole && run >= PAGE_BYTES as u64 {
                at += run / PAGE_BYTES as u64 * PAGE_BYTES as u64;
                continue;
            }
            let part = &mut buffer[..(len - at).min(256 * PAGE_BYTES as u64) as usize];
            file.read_exact_at(part, MAP_OFFSET + at).map_err(io)?;
            for (i, page) in part.chunks(PAGE_BYTES).enumerate() {
                let at = at + (i * PAGE_BYTES) as u64;
                if page.iter().any(|&b| b != 0) {
                    map.load_page((at / PAGE_BYTES as u64) as usize, page)
                        .map_err(|offset| OpenError::DamagedMap { layer, at: MAP_OFFSET + at + offset })?;
                }
            }
            at += part.len() as u64;
        }
        Ok(map)
    }

    /// `Err`: offset in the page of a word with a state that does not exist.
    fn load_page(&self, index: usize, bytes: &[u8]) -> Result<(), u64> {
        let page = self.page(index);
        for (i, (word, bytes)) in page.iter().zip(bytes.chunks(8)).enumerate() {
            let mut raw = [0; 8];
            raw[..bytes.len()].copy_from_slice(bytes);
            let raw = u64::from_le_bytes(raw);
            if raw & (raw >> 1) & LOW != 0 {
                return Err(i as u64 * 8);
            }
            word.store(raw, Ordering::Relaxed);
        }
        Ok(())
    }

    /// The same map with more blocks, which are absent. Nobody may change either while it is made.
    pub(crate) fn grown(&self, blocks: u64) -> BlockMap {
        assert!(blocks >= self.blocks, "a volume never shrinks");
        let map = BlockMap::new(blocks);
        for (new, old) in map.pages.iter().zip(&self.pages) {
            if let Some(old) = old.get() {
                let copy = old.iter().map(|word| AtomicU64::new(word.load(Ordering::Acquire)));
                // It was made a moment ago, so every page of it is free to be set.
                let _ = new.set(copy.collect());
            }
        }
        for (new, old) in map.dirty.iter().zip(&self.dirty) {
            new.store(old.load(Ordering::SeqCst), Ordering::SeqCst);
        }
        map
    }

    fn page(&self, index: usize) -> &Page {
        self.pages[index].get_or_init(|| (0..WORDS).map(|_| AtomicU64::new(0)).collect())
    }

    fn word(&self, block: u64) -> u64 {
        let page = self.pages[(block / BLOCKS_PER_PAGE) as usize].get();
        let index = (block % BLOCKS_PER_PAGE / BLOCKS_PER_WORD) as usize;
        page.map_or(0, |page| page[index].load(Ordering::Acquire))
    }

    /// The state of `block`, and how many blocks from there have it, `max` at most. `block` must exist.
    pub(crate) fn run(&self, block: u64, max: u64) -> (State, u64) {
        assert!(block < self.blocks && max > 0, "blocks are checked against the layer's size first");
        let max = max.min(self.blocks - block);
        let shift = block % BLOCKS_PER_WORD * 2;
        let bits = (self.word(block) >> shift) & 3;
        let mut at = block;
        while at < block + max {
            // A page that does not exist is absent as a whole.
            if bits == 0 && self.pages[(at / BLOCKS_PER_PAGE) as usize].get().is_none() {
                at = (at / BLOCKS_PER_PAGE + 1) * BLOCKS_PER_PAGE;
                continue;
            }
            let skip = at % BLOCKS_PER_WORD;
            let other = (self.word(at) ^ (bits * LOW)) >> (skip * 2);
            let same = (u64::from(other.trailing_zeros()) / 2).min(BLOCKS_PER_WORD - skip);
            at += same;
            if same < BLOCKS_PER_WORD - skip {
                break;
            }
        }
        let state = match bits {
            0 => State::Absent,
            1 => State::Data,
            // 3 is refused on load and never set.
            _ => State::Zero,
        };
        (state, (at - block).min(max))
    }

    /// Whether every block of the range is data here.
    pub(crate) fn all_data(&self, first: u64, count: u64) -> bool {
        count == 0 || self.run(first, count) == (State::Data, count)
    }

    /// Sets a range of blocks.
    pub(crate) fn set(&self, first: u64, count: u64, state: State) {
        assert!(first + count <= self.blocks, "blocks are checked against the layer's size first");
        let mut at = first;
        while at < first + count {
            let skip = at % BLOCKS_PER_WORD;
            let n = (first + count - at).min(BLOCKS_PER_WORD - skip);
            let mask = (u64::MAX >> (64 - 2 * n)) << (2 * skip);
            let new = (state.bits() * LOW) & mask;
            let page_index = (at / BLOCKS_PER_PAGE) as usize;
            let word = &self.page(page_index)[(at % BLOCKS_PER_PAGE / BLOCKS_PER_WORD) as usize];
            let old = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| {
                let changed = (old & !mask) | new;
                (changed != old).then_some(changed)
            });
            if old.is_ok() {
                self.dirty[page_index / 64].fetch_or(1 << (page_index % 64), Ordering::SeqCst);
            }
            at += n;
        }
    }

    /// Whether some page differs from the file.
    pub(crate) fn any_dirty(&self) -> bool {
        self.dirty.iter().any(|word| word.load(Ordering::SeqCst) != 0)
    }

    /// Counts a page that [`BlockMap::take_dirty`] gave as not written after all.
    pub(crate) fn mark_dirty(&self, offset: u64) {
        let index = (offset.saturating_sub(MAP_OFFSET) / PAGE_BYTES as u64) as usize;
        self.dirty[index / 64].fetch_or(1 << (index % 64), Ordering::SeqCst);
    }

    /// Copies the pages that differ from the file, and counts them as written.
    pub(crate) fn take_dirty(&self, out: &mut Vec<(u64, [u8; PAGE_BYTES])>) {
        for (i, word) in self.dirty.iter().enumerate() {
            let mut marks = word.swap(0, Ordering::SeqCst);
            while marks != 0 {
                let index = i * 64 + marks.trailing_zeros() as usize;
                marks &= marks - 1;
                let mut bytes = [0; PAGE_BYTES];
                for (bytes, word) in bytes.chunks_exact_mut(8).zip(self.page(index)) {
                    bytes.copy_from_slice(&word.load(Ordering::Acquire).to_le_bytes());
                }
                out.push((MAP_OFFSET + (index * PAGE_BYTES) as u64, bytes));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_as_an_array(ops in proptest::collection::vec((0u64..40_000, 1u64..20_000, 0u8..3), 1..30)) {
            let blocks = 40_000;
            let map = BlockMap::new(blocks);
            let mut array = vec![State::Absent; blocks as usize];
            for (first, count, state) in ops {
                let count = count.min(blocks - first);
                let state = [State::Absent, State::Data, State::Zero][usize::from(state)];
                map.set(first, count, state);
                array[first as usize..(first + count) as usize].fill(state);
            }
            let mut at = 0;
            while at < blocks {
                let (state, n) = map.run(at, blocks);
                prop_assert!(n > 0);
                prop_assert!(array[at as usize..(at + n) as usize].iter().all(|s| *s == state));
                at += n;
                if at < blocks {
                    prop_assert_ne!(array[at as usize], state);
                }
            }
        }
    }

    #[test]
    fn a_grown_map_keeps_what_it_has() {
        let map = BlockMap::new(100);
        map.set(90, 10, State::Data);
        let map = map.grown(50_000);
        assert_eq!(map.run(0, 50_000), (State::Absent, 90));
        assert_eq!(map.run(90, 50_000), (State::Data, 10));
        assert_eq!(map.run(100, 50_000), (State::Absent, 49_900));
        assert!(map.any_dirty());
        map.set(49_999, 1, State::Zero);
        assert_eq!(map.run(49_999, 1), (State::Zero, 1));
    }

    #[test]
    fn dirty_pages_are_taken_once() {
        let map = BlockMap::new(100_000);
        assert!(!map.any_dirty());
        map.set(16_380, 10, State::Data);
        let mut pages = Vec::new();
        map.take_dirty(&mut pages);
        assert_eq!(pages.iter().map(|p| p.0).collect::<Vec<_>>(), [MAP_OFFSET, MAP_OFFSET + 4096]);
        assert_eq!(pages[0].1[4095], 0b0101_0101);
        assert!(!map.any_dirty());
        map.set(16_380, 10, State::Data);
        assert!(!map.any_dirty(), "nothing changed");
    }
}
