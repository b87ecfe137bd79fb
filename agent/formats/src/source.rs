//! The bytes of an image file: a regular file or a block device, with the length that it had when it was opened.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::unix::fs::FileExt,
};

use rustix::fs::{SeekFrom as Seeks, seek};

use super::Run;

/// See the head of this file.
#[derive(Debug)]
pub struct Source {
    file: File,
    len: u64,
}

impl Source {
    /// Measures the file.
    pub fn new(file: File) -> io::Result<Source> {
        // A block device's metadata do not say its length; its end does.
        let len = (&file).seek(SeekFrom::End(0))?;
        Ok(Source { file, len })
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether a range lies in the file.
    pub fn holds(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.len)
    }

    /// Whether its first bytes are these.
    pub(super) fn starts_with(&self, bytes: &[u8]) -> io::Result<bool> {
        let mut first = vec![0; bytes.len()];
        self.read_padded_at(&mut first, 0)?;
        Ok(first == bytes)
    }

    /// The stretch of data or of a hole at `offset`, which lies in the file.
    pub(super) fn run(&self, offset: u64) -> Run {
        let left = self.len.saturating_sub(offset);
        let data = match seek(&self.file, Seeks::Data(offset)) {
            Ok(data) => data.saturating_sub(offset).min(left),
            // Only a hole is left.
            Err(rustix::io::Errno::NXIO) => left,
            // A file system or device that knows no holes: all is data.
            Err(_) => 0,
        };
        if data > 0 {
            return Run { len: data, zero: true };
        }
        let hole = seek(&self.file, Seeks::Hole(offset)).unwrap_or(self.len);
        Run { len: hole.saturating_sub(offset).clamp(1, left.max(1)), zero: false }
    }

    /// Fills the buffer; it must lie in the file.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    /// Fills the buffer; what lies behind the end of the file is zeros. The last cluster of an image may be cut short.
    pub fn read_padded_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let here = usize::try_from(self.len.saturating_sub(offset)).unwrap_or(usize::MAX).min(buffer.len());
        let (there, beyond) = buffer.split_at_mut(here);
        beyond.fill(0);
        self.file.read_exact_at(there, offset)
    }

    /// Reads a table of whole entries, whose place was checked.
    pub fn table(&self, offset: u64, bytes: usize) -> io::Result<Vec<u8>> {
        let mut table = vec![0; bytes];
        self.read_exact_at(&mut table, offset)?;
        Ok(table)
    }
}

/// Big-endian numbers of a table.
pub(super) fn be64(table: &[u8]) -> Vec<u64> {
    table.as_chunks::<8>().0.iter().map(|bytes| u64::from_be_bytes(*bytes)).collect()
}

/// Little-endian numbers of a table.
pub(super) fn le32(table: &[u8]) -> Vec<u32> {
    table.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect()
}

/// A number at a place of a header; zero past its end.
pub(super) fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk::<N>()).copied().unwrap_or([0; N])
}
