//! Framing: bytes to [`Frame`] and back. Pure, bounded, free of panics.

use prost::Message;

use crate::message::Frame;

/// The largest body, bytes. A `Launch` with 64 disks is a few KiB; the cmdline and names are bounded above.
pub const BODY_BYTES_MAX: usize = 256 * 1024;
/// The kernel's bound for one `SCM_RIGHTS` message (`SCM_MAX_FD`).
pub const DESCRIPTORS_MAX: usize = 253;
/// The length prefix, bytes.
pub const PREFIX_BYTES: usize = 4;

/// Why bytes are not a frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The prefix announces more than [`BODY_BYTES_MAX`].
    #[error(
        "a frame of {0} bytes was announced, more than {BODY_BYTES_MAX}: the peer does not speak this protocol"
    )]
    TooLong(usize),
    /// More descriptors than [`DESCRIPTORS_MAX`].
    #[error("a frame announces {0} descriptors, more than {DESCRIPTORS_MAX}")]
    TooManyDescriptors(usize),
    /// Not a protobuf of our shape.
    #[error("the frame's body is not a message of this protocol")]
    Malformed(#[source] prost::DecodeError),
}

/// The body's length that a prefix announces.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn body_len(prefix: [u8; PREFIX_BYTES]) -> Result<usize, FrameError> {
    let len = u32::from_le_bytes(prefix) as usize;
    if len > BODY_BYTES_MAX { Err(FrameError::TooLong(len)) } else { Ok(len) }
}

/// A frame with its length prefix.
///
/// # Errors
/// [`FrameError::TooLong`], [`FrameError::TooManyDescriptors`].
pub fn encode(frame: &Frame) -> Result<Vec<u8>, FrameError> {
    let len = frame.encoded_len();
    if len > BODY_BYTES_MAX {
        return Err(FrameError::TooLong(len));
    }
    if frame.descriptors as usize > DESCRIPTORS_MAX {
        return Err(FrameError::TooManyDescriptors(frame.descriptors as usize));
    }
    let mut out = Vec::with_capacity(PREFIX_BYTES + len);
    out.extend_from_slice(&(len as u32).to_le_bytes());
    frame.encode_raw(&mut out);
    Ok(out)
}

/// The frame in a body (without prefix).
///
/// # Errors
/// [`FrameError::Malformed`], [`FrameError::TooManyDescriptors`].
pub fn decode(body: &[u8]) -> Result<Frame, FrameError> {
    let frame = Frame::decode(body).map_err(FrameError::Malformed)?;
    if frame.descriptors as usize > DESCRIPTORS_MAX {
        return Err(FrameError::TooManyDescriptors(frame.descriptors as usize));
    }
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Body, Empty};
    use proptest::prelude::*;

    #[test]
    fn a_frame_survives_the_wire() {
        let frame = Frame { id: 7, descriptors: 0, body: Some(Body::PowerButton(Empty {})) };
        let bytes = encode(&frame).unwrap();
        let (prefix, body) = bytes.split_at(PREFIX_BYTES);
        assert_eq!(body_len(prefix.try_into().unwrap()).unwrap(), body.len());
        assert_eq!(decode(body).unwrap(), frame);
    }

    #[test]
    fn an_announced_giant_is_refused_before_it_is_read() {
        assert!(matches!(body_len(u32::MAX.to_le_bytes()), Err(FrameError::TooLong(_))));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(body in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode(&body);
        }
    }
}
