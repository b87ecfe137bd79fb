//! The kernel's own network device, vhost-net: it moves packets between a tap and a guest's rings by itself, without a thread of
//! ours on their way.
//!
//! ```text
//!   guest ── kick eventfd (KVM) ──► vhost worker ◄── tap queue
//!     ▲                                 │ copies packets in and out of guest memory
//!     └──────── irqfd (KVM) ◄───────────┘ call eventfd
//! ```
//!
//! - One open `/dev/vhost-net` is for one queue pair at a time. Whoever calls [`VhostNet::start`] first makes it the
//!   property of this process: the kernel's worker uses this process' mappings from then on.
//! - While it runs, nobody else may touch the rings. [`VhostNet::stop`] gives them back: nothing of the kernel is in them after it.
//! - The kernel does not say which pages it wrote: not for a VM whose changes are logged ([`crate::Vm::start_log`]).
//!
//! The calls and their structures are those of `linux/vhost.h` and `linux/vhost_types.h`.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemory;

/// Where the kernel offers it, once its module is loaded.
pub const VHOST_NET: &str = "/dev/vhost-net";

const GET_FEATURES: libc::c_ulong = 0x8008_af00;
const SET_FEATURES: libc::c_ulong = 0x4008_af00;
const SET_OWNER: libc::c_ulong = 0xaf01;
const SET_MEM_TABLE: libc::c_ulong = 0x4008_af03;
const SET_VRING_NUM: libc::c_ulong = 0x4008_af10;
const SET_VRING_ADDR: libc::c_ulong = 0x4028_af11;
const SET_VRING_BASE: libc::c_ulong = 0x4008_af12;
const SET_VRING_KICK: libc::c_ulong = 0x4008_af20;
const SET_VRING_CALL: libc::c_ulong = 0x4008_af21;
const SET_VRING_ERR: libc::c_ulong = 0x4008_af22;
const NET_SET_BACKEND: libc::c_ulong = 0x4008_af30;

/// Bytes of a descriptor, and of the entries and ends of the two rings (virtio 1.3 §2.7).
const DESCRIPTOR_BYTES: usize = 16;
const AVAIL_BYTES: usize = 2;
const USED_BYTES: usize = 8;
const ENDS_BYTES: usize = 6;
/// Of guest memory: two at most, see [`crate::ram_ranges`].
const REGIONS_MAX: usize = 2;

#[repr(C)]
struct VringState {
    index: u32,
    num: u32,
}

#[repr(C)]
struct VringFile {
    index: u32,
    fd: libc::c_int,
}

#[repr(C)]
struct VringAddr {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    avail: u64,
    log: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct MemoryRegion {
    guest: u64,
    bytes: u64,
    address: u64,
    flags: u64,
}

#[repr(C)]
struct MemoryTable {
    count: u32,
    padding: u32,
    regions: [MemoryRegion; REGIONS_MAX],
}

/// A ring as the kernel takes it over.
#[derive(Debug)]
pub struct VhostRing<'a> {
    /// Descriptors.
    pub size: u16,
    /// The next entry of the available ring.
    pub next_avail: u16,
    /// The descriptor table in guest memory.
    pub descriptors: GuestAddress,
    /// The driver's ring.
    pub avail: GuestAddress,
    /// The device's ring.
    pub used: GuestAddress,
    /// Signalled by the guest.
    pub kick: &'a EventFd,
    /// Signalled for the guest.
    pub call: &'a EventFd,
    /// Signalled when the ring makes no sense.
    pub error: &'a EventFd,
}

/// The kernel's device for one queue pair of a network card.
#[derive(Debug)]
pub struct VhostNet {
    fd: OwnedFd,
    features: u64,
    /// What the running device uses: it must not go away before it stops.
    memory: Mutex<Option<GuestMemory>>,
    /// It belongs to this process.
    owned: std::sync::OnceLock<()>,
}

impl VhostNet {
    /// Opens one, if the host has it and the caller may.
    pub fn open() -> io::Result<VhostNet> {
        VhostNet::from_fd(OpenOptions::new().read(true).write(true).open(VHOST_NET)?.into())
    }

    /// Takes over a descriptor that somebody else opened.
    pub fn from_fd(fd: OwnedFd) -> io::Result<VhostNet> {
        let mut features = 0u64;
        // SAFETY: VHOST_GET_FEATURES writes one u64, which lives during the call.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), GET_FEATURES, &raw mut features) })?;
        Ok(VhostNet { fd, features, memory: Mutex::new(None), owned: std::sync::OnceLock::new() })
    }

