//! The file `memory`: RAM at its offset, pages of zeros as holes.
//!
//! Memory that no guest has ever touched has no pages in the VM's own memory file either, so it is not even looked at: saving
//! takes as long as what is there. A VM that was restored has no such file of its own; all of it is read. A diff takes only the pages
//! that it is given: what lies in its holes is zero if the page is one of them, and otherwise unknown to it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use serio_hv::vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};
use serio_hv::{GuestMemory, PAGE_SIZE};

use super::pages::PageSet;
use super::sums::Sums;

pub(super) const PAGE: usize = PAGE_SIZE as usize;
/// What is read at a time.
pub(super) const PIECE: usize = 1 << 20;
static ZEROS: [u8; PAGE] = [0; PAGE];

/// Bytes of RAM.
pub(super) fn len(memory: &GuestMemory) -> u64 {
    memory.iter().map(|region| region.len()).sum()
}

/// Writes all of it, or these pages; returns the bytes that are no hole, and their checksums.
pub(super) fn write(memory: &GuestMemory, pages: Option<&PageSet>, out: &File) -> io::Result<(u64, Sums)> {
    // Also so that nothing of an older snapshot shines through.
    out.set_len(0)?;
    out.set_len(len(memory))?;
    let mut copier = Copier { memory, out, piece: vec![0; PIECE], sums: Sums::of_zeros(len(memory)) };
    let (mut offset, mut written) = (0u64, 0u64);
    for region in memory.iter() {
        let end = offset.saturating_add(region.len());
        if let Some(pages) = pages {
            for run in pages.runs() {
                let from = run.start.saturating_mul(PAGE_SIZE).max(offset);
                let to = run.end.saturating_mul(PAGE_SIZE).min(end);
                let address = region.start_addr().0.saturating_add(from.saturating_sub(offset));
                written = written.saturating_add(copier.copy(address, (from, to))?);
            }
            offset = end;
            continue;
        }
        let own = region.file_offset().filter(|_| region.flags() & nix::libc::MAP_PRIVATE == 0);
        let mut at = offset;
        while let Some((from, to)) = next_data(own.map(|file| file.file()), at, end)? {
            let address = region.start_addr().0.saturating_add(from.saturating_sub(offset));
            written = written.saturating_add(copier.copy(address, (from, to))?);
            at = to;
        }
        offset = end;
    }
    Ok((written, copier.sums))
}

/// The next range of `at..end` that may have data. Without a file that is all of it.
pub(super) fn next_data(file: Option<&File>, at: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= end {
        return Ok(None);
    }
    let Some(file) = file else { return Ok(Some((at, end))) };
    let seek = |from: u64, whence| lseek64(file.as_fd(), from.cast_signed(), whence);
    let from = match seek(at, Whence::SeekData) {
        Ok(from) => from.cast_unsigned(),
        Err(Errno::ENXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if from >= end {
        return Ok(None);
    }
    let to = seek(from, Whence::SeekHole)?.cast_unsigned();
    Ok(Some((from, to.min(end))))
}

/// From memory to the file.
struct Copier<'a> {
    memory: &'a GuestMemory,
    out: &'a File,
    piece: Vec<u8>,
    sums: Sums,
}

impl Copier<'_> {
    /// Copies guest memory from `address` on to `from..to` of the file.
    fn copy(&mut self, mut address: u64, (from, to): (u64, u64)) -> io::Result<u64> {
        let (mut offset, mut written) = (from, 0u64);
        while offset < to {
            let len = usize::try_from(to.saturating_sub(offset)).unwrap_or(PIECE).min(self.piece.len());
            let Some(bytes) = self.piece.get_mut(..len) else { break };
            self.memory.read_slice(bytes, GuestAddress(address)).map_err(io::Error::other)?;
            written = written.saturating_add(write_pages(self.out, &mut self.sums, bytes, offset)?);
            address = address.saturating_add(len as u64);
            offset = offset.saturating_add(len as u64);
        }
        Ok(written)
    }
}

pub(super) fn is_zero(page: &[u8]) -> bool {
    ZEROS.get(..page.len()).is_some_and(|zeros| zeros == page)
}

/// Writes runs of pages that are not zero.
fn write_pages(out: &File, sums: &mut Sums, bytes: &[u8], offset: u64) -> io::Result<u64> {
    let pages: Vec<&[u8]> = bytes.chunks(PAGE).collect();
    let (mut at, mut written) = (0usize, 0u64);
    for run in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let len: usize = run.iter().map(|page| page.len()).sum();
        let end = at.saturating_add(len);
        if !run.first().is_some_and(|page| is_zero(page))
            && let Some(part) = bytes.get(at..end)
        {
            let start = offset.saturating_add(at as u64);
            // From what is written, not from guest memory again.
            for (place, page) in (start..).step_by(PAGE).zip(run) {
                sums.add(place, page);
            }
            out.write_all_at(part, start)?;
            written = written.saturating_add(len as u64);
        }
        at = end;
    }
    Ok(written)
}

/// Makes `bytes` all that the file holds.
pub(super) fn replace(file: &File, bytes: &[u8]) -> io::Result<()> {
    file.set_len(0)?;
    file.write_all_at(bytes, 0)
}

/// All of a file that is no longer than `bytes_max`.
pub(super) fn read_bounded(file: &File, bytes_max: u64) -> io::Result<Vec<u8>> {
    let held = file.metadata()?.len();
    if held > bytes_max {
        let what =
            format!("the file has {held} bytes, a saved state at most {bytes_max}: is it the right file?");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let mut bytes = vec![0; usize::try_from(held).unwrap_or(0)];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}
