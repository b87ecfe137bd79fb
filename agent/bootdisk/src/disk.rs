//! The bytes of a disk, windows of them, and what one search may read in all.

use std::{cell::Cell, io, rc::Rc};

/// Bytes that can be read anywhere.
pub trait ReadAt {
    /// How many there are.
    fn size_bytes(&self) -> u64;

    /// Fills `buf` from `offset` on.
    ///
    /// # Errors
    /// The medium's; `UnexpectedEof` beyond the end.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
}

/// A disk in memory, for tests and fuzzing.
#[derive(Debug, Clone, Default)]
pub struct Memory(pub Vec<u8>);

impl ReadAt for Memory {
    fn size_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = usize::try_from(offset).ok().and_then(|at| self.0.get(at..at.checked_add(buf.len())?));
        buf.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl ReadAt for std::fs::File {
    fn size_bytes(&self) -> u64 {
        self.metadata().map_or(0, |metadata| metadata.len())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buf, offset)
    }
}

/// What a read costs beyond its bytes, so that many small ones come to an end too.
const READ_COST: u64 = 256;

/// A disk whose reads are counted: a search over a hostile disk ends.
pub(crate) struct Budgeted {
    disk: Box<dyn ReadAt>,
    left: Cell<u64>,
}

impl Budgeted {
    pub(crate) fn new(disk: Box<dyn ReadAt>, bytes: u64) -> Self {
        Self { disk, left: Cell::new(bytes) }
    }
}

impl ReadAt for Budgeted {
    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let cost = (buf.len() as u64).saturating_add(READ_COST);
        let left = self.left.get().checked_sub(cost).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::QuotaExceeded,
                "too much was read: the disk's structures make no end",
            )
        })?;
        self.left.set(left);
        self.disk.read_at(buf, offset)
    }
}

/// A stretch of a disk: a partition, or all of it. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Window {
    disk: Rc<Budgeted>,
    start: u64,
    len: u64,
}

impl Window {
    /// All of a disk.
    pub(crate) fn whole(disk: Rc<Budgeted>) -> Self {
        let len = disk.size_bytes();
        Self { disk, start: 0, len }
    }

    /// A part; `None` if it is not inside.
    pub(crate) fn part(&self, start: u64, len: u64) -> Option<Self> {
        let end = start.checked_add(len)?;
        let start_on_disk = self.start.checked_add(start)?;
        (end <= self.len && len > 0).then(|| Self { disk: Rc::clone(&self.disk), start: start_on_disk, len })
    }

    /// Exactly `N` bytes, or `None` beyond the end or on an error of the medium: for looking whether something is there.
    pub(crate) fn peek<const N: usize>(&self, offset: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.read_at(&mut bytes, offset).ok().map(|()| bytes)
    }
}

impl ReadAt for Window {
    fn size_bytes(&self) -> u64 {
        self.len
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= self.len);
        let at = self.start.checked_add(offset);
        match (end, at) {
            (Some(_), Some(at)) => self.disk.read_at(buf, at),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// Little-endian numbers out of bytes; `None` beyond their end.
pub(crate) fn le16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

/// As [`le16`].
pub(crate) fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// As [`le16`].
pub(crate) fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// As [`le16`], big-endian.
pub(crate) fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    le16(bytes, at).map(u16::swap_bytes)
}

/// As [`le16`], big-endian.
pub(crate) fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    le32(bytes, at).map(u32::swap_bytes)
}
