//! The first 256 bytes of a function's configuration space (PCI 3.0 §6.1), as bytes and a mask.
//!
//! A bit that is set in the mask can be written by the guest, all others keep their value. Sizing a BAR
//! needs no special case: the low bits of its mask are clear. What lies behind the 256 bytes reads as zero:
//! there are no extended capabilities.

use std::ops::Range;

const BYTES: usize = 256;
/// Offsets of a type 0 header.
pub(crate) const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
pub(crate) const BAR0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
/// Where the first capability lies.
const FIRST_CAPABILITY: usize = 0x40;

/// Command register: answer to memory accesses, act as bus master, raise no INTx.
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_INTX_OFF: u16 = 1 << 10;
/// Status register: there is a list of capabilities.
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Who a function says it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    pub(crate) vendor: u16,
    pub(crate) device: u16,
    /// Base class, subclass, programming interface.
    pub(crate) class: [u8; 3],
    pub(crate) revision: u8,
    pub(crate) subsystem: u16,
}

pub(crate) struct ConfigSpace {
    bytes: [u8; BYTES],
    mask: [u8; BYTES],
    /// Where the next capability goes, and the byte that will point to it.
    next: usize,
    link: usize,
}

impl ConfigSpace {
    pub(crate) fn new(identity: Identity) -> Self {
        let mut space =
            Self { bytes: [0; BYTES], mask: [0; BYTES], next: FIRST_CAPABILITY, link: CAPABILITIES };
        space.put(0, &identity.vendor.to_le_bytes());
        space.put(2, &identity.device.to_le_bytes());
        space.put(REVISION, &[identity.revision]);
        let [base, sub, interface] = identity.class;
        space.put(CLASS, &[interface, sub, base]);
        space.put(SUBSYSTEM, &identity.vendor.to_le_bytes());
        space.put(SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        space
    }

    /// Sets bytes, whatever the mask says.
    pub(crate) fn put(&mut self, at: usize, value: &[u8]) {
        for (byte, value) in self.bytes.iter_mut().skip(at).zip(value) {
            *byte = *value;
        }
    }

    /// Lets the guest write the bits that are set.
    pub(crate) fn allow(&mut self, at: usize, bits: &[u8]) {
        for (mask, bits) in self.mask.iter_mut().skip(at).zip(bits) {
            *mask |= *bits;
        }
    }

    /// Gives the function a 32-bit memory BAR of `size` bytes (a power of two, 16 at least).
    pub(crate) fn add_memory_bar(&mut self, size: u32) {
        self.allow(BAR0, &size.wrapping_neg().to_le_bytes());
        self.allow(COMMAND, &(COMMAND_MEMORY | COMMAND_MASTER | COMMAND_INTX_OFF).to_le_bytes());
    }

    /// Appends a capability: its id, then `body` from byte 2 on. Returns where it lies.
    ///
    /// Only for the fixed lists of our own functions, which fit.
    pub(crate) fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let at = self.next;
        let pointer = u8::try_from(at).expect("our functions' capabilities fit in 256 bytes");
        self.put(self.link, &[pointer]);
        self.put(at, &[id, 0]);
        self.put(at.saturating_add(2), body);
        self.link = at.saturating_add(1);
        self.next = at.saturating_add(2).saturating_add(body.len()).next_multiple_of(4);
        self.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
        at
    }

    /// Reads any width at any offset.
    pub(crate) fn read(&self, offset: u16, out: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(out.iter_mut()) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes any width at any offset, through the mask.
    pub(crate) fn write(&mut self, offset: u16, data: &[u8]) {
        let at = usize::from(offset);
        for ((byte, mask), value) in self.bytes.iter_mut().zip(&self.mask).skip(at).zip(data) {
            *byte = (*byte & !mask) | (value & mask);
        }
    }

    /// All bytes, for a saved state.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub(crate) fn u16_at(&self, at: usize) -> u16 {
        let mut bytes = [0; 2];
        self.read(u16::try_from(at).unwrap_or(u16::MAX), &mut bytes);
        u16::from_le_bytes(bytes)
    }

    pub(crate) fn u32_at(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        self.read(u16::try_from(at).unwrap_or(u16::MAX), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Back to the state after power-on, for what the guest may write.
    pub(crate) fn clear_command(&mut self) {
        self.put(COMMAND, &[0, 0]);
    }

    /// The guest physical range that BAR 0 of `size` bytes answers to now, if memory decoding is on.
    pub(crate) fn decoded(&self, size: u32) -> Option<Range<u64>> {
        if self.u16_at(COMMAND) & COMMAND_MEMORY == 0 {
            return None;
        }
        let start = u64::from(self.u32_at(BAR0) & size.wrapping_neg());
        Some(start..start.saturating_add(u64::from(size)))
    }
}

/// Whether an access of `len` bytes at `offset` touches the `field`.
pub(crate) fn touches(offset: u16, len: usize, field: Range<usize>) -> bool {
    let start = usize::from(offset);
    start < field.end && start.saturating_add(len) > field.start
}
