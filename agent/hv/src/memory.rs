//! Guest memory: a memfd, mapped once and shared by KVM, the vcpus and all device threads.
//!
//! Owns where RAM lies in the guest's address space and how it is backed. Never touches its contents, so that a
//! new VM costs no page of the host until the guest or the loader writes one.
//!
//! ```text
//!   guest address   0 ............ 3 GiB ......... 4 GiB ....................
//!                   RAM            PCI hole        the rest of RAM
//!   memfd offset    0 ............ 3 GiB           3 GiB ....................
//! ```
//!
//! A memfd (not anonymous memory) so that its pages can be handed to another process by descriptor: snapshots,
//! vhost-user, live updates of the VMM.

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use vm_memory::bitmap::NewBitmap as _;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion, mmap::MmapRegionBuilder,
};

use crate::writes::{GuestRam, WriteLog};

/// Guest memory as every part of the VMM holds it: cheap to clone, mapped as long as one clone lives.
pub type GuestMemory = Arc<GuestRam>;

/// Sizes of guest memory are multiples of this.
pub const PAGE_SIZE: u64 = 4096;

/// RAM below this address, in bytes; then comes the PCI hole.
pub const LOW_RAM_END: u64 = 3 << 30;

/// Where RAM goes on above the PCI hole.
pub const HIGH_RAM_START: u64 = 4 << 30;

