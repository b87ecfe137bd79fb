//! The driver's half of virtio 1.2 over PCI: transport, split virtqueues by polling.

use crate::clock;
use crate::cpu;
use crate::mem::{self, Dma};
use crate::pci::{COMMAND_MASTER, COMMAND_MEMORY, Function};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

/// Device status bits (§2.1).
pub mod status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest can drive it.
    pub const DRIVER: u8 = 2;
    /// Ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed.
    pub const FEATURES_OK: u8 = 8;
    /// The device has given up until a reset.
    pub const NEEDS_RESET: u8 = 64;
}

/// Offsets in the common configuration structure (§4.1.4.3).
#[allow(dead_code, reason = "the whole structure, as the standard has it")]
pub mod common {
    /// Which 32 device feature bits are shown.
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    /// Those bits.
    pub const DEVICE_FEATURE: u64 = 4;
    /// Which 32 driver feature bits are written.
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    /// Those bits.
    pub const DRIVER_FEATURE: u64 = 12;
    /// MSI-X entry for configuration changes.
    pub const CONFIG_MSIX_VECTOR: u64 = 16;
    /// Number of queues.
    pub const NUM_QUEUES: u64 = 18;
    /// Device status.
    pub const DEVICE_STATUS: u64 = 20;
    /// Changes when the device's configuration does.
    pub const CONFIG_GENERATION: u64 = 21;
    /// Which queue the rest is about.
    pub const QUEUE_SELECT: u64 = 22;
    /// Its size.
    pub const QUEUE_SIZE: u64 = 24;
    /// Its MSI-X entry.
    pub const QUEUE_MSIX_VECTOR: u64 = 26;
    /// Whether it is live.
    pub const QUEUE_ENABLE: u64 = 28;
    /// Where its doorbell is.
    pub const QUEUE_NOTIFY_OFF: u64 = 30;
    /// Descriptor table.
    pub const QUEUE_DESC: u64 = 32;
    /// Available ring.
    pub const QUEUE_DRIVER: u64 = 40;
    /// Used ring.
    pub const QUEUE_DEVICE: u64 = 48;
}

/// The feature bit of every modern device.
pub const VERSION_1: u64 = 1 << 32;
/// No MSI-X entry.
pub const NO_VECTOR: u16 = 0xffff;

/// How long a request may take, milliseconds.
static PATIENCE_MS: AtomicU64 = AtomicU64::new(5000);

/// Sets how long a request may take (`mini.wait_ms`).
pub fn set_patience(ms: u64) {
    PATIENCE_MS.store(ms, Ordering::Relaxed);
}

/// Errors are sentences: a case prints them as its reason.
pub type Result<T> = core::result::Result<T, String>;

/// A device, found and mapped.
#[derive(Clone, Debug)]
pub struct Virtio {
    /// Its PCI function.
    pub function: Function,
    /// Common configuration.
    pub common: u64,
    /// Doorbells.
    pub notify: u64,
    /// Distance of doorbells.
    pub notify_multiplier: u32,
    /// Interrupt status.
    pub isr: u64,
    /// Device configuration; 0 = none.
    pub config: u64,
}

impl Virtio {
    /// Finds the structures in the capabilities, maps them, lets the device decode memory and master the bus.
    pub fn open(function: Function) -> Result<Self> {
        let bars = function.bars();
        let mut found = [0u64; 5];
        let mut notify_multiplier = 0;
        for (id, at) in function.capabilities() {
            let kind = usize::from(function.get8(at + 3));
            if id != 0x09 || !(1..=4).contains(&kind) || found[kind] != 0 {
                continue;
            }
            let bar = bars.iter().find(|bar| bar.index == function.get8(at + 4));
            let bar = bar.ok_or_else(|| format!("capability {kind} names an absent BAR"))?;
            let (offset, len) = (u64::from(function.get32(at + 8)), u64::from(function.get32(at + 12)));
            if bar.address == 0 || offset + len > bar.len {
                return Err(format!("capability {kind}: {offset:#x}+{len:#x} in BAR {bar:x?}"));
            }
            mem::map(bar.address, bar.len);
            found[kind] = bar.address + offset;
            if kind == 2 {
                notify_multiplier = function.get32(at + 16);
            }
        }
        if found[1] == 0 || found[2] == 0 || found[3] == 0 {
            return Err(format!("a structure is missing: {found:x?}"));
        }
        function.set_command(COMMAND_MEMORY | COMMAND_MASTER, true);
        let [_, common, notify, isr, config] = found;
        Ok(Self { function, common, notify, notify_multiplier, isr, config })
    }

