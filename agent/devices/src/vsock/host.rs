//! The host's side: a listening socket for clients that want into the guest, and a way out for the guest.
//!
//! A guest's connection to port N goes to the socket `PATH_N`, if somebody listens there. A sealed process cannot
//! open paths, so it asks a **broker** (the daemon) over a connected `SOCK_SEQPACKET` socket:
//!
//! ```text
//!   → id: u32, port: u32          ← id: u32, errno: u32 (0: a connected stream socket comes along)
//! ```
//!
//! little-endian. The broker may go and come back as another: what is then under way is refused.

use std::ffi::OsStr;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketAddrUnix,
    SocketFlags, SocketType, connect, recvmsg, send, socket_with,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Bytes of a question to the broker, and of its answer.
const BROKER_MESSAGE_BYTES: usize = 8;

/// Where a guest's connections go.
#[derive(Debug)]
pub enum Outgoing {
    /// Nowhere: all are refused.
    Refuse,
    /// Port N to the listening socket at this path with `_N` appended.
    Path(PathBuf),
    /// To whoever is asked over this connected `SOCK_SEQPACKET` socket.
    Broker(OwnedFd),
}

/// What stays the same over resets of the device: its address and its sockets.
#[derive(Clone, Debug)]
pub struct VsockHost {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    guest_cid: u32,
    listener: UnixListener,
    outgoing: Mutex<Outgoing>,
    /// Rung when `outgoing` was replaced.
    changed: EventFd,
}

/// An answer of the broker.
pub(super) struct Brokered {
    pub(super) id: u32,
    pub(super) stream: Option<UnixStream>,
}

/// What the broker's socket had.
pub(super) enum FromBroker {
    Answer(Brokered),
    Nothing,
    /// It is gone, or talks nonsense.
    Gone,
}

impl VsockHost {
    /// A device whose guest has the address `guest_cid` (3 or more), reached through `listener`.
    pub fn new(guest_cid: u32, listener: UnixListener, outgoing: Outgoing) -> io::Result<VsockHost> {
        listener.set_nonblocking(true)?;
        let changed = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let inner = Inner { guest_cid, listener, outgoing: Mutex::new(outgoing), changed };
        Ok(VsockHost { inner: Arc::new(inner) })
    }

    /// From now on this is where the guest's connections go.
    pub fn set_outgoing(&self, outgoing: Outgoing) {
        *self.outgoing() = outgoing;
        // Cannot be full: the worker reads it.
        let _ = self.inner.changed.write(1);
    }

    /// The guest's address.
    pub fn guest_cid(&self) -> u32 {
        self.inner.guest_cid
    }

    pub(super) fn changed(&self) -> &EventFd {
        &self.inner.changed
    }

    pub(super) fn listener(&self) -> &UnixListener {
        &self.inner.listener
    }

    /// Poisoned only by a panic, and whole at every step.
    pub(super) fn outgoing(&self) -> MutexGuard<'_, Outgoing> {
        self.inner.outgoing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A nonblocking connection to a listening socket.
fn connect_to(name: &OsStr) -> Option<UnixStream> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).ok()?;
    connect(&fd, &SocketAddrUnix::new(name).ok()?).ok()?;
    Some(UnixStream::from(fd))
}

/// How a guest's wish to connect goes on.
pub(super) enum Dialled {
    Connected(UnixStream),
    /// The broker will answer.
    Later,
    Refused,
}

impl Outgoing {
    /// Connects to the host's `port`. Never blocks: a listener whose backlog is full refuses.
    pub(super) fn dial(&self, id: u32, port: u32) -> Dialled {
        match self {
            Outgoing::Refuse => Dialled::Refused,
            Outgoing::Path(path) => {
                let mut name = path.clone().into_os_string();
                name.push(format!("_{port}"));
                connect_to(&name).map_or(Dialled::Refused, Dialled::Connected)
            }
            Outgoing::Broker(broker) => {
                let mut message = [0; BROKER_MESSAGE_BYTES];
                for (slot, byte) in
                    message.iter_mut().zip(id.to_le_bytes().into_iter().chain(port.to_le_bytes()))
                {
                    *slot = byte;
                }
                match send(broker, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                    Ok(BROKER_MESSAGE_BYTES) => Dialled::Later,
                    _ => Dialled::Refused,
                }
            }
        }
    }

    /// The next answer of the broker.
    pub(super) fn answer(&self) -> FromBroker {
        let Outgoing::Broker(broker) = self else { return FromBroker::Nothing };
        let mut message = [0u8; BROKER_MESSAGE_BYTES];
        let mut slices = [IoSliceMut::new(&mut message)];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let bytes = match recvmsg(broker, &mut slices, &mut rights, flags) {
            Ok(received) => received.bytes,
            Err(Errno::AGAIN | Errno::INTR) => return FromBroker::Nothing,
            Err(_) => return FromBroker::Gone,
        };
        let descriptor = rights.drain().find_map(|right| match right {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        if bytes != BROKER_MESSAGE_BYTES {
            return FromBroker::Gone;
        }
        let number = |at: usize| {
            message.iter().skip(at).take(4).rev().fold(0u32, |sum, byte| sum << 8 | u32::from(*byte))
        };
        let stream = descriptor.filter(|_| number(4) == 0).map(UnixStream::from);
        let stream = stream.filter(|stream| stream.set_nonblocking(true).is_ok());
        FromBroker::Answer(Brokered { id: number(0), stream })
    }

    /// What is to be watched for answers.
    pub(super) fn broker(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Outgoing::Broker(broker) => Some(broker.as_fd()),
            _ => None,
        }
    }
}
