//! The bells that a device rings, and the few registers its threads may touch.
//!
//! A device's threads never take the lock of its PCI function: a reset holds that lock while it waits for
//! those threads. What both sides touch is therefore here: atomics, and the MSI-X vectors with a lock each.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::msix::Msix;
use crate::platform::MsiRoute;

/// `VIRTIO_MSI_NO_VECTOR`.
pub(crate) const NO_VECTOR: u16 = 0xffff;
/// Device status bits, virtio 1.2 §2.1.
pub(crate) const STATUS_DRIVER_OK: u8 = 4;
pub(crate) const STATUS_NEEDS_RESET: u8 = 64;
/// ISR status bits, virtio 1.2 §4.1.4.5.
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What the transport and the device's threads share.
pub(crate) struct Shared {
    pub(crate) msix: Msix,
    pub(crate) status: AtomicU8,
    pub(crate) isr: AtomicU8,
    pub(crate) generation: AtomicU8,
    pub(crate) config_vector: AtomicU16,
    pub(crate) queue_vectors: Box<[AtomicU16]>,
}

impl Shared {
    pub(crate) fn new(msix: Msix, queues: usize) -> Self {
        Self {
            msix,
            status: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        }
    }

    /// Back to the state of a device reset. The device's threads have ended.
    pub(crate) fn reset(&self) {
        self.status.store(0, Ordering::Release);
        self.isr.store(0, Ordering::Release);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }

    fn ring(&self, vector: u16, isr: u8) {
        if !self.msix.enabled() {
            // No INTx line is raised: this register is for drivers that poll.
            self.isr.fetch_or(isr, Ordering::AcqRel);
        } else if vector != NO_VECTOR && self.msix.trigger(vector).is_err() {
            // The message is lost, so the driver would wait for ever. Let it see why.
            self.status.fetch_or(STATUS_NEEDS_RESET, Ordering::AcqRel);
        }
    }

    fn ring_config(&self) {
        self.ring(self.config_vector.load(Ordering::Acquire), ISR_CONFIG);
    }

    /// Sets DEVICE_NEEDS_RESET and, if the driver runs, tells it (virtio 1.2 §2.1.2).
    pub(crate) fn fail(&self) {
        let before = self.status.fetch_or(STATUS_NEEDS_RESET, Ordering::AcqRel);
        if before & STATUS_DRIVER_OK != 0 && before & STATUS_NEEDS_RESET == 0 {
            self.ring_config();
        }
    }
}

/// Tells the driver that chains of one queue were used. Ask [`crate::VirtQueue::interrupt_wanted`] first.
#[derive(Clone)]
pub struct QueueInterrupt {
    pub(crate) shared: Arc<Shared>,
    pub(crate) queue: u16,
}

impl QueueInterrupt {
    /// Delivers the interrupt, or marks it pending where the vector is masked.
    pub fn trigger(&self) {
        if let Some(vector) = self.shared.queue_vectors.get(usize::from(self.queue)) {
            self.shared.ring(vector.load(Ordering::Acquire), ISR_QUEUE);
        }
    }
}

impl QueueInterrupt {
    /// Lends the line of this interrupt to a device inside the kernel. `None`: the driver polls, or has masked it just now; then
    /// only [`QueueInterrupt::trigger`] is right.
    pub fn lend(&self) -> Option<LentLine> {
        let vector = self.shared.queue_vectors.get(usize::from(self.queue))?.load(Ordering::Acquire);
        let route = self.shared.msix.lend(vector)?;
        Some(LentLine { shared: self.shared.clone(), vector, route })
    }
}

/// A queue's interrupt in other hands. If the driver moves the queue to another vector, the transport suspends the device and
/// lets it go on: so a device gives its lines back when it is suspended.
pub struct LentLine {
    shared: Arc<Shared>,
    vector: u16,
    route: Arc<dyn MsiRoute>,
}

impl LentLine {
    /// Delivers the interrupt when it is signalled.
    pub fn event(&self) -> &EventFd {
        self.route.event()
    }
}

impl Drop for LentLine {
    fn drop(&mut self) {
        self.shared.msix.take_back(self.vector);
    }
}

impl std::fmt::Debug for LentLine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LentLine").field("vector", &self.vector).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for QueueInterrupt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueueInterrupt").field("queue", &self.queue).finish_non_exhaustive()
    }
}

/// Tells the driver that the device's configuration changed.
#[derive(Clone)]
pub struct ConfigInterrupt {
    pub(crate) shared: Arc<Shared>,
}

impl ConfigInterrupt {
    /// Advances the configuration generation and delivers the interrupt. Call after the change is readable.
    pub fn trigger(&self) {
        self.shared.generation.fetch_add(1, Ordering::AcqRel);
        self.shared.ring_config();
    }
}

/// Stops trusting the driver: the device needs a reset.
#[derive(Clone)]
pub struct DeviceFailure {
    pub(crate) shared: Arc<Shared>,
}

impl DeviceFailure {
    /// Sets DEVICE_NEEDS_RESET. The caller then leaves the rings alone until it is reset.
    pub fn mark(&self) {
        self.shared.fail();
    }

    /// Whether the device waits for a reset.
    pub fn is_marked(&self) -> bool {
        self.shared.status.load(Ordering::Acquire) & STATUS_NEEDS_RESET != 0
    }
}
