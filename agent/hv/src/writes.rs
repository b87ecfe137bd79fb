//! What this process has written into guest memory: one bit a page, set by the memory itself.
//!
//! KVM logs what the guest writes ([`crate::Vm::changes`]), and what the kernel writes for it. It does not see what the VMM
//! writes: used rings, blocks that were read, packets, entropy. So guest memory has a log of its own: each write through
//! `vm-memory` sets its bits here, and the two paths that hand bare pointers to the kernel (`readv` of packets, reads of volumes)
//! say afterwards what was written ([`mark_written`]).
//!
//! ```text
//!   off: no bits exist, a write costs one branch ── start ──► on, until the memory goes away
//!   on:  a write costs one atomic OR a 64 pages; take() hands over the bits and clears them
//! ```
//!
//! Invariants:
//! - A bit is set *after* its bytes are written. Who takes the bits and then reads the pages thus sees either the bytes, or
//!   the bit at the next turn: so the log can be read in rounds while the VM runs.
//! - No lock, and no allocation but that of `start`.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryMmap, GuestRegionMmap};

use crate::memory::PAGE_SIZE;

const PAGE: usize = PAGE_SIZE as usize;
const PAGES_OF_WORD: usize = u64::BITS as usize;

/// Guest memory that knows what was written into it: what [`crate::GuestMemory`] points to.
pub type GuestRam = GuestMemoryMmap<WriteLog>;

/// The log of one region.
#[derive(Debug, Default)]
pub struct WriteLog {
    words: OnceLock<Box<[AtomicU64]>>,
    bytes: usize,
}

impl WriteLog {
    /// Begins. What was written before is not in it.
    pub(crate) fn start(&self) {
        let words = self.bytes.div_ceil(PAGE).div_ceil(PAGES_OF_WORD);
        self.words.get_or_init(|| (0..words).map(|_| AtomicU64::new(0)).collect());
    }

    /// Adds the bits to `into` and clears them.
    pub(crate) fn take(&self, into: &mut [u64]) {
        for (word, into) in self.words.get().into_iter().flatten().zip(into) {
            // Acquire: what was written before a bit was set is seen by who reads the page now.
            *into |= word.swap(0, Ordering::AcqRel);
        }
    }

    /// Sets the bits of `first..=last`.
    fn mark(words: &[AtomicU64], first: usize, last: usize) {
        let mut page = first;
        while page <= last {
            let (at, bit) = (page / PAGES_OF_WORD, page % PAGES_OF_WORD);
            let count = (PAGES_OF_WORD - bit).min(last - page + 1);
            let mask = if count == PAGES_OF_WORD { u64::MAX } else { ((1 << count) - 1) << bit };
            // Past the end: a caller's range was checked against the memory, so this is never a write.
            let Some(word) = words.get(at) else { return };
            // Always the full operation, even if the bit seems set: it keeps the write before it from being seen later.
            word.fetch_or(mask, Ordering::AcqRel);
            page += count;
        }
    }
}

impl<'a> WithBitmapSlice<'a> for WriteLog {
    type S = WriteLogSlice<'a>;
}

impl Bitmap for WriteLog {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        let Some(words) = self.words.get() else { return };
        if len > 0 {
            WriteLog::mark(words, offset / PAGE, offset.saturating_add(len - 1) / PAGE);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE;
        let word = self.words.get().and_then(|words| words.get(page / PAGES_OF_WORD));
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (page % PAGES_OF_WORD) & 1 == 1)
    }

    fn slice_at(&self, offset: usize) -> WriteLogSlice<'_> {
        WriteLogSlice { log: self, base: offset }
    }
}

impl NewBitmap for WriteLog {
    fn with_len(len: usize) -> Self {
        WriteLog { words: OnceLock::new(), bytes: len }
    }
}

/// A part of a region's log, as `vm-memory`'s slices carry it.
#[derive(Clone, Copy)]
pub struct WriteLogSlice<'a> {
    log: &'a WriteLog,
    base: usize,
}

impl fmt::Debug for WriteLogSlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WriteLogSlice(from {})", self.base)
    }
}

impl WithBitmapSlice<'_> for WriteLogSlice<'_> {
    type S = Self;
}

impl BitmapSlice for WriteLogSlice<'_> {}

impl Bitmap for WriteLogSlice<'_> {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.log.mark_dirty(self.base.wrapping_add(offset), len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.dirty_at(self.base.wrapping_add(offset))
    }

    fn slice_at(&self, offset: usize) -> Self {
        WriteLogSlice { log: self.log, base: self.base.wrapping_add(offset) }
    }
}

/// Says that `len` bytes at the host's address `at` were written, past `vm-memory`. What is not of this memory is passed over.
pub fn mark_written(memory: &GuestRam, at: usize, len: usize) {
    for region in memory.iter() {
        let start = region.as_ptr() as usize;
        if let Some(offset) = at.checked_sub(start).filter(|offset| *offset < region.size()) {
            region_log(region).mark_dirty(offset, len.min(region.size() - offset));
            return;
        }
    }
}

/// Whether somebody wants to know what is written. It stays so until the memory goes away.
pub fn is_logged(memory: &GuestRam) -> bool {
    memory.iter().any(|region| region_log(region).words.get().is_some())
}

/// The log of a region itself, not a slice of it.
pub(crate) fn region_log(region: &GuestRegionMmap<WriteLog>) -> &WriteLog {
    let mapping: &vm_memory::MmapRegion<WriteLog> = region;
    mapping.bitmap()
}

#[cfg(test)]
#[path = "writes_test.rs"]
mod tests;
