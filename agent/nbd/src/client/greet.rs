//! The client's side of "Newstyle negotiation", over any stream that reads and writes with a deadline of its own.
//!
//! ```text
//! greeting ─► flags ─► [STARTTLS, then the caller's stream] ─► EXTENDED_HEADERS or STRUCTURED_REPLY
//!                                                                 └► SET_META_CONTEXT ─► GO (else EXPORT_NAME)
//! ```
//! A server's bytes are hostile: each reply is bounded before it is read, and so is their number.

use std::io::{self, Read, Write};

use crate::{
    handshake::{OptionHeader, REPLY_HEADER_BYTES, STRING_BYTES_MAX},
    wire::{
        FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, Fields, IHAVEOPT, Mode, NBDMAGIC, OPTION_REPLY_MAGIC,
        PAYLOAD_BYTES_MAX, flag, info, opt, rep,
    },
};

/// Largest reply to an option: a name, a description and change.
const REPLY_BYTES_MAX: u32 = 16 << 10;
/// Replies to one option.
const REPLIES_MAX: usize = 1024;
/// What a server that says nothing of its block sizes takes ("Block size constraints").
const PAYLOAD_BYTES_DEFAULT: u32 = 32 << 20;
/// The largest minimum that "Block size constraints" allow.
const BLOCK_MIN_MAX: u32 = 64 << 10;
/// Words of a server that are shown.
const WORDS_MAX: usize = 200;
/// A server that is older than "newstyle".
const OLDSTYLE: u64 = 0x0000_4202_8186_1253;

/// Why a server and this client did not agree.
#[derive(Debug, thiserror::Error)]
pub enum GreetError {
    /// The socket, or the server hung up.
    #[error("the server does not finish its handshake")]
    Io(#[from] io::Error),
    /// It speaks something else.
    #[error("this is no NBD server that can be used: {0}")]
    Protocol(&'static str),
    /// It refused an option that is needed.
    #[error("the server refused: {0}")]
    Refused(String),
    /// There is no such export.
    #[error("the server has no export named `{name}`{words}")]
    NoExport {
        /// The name that was asked for.
        name: String,
        /// What the server says, if anything.
        words: String,
    },
    /// It wants TLS.
    #[error("the server wants TLS: use nbds:// with a certificate")]
    TlsRequired,
    /// It does not offer TLS.
    #[error("the server does not offer TLS: {0}")]
    NoTls(String),
}

/// What to ask for.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) export: String,
    pub(super) contexts: Vec<String>,
    pub(super) mode_max: Mode,
}

/// What both sides agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Terms {
    /// How requests and replies look.
    pub mode: Mode,
    /// Size of the export, bytes.
    pub size_bytes: u64,
    /// `NBD_FLAG_*`.
    pub flags: u16,
    /// Offsets and lengths are multiples of this, a power of two.
    pub block_min_bytes: u32,
    /// Largest payload of one request, bytes.
    pub payload_max_bytes: u32,
    /// Contexts that the server granted: id on the wire, and name.
    pub contexts: Vec<(u32, String)>,
    /// For people; may be empty.
    pub description: String,
}

impl Terms {
    /// Whether a transmission flag is set.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
    /// Whether changes are refused.
    pub fn is_read_only(&self) -> bool {
        self.has(flag::READ_ONLY)
    }
}

/// What the server's greeting says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Greeting {
    fixed: bool,
    no_zeroes: bool,
}

/// A reply to an option.
struct Reply {
    kind: u32,
    payload: Vec<u8>,
}

impl Reply {
    /// What the server says for people, made harmless for a terminal.
    fn words(&self) -> String {
        let text: String = String::from_utf8_lossy(&self.payload).chars().take(WORDS_MAX).collect();
        match text.is_empty() {
            true => format!("error {:#x}", self.kind),
            false => text.escape_debug().to_string(),
        }
    }
}

/// Reads the greeting and answers it.
pub(super) fn begin(stream: &mut (impl Read + Write)) -> Result<Greeting, GreetError> {
    let mut bytes = [0; 18];
    stream.read_exact(&mut bytes)?;
    let mut fields = Fields(&bytes);
    let (first, second, flags) = (fields.u64(), fields.u64(), fields.u16().unwrap_or_default());
    if first != Some(NBDMAGIC) {
        return Err(GreetError::Protocol("it does not greet with NBDMAGIC"));
    }
    match second {
        Some(IHAVEOPT) => {}
        Some(OLDSTYLE) => return Err(GreetError::Protocol("it speaks the oldstyle handshake only")),
        _ => return Err(GreetError::Protocol("it greets with an unknown handshake")),
    }
    let known = flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    stream.write_all(&u32::from(known).to_be_bytes())?;
    Ok(Greeting { fixed: known & FLAG_FIXED_NEWSTYLE != 0, no_zeroes: known & FLAG_NO_ZEROES != 0 })
}

