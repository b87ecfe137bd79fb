//! Whole packets between a descriptor and guest memory, without a copy in between: `readv` and `writev`.
//!
//! A packet device delivers one packet a call, so all of its segments have to go into one system call, and
//! `vm-memory` has none for several slices. Segments are checked against guest memory here, each time.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::iovec;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::writes::{GuestRam, mark_written};

/// The most pieces of one packet. A packet of 64 KiB in pages has 17.
pub const PACKET_SEGMENTS_MAX: usize = 256;

struct Iovecs {
    items: [iovec; PACKET_SEGMENTS_MAX],
    count: usize,
}

impl Iovecs {
    /// The iovecs of guest `segments`. The pointers are good for as long as `memory` is borrowed by the caller.
    fn new(
        memory: &GuestRam,
        segments: impl IntoIterator<Item = (GuestAddress, usize)>,
    ) -> io::Result<Iovecs> {
        let empty = iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let mut iovecs = Iovecs { items: [empty; PACKET_SEGMENTS_MAX], count: 0 };
        for (address, len) in segments {
            for slice in memory.get_slices(address, len) {
                let slice = slice.map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?;
                let item = iovecs.items.get_mut(iovecs.count).ok_or(io::ErrorKind::InvalidInput)?;
                *item = iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() };
                iovecs.count += 1;
            }
        }
        Ok(iovecs)
    }

    /// Tells the memory's log that the first `bytes` were written.
    fn mark_written(&self, memory: &GuestRam, bytes: usize) {
        let mut left = bytes;
        for item in self.items.iter().take(self.count) {
            mark_written(memory, item.iov_base as usize, item.iov_len.min(left));
            left = left.saturating_sub(item.iov_len);
            if left == 0 {
                return;
            }
        }
    }

    fn count(&self) -> libc::c_int {
        // At most PACKET_SEGMENTS_MAX.
        self.count as libc::c_int
    }
}

fn checked(bytes: isize) -> io::Result<usize> {
    usize::try_from(bytes).map_err(|_| io::Error::last_os_error())
}

/// Reads one packet into `segments`, in order. What does not fit is lost. `EFAULT`: a segment is not guest memory.
pub fn receive_packet(
    fd: BorrowedFd<'_>,
    memory: &GuestRam,
    segments: impl IntoIterator<Item = (GuestAddress, usize)>,
) -> io::Result<usize> {
    let iovecs = Iovecs::new(memory, segments)?;
    // SAFETY: the first `count` items describe memory that `memory` keeps mapped during this call; guest memory is
    // never a Rust reference, so the kernel may write to it.
    let read = checked(unsafe { libc::readv(fd.as_raw_fd(), iovecs.items.as_ptr(), iovecs.count()) })?;
    iovecs.mark_written(memory, read);
    Ok(read)
}

/// Writes `segments` as one packet. `EFAULT`: a segment is not guest memory.
pub fn send_packet(
    fd: BorrowedFd<'_>,
    memory: &GuestRam,
    segments: impl IntoIterator<Item = (GuestAddress, usize)>,
) -> io::Result<usize> {
    let iovecs = Iovecs::new(memory, segments)?;
    // SAFETY: as in `receive_packet`; the kernel only reads.
    checked(unsafe { libc::writev(fd.as_raw_fd(), iovecs.items.as_ptr(), iovecs.count()) })
}
