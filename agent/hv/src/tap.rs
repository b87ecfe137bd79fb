//! One queue of a tap interface as a descriptor: opening, what it must be, its offloads, whether it gets packets.
//!
//! Each packet starts with a `virtio_net_hdr` of 12 bytes (`struct virtio_net_hdr_v1`), which is what a guest's
//! virtio-net driver speaks too: checksum and segmentation requests pass through without being touched.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::vhost::VhostNet;

/// Bytes of the header in front of each packet.
pub const VNET_HEADER_BYTES: usize = 12;

/// `linux/if_tun.h`; libc does not have it.
const TUNSETSNDBUF: libc::c_ulong = 0x4004_54d4;
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name does not fit an interface.
    #[error("`{0}` is no name for a network interface: use 1 to 15 bytes")]
    Name(String),
    /// The descriptor is something else.
    #[error("the descriptor is no tap with IFF_NO_PI and IFF_VNET_HDR (its flags are {flags:#x})")]
    Flags {
        /// What TUNGETIFF said.
        flags: libc::c_int,
    },
    /// The kernel refused.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The answer.
        #[source]
        source: io::Error,
    },
}

/// What the guest takes without having asked for it in each packet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TapOffloads {
    /// Packets whose checksum is not filled in.
    pub checksum: bool,
    /// TCP over IPv4 in large segments.
    pub tso4: bool,
    /// TCP over IPv6 in large segments.
    pub tso6: bool,
}

/// An open queue of a tap, non-blocking.
#[derive(Debug)]
pub struct Tap {
    fd: OwnedFd,
    /// As the kernel has it: asking for what is so already is an error.
    attached: AtomicBool,
    name: String,
    vhost: Option<VhostNet>,
}

impl Tap {
    /// Opens up to `queues` queues of the interface `name`, and makes it if it is not there and the caller may. One that somebody
    /// made without `IFF_MULTI_QUEUE` gives one. The descriptor form is [`Tap::from_fd`].
    pub fn open(name: &str, queues: u16) -> Result<Vec<Tap>, TapError> {
        let bytes = name.as_bytes();
        if bytes.is_empty() || bytes.len() >= libc::IFNAMSIZ || bytes.contains(&0) {
            return Err(TapError::Name(name.to_owned()));
        }
        let wanted = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let mut flag = wanted;
        let first = Tap::open_queue(bytes, flag).or_else(|error| match &error {
            // How many queues it may have was settled when it was made.
            TapError::Io { source, .. } if source.raw_os_error() == Some(libc::EINVAL) => {
                flag = wanted ^ libc::IFF_MULTI_QUEUE;
                Tap::open_queue(bytes, flag)
            }
            _ => Err(error),
        })?;
        let more = if flag == 0 { 1 } else { queues };
        let rest = (1..more).map(|_| Tap::open_queue(bytes, flag));
        std::iter::once(Ok(first)).chain(rest).collect()
    }