/// Asks for TLS. After `Ok` the stream is the caller's to wrap.
pub(super) fn start_tls(stream: &mut (impl Read + Write), greeting: Greeting) -> Result<(), GreetError> {
    if !greeting.fixed {
        return Err(GreetError::NoTls("its handshake is too old".into()));
    }
    ask(stream, opt::STARTTLS, &[])?;
    let reply = read_reply(stream, opt::STARTTLS)?;
    if reply.kind == rep::ACK { Ok(()) } else { Err(GreetError::NoTls(reply.words())) }
}

/// All options, up to the transmission phase.
pub(super) fn negotiate(
    stream: &mut (impl Read + Write),
    greeting: Greeting,
    wanted: &Wanted,
) -> Result<Terms, GreetError> {
    let mut mode = Mode::Simple;
    let offers = [(Mode::Extended, opt::EXTENDED_HEADERS), (Mode::Structured, opt::STRUCTURED_REPLY)];
    for (offer, option) in offers {
        let allowed = wanted.mode_max == Mode::Extended || wanted.mode_max == offer;
        if greeting.fixed && mode == Mode::Simple && allowed && takes(stream, option)? {
            mode = offer;
        }
    }
    let mut contexts = Vec::new();
    if mode.is_structured() && !wanted.contexts.is_empty() {
        contexts = set_contexts(stream, wanted)?;
    }
    let mut terms = Terms {
        mode,
        size_bytes: 0,
        flags: 0,
        block_min_bytes: 1,
        payload_max_bytes: PAYLOAD_BYTES_DEFAULT,
        contexts,
        description: String::new(),
    };
    if !(greeting.fixed && go(stream, wanted, &mut terms)?) {
        export_name(stream, greeting, wanted, &mut terms)?;
    }
    if terms.flags & flag::HAS_FLAGS == 0 {
        return Err(GreetError::Protocol("its transmission flags make no sense"));
    }
    Ok(terms)
}

fn ask(stream: &mut impl Write, option: u32, payload: &[u8]) -> Result<(), GreetError> {
    Ok(stream.write_all(&OptionHeader::encode(option, payload))?)
}

fn read_reply(stream: &mut impl Read, option: u32) -> Result<Reply, GreetError> {
    let mut head = [0; REPLY_HEADER_BYTES];
    stream.read_exact(&mut head)?;
    let mut fields = Fields(&head);
    let (magic, to) = (fields.u64(), fields.u32());
    let (kind, len) = (fields.u32().unwrap_or_default(), fields.u32().unwrap_or_default());
    if magic != Some(OPTION_REPLY_MAGIC) || to != Some(option) {
        return Err(GreetError::Protocol("an answer does not belong to the option that was asked"));
    }
    if len > REPLY_BYTES_MAX {
        return Err(GreetError::Protocol("an answer to an option is longer than any sensible one"));
    }
    let mut payload = vec![0; len as usize];
    stream.read_exact(&mut payload)?;
    if kind == rep::ERR_TLS_REQD {
        return Err(GreetError::TlsRequired);
    }
    if kind == rep::ERR_SHUTDOWN {
        // Not "I do not know this option": the next connection may be granted all that this one was not.
        return Err(GreetError::Refused("it is shutting down".into()));
    }
    Ok(Reply { kind, payload })
}

