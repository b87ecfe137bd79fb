//! Talking to a process: the client's side of `serio-control`, for tokio.
//!
//! Owns: one connection and the bound on each wait. Never: retries of a request (a request may not be done twice).
//!
//! The whole exchange stands under one deadline, so that a peer which trickles bytes, or accepts and never
//! answers, costs its caller that time and no thread.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    time::Duration,
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serio_control::{
    ChannelError, FrameError,
    frame::{self, PREFIX_BYTES},
    message::{Body, Frame},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::UnixStream,
    time::{sleep, timeout},
};
use zeroize::Zeroizing;

use super::error::TalkError;

/// Between two tries to connect while the listener's queue is full.
const CONNECT_RETRY: Duration = Duration::from_millis(10);

/// A connected control socket.
#[derive(Debug)]
pub(super) struct Link {
    stream: UnixStream,
    last_id: u64,
    /// For messages: `serio-vmm (process 7)`.
    peer: String,
}

fn io_error(doing: &'static str) -> impl FnOnce(io::Error) -> ChannelError {
    move |source| ChannelError::Io { doing, source }
}

impl Link {
    /// Connects; a listener whose queue is full is waited for within `wait`.
    pub(super) async fn connect(socket: &Path, peer: String, wait: Duration) -> Result<Self, TalkError> {
        let connecting = async {
            loop {
                match UnixStream::connect(socket).await {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => sleep(CONNECT_RETRY).await,
                    other => return other.map_err(io_error("connecting")),
                }
            }
        };
        match timeout(wait, connecting).await {
            Ok(stream) => Ok(Self { stream: stream?, last_id: 0, peer }),
            Err(_) => Err(TalkError::Silent { process: peer, waited: wait }),
        }
    }

    /// Sends a request with descriptors and waits for its reply.
    pub(super) async fn call(
        &mut self,
        body: Body,
        descriptors: &[OwnedFd],
        wait: Duration,
    ) -> Result<Body, TalkError> {
        let process = self.peer.clone();
        match timeout(wait, self.exchange(body, descriptors)).await {
            Ok(reply) => Ok(reply?),
            Err(_) => Err(TalkError::Silent { process, waited: wait }),
        }
    }

    async fn exchange(&mut self, body: Body, descriptors: &[OwnedFd]) -> Result<Body, ChannelError> {
        self.last_id += 1;
        let id = self.last_id;
        let frame = Frame { id, descriptors: descriptors.len() as u32, body: Some(body) };
        // There may be a key in it.
        let bytes = Zeroizing::new(frame::encode(&frame)?);
        let sent = self.send_first(&bytes, descriptors).await?;
        // A stream may take less than all; the descriptors went with the first byte.
        self.stream.write_all(bytes.get(sent..).unwrap_or_default()).await.map_err(io_error("sending"))?;
        loop {
            let frame = self.receive().await?;
            match frame.body {
                Some(Body::VmChanged(_)) => {}
                Some(Body::Failed(failed)) if frame.id == id => return Err(ChannelError::Refused(failed)),
                Some(body) if frame.id == id => return Ok(body),
                _ => return Err(ChannelError::Unexpected),
            }
        }
    }

    /// Resolves when the peer tells by itself that something has changed.
    pub(super) async fn changed(&mut self) -> Result<(), TalkError> {
        match self.receive().await?.body {
            Some(Body::VmChanged(_)) => Ok(()),
            _ => Err(ChannelError::Unexpected.into()),
        }
    }

