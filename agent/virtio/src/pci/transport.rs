//! virtio-pci, modern only (virtio 1.2 §4.1): a PCI function around a [`VirtioDevice`].
//!
//! ```text
//! BAR 0, 32 KiB, 32-bit memory
//!   0x0000 common configuration     0x3000 notify: queue q at 4·q, any width (an ioeventfd each)
//!   0x1000 ISR status               0x4000 MSI-X table
//!   0x2000 device configuration     0x5000 MSI-X pending bits
//! ```
//!
//! - Vector 0 … n-1 are the driver's to assign: there is one for each queue, and one for changes.
//! - Doorbells are watched by the kernel only while the device is active and its BAR is decoded: firmware
//!   that moves BARs around costs nothing. A write that reaches us all the same rings the same eventfd.
//! - The transport is used under its function's lock. A reset waits for the device's threads under it.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use serio_hv::GuestMemory;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::bus::{Failure, PciFunction};
use super::common::{COMMON_BYTES, Common, CommonEvent, F_EVENT_IDX};
use super::config::{BAR0, COMMAND, ConfigSpace, Identity, touches};
use crate::device::{ActivateError, Activation, ActiveQueue, VirtioDevice};
use crate::interrupt::{ConfigInterrupt, DeviceFailure, QueueInterrupt, Shared};
use crate::msix::Msix;
use crate::platform::Platform;
use crate::queue::VirtQueue;
use crate::state::{FunctionState, RestoreError, SuspendError};

#[path = "suspend.rs"]
mod suspend;

const VENDOR: u16 = 0x1af4;
/// Modern devices: this plus the device type (§4.1.2.1).
const DEVICE_BASE: u16 = 0x1040;

const BAR_BYTES: u32 = 0x8000;
const REGION_BYTES: u32 = 0x1000;
const COMMON: u32 = 0x0000;
const ISR: u32 = 0x1000;
const DEVICE: u32 = 0x2000;
const NOTIFY: u32 = 0x3000;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PENDING: u32 = 0x5000;
/// Each queue has its own doorbell address, so that each can have an ioeventfd without data match.
const NOTIFY_MULTIPLIER: u32 = 4;
/// What fits in the regions of one page: 256 table entries.
const QUEUES_MAX: usize = 128;

/// Capability ids (PCI) and types (virtio 1.2 §4.1.4).
const CAP_MSIX: u8 = 0x11;
const CAP_VENDOR: u8 = 0x09;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// A device cannot be put behind this transport.
#[derive(Debug, thiserror::Error)]
pub enum VirtioPciError {
    /// Too many queues.
    #[error("a device has at most {QUEUES_MAX} queues, this one has {0}")]
    Queues(usize),
    /// A queue size that is no power of two up to 32768.
    #[error("a queue size is a power of two up to 32768, not {0}")]
    QueueSize(u16),
}

/// A virtio device as a PCI function. Put it on a [`crate::PciBus`].
pub struct VirtioPci {
    device: Box<dyn VirtioDevice>,
    platform: Arc<dyn Platform>,
    memory: GuestMemory,
    config: ConfigSpace,
    bar_home: u32,
    msix_capability: usize,
    window_capability: usize,
    common: Common,
    shared: Arc<Shared>,
    /// The doorbells of the active queues; empty while the device is not active.
    kicks: Vec<(u16, EventFd)>,
    /// Where the kernel watches the doorbells now.
    watched: Option<u64>,
    /// The queues, while the device is suspended.
    suspended: Option<Vec<ActiveQueue>>,
    /// It was restored and has not run yet: interrupts that were on their way when it was saved may be lost.
    restored: bool,
    /// Why the last activation failed, for whoever debugs the VM.
    last_error: Option<ActivateError>,
}

