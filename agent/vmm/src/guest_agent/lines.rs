//! From the bytes of a guest to lines, within a bound. Pure.
//!
//! The protocol is a JSON object a line. A byte 0xff, which is in no JSON, says that what came before it is of no
//! interest: the answer to `guest-sync-delimited` begins with it.

/// The longest line that is looked at.
pub(super) const LINE_BYTES_MAX: usize = 64 << 10;
/// What no JSON contains.
pub(super) const DELIMITER: u8 = 0xff;

/// What a guest said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// What came before does not count.
    Delimiter,
    /// A line, without its end.
    Line(Vec<u8>),
    /// A line longer than [`LINE_BYTES_MAX`]; it was thrown away.
    TooLong,
}

/// The line that has begun.
#[derive(Debug, Default)]
pub(super) struct Lines {
    begun: Vec<u8>,
    too_long: bool,
}

impl Lines {
    /// Takes bytes in until they complete something; returns it and how many were used.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> (usize, Option<Said>) {
        for (count, byte) in (1..).zip(bytes) {
            match *byte {
                DELIMITER => {
                    self.begun.clear();
                    self.too_long = false;
                    return (count, Some(Said::Delimiter));
                }
                b'\n' => {
                    let line = std::mem::take(&mut self.begun);
                    let said =
                        if std::mem::take(&mut self.too_long) { Said::TooLong } else { Said::Line(line) };
                    return (count, Some(said));
                }
                _ if self.begun.len() >= LINE_BYTES_MAX => {
                    self.begun.clear();
                    self.too_long = true;
                }
                // The rest of a line that is too long is not kept either.
                _ if self.too_long => {}
                byte => self.begun.push(byte),
            }
        }
        (bytes.len(), None)
    }
}
