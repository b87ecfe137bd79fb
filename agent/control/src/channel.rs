//! A blocking connection: frames in order, descriptors beside them.
//!
//! Used by `serio-vmm` and `serio-volumed` (a thread per client) and by `seriod` (on its blocking pool).
//! Reads honour the stream's read timeout, writes its write timeout: set both with [`Channel::set_timeout`], so
//! that a peer which stops half way costs a bounded wait.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::net::UnixStream,
    time::Duration,
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use zeroize::Zeroizing;

use crate::{
    frame::{self, DESCRIPTORS_MAX, FrameError, PREFIX_BYTES},
    message::{Body, Failed, Frame},
};

/// Why a connection is of no more use.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The peer closed, between two frames.
    #[error("the peer closed the connection")]
    Closed,
    /// A system call failed, or the peer was too slow.
    #[error("the control socket failed while {doing}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// The bytes are not a frame.
    #[error("the peer broke the protocol")]
    Frame(#[from] FrameError),
    /// A frame's count of descriptors differs from what arrived.
    #[error("a frame announced {announced} descriptors, {arrived} arrived")]
    Descriptors {
        /// What the frame says.
        announced: usize,
        /// What the kernel gave.
        arrived: usize,
    },
    /// The peer answered with something else than the reply that was waited for.
    #[error("the peer's answer does not fit the request")]
    Unexpected,
    /// The peer refused.
    #[error("{}", .0.message)]
    Refused(Failed),
}

/// Room for that many descriptors in a control message.
const fn rights_bytes(descriptors: usize) -> usize {
    // cmsghdr (16 bytes on 64-bit Linux) + the descriptors, with room for alignment.
    16 + descriptors * 4 + 16
}

impl ChannelError {
    fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }
}

/// A connected control socket.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
    last_id: u64,
    events: VecDeque<Body>,
}

/// Events kept while a caller waits for its reply; the oldest is dropped past it (status can be asked again).
const EVENTS_MAX: usize = 64;

