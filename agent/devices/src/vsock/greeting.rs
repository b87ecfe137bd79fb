//! The first line that a client of the host sends: which port of the guest it wants.

use std::io::{ErrorKind, Read};

/// The longest greeting: `CONNECT 4294967295\n`, with room for a carriage return.
const GREETING_BYTES_MAX: usize = 24;

/// Reads what there is of it. `Some(port)`: complete. `None`: more has to come. `Err`: this is no greeting, or its client is
/// gone.
pub(super) fn read(stream: &mut impl Read, text: &mut Vec<u8>) -> Result<Option<u32>, ()> {
    let mut byte = [0u8];
    loop {
        // One by one: what follows the line belongs to the guest. At most 24 of them, once a connection.
        match stream.read(&mut byte) {
            Ok(0) => return Err(()),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(_) => return Err(()),
        }
        if byte == *b"\n" {
            return parse_greeting(text).map(Some).ok_or(());
        }
        text.extend(byte);
        if text.len() >= GREETING_BYTES_MAX {
            return Err(());
        }
    }
}

/// `CONNECT PORT`, as other VMMs have it.
fn parse_greeting(text: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(text).ok()?.trim_end_matches('\r');
    let (word, port) = text.split_once(' ')?;
    (word.eq_ignore_ascii_case("connect")).then(|| port.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greetings() {
        for (text, port) in
            [("CONNECT 52", Some(52)), ("connect 0\r", Some(0)), ("CONNECT 4294967295", Some(u32::MAX))]
        {
            assert_eq!(parse_greeting(text.as_bytes()), port, "{text}");
        }
        for text in [
            "",
            "CONNECT",
            "CONNECT ",
            "CONNECT x",
            "CONNECT -1",
            "CONNECT 4294967296",
            "GET / HTTP/1.1",
            "CONNECT  5",
        ] {
            assert_eq!(parse_greeting(text.as_bytes()), None, "{text}");
        }
    }
}
