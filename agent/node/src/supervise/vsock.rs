//! The broker of a VM's vsock: the VMM may open nothing, so it asks here for a socket when the guest connects to a port of the
//! host, and gets one that is connected to `vsock_PORT` in the VM's run directory.
//!
//! ```text
//!   VMM ── id: u32, port: u32 ──▶ broker ── connect RUN/vms/UID/vsock_PORT
//!       ◀── id: u32, errno: u32, with the socket when it is 0 ──
//! ```
//! Owns: the broker's end of a `SOCK_SEQPACKET` pair, as long as the VMM has the other. Never waits for a listener: one whose
//! backlog is full refuses. What comes from the VMM is eight bytes or nonsense, which ends it.
//! Threads: a tokio task a VM.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    io::Errno,
    net::{
        AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
        SocketFlags, SocketType, connect, recv, sendmsg, socket_with,
    },
};
use tokio::{io::Interest, net::UnixDatagram};

use super::rundir::RunDir;

/// Bytes of a question, and of an answer.
const MESSAGE_BYTES: usize = 8;

/// Answers a VMM until it is gone.
pub(super) fn serve(broker: OwnedFd, run: RunDir) {
    tokio::spawn(async move {
        if let Err(error) = answer_all(broker, &run).await {
            tracing::warn!(run = %run.path().display(), "the guest's vsock connections are refused: {error}");
        }
    });
}

async fn answer_all(broker: OwnedFd, run: &RunDir) -> io::Result<()> {
    let broker = registered(broker)?;
    loop {
        let mut message = [0_u8; MESSAGE_BYTES];
        let asked = broker.async_io(Interest::READABLE, || {
            // TRUNC: what it had, also when that is more than fits.
            Ok(recv(&broker, &mut message[..], RecvFlags::DONTWAIT | RecvFlags::TRUNC)?)
        });
        match asked.await?.1 {
            0 => return Ok(()),
            MESSAGE_BYTES => {}
            bytes => return Err(io::Error::other(format!("the VMM asked with {bytes} bytes"))),
        }
        let [a, b, c, d, e, f, g, h] = message;
        let (id, port) = ([a, b, c, d], u32::from_le_bytes([e, f, g, h]));
        let found = dial(run, port);
        let errno = found.as_ref().err().map_or(0, |errno| errno.raw_os_error().unsigned_abs());
        let mut answer = [0_u8; MESSAGE_BYTES];
        for (slot, byte) in answer.iter_mut().zip(id.into_iter().chain(errno.to_le_bytes())) {
            *slot = byte;
        }
        let sent = broker.async_io(Interest::WRITABLE, || send(&broker, &answer, found.as_ref().ok()));
        match sent.await {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            other => other?,
        }
    }
}

/// The runtime watches it as a socket with messages, which it is; nonblocking.
fn registered(socket: OwnedFd) -> io::Result<UnixDatagram> {
    UnixDatagram::from_std(std::os::unix::net::UnixDatagram::from(socket))
}

fn dial(run: &RunDir, port: u32) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(run.vsock_port(port))?)?;
    Ok(socket)
}

fn send(fd: &UnixDatagram, answer: &[u8], socket: Option<&OwnedFd>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    let passed = socket.map(|socket| [socket.as_fd()]);
    if let Some(passed) = &passed {
        rights.push(SendAncillaryMessage::ScmRights(passed));
    }
    sendmsg(fd, &[IoSlice::new(answer)], &mut rights, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{io::IoSliceMut, os::unix::net::UnixListener};

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, recvmsg};

    use super::*;
    use crate::supervise::machine::broker_pair;

    async fn ask(vmm: &UnixDatagram, id: u32, port: u32) -> (u32, u32, Option<OwnedFd>) {
        let question = [id.to_le_bytes(), port.to_le_bytes()].concat();
        rustix::net::send(vmm, &question, SendFlags::NOSIGNAL).unwrap();
        let mut answer = [0_u8; 9];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let got = vmm.async_io(Interest::READABLE, || {
            Ok(recvmsg(vmm, &mut [IoSliceMut::new(&mut answer)], &mut rights, RecvFlags::empty())?)
        });
        assert_eq!(got.await.unwrap().bytes, MESSAGE_BYTES);
        let socket = rights.drain().find_map(|right| match right {
            RecvAncillaryMessage::ScmRights(mut sockets) => sockets.next(),
            _ => None,
        });
        let number = |at: usize| u32::from_le_bytes(answer[at..at + 4].try_into().unwrap());
        (number(0), number(4), socket)
    }

    #[tokio::test]
    async fn a_guest_reaches_who_listens_and_is_told_when_nobody_does() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path().to_owned());
        let (ours, theirs) = broker_pair().unwrap();
        let vmm = registered(theirs).unwrap();
        serve(ours, run.clone());
        let (id, errno, socket) = ask(&vmm, 7, 1024).await;
        assert_eq!((id, errno, socket.is_none()), (7, Errno::NOENT.raw_os_error().unsigned_abs(), true));
        let listener = UnixListener::bind(run.vsock_port(1024)).unwrap();
        let (id, errno, socket) = ask(&vmm, 8, 1024).await;
        assert_eq!((id, errno), (8, 0));
        let (mut there, _) = listener.accept().unwrap();
        rustix::io::write(socket.unwrap(), b"hi").unwrap();
        let mut heard = [0; 2];
        std::io::Read::read_exact(&mut there, &mut heard).unwrap();
        assert_eq!(&heard, b"hi");
        // Nonsense ends it.
        rustix::net::send(&vmm, b"nonsense?", SendFlags::NOSIGNAL).unwrap();
        let end =
            vmm.async_io(Interest::READABLE, || Ok(recv(&vmm, &mut [0_u8; 1][..], RecvFlags::empty())?));
        assert_eq!(end.await.unwrap().1, 0);
    }
}
