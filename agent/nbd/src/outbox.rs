//! Replies on their way to the socket: in order, sent by vectored writes, resumed where the socket was full.

use std::{
    collections::VecDeque,
    io::{self, IoSlice, Write},
    os::unix::net::UnixStream,
};

use crate::{backend::Payload, greet::would_block, wire::Head};

/// Parts of one vectored write.
const PARTS_MAX: usize = 128;

pub(crate) enum Body<P> {
    Nothing,
    Payload(P),
    Bytes(Vec<u8>),
}

struct Out<P> {
    head: Head,
    body: Body<P>,
}

impl<P: Payload> Out<P> {
    fn body_bytes(&self) -> &[u8] {
        match &self.body {
            Body::Nothing => &[],
            Body::Payload(payload) => payload.bytes(),
            Body::Bytes(bytes) => bytes,
        }
    }

    fn len(&self) -> usize {
        self.head.bytes().len() + self.body_bytes().len()
    }
}

/// See the head of this file.
pub(crate) struct Outbox<P> {
    replies: VecDeque<Out<P>>,
    /// Bytes of the first reply that are sent.
    sent: usize,
    /// Bytes of all replies, those of the first that are sent included.
    bytes: usize,
}

impl<P: Payload> Outbox<P> {
    pub(crate) fn new() -> Outbox<P> {
        Outbox { replies: VecDeque::new(), sent: 0, bytes: 0 }
    }

    pub(crate) fn len(&self) -> usize {
        self.replies.len()
    }

    /// Bytes that wait, about.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.replies.is_empty()
    }

    pub(crate) fn push(&mut self, head: Head, body: Body<P>) {
        let out = Out { head, body };
        self.bytes += out.len();
        self.replies.push_back(out);
    }

    /// Sends until the socket is full or nothing is left; `freed` gets the payloads that were sent.
    pub(crate) fn send(&mut self, mut stream: &UnixStream, mut freed: impl FnMut(P)) -> io::Result<()> {
        while !self.replies.is_empty() {
            let mut parts = [IoSlice::new(&[]); PARTS_MAX];
            let mut skip = self.sent;
            let both = self.replies.iter().flat_map(|out| [out.head.bytes(), out.body_bytes()]);
            let mut used = 0;
            for (part, bytes) in parts.iter_mut().zip(both) {
                let skipped = skip.min(bytes.len());
                skip -= skipped;
                *part = IoSlice::new(bytes.get(skipped..).unwrap_or_default());
                used += 1;
            }
            match stream.write_vectored(parts.get(..used).unwrap_or_default()) {
                Ok(n) => self.sent += n,
                Err(e) if would_block(&e) => return Ok(()),
                Err(e) => return Err(e),
            }
            while let Some(first) = self.replies.front() {
                let len = first.len();
                if self.sent < len {
                    break;
                }
                self.sent -= len;
                self.bytes -= len;
                if let Some(Out { body: Body::Payload(payload), .. }) = self.replies.pop_front() {
                    freed(payload);
                }
            }
        }
        Ok(())
    }
}