impl VirtioPci {
    /// Wraps `device`. `platform` is usually `Arc<serio_hv::Vm>` in an `Arc`.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        platform: Arc<dyn Platform>,
        memory: GuestMemory,
    ) -> Result<Self, VirtioPciError> {
        let sizes = device.queue_sizes();
        let queues = sizes.len();
        if queues > QUEUES_MAX {
            return Err(VirtioPciError::Queues(queues));
        }
        if let Some(size) = sizes.iter().find(|size| !size.is_power_of_two()) {
            return Err(VirtioPciError::QueueSize(*size));
        }
        let vectors = u16::try_from(queues).unwrap_or(u16::MAX).saturating_add(1);
        let device_id = device.device_id();
        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: DEVICE_BASE.saturating_add(device_id),
            class: class_of(device_id),
            revision: 1,
            subsystem: device_id,
        });
        config.add_memory_bar(BAR_BYTES);
        let msix_capability = add_msix_capability(&mut config, vectors);
        let window_capability = add_virtio_capabilities(&mut config, queues);
        let common = Common::new(device.features(), sizes);
        let shared = Arc::new(Shared::new(Msix::new(platform.clone(), vectors), queues));
        Ok(Self {
            device,
            platform,
            memory,
            config,
            bar_home: 0,
            msix_capability,
            window_capability,
            common,
            shared,
            kicks: Vec::new(),
            watched: None,
            suspended: None,
            restored: false,
            last_error: None,
        })
    }

    /// Why the device last refused to start, if it did.
    pub fn last_error(&self) -> Option<&ActivateError> {
        self.last_error.as_ref()
    }

    fn activate(&mut self) {
        self.last_error = self.try_activate().err();
        if self.last_error.is_some() {
            self.shared.fail();
        }
    }

    fn try_activate(&mut self) -> Result<(), ActivateError> {
        let queues = self.make_queues(|_| Some((0, 0)))?;
        // Before the device runs: no kick may go unheard.
        self.follow_bar().map_err(ActivateError::io("watch the device's doorbells"))?;
        self.hand_over(queues)
    }

    /// The enabled queues, as far as `position` knows where to begin in them, and their doorbells.
    fn make_queues(
        &mut self,
        position: impl Fn(u16) -> Option<(u16, u16)>,
    ) -> Result<Vec<ActiveQueue>, ActivateError> {
        let features = self.common.features();
        let mut queues = Vec::with_capacity(self.common.queues.len());
        let mut kicks = Vec::with_capacity(self.common.queues.len());
        for (index, registers) in (0u16..).zip(&self.common.queues) {
            let Some((next_avail, next_used)) = position(index).filter(|_| registers.enabled) else {
                continue;
            };
            let mut queue = registers
                .build(&self.memory, features & F_EVENT_IDX != 0)
                .ok_or(ActivateError::QueueNotEnabled { index })?;
            queue.set_next_avail(next_avail);
            queue.set_next_used(next_used);
            let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
                .map_err(ActivateError::io("make a queue's eventfd"))?;
            kicks.push((index, kick.try_clone().map_err(ActivateError::io("share a queue's eventfd"))?));
            queues.push(ActiveQueue {
                index,
                queue: VirtQueue::new(queue, self.memory.clone()),
                kick,
                interrupt: QueueInterrupt { shared: self.shared.clone(), queue: index },
            });
        }
        self.kicks = kicks;
        Ok(queues)
    }

    fn hand_over(&mut self, queues: Vec<ActiveQueue>) -> Result<(), ActivateError> {
        self.device.activate(Activation {
            memory: self.memory.clone(),
            queues,
            config_interrupt: ConfigInterrupt { shared: self.shared.clone() },
            features: self.common.features(),
            failure: DeviceFailure { shared: self.shared.clone() },
        })
    }

    /// Stops the device; its registers are then as after a reset (virtio 1.2 §2.4).
    fn reset_device(&mut self) {
        self.device.reset();
        self.suspended = None;
        self.restored = false;
        self.unwatch();
        self.kicks.clear();
        self.common.reset();
        self.shared.reset();
    }

    fn unwatch(&mut self) {
        if let Some(base) = self.watched.take() {
            for (index, kick) in &self.kicks {
                // Nothing can be done about a refusal, and the eventfd ends with its owner anyway.
                let _ = self.platform.unwatch(doorbell(base, *index), kick);
            }
        }
    }

    /// Brings the watched doorbells in step with the BAR.
    fn follow_bar(&mut self) -> io::Result<()> {
        let wanted = self.decoded().map(|range| range.start).filter(|_| !self.kicks.is_empty());
        if wanted == self.watched {
            return Ok(());
        }
        self.unwatch();
        let Some(base) = wanted else { return Ok(()) };
        for (done, (index, kick)) in self.kicks.iter().enumerate() {
            if let Err(error) = self.platform.watch(doorbell(base, *index), kick) {
                for (index, kick) in self.kicks.iter().take(done) {
                    let _ = self.platform.unwatch(doorbell(base, *index), kick);
                }
                return Err(error);
            }
        }
        self.watched = Some(base);
        Ok(())
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        match self.common.write(&self.shared, &self.memory, offset, data) {
            CommonEvent::Nothing => {}
            CommonEvent::Reset => self.reset_device(),
            CommonEvent::Activate => self.activate(),
            CommonEvent::Moved => self.lend_again(),
            CommonEvent::Fail => self.shared.fail(),
        }
    }

    fn write_msix(&self, offset: u64, data: &[u8]) {
        if self.shared.msix.write_table(offset, data).is_err() {
            self.shared.fail();
        }
    }

    fn ring_doorbell(&self, offset: u64) {
        let index = offset / u64::from(NOTIFY_MULTIPLIER);
        if let Some((_, kick)) = self.kicks.iter().find(|(queue, _)| u64::from(*queue) == index) {
            // Fails only when the counter is full: then the device is about to look anyway.
            let _ = kick.write(1);
        }
    }

    /// The access that the PCI configuration access capability describes (§4.1.4.9): offset and length.
    fn window(&self) -> Option<(u64, usize)> {
        let at = self.window_capability;
        let bar = self.config.u32_at(at.saturating_add(4)) & 0xff;
        let offset = self.config.u32_at(at.saturating_add(8));
        let len = self.config.u32_at(at.saturating_add(12));
        let valid = bar == 0 && matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len);
        (valid && offset < BAR_BYTES).then_some((u64::from(offset), usize::try_from(len).ok()?))
    }

    fn window_data(&self) -> Range<usize> {
        let start = self.window_capability.saturating_add(16);
        start..start.saturating_add(4)
    }
}