impl Channel {
    /// Wraps a connected stream.
    #[must_use]
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, last_id: 0, events: VecDeque::new() }
    }

    /// Bounds each wait for the peer; `None` waits for ever.
    ///
    /// # Errors
    /// The system's.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.stream.set_read_timeout(timeout)?;
        self.stream.set_write_timeout(timeout)
    }

    /// The stream, for epoll and shutdown.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends a frame; its count of descriptors is filled in here.
    ///
    /// # Errors
    /// [`ChannelError::Io`], [`ChannelError::Frame`].
    pub fn send(&mut self, id: u64, body: Body, descriptors: &[BorrowedFd<'_>]) -> Result<(), ChannelError> {
        let frame = Frame { id, descriptors: descriptors.len() as u32, body: Some(body) };
        // There may be a key in it, here and below.
        let bytes = Zeroizing::new(frame::encode(&frame)?);
        let mut space = vec![MaybeUninit::uninit(); rights_bytes(descriptors.len())];
        let sent = loop {
            let mut rights = SendAncillaryBuffer::new(&mut space);
            if !descriptors.is_empty() && !rights.push(SendAncillaryMessage::ScmRights(descriptors)) {
                return Err(FrameError::TooManyDescriptors(descriptors.len()).into());
            }
            match sendmsg(&self.stream, &[IoSlice::new(&bytes)], &mut rights, SendFlags::NOSIGNAL) {
                Err(rustix::io::Errno::INTR) => {}
                other => break other.map_err(|e| ChannelError::io("sending")(e.into()))?,
            }
        };
        // A stream may take less than all; the descriptors went with the first byte.
        let rest = bytes.get(sent..).unwrap_or_default();
        self.stream.write_all(rest).map_err(ChannelError::io("sending"))
    }

    /// Waits for the next frame.
    ///
    /// # Errors
    /// Each of [`ChannelError`] but `Refused` and `Unexpected`. After any of them the connection is of no more use.
    pub fn receive(&mut self) -> Result<(Frame, Vec<OwnedFd>), ChannelError> {
        let mut prefix = [0_u8; PREFIX_BYTES];
        let mut descriptors = Vec::new();
        let got = self.receive_first(&mut prefix, &mut descriptors)?;
        if got == 0 {
            return Err(ChannelError::Closed);
        }
        let rest = prefix.get_mut(got..).unwrap_or_default();
        self.stream.read_exact(rest).map_err(ChannelError::io("reading a frame's length"))?;
        let mut body = Zeroizing::new(vec![0; frame::body_len(prefix)?]);
        self.stream.read_exact(&mut body).map_err(ChannelError::io("reading a frame"))?;
        let frame = frame::decode(&body)?;
        if frame.descriptors as usize != descriptors.len() {
            return Err(ChannelError::Descriptors {
                announced: frame.descriptors as usize,
                arrived: descriptors.len(),
            });
        }
        Ok((frame, descriptors))
    }

    fn receive_first(
        &self,
        prefix: &mut [u8],
        descriptors: &mut Vec<OwnedFd>,
    ) -> Result<usize, ChannelError> {
        let mut space = [MaybeUninit::uninit(); rights_bytes(DESCRIPTORS_MAX)];
        loop {
            let mut rights = RecvAncillaryBuffer::new(&mut space);
            let mut iov = [IoSliceMut::new(prefix)];
            match recvmsg(&self.stream, &mut iov, &mut rights, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(ChannelError::io("waiting for a frame")(e.into())),
                Ok(message) => {
                    for right in rights.drain() {
                        if let RecvAncillaryMessage::ScmRights(fds) = right {
                            descriptors.extend(fds);
                        }
                    }
                    return Ok(message.bytes);
                }
            }
        }
    }

    /// Sends a request and waits for its reply; events that arrive meanwhile are kept for [`Channel::take_event`].
    ///
    /// # Errors
    /// Each of [`ChannelError`]; after `Refused` the connection goes on.
    pub fn call(&mut self, body: Body, descriptors: &[BorrowedFd<'_>]) -> Result<Body, ChannelError> {
        self.last_id += 1;
        let id = self.last_id;
        self.send(id, body, descriptors)?;
        loop {
            let (frame, _) = self.receive()?;
            match frame.body {
                Some(event @ Body::VmChanged(_)) => {
                    if self.events.len() == EVENTS_MAX {
                        self.events.pop_front();
                    }
                    self.events.push_back(event);
                }
                Some(Body::Failed(failed)) if frame.id == id => return Err(ChannelError::Refused(failed)),
                Some(body) if frame.id == id => return Ok(body),
                _ => return Err(ChannelError::Unexpected),
            }
        }
    }

    /// An event that arrived during a [`Channel::call`].
    pub fn take_event(&mut self) -> Option<Body> {
        self.events.pop_front()
    }
}

/// What `accept` gives, ready for frames.
impl From<UnixStream> for Channel {
    fn from(stream: UnixStream) -> Self {
        Self::new(stream)
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Code, Empty};
    use std::{
        fs::File,
        io::{Seek, SeekFrom},
        thread,
    };

    fn pair() -> (Channel, Channel) {
        let (a, b) = UnixStream::pair().unwrap();
        (a.into(), b.into())
    }

    #[test]
    fn descriptors_arrive_with_their_frame() {
        let (mut client, mut server) = pair();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"hello").unwrap();
        let fds: Vec<_> = std::iter::repeat_n(file.as_fd(), DESCRIPTORS_MAX).collect();
        client.send(3, Body::Stop(Empty {}), &fds).unwrap();
        client.send(4, Body::Status(Empty {}), &[]).unwrap();
        let (first, got) = server.receive().unwrap();
        assert_eq!((first.id, got.len()), (3, DESCRIPTORS_MAX));
        let mut back = File::from(got.into_iter().last().unwrap());
        let mut text = String::new();
        back.seek(SeekFrom::Start(0)).unwrap();
        back.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        let (second, got) = server.receive().unwrap();
        assert_eq!((second.id, got.len()), (4, 0));
    }

    #[test]
    fn a_refusal_reaches_the_caller_and_events_are_kept() {
        let (mut client, mut server) = pair();
        let peer = thread::spawn(move || {
            let (frame, _) = server.receive().unwrap();
            server.send(0, Body::VmChanged(Default::default()), &[]).unwrap();
            let failed =
                Failed { code: Code::Precondition.into(), message: "not now".into(), field: String::new() };
            server.send(frame.id, Body::Failed(failed), &[]).unwrap();
        });
        let error = client.call(Body::Reset(Empty {}), &[]).unwrap_err();
        assert_eq!(error.to_string(), "not now");
        assert!(matches!(client.take_event(), Some(Body::VmChanged(_))));
        peer.join().unwrap();
    }

    #[test]
    fn garbage_ends_the_connection_and_nothing_else() {
        let (mut client, mut server) = pair();
        client.stream.write_all(&[0xff; 64]).unwrap();
        assert!(matches!(server.receive(), Err(ChannelError::Frame(FrameError::TooLong(_)))));
        let (mut client, mut server) = pair();
        client.stream.write_all(&[3, 0, 0, 0, 0xff, 0xff, 0xff]).unwrap();
        assert!(matches!(server.receive(), Err(ChannelError::Frame(FrameError::Malformed(_)))));
        let (client, mut server) = pair();
        drop(client);
        assert!(matches!(server.receive(), Err(ChannelError::Closed)));
    }

    #[test]
    fn a_peer_that_stops_half_way_costs_a_bounded_wait() {
        let (mut client, mut server) = pair();
        server.set_timeout(Some(Duration::from_millis(20))).unwrap();
        client.stream.write_all(&[9, 0]).unwrap();
        assert!(matches!(server.receive(), Err(ChannelError::Io { .. })));
    }
}
