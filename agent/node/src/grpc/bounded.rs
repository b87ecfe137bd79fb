//! A listener's connections, so many at a time: each holds a place until it is closed, and more are closed at once.
//!
//! Owns: the count. Never: what is said on a connection (`server`), who may call (`auth`).

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::server::Connected;

use crate::nbd::Rationed;

/// Connections that a listener has, at a time. Each may have some streams, and buffers for them.
pub(super) const CONNECTIONS_MAX: usize = 256;

/// A connection and its place.
pub(super) struct Held<S> {
    stream: S,
    _place: OwnedSemaphorePermit,
}

/// Passes connections on while there are places.
pub(super) fn bounded<S>(
    incoming: impl Stream<Item = io::Result<S>>,
    what: &'static str,
) -> impl Stream<Item = io::Result<Held<S>>> {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let log = Rationed::default();
    incoming.filter_map(move |accepted| {
        let stream = match accepted {
            Ok(stream) => stream,
            Err(error) => return Some(Err(error)),
        };
        match Arc::clone(&places).try_acquire_owned() {
            Ok(place) => Some(Ok(Held { stream, _place: place })),
            Err(_) => {
                if let Some(more) = log.may() {
                    tracing::warn!(
                        more,
                        "a client on {what} was turned away: {CONNECTIONS_MAX} are connected"
                    );
                }
                None
            }
        }
    })
}

impl<S: Connected> Connected for Held<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Held<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Held<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn places_are_given_back() {
        let ends: Vec<_> = (0..CONNECTIONS_MAX + 3).map(|_| Ok(tokio::io::duplex(1).0)).collect();
        let mut passed: Vec<_> = bounded(tokio_stream::iter(ends), "a test").collect().await;
        assert_eq!(passed.len(), CONNECTIONS_MAX);
        let (sender, receiver) = tokio::sync::mpsc::channel(8);
        let more = bounded(tokio_stream::wrappers::ReceiverStream::new(receiver), "a test");
        tokio::pin!(more);
        for _ in 0..CONNECTIONS_MAX {
            sender.send(Ok(tokio::io::duplex(1).0)).await.unwrap();
            passed.push(more.next().await.unwrap());
        }
        passed.truncate(CONNECTIONS_MAX + 10);
        sender.send(Ok(tokio::io::duplex(1).0)).await.unwrap();
        assert!(more.next().await.is_some(), "a place is free again");
    }
}