impl PciFunction for VirtioPci {
    fn failure(&self) -> Option<Failure> {
        self.failure_now()
    }

    fn config_read(&mut self, offset: u16, out: &mut [u8]) {
        let window = self.window_data();
        if touches(offset, out.len(), window.clone())
            && let Some((at, len)) = self.window()
        {
            let mut data = [0u8; 4];
            if let Some(data) = data.get_mut(..len) {
                self.bar_read(at, data);
            }
            self.config.put(window.start, &data);
        }
        self.config.read(offset, out);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        let len = data.len();
        let mut result = Ok(());
        if touches(offset, len, COMMAND..COMMAND + 2) || touches(offset, len, BAR0..BAR0 + 4) {
            result = self.follow_bar();
        }
        let control = self.msix_capability.saturating_add(2);
        if touches(offset, len, control..control.saturating_add(2)) {
            let before = self.shared.msix.enabled();
            result = result.and(self.shared.msix.set_control(self.config.u16_at(control)));
            if self.shared.msix.enabled() != before {
                self.lend_again();
            }
        }
        if result.is_err() {
            self.shared.fail();
        }
        let window = self.window_data();
        if touches(offset, len, window.clone())
            && let Some((at, len)) = self.window()
        {
            let bytes = self.config.u32_at(window.start).to_le_bytes();
            if let Some(bytes) = bytes.get(..len) {
                self.bar_write(at, bytes);
            }
        }
    }

    fn bar_size(&self) -> u32 {
        BAR_BYTES
    }

    fn place_bar(&mut self, address: u32) {
        self.bar_home = address;
        self.config.put(BAR0, &address.to_le_bytes());
    }

    fn decoded(&self) -> Option<Range<u64>> {
        self.config.decoded(BAR_BYTES)
    }

    fn bar_read(&mut self, offset: u64, out: &mut [u8]) {
        out.fill(0);
        let Some((region, at)) = split(offset) else { return };
        match region {
            COMMON => {
                let image = self.common.image(&self.shared);
                for (byte, value) in out.iter_mut().zip(image.iter().skip(at)) {
                    *byte = *value;
                }
            }
            ISR => {
                if let (0, Some(byte)) = (at, out.first_mut()) {
                    // Reading acknowledges (§4.1.4.5).
                    *byte = self.shared.isr.swap(0, Ordering::AcqRel);
                }
            }
            DEVICE => self.device.read_config(offset.saturating_sub(u64::from(DEVICE)), out),
            MSIX_TABLE => self.shared.msix.read_table(offset.saturating_sub(u64::from(MSIX_TABLE)), out),
            MSIX_PENDING => {
                self.shared.msix.read_pending(offset.saturating_sub(u64::from(MSIX_PENDING)), out)
            }
            _ => {}
        }
    }

