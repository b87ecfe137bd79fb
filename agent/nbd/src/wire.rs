//! Constants and the messages of the transmission phase, as bytes. Pure; all integers are big-endian.

/// First bytes of a server: `NBDMAGIC`.
pub const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second bytes of a newstyle server, and the start of every option: `IHAVEOPT`.
pub const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Start of a reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Start of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of a chunk of a structured reply.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Start of a request with extended headers.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Start of a chunk of a reply with extended headers.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flag of both sides: fixed newstyle.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1;
/// Handshake flag of both sides: no 124 zeros after `NBD_OPT_EXPORT_NAME`.
pub const FLAG_NO_ZEROES: u16 = 2;

/// `NBD_OPT_*`.
pub mod opt {
    #![allow(missing_docs)]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// `NBD_REP_*`.
pub mod rep {
    #![allow(missing_docs)]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    pub const ERR_POLICY: u32 = 0x8000_0002;
    pub const ERR_INVALID: u32 = 0x8000_0003;
    pub const ERR_TLS_REQD: u32 = 0x8000_0005;
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    pub const ERR_SHUTDOWN: u32 = 0x8000_0007;
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
    pub const ERR_EXT_HEADER_REQD: u32 = 0x8000_000a;
}

/// `NBD_INFO_*`.
pub mod info {
    #![allow(missing_docs)]
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags, `NBD_FLAG_*`.
pub mod flag {
    #![allow(missing_docs)]
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// `NBD_CMD_*`.
pub mod cmd {
    #![allow(missing_docs)]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// `NBD_CMD_FLAG_*`.
pub mod cmd_flag {
    #![allow(missing_docs)]
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// `NBD_REPLY_TYPE_*`, and the flag of the last chunk.
pub mod chunk {
    #![allow(missing_docs)]
    pub const FLAG_DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR: u16 = 0x8001;
    pub const ERROR_OFFSET: u16 = 0x8002;
}

/// "Error values".
pub mod errno {
    #![allow(missing_docs)]
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const ENOMEM: u32 = 12;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
    pub const EOVERFLOW: u32 = 75;
    pub const ENOTSUP: u32 = 95;
    pub const ESHUTDOWN: u32 = 108;
}

/// `base:allocation`: no space is used.
pub const STATE_HOLE: u32 = 1;
/// `base:allocation`: reads as zeros.
pub const STATE_ZERO: u32 = 2;
/// `qemu:dirty-bitmap:…`: has changed.
pub const STATE_DIRTY: u32 = 1;

/// Bytes of a compact request without its payload ("Request message").
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a request with extended headers.
pub const EXTENDED_REQUEST_BYTES: usize = 32;
/// Largest payload of one request, and what `NBD_INFO_BLOCK_SIZE` says.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;

/// How requests and replies look, as it was negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests, structured replies where data or extents are asked for.
    Structured,
    /// Lengths of 64 bits, and nothing but chunks in reply.
    Extended,
}

/// A request, without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// `NBD_CMD_FLAG_*`.
    pub flags: u16,
    /// `NBD_CMD_*`.
    pub command: u16,
    /// The client's own, given back in replies.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes; of 32 bits unless headers are extended.
    pub len: u64,
}

/// The stream does not start with a request: nothing after it can be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the client sent {0:#x} where a request should start")]
pub struct BadMagic(pub u32);

/// Takes fields from the front of bytes; `None` when they end.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }
    /// Two bytes.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }
    /// Four bytes.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }
    /// Eight bytes.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }
    /// `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }
}

impl Request {
    /// Reads a request. `Ok(None)`: more bytes are needed.
    pub fn decode(bytes: &[u8], mode: Mode) -> Result<Option<Request>, BadMagic> {
        let extended = mode == Mode::Extended;
        let mut fields = Fields(bytes);
        let Some(magic) = fields.u32() else { return Ok(None) };
        if magic != if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC } {
            return Err(BadMagic(magic));
        }
        Ok((|| {
            Some(Request {
                flags: fields.u16()?,
                command: fields.u16()?,
                cookie: fields.u64()?,
                offset: fields.u64()?,
                len: if extended { fields.u64()? } else { fields.u32()?.into() },
            })
        })())
    }

    /// Bytes of a request without its payload.
    pub fn encoded_bytes(mode: Mode) -> usize {
        if mode == Mode::Extended { EXTENDED_REQUEST_BYTES } else { REQUEST_BYTES }
    }

