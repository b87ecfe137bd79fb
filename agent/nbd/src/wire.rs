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
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
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
}

/// `NBD_REPLY_TYPE_*`, and the flag of the last chunk.
pub mod chunk {
    #![allow(missing_docs)]
    pub const FLAG_DONE: u16 = 1;
    pub const OFFSET_DATA: u16 = 1;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = 0x8001;
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

/// Bytes of a request without its payload ("Request message").
pub const REQUEST_BYTES: usize = 28;
/// Largest payload of one request, and what `NBD_INFO_BLOCK_SIZE` says.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;

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
    /// Bytes.
    pub len: u32,
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
    pub fn decode(bytes: &[u8]) -> Result<Option<Request>, BadMagic> {
        let mut fields = Fields(bytes);
        let Some(magic) = fields.u32() else { return Ok(None) };
        if magic != REQUEST_MAGIC {
            return Err(BadMagic(magic));
        }
        Ok((|| {
            Some(Request {
                flags: fields.u16()?,
                command: fields.u16()?,
                cookie: fields.u64()?,
                offset: fields.u64()?,
                len: fields.u32()?,
            })
        })())
    }

    /// The bytes of a request.
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let mut out = Head::default();
        out.u32(REQUEST_MAGIC)
            .u16(self.flags)
            .u16(self.command)
            .u64(self.cookie)
            .u64(self.offset)
            .u32(self.len);
        let mut bytes = [0; REQUEST_BYTES];
        bytes.copy_from_slice(out.bytes());
        bytes
    }
}

/// The bytes before a payload: small, and without an allocation.
#[derive(Debug, Clone, Copy, Default)]
pub struct Head {
    bytes: [u8; 32],
    len: usize,
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
pub fn simple_reply(cookie: u64, error: u32) -> Head {
    let mut head = Head::default();
    head.u32(SIMPLE_REPLY_MAGIC).u32(error).u64(cookie);
    head
}

/// "Structured reply chunk message": the one and last chunk of kind `kind` with `payload` bytes to follow.
fn last_chunk(cookie: u64, kind: u16, payload: u32) -> Head {
    let mut head = Head::default();
    head.u32(STRUCTURED_REPLY_MAGIC).u16(chunk::FLAG_DONE).u16(kind).u64(cookie).u32(payload);
    head
}

/// `NBD_REPLY_TYPE_OFFSET_DATA`; `len` bytes of data follow. `len` is at most [`PAYLOAD_BYTES_MAX`].
pub fn data_chunk(cookie: u64, offset: u64, len: u32) -> Head {
    let mut head = last_chunk(cookie, chunk::OFFSET_DATA, len.saturating_add(8));
    head.u64(offset);
    head
}

/// `NBD_REPLY_TYPE_ERROR` without a message.
pub fn error_chunk(cookie: u64, error: u32) -> Head {
    let mut head = last_chunk(cookie, chunk::ERROR, 6);
    head.u32(error).u16(0);
    head
}

/// `NBD_REPLY_TYPE_BLOCK_STATUS` of one context; `descriptors` pairs of u32 (length, flags) follow.
pub fn status_chunk(cookie: u64, context: u32, descriptors: u32, last: bool) -> Head {
    let mut head = Head::default();
    let flags = if last { chunk::FLAG_DONE } else { 0 };
    let payload = descriptors.saturating_mul(8).saturating_add(4);
    head.u32(STRUCTURED_REPLY_MAGIC)
        .u16(flags)
        .u16(chunk::BLOCK_STATUS)
        .u64(cookie)
        .u32(payload)
        .u32(context);
    head
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

    proptest! {
        #[test]
        fn requests_come_back(flags: u16, command: u16, cookie: u64, offset: u64, len: u32) {
            let request = Request { flags, command, cookie, offset, len };
            let bytes = request.encode();
            prop_assert_eq!(Request::decode(&bytes), Ok(Some(request)));
            prop_assert_eq!(Request::decode(&bytes[..REQUEST_BYTES - 1]), Ok(None));
        }

        #[test]
        fn any_bytes_are_answered(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = Request::decode(&bytes);
        }
    }

    #[test]
    fn heads_have_their_lengths() {
        assert_eq!(simple_reply(1, 0).bytes().len(), 16);
        assert_eq!(data_chunk(1, 0, PAYLOAD_BYTES_MAX).bytes().len(), 28);
        assert_eq!(error_chunk(1, 5).bytes().len(), 26);
        assert_eq!(status_chunk(1, 1, 3, true).bytes().len(), 24);
        assert_eq!(&status_chunk(1, 1, 3, true).bytes()[16..20], &28u32.to_be_bytes());
    }
}