    /// The feature bits of virtio that it knows.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Moves packets between the `tap` and these rings, the one for receiving first, until [`VhostNet::stop`]. `features` are those
    /// that driver and device agreed on, as far as the kernel knows them. On an error nothing runs.
    pub fn start(
        &self,
        memory: &GuestMemory,
        features: u64,
        tap: BorrowedFd<'_>,
        rings: &[VhostRing<'_>; 2],
    ) -> io::Result<()> {
        let started = self.try_start(memory, features, tap, rings);
        if started.is_err() {
            // Perhaps half of it runs.
            self.stop();
        }
        started
    }

    fn try_start(
        &self,
        memory: &GuestMemory,
        features: u64,
        tap: BorrowedFd<'_>,
        rings: &[VhostRing<'_>; 2],
    ) -> io::Result<()> {
        if self.owned.get().is_none() {
            // SAFETY: VHOST_SET_OWNER takes no argument.
            check(unsafe { libc::ioctl(self.fd.as_raw_fd(), SET_OWNER) })?;
            let _ = self.owned.set(());
        }
        let features = features & self.features;
        // SAFETY: VHOST_SET_FEATURES reads one u64, which lives during the call.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), SET_FEATURES, &raw const features) })?;
        // Kept as long as the kernel may write to it.
        *self.memory.lock().unwrap_or_else(PoisonError::into_inner) = Some(memory.clone());
        self.set_memory(memory)?;
        for (index, ring) in (0u32..).zip(rings) {
            self.set_ring(memory, index, ring)?;
        }
        for index in 0..2 {
            self.set_file(NET_SET_BACKEND, index, tap.as_raw_fd())?;
        }
        // It looks at a ring when it is kicked, and perhaps it was before.
        rings.iter().try_for_each(|ring| ring.kick.write(1))
    }

    /// Ends it: when this returns, the kernel has finished with the rings, and nothing is left that could start it. What it took off
    /// the available rings it has given back, in that order, but for a chain that makes no sense to it: that is nowhere. So the used
    /// rings say how far it came, and not its own count of what it took (`VHOST_GET_VRING_BASE`).
    pub fn stop(&self) {
        for index in 0..2 {
            // Refused only where there was nothing to end. The kernel waits here for what is under way.
            let _ = self.set_file(NET_SET_BACKEND, index, -1);
            for what in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
                let _ = self.set_file(what, index, -1);
            }
        }
        *self.memory.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn set_memory(&self, memory: &GuestMemory) -> io::Result<()> {
        let mut regions = [MemoryRegion::default(); REGIONS_MAX];
        let count = memory.iter().count();
        if count > REGIONS_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (slot, region) in regions.iter_mut().zip(memory.iter()) {
            *slot = MemoryRegion {
                guest: region.start_addr().0,
                bytes: region.len(),
                address: region.as_ptr() as u64,
                flags: 0,
            };
        }
        let table = MemoryTable { count: count as u32, padding: 0, regions };
        // SAFETY: VHOST_SET_MEM_TABLE reads the head and `count` regions behind it, all of which live during the call. The
        // addresses are those of guest memory's own mapping, which `self.memory` keeps.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), SET_MEM_TABLE, &raw const table) })
    }

    fn set_ring(&self, memory: &GuestMemory, index: u32, ring: &VhostRing<'_>) -> io::Result<()> {
        self.set_state(SET_VRING_NUM, index, ring.size)?;
        self.set_state(SET_VRING_BASE, index, ring.next_avail)?;
        let size = usize::from(ring.size);
        let host = |at: GuestAddress, bytes: usize| {
            let slice =
                memory.get_slice(at, bytes).map_err(|_| io::Error::from_raw_os_error(libc::EFAULT))?;
            Ok::<u64, io::Error>(slice.ptr_guard().as_ptr() as u64)
        };
        let addresses = VringAddr {
            index,
            flags: 0,
            descriptors: host(ring.descriptors, size * DESCRIPTOR_BYTES)?,
            used: host(ring.used, size * USED_BYTES + ENDS_BYTES)?,
            avail: host(ring.avail, size * AVAIL_BYTES + ENDS_BYTES)?,
            log: 0,
        };
        // SAFETY: VHOST_SET_VRING_ADDR reads one `vhost_vring_addr`, which lives during the call. The addresses lie in guest
        // memory's own mapping, which `self.memory` keeps.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), SET_VRING_ADDR, &raw const addresses) })?;
        self.set_file(SET_VRING_ERR, index, ring.error.as_raw_fd())?;
        self.set_file(SET_VRING_CALL, index, ring.call.as_raw_fd())?;
        self.set_file(SET_VRING_KICK, index, ring.kick.as_raw_fd())
    }

    fn set_state(&self, what: libc::c_ulong, index: u32, num: u16) -> io::Result<()> {
        let state = VringState { index, num: num.into() };
        // SAFETY: the call reads one `vhost_vring_state`, which lives during the call.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), what, &raw const state) })
    }

    fn set_file(&self, what: libc::c_ulong, index: u32, fd: libc::c_int) -> io::Result<()> {
        let file = VringFile { index, fd };
        // SAFETY: the call reads one `vhost_vring_file`, which lives during the call; the kernel takes its own hold of the file.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), what, &raw const file) })
    }
}

impl Drop for VhostNet {
    fn drop(&mut self) {
        // Before the memory goes: the descriptor may be open elsewhere too. Who has stopped it asks for nothing here: the thread
        // that closes the last device of a machine may not even do that.
        if self.memory.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            self.stop();
        }
    }
}

fn check(done: libc::c_int) -> io::Result<()> {
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::mem::size_of;

    use super::*;

    /// The size of what a call passes stands in its number.
    #[test]
    fn the_calls_pass_what_their_numbers_say() {
        let bytes = |call: libc::c_ulong| (call >> 16 & 0x3fff) as usize;
        for call in [SET_VRING_NUM, SET_VRING_BASE] {
            assert_eq!(bytes(call), size_of::<VringState>());
        }
        for call in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR, NET_SET_BACKEND] {
            assert_eq!(bytes(call), size_of::<VringFile>());
        }
        assert_eq!(bytes(SET_VRING_ADDR), size_of::<VringAddr>());
        assert_eq!(bytes(SET_MEM_TABLE) + REGIONS_MAX * 32, size_of::<MemoryTable>());
        assert_eq!((bytes(GET_FEATURES), bytes(SET_FEATURES)), (8, 8));
    }

    #[test]
    fn what_is_no_vhost_is_refused() {
        let file = std::fs::File::open("/dev/null").expect("null");
        assert_eq!(VhostNet::from_fd(file.into()).err().and_then(|e| e.raw_os_error()), Some(libc::ENOTTY));
    }
}
