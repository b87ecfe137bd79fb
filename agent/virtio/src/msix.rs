//! MSI-X: the table of messages, the pending bits, and the masks (PCI 3.0 §6.8.2).
//!
//! A vector is *live* when MSI-X is enabled, the function is not masked and neither is the vector.
//! - A live vector delivers through its line at once. The line is allocated and routed when the vector
//!   first becomes live, and routed again only if its message changed: masking costs no system call.
//! - A vector that is not live keeps its interrupt in its pending bit and delivers it when it becomes live.
//! - A live vector's line can be *lent* to a device inside the kernel, which signals it past all this. If the vector stops being
//!   live meanwhile, its line is held: what is signalled then waits in its eventfd, and counts as pending.
//!
//! Lock order: a vector's lock is innermost. Devices' threads call [`Msix::trigger`]; vcpus write the table.

use std::io;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::platform::{MsiMessage, MsiRoute, Platform};
use crate::state::VectorState;

/// Bytes of one table entry.
pub(crate) const ENTRY_BYTES: u64 = 16;
/// Message control: MSI-X enable, function mask.
pub(crate) const CONTROL_ENABLE: u16 = 1 << 15;
pub(crate) const CONTROL_FUNCTION_MASK: u16 = 1 << 14;

/// What an entry holds after power-on.
const UNWRITTEN: MsiMessage = MsiMessage { address: 0, data: 0 };

struct Vector {
    message: MsiMessage,
    masked: bool,
    pending: bool,
    line: Option<Line>,
    /// How many queues have it.
    lent: u16,
}

struct Line {
    route: Arc<dyn MsiRoute>,
    /// None: not routed yet, or held.
    routed: Option<MsiMessage>,
}

impl Vector {
    /// Takes note of what was signalled while the line was held.
    fn collect(&mut self) {
        if let Some(line) = self.line.as_ref().filter(|line| self.lent > 0 && line.routed.is_none()) {
            // Non-blocking: an error says that there is nothing.
            self.pending |= line.route.event().read().is_ok();
        }
    }

    fn reset(&mut self) {
        self.message = UNWRITTEN;
        self.masked = true;
        self.pending = false;
    }
}

pub(crate) struct Msix {
    platform: Arc<dyn Platform>,
    control: AtomicU16,
    vectors: Box<[Mutex<Vector>]>,
}

