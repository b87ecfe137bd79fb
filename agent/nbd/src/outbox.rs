//! Replies on their way to the socket: in order, resumed where the socket was full. What lies in memory goes out by
//! vectored writes, what lies in a file goes from the page cache to the socket without passing through this process.
//!
//! ```text
//! structured  │ piece 64 KiB │ file ─sendfile─► │ hole 1 MiB │ piece │ file ─► │ end or error │ the next reply …
//! simple      │ head (no error) │ file ─► │ zeros │ file ─► │ the next reply …
//! ```
//! A file that cannot be read: the piece is filled up with zeros and the end becomes an error, as the protocol has it;
//! with simple replies, whose head has promised success, the connection ends.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, IoSlice, Write},
    os::unix::{fs::FileExt, net::UnixStream},
    sync::Arc,
};

use rustix::{fs::sendfile, io::Errno};

use crate::{
    backend::{Payload, Run},
    greet::{ConnectionError, would_block},
    wire::{Head, Mode, Request, cmd_flag, error_value},
};

/// Parts of one vectored write.
const PARTS_MAX: usize = 128;
/// Read at once where a file cannot be sent.
const COPY_BYTES: usize = 64 << 10;
/// What zeros are sent from.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

pub(crate) enum Body<P> {
    Nothing,
    Payload(P),
    Bytes(Vec<u8>),
    File { file: Arc<File>, offset: u64, len: usize },
    Zeros(usize),
}

struct Out<P> {
    head: Head,
    body: Body<P>,
    /// The end of this read in pieces, which becomes an error if one of them fails.
    end: Option<Request>,
}

impl<P: Payload> Out<P> {
    fn body_len(&self) -> usize {
        match &self.body {
            Body::Nothing => 0,
            Body::Payload(payload) => payload.bytes().len(),
            Body::Bytes(bytes) => bytes.len(),
            Body::File { len, .. } | Body::Zeros(len) => *len,
        }
    }

    /// Its bytes in memory, in order.
    fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let (once, zeros): (&[u8], usize) = match &self.body {
            Body::Nothing | Body::File { .. } => (&[], 0),
            Body::Payload(payload) => (payload.bytes(), 0),
            Body::Bytes(bytes) => (bytes, 0),
            Body::Zeros(len) => (&[], *len),
        };
        let chunks = (0..zeros.div_ceil(ZEROS.len())).map(move |i| {
            let left = zeros.saturating_sub(i * ZEROS.len());
            ZEROS.get(..left.min(ZEROS.len())).unwrap_or_default()
        });
        [self.head.bytes(), once].into_iter().chain(chunks)
    }

    fn in_memory(&self) -> usize {
        match &self.body {
            Body::File { .. } | Body::Zeros(_) => 0,
            _ => self.body_len(),
        }
    }

    fn len(&self) -> usize {
        self.head.bytes().len() + self.body_len()
    }
}

/// See the head of this file.
pub(crate) struct Outbox<P> {
    mode: Mode,
    replies: VecDeque<Out<P>>,
    /// Bytes of the first reply that are sent.
    sent: usize,
    /// Bytes of memory that all replies hold, those of the first that are sent included.
    bytes: usize,
    /// Bytes that come from files.
    file_bytes: usize,
    /// The file system, or the kernel, cannot send files.
    copies: Option<Box<[u8; COPY_BYTES]>>,
}

impl<P: Payload> Outbox<P> {
    pub(crate) fn new(mode: Mode) -> Outbox<P> {
        Outbox { mode, replies: VecDeque::new(), sent: 0, bytes: 0, file_bytes: 0, copies: None }
    }

    pub(crate) fn len(&self) -> usize {
        self.replies.len()
    }

    /// Bytes of memory that wait, about.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes in files that wait.
    pub(crate) fn file_bytes(&self) -> usize {
        self.file_bytes
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.replies.is_empty()
    }

    pub(crate) fn push(&mut self, head: Head, body: Body<P>) {
        self.push_out(Out { head, body, end: None });
    }

    fn push_out(&mut self, out: Out<P>) {
        self.bytes += out.head.bytes().len() + out.in_memory();
        if let Body::File { len, .. } = out.body {
            self.file_bytes += len;
        }
        self.replies.push_back(out);
    }

    /// The answer to a read whose bytes lie in these runs, which cover it.
    pub(crate) fn push_runs(&mut self, request: &Request, runs: &[Run]) {
        let whole = self.mode == Mode::Simple || request.flags & cmd_flag::DF != 0;
        if self.mode == Mode::Simple {
            self.push(self.mode.data(request), Body::Nothing);
        } else if whole {
            // The rules let at most PAYLOAD_BYTES_MAX through, here and below.
            self.push(self.mode.piece(request, request.offset, request.len as u32), Body::Nothing);
        }
        let mut at = request.offset;
        for run in runs {
            let (len, body) = match run {
                Run::File { file, offset, len } => {
                    (*len, Body::File { file: Arc::clone(file), offset: *offset, len: *len as usize })
                }
                Run::Zeros { len } if whole => (*len, Body::Zeros(*len as usize)),
                Run::Zeros { len } => (*len, Body::Nothing),
            };
            let head = match (&body, whole) {
                (_, true) => Head::default(),
                (Body::Nothing, false) => self.mode.hole(request, at, len as u32),
                (_, false) => self.mode.piece(request, at, len as u32),
            };
            self.push(head, body);
            at = at.saturating_add(len);
        }
        if self.mode != Mode::Simple {
            self.push_out(Out { head: self.mode.end(request), body: Body::Nothing, end: Some(*request) });
        }
    }