    /// Device status.
    pub fn status(&self) -> u8 {
        cpu::read8(self.common + common::DEVICE_STATUS)
    }
    /// Sets the device status.
    pub fn set_status(&self, value: u8) {
        cpu::write8(self.common + common::DEVICE_STATUS, value);
    }
    /// Resets and waits until the device says that it has.
    pub fn reset(&self) -> Result<()> {
        self.set_status(0);
        if clock::poll(2000, || self.status() == 0) { Ok(()) } else { Err("no reset within 2 s".into()) }
    }
    /// What the device offers.
    pub fn device_features(&self) -> u64 {
        let half = |select: u32| {
            cpu::write32(self.common + common::DEVICE_FEATURE_SELECT, select);
            u64::from(cpu::read32(self.common + common::DEVICE_FEATURE))
        };
        half(0) | half(1) << 32
    }
    /// What the driver accepts.
    pub fn set_driver_features(&self, features: u64) {
        for select in 0..2u32 {
            cpu::write32(self.common + common::DRIVER_FEATURE_SELECT, select);
            cpu::write32(self.common + common::DRIVER_FEATURE, (features >> (32 * select)) as u32);
        }
    }
    /// Resets, and goes as far as agreed features: those offered that are in `wanted`, and VERSION_1.
    pub fn negotiate(&self, wanted: u64) -> Result<u64> {
        self.reset()?;
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        let features = self.device_features() & (wanted | VERSION_1);
        self.set_driver_features(features);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        if self.status() & status::FEATURES_OK == 0 {
            return Err(format!("features {features:#x} were refused"));
        }
        Ok(features)
    }
    /// Goes live.
    pub fn driver_ok(&self) {
        self.set_status(self.status() | status::DRIVER_OK);
    }
    /// Number of queues.
    pub fn num_queues(&self) -> u16 {
        cpu::read16(self.common + common::NUM_QUEUES)
    }
    /// The largest size of a queue; 0 = there is no such queue.
    pub fn queue_size_max(&self, index: u16) -> u16 {
        cpu::write16(self.common + common::QUEUE_SELECT, index);
        cpu::read16(self.common + common::QUEUE_SIZE)
    }
    /// Makes a queue of at most `size` entries, live, with an MSI-X entry or none.
    pub fn queue(&self, index: u16, size: u16, vector: u16) -> Result<Queue> {
        let max = self.queue_size_max(index);
        if max == 0 {
            return Err(format!("there is no queue {index}"));
        }
        let size = size.min(max);
        let queue = Queue::new(self, index, size);
        let at = self.common;
        cpu::write16(at + common::QUEUE_SIZE, size);
        cpu::write16(at + common::QUEUE_MSIX_VECTOR, vector);
        if vector != NO_VECTOR && cpu::read16(at + common::QUEUE_MSIX_VECTOR) != vector {
            return Err(format!("queue {index} does not take MSI-X entry {vector}"));
        }
        let rings = [
            (common::QUEUE_DESC, &queue.descriptors),
            (common::QUEUE_DRIVER, &queue.available),
            (common::QUEUE_DEVICE, &queue.used),
        ];
        for (offset, ring) in rings {
            cpu::write32(at + offset, ring.address as u32);
            cpu::write32(at + offset + 4, (ring.address >> 32) as u32);
        }
        cpu::write16(at + common::QUEUE_ENABLE, 1);
        Ok(queue)
    }
    /// Reads the device's configuration.
    pub fn config8(&self, offset: u64) -> u8 {
        cpu::read8(self.config + offset)
    }
    /// Reads the device's configuration.
    pub fn config16(&self, offset: u64) -> u16 {
        cpu::read16(self.config + offset)
    }
    /// Reads the device's configuration.
    pub fn config32(&self, offset: u64) -> u32 {
        cpu::read32(self.config + offset)
    }
    /// Reads the device's configuration.
    pub fn config64(&self, offset: u64) -> u64 {
        u64::from(self.config32(offset)) | u64::from(self.config32(offset + 4)) << 32
    }
}

/// One part of a request.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Where.
    pub dma: Dma,
    /// Whether the device writes it.
    pub writable: bool,
}

impl Segment {
    /// The device reads it.
    pub fn out(dma: Dma) -> Self {
        Self { dma, writable: false }
    }
    /// The device writes it.
    pub fn into(dma: Dma) -> Self {
        Self { dma, writable: true }
    }
}

