//! What clients send, before it is whole: a message is held until its last byte has come, so its size, the time that it takes
//! and the room for all unfinished ones together are bounded. A caller reads why: `RESOURCE_EXHAUSTED`, `DEADLINE_EXCEEDED`.
//!
//! ```text
//!   frames of HTTP/2 ──▶ Metered: 1 byte flag, 4 bytes length, message, 1 byte flag, …  (gRPC over HTTP/2, "Length-Prefixed-Message")
//!                           │ length known: room is taken      └ last byte: the clock stops, the room is given back
//!                           ▼
//!                        the service
//! ```
//!
//! Owns: that framing's heads. Never: a message's bytes, which pass unchanged.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Sleep, sleep},
};
use tonic::{Status, body::Body};

/// The largest message.
pub(super) const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Room for all messages together that are not whole yet.
const ROOM_BYTES: usize = 16 << 20;
/// Messages up to that size need no room of it: health is asked with less, whatever others do.
const SMALL_BYTES: usize = 4 << 10;
/// How long a message may take from its first byte, and a call until its first message.
const SLOWEST: Duration = Duration::from_secs(20);

/// Room for unfinished messages. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Intake {
    room: Arc<Semaphore>,
    slowest: Duration,
}

impl Default for Intake {
    fn default() -> Self {
        Self { room: Arc::new(Semaphore::new(ROOM_BYTES)), slowest: SLOWEST }
    }
}

impl Intake {
    /// The body of a request, bounded.
    pub(super) fn metered(&self, body: Body) -> Body {
        if body.is_end_stream() {
            return body;
        }
        let clock = Some(Box::pin(sleep(self.slowest)));
        Body::new(Metered {
            body,
            intake: self.clone(),
            at: At::Head { bytes: [0; 5], have: 0 },
            held: None,
            clock,
        })
    }

    fn room(&self, length: usize) -> Result<Option<OwnedSemaphorePermit>, Status> {
        if length > MESSAGE_BYTES_MAX {
            return Err(Status::resource_exhausted(format!(
                "a message of {length} bytes is too large: {MESSAGE_BYTES_MAX} are the most; send larger things in pieces"
            )));
        }
        if length <= SMALL_BYTES {
            return Ok(None);
        }
        let wanted = u32::try_from(length).unwrap_or(u32::MAX);
        Arc::clone(&self.room).try_acquire_many_owned(wanted).map(Some).map_err(|_| {
            Status::resource_exhausted(format!(
                "{ROOM_BYTES} bytes of messages that are not whole yet are waited for already: try again in a moment"
            ))
        })
    }
}

/// Where in the framing the next byte is.
#[derive(Debug)]
enum At {
    Head { bytes: [u8; 5], have: usize },
    Message { left: usize },
}

struct Metered {
    body: Body,
    intake: Intake,
    at: At,
    held: Option<OwnedSemaphorePermit>,
    /// Stands while nothing is unfinished.
    clock: Option<Pin<Box<Sleep>>>,
}

impl Metered {
    /// Follows the framing over some bytes.
    fn pass(&mut self, mut data: &[u8]) -> Result<(), Status> {
        while let Some((first, rest)) = data.split_first() {
            match &mut self.at {
                At::Head { bytes, have } => {
                    if *have == 0 && self.clock.is_none() {
                        self.clock = Some(Box::pin(sleep(self.intake.slowest)));
                    }
                    if let Some(slot) = bytes.get_mut(*have) {
                        *slot = *first;
                    }
                    *have = have.saturating_add(1);
                    data = rest;
                    if *have == bytes.len() {
                        let [_, length @ ..] = *bytes;
                        let left = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
                        self.at = At::Message { left };
                        // First what the message before had.
                        self.held = None;
                        self.held = self.intake.room(left)?;
                        self.end(left);
                    }
                }
                At::Message { left } => {
                    let came = data.len().min(*left);
                    let left = left.saturating_sub(came);
                    self.at = At::Message { left };
                    data = data.get(came..).unwrap_or_default();
                    self.end(left);
                }
            }
        }
        Ok(())
    }

    /// Nothing is left of a message: its room is given back when the service asks for the next one, or goes.
    fn end(&mut self, left: usize) {
        if left == 0 {
            self.at = At::Head { bytes: [0; 5], have: 0 };
            self.clock = None;
        }
    }
}

