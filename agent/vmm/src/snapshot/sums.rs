//! Checksums of the file `memory`, kept in `state`: a byte that has changed is noticed, not executed.
//!
//! ```text
//!   one sum for each 2 MiB of the file: CRC-32C over its pages that are not zero, in ascending order,
//!   each as its number within the 2 MiB (u32, little-endian) and its 4096 bytes; 0 where there is none
//! ```
//!
//! Pages of zeros and holes are the same to it, so that neither costs anything, and a file may be made sparser or less sparse by
//! whoever copies it. What is read goes through a buffer: no page of a guest is mapped by the check.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::memory::{PAGE, PIECE, is_zero, next_data};
use super::pages::PageSet;

/// What one sum covers.
pub(super) const CHUNK_BYTES: u64 = 2 << 20;
const PAGES_OF_CHUNK: u64 = CHUNK_BYTES / PAGE as u64;

/// The sums of a memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sums {
    memory_bytes: u64,
    chunks: Vec<u32>,
}

/// The memory is not what was saved.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// A sum is another one.
    #[error(
        "the saved memory is damaged: the checksum of the {CHUNK_BYTES} bytes at {offset} is wrong; go on from another snapshot"
    )]
    Damaged {
        /// Where they begin.
        offset: u64,
    },
    /// It cannot be read.
    #[error("cannot read the saved memory at byte {offset}")]
    Io {
        /// Where.
        offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Sums {
    /// Of nothing but zeros, for so many bytes.
    pub(super) fn of_zeros(memory_bytes: u64) -> Sums {
        let chunks = usize::try_from(memory_bytes.div_ceil(CHUNK_BYTES)).unwrap_or(usize::MAX);
        Sums { memory_bytes, chunks: vec![0; chunks] }
    }

    /// As saved; `None`: not as many as such a memory has.
    pub(super) fn of_saved(chunks: Vec<u32>, memory_bytes: u64) -> Option<Sums> {
        let right = chunks.len() as u64 == memory_bytes.div_ceil(CHUNK_BYTES);
        right.then_some(Sums { memory_bytes, chunks })
    }

    /// As they are saved.
    pub(super) fn chunks(&self) -> &[u32] {
        &self.chunks
    }

    /// Takes in a page that is not zero, which lies at `offset`. Ascending.
    pub(super) fn add(&mut self, offset: u64, page: &[u8]) {
        let chunk = usize::try_from(offset / CHUNK_BYTES).ok().and_then(|at| self.chunks.get_mut(at));
        if let Some(sum) = chunk {
            let number = u32::try_from(offset / PAGE as u64 % PAGES_OF_CHUNK).unwrap_or(0);
            *sum = crc32c::crc32c_append(crc32c::crc32c_append(*sum, &number.to_le_bytes()), page);
        }
    }

    /// Reads all that the file has of them, and compares: of a diff only its `pages`, since the rest of its file is nobody's.
    /// `go_on` is asked now and then: `false` ends it early.
    pub fn check(
        &self,
        file: &File,
        pages: Option<&PageSet>,
        mut go_on: impl FnMut() -> bool,
    ) -> Result<(), CheckError> {
        let ours = |at: u64| pages.is_none_or(|pages| pages.contains(at / PAGE as u64));
        let mut found = Sums::of_zeros(self.memory_bytes);
        let mut piece = vec![0; PIECE];
        let (mut offset, mut compared) = (0, 0);
        let io = |offset| move |source| CheckError::Io { offset, source };
        while let Some((from, to)) = next_data(Some(file), offset, self.memory_bytes).map_err(io(offset))? {
            offset = from;
            while offset < to {
                let len = usize::try_from(to.saturating_sub(offset)).unwrap_or(PIECE).min(piece.len());
                let Some(bytes) = piece.get_mut(..len).filter(|_| go_on()) else { return Ok(()) };
                file.read_exact_at(bytes, offset).map_err(io(offset))?;
                for (at, page) in (offset..).step_by(PAGE).zip(bytes.chunks(PAGE)) {
                    if !is_zero(page) && ours(at) {
                        found.add(at, page);
                    }
                }
                offset = offset.saturating_add(len as u64);
                self.compare(&found, &mut compared, offset)?;
            }
        }
        self.compare(&found, &mut compared, u64::MAX)
    }

    /// Those chunks that end before `offset` and were not compared before.
    fn compare(&self, found: &Sums, compared: &mut usize, offset: u64) -> Result<(), CheckError> {
        let before = usize::try_from(offset / CHUNK_BYTES).unwrap_or(usize::MAX);
        let pairs = self.chunks.iter().zip(&found.chunks).enumerate().take(before).skip(*compared);
        *compared = before;
        for (chunk, (saved, found)) in pairs {
            if saved != found {
                return Err(CheckError::Damaged { offset: (chunk as u64).saturating_mul(CHUNK_BYTES) });
            }
        }
        Ok(())
    }
}
