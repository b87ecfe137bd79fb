//! Primitives as plain system calls, done at once: where io_uring is forbidden, and on the simulated disk.

use std::os::fd::AsRawFd;

use libc::{c_int, iovec, off_t};
use nix::fcntl::FallocateFlags;

use super::{Io, errno_of};
use crate::media::Media;

/// Runs one primitive; the count, or a negative errno.
///
/// # Safety
/// Each iovec must point to memory that is valid for its length and that nothing else in this process refers to.
pub(super) unsafe fn run(io: &Io, iovecs: &[iovec], files: &[Media]) -> i32 {
    let file = match io {
        Io::Read { file, .. }
        | Io::Write { file, .. }
        | Io::SyncData { file }
        | Io::Allocate { file, .. } => &files[*file as usize],
    };
    match io {
        // SAFETY: the caller's promise is passed on.
        Io::Read { offset, .. } => unsafe { transfer(file, iovecs, *offset, false) },
        // SAFETY: the caller's promise is passed on.
        Io::Write { offset, .. } => unsafe { transfer(file, iovecs, *offset, true) },
        Io::SyncData { .. } => file.sync_data().map_or_else(|e| errno_of(&e), |()| 0),
        Io::Allocate { mode, offset, len, .. } => file
            .fallocate(FallocateFlags::from_bits_retain(*mode), *offset, *len)
            .map_or_else(|e| errno_of(&e), |()| 0),
    }
}

/// # Safety
/// As [`run`].
unsafe fn transfer(file: &Media, iovecs: &[iovec], offset: u64, write: bool) -> i32 {
    match file {
        Media::File(file) => {
            let (fd, count) = (file.as_raw_fd(), iovecs.len() as c_int);
            let offset = offset as off_t;
            // SAFETY: the descriptor is open, and the caller vouches for the iovecs.
            let n = unsafe {
                if write {
                    libc::pwritev(fd, iovecs.as_ptr(), count, offset)
                } else {
                    libc::preadv(fd, iovecs.as_ptr(), count, offset)
                }
            };
            // One call moves at most 2 GiB - 4 KiB, so the count fits.
            if n < 0 { errno_of(&std::io::Error::last_os_error()) } else { n as i32 }
        }
        #[cfg(test)]
        Media::Sim(sim) => {
            let mut at = offset;
            for v in iovecs {
                // SAFETY: the caller vouches for the memory, and in tests no guest changes it.
                let bytes = unsafe { std::slice::from_raw_parts_mut(v.iov_base.cast::<u8>(), v.iov_len) };
                let result = if write { sim.write_all_at(bytes, at) } else { sim.read_exact_at(bytes, at) };
                if let Err(e) = result {
                    return errno_of(&e);
                }
                at += v.iov_len as u64;
            }
            (at - offset) as i32
        }
    }
}
