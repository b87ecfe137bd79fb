//! The handshake phase: pure functions over bytes, and the server's side as a state machine.
//!
//! # For other fronts
//! Whoever speaks the handshake on a transport of its own (seriod, asynchronously, before and after TLS) uses:
//! - [`greeting`]: the 18 bytes that a server sends first;
//! - [`ClientFlags::decode`]: the client's 4 bytes;
//! - [`OptionHeader::decode`]: 16 bytes, then `len` bytes of payload (bounded by [`OPTION_BYTES_MAX`]);
//! - [`export_name_of`]: which export an option names, whatever its kind;
//! - [`ExportRequest::decode`] (INFO, GO) and [`MetaRequest::decode`] (LIST/SET_META_CONTEXT);
//! - [`reply`] with [`rep`] values: `ACK`, `ERR_TLS_REQD`, `ERR_UNKNOWN`, … for the answers.
//!
//! [`crate::Front`] puts these together for a TLS front; most callers want that.
//!
//! # States
//! ```text
//! Flags ──4 bytes──► Options ──GO / EXPORT_NAME──► Negotiated (transmission phase)
//!                     └──ABORT, error──► Closed
//! ```

use crate::{
    backend::ExportInfo,
    wire::{
        FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, Fields, IHAVEOPT, Mode, NBDMAGIC, OPTION_REPLY_MAGIC,
        PAYLOAD_BYTES_MAX, flag, info, opt, rep,
    },
};

/// Largest payload of an option that is read; a larger one ends the connection.
pub const OPTION_BYTES_MAX: u32 = 64 << 10;
/// Longest string ("String length": "MUST NOT exceed 4096 bytes").
pub const STRING_BYTES_MAX: usize = 4096;
/// Bytes of an option before its payload.
pub const OPTION_HEADER_BYTES: usize = 16;
/// Bytes of the server's greeting.
pub const GREETING_BYTES: usize = 18;
/// Bytes of a reply to an option before its payload.
pub const REPLY_HEADER_BYTES: usize = 20;
/// Options that one client may send before it starts: "denial of service" by endless haggling.
const OPTIONS_MAX: u32 = 1024;

/// Why a handshake ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandshakeError {
    /// Flags that this server does not offer.
    #[error("the client sent unknown handshake flags {0:#x}")]
    ClientFlags(u32),
    /// Not an option.
    #[error("the client sent {0:#x} where an option should start")]
    OptionMagic(u64),
    /// An option larger than any sensible one.
    #[error("the client sent an option of {0} bytes; the limit is {OPTION_BYTES_MAX}")]
    OptionTooLong(u32),
    /// Haggling without end.
    #[error("the client sent more than {OPTIONS_MAX} options")]
    TooManyOptions,
    /// `NBD_OPT_EXPORT_NAME` cannot be answered with an error.
    #[error("the client asked for an export that does not exist, by NBD_OPT_EXPORT_NAME")]
    UnknownExport,
    /// `NBD_OPT_EXPORT_NAME` again, with no place free.
    #[error("too many clients are at work already")]
    Full,
    /// The client is done.
    #[error("the client ended the handshake")]
    Aborted,
}

/// The client's handshake flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientFlags {
    /// The bits, all known.
    pub bits: u32,
}

impl ClientFlags {
    /// Reads 4 bytes; unknown flags are an error ("MUST close the TCP connection").
    pub fn decode(bytes: [u8; 4]) -> Result<ClientFlags, HandshakeError> {
        let bits = u32::from_be_bytes(bytes);
        match bits & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) {
            0 => Ok(ClientFlags { bits }),
            _ => Err(HandshakeError::ClientFlags(bits)),
        }
    }

    /// Whether the 124 zeros after `NBD_OPT_EXPORT_NAME` are left out.
    pub fn no_zeroes(self) -> bool {
        self.bits & u32::from(FLAG_NO_ZEROES) != 0
    }
}

/// The start of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// `NBD_OPT_*`.
    pub option: u32,
    /// Bytes of payload that follow, at most [`OPTION_BYTES_MAX`].
    pub len: u32,
}

impl OptionHeader {
    /// Reads 16 bytes.
    pub fn decode(bytes: [u8; OPTION_HEADER_BYTES]) -> Result<OptionHeader, HandshakeError> {
        let mut fields = Fields(&bytes);
        let (Some(magic), Some(option), Some(len)) = (fields.u64(), fields.u32(), fields.u32()) else {
            return Err(HandshakeError::OptionMagic(0));
        };
        if magic != IHAVEOPT {
            return Err(HandshakeError::OptionMagic(magic));
        }
        if len > OPTION_BYTES_MAX {
            return Err(HandshakeError::OptionTooLong(len));
        }
        Ok(OptionHeader { option, len })
    }

