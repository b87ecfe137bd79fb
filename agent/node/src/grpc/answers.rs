//! What waits to be sent: answers that a peer does not read lie in memory, in HTTP/2's queue of its connection, and whoever has
//! a wide window and never reads could fill the node with them. So the bytes in all these queues are counted.
//!
//! ```text
//!   service ──frame──▶ Answering ──▶ HTTP/2's queue ──▶ Held ──▶ socket
//!                        │ + length                       │ − written
//!                        └────────── Flow ────────────────┘        one a connection, and their sum
//! ```
//! A small frame passes. A larger one waits while its connection has [`QUEUED_MAX`] queued, and is dropped, with
//! `RESOURCE_EXHAUSTED` as the call's end, when all connections together have [`ALL_QUEUED_MAX`]. A connection on which one has
//! waited for [`TURN_MAX`] is closed: its peer reads nothing.
//!
//! Owns: those numbers. Never: the bytes. They are not exact: heads and small frames are written but not counted, so a peer that
//! reads much of these has more queued than is known; what it queued and then cancelled is never written, so a connection on
//! which that came to [`QUEUED_MAX`] is closed with the next large answer, and made anew by its client. Threads: any.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::time::{Sleep, sleep};
use tonic::{Status, body::Body, codegen::http::HeaderMap};

use super::places::Place;

/// Bytes queued for one connection beyond which larger frames wait.
const QUEUED_MAX: usize = 256 << 10;
/// Bytes of larger frames that are queued or wait, of all connections.
const ALL_QUEUED_MAX: usize = 16 << 20;
/// What passes in any case: so much times the streams of all connections is bounded too.
const SMALL_BYTES: usize = 4 << 10;

/// How long a larger frame waits.
const TURN_MAX: Duration = Duration::from_secs(15);

/// Of all connections of a listener.
#[derive(Debug, Default)]
pub(super) struct AllFlows(AtomicUsize);

/// Of one connection.
#[derive(Debug)]
pub(super) struct Flow {
    all: Arc<AllFlows>,
    queued: AtomicUsize,
    waiting: Mutex<Vec<Waker>>,
    closed: AtomicBool,
    /// Who reads from the connection, and so closes it.
    reader: Mutex<Option<Waker>>,
}

fn take(number: &AtomicUsize, bytes: usize) -> usize {
    let before = number.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| Some(n.saturating_sub(bytes)));
    before.unwrap_or_else(|n| n).min(bytes)
}

impl Flow {
    pub(super) fn new(all: &Arc<AllFlows>) -> Arc<Self> {
        Arc::new(Self {
            all: Arc::clone(all),
            queued: AtomicUsize::new(0),
            waiting: Mutex::default(),
            closed: AtomicBool::new(false),
            reader: Mutex::default(),
        })
    }

    /// Some bytes went to the socket.
    pub(super) fn wrote(&self, bytes: usize) {
        let taken = take(&self.queued, bytes);
        take(&self.all.0, taken);
        if taken > 0 && self.queued.load(Ordering::Acquire) <= QUEUED_MAX {
            let waiting = std::mem::take(&mut *self.waiting.lock().unwrap_or_else(PoisonError::into_inner));
            waiting.into_iter().for_each(Waker::wake);
        }
    }

    /// Has the connection closed.
    fn close(&self) {
        self.closed.store(true, Ordering::Release);
        if let Some(reader) = self.reader.lock().unwrap_or_else(PoisonError::into_inner).take() {
            reader.wake();
        }
    }

    /// Whether it is to be closed; if not, the task that reads from it is woken when it is.
    pub(super) fn is_closed(&self, cx: &Context<'_>) -> bool {
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        if reader.as_ref().is_none_or(|known| !known.will_wake(cx.waker())) {
            *reader = Some(cx.waker().clone());
        }
        self.closed.load(Ordering::Acquire)
    }

    /// Room for a frame among those of all connections.
    fn reserve(&self, bytes: usize) -> Result<(), Status> {
        if bytes <= SMALL_BYTES {
            return Ok(());
        }
        let all = self.all.0.fetch_add(bytes, Ordering::AcqRel);
        if all.saturating_add(bytes) > ALL_QUEUED_MAX {
            take(&self.all.0, bytes);
            return Err(Status::resource_exhausted(format!(
                "{all} bytes of answers wait to be read: read those that were asked for, then ask again"
            )));
        }
        Ok(())
    }

    /// Whether a frame that has its room goes now; if not, the task is woken when it may.
    fn goes(&self, bytes: usize, cx: &Context<'_>) -> bool {
        if bytes <= SMALL_BYTES {
            return true;
        }
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if self.queued.load(Ordering::Acquire) > QUEUED_MAX {
            waiting.push(cx.waker().clone());
            return false;
        }
        self.queued.fetch_add(bytes, Ordering::AcqRel);
        true
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        take(&self.all.0, *self.queued.get_mut());
    }
}

/// An answer, with the place of its call, which is free when the last of it was handed on.
pub(super) struct Answering {
    body: Body,
    flow: Option<Arc<Flow>>,
    /// Has its room, and waits for its turn.
    next: Option<(Bytes, Pin<Box<Sleep>>)>,
    turn_max: Duration,
    is_over: bool,
    _place: Option<Place>,
}

impl Answering {
    pub(super) fn body(body: Body, flow: Option<Arc<Flow>>, place: Option<Place>) -> Body {
        Body::new(Self { body, flow, next: None, turn_max: TURN_MAX, is_over: false, _place: place })
    }

