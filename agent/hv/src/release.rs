//! Giving guest memory back to the host, a range at a time.
//!
//! The guest names the ranges, so they are checked here against RAM. Shared memory gives its pages back by a hole in the
//! memory's file; a private mapping (a clone of a snapshot) drops its own copies, and what shows through is the file that
//! it was made from. Either way the guest has said that it does not need the contents, and to the log of writes it is changed.

use std::os::fd::AsRawFd;

use vm_memory::bitmap::Bitmap as _;
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _, GuestRegionMmap};

use crate::memory::{GuestMemory, PAGE_SIZE, PageKind};
use crate::writes::{WriteLog, region_log};

/// Gives back what lies wholly in `len` bytes from `start`; returns how many bytes that is. What is no RAM, or no whole
/// page of the host, is left alone.
pub fn release_memory(memory: &GuestMemory, start: GuestAddress, len: u64) -> std::io::Result<u64> {
    let Some(region) = memory.find_region(start) else { return Ok(0) };
    let Some(offset) = start.0.checked_sub(region.start_addr().0) else { return Ok(0) };
    let end = offset.saturating_add(len).min(region.len());
    let Some(file) = region.file_offset() else { return Ok(0) };
    let page = page_bytes(region);
    // In the file, because there lie the host's pages.
    let base = file.start();
    let first = base.saturating_add(offset).next_multiple_of(page);
    let last = base.saturating_add(end) / page * page;
    let Some(bytes) = last.checked_sub(first).filter(|bytes| *bytes > 0) else { return Ok(0) };
    let within = usize::try_from(first.saturating_sub(base)).map_err(std::io::Error::other)?;
    let count = usize::try_from(bytes).map_err(std::io::Error::other)?;
    if region.flags() & libc::MAP_SHARED != 0 {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let (at, len) = (to_offset(first)?, to_offset(bytes)?);
        // SAFETY: only numbers and our own descriptor. The range lies in the file, and the guest has given it up: its
        // pages read as zeros from now on, and all accesses to guest memory allow that it changes at any moment.
        if unsafe { libc::fallocate(file.file().as_raw_fd(), mode, at, len) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
        region_log(region).mark_dirty(within, count);
        return Ok(bytes);
    }
    // SAFETY: `within` and `count` were cut to the region's mapping above, and are multiples of its page. Dropping the
    // private copies changes contents only, which all accesses to guest memory allow at any moment.
    let dropped = unsafe { libc::madvise(region.as_ptr().add(within).cast(), count, libc::MADV_DONTNEED) };
    if dropped < 0 {
        return Err(std::io::Error::last_os_error());
    }
    region_log(region).mark_dirty(within, count);
    Ok(bytes)
}

fn to_offset(value: u64) -> std::io::Result<libc::off_t> {
    libc::off_t::try_from(value).map_err(std::io::Error::other)
}

/// The host's pages behind a region. Of pages of 1 GiB parts may be named too: the host clears those and keeps the page.
fn page_bytes(region: &GuestRegionMmap<WriteLog>) -> u64 {
    if region.is_hugetlbfs() == Some(true) { PageKind::Huge2M.bytes() } else { PAGE_SIZE }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{HIGH_RAM_START, LOW_RAM_END, create_memory};
    use std::os::unix::fs::MetadataExt;
    use vm_memory::Bytes;

    fn held(memory: &GuestMemory) -> u64 {
        let region = memory.find_region(GuestAddress(0)).expect("RAM");
        region.file_offset().expect("a memfd").file().metadata().expect("ours").blocks() * 512
    }

    #[test]
    fn whole_pages_are_given_back_and_read_as_zeros() {
        let memory = create_memory(4 << 20).expect("memory");
        memory.write_slice(&vec![7u8; 1 << 20], GuestAddress(0)).expect("RAM");
        let before = held(&memory);
        assert_eq!(
            release_memory(&memory, GuestAddress(100), 3 * PAGE_SIZE).expect("released"),
            2 * PAGE_SIZE
        );
        assert_eq!(release_memory(&memory, GuestAddress(0x1_0000), 0x8_0000).expect("released"), 0x8_0000);
        assert!(held(&memory) < before, "{} of {before} bytes are still held", held(&memory));
        let read = |at| memory.read_obj::<u8>(GuestAddress(at)).expect("RAM");
        assert_eq!(
            (read(50), read(PAGE_SIZE - 1), read(PAGE_SIZE), read(0x2_0000), read(0x9_0000)),
            (7, 7, 0, 0, 7)
        );
    }

    #[test]
    fn what_is_no_ram_is_left_alone() {
        let memory = create_memory(LOW_RAM_END + (1 << 20)).expect("memory");
        for (start, len) in [
            (LOW_RAM_END, PAGE_SIZE),
            (HIGH_RAM_START + (1 << 20), PAGE_SIZE),
            (u64::MAX - 10, u64::MAX),
            (0, 0),
            (1, 4095),
            (4095, 1),
        ] {
            assert_eq!(
                release_memory(&memory, GuestAddress(start), len).expect("nothing to do"),
                0,
                "{start:#x}"
            );
        }
        // Past the end of a region: only what is in it.
        let cut = release_memory(&memory, GuestAddress(LOW_RAM_END - PAGE_SIZE), u64::MAX).expect("released");
        assert_eq!(cut, PAGE_SIZE);
        let high = release_memory(&memory, GuestAddress(HIGH_RAM_START), 1 << 20).expect("released");
        assert_eq!(high, 1 << 20);
    }
}
