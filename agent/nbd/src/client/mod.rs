//! An NBD client: blocking for its callers, pipelined on the wire, and not put off by a lost connection.
//!
//! ```text
//! callers ──submit──► Window (bounded) ──► Engine (one thread) ──► Link ──► server
//!    ▲                                        │ lost link: connect again, replay, ask again
//!    └────────────── Ticket::wait ◄───────────┘
//! ```
//! # What a lost connection means
//! - What was not answered is asked again: reads, block status, and changes, which are idempotent.
//! - A change that *was* answered may still be lost with the server until a flush is answered. Such changes are kept
//!   (64 MiB at most, then the client flushes by itself) and sent again first, in their order, before anything new; a
//!   flush that is answered therefore covers all that was answered before it, on whichever connection that was. This
//!   holds as long as nobody else writes to the same bytes meanwhile. A server without flush promises nothing.
//! - An export that comes back with another size, or allows less, ends the client.
//! - When nothing was answered for [`Options::give_up`], all fails with [`ClientError::Lost`].
//!
//! Owns: sockets and one thread a client. Never: TLS (the caller wraps the stream, see [`Tls`]), files.
//! A server's bytes are hostile: bounded, and what breaks the protocol ends the client with a clear error.

mod engine;
mod greet;
mod kept;
mod link;
mod reply;
mod stream;
mod uri;
mod window;

#[cfg(test)]
mod cuts_test;
#[cfg(test)]
mod hostile_test;

use std::{fmt, io, sync::Arc, thread::JoinHandle, time::Duration};

use self::{
    engine::Engine,
    link::Link,
    window::{Slot, Window},
};
use crate::wire::{Mode, flag};

pub use greet::{GreetError, Terms};
pub use reply::{ProtocolError, Run};
pub use stream::{Address, Stream};
pub use uri::{Uri, UriError, is_uri};
pub use window::{Answer, Op};

/// Operations on ranges without payload are cut to this without extended headers, whose lengths have 32 bits.
const RANGE_BYTES_MAX: u64 = 1 << 30;
/// Payloads are cut to this: enough for throughput, and some of them are under way together.
const PIECE_BYTES_MAX: u64 = 1 << 20;
/// How long the first connection and its handshake may take.
const CONNECT_MAX: Duration = Duration::from_secs(30);

/// Puts TLS around a stream on which STARTTLS was just granted.
pub trait Tls: Send + Sync {
    /// Gives back a stream that is plain on this side, such as one end of a pair whose other end is relayed. Called
    /// again for each new connection.
    fn wrap(&self, stream: Stream) -> io::Result<Stream>;
}

/// How to reach an export, and what to expect.
#[derive(Clone)]
pub struct Options {
    /// Where the server is.
    pub address: Address,
    /// The export's name.
    pub export: String,
    /// TLS, forced if given.
    pub tls: Option<Arc<dyn Tls>>,
    /// Metadata contexts, such as `base:allocation`. The server may grant fewer.
    pub contexts: Vec<String>,
    /// The most that is agreed on; [`Mode::Extended`] unless a test wants less.
    pub mode_max: Mode,
    /// Operations under way.
    pub depth: usize,
    /// Memory of operations that are not answered, bytes.
    pub window_bytes: usize,
    /// A server that says nothing for so long while it is asked is connected anew.
    pub stall: Duration,
    /// Without an answer for so long, all fails.
    pub give_up: Duration,
}