fn lock(vector: &Mutex<Vector>) -> MutexGuard<'_, Vector> {
    // A vector is consistent after each statement, so a panic elsewhere does not spoil it.
    vector.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Msix {
    pub(crate) fn new(platform: Arc<dyn Platform>, vectors: u16) -> Self {
        let vector = || {
            let (message, masked, pending) = (UNWRITTEN, true, false);
            Mutex::new(Vector { message, masked, pending, line: None, lent: 0 })
        };
        Self { platform, control: AtomicU16::new(0), vectors: (0..vectors).map(|_| vector()).collect() }
    }

    pub(crate) fn vectors(&self) -> u16 {
        u16::try_from(self.vectors.len()).unwrap_or(u16::MAX)
    }

    pub(crate) fn enabled(&self) -> bool {
        self.control.load(Ordering::Acquire) & CONTROL_ENABLE != 0
    }

    fn live(&self, vector: &Vector) -> bool {
        let control = self.control.load(Ordering::Acquire);
        control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK) == CONTROL_ENABLE && !vector.masked
    }

    /// The message control register was written.
    pub(crate) fn set_control(&self, control: u16) -> io::Result<()> {
        let new = control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        let old = self.control.swap(new, Ordering::AcqRel);
        if old == new {
            return Ok(());
        }
        self.vectors.iter().try_for_each(|vector| self.settle(&mut lock(vector)))
    }

    /// Everything masked and forgotten, as after power-on. Lines are kept for the next driver.
    pub(crate) fn reset(&self) {
        self.control.store(0, Ordering::Release);
        for vector in &self.vectors {
            lock(vector).reset();
        }
    }

    /// An interrupt for `vector`: delivered, or pending. A vector that does not exist is ignored.
    pub(crate) fn trigger(&self, vector: u16) -> io::Result<()> {
        let Some(vector) = self.vectors.get(usize::from(vector)) else { return Ok(()) };
        let mut vector = lock(vector);
        vector.pending = true;
        self.settle(&mut vector)
    }

    /// Brings the line in step with the vector and delivers what is pending, if it is live.
    fn settle(&self, vector: &mut Vector) -> io::Result<()> {
        if !self.live(vector) {
            if let Some(line) = vector.line.as_mut().filter(|line| vector.lent > 0 && line.routed.is_some()) {
                line.route.hold()?;
                line.routed = None;
            }
            return Ok(());
        }
        vector.collect();
        let message = vector.message;
        if vector.line.is_none() {
            vector.line = Some(Line { route: self.platform.msi_route()?.into(), routed: None });
        }
        let Some(line) = vector.line.as_mut() else { return Ok(()) };
        if line.routed != Some(message) {
            line.route.route(message)?;
            line.routed = Some(message);
        }
        if vector.pending {
            line.route.trigger()?;
            vector.pending = false;
        }
        Ok(())
    }

    /// The line of a live vector, for a device inside the kernel to signal until [`Msix::take_back`]. `None`: it is not live.
    pub(crate) fn lend(&self, vector: u16) -> Option<Arc<dyn MsiRoute>> {
        let mut vector = lock(self.vectors.get(usize::from(vector))?);
        let line = vector.line.as_ref().filter(|line| self.live(&vector) && line.routed.is_some())?;
        let route = line.route.clone();
        vector.lent = vector.lent.saturating_add(1);
        Some(route)
    }

    /// Nobody signals a line that was lent any more, but for the others who have it.
    pub(crate) fn take_back(&self, vector: u16) {
        if let Some(vector) = self.vectors.get(usize::from(vector)) {
            let mut vector = lock(vector);
            vector.collect();
            vector.lent = vector.lent.saturating_sub(1);
        }
    }

    /// Whether any line is lent.
    pub(crate) fn has_lent(&self) -> bool {
        self.vectors.iter().any(|vector| lock(vector).lent > 0)
    }

    /// The table and the pending bits.
    pub(crate) fn save(&self) -> Vec<VectorState> {
        let one = |vector: &Mutex<Vector>| {
            let vector = lock(vector);
            VectorState {
                address: vector.message.address,
                data: vector.message.data,
                masked: vector.masked,
                pending: vector.pending,
            }
        };
        self.vectors.iter().map(one).collect()
    }

    /// The table and the pending bits as they were. What is live and pending is delivered at once, so set the control
    /// register afterwards.
    pub(crate) fn restore(&self, states: &[VectorState]) -> io::Result<()> {
        for (vector, state) in self.vectors.iter().zip(states) {
            let mut vector = lock(vector);
            vector.message = MsiMessage { address: state.address, data: state.data };
            vector.masked = state.masked;
            vector.pending = state.pending;
            self.settle(&mut vector)?;
        }
        Ok(())
    }

    fn entry(&self, index: u64) -> Option<&Mutex<Vector>> {
        self.vectors.get(usize::try_from(index).ok()?)
    }

    /// Reads the table, any width at any offset.
    pub(crate) fn read_table(&self, offset: u64, out: &mut [u8]) {
        for (at, byte) in (offset..).zip(out.iter_mut()) {
            *byte = self.entry(at / ENTRY_BYTES).map_or(0, |vector| {
                let vector = lock(vector);
                let [a0, a1, a2, a3, a4, a5, a6, a7] = vector.message.address.to_le_bytes();
                let [d0, d1, d2, d3] = vector.message.data.to_le_bytes();
                let mask = u8::from(vector.masked);
                let image = [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, mask, 0, 0, 0];
                usize::try_from(at % ENTRY_BYTES).ok().and_then(|at| image.get(at).copied()).unwrap_or(0)
            });
        }
    }

    /// Writes the table. Only aligned 4 and 8 byte writes count (PCI 3.0 §6.8.2), others are ignored.
    pub(crate) fn write_table(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        if let Ok(bytes) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            return self.write_field(offset, u32::from_le_bytes(bytes));
        }
        if let Ok(bytes) = <[u8; 8]>::try_from(data)
            && offset.is_multiple_of(8)
        {
            let [b0, b1, b2, b3, b4, b5, b6, b7] = bytes;
            self.write_field(offset, u32::from_le_bytes([b0, b1, b2, b3]))?;
            return self.write_field(offset.saturating_add(4), u32::from_le_bytes([b4, b5, b6, b7]));
        }
        Ok(())
    }

    fn write_field(&self, offset: u64, value: u32) -> io::Result<()> {
        let Some(vector) = self.entry(offset / ENTRY_BYTES) else { return Ok(()) };
        let mut vector = lock(vector);
        let address = vector.message.address;
        match offset % ENTRY_BYTES {
            0 => vector.message.address = (address & !0xffff_ffff) | u64::from(value),
            4 => vector.message.address = (address & 0xffff_ffff) | (u64::from(value) << 32),
            8 => vector.message.data = value,
            _ => vector.masked = value & 1 == 1,
        }
        self.settle(&mut vector)
    }

    /// Reads the pending bits, any width at any offset. They cannot be written.
    pub(crate) fn read_pending(&self, offset: u64, out: &mut [u8]) {
        for (at, byte) in (offset..).zip(out.iter_mut()) {
            let first = at.saturating_mul(8);
            *byte = (0..8u8).fold(0, |bits, bit| {
                let pending = first
                    .checked_add(u64::from(bit))
                    .and_then(|index| self.entry(index))
                    .is_some_and(|vector| {
                        let mut vector = lock(vector);
                        vector.collect();
                        vector.pending
                    });
                bits | (u8::from(pending) << bit)
            });
        }
    }
}
