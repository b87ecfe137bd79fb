//! HTTP/2 by hand, for clients that break it: frames as RFC 9113 §4.1 has them, headers as literals (RFC 7541 §6.2.2).

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;
pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;

/// A frame's bytes.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut bytes = length[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// A header that is indexed nowhere.
pub fn header(name: &str, value: &str) -> Vec<u8> {
    let mut bytes = vec![0];
    for text in [name, value] {
        integer(text.len(), &mut bytes);
        bytes.extend(text.as_bytes());
    }
    bytes
}

/// An integer with a prefix of 7 bits (RFC 7541 §5.1).
fn integer(mut value: usize, bytes: &mut Vec<u8>) {
    if value < 127 {
        return bytes.push(u8::try_from(value).unwrap());
    }
    bytes.push(127);
    value -= 127;
    while value >= 128 {
        bytes.push(u8::try_from(value % 128 + 128).unwrap());
        value /= 128;
    }
    bytes.push(u8::try_from(value).unwrap());
}

/// The headers of a call.
pub fn call(stream: u32, path: &str) -> Vec<u8> {
    let fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "seriod"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    let block: Vec<u8> = fields.iter().flat_map(|(name, value)| header(name, value)).collect();
    frame(HEADERS, END_HEADERS, stream, &block)
}

/// The head of a gRPC message of that length.
pub fn message_head(length: usize) -> Vec<u8> {
    [&[0][..], &u32::try_from(length).unwrap().to_be_bytes()].concat()
}

/// A call with a whole message.
pub fn whole_call(stream: u32, path: &str, message: &[u8]) -> Vec<u8> {
    let body = [message_head(message.len()), message.to_vec()].concat();
    [call(stream, path), frame(DATA, END_STREAM, stream, &body)].concat()
}

/// A connection that has said hello, with some of SETTINGS.
pub fn connect(socket: &Path, settings: &[(u16, u32)]) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    let payload: Vec<u8> = settings
        .iter()
        .flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat())
        .collect();
    // One that was turned away is closed: whoever sends on it is told so.
    let _ = stream
        .write_all(&[b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &frame(SETTINGS, 0, 0, &payload)[..]].concat());
    stream
}

/// SETTINGS_INITIAL_WINDOW_SIZE.
pub const INITIAL_WINDOW: u16 = 4;

/// The next frame: kind, flags, stream, payload.
pub fn read_frame(stream: &mut impl Read) -> io::Result<(u8, u8, u32, Vec<u8>)> {
    let mut head = [0; 9];
    stream.read_exact(&mut head)?;
    let length = usize::try_from(u32::from_be_bytes([0, head[0], head[1], head[2]])).unwrap();
    let mut payload = vec![0; length];
    stream.read_exact(&mut payload)?;
    Ok((head[3], head[4], u32::from_be_bytes([head[5], head[6], head[7], head[8]]), payload))
}