    fn bar_write(&mut self, offset: u64, data: &[u8]) {
        let Some((region, at)) = split(offset) else { return };
        let at = u64::try_from(at).unwrap_or(u64::MAX);
        match region {
            COMMON => self.write_common(at, data),
            DEVICE => self.device.write_config(at, data),
            NOTIFY => self.ring_doorbell(at),
            MSIX_TABLE => self.write_msix(at, data),
            _ => {}
        }
    }

    fn reset(&mut self) {
        self.reset_device();
        self.shared.msix.reset();
        self.config.clear_command();
        self.config.put(BAR0, &self.bar_home.to_le_bytes());
        // Enable and mask; the rest of this byte belongs to the table's size, which is below 256.
        self.config.put(self.msix_capability.saturating_add(3), &[0]);
    }

    fn suspend(&mut self) -> Result<(), SuspendError> {
        self.suspend_device()
    }

    fn resume(&mut self) {
        self.resume_device();
    }

    fn save(&self) -> FunctionState {
        self.save_function()
    }

    fn restore(&mut self, state: &FunctionState) -> Result<(), RestoreError> {
        self.restore_function(state)
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        // The device's threads use guest memory and interrupts: they end first.
        self.device.reset();
        self.unwatch();
    }
}

fn split(offset: u64) -> Option<(u32, usize)> {
    let offset = u32::try_from(offset).ok().filter(|offset| *offset < BAR_BYTES)?;
    let at = offset % REGION_BYTES;
    Some((offset.checked_sub(at)?, usize::try_from(at).ok()?))
}

fn doorbell(base: u64, queue: u16) -> u64 {
    let offset = NOTIFY.saturating_add(NOTIFY_MULTIPLIER.saturating_mul(u32::from(queue)));
    base.saturating_add(u64::from(offset))
}

fn add_msix_capability(config: &mut ConfigSpace, vectors: u16) -> usize {
    // The size field is one less; table and pending bits are both in BAR 0, so their BIR bits are 0.
    let [low, high] = vectors.saturating_sub(1).to_le_bytes();
    let [t0, t1, t2, t3] = MSIX_TABLE.to_le_bytes();
    let [p0, p1, p2, p3] = MSIX_PENDING.to_le_bytes();
    let at = config.add_capability(CAP_MSIX, &[low, high, t0, t1, t2, t3, p0, p1, p2, p3]);
    config.allow(at.saturating_add(3), &[0xc0]);
    at
}

/// `struct virtio_pci_cap` after its id and link: length, type, BAR 0, id, padding, offset, length.
fn virtio_capability(kind: u8, offset: u32, len: u32, tail: &[u8]) -> Vec<u8> {
    let total = u8::try_from(tail.len()).unwrap_or(0).saturating_add(16);
    let mut body = vec![total, kind, 0, 0, 0, 0];
    body.extend_from_slice(&offset.to_le_bytes());
    body.extend_from_slice(&len.to_le_bytes());
    body.extend_from_slice(tail);
    body
}

/// Adds them all; returns where the configuration access capability lies.
fn add_virtio_capabilities(config: &mut ConfigSpace, queues: usize) -> usize {
    let doorbells = NOTIFY_MULTIPLIER.saturating_mul(u32::try_from(queues).unwrap_or(1).max(1));
    let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
    config.add_capability(CAP_VENDOR, &virtio_capability(CFG_COMMON, COMMON, COMMON_BYTES, &[]));
    config.add_capability(CAP_VENDOR, &virtio_capability(CFG_NOTIFY, NOTIFY, doorbells, &multiplier));
    config.add_capability(CAP_VENDOR, &virtio_capability(CFG_ISR, ISR, 1, &[]));
    config.add_capability(CAP_VENDOR, &virtio_capability(CFG_DEVICE, DEVICE, REGION_BYTES, &[]));
    let at = config.add_capability(CAP_VENDOR, &virtio_capability(CFG_PCI, 0, 0, &[0; 4]));
    // The driver chooses BAR, offset and length, and reads or writes the data.
    config.allow(at.saturating_add(4), &[0xff]);
    config.allow(at.saturating_add(8), &[0xff; 12]);
    at
}

/// Base class, subclass and interface, as guests know them from other hypervisors.
fn class_of(device_id: u16) -> [u8; 3] {
    match device_id {
        1 => [0x02, 0x00, 0x00],
        2 => [0x01, 0x00, 0x00],
        3 => [0x07, 0x80, 0x00],
        _ => [0x00, 0xff, 0x00],
    }
}

#[cfg(test)]
#[path = "transport_test.rs"]
mod tests;