    /// An option's bytes, for the client's side.
    pub fn encode(option: u32, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(OPTION_HEADER_BYTES + payload.len());
        out.extend_from_slice(&IHAVEOPT.to_be_bytes());
        out.extend_from_slice(&option.to_be_bytes());
        out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
        out.extend_from_slice(payload);
        out
    }
}

/// Payload of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportRequest<'a> {
    /// The export's name.
    pub name: &'a str,
    /// `NBD_INFO_*` that the client asks for.
    pub infos: Vec<u16>,
}

impl<'a> ExportRequest<'a> {
    /// `None`: malformed, to be answered with `ERR_INVALID`.
    pub fn decode(payload: &'a [u8]) -> Option<ExportRequest<'a>> {
        let mut fields = Fields(payload);
        let name = string(&mut fields)?;
        let count = fields.u16()?;
        let infos = (0..count).map(|_| fields.u16()).collect::<Option<Vec<_>>>()?;
        fields.0.is_empty().then_some(ExportRequest { name, infos })
    }
}

/// Payload of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetaRequest<'a> {
    /// The export's name.
    pub name: &'a str,
    /// Queries, such as `base:allocation` or `base:`.
    pub queries: Vec<&'a str>,
}

impl<'a> MetaRequest<'a> {
    /// `None`: malformed, to be answered with `ERR_INVALID`.
    pub fn decode(payload: &'a [u8]) -> Option<MetaRequest<'a>> {
        let mut fields = Fields(payload);
        let name = string(&mut fields)?;
        let count = fields.u32()?;
        // Each takes 4 bytes at least, so the payload's bound bounds the list.
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(string(&mut fields)?);
        }
        fields.0.is_empty().then_some(MetaRequest { name, queries })
    }
}

fn string<'a>(fields: &mut Fields<'a>) -> Option<&'a str> {
    let len = fields.u32()? as usize;
    let bytes = fields.bytes(len).filter(|_| len <= STRING_BYTES_MAX)?;
    text(bytes)
}

/// "UTF-8 code points, … MUST NOT contain NUL characters".
fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes).ok().filter(|text| !text.contains('\0'))
}

/// Which export an option names: `None` for options that name none, `Some(Err(()))` when it is malformed.
pub fn export_name_of(option: u32, payload: &[u8]) -> Option<Result<&str, ()>> {
    let name = match option {
        opt::EXPORT_NAME => text(payload).filter(|n| n.len() <= STRING_BYTES_MAX),
        opt::INFO | opt::GO => ExportRequest::decode(payload).map(|r| r.name),
        opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => MetaRequest::decode(payload).map(|r| r.name),
        _ => return None,
    };
    Some(name.ok_or(()))
}

/// What a server sends first.
pub fn greeting() -> [u8; GREETING_BYTES] {
    let mut out = [0; GREETING_BYTES];
    out[..8].copy_from_slice(&NBDMAGIC.to_be_bytes());
    out[8..16].copy_from_slice(&IHAVEOPT.to_be_bytes());
    out[16..].copy_from_slice(&(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    out
}

/// Appends a reply to an option. An error's payload is a message for people.
pub fn reply(out: &mut Vec<u8>, option: u32, kind: u32, payload: &[u8]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(payload);
}

/// Answers the options for structured replies and for extended headers, which include them: the mode never goes
/// back, and nothing is negotiated twice.
pub(crate) fn raise(mode: &mut Mode, option: u32, payload: &[u8], out: &mut Vec<u8>) {
    let wanted = if option == opt::EXTENDED_HEADERS { Mode::Extended } else { Mode::Structured };
    let (kind, why) = match *mode {
        _ if !payload.is_empty() => (rep::ERR_INVALID, "this option has no payload"),
        now if now == wanted => (rep::ERR_INVALID, "this was negotiated already"),
        Mode::Extended => (rep::ERR_EXT_HEADER_REQD, "extended headers were negotiated already"),
        Mode::Simple | Mode::Structured => {
            *mode = wanted;
            (rep::ACK, "")
        }
    };
    reply(out, option, kind, why.as_bytes());
}

/// What the transmission phase starts with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Negotiated {
    /// Position of the export in the list that the handshake was given.
    pub export: usize,
    /// How requests and replies look.
    pub mode: Mode,
    /// Contexts that were set, as positions in [`ExportInfo::contexts`]; the id on the wire is that plus one.
    pub contexts: Vec<usize>,
}

/// The id of a context on the wire.
pub fn context_id(index: usize) -> u32 {
    // A handful of contexts exist; ids are ours to choose, and 0 is easily taken for "none".
    u32::try_from(index).unwrap_or(u32::MAX - 1) + 1
}

/// The server's side. Feed it with [`Handshake::advance`].
pub struct Handshake<'a> {
    exports: &'a [ExportInfo],
    /// Asked when a client is about to get an export: whether there is a place for it.
    admit: &'a dyn Fn() -> bool,
    flags: Option<ClientFlags>,
    mode: Mode,
    /// Of which export the contexts were set, and which.
    contexts: Option<(String, Vec<usize>)>,
    options: u32,
}