    /// The bytes of a request. Without extended headers a longer length is cut to 32 bits.
    pub fn encode(&self, mode: Mode) -> Head {
        let extended = mode == Mode::Extended;
        let mut out = Head::default();
        out.u32(if extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC })
            .u16(self.flags)
            .u16(self.command)
            .u64(self.cookie)
            .u64(self.offset);
        match extended {
            true => out.u64(self.len),
            false => out.u32(u32::try_from(self.len).unwrap_or(u32::MAX)),
        };
        out
    }

    /// Bytes that follow the request.
    pub fn payload_bytes(&self, mode: Mode) -> u64 {
        // A write has one whether it says so or not; others may have one only where headers are extended.
        let says = mode == Mode::Extended && self.flags & cmd_flag::PAYLOAD_LEN != 0;
        if says || self.command == cmd::WRITE { self.len } else { 0 }
    }
}

/// The bytes before a payload: small, and without an allocation.
#[derive(Debug, Clone, Copy)]
pub struct Head {
    bytes: [u8; 48],
    len: usize,
}

impl Default for Head {
    fn default() -> Self {
        Head { bytes: [0; 48], len: 0 }
    }
}

impl Head {
    fn put(&mut self, bytes: &[u8]) -> &mut Head {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
        self
    }
    fn u16(&mut self, value: u16) -> &mut Head {
        self.put(&value.to_be_bytes())
    }
    fn u32(&mut self, value: u32) -> &mut Head {
        self.put(&value.to_be_bytes())
    }
    fn u64(&mut self, value: u64) -> &mut Head {
        self.put(&value.to_be_bytes())
    }
    /// What was put.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// "Simple reply message"; a read's data follow.
fn simple_reply(request: &Request, error: u32) -> Head {
    let mut head = Head::default();
    head.u32(SIMPLE_REPLY_MAGIC).u32(error).u64(request.cookie);
    head
}

impl Mode {
    /// Whether replies may come in chunks.
    pub fn is_structured(self) -> bool {
        self != Mode::Simple
    }

    /// "Structured reply chunk message": a chunk of kind `kind` with `payload` bytes to follow.
    fn chunk(self, request: &Request, flags: u16, kind: u16, payload: u32) -> Head {
        let mut head = Head::default();
        match self {
            Mode::Extended => head
                .u32(EXTENDED_REPLY_MAGIC)
                .u16(flags)
                .u16(kind)
                .u64(request.cookie)
                .u64(request.offset)
                .u64(payload.into()),
            Mode::Simple | Mode::Structured => {
                head.u32(STRUCTURED_REPLY_MAGIC).u16(flags).u16(kind).u64(request.cookie).u32(payload)
            }
        };
        head
    }

    /// Before the data of a read, all of it in one chunk. The length is at most [`PAYLOAD_BYTES_MAX`].
    pub fn data(self, request: &Request) -> Head {
        if self == Mode::Simple {
            return simple_reply(request, 0);
        }
        let len = u32::try_from(request.len).unwrap_or(u32::MAX);
        let mut head = self.chunk(request, chunk::FLAG_DONE, chunk::OFFSET_DATA, len.saturating_add(8));
        head.u64(request.offset);
        head
    }

    /// Before one of several pieces of a read's data, which are sent from `offset`; [`Mode::end`] follows the last. Not
    /// for simple replies, whose data have one head ([`Mode::data`]).
    pub fn piece(self, request: &Request, offset: u64, len: u32) -> Head {
        let mut head = self.chunk(request, 0, chunk::OFFSET_DATA, len.saturating_add(8));
        head.u64(offset);
        head
    }

    /// A piece of a read that is all zeros.
    pub fn hole(self, request: &Request, offset: u64, len: u32) -> Head {
        let mut head = self.chunk(request, 0, chunk::OFFSET_HOLE, 12);
        head.u64(offset).u32(len);
        head
    }

    /// The end of a read that was sent in pieces.
    pub fn end(self, request: &Request) -> Head {
        self.chunk(request, chunk::FLAG_DONE, chunk::NONE, 0)
    }

    /// Success of a command without data.
    pub fn done(self, request: &Request) -> Head {
        match self {
            Mode::Extended => self.chunk(request, chunk::FLAG_DONE, chunk::NONE, 0),
            Mode::Simple | Mode::Structured => simple_reply(request, 0),
        }
    }

    /// Failure, as one of [`errno`].
    pub fn error(self, request: &Request, error: u32) -> Head {
        // With structured replies a read and a block status must not be answered by a simple one.
        let asks = matches!(request.command, cmd::READ | cmd::BLOCK_STATUS);
        if self == Mode::Extended || (self == Mode::Structured && asks) {
            let mut head = self.chunk(request, chunk::FLAG_DONE, chunk::ERROR, 6);
            head.u32(error).u16(0);
            return head;
        }
        simple_reply(request, error)
    }

