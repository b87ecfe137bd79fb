//! The terminal of `serio-vmm run`: raw while the guest runs, as it was before afterwards, whatever happens.

use std::io::{IsTerminal, Stdin};
use std::sync::Mutex;

use nix::sys::termios::{OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// What to go back to. Global, because a panic must find it too.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Holds the terminal raw; puts it back when dropped.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes standard input raw, if it is a terminal.
    pub fn enter(stdin: &Stdin) -> Option<RawTerminal> {
        if !stdin.is_terminal() {
            return None;
        }
        let before = tcgetattr(stdin).ok()?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        // The guest sends carriage returns itself, but our own last words do not.
        raw.output_flags |= OutputFlags::OPOST | OutputFlags::ONLCR;
        *BEFORE.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(before);
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            previous(info);
        }));
        tcsetattr(stdin, SetArg::TCSADRAIN, &raw).ok()?;
        Some(RawTerminal(()))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    let before = BEFORE.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
    if let Some(before) = before {
        // If even this fails there is no terminal left to repair.
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSADRAIN, &before);
    }
}

/// What the user wants of the VM itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Ctrl-A x: end it.
    Quit,
    /// Ctrl-A p: press its power button.
    PowerButton,
}

/// What typed bytes mean.
#[derive(Debug, Default)]
pub struct Keys {
    escaped: bool,
}

/// The escape key, ctrl-A.
const ESCAPE: u8 = 1;

impl Keys {
    /// Bytes for the guest, and what the user wishes. Ctrl-A twice is one ctrl-A.
    pub fn typed(&mut self, bytes: &[u8]) -> (Vec<u8>, Option<Wish>) {
        let mut out = Vec::with_capacity(bytes.len());
        let mut wish = None;
        for &byte in bytes {
            match (std::mem::take(&mut self.escaped), byte) {
                (false, ESCAPE) => self.escaped = true,
                (true, b'x' | b'X') => return (out, Some(Wish::Quit)),
                (true, b'p' | b'P') => wish = Some(Wish::PowerButton),
                (true, ESCAPE) | (false, _) => out.push(byte),
                (true, _) => out.extend([ESCAPE, byte]),
            }
        }
        (out, wish)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_is_for_us_and_the_rest_goes_through() {
        let mut keys = Keys::default();
        assert_eq!(keys.typed(b"ls\r"), (b"ls\r".to_vec(), None));
        assert_eq!(keys.typed(b"\x01"), (vec![], None));
        assert_eq!(keys.typed(b"\x01"), (vec![1], None));
        assert_eq!(keys.typed(b"\x01a"), (vec![1, b'a'], None));
        assert_eq!(keys.typed(b"b\x01"), (b"b".to_vec(), None));
        assert_eq!(keys.typed(b"pq"), (b"q".to_vec(), Some(Wish::PowerButton)));
        assert_eq!(keys.typed(b"\x01xnot seen"), (vec![], Some(Wish::Quit)));
    }
}
