//! A listener's connections, so many at a time and so many of one peer: each holds a place until it is closed, and more are
//! closed at once. One that does not begin to speak HTTP/2 in time, or takes nothing of what it is sent, is closed too: for
//! these the protocol's own keep-alive has no word.
//!
//! Owns: those places and deadlines. Never: what is said on a connection (`server`), who may call (`auth`).

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::server::Connected;

use super::{
    answers::{AllFlows, Flow},
    places::{FromPeer, Place, Places},
};
use crate::nbd::Rationed;

/// Connections that a listener has, at a time. Each may have some streams, and buffers for them.
pub(super) const CONNECTIONS_MAX: usize = 256;
/// And those of one peer.
pub(super) const OF_PEER_MAX: usize = 64;
/// How long the first bytes may take.
const GREETING: Duration = Duration::from_secs(10);
/// HTTP/2's connection preface and the head of the SETTINGS frame that follows (RFC 9113 §3.4).
const GREETING_BYTES: usize = 24 + 9;
/// How long a peer may take nothing of what waits for it.
const STALL: Duration = Duration::from_secs(15);
/// After a connection could not be accepted: no descriptors are left, and none come back at once.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// A connection, its place and its deadlines.
pub(super) struct Held<S> {
    stream: S,
    _place: Option<Place>,
    /// What is still missing of the greeting, and until when.
    greeting: Option<(usize, Pin<Box<Sleep>>)>,
    /// Runs while the peer takes nothing.
    stall: Option<Pin<Box<Sleep>>>,
    stall_max: Duration,
    /// Counts what is written, where that matters.
    flow: Option<Arc<Flow>>,
}

/// What a call knows of its connection.
#[derive(Debug, Clone)]
pub(super) struct Link<I> {
    /// Who is there.
    pub(super) info: I,
    /// What waits to be sent.
    pub(super) flow: Option<Arc<Flow>>,
}

impl<S> Held<S> {
    /// One that must begin with HTTP/2 soon, over whatever is inside.
    pub(super) fn greeted(stream: S, all: &Arc<AllFlows>) -> Self {
        Self { flow: Some(Flow::new(all)), ..Self::with_limits(stream, GREETING, STALL) }
    }

    fn with_limits(stream: S, greeting: Duration, stall_max: Duration) -> Self {
        let greeting = Some((GREETING_BYTES, Box::pin(sleep(greeting))));
        Self { stream, _place: None, greeting, stall: None, stall_max, flow: None }
    }

    fn placed(stream: S, place: Place) -> Self {
        Self { stream, _place: Some(place), greeting: None, stall: None, stall_max: STALL, flow: None }
    }

    fn counted(&self, done: &Poll<io::Result<usize>>) {
        if let (Some(flow), Poll::Ready(Ok(bytes))) = (&self.flow, done) {
            flow.wrote(*bytes);
        }
    }

    fn wrote<T>(&mut self, cx: &mut Context<'_>, done: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if done.is_ready() {
            self.stall = None;
            return done;
        }
        let stall_max = self.stall_max;
        let stall = self.stall.get_or_insert_with(|| Box::pin(sleep(stall_max)));
        ready!(stall.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the peer takes nothing")))
    }
}

/// Passes connections on while there are places.
pub(super) fn bounded<S: FromPeer>(
    incoming: impl Stream<Item = io::Result<S>>,
    what: &'static str,
) -> impl Stream<Item = io::Result<Held<S>>> {
    let places = Places::new(CONNECTIONS_MAX, OF_PEER_MAX);
    let (turned_away, failed) = (Rationed::default(), Rationed::default());
    let paused = incoming.then(async |accepted| {
        if accepted.is_err() {
            sleep(ACCEPT_AGAIN).await;
        }
        accepted
    });
    paused.filter_map(move |accepted| {
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => {
                if let Some(more) = failed.may() {
                    tracing::warn!(more, "a client on {what} could not be accepted: {error}");
                }
                return None;
            }
        };
        match places.take(stream.peer()) {
            Ok(place) => Some(Ok(Held::placed(stream, place))),
            Err(why) => {
                if let Some(more) = turned_away.may() {
                    let peer = stream.peer();
                    tracing::warn!(more, "a client on {what}, {peer:?}, was turned away: {why}");
                }
                None
            }
        }
    })
}