impl http_body::Body for Metered {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.clock.is_none() {
            self.held = None;
        }
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if frame.is_pending()
            && let Some(clock) = &mut self.clock
            && clock.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Some(Err(Status::deadline_exceeded(format!(
                "a message was not whole after {} s: send it faster",
                self.intake.slowest.as_secs()
            )))));
        }
        if let Poll::Ready(Some(Ok(frame))) = &frame
            && let Some(data) = frame.data_ref()
        {
            let data = data.clone();
            if let Err(status) = self.pass(&data) {
                return Poll::Ready(Some(Err(status)));
            }
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::sync::mpsc;
    use tokio_stream::{StreamExt, wrappers::ReceiverStream};
    use tonic::Code;

    use super::*;

    /// A body whose pieces come from a channel.
    struct Pieces(ReceiverStream<Vec<u8>>);

    impl http_body::Body for Pieces {
        type Data = Bytes;
        type Error = Status;
        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            use tokio_stream::Stream;
            Pin::new(&mut self.0).poll_next(cx).map(|piece| piece.map(|p| Ok(Frame::data(p.into()))))
        }
    }

    /// Reads it to its end: bytes and what it ended with.
    async fn read(mut body: Body) -> (usize, Option<Code>) {
        let mut came = 0;
        loop {
            let frame = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await;
            match frame {
                None => return (came, None),
                Some(Err(status)) => return (came, Some(status.code())),
                Some(Ok(frame)) => came += frame.data_ref().map_or(0, Bytes::len),
            }
        }
    }

    fn body(intake: &Intake) -> (mpsc::Sender<Vec<u8>>, Body) {
        let (sender, receiver) = mpsc::channel(64);
        (sender, intake.metered(Body::new(Pieces(ReceiverStream::new(receiver)))))
    }

    fn head(length: usize) -> Vec<u8> {
        [&[0][..], &u32::try_from(length).unwrap().to_be_bytes()].concat()
    }

    #[tokio::test]
    async fn a_large_message_is_refused_by_its_head() {
        let intake = Intake::default();
        let (sender, body) = body(&intake);
        sender.send(head(MESSAGE_BYTES_MAX + 1)).await.unwrap();
        assert_eq!(read(body).await, (0, Some(Code::ResourceExhausted)));
    }

    #[tokio::test]
    async fn room_is_taken_by_the_head_and_given_back() {
        let intake = Intake::default();
        let mut waiting = Vec::new();
        for _ in 0..ROOM_BYTES / MESSAGE_BYTES_MAX {
            let (sender, mut body) = body(&intake);
            sender.send(head(MESSAGE_BYTES_MAX)).await.unwrap();
            std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await.unwrap().unwrap();
            waiting.push((sender, body));
        }
        let (sender, more) = body(&intake);
        sender.send(head(SMALL_BYTES + 1)).await.unwrap();
        assert_eq!(read(more).await, (0, Some(Code::ResourceExhausted)));
        let (sender, small) = body(&intake);
        sender.send([head(1), vec![7]].concat()).await.unwrap();
        drop(sender);
        assert_eq!(read(small).await, (6, None));
        waiting.clear();
        assert_eq!(intake.room.available_permits(), ROOM_BYTES);
    }

    #[tokio::test]
    async fn slow_messages_end_and_silence_between_messages_does_not() {
        let soon = Duration::from_millis(100);
        let intake = Intake { slowest: soon, ..Intake::default() };
        let (_never, nothing) = body(&intake);
        assert_eq!(read(nothing).await, (0, Some(Code::DeadlineExceeded)));
        let (sender, half) = body(&intake);
        sender.send(head(10)).await.unwrap();
        assert_eq!(read(half).await, (5, Some(Code::DeadlineExceeded)));
        let (sender, whole) = body(&intake);
        sender.send([head(1), vec![7]].concat()).await.unwrap();
        assert!(tokio::time::timeout(soon * 4, read(whole)).await.is_err(), "it was ended");
    }

    proptest! {
        #[test]
        fn whole_messages_pass_however_they_are_cut(sizes in prop::collection::vec(0_usize..9000, 0..8), cut in 1_usize..5000) {
            let bytes: Vec<u8> = sizes.iter().flat_map(|size| [head(*size), vec![1; *size]].concat()).collect();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let intake = Intake::default();
            let read = runtime.block_on(async {
                let pieces: Vec<_> = bytes.chunks(cut).map(<[u8]>::to_vec).collect();
                let (sender, receiver) = mpsc::channel(1);
                let body = intake.metered(Body::new(Pieces(ReceiverStream::new(receiver))));
                let send = async move {
                    let mut pieces = tokio_stream::iter(pieces);
                    while let Some(piece) = pieces.next().await {
                        sender.send(piece).await.unwrap();
                    }
                };
                tokio::join!(send, read(body)).1
            });
            prop_assert_eq!(read, (bytes.len(), None));
            prop_assert_eq!(intake.room.available_permits(), ROOM_BYTES);
        }
    }
}