/// Whether the server takes an option without a payload.
fn takes(stream: &mut (impl Read + Write), option: u32) -> Result<bool, GreetError> {
    ask(stream, option, &[])?;
    let kind = read_reply(stream, option)?.kind;
    match kind {
        rep::ACK => Ok(true),
        _ if kind >> 31 == 1 => Ok(false),
        _ => Err(GreetError::Protocol("it answers a yes-or-no option with something else")),
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) -> Result<(), GreetError> {
    if text.len() > STRING_BYTES_MAX {
        return Err(GreetError::Refused(format!(
            "a name has {} bytes, at most 4096 are possible",
            text.len()
        )));
    }
    // At most 4096.
    out.extend((text.len() as u32).to_be_bytes());
    out.extend(text.as_bytes());
    Ok(())
}

fn set_contexts(stream: &mut (impl Read + Write), wanted: &Wanted) -> Result<Vec<(u32, String)>, GreetError> {
    let mut payload = Vec::new();
    put_string(&mut payload, &wanted.export)?;
    payload.extend(u32::try_from(wanted.contexts.len()).unwrap_or(u32::MAX).to_be_bytes());
    for context in &wanted.contexts {
        put_string(&mut payload, context)?;
    }
    ask(stream, opt::SET_META_CONTEXT, &payload)?;
    let mut contexts: Vec<(u32, String)> = Vec::new();
    for _ in 0..REPLIES_MAX {
        let reply = read_reply(stream, opt::SET_META_CONTEXT)?;
        match reply.kind {
            rep::ACK => return Ok(contexts),
            rep::META_CONTEXT => {
                let mut fields = Fields(&reply.payload);
                let id = fields.u32().ok_or(GreetError::Protocol("a context without an id"))?;
                let name = String::from_utf8_lossy(fields.0).into_owned();
                if contexts.iter().any(|(known, _)| *known == id) {
                    return Err(GreetError::Protocol("two contexts have one id"));
                }
                contexts.push((id, name));
            }
            // A server without contexts, or without this one: do without.
            kind if kind >> 31 == 1 => return Ok(Vec::new()),
            _ => return Err(GreetError::Protocol("it answers for contexts with something else")),
        }
    }
    Err(GreetError::Protocol("it names contexts without end"))
}

/// False: the server does not know GO.
fn go(stream: &mut (impl Read + Write), wanted: &Wanted, terms: &mut Terms) -> Result<bool, GreetError> {
    let mut payload = Vec::new();
    put_string(&mut payload, &wanted.export)?;
    payload.extend(2_u16.to_be_bytes());
    payload.extend(info::BLOCK_SIZE.to_be_bytes());
    payload.extend(info::DESCRIPTION.to_be_bytes());
    ask(stream, opt::GO, &payload)?;
    let mut described = false;
    for _ in 0..REPLIES_MAX {
        let reply = read_reply(stream, opt::GO)?;
        match reply.kind {
            rep::ACK if described => return Ok(true),
            rep::ACK => return Err(GreetError::Protocol("it does not say how large the export is")),
            rep::INFO => described |= take_info(&reply.payload, terms)?,
            rep::ERR_UNSUP => return Ok(false),
            rep::ERR_UNKNOWN => {
                let words =
                    if reply.payload.is_empty() { String::new() } else { format!(": {}", reply.words()) };
                return Err(GreetError::NoExport { name: wanted.export.clone(), words });
            }
            kind if kind >> 31 == 1 => return Err(GreetError::Refused(reply.words())),
            _ => return Err(GreetError::Protocol("it answers GO with something else")),
        }
    }
    Err(GreetError::Protocol("it describes the export without end"))
}

/// True: this was the description that must come.
fn take_info(payload: &[u8], terms: &mut Terms) -> Result<bool, GreetError> {
    let mut fields = Fields(payload);
    let short = || GreetError::Protocol("a description of the export is too short");
    match fields.u16().ok_or_else(short)? {
        info::EXPORT => {
            terms.size_bytes = fields.u64().ok_or_else(short)?;
            terms.flags = fields.u16().ok_or_else(short)?;
            return Ok(true);
        }
        info::BLOCK_SIZE => {
            let min = fields.u32().ok_or_else(short)?;
            let (_, max) = (fields.u32().ok_or_else(short)?, fields.u32().ok_or_else(short)?);
            if !min.is_power_of_two() || min > BLOCK_MIN_MAX || max < min {
                return Err(GreetError::Protocol("its block sizes make no sense"));
            }
            terms.block_min_bytes = min;
            // Whole blocks, and never more than any server has to take.
            terms.payload_max_bytes = max.min(PAYLOAD_BYTES_MAX) / min * min;
        }
        info::DESCRIPTION => {
            terms.description = String::from_utf8_lossy(fields.0).chars().take(WORDS_MAX).collect::<String>();
        }
        _ => {}
    }
    Ok(false)
}

/// The way of old servers: no answer but the export, or a hang-up.
fn export_name(
    stream: &mut (impl Read + Write),
    greeting: Greeting,
    wanted: &Wanted,
    terms: &mut Terms,
) -> Result<(), GreetError> {
    if wanted.export.len() > STRING_BYTES_MAX {
        return Err(GreetError::Refused("the export's name is too long".into()));
    }
    ask(stream, opt::EXPORT_NAME, wanted.export.as_bytes())?;
    let mut bytes = [0; 10 + 124];
    let len = if greeting.no_zeroes { 10 } else { bytes.len() };
    let answer = bytes.get_mut(..len).unwrap_or_default();
    stream.read_exact(answer).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => {
            GreetError::NoExport { name: wanted.export.clone(), words: ": it hung up".into() }
        }
        _ => e.into(),
    })?;
    let mut fields = Fields(answer);
    terms.size_bytes = fields.u64().unwrap_or_default();
    terms.flags = fields.u16().unwrap_or_default();
    Ok(())
}