impl Options {
    /// What a URI names, with bounds that suit most. TLS, where the URI wants it, is the caller's to add.
    pub fn new(uri: &Uri) -> Options {
        Options {
            address: uri.address.clone(),
            export: uri.export.clone(),
            tls: None,
            contexts: vec!["base:allocation".to_owned()],
            mode_max: Mode::Extended,
            depth: 16,
            window_bytes: 32 << 20,
            stall: Duration::from_secs(30),
            give_up: Duration::from_secs(120),
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Options({}, tls: {})", self.address, self.tls.is_some())
    }
}

/// Why one attempt to connect failed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The socket.
    #[error("the connection failed")]
    Socket(#[source] io::Error),
    /// TLS.
    #[error("TLS failed")]
    Tls(#[source] io::Error),
    /// The handshake.
    #[error("the handshake failed")]
    Greet(#[from] GreetError),
}

/// Why an operation, or the client, failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// The first connection.
    #[error("cannot use the NBD server at {address}")]
    Connect {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: Arc<ConnectError>,
    },
    /// The thread of the client cannot start, or is gone.
    #[error("the NBD client has no thread")]
    Thread(#[source] Arc<io::Error>),
    /// The connection was lost, and none that is of use came.
    #[error("the NBD server at {address} was lost, and nothing was answered for {waited_s} s")]
    Lost {
        /// Where.
        address: String,
        /// How long.
        waited_s: u64,
        /// The last failure.
        #[source]
        source: Arc<io::Error>,
    },
    /// It came back as something else.
    #[error("the NBD export has changed while the connection was lost: {0}")]
    Changed(String),
    /// The server breaks the protocol.
    #[error("the NBD server cannot be believed")]
    Protocol(#[from] ProtocolError),
    /// The server answered an error.
    #[error("the NBD server answered {value} ({}) to a {what}{}", name(*value), place(range))]
    Server {
        /// What was asked.
        what: &'static str,
        /// The protocol's error value.
        value: u32,
        /// Offset and length.
        range: Option<(u64, u64)>,
    },
    /// A range outside the export, or not of whole blocks.
    #[error("bytes {offset}+{len} are not whole blocks of {block} bytes within the export's {size} bytes")]
    Range {
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
        /// The server's smallest block.
        block: u32,
        /// The export's size.
        size: u64,
    },
    /// The server does not offer this.
    #[error("the NBD server does not offer {0}")]
    Unsupported(&'static str),
}

fn name(value: u32) -> &'static str {
    use crate::wire::errno;
    match value {
        errno::EPERM => "not permitted: the export may be read-only",
        errno::EIO => "I/O error",
        errno::ENOMEM => "out of memory",
        errno::EINVAL => "invalid",
        errno::ENOSPC => "no space",
        errno::EOVERFLOW => "too large",
        errno::ENOTSUP => "not supported",
        errno::ESHUTDOWN => "shutting down",
        _ => "unknown",
    }
}

fn place(range: &Option<(u64, u64)>) -> String {
    range.map(|(offset, len)| format!(" of {len} bytes at {offset}")).unwrap_or_default()
}

/// An error with its reasons, in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(reason) = source {
        text = format!("{text}: {reason}");
        source = reason.source();
    }
    text
}

struct Handle {
    window: Arc<Window>,
    terms: Terms,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.window.close();
        if let Some(thread) = self.thread.take() {
            // A panic of it was reported where it happened.
            let _ = thread.join();
        }
    }
}

/// A connected client. Clones share it; it says goodbye when the last one and the last ticket are gone. See the head
/// of this file.
#[derive(Clone)]
pub struct Client(Arc<Handle>);

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({:?})", self.0.terms)
    }
}

/// An operation that was submitted.
#[derive(Debug)]
#[must_use = "an operation has failed or not only once its ticket says so"]
pub struct Ticket {
    slot: Arc<Slot>,
    /// Keeps the client going.
    _client: Client,
}

impl Ticket {
    /// Waits for the answer.
    pub fn wait(self) -> Result<Answer, ClientError> {
        self.slot.take()
    }
}

impl Client {
    /// Connects and agrees on terms. The first connection is tried once.
    pub fn connect(options: Options) -> Result<Client, ClientError> {
        let failed =
            |source| ClientError::Connect { address: options.address.to_string(), source: Arc::new(source) };
        let no_thread = |e| ClientError::Thread(Arc::new(e));
        let (link, terms) = Link::connect(&options, CONNECT_MAX).map_err(failed)?;
        let window = Window::new(options.depth.saturating_mul(2), options.window_bytes).map_err(no_thread)?;
        let window = Arc::new(window);
        let engine = Engine::new(Arc::clone(&window), options, terms.clone(), link);
        let thread = std::thread::Builder::new()
            .name("nbd-client".into())
            .spawn(move || engine.run())
            .map_err(no_thread)?;
        Ok(Client(Arc::new(Handle { window, terms, thread: Some(thread) })))
    }

    /// What was agreed on.
    pub fn terms(&self) -> &Terms {
        &self.0.terms
    }

    /// Size of the export, bytes.
    pub fn size_bytes(&self) -> u64 {
        self.0.terms.size_bytes
    }

    /// Position of a context in the answers of [`Op::Status`]; `None` if the server did not grant it.
    pub fn context(&self, name: &str) -> Option<usize> {
        self.0.terms.contexts.iter().position(|(_, known)| known == name)
    }

    /// The largest payload that is worth submitting at once.
    pub fn piece_bytes(&self) -> u64 {
        PIECE_BYTES_MAX.min(self.0.terms.payload_max_bytes.into())
    }

    /// The longest range without a payload.
    fn range_bytes_max(&self) -> u64 {
        if self.0.terms.mode == Mode::Extended { u64::MAX } else { RANGE_BYTES_MAX }
    }

