//! A set of pages of a memory, and how a diff keeps it: which pages it holds.
//!
//! Pages are numbered in the order of the memory's file. On the disk, in parts of 2 MiB (512 pages), only those with a page in them:
//! their numbers, ascending, and 64 bytes of bits for each, the lowest page in the lowest bit of the first byte.

use std::ops::Range;

use super::memory::PAGE;
use super::sums::CHUNK_BYTES;

const WORDS_OF_CHUNK: usize = (CHUNK_BYTES / PAGE as u64 / 64) as usize;
const BYTES_OF_CHUNK: usize = WORDS_OF_CHUNK * 8;
const BITS: u64 = u64::BITS as u64;

/// The payload of its section.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct SavedPages {
    /// Numbers of parts.
    #[prost(uint32, repeated, packed = "true", tag = "1")]
    chunks: Vec<u32>,
    /// Their bits.
    #[prost(bytes = "vec", tag = "2")]
    bits: Vec<u8>,
}

/// Some of the pages of a memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PageSet {
    pages: u64,
    words: Vec<u64>,
}

impl PageSet {
    /// None of so many bytes of memory.
    pub fn none(memory_bytes: u64) -> PageSet {
        PageSet::of_words(Vec::new(), memory_bytes)
    }

    /// One bit a page, as [`serio_hv::Vm::changes`] tells them.
    pub fn of_words(mut words: Vec<u64>, memory_bytes: u64) -> PageSet {
        let pages = memory_bytes.div_ceil(PAGE as u64);
        words.resize(usize::try_from(pages.div_ceil(BITS)).unwrap_or(usize::MAX), 0);
        if let Some(last) = words.last_mut().filter(|_| !pages.is_multiple_of(BITS)) {
            *last &= (1 << (pages % BITS)) - 1;
        }
        PageSet { pages, words }
    }

    /// Whether the page is one of them.
    pub fn contains(&self, page: u64) -> bool {
        let word = usize::try_from(page / BITS).ok().and_then(|at| self.words.get(at));
        word.is_some_and(|word| word >> (page % BITS) & 1 == 1)
    }

    /// Adds those of another set of the same memory.
    pub fn add(&mut self, other: &PageSet) {
        self.words.iter_mut().zip(&other.words).for_each(|(word, other)| *word |= other);
    }

    /// Takes those of another set away.
    pub fn remove(&mut self, other: &PageSet) {
        self.words.iter_mut().zip(&other.words).for_each(|(word, other)| *word &= !other);
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The longest runs of consecutive ones, ascending.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.next(at, true)?;
            let end = self.next(start, false).unwrap_or(self.pages);
            at = end;
            Some(start..end)
        })
    }

    /// The first page from `from` on that is, or is not, in the set.
    fn next(&self, from: u64, member: bool) -> Option<u64> {
        let first = usize::try_from(from / BITS).ok()?;
        let mut skip = u64::MAX << (from % BITS);
        for (at, word) in (0u64..).zip(&self.words).skip(first) {
            let found = if member { *word } else { !*word } & skip;
            if found != 0 {
                let page = at.checked_mul(BITS)?.checked_add(u64::from(found.trailing_zeros()))?;
                return (page < self.pages).then_some(page);
            }
            skip = u64::MAX;
        }
        None
    }

    pub(super) fn save(&self) -> SavedPages {
        let mut saved = SavedPages::default();
        for (number, chunk) in (0u32..).zip(self.words.chunks(WORDS_OF_CHUNK)) {
            if chunk.iter().any(|word| *word != 0) {
                saved.chunks.push(number);
                saved.bits.extend(chunk.iter().flat_map(|word| word.to_le_bytes()));
                saved.bits.resize(saved.chunks.len().saturating_mul(BYTES_OF_CHUNK), 0);
            }
        }
        saved
    }

    /// `None`: parts in no order, twice or past the end of the memory, or pages past its end.
    pub(super) fn restore(saved: &SavedPages, memory_bytes: u64) -> Option<PageSet> {
        let mut set = PageSet::none(memory_bytes);
        let ascending = saved.chunks.is_sorted_by(|a, b| a < b);
        if !ascending || saved.bits.len() != saved.chunks.len().checked_mul(BYTES_OF_CHUNK)? {
            return None;
        }
        for (number, bits) in saved.chunks.iter().zip(saved.bits.chunks_exact(BYTES_OF_CHUNK)) {
            let first = usize::try_from(*number).ok()?.checked_mul(WORDS_OF_CHUNK)?;
            let (words, _) = bits.as_chunks::<8>();
            for (at, bytes) in (first..).zip(words) {
                let word = u64::from_le_bytes(*bytes);
                match set.words.get_mut(at) {
                    Some(place) => *place = word,
                    None if word == 0 => {}
                    None => return None,
                }
            }
        }
        let cut = PageSet::of_words(set.words.clone(), memory_bytes);
        (cut == set).then_some(set)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a plain list of booleans, and through the disk.
        #[test]
        fn it_is_the_set_that_it_says(pages in 1..3000u64, picks in prop::collection::vec((0..3000u64, 1..200u64), 0..8)) {
            let mut naive = vec![false; pages as usize];
            for (from, len) in picks {
                (from..(from + len).min(pages)).for_each(|page| naive[page as usize] = true);
            }
            let mut words = vec![0; pages.div_ceil(64) as usize];
            for page in (0..pages).filter(|page| naive[*page as usize]) {
                words[page as usize / 64] |= 1 << (page % 64);
            }
            let bytes = pages * PAGE as u64;
            let set = PageSet::of_words(words, bytes);
            prop_assert!((0..pages + 100).all(|page| set.contains(page) == naive.get(page as usize).copied().unwrap_or(false)));
            let mut from_runs = vec![false; pages as usize];
            for run in set.runs() {
                prop_assert!(run.start == 0 || !set.contains(run.start - 1));
                run.for_each(|page| from_runs[page as usize] = true);
            }
            prop_assert_eq!(&from_runs, &naive);
            prop_assert_eq!(set.count(), naive.iter().filter(|is| **is).count() as u64);
            prop_assert_eq!(PageSet::restore(&set.save(), bytes), Some(set.clone()));
            let mut other = PageSet::none(bytes);
            other.add(&set);
            prop_assert_eq!(&other, &set);
            other.remove(&set);
            prop_assert_eq!(other, PageSet::none(bytes));
        }

        #[test]
        fn any_saved_set_is_read_or_refused(chunks in prop::collection::vec(0..4u32, 0..4), bits in prop::collection::vec(any::<u8>(), 0..300)) {
            let saved = SavedPages { chunks, bits };
            if let Some(set) = PageSet::restore(&saved, 3 << 20) {
                prop_assert!(set.runs().all(|run| run.end <= 768));
            }
        }
    }

    #[test]
    fn what_is_past_the_end_is_no_page() {
        let saved = |chunk, bit: u8| {
            let mut bits = vec![0; BYTES_OF_CHUNK];
            bits[32] = bit;
            SavedPages { chunks: vec![chunk], bits }
        };
        assert!(PageSet::restore(&saved(0, 1), 3 << 20).is_some());
        assert!(PageSet::restore(&saved(1, 1), 3 << 20).is_none(), "page 768 of 768");
        assert!(PageSet::restore(&saved(u32::MAX, 0), 3 << 20).is_some(), "none");
        let twice = SavedPages { chunks: vec![0, 0], bits: vec![1; 2 * BYTES_OF_CHUNK] };
        assert!(PageSet::restore(&twice, 3 << 20).is_none());
        assert_eq!(PageSet::of_words(vec![u64::MAX; 99], 3 << 20).count(), 768);
    }
}