    /// Forgets all that was not sent: there is nobody to take it.
    pub(crate) fn clear(&mut self) {
        self.replies.clear();
        (self.sent, self.bytes, self.file_bytes) = (0, 0, 0);
    }

    /// Sends until the socket is full or nothing is left; `freed` gets the payloads that were sent. The bytes
    /// that were taken.
    pub(crate) fn send(
        &mut self,
        stream: &UnixStream,
        mut freed: impl FnMut(P),
    ) -> Result<usize, ConnectionError> {
        let mut moved = 0;
        while let Some(first) = self.replies.front() {
            let at_file = matches!(first.body, Body::File { .. }) && self.sent >= first.head.bytes().len();
            let taken = if at_file { self.send_file(stream)? } else { self.send_memory(stream)? };
            let Some(taken) = taken else { break };
            self.sent += taken;
            moved += taken;
            while let Some(first) = self.replies.front() {
                let len = first.len();
                if self.sent < len {
                    break;
                }
                self.sent -= len;
                self.bytes -= first.head.bytes().len() + first.in_memory();
                match self.replies.pop_front().map(|out| out.body) {
                    Some(Body::Payload(payload)) => freed(payload),
                    Some(Body::File { len, .. }) => self.file_bytes -= len,
                    _ => {}
                }
            }
        }
        Ok(moved)
    }

    /// One vectored write, up to where a file begins. `None`: the socket is full.
    fn send_memory(&self, mut stream: &UnixStream) -> io::Result<Option<usize>> {
        let mut parts = [IoSlice::new(&[]); PARTS_MAX];
        let mut skip = self.sent;
        let mut used = 0;
        'gather: for out in &self.replies {
            for bytes in out.parts() {
                let Some(part) = parts.get_mut(used) else { break 'gather };
                let skipped = skip.min(bytes.len());
                skip -= skipped;
                let rest = bytes.get(skipped..).unwrap_or_default();
                if !rest.is_empty() {
                    *part = IoSlice::new(rest);
                    used += 1;
                }
            }
            if matches!(out.body, Body::File { .. }) {
                break;
            }
        }
        match stream.write_vectored(parts.get(..used).unwrap_or_default()) {
            Ok(n) => Ok(Some(n)),
            Err(e) if would_block(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Sends of the file that is first. `None`: the socket is full.
    fn send_file(&mut self, stream: &UnixStream) -> Result<Option<usize>, ConnectionError> {
        let Some(Out { head, body: Body::File { file, offset, len }, .. }) = self.replies.front() else {
            return Ok(None);
        };
        let done = self.sent - head.bytes().len();
        let (at, left) = (offset.saturating_add(done as u64), len.saturating_sub(done));
        let result = match &mut self.copies {
            None => {
                let mut from = at;
                sendfile(stream, file, Some(&mut from), left).map_err(io::Error::from)
            }
            Some(buffer) => copy(stream, file, at, left, buffer),
        };
        match result {
            Ok(n) if n > 0 || left == 0 => Ok(Some(n)),
            Ok(_) => self.fail(io::Error::from(io::ErrorKind::UnexpectedEof)),
            Err(e) if would_block(&e) => Ok(None),
            Err(e) if is_of_socket(&e) => Err(e.into()),
            Err(e) if self.copies.is_none() && matches!(errno(&e), Errno::INVAL | Errno::NOSYS) => {
                self.copies = Some(Box::new([0; COPY_BYTES]));
                Ok(Some(0))
            }
            Err(e) => self.fail(e),
        }
    }

    /// The file that is first cannot be read.
    fn fail(&mut self, error: io::Error) -> Result<Option<usize>, ConnectionError> {
        let Some(Some(request)) = self.replies.iter().map(|out| out.end).find(Option::is_some) else {
            return Err(ConnectionError::Read(error));
        };
        let mode = self.mode;
        // It stays in its place, so the number of bytes of memory that wait is only about right for a while.
        if let Some(out) = self.replies.iter_mut().find(|out| out.end.is_some()) {
            let before = out.head.bytes().len();
            out.head = mode.error(&request, error_value(errno(&error).raw_os_error()));
            self.bytes = self.bytes - before + out.head.bytes().len();
        }
        if let Some(first) = self.replies.front_mut()
            && let Body::File { len, .. } = first.body
        {
            self.file_bytes -= len;
            first.body = Body::Zeros(len);
        }
        Ok(Some(0))
    }
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

fn is_of_socket(error: &io::Error) -> bool {
    matches!(errno(error), Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN)
}

fn copy(
    mut stream: &UnixStream,
    file: &File,
    at: u64,
    left: usize,
    buffer: &mut [u8; COPY_BYTES],
) -> io::Result<usize> {
    let got = file.read_at(buffer.get_mut(..left.min(COPY_BYTES)).unwrap_or_default(), at)?;
    stream.write(buffer.get(..got).unwrap_or_default())
}