impl<'a> Handshake<'a> {
    /// A handshake over these exports. Send [`greeting`] first.
    pub fn new(exports: &'a [ExportInfo]) -> Handshake<'a> {
        Handshake { exports, admit: &|| true, flags: None, mode: Mode::Simple, contexts: None, options: 0 }
    }

    /// Asks `admit` when a client is about to get an export.
    pub fn admitting(self, admit: &'a dyn Fn() -> bool) -> Handshake<'a> {
        Handshake { admit, ..self }
    }

    /// Takes whole messages off the front of `input`, appends answers to `out`. `Ok(Some)`: the transmission
    /// phase begins with what is left in `input`. On an error, send `out` and close. `input` never needs to hold
    /// more than [`OPTION_HEADER_BYTES`] + [`OPTION_BYTES_MAX`] bytes.
    pub fn advance(
        &mut self,
        input: &mut Vec<u8>,
        out: &mut Vec<u8>,
    ) -> Result<Option<Negotiated>, HandshakeError> {
        let mut at = 0;
        let result = loop {
            let rest = input.get(at..).unwrap_or_default();
            let Some(flags) = self.flags else {
                let Some((bytes, _)) = rest.split_first_chunk() else { break Ok(None) };
                self.flags = Some(ClientFlags::decode(*bytes)?);
                at += bytes.len();
                continue;
            };
            let Some((head, rest)) = rest.split_first_chunk::<OPTION_HEADER_BYTES>() else { break Ok(None) };
            let header = OptionHeader::decode(*head)?;
            let Some(payload) = rest.get(..header.len as usize) else { break Ok(None) };
            at += OPTION_HEADER_BYTES + payload.len();
            self.options += 1;
            if self.options > OPTIONS_MAX {
                break Err(HandshakeError::TooManyOptions);
            }
            match self.option(header.option, payload, flags, out) {
                Ok(None) => {}
                end => break end,
            }
        };
        input.drain(..at);
        result
    }

    fn option(
        &mut self,
        option: u32,
        payload: &[u8],
        flags: ClientFlags,
        out: &mut Vec<u8>,
    ) -> Result<Option<Negotiated>, HandshakeError> {
        let error = |out: &mut Vec<u8>, kind, why: &str| {
            reply(out, option, kind, why.as_bytes());
            Ok(None)
        };
        match option {
            opt::EXPORT_NAME => return self.export_name(payload, flags, out).map(Some),
            opt::ABORT => {
                reply(out, option, rep::ACK, &[]);
                return Err(HandshakeError::Aborted);
            }
            opt::LIST if !payload.is_empty() => return error(out, rep::ERR_INVALID, "LIST has no payload"),
            opt::LIST => {
                for export in self.exports {
                    let mut entry = (export.name.len() as u32).to_be_bytes().to_vec();
                    entry.extend_from_slice(export.name.as_bytes());
                    entry.extend_from_slice(export.description.as_bytes());
                    reply(out, option, rep::SERVER, &entry);
                }
                reply(out, option, rep::ACK, &[]);
            }
            opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS => raise(&mut self.mode, option, payload, out),
            opt::INFO | opt::GO => {
                let Some(request) = ExportRequest::decode(payload) else {
                    return error(out, rep::ERR_INVALID, "malformed request for an export");
                };
                let Some(index) = self.find(request.name) else {
                    return error(out, rep::ERR_UNKNOWN, "there is no export of that name");
                };
                if option == opt::GO && !(self.admit)() {
                    return error(
                        out,
                        rep::ERR_POLICY,
                        "too many clients are at work already: try again later",
                    );
                }
                self.describe(option, index, &request.infos, out);
                reply(out, option, rep::ACK, &[]);
                if option == opt::GO {
                    return Ok(Some(self.negotiated(index)));
                }
            }
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.meta_context(option, payload, out),
            _ => return error(out, rep::ERR_UNSUP, "this server does not know that option"),
        }
        Ok(None)
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.exports.iter().position(|e| e.name == name)
    }

    fn negotiated(&mut self, export: usize) -> Negotiated {
        let set = self.contexts.take();
        // "…if the export name differs from that of NBD_OPT_SET_META_CONTEXT, no context is selected."
        let contexts = match (set, self.exports.get(export)) {
            (Some((name, contexts)), Some(info)) if name == info.name => contexts,
            _ => Vec::new(),
        };
        Negotiated { export, mode: self.mode, contexts }
    }

    /// The transmission flags of an export.
    fn export_flags(&self, export: &ExportInfo) -> u16 {
        // Multi-conn for writable ones too: a flush on any connection covers what all have been answered.
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_CACHE | flag::CAN_MULTI_CONN;
        if self.mode.is_structured() {
            flags |= flag::SEND_DF;
        }
        let set = self.contexts.as_ref().is_some_and(|(name, set)| *name == export.name && !set.is_empty());
        if self.mode == Mode::Extended && set {
            flags |= flag::BLOCK_STATUS_PAYLOAD;
        }
        flags
            | if export.read_only && export.releases {
                // Who is told that an export is read-only must not trim it. Writes are refused one by one.
                flag::SEND_TRIM
            } else if export.read_only {
                flag::READ_ONLY
            } else {
                flag::SEND_FUA | flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO
            }
    }

    fn describe(&self, option: u32, index: usize, infos: &[u16], out: &mut Vec<u8>) {
        let Some(export) = self.exports.get(index) else { return };
        let mut item = info::EXPORT.to_be_bytes().to_vec();
        item.extend_from_slice(&export.size_bytes.to_be_bytes());
        item.extend_from_slice(&self.export_flags(export).to_be_bytes());
        reply(out, option, rep::INFO, &item);
        for (kind, text) in [(info::NAME, &export.name), (info::DESCRIPTION, &export.description)] {
            if infos.contains(&kind) {
                let mut item = kind.to_be_bytes().to_vec();
                item.extend_from_slice(text.as_bytes());
                reply(out, option, rep::INFO, &item);
            }
        }
        if infos.contains(&info::BLOCK_SIZE) {
            let mut item = info::BLOCK_SIZE.to_be_bytes().to_vec();
            for size in [1, 4096, PAYLOAD_BYTES_MAX] {
                item.extend_from_slice(&size.to_be_bytes());
            }
            reply(out, option, rep::INFO, &item);
        }
    }

    fn export_name(
        &mut self,
        payload: &[u8],
        flags: ClientFlags,
        out: &mut Vec<u8>,
    ) -> Result<Negotiated, HandshakeError> {
        let index = std::str::from_utf8(payload).ok().and_then(|name| self.find(name));
        let (Some(index), Some(export)) = (index, index.and_then(|i| self.exports.get(i))) else {
            return Err(HandshakeError::UnknownExport);
        };
        if !(self.admit)() {
            return Err(HandshakeError::Full);
        }
        out.extend_from_slice(&export.size_bytes.to_be_bytes());
        out.extend_from_slice(&self.export_flags(export).to_be_bytes());
        if !flags.no_zeroes() {
            out.extend_from_slice(&[0; 124]);
        }
        Ok(self.negotiated(index))
    }

    fn meta_context(&mut self, option: u32, payload: &[u8], out: &mut Vec<u8>) {
        let set = option == opt::SET_META_CONTEXT;
        if set {
            // Each one replaces the one before, also when it fails.
            self.contexts = None;
        }
        if !self.mode.is_structured() {
            return reply(out, option, rep::ERR_INVALID, b"structured replies must be negotiated first");
        }
        let Some(request) = MetaRequest::decode(payload) else {
            return reply(out, option, rep::ERR_INVALID, b"malformed context request");
        };
        let Some(export) = self.find(request.name).and_then(|i| self.exports.get(i)) else {
            return reply(out, option, rep::ERR_UNKNOWN, b"there is no export of that name");
        };
        let mut chosen = Vec::new();
        for (index, context) in export.contexts.iter().enumerate() {
            let listed = !set && request.queries.is_empty();
            if listed || request.queries.iter().any(|query| matches(query, context, set)) {
                // Listing: "the metadata context ID in these replies is reserved and SHOULD be set to zero".
                let mut item = if set { context_id(index) } else { 0 }.to_be_bytes().to_vec();
                item.extend_from_slice(context.as_bytes());
                reply(out, option, rep::META_CONTEXT, &item);
                chosen.push(index);
            }
        }
        if set {
            self.contexts = Some((request.name.to_owned(), chosen));
        }
        reply(out, option, rep::ACK, &[]);
    }
}

/// A query names a context, or, when listing, all of a namespace (`base:`) or of a kind (`qemu:dirty-bitmap:`).
fn matches(query: &str, context: &str, set: bool) -> bool {
    query == context || (!set && query.ends_with(':') && context.starts_with(query))
}

#[cfg(test)]
#[path = "handshake_test.rs"]
mod tests;
