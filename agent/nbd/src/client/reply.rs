//! What comes back in the transmission phase: a decoder that is told where bytes went, and never reads by itself. Pure.
//!
//! ```text
//! target() ──► the caller reads into it ──► advance(n) ──► Nothing | Done(answer)
//!   Head ──whole──► Prefix (offset, context id) ──► Data (into the request's own memory) | Extents | Words
//! ```
//! Invariants: no reply is taken that no request asked for; a chunk never leaves the range that was asked; memory is
//! bounded by [`STATUS_BYTES_MAX`] and by what the caller gave to the request.

use std::collections::HashMap;

use crate::wire::{
    EXTENDED_REPLY_MAGIC, Fields, Mode, Request, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC, chunk, cmd,
};

/// Largest list of extents in one chunk, bytes.
pub(super) const STATUS_BYTES_MAX: u64 = 4 << 20;
/// Words with an error: "a message" of at most a string's length, its head, and an offset.
const WORDS_BYTES_MAX: u64 = 4096 + 6 + 8;

/// A run of a metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Bytes.
    pub len: u64,
    /// As the context defines them, such as [`crate::wire::STATE_HOLE`].
    pub flags: u64,
}

/// The server breaks the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server breaks the protocol: {0}")]
pub struct ProtocolError(pub &'static str);

/// A request on its way, with the memory for its answer.
#[derive(Debug, Default)]
pub(super) struct Expected {
    /// Where a read's data go; as long as the request.
    pub(super) buffer: Vec<u8>,
    /// Of a block status: context id and runs.
    pub(super) runs: Vec<(u32, Vec<Run>)>,
    /// Bytes of a read that came.
    covered: u64,
    /// The first error that was told.
    error: Option<u32>,
    command: u16,
    offset: u64,
    len: u64,
}

impl Expected {
    pub(super) fn new(request: &Request, buffer: Vec<u8>) -> Expected {
        let Request { command, offset, len, .. } = *request;
        Expected { buffer, command, offset, len, ..Expected::default() }
    }
}

/// A request that is answered.
#[derive(Debug)]
pub(super) struct Answered {
    pub(super) cookie: u64,
    pub(super) expected: Expected,
    /// The error value, if it failed.
    pub(super) error: Option<u32>,
}

#[derive(Debug, Clone, Copy)]
struct Chunk {
    cookie: u64,
    done: bool,
    kind: u16,
    payload: u64,
}

#[derive(Debug)]
enum Part {
    /// The first bytes of a reply: the magic, and with it the length of the rest.
    Head,
    /// Small fields, kept whole until they are there.
    Fields(Chunk, Vec<u8>),
    /// Data, from here on in the request's buffer.
    Data { chunk: Chunk, at: usize, end: usize },
}

/// See the head of this file.
#[derive(Debug)]
pub(super) struct Replies {
    mode: Mode,
    expected: HashMap<u64, Expected>,
    /// Ids of contexts that the server granted.
    contexts: Vec<u32>,
    part: Part,
    head: [u8; 32],
    /// Bytes of the head or the fields that are there.
    filled: usize,
}

fn broken<T>(why: &'static str) -> Result<T, ProtocolError> {
    Err(ProtocolError(why))
}

impl Replies {
    pub(super) fn new(mode: Mode, contexts: Vec<u32>) -> Replies {
        Replies { mode, expected: HashMap::new(), contexts, part: Part::Head, head: [0; 32], filled: 0 }
    }

    pub(super) fn expect(&mut self, cookie: u64, expected: Expected) {
        self.expected.insert(cookie, expected);
    }

    /// What no answer came for.
    pub(super) fn into_expected(self) -> HashMap<u64, Expected> {
        self.expected
    }

    pub(super) fn waiting(&self) -> usize {
        self.expected.len()
    }

    /// Bytes of the head that is being read: the magic decides where both kinds may come.
    fn head_bytes(&self) -> usize {
        if self.mode == Mode::Extended {
            return 32;
        }
        let magic = self.head.first_chunk::<4>().map(|b| u32::from_be_bytes(*b));
        if self.filled >= 4 && magic == Some(STRUCTURED_REPLY_MAGIC) { 20 } else { 16 }
    }

    /// Where the next bytes go. Never empty.
    pub(super) fn target(&mut self) -> &mut [u8] {
        let end = self.head_bytes();
        match &mut self.part {
            Part::Head => self.head.get_mut(self.filled..end).unwrap_or_default(),
            Part::Fields(_, bytes) => bytes.get_mut(self.filled..).unwrap_or_default(),
            Part::Data { chunk, at, end } => match self.expected.get_mut(&chunk.cookie) {
                Some(expected) => expected.buffer.get_mut(*at..*end).unwrap_or_default(),
                None => &mut [],
            },
        }
    }

    /// Says that `n` bytes were put into the target.
    pub(super) fn advance(&mut self, n: usize) -> Result<Option<Answered>, ProtocolError> {
        match &mut self.part {
            Part::Head => {
                self.filled = self.filled.saturating_add(n);
                if self.filled < self.head_bytes() {
                    return Ok(None);
                }
                self.filled = 0;
                self.head_done()
            }
            Part::Fields(chunk, bytes) => {
                self.filled = self.filled.saturating_add(n);
                if self.filled < bytes.len() {
                    return Ok(None);
                }
                self.filled = 0;
                let (chunk, bytes) = (*chunk, std::mem::take(bytes));
                self.part = Part::Head;
                self.fields_done(chunk, &bytes)
            }
            Part::Data { chunk, at, end } => {
                *at = at.saturating_add(n);
                if *at < *end {
                    return Ok(None);
                }
                let chunk = *chunk;
                self.part = Part::Head;
                self.chunk_done(chunk)
            }
        }
    }

    fn head_done(&mut self) -> Result<Option<Answered>, ProtocolError> {
        let head = self.head;
        let mut fields = Fields(&head);
        let magic = fields.u32().unwrap_or_default();
        if magic == SIMPLE_REPLY_MAGIC && self.mode != Mode::Extended {
            let error = fields.u32().unwrap_or_default();
            return self.simple(fields.u64().unwrap_or_default(), error);
        }
        let wanted = if self.mode == Mode::Extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
        if magic != wanted || self.mode == Mode::Simple {
            return broken("a reply starts with an unknown magic");
        }
        let (flags, kind) = (fields.u16().unwrap_or_default(), fields.u16().unwrap_or_default());
        let cookie = fields.u64().unwrap_or_default();
        let Some(expected) = self.expected.get(&cookie) else {
            return broken("it answers a request that is not under way");
        };
        let payload = match self.mode {
            Mode::Extended => {
                if fields.u64() != Some(expected.offset) {
                    return broken("a reply has another offset than its request");
                }
                fields.u64().unwrap_or_default()
            }
            Mode::Simple | Mode::Structured => u64::from(fields.u32().unwrap_or_default()),
        };
        let chunk = Chunk { cookie, done: flags & chunk::FLAG_DONE != 0, kind, payload };
        let command = expected.command;
        self.begin_chunk(chunk, command)
    }

    /// A simple reply: to a read only where chunks were not agreed on.
    fn simple(&mut self, cookie: u64, error: u32) -> Result<Option<Answered>, ProtocolError> {
        let Some(expected) = self.expected.get_mut(&cookie) else {
            return broken("it answers a request that is not under way");
        };
        let reads = expected.command == cmd::READ;
        if self.mode == Mode::Structured && (reads || expected.command == cmd::BLOCK_STATUS) {
            return broken("it answers a read by a simple reply after it agreed to structured ones");
        }
        if error != 0 {
            expected.error = Some(error);
        } else if reads {
            let end = expected.buffer.len();
            expected.covered = expected.len;
            let chunk = Chunk { cookie, done: true, kind: chunk::OFFSET_DATA, payload: expected.len };
            self.part = Part::Data { chunk, at: 0, end };
            return Ok(None);
        }
        self.finish(cookie)
    }

    /// How many bytes of fields come before data, or in all.
    fn begin_chunk(&mut self, chunk: Chunk, command: u16) -> Result<Option<Answered>, ProtocolError> {
        let is_error = chunk.kind >> 15 == 1;
        let extents = if self.mode == Mode::Extended { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS };
        let fields = match chunk.kind {
            chunk::NONE if chunk.payload == 0 && chunk.done => return self.chunk_done(chunk),
            chunk::NONE => return broken("an empty chunk that is not the last, or not empty"),
            chunk::OFFSET_DATA if command == cmd::READ && chunk.payload > 8 => 8,
            chunk::OFFSET_HOLE if command == cmd::READ && chunk.payload == 12 => 12,
            kind if kind == extents && command == cmd::BLOCK_STATUS => {
                if chunk.payload > STATUS_BYTES_MAX {
                    return broken("a list of extents is longer than any sensible one");
                }
                chunk.payload
            }
            _ if is_error && (6..=WORDS_BYTES_MAX).contains(&chunk.payload) => chunk.payload,
            _ => return broken("a chunk that does not fit its request"),
        };
        if fields == 0 {
            return broken("a list of extents without a context");
        }
        // Bounded above.
        self.part = Part::Fields(chunk, vec![0; fields as usize]);
        Ok(None)
    }

    fn fields_done(&mut self, chunk: Chunk, bytes: &[u8]) -> Result<Option<Answered>, ProtocolError> {
        let contexts = &self.contexts;
        let Some(expected) = self.expected.get_mut(&chunk.cookie) else {
            return broken("it answers a request that is not under way");
        };
        let mut fields = Fields(bytes);
        match chunk.kind {
            chunk::OFFSET_DATA => {
                let offset = fields.u64().unwrap_or_default();
                let len = chunk.payload.saturating_sub(8);
                let (at, end) = expected.cover(offset, len)?;
                self.part = Part::Data { chunk, at, end };
                return Ok(None);
            }
            chunk::OFFSET_HOLE => {
                let (offset, len) = (fields.u64().unwrap_or_default(), fields.u32().unwrap_or_default());
                let (at, end) = expected.cover(offset, len.into())?;
                expected.buffer.get_mut(at..end).unwrap_or_default().fill(0);
            }
            chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => {
                let id = fields.u32().ok_or(ProtocolError("a list of extents without a context"))?;
                if !contexts.contains(&id) || expected.runs.iter().any(|(known, _)| *known == id) {
                    return broken("extents of a context that was not asked for, or twice");
                }
                let runs = runs(fields, self.mode, expected.len)?;
                expected.runs.push((id, runs));
            }
            _ => {
                let error = fields.u32().unwrap_or_default();
                if error == 0 {
                    return broken("an error without a value");
                }
                expected.error.get_or_insert(error);
            }
        }
        self.chunk_done(chunk)
    }

    fn chunk_done(&mut self, chunk: Chunk) -> Result<Option<Answered>, ProtocolError> {
        if chunk.done { self.finish(chunk.cookie) } else { Ok(None) }
    }

    fn finish(&mut self, cookie: u64) -> Result<Option<Answered>, ProtocolError> {
        let Some(expected) = self.expected.remove(&cookie) else {
            return broken("it answers a request that is not under way");
        };
        if expected.error.is_none() {
            if expected.command == cmd::READ && expected.covered != expected.len {
                return broken("a read was answered in part");
            }
            if expected.command == cmd::BLOCK_STATUS && expected.runs.len() != self.contexts.len() {
                return broken("a block status was answered without all its contexts");
            }
        }
        let error = expected.error;
        Ok(Some(Answered { cookie, expected, error }))
    }
}

impl Expected {
    /// The part of the buffer that a chunk fills. A server that sends a byte twice leaves another out, or sends more
    /// than was asked for: both are noticed by the count.
    fn cover(&mut self, offset: u64, len: u64) -> Result<(usize, usize), ProtocolError> {
        let outside = ProtocolError("data outside of what was asked for");
        let at = offset.checked_sub(self.offset).ok_or(outside)?;
        let end = at.checked_add(len).filter(|end| *end <= self.len).ok_or(outside)?;
        self.covered = self.covered.saturating_add(len);
        if len == 0 || self.covered > self.len {
            return broken("data that came before, or none");
        }
        match (usize::try_from(at), usize::try_from(end)) {
            (Ok(at), Ok(end)) if end <= self.buffer.len() => Ok((at, end)),
            _ => Err(outside),
        }
    }
}

/// The runs of a chunk, cut to what was asked for.
fn runs(mut fields: Fields<'_>, mode: Mode, len: u64) -> Result<Vec<Run>, ProtocolError> {
    if mode == Mode::Extended {
        let count = fields.u32().unwrap_or_default() as usize;
        if fields.0.len() != count.saturating_mul(16) {
            return broken("a list of extents has another length than it says");
        }
    }
    let mut runs = Vec::new();
    let mut left = len;
    while !fields.0.is_empty() && left > 0 {
        let run = match mode {
            Mode::Extended => (fields.u64(), fields.u64()),
            Mode::Simple | Mode::Structured => (fields.u32().map(u64::from), fields.u32().map(u64::from)),
        };
        let (Some(run_len), Some(flags)) = run else { return broken("half an extent") };
        if run_len == 0 {
            return broken("an extent without length");
        }
        // The last one may go on past what was asked.
        let len = run_len.min(left);
        left = left.saturating_sub(len);
        runs.push(Run { len, flags });
    }
    if runs.is_empty() { broken("a list without extents") } else { Ok(runs) }
}
