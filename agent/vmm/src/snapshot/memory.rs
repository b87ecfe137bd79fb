//! The file `memory`: RAM at its offset, pages of zeros as holes.
//!
//! Memory that no guest has ever touched has no pages in the VM's own memory file either, so it is not even looked at: saving
//! takes as long as what is there. A VM that was restored has no such file of its own; all of it is read.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek64};
use serio_hv::vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};
use serio_hv::{GuestMemory, PAGE_SIZE};

const PAGE: usize = PAGE_SIZE as usize;
/// What is read at a time.
const PIECE: usize = 1 << 20;
static ZEROS: [u8; PAGE] = [0; PAGE];

/// Bytes of RAM.
pub(super) fn len(memory: &GuestMemory) -> u64 {
    memory.iter().map(|region| region.len()).sum()
}

/// Writes all of it; returns the bytes that are no hole.
pub(super) fn write(memory: &GuestMemory, out: &File) -> io::Result<u64> {
    // Also so that nothing of an older snapshot shines through.
    out.set_len(0)?;
    out.set_len(len(memory))?;
    let mut piece = vec![0; PIECE];
    let (mut offset, mut written) = (0u64, 0u64);
    for region in memory.iter() {
        let end = offset.saturating_add(region.len());
        let own = region.file_offset().filter(|_| region.flags() & nix::libc::MAP_PRIVATE == 0);
        let mut at = offset;
        while let Some((from, to)) = next_data(own.map(|file| file.file()), at, end)? {
            let address = region.start_addr().0.saturating_add(from.saturating_sub(offset));
            written = written.saturating_add(copy(memory, out, &mut piece, (address, from, to))?);
            at = to;
        }
        offset = end;
    }
    Ok(written)
}

/// The next range of `at..end` that may have data. Without a file that is all of it.
fn next_data(file: Option<&File>, at: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
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

/// Copies guest memory from `address` on to `from..to` of the file.
fn copy(
    memory: &GuestMemory,
    out: &File,
    piece: &mut [u8],
    (address, from, to): (u64, u64, u64),
) -> io::Result<u64> {
    let (mut address, mut offset, mut written) = (address, from, 0u64);
    while offset < to {
        let len = usize::try_from(to.saturating_sub(offset)).unwrap_or(PIECE).min(piece.len());
        let Some(bytes) = piece.get_mut(..len) else { break };
        memory.read_slice(bytes, GuestAddress(address)).map_err(io::Error::other)?;
        written = written.saturating_add(write_pages(out, bytes, offset)?);
        address = address.saturating_add(len as u64);
        offset = offset.saturating_add(len as u64);
    }
    Ok(written)
}

/// Writes runs of pages that are not zero.
fn write_pages(out: &File, bytes: &[u8], offset: u64) -> io::Result<u64> {
    let is_zero = |page: &[u8]| ZEROS.get(..page.len()).is_some_and(|zeros| zeros == page);
    let pages: Vec<&[u8]> = bytes.chunks(PAGE).collect();
    let (mut at, mut written) = (0usize, 0u64);
    for run in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let len: usize = run.iter().map(|page| page.len()).sum();
        let end = at.saturating_add(len);
        if !run.first().is_some_and(|page| is_zero(page))
            && let Some(part) = bytes.get(at..end)
        {
            out.write_all_at(part, offset.saturating_add(at as u64))?;
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
