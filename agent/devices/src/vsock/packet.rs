//! The header of a vsock packet (virtio 1.2 §5.10.6): 44 bytes, little-endian.
//!
//! Pure: bytes in, numbers out. Nothing here trusts a number; what it means is decided by the connection.

/// Bytes of the header.
pub(super) const HEADER_BYTES: usize = 44;
/// The host's address (§5.10.4).
pub(super) const HOST_CID: u64 = 2;
/// The only type of socket that is offered: `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const TYPE_STREAM: u16 = 1;

/// Operations, `VIRTIO_VSOCK_OP_*`.
pub(super) mod op {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RST: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const RW: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender of this will not receive any more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender of this will not send any more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// A header, as numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of payload.
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// The sender's whole buffer for this connection.
    pub(super) buf_alloc: u32,
    /// Bytes that the sender's reader has taken so far, wrapping.
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Header {
        let mut at = 0usize;
        let mut take = |len: usize| {
            let part = bytes.iter().skip(at).take(len).rev();
            at = at.saturating_add(len);
            part.fold(0u64, |value, byte| value << 8 | u64::from(*byte))
        };
        Header {
            src_cid: take(8),
            dst_cid: take(8),
            src_port: take(4) as u32,
            dst_port: take(4) as u32,
            len: take(4) as u32,
            kind: take(2) as u16,
            op: take(2) as u16,
            flags: take(4) as u32,
            buf_alloc: take(4) as u32,
            fwd_cnt: take(4) as u32,
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        for (slot, byte) in out.iter_mut().zip(fields.into_iter().flatten()) {
            *slot = *byte;
        }
        out
    }

    /// The reset that answers this packet, for a connection that nobody knows.
    pub(super) fn reset(&self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Header::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_a_header_and_come_back(bytes in proptest::array::uniform32(any::<u8>()), rest in proptest::array::uniform12(any::<u8>())) {
            let mut all = [0; HEADER_BYTES];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&rest);
            prop_assert_eq!(Header::parse(&all).to_bytes(), all);
        }
    }

    #[test]
    fn fields_lie_where_the_standard_says() {
        let header = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 7,
            dst_port: 9,
            len: 5,
            kind: 1,
            op: 5,
            flags: 1,
            buf_alloc: 8,
            fwd_cnt: 6,
        };
        let bytes = header.to_bytes();
        assert_eq!((bytes[0], bytes[8], bytes[16], bytes[20], bytes[24]), (3, 2, 7, 9, 5));
        assert_eq!((bytes[28], bytes[30], bytes[32], bytes[36], bytes[40]), (1, 5, 1, 8, 6));
    }
}
