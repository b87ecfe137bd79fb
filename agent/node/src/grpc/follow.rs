//! Streams that follow something for as long as their client likes. What waits for a client is bounded, and one that takes
//! nothing for [`STALL`] is not waited for any longer: its stream ends, after what it has still to read, with a word that says how
//! to go on.
//!
//! Owns: that queue. Never: what is followed.

use std::{
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::sync::mpsc;
use tokio_stream::Stream;
use tonic::Status;

use crate::error::Error;

/// How long a client may take nothing.
pub(super) const STALL: Duration = Duration::from_secs(15);

/// The end of the one who sends.
#[derive(Debug)]
pub(super) struct Follower<T> {
    items: mpsc::Sender<T>,
    last: Arc<OnceLock<Status>>,
    stall: Duration,
}

/// The end of the client.
#[derive(Debug)]
pub(super) struct Following<T> {
    items: mpsc::Receiver<T>,
    last: Arc<OnceLock<Status>>,
    is_over: bool,
}

/// A stream on which so many items may wait.
pub(super) fn follow<T>(waiting_max: usize) -> (Follower<T>, Following<T>) {
    let (sender, receiver) = mpsc::channel(waiting_max);
    let last = Arc::new(OnceLock::new());
    let follower = Follower { items: sender, last: Arc::clone(&last), stall: STALL };
    (follower, Following { items: receiver, last, is_over: false })
}

/// Nobody is there any more to send to.
#[derive(Debug)]
pub(super) struct Left;

impl<T> Follower<T> {
    /// Sends one more. `behind` is what a client that took nothing reads in the end.
    pub(super) async fn send(&self, item: T, behind: impl FnOnce() -> Error) -> Result<(), Left> {
        match self.items.send_timeout(item, self.stall).await {
            Ok(()) => Ok(()),
            Err(mpsc::error::SendTimeoutError::Closed(_)) => Err(Left),
            Err(mpsc::error::SendTimeoutError::Timeout(_)) => {
                self.end(behind());
                Err(Left)
            }
        }
    }

    /// What the stream ends with, when this is dropped.
    pub(super) fn end(&self, error: Error) {
        // The first word counts: what comes after it is a consequence.
        let _ = self.last.set(error.into());
    }

    /// The client has gone.
    pub(super) async fn closed(&self) {
        self.items.closed().await;
    }
}

impl<T> Stream for Following<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        if let Some(item) = ready!(self.items.poll_recv(cx)) {
            return Poll::Ready(Some(Ok(item)));
        }
        self.is_over = true;
        Poll::Ready(self.last.get().cloned().map(Err))
    }
}

#[cfg(test)]
mod tests {
    use tokio_stream::StreamExt;
    use tonic::Code;

    use super::*;

    #[tokio::test]
    async fn who_does_not_read_is_told_where_to_go_on() {
        let (mut follower, mut following) = follow(2);
        follower.stall = Duration::from_millis(50);
        for number in 1..=2 {
            follower.send(number, || unreachable!("there is room")).await.unwrap();
        }
        assert!(follower.send(3, || Error::behind(3)).await.is_err());
        drop(follower);
        assert_eq!(following.next().await.unwrap().unwrap(), 1);
        assert_eq!(following.next().await.unwrap().unwrap(), 2);
        let last = following.next().await.unwrap().unwrap_err();
        assert_eq!(last.code(), Code::Aborted);
        assert!(last.message().contains("from 3"), "{last}");
        assert!(following.next().await.is_none());
    }

    #[tokio::test]
    async fn who_has_left_is_noticed() {
        let (follower, following) = follow(1);
        drop(following);
        assert!(follower.send(1, || unreachable!("it left")).await.is_err());
        follower.closed().await;
    }
}
