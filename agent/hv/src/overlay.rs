//! Memory that goes on from several files: pieces of others are laid over the one that it was opened from.
//!
//! ```text
//!   open_private_memory(oldest) ─► lay_over(newer, piece) … ─► guest memory: each page from the newest file that has it
//! ```
//!
//! A piece is mapped like the rest: read when it is touched, private once it is written. Each costs the process a mapping, of which
//! the kernel grants some ten thousands: who has many small pieces copies those.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use crate::memory::{GuestMemory, PAGE_SIZE};

/// Lays the bytes `at..at + len` of `file` over the same place of the memory's file. Before anybody else uses the memory. The range
/// must be whole pages, lie within both files, and the file must stay as it is there as long as the memory lives.
pub fn lay_over(memory: &GuestMemory, file: &File, at: u64, len: u64) -> io::Result<()> {
    let refused = |what: &str| io::Error::new(io::ErrorKind::InvalidInput, what.to_owned());
    if !at.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) || len == 0 {
        return Err(refused("no whole pages"));
    }
    let end = at.checked_add(len).ok_or_else(|| refused("past the end"))?;
    if end > file.metadata()?.len() {
        return Err(refused("past the end of the file"));
    }
    let (mut from, offset_max) = (at, libc::off_t::MAX.cast_unsigned());
    for region in memory.iter() {
        let Some(start) = region.file_offset().map(|file| file.start()) else { continue };
        let stop = end.min(start.saturating_add(region.len()));
        if from < start || from >= stop || stop > offset_max {
            continue;
        }
        if region.flags() & libc::MAP_SHARED != 0 {
            return Err(refused("the memory is shared"));
        }
        let within = usize::try_from(from - start).map_err(io::Error::other)?;
        let count = usize::try_from(stop - from).map_err(io::Error::other)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: `within..within + count` lies in the region's own mapping, which is private and lives as long as `memory`; it is
        // replaced by a mapping of the same size and rights, which the region's unmapping takes away with the rest. No reference
        // into guest memory exists. The offset fits, as checked above.
        let mapped = unsafe {
            let place = region.as_ptr().add(within).cast();
            let mapped = libc::mmap(place, count, prot, flags, file.as_raw_fd(), from.cast_signed());
            if mapped != libc::MAP_FAILED {
                // As for the rest of the memory; nothing else depends on it.
                libc::madvise(mapped, count, libc::MADV_DONTDUMP);
            }
            mapped
        };
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        from = stop;
    }
    if from == end { Ok(()) } else { Err(refused("past the end of the memory")) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::{HIGH_RAM_START, LOW_RAM_END, create_memory, open_private_memory};

    fn file(bytes: u64) -> File {
        let memory = create_memory(bytes).expect("a file");
        let region = memory.iter().next().expect("one");
        region.file_offset().expect("a memfd").file().try_clone().expect("cloned")
    }

    /// Also where one piece lies on both sides of the PCI hole.
    #[test]
    fn pieces_lie_over_the_file_and_are_private() {
        let bytes = LOW_RAM_END + (1 << 20);
        let (below, above) = (file(bytes), file(bytes));
        above.write_all_at(&[7; 3 * 4096], LOW_RAM_END - 2 * 4096).expect("written");
        below.write_all_at(&[1; 4096], LOW_RAM_END - 3 * 4096).expect("written");
        let memory = open_private_memory(below.into(), bytes).expect("mapped");
        lay_over(&memory, &above, LOW_RAM_END - 2 * 4096, 3 * 4096).expect("laid");
        let read = |at| memory.read_obj::<u8>(GuestAddress(at)).expect("RAM");
        let pages = [LOW_RAM_END - 4096, HIGH_RAM_START + 4095, HIGH_RAM_START + 4096];
        assert_eq!((read(LOW_RAM_END - 3 * 4096), pages.map(read)), (1, [7, 7, 0]));
        memory.write_obj(9u8, GuestAddress(HIGH_RAM_START)).expect("RAM");
        let mut byte = [0];
        above.read_exact_at(&mut byte, LOW_RAM_END).expect("read");
        assert_eq!((byte, read(HIGH_RAM_START)), ([7], 9));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (below, above) = (file(1 << 20), file(1 << 19));
        let memory = open_private_memory(below.into(), 1 << 20).expect("mapped");
        for (at, len) in
            [(0, 0), (1, 4096), (0, 100), (1 << 19, 4096), ((1 << 19) - 4096, 8192), (u64::MAX - 4095, 4096)]
        {
            assert!(lay_over(&memory, &above, at, len).is_err(), "{at} {len}");
        }
        assert!(lay_over(&memory, &file(2 << 20), (1 << 20) - 4096, 8192).is_err(), "longer than the memory");
        lay_over(&memory, &above, 0, 1 << 19).expect("as long as the file");
        let shared = create_memory(1 << 20).expect("memory");
        assert!(lay_over(&shared, &above, 0, 4096).is_err(), "a VM's own memory");
    }
}