    fn open_queue(name: &[u8], flag: libc::c_int) -> Result<Tap, TapError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(|source| TapError::Io { what: "open /dev/net/tun: load the module tun", source })?;
        let fd = OwnedFd::from(file);
        let mut request = empty_request();
        for (to, from) in request.ifr_name.iter_mut().zip(name) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = (FLAGS | flag) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives during the call.
        let done = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        check("attach to the tap interface: does it exist, and may this user open it?", done)?;
        Tap::finish(fd, &request, true)
    }

    /// Takes over a descriptor that somebody else opened.
    pub fn from_fd(fd: OwnedFd) -> Result<Tap, TapError> {
        let mut request = empty_request();
        // SAFETY: TUNGETIFF writes one `ifreq`, which lives during the call.
        let done = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
        check("ask the descriptor for its interface: is it a tap?", done)?;
        // SAFETY: TUNGETIFF filled in the flags, and every bit pattern is a value of this field.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags }) & 0xffff;
        if flags & FLAGS != FLAGS {
            return Err(TapError::Flags { flags });
        }
        // SAFETY: no memory is involved.
        let old = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
        check("read the tap's flags", old)?;
        // SAFETY: no memory is involved.
        let done = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, old | libc::O_NONBLOCK) };
        check("make the tap non-blocking", done)?;
        Tap::finish(fd, &request, flags & libc::IFF_DETACH_QUEUE == 0)
    }

    fn finish(fd: OwnedFd, interface: &libc::ifreq, attached: bool) -> Result<Tap, TapError> {
        let bytes = VNET_HEADER_BYTES as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which lives during the call.
        let done = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const bytes) };
        check("set the tap's header size", done)?;
        // Names that are no text are possible, and of no use to anybody.
        let bytes = interface.ifr_name.iter().map(|byte| byte.cast_unsigned());
        let name = String::from_utf8_lossy(&bytes.take_while(|byte| *byte != 0).collect::<Vec<_>>()).into();
        Ok(Tap { fd, attached: AtomicBool::new(attached), name, vhost: None })
    }

    /// Lets the kernel move its packets by itself, when somebody asks it to.
    pub fn set_vhost(&mut self, vhost: VhostNet) -> Result<(), TapError> {
        // As much as without a limit. But while there is one, the kernel looks at each packet for itself, and answers one that is too
        // short; else it would offer that to the tap again and again, for as long as the guest likes.
        let bytes = libc::c_int::MAX - 1;
        // SAFETY: TUNSETSNDBUF reads one int, which lives during the call.
        let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETSNDBUF, &raw const bytes) };
        check("bound what waits in the tap", done)?;
        self.vhost = Some(vhost);
        Ok(())
    }

    /// What can move its packets without us.
    pub fn vhost(&self) -> Option<&VhostNet> {
        self.vhost.as_ref()
    }

    /// Its interface's name, as it was when the queue was opened.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sets what packets may look like that are read from now on.
    pub fn set_offloads(&self, offloads: TapOffloads) -> io::Result<()> {
        let bit = |on: bool, bit: libc::c_uint| if on { bit } else { 0 };
        // Segmentation without checksum offload does not exist.
        let flags = bit(offloads.checksum, libc::TUN_F_CSUM)
            | bit(offloads.checksum && offloads.tso4, libc::TUN_F_TSO4)
            | bit(offloads.checksum && offloads.tso6, libc::TUN_F_TSO6);
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let done =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Whether the kernel steers packets to this queue (`TUNSETQUEUE`). Those that wait in it are lost when it is detached; what
    /// is written to it goes out all the same. `EINVAL`: the interface has one queue, or is gone.
    pub fn set_attached(&self, attached: bool) -> io::Result<()> {
        if self.attached.load(Ordering::Acquire) == attached {
            return Ok(());
        }
        let mut request = empty_request();
        let flag = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        request.ifr_ifru.ifru_flags = flag as libc::c_short;
        // SAFETY: TUNSETQUEUE reads one `ifreq`, which lives during the call.
        let done = unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        self.attached.store(attached, Ordering::Release);
        Ok(())
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn empty_request() -> libc::ifreq {
    // SAFETY: an all-zero `ifreq` is valid: arrays of integers and a union of plain data.
    unsafe { std::mem::zeroed() }
}

fn check(what: &'static str, done: libc::c_int) -> Result<(), TapError> {
    if done < 0 { Err(TapError::Io { what, source: io::Error::last_os_error() }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_tap_is_refused() {
        assert!(matches!(Tap::open("", 1), Err(TapError::Name(_))));
        assert!(matches!(Tap::open("a-name-too-long-by-far", 2), Err(TapError::Name(_))));
        let file = std::fs::File::open("/dev/null").expect("null");
        assert!(matches!(Tap::from_fd(file.into()), Err(TapError::Io { .. })));
    }
}