/// Why guest memory cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Nothing can be built of this size.
    #[error("memory of {bytes} bytes is refused: give a multiple of 4096 that is not zero")]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// The host refuses to back that much.
    #[error("the host cannot back {bytes} bytes of guest memory: ask for less")]
    Backing {
        /// What was asked for.
        bytes: u64,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// Not a whole number of huge pages.
    #[error(
        "memory of {bytes} bytes is no whole number of pages of {page_bytes} bytes: round it up, or use small pages"
    )]
    HugeSize {
        /// What was asked for.
        bytes: u64,
        /// The size of a page.
        page_bytes: u64,
    },
    /// The host's pool of huge pages has not enough free ones.
    #[error(
        "the host has not enough free huge pages of {page_bytes} bytes for {bytes} bytes: reserve more \
         (/sys/kernel/mm/hugepages), or use small pages"
    )]
    HugePages {
        /// What was asked for.
        bytes: u64,
        /// The size of a page.
        page_bytes: u64,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// The passed descriptor holds less than the size it came with.
    #[error("the memory descriptor holds {held} bytes, {bytes} are needed")]
    Short {
        /// The size of the file behind the descriptor.
        held: u64,
        /// What was asked for.
        bytes: u64,
    },
    /// The mapping failed.
    #[error("cannot map {bytes} bytes of guest memory: ask for less, or raise the address-space limit")]
    Map {
        /// What was asked for.
        bytes: u64,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Where RAM of `bytes` lies in the guest: `(start, length)` in ascending order, one range or two.
pub fn ram_ranges(bytes: u64) -> Vec<(u64, u64)> {
    if bytes <= LOW_RAM_END {
        vec![(0, bytes)]
    } else {
        vec![(0, LOW_RAM_END), (HIGH_RAM_START, bytes - LOW_RAM_END)]
    }
}

/// Makes guest memory of `bytes`, backed by a new sealed memfd.
pub fn create_memory(bytes: u64) -> Result<GuestMemory, MemoryError> {
    create_memory_of(bytes, PageKind::Small)
}

/// The host's pages behind guest memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PageKind {
    /// 4 KiB, and 2 MiB where the host makes them by itself.
    #[default]
    Small,
    /// 2 MiB, from the host's reserved pool.
    Huge2M,
    /// 1 GiB, from the host's reserved pool.
    Huge1G,
}

impl PageKind {
    /// The kind with this size.
    pub fn of_bytes(bytes: u64) -> Option<PageKind> {
        [PageKind::Small, PageKind::Huge2M, PageKind::Huge1G].into_iter().find(|kind| kind.bytes() == bytes)
    }

    /// Bytes of a page.
    pub fn bytes(self) -> u64 {
        match self {
            PageKind::Small => PAGE_SIZE,
            PageKind::Huge2M => 2 << 20,
            PageKind::Huge1G => 1 << 30,
        }
    }

    fn memfd_flags(self) -> libc::c_uint {
        match self {
            PageKind::Small => 0,
            PageKind::Huge2M => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
            PageKind::Huge1G => libc::MFD_HUGETLB | libc::MFD_HUGE_1GB,
        }
    }
}

/// The same with pages of a kind. Huge ones are reserved for this VM now, or refused now: a guest that met an empty pool
/// later would be killed.
pub fn create_memory_of(bytes: u64, pages: PageKind) -> Result<GuestMemory, MemoryError> {
    check_size(bytes)?;
    if !bytes.is_multiple_of(pages.bytes()) {
        return Err(MemoryError::HugeSize { bytes, page_bytes: pages.bytes() });
    }
    let backing = |source| match pages {
        PageKind::Small => MemoryError::Backing { bytes, source },
        _ => MemoryError::HugePages { bytes, page_bytes: pages.bytes(), source },
    };
    let file = memfd(bytes, pages).map_err(backing)?;
    match map_pages(file, bytes, libc::MAP_SHARED, pages) {
        Err(MemoryError::Map { source, .. }) if pages != PageKind::Small => {
            Err(backing(std::io::Error::other(source)))
        }
        other => other,
    }
}

/// Makes guest memory of `bytes` over a descriptor that somebody passed, from its offset 0.
pub fn memory_from_fd(fd: OwnedFd, bytes: u64) -> Result<GuestMemory, MemoryError> {
    check_size(bytes)?;
    let file = File::from(fd);
    let held = file.metadata().map_err(|source| MemoryError::Backing { bytes, source })?.len();
    if held < bytes {
        return Err(MemoryError::Short { held, bytes });
    }
    map(file, bytes, libc::MAP_SHARED)
}

/// Makes guest memory of `bytes` whose contents are those of `file`, from its offset 0, until the guest writes: pages are
/// read when they are touched, and what is written stays in this process. The file must not change or shrink meanwhile.
pub fn open_private_memory(file: OwnedFd, bytes: u64) -> Result<GuestMemory, MemoryError> {
    check_size(bytes)?;
    let file = File::from(file);
    let held = file.metadata().map_err(|source| MemoryError::Backing { bytes, source })?.len();
    if held < bytes {
        return Err(MemoryError::Short { held, bytes });
    }
    map(file, bytes, libc::MAP_PRIVATE)
}

fn check_size(bytes: u64) -> Result<(), MemoryError> {
    // 1 << 46 is what four-level page tables of a guest can reach at most; the sums below stay far from overflow.
    if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) || bytes > 1 << 46 {
        return Err(MemoryError::Size { bytes });
    }
    Ok(())
}