    /// Before the extents of one context: pairs of length and flags, each of [`Mode::extent_bytes`] / 2.
    pub fn status(self, request: &Request, context: u32, extents: u32, last: bool) -> Head {
        let flags = if last { chunk::FLAG_DONE } else { 0 };
        let bytes = extents.saturating_mul(self.extent_bytes());
        if self == Mode::Extended {
            let mut head = self.chunk(request, flags, chunk::BLOCK_STATUS_EXT, bytes.saturating_add(8));
            head.u32(context).u32(extents);
            return head;
        }
        let mut head = self.chunk(request, flags, chunk::BLOCK_STATUS, bytes.saturating_add(4));
        head.u32(context);
        head
    }

    /// Bytes of one extent.
    pub fn extent_bytes(self) -> u32 {
        if self == Mode::Extended { 16 } else { 8 }
    }
}

/// The protocol's error value for an errno of the host.
pub fn error_value(host: i32) -> u32 {
    use nix::libc;
    match host {
        libc::EPERM | libc::EROFS | libc::EACCES => errno::EPERM,
        libc::ENOMEM => errno::ENOMEM,
        libc::EINVAL => errno::EINVAL,
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => errno::ENOSPC,
        libc::EOPNOTSUPP => errno::ENOTSUP,
        libc::ESHUTDOWN => errno::ESHUTDOWN,
        _ => errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

    proptest! {
        #[test]
        fn requests_come_back(flags: u16, command: u16, cookie: u64, offset: u64, len: u32) {
            for mode in MODES {
                let request = Request { flags, command, cookie, offset, len: len.into() };
                let head = request.encode(mode);
                prop_assert_eq!(head.bytes().len(), Request::encoded_bytes(mode));
                prop_assert_eq!(Request::decode(head.bytes(), mode), Ok(Some(request)));
                let short = &head.bytes()[..head.bytes().len() - 1];
                prop_assert_eq!(Request::decode(short, mode), Ok(None));
            }
            let long = Request { flags, command, cookie, offset, len: u64::from(len) << 32 };
            prop_assert_eq!(Request::decode(long.encode(Mode::Extended).bytes(), Mode::Extended), Ok(Some(long)));
        }

        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            for mode in MODES {
                let _ = Request::decode(&bytes, mode);
            }
        }
    }

    #[test]
    fn heads_have_their_lengths() {
        let max = u64::from(PAYLOAD_BYTES_MAX);
        let read = Request { flags: 0, command: cmd::READ, cookie: 1, offset: 7, len: max };
        let write = Request { command: cmd::WRITE, ..read };
        let lengths = |mode: Mode| {
            [mode.data(&read), mode.done(&write), mode.error(&read, 5), mode.error(&write, 5)]
                .map(|head| head.bytes().len())
        };
        assert_eq!(lengths(Mode::Simple), [16, 16, 16, 16]);
        assert_eq!(lengths(Mode::Structured), [28, 16, 26, 16]);
        assert_eq!(lengths(Mode::Extended), [40, 32, 38, 38]);
        let pieces = |mode: Mode| {
            [mode.piece(&read, 7, 9), mode.hole(&read, 7, 9), mode.end(&read)].map(|head| head.bytes().len())
        };
        assert_eq!((pieces(Mode::Structured), pieces(Mode::Extended)), ([28, 32, 20], [40, 44, 32]));
        let compact = Mode::Structured.status(&read, 1, 3, true);
        assert_eq!((compact.bytes().len(), &compact.bytes()[16..20]), (24, &28u32.to_be_bytes()[..]));
        let extended = Mode::Extended.status(&read, 1, 3, true);
        assert_eq!((extended.bytes().len(), &extended.bytes()[24..32]), (40, &56u64.to_be_bytes()[..]));
    }

    #[test]
    fn payloads_follow_what_says_so() {
        let mut request =
            Request { flags: cmd_flag::PAYLOAD_LEN, command: cmd::TRIM, cookie: 0, offset: 0, len: 9 };
        assert_eq!((request.payload_bytes(Mode::Extended), request.payload_bytes(Mode::Structured)), (9, 0));
        request = Request { flags: 0, command: cmd::WRITE, ..request };
        assert_eq!((request.payload_bytes(Mode::Extended), request.payload_bytes(Mode::Simple)), (9, 9));
    }
}