    /// The end of a call that could not be answered.
    fn end(&mut self, status: &Status) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.is_over = true;
        // What it holds is what must go.
        self.body = Body::empty();
        let mut trailers = HeaderMap::new();
        match status.add_header(&mut trailers) {
            Ok(()) => Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
            Err(status) => Poll::Ready(Some(Err(status))),
        }
    }
}

impl http_body::Body for Answering {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let Some(flow) = self.flow.clone() else { return Pin::new(&mut self.body).poll_frame(cx) };
        if self.next.is_none() {
            let frame = match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => frame,
                other => return other,
            };
            let data = match frame.into_data() {
                Ok(data) => data,
                Err(other) => return Poll::Ready(Some(Ok(other))),
            };
            if let Err(status) = flow.reserve(data.len()) {
                return self.end(&status);
            }
            if flow.goes(data.len(), cx) {
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            let turn_max = self.turn_max;
            self.next = Some((data, Box::pin(sleep(turn_max))));
        }
        let Some((data, turn)) = &mut self.next else { return Poll::Pending };
        if turn.as_mut().poll(cx).is_ready() {
            flow.close();
            return self.end(&Status::resource_exhausted("the answers of this connection are not read"));
        }
        if !flow.goes(data.len(), cx) {
            return Poll::Pending;
        }
        Poll::Ready(self.next.take().map(|(data, _)| Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        self.is_over || (self.next.is_none() && self.body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        // What is taken already is not in the body's own.
        match &self.next {
            Some(_) => SizeHint::default(),
            None => self.body.size_hint(),
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        // Only a frame that took room waits.
        if let (Some(flow), Some((data, _))) = (&self.flow, &self.next) {
            take(&flow.all.0, data.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use http_body::Body as _;

    use super::*;

    /// A body of one frame.
    struct One(Option<Bytes>);

    impl http_body::Body for One {
        type Data = Bytes;
        type Error = Status;
        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            Poll::Ready(self.0.take().map(|data| Ok(Frame::data(data))))
        }
    }

    fn answer(flow: &Arc<Flow>, bytes: usize) -> Body {
        Answering::body(Body::new(One(Some(vec![1; bytes].into()))), Some(Arc::clone(flow)), None)
    }

    fn poll(body: &mut Body) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(body).poll_frame(&mut Context::from_waker(Waker::noop()))
    }

    fn is_data(frame: &Poll<Option<Result<Frame<Bytes>, Status>>>) -> bool {
        matches!(frame, Poll::Ready(Some(Ok(frame))) if frame.is_data())
    }

    #[tokio::test]
    async fn a_large_answer_waits_for_those_before_it_and_a_small_one_does_not() {
        let all = Arc::default();
        let flow = Flow::new(&all);
        let mut first = answer(&flow, QUEUED_MAX + 1);
        assert!(is_data(&poll(&mut first)));
        let mut second = answer(&flow, SMALL_BYTES + 1);
        assert!(poll(&mut second).is_pending());
        assert!(is_data(&poll(&mut answer(&flow, SMALL_BYTES))));
        let waits = tokio::spawn(async move { poll_fn(|cx| Pin::new(&mut second).poll_frame(cx)).await });
        tokio::task::yield_now().await;
        flow.wrote(SMALL_BYTES + 1);
        assert!(waits.await.unwrap().unwrap().unwrap().is_data());
        drop(first);
        drop(flow);
        assert_eq!(all.0.load(Ordering::Acquire), 0);
    }

    #[tokio::test]
    async fn a_connection_that_nobody_reads_is_closed() {
        let all = Arc::default();
        let flow = Flow::new(&all);
        let soon = Duration::from_millis(50);
        assert!(is_data(&poll(&mut answer(&flow, QUEUED_MAX + 1))));
        let body = Body::new(One(Some(vec![1; 1 << 20].into())));
        let waits = Answering {
            body,
            flow: Some(Arc::clone(&flow)),
            next: None,
            turn_max: soon,
            is_over: false,
            _place: None,
        };
        let mut waits = Body::new(waits);
        let end = poll_fn(|cx| Pin::new(&mut waits).poll_frame(cx)).await.unwrap().unwrap();
        assert_eq!(end.trailers_ref().unwrap()["grpc-status"], "8");
        assert!(flow.is_closed(&Context::from_waker(Waker::noop())));
        drop(waits);
        assert_eq!(all.0.load(Ordering::Acquire), QUEUED_MAX + 1);
    }

    #[tokio::test]
    async fn all_connections_together_are_bounded_and_the_caller_reads_why() {
        let all = Arc::default();
        let flows: Vec<_> = (0..64).map(|_| Flow::new(&all)).collect();
        let mut went = 0;
        for flow in &flows {
            went += usize::from(is_data(&poll(&mut answer(flow, 1 << 20))));
        }
        assert_eq!(went, ALL_QUEUED_MAX >> 20);
        let mut refused = answer(&flows[63], 1 << 20);
        let Poll::Ready(Some(Ok(frame))) = poll(&mut refused) else { panic!("it waits") };
        assert_eq!(frame.trailers_ref().unwrap()["grpc-status"], "8");
        assert!(matches!(poll(&mut refused), Poll::Ready(None)));
        assert!(is_data(&poll(&mut answer(&flows[63], 100))));
        // Whoever leaves gives its room back, and so does who reads.
        let mut flows = flows;
        flows.truncate(1);
        assert_eq!(all.0.load(Ordering::Acquire), 1 << 20);
        flows[0].wrote(2 << 20);
        assert_eq!(all.0.load(Ordering::Acquire), 0);
    }
}
