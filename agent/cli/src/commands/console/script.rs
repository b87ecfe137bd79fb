//! What `--send` and `--until` ask for, in the order typed. Pure: output of the guest comes in, bytes to type come out.
//!
//! ```text
//! --until 'login:'  --send 'root\n'  --until '# $'
//!  wait ──match──▶   type ─────────▶  wait ──match──▶ done
//! ```
//! A match must begin behind the one before it; a send moves the beginning to the end of what was printed so far.

use std::collections::VecDeque;

use regex::bytes::{Regex, RegexBuilder};

/// Output that is kept for matching.
const WINDOW_BYTES_MAX: usize = 256 << 10;

/// One thing to do.
#[derive(Debug)]
pub(super) enum Step {
    /// Type these bytes.
    Send(Vec<u8>),
    /// Wait for a match.
    Until(Regex),
}

/// What is to be done now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Type these bytes, then ask again.
    Send(Vec<u8>),
    /// More output is needed; the pattern, for messages.
    Wait(String),
    /// Nothing is left.
    Done,
}

/// The steps that are left, and the output that counts.
#[derive(Debug)]
pub(super) struct Script {
    steps: VecDeque<Step>,
    window: Vec<u8>,
    /// Matches begin here or later.
    start: usize,
}

impl Script {
    pub(super) fn new(steps: Vec<Step>) -> Self {
        Self { steps: steps.into(), window: Vec::new(), start: 0 }
    }

    /// The guest printed something.
    pub(super) fn printed(&mut self, data: &[u8]) {
        self.window.extend_from_slice(data);
        if self.window.len() > WINDOW_BYTES_MAX {
            let surplus = self.window.len() - WINDOW_BYTES_MAX / 2;
            self.window.drain(..surplus);
            self.start = self.start.saturating_sub(surplus);
        }
    }

    /// What to do now.
    pub(super) fn next(&mut self) -> Next {
        loop {
            match self.steps.pop_front() {
                None => return Next::Done,
                Some(Step::Send(bytes)) => {
                    self.start = self.window.len();
                    return Next::Send(bytes);
                }
                // `find_at`, not a cut window: ^ must still see what stands before.
                Some(Step::Until(regex)) => match regex.find_at(&self.window, self.start) {
                    Some(found) => self.start = found.end(),
                    None => {
                        let pattern = regex.as_str().to_owned();
                        self.steps.push_front(Step::Until(regex));
                        return Next::Wait(pattern);
                    }
                },
            }
        }
    }
}

/// A regular expression as `--until` means it: ^ and $ are the ends of lines, which serial consoles end with CR LF.
pub(super) fn pattern(text: &str) -> Result<Regex, String> {
    RegexBuilder::new(text)
        .multi_line(true)
        .crlf(true)
        .build()
        .map_err(|error| format!("--until `{text}` is not a regular expression: {error}"))
}

/// The bytes of a `--send` text: `\n \r \t \e \0 \\ \xHH`.
pub(super) fn unescape(text: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        if c != '\\' {
            bytes.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            continue;
        }
        bytes.push(match rest.next() {
            Some('n') => b'\n',
            Some('r') => b'\r',
            Some('t') => b'\t',
            Some('e') => 0x1b,
            Some('0') => 0,
            Some('\\') => b'\\',
            Some('x') => {
                let digits: String = rest.by_ref().take(2).collect();
                let value = u8::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == 2);
                value.ok_or_else(|| format!("--send `{text}`: \\x wants two hexadecimal digits"))?
            }
            _ => return Err(format!("--send `{text}`: after \\ comes one of n r t e 0 \\ xHH")),
        });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn until(text: &str) -> Step {
        Step::Until(pattern(text).unwrap())
    }

    #[test]
    fn a_login() {
        let mut script =
            Script::new(vec![until("login: $"), Step::Send(b"root\n".to_vec()), until("^[~/].* # $")]);
        script.printed(b"~ # old shell\r\nDebian\r\nlog");
        assert_eq!(script.next(), Next::Wait("login: $".into()));
        script.printed(b"in: ");
        assert_eq!(script.next(), Next::Send(b"root\n".to_vec()));
        assert_eq!(script.next(), Next::Wait("^[~/].* # $".into()));
        script.printed(b"root\r\n~ # ");
        assert_eq!(script.next(), Next::Done);
    }

    #[test]
    fn the_echo_of_what_was_typed_is_not_at_the_beginning_of_a_line() {
        let mut script = Script::new(vec![Step::Send(b"echo done\n".to_vec()), until("^done$")]);
        script.printed(b"/ # ");
        assert!(matches!(script.next(), Next::Send(_)));
        script.printed(b"echo done\r\n");
        assert!(matches!(script.next(), Next::Wait(_)));
        script.printed(b"done\r\n/ # ");
        assert_eq!(script.next(), Next::Done);
    }

    #[test]
    fn old_output_counts_only_before_a_send() {
        let mut script =
            Script::new(vec![until("ready"), until("ready"), Step::Send(b"x".to_vec()), until("ready")]);
        script.printed(b"ready ready ready");
        assert_eq!(script.next(), Next::Send(b"x".to_vec()));
        assert_eq!(script.next(), Next::Wait("ready".into()));
        script.printed(b"ready");
        assert_eq!(script.next(), Next::Done);
    }

    #[test]
    fn memory_is_bounded() {
        let mut script = Script::new(vec![until("end$")]);
        for _ in 0..100 {
            script.printed(&[b'x'; 10_000]);
            assert!(matches!(script.next(), Next::Wait(_)));
            assert!(script.window.len() <= WINDOW_BYTES_MAX);
        }
        script.printed(b"end");
        assert_eq!(script.next(), Next::Done);
    }

    #[test]
    fn escapes() {
        assert_eq!(unescape(r"a\n\r\t\e\0\\\x1dé").unwrap(), b"a\n\r\t\x1b\0\\\x1d\xc3\xa9");
        for bad in [r"\", r"\q", r"\x1", r"\xzz"] {
            assert!(unescape(bad).is_err(), "{bad}");
        }
        assert!(pattern("(").is_err());
    }
}
