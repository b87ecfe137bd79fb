//! The system calls that have no safe wrapper: taking over inherited descriptors, closing the rest, dropping
//! capabilities.

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
    // SAFETY: no pointer is passed. Called at the start of a process, before anything here owns a descriptor that the
    // caller of `seal` did not name.
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Version 3 of the kernel's structure: two words of 32 bits for each set.
#[repr(C)]
struct CapHeader {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapSets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const CAP_VERSION_3: u32 = 0x2008_0522;
/// Bits beyond the last capability that any kernel has are refused, which ends the loop.
const CAP_LAST_MAX: libc::c_ulong = 63;
/// Root is nobody special, changes of user give nothing, ambient capabilities are refused; all of it locked.
const SECUREBITS: libc::c_ulong = 0b1110_1111;

/// Drops all capabilities from all sets, for ever. Without the right to change the bounding set and the secure bits
/// (an ordinary user) those stay: with no capability and no new privileges nothing can be gained from them.
pub(crate) fn drop_capabilities() -> io::Result<()> {
    // SAFETY: these operations of prctl take numbers only; failures leave what was.
    unsafe {
        for capability in 0..=CAP_LAST_MAX {
            if libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) < 0 {
                break;
            }
        }
        libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
        libc::prctl(libc::PR_SET_SECUREBITS, SECUREBITS, 0, 0, 0);
    }
    let header = CapHeader { version: CAP_VERSION_3, pid: 0 };
    let none = [CapSets { effective: 0, permitted: 0, inheritable: 0 }; 2];
    // SAFETY: both pointers are to live values of the layout that version 3 asks for; the kernel reads them only.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// One heap for all threads. With several, libc's allocator opens files now and then: to learn how many processors there
/// are, and whether memory may be given back (`/sys/devices/system/cpu/online`, `/proc/sys/vm/overcommit_memory`).
pub(crate) fn use_one_heap() {
    // SAFETY: mallopt takes two numbers; the process has one thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
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