impl<S: Connected> Connected for Held<S> {
    type ConnectInfo = Link<S::ConnectInfo>;

    fn connect_info(&self) -> Self::ConnectInfo {
        Link { info: self.stream.connect_info(), flow: self.flow.clone() }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Held<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.flow.as_ref().is_some_and(|flow| flow.is_closed(cx)) {
            let why = "the peer reads nothing of its answers";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, why)));
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let Some((missing, until)) = &mut self.greeting else { return read };
        let came = buf.filled().len().saturating_sub(before);
        *missing = missing.saturating_sub(came);
        if *missing == 0 {
            self.greeting = None;
        } else if read.is_pending() {
            ready!(until.as_mut().poll(cx));
            let why = "it does not begin to speak HTTP/2";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, why)));
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Held<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.counted(&done);
        self.wrote(cx, done)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = Pin::new(&mut self.stream).poll_flush(cx);
        self.wrote(cx, done)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.wrote(cx, done)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.counted(&done);
        self.wrote(cx, done)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;
    use crate::grpc::places::Peer;

    impl FromPeer for DuplexStream {
        fn peer(&self) -> Peer {
            Peer::Unknown
        }
    }

    #[tokio::test]
    async fn places_are_given_back() {
        let (sender, receiver) = tokio::sync::mpsc::channel(OF_PEER_MAX + 3);
        let passed = bounded(tokio_stream::wrappers::ReceiverStream::new(receiver), "a test");
        tokio::pin!(passed);
        let mut held = Vec::new();
        for _ in 0..OF_PEER_MAX {
            sender.send(Ok(duplex(1).0)).await.unwrap();
            held.push(passed.next().await.unwrap());
        }
        // One that fails and one for which there is no place, then one for which there is again.
        sender.send(Err(io::Error::other("no descriptors"))).await.unwrap();
        sender.send(Ok(duplex(1).0)).await.unwrap();
        assert!(tokio::time::timeout(ACCEPT_AGAIN * 3, passed.next()).await.is_err());
        held.pop();
        sender.send(Ok(duplex(1).0)).await.unwrap();
        assert!(passed.next().await.is_some());
    }

    const SOON: Duration = Duration::from_millis(200);

    #[tokio::test]
    async fn who_does_not_greet_is_dropped_and_who_does_is_not() {
        let (mut silent, there) = duplex(64);
        let mut held = Held::with_limits(there, SOON, SOON);
        silent.write_all(b"PRI * HTTP/2.0\r\n").await.unwrap();
        let mut bytes = [0; 64];
        assert_eq!(held.read(&mut bytes).await.unwrap(), 16);
        assert_eq!(held.read(&mut bytes).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        let (mut polite, there) = duplex(64);
        let mut held = Held::with_limits(there, SOON, SOON);
        polite.write_all(&[0; GREETING_BYTES]).await.unwrap();
        assert_eq!(held.read(&mut bytes).await.unwrap(), GREETING_BYTES);
        let waits = tokio::time::timeout(SOON * 3, held.read(&mut bytes)).await;
        assert!(waits.is_err(), "{waits:?}");
    }

    #[tokio::test]
    async fn who_takes_nothing_is_dropped_and_who_takes_a_little_is_not() {
        let (mut deaf, there) = duplex(64);
        let mut held = Held::with_limits(there, SOON, SOON);
        held.write_all(&[0; 64]).await.unwrap();
        for _ in 0..4 {
            let (wrote, read) = tokio::join!(held.write_all(&[0; 8]), async {
                sleep(SOON / 2).await;
                deaf.read(&mut [0; 8]).await
            });
            assert_eq!(read.unwrap(), 8);
            wrote.unwrap();
        }
        assert_eq!(held.write_all(&[0; 8]).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
