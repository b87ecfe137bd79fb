//! Whole packets between a descriptor and guest memory, without a copy in between: `readv` and `writev`.
//!
//! A packet device delivers one packet a call, so all of its segments have to go into one system call, and
//! `vm-memory` has none for several slices. Segments are checked against guest memory here, each time.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::iovec;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::writes::{GuestRam, mark_written};

/// The most pieces of one packet. A packet of 64 KiB in pages has 17.
pub const PACKET_SEGMENTS_MAX: usize = 256;

/// The first `count` items are made. The others are not even cleared, and nothing of it is ever moved: for a packet of one piece that
/// would be most of the work.
struct Iovecs {
    items: [MaybeUninit<iovec>; PACKET_SEGMENTS_MAX],
    count: usize,
}

impl Iovecs {
    fn none() -> Iovecs {
        Iovecs { items: [const { MaybeUninit::uninit() }; PACKET_SEGMENTS_MAX], count: 0 }
    }

    /// Adds the iovecs of guest `segments`. The pointers are good for as long as `memory` is borrowed by the caller.
    fn add(
        &mut self,
        memory: &GuestRam,
        segments: impl IntoIterator<Item = (GuestAddress, usize)>,
    ) -> io::Result<()> {
        for (address, len) in segments {
            for slice in memory.get_slices(address, len) {
                let slice = slice.map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?;
                let item = self.items.get_mut(self.count).ok_or(io::ErrorKind::InvalidInput)?;
                item.write(iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
                self.count += 1;
            }
        }
        Ok(())
    }

    fn as_slice(&self) -> &[iovec] {
        // SAFETY: `add` has made the first `count`, and `MaybeUninit` has the layout of what it holds.
        unsafe { std::slice::from_raw_parts(self.items.as_ptr().cast(), self.count) }
    }

    /// Tells the memory's log that the first `bytes` were written.
    fn mark_written(&self, memory: &GuestRam, bytes: usize) {
        let mut left = bytes;
        for item in self.as_slice() {
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
    let mut iovecs = Iovecs::none();
    iovecs.add(memory, segments)?;
    // SAFETY: the iovecs describe memory that `memory` keeps mapped during this call; guest memory is
    // never a Rust reference, so the kernel may write to it.
    let read = checked(unsafe { libc::readv(fd.as_raw_fd(), iovecs.as_slice().as_ptr(), iovecs.count()) })?;
    iovecs.mark_written(memory, read);
    Ok(read)
}

/// Writes `segments` as one packet. `EFAULT`: a segment is not guest memory.
pub fn send_packet(
    fd: BorrowedFd<'_>,
    memory: &GuestRam,
    segments: impl IntoIterator<Item = (GuestAddress, usize)>,
) -> io::Result<usize> {
    let mut iovecs = Iovecs::none();
    iovecs.add(memory, segments)?;
    // SAFETY: as in `receive_packet`; the kernel only reads.
    checked(unsafe { libc::writev(fd.as_raw_fd(), iovecs.as_slice().as_ptr(), iovecs.count()) })
}