    async fn send_first(&self, bytes: &[u8], descriptors: &[OwnedFd]) -> Result<usize, ChannelError> {
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        // cmsghdr (16 bytes on 64-bit Linux) + the descriptors, with room for alignment.
        let mut space = vec![MaybeUninit::uninit(); 32 + borrowed.len() * 4];
        let mut fits = true;
        let sent = self.stream.async_io(Interest::WRITABLE, || {
            let mut rights = SendAncillaryBuffer::new(&mut space);
            if !borrowed.is_empty() {
                fits = rights.push(SendAncillaryMessage::ScmRights(&borrowed));
                if !fits {
                    return Err(io::ErrorKind::InvalidInput.into());
                }
            }
            Ok(sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut rights, SendFlags::NOSIGNAL)?)
        });
        let sent = sent.await;
        if !fits {
            return Err(FrameError::TooManyDescriptors(borrowed.len()).into());
        }
        sent.map_err(io_error("sending"))
    }

    /// The next frame. Descriptors that a peer would send are dropped by the kernel: none is ever expected here.
    async fn receive(&mut self) -> Result<Frame, ChannelError> {
        let mut prefix = [0_u8; PREFIX_BYTES];
        match self.stream.read_exact(&mut prefix).await {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(ChannelError::Closed),
            Err(e) => return Err(io_error("waiting for a frame")(e)),
        }
        let mut body = vec![0; frame::body_len(prefix)?];
        self.stream.read_exact(&mut body).await.map_err(io_error("reading a frame"))?;
        Ok(frame::decode(&body)?)
    }
}

/// Connects, asks one thing, hangs up.
pub(super) async fn ask(socket: &Path, peer: String, body: Body, wait: Duration) -> Result<Body, TalkError> {
    ask_with(socket, peer, body, &[], wait).await
}

/// As [`ask`], with descriptors.
pub(super) async fn ask_with(
    socket: &Path,
    peer: String,
    body: Body,
    descriptors: &[OwnedFd],
    wait: Duration,
) -> Result<Body, TalkError> {
    Link::connect(socket, peer, wait).await?.call(body, descriptors, wait).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use serio_control::{Channel, message::Empty};
    use std::{os::unix::net::UnixListener, thread};

    fn listener() -> (tempfile::TempDir, std::path::PathBuf, UnixListener) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        (dir, path, listener)
    }

    #[tokio::test]
    async fn a_request_with_descriptors_reaches_the_blocking_side() {
        let (_dir, path, listener) = listener();
        let peer = thread::spawn(move || {
            let mut channel = Channel::new(listener.accept().unwrap().0);
            let (frame, fds) = channel.receive().unwrap();
            channel.send(0, Body::VmChanged(Default::default()), &[]).unwrap();
            channel.send(frame.id, Body::Done(Empty {}), &[]).unwrap();
            fds.len()
        });
        let fds: Vec<OwnedFd> = (0..200).map(|_| tempfile::tempfile().unwrap().into()).collect();
        let reply =
            ask_with(&path, "x".into(), Body::Stop(Empty {}), &fds, Duration::from_secs(10)).await.unwrap();
        assert_eq!(reply, Body::Done(Empty {}));
        assert_eq!(peer.join().unwrap(), 200);
    }

    #[tokio::test]
    async fn a_peer_that_accepts_and_is_silent_costs_a_bounded_wait() {
        let (_dir, path, _listener) = listener();
        let error =
            ask(&path, "x".into(), Body::Stop(Empty {}), Duration::from_millis(20)).await.unwrap_err();
        assert!(matches!(error, TalkError::Silent { .. }), "{error}");
    }

    #[tokio::test]
    async fn garbage_and_a_closed_socket_are_errors() {
        let (_dir, path, listener) = listener();
        let peer = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            std::io::Write::write_all(&mut stream, &[0xff; 64]).unwrap();
            let (stream, _) = listener.accept().unwrap();
            drop(stream);
        });
        let wait = Duration::from_secs(10);
        let error = ask(&path, "x".into(), Body::Stop(Empty {}), wait).await.unwrap_err();
        assert!(matches!(error, TalkError::Channel(_)), "{error}");
        let error = ask(&path, "x".into(), Body::Stop(Empty {}), wait).await.unwrap_err();
        assert!(matches!(error, TalkError::Channel(_)), "{error}");
        peer.join().unwrap();
    }
}
