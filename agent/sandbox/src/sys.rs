//! The system calls that have no safe wrapper: taking over inherited descriptors, closing the rest.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, PoisonError};

use crate::SandboxError;

/// What was taken already: a second owner of the same number would close it under the first.
static TAKEN: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

pub(crate) fn take_descriptor(number: RawFd) -> Result<OwnedFd, SandboxError> {
    // SAFETY: F_SETFD takes no pointer; an invalid number is an error, which is checked.
    if number < 0 || unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(SandboxError::NoDescriptor { number, source: io::Error::last_os_error() });
    }
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if number <= 2 || !taken.insert(number) {
        return Err(SandboxError::Taken(number));
    }
    // SAFETY: the descriptor is open, was inherited (callers name numbers from their command line only), and the set
    // above gives it out once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Closes all descriptors but 0, 1, 2 and `keep`.
pub(crate) fn close_others(keep: &[RawFd]) -> io::Result<()> {
    let kept: BTreeSet<u32> =
        keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).filter(|fd| *fd > 2).collect();
    let mut from = 3u32;
    for fd in kept {
        if fd > from {
            close_range(from, fd.saturating_sub(1))?;
        }
        from = fd.saturating_add(1);
    }
    close_range(from, u32::MAX)
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: no pointer is passed. Called at the start of a process, before anything here owns a descriptor in the
    // range, which the callers of `at_start` promise by calling it first.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, IntoRawFd};

    #[test]
    fn a_descriptor_is_taken_once() {
        let (reader, _writer) = std::io::pipe().expect("a pipe");
        let number = OwnedFd::from(reader).into_raw_fd();
        let taken = take_descriptor(number).expect("open");
        assert_eq!(taken.as_raw_fd(), number);
        assert!(matches!(take_descriptor(number), Err(SandboxError::Taken(_))));
        assert!(matches!(take_descriptor(1), Err(SandboxError::Taken(1))));
        for bad in [-1, 1_000_000] {
            assert!(matches!(take_descriptor(bad), Err(SandboxError::NoDescriptor { .. })));
        }
    }
}
