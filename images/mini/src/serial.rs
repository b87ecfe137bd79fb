//! The first serial port (16550 at 0x3f8), written by polling; the guest's only way to say something.

use crate::cpu::{inb, outb};
use core::fmt::{self, Write};

const PORT: u16 = 0x3f8;

/// Writes one byte, as soon as the transmitter takes it (or after a bounded wait: a machine without the port
/// must not hang the guest).
pub fn put(byte: u8) {
    for _ in 0..100_000 {
        if inb(PORT + 5) & 0x20 != 0 {
            break;
        }
    }
    outb(PORT, byte);
}

/// The port as a formatter's target.
pub struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(put);
        Ok(())
    }
}

/// Prints one line.
#[macro_export]
macro_rules! println {
    ($($argument:tt)*) => {{
        use core::fmt::Write as _;
        let _ = writeln!($crate::serial::Serial, $($argument)*);
    }};
}