/// A split virtqueue (§2.7).
pub struct Queue {
    /// Number of entries.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: Dma,
    /// Available ring.
    pub available: Dma,
    /// Used ring.
    pub used: Dma,
    /// Address of the doorbell.
    pub doorbell: u64,
    index: u16,
    free: Vec<u16>,
    next_available: u16,
    last_used: u16,
}

impl Queue {
    fn new(device: &Virtio, index: u16, size: u16) -> Self {
        let notify_off = cpu::read16(device.common + common::QUEUE_NOTIFY_OFF);
        let entries = u64::from(size);
        Self {
            size,
            descriptors: Dma::new(16 * entries),
            available: Dma::new(6 + 2 * entries),
            used: Dma::new(6 + 8 * entries),
            doorbell: device.notify + u64::from(notify_off) * u64::from(device.notify_multiplier),
            index,
            free: (0..size).rev().collect(),
            next_available: 0,
            last_used: 0,
        }
    }
    /// Writes one descriptor.
    pub fn set_descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let at = u64::from(index) * 16;
        self.descriptors.set64(at, address);
        self.descriptors.set32(at + 8, len);
        self.descriptors.set16(at + 12, flags);
        self.descriptors.set16(at + 14, next);
    }
    /// Offers the chain that starts at a descriptor, without ringing.
    pub fn offer(&mut self, head: u16) {
        self.available.set16(4 + 2 * u64::from(self.next_available % self.size), head);
        self.next_available = self.next_available.wrapping_add(1);
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        self.available.set16(2, self.next_available);
    }
    /// Offers a request; None if there are too few free descriptors. Rings nothing.
    pub fn add(&mut self, segments: &[Segment]) -> Option<u16> {
        if self.free.len() < segments.len() {
            return None;
        }
        let mut next = None::<u16>;
        for segment in segments.iter().rev() {
            let index = self.free.pop()?;
            let flags = u16::from(next.is_some()) | u16::from(segment.writable) << 1;
            self.set_descriptor(index, segment.dma.address, segment.dma.len as u32, flags, next.unwrap_or(0));
            next = Some(index);
        }
        self.offer(next?);
        next
    }
    /// Rings the doorbell.
    pub fn kick(&self) {
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        cpu::write16(self.doorbell, self.index);
    }
    /// Rings the doorbell unless the device says that it looks anyway (§2.7.10.1).
    pub fn kick_if_wanted(&self) {
        core::sync::atomic::fence(Ordering::SeqCst);
        if self.used.get16(0) & 1 == 0 {
            cpu::write16(self.doorbell, self.index);
        }
    }
    /// Whether there is a completion to be taken.
    pub fn has_used(&self) -> bool {
        self.used.get16(2) != self.last_used
    }
    /// Takes one completion: (head, bytes written by the device).
    pub fn take(&mut self) -> Option<(u16, u32)> {
        if self.used.get16(2) == self.last_used {
            return None;
        }
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        let at = 4 + 8 * u64::from(self.last_used % self.size);
        let (head, len) = (self.used.get32(at) as u16, self.used.get32(at + 4));
        self.last_used = self.last_used.wrapping_add(1);
        self.release(head);
        Some((head, len))
    }
    fn release(&mut self, head: u16) {
        let mut index = head % self.size;
        for _ in 0..self.size {
            self.free.push(index);
            let flags = self.descriptors.get16(u64::from(index) * 16 + 12);
            if flags & 1 == 0 {
                break;
            }
            index = self.descriptors.get16(u64::from(index) * 16 + 14) % self.size;
        }
    }
    /// Waits for one completion.
    pub fn wait(&mut self, ms: u64) -> Result<(u16, u32)> {
        let mut taken = None;
        clock::poll(ms, || {
            taken = self.take();
            taken.is_some()
        });
        taken.ok_or_else(|| format!("queue {}: no completion within {ms} ms", self.index))
    }
    /// Offers a request, rings, waits; the answer is how many bytes the device wrote.
    pub fn request(&mut self, segments: &[Segment]) -> Result<u32> {
        let head = self.add(segments).ok_or("the queue is full")?;
        self.kick();
        let (done, len) = self.wait(PATIENCE_MS.load(Ordering::Relaxed))?;
        if done == head { Ok(len) } else { Err(format!("completed {done}, asked {head}")) }
    }
}
