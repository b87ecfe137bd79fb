//! The control messages of §5.3.6.2 as far as one port needs them. Pure: bytes in, flags, bytes out.
//!
//! ```text
//!   driver                              device
//!     DEVICE_READY(1)          ──►
//!                              ◄──      DEVICE_ADD(port)
//!     PORT_READY(port, 1)      ──►
//!                              ◄──      PORT_NAME(port, name), PORT_OPEN(port, 1): the host is there
//!     PORT_OPEN(port, 0 or 1)  ──►      a program closes or opens it
//! ```
//!
//! What is to be said is kept as a flag each, so a driver that asks a million times is answered once.

/// Our port.
pub(super) const PORT: u32 = 1;
/// `struct virtio_console_control`: id u32, event u16, value u16.
pub(super) const MESSAGE_BYTES: usize = 8;

const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What a message of the driver means for the port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// Nothing that others have to know.
    Nothing,
    /// A program has opened the port.
    Opened,
    /// A program has closed it.
    Closed,
}

/// What is still to be said to the driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Control {
    add: bool,
    name: bool,
    open: bool,
}

impl Control {
    /// Takes in a message of the driver. Unknown ones and other ports mean nothing.
    pub(super) fn hear(&mut self, message: [u8; MESSAGE_BYTES]) -> Heard {
        let [i0, i1, i2, i3, e0, e1, v0, v1] = message;
        let id = u32::from_le_bytes([i0, i1, i2, i3]);
        let value = u16::from_le_bytes([v0, v1]);
        match (u16::from_le_bytes([e0, e1]), id) {
            // A value of 0: the driver could not; there is nothing to add a port to.
            (DEVICE_READY, _) => self.add |= value == 1,
            (PORT_READY, PORT) if value == 1 => {
                self.name = true;
                self.open = true;
            }
            (PORT_OPEN, PORT) => return if value == 1 { Heard::Opened } else { Heard::Closed },
            _ => {}
        }
        Heard::Nothing
    }

    /// The next message for the driver, or none.
    pub(super) fn next(&mut self, name: &str) -> Option<Vec<u8>> {
        if std::mem::take(&mut self.add) {
            Some(message(DEVICE_ADD))
        } else if std::mem::take(&mut self.name) {
            let mut bytes = message(PORT_NAME);
            // The standard says without, the usual device with an end mark; drivers take both.
            bytes.extend(name.bytes().chain([0]));
            Some(bytes)
        } else if std::mem::take(&mut self.open) {
            Some(message(PORT_OPEN))
        } else {
            None
        }
    }

    /// As bits, for a saved state: add, name, open.
    pub(super) fn bits(self) -> u8 {
        u8::from(self.add) | u8::from(self.name) << 1 | u8::from(self.open) << 2
    }

    /// From [`Control::bits`].
    pub(super) fn of_bits(bits: u8) -> Self {
        Control { add: bits & 1 != 0, name: bits & 2 != 0, open: bits & 4 != 0 }
    }

    /// Whether there is something to say.
    pub(super) fn has_some(self) -> bool {
        self.add || self.name || self.open
    }
}

fn message(event: u16) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(MESSAGE_BYTES);
    bytes.extend(PORT.to_le_bytes());
    bytes.extend(event.to_le_bytes());
    bytes.extend(1u16.to_le_bytes());
    bytes
}