fn memfd(bytes: u64, pages: PageKind) -> std::io::Result<File> {
    const NAME: &CStr = c"serio-guest";
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | pages.memfd_flags();
    // SAFETY: the name is a valid C string for the length of the call; the result is checked.
    let fd = unsafe { libc::memfd_create(NAME.as_ptr(), flags) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor, nobody else owns it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    // A file that shrank under the mapping would kill us with SIGBUS: whoever gets the descriptor cannot do that.
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: no memory is passed, only flags on our own descriptor.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(file)
}

fn map(file: File, bytes: u64, sharing: libc::c_int) -> Result<GuestMemory, MemoryError> {
    map_pages(file, bytes, sharing, PageKind::Small)
}

fn map_pages(
    file: File,
    bytes: u64,
    sharing: libc::c_int,
    pages: PageKind,
) -> Result<GuestMemory, MemoryError> {
    // Without NORESERVE the pool's pages are set aside for the mapping, or it fails.
    let reserve = if pages == PageKind::Small { libc::MAP_NORESERVE } else { 0 };
    let error = |source: Box<dyn std::error::Error + Send + Sync>| MemoryError::Map { bytes, source };
    let file = Arc::new(file);
    let mut regions = Vec::with_capacity(2);
    let mut offset = 0;
    for (start, len) in ram_ranges(bytes) {
        let size = usize::try_from(len).map_err(|e| error(e.into()))?;
        let region: MmapRegion<WriteLog> = MmapRegionBuilder::new_with_bitmap(size, WriteLog::with_len(size))
            .with_file_offset(FileOffset::from_arc(file.clone(), offset))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(reserve | sharing)
            .with_hugetlbfs(pages != PageKind::Small)
            .build()
            .map_err(|e| error(e.into()))?;
        // SAFETY: the range is the mapping just made. The first advice only keeps a customer's memory out of core
        // dumps, the second lets the host use 2 MiB pages where its shmem_enabled says `advise`: fewer faults and
        // shorter page walks for the guest. If one fails nothing else changes, so the results are ignored.
        unsafe {
            libc::madvise(region.as_ptr().cast(), size, libc::MADV_DONTDUMP);
            libc::madvise(region.as_ptr().cast(), size, libc::MADV_HUGEPAGE);
        }
        let region = GuestRegionMmap::new(region, GuestAddress(start))
            .ok_or_else(|| error("guest range overflows the address space".into()))?;
        regions.push(region);
        offset += len;
    }
    let memory = GuestMemoryMmap::from_regions(regions).map_err(|e| error(e.into()))?;
    Ok(Arc::new(memory))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend as _, GuestMemoryRegion};

    #[test]
    fn sizes_that_are_no_pages_are_refused() {
        for bytes in [0, 1, 4095, 4097, (64 << 20) + 1, u64::MAX, 1 << 60] {
            assert!(matches!(create_memory(bytes), Err(MemoryError::Size { .. })), "{bytes}");
        }
    }

    #[test]
    fn memory_past_three_gib_goes_on_at_four() {
        let memory = create_memory(LOW_RAM_END + (1 << 30)).expect("lazily backed");
        let regions: Vec<_> = memory.iter().map(|r| (r.start_addr().0, r.len())).collect();
        assert_eq!(regions, [(0, LOW_RAM_END), (HIGH_RAM_START, 1 << 30)]);
        memory.write_obj(7u32, GuestAddress(HIGH_RAM_START)).expect("RAM");
        assert!(memory.write_obj(7u32, GuestAddress(LOW_RAM_END)).is_err(), "the PCI hole is no RAM");
    }

    #[test]
    fn a_short_descriptor_is_refused() {
        let file = memfd(PAGE_SIZE, PageKind::Small).expect("memfd");
        assert!(matches!(memory_from_fd(file.into(), 2 * PAGE_SIZE), Err(MemoryError::Short { .. })));
    }

    /// On most hosts the pool is empty, which is the answer that matters; where it is not, the memory works.
    #[test]
    fn huge_pages_are_reserved_or_refused() {
        for pages in [PageKind::Huge2M, PageKind::Huge1G] {
            match create_memory_of(2 << 30, pages) {
                Ok(memory) => memory.write_obj(7u32, GuestAddress(0)).expect("RAM"),
                Err(error @ MemoryError::HugePages { .. }) => {
                    assert!(error.to_string().contains("reserve more"), "{error}")
                }
                Err(error) => panic!("{error}"),
            }
            assert!(matches!(
                create_memory_of(pages.bytes() + PAGE_SIZE, pages),
                Err(MemoryError::HugeSize { .. })
            ));
            assert_eq!(PageKind::of_bytes(pages.bytes()), Some(pages));
        }
        assert_eq!(PageKind::of_bytes(3), None);
    }
}