    /// Submits one operation; waits while the window is full. Ranges must fit into one request, see
    /// [`Client::piece_bytes`].
    pub fn submit(&self, op: Op) -> Result<Ticket, ClientError> {
        let terms = &self.0.terms;
        if let Some((offset, len)) = op.range() {
            let block = u64::from(terms.block_min_bytes);
            let whole = offset.is_multiple_of(block) && len.is_multiple_of(block);
            let inside = offset.checked_add(len).is_some_and(|end| end <= terms.size_bytes);
            let max = if op.memory() > 0 { terms.payload_max_bytes.into() } else { self.range_bytes_max() };
            if !whole || !inside || len == 0 || len > max {
                let (block, size) = (terms.block_min_bytes, terms.size_bytes);
                return Err(ClientError::Range { offset, len, block, size });
            }
        }
        let offered = match &op {
            _ if op.changes() && terms.is_read_only() => Err("writing: the export is read-only"),
            Op::Flush if !terms.has(flag::SEND_FLUSH) => Err("flushes"),
            Op::Trim { .. } if !terms.has(flag::SEND_TRIM) => Err("trimming"),
            Op::WriteZeroes { .. } if !terms.has(flag::SEND_WRITE_ZEROES) => Err("writing zeroes"),
            Op::Status { .. } if terms.contexts.is_empty() => Err("metadata contexts"),
            _ => Ok(()),
        };
        offered.map_err(ClientError::Unsupported)?;
        let slot = self.0.window.submit(op)?;
        Ok(Ticket { slot, _client: self.clone() })
    }

    /// Fills the buffer from `offset`, in pieces that are under way together.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ClientError> {
        let piece = self.piece_bytes() as usize;
        let mut at = offset;
        let mut tickets = Vec::new();
        for part in buffer.chunks(piece) {
            tickets.push(self.submit(Op::Read { offset: at, buffer: vec![0; part.len()] })?);
            at = at.saturating_add(part.len() as u64);
        }
        for (part, ticket) in buffer.chunks_mut(piece).zip(tickets) {
            if let Answer::Data(data) = ticket.wait()? {
                part.copy_from_slice(&data);
            }
        }
        Ok(())
    }

    /// Writes the bytes at `offset`, in pieces that are under way together.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), ClientError> {
        let mut at = offset;
        let mut tickets = Vec::new();
        for part in data.chunks(self.piece_bytes() as usize) {
            tickets.push(self.submit(Op::Write { offset: at, data: part.to_vec().into() })?);
            at = at.saturating_add(part.len() as u64);
        }
        tickets.into_iter().try_for_each(|ticket| ticket.wait().map(drop))
    }

    /// Makes what was answered before durable. Without a flush to offer, the server promises nothing and is not asked.
    pub fn flush(&self) -> Result<(), ClientError> {
        if !self.0.terms.has(flag::SEND_FLUSH) || self.0.terms.is_read_only() {
            return Ok(());
        }
        self.submit(Op::Flush)?.wait().map(drop)
    }

    /// Says that a range is not needed. A server that cannot use that is not told.
    pub fn trim(&self, offset: u64, len: u64) -> Result<(), ClientError> {
        if !self.0.terms.has(flag::SEND_TRIM) {
            return Ok(());
        }
        self.ranges(offset, len, |offset, len| self.submit(Op::Trim { offset, len }))
    }

    /// Makes a range read as zeros; by writing them where the server knows no better.
    pub fn write_zeroes(&self, offset: u64, len: u64, may_hole: bool) -> Result<(), ClientError> {
        if self.0.terms.has(flag::SEND_WRITE_ZEROES) {
            return self
                .ranges(offset, len, |offset, len| self.submit(Op::WriteZeroes { offset, len, may_hole }));
        }
        let zeros = Arc::new(vec![0; self.piece_bytes() as usize]);
        let (mut at, end) = (offset, offset.saturating_add(len));
        while at < end {
            let n = (end - at).min(zeros.len() as u64);
            let data =
                if n == zeros.len() as u64 { Arc::clone(&zeros) } else { Arc::new(vec![0; n as usize]) };
            let _ = self.submit(Op::Write { offset: at, data })?.wait()?;
            at += n;
        }
        Ok(())
    }

    fn ranges(
        &self,
        offset: u64,
        len: u64,
        ask: impl Fn(u64, u64) -> Result<Ticket, ClientError>,
    ) -> Result<(), ClientError> {
        let (mut at, end) = (offset, offset.saturating_add(len));
        while at < end {
            let n = (end - at).min(self.range_bytes_max());
            let _ = ask(at, n)?.wait()?;
            at += n;
        }
        Ok(())
    }

    /// The runs of one context over a range that starts at `offset`; they may cover less than `len`, never nothing.
    pub fn status(&self, context: usize, offset: u64, len: u64) -> Result<Vec<Run>, ClientError> {
        let len = len.min(self.range_bytes_max());
        match self.submit(Op::Status { offset, len })?.wait()? {
            Answer::Runs(mut runs) if context < runs.len() => Ok(runs.swap_remove(context)),
            _ => Err(ClientError::Unsupported("this metadata context")),
        }
    }
}
