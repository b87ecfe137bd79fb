//! virtio-blk (virtio 1.2 §5.2) over a [`Volume`].
//!
//! One thread for each queue, because each queue then owns its `IoQueue` and nothing is locked on the way of an
//! I/O; a device with one queue has one thread, and a sleeping thread costs a few pages. The guest spreads its
//! processors over the queues, so give it as many as it has processors, up to four or so.
//!
//! - FLUSH is always offered. A driver that does not take it gets write-through (each write is durable before it
//!   is answered), as §5.2.6.2 wants it.
//! - Sectors are 512 bytes for the guest; the topology says 4096, which is the volume's grain.
//! - DISCARD and WRITE_ZEROES take one range a request (`max_…_seg` is 1).
//! - A volume may grow while it is a disk: whoever grows it rings the [`CapacityBell`], and the driver reads the capacity
//!   again (§5.2.5, a configuration change). Requests beyond what the driver knows are fine as soon as the volume has it.

mod config;
#[cfg(any(test, feature = "testing"))]
pub(crate) mod hostile;
mod request;
mod worker;

#[cfg(test)]
mod blk_test;
#[cfg(test)]
mod bounds_test;

use std::cell::Cell;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serio_virtio::{
    ActivateError, Activation, ActiveQueue, ConfigInterrupt, DeviceState, RestoreError, SuspendError,
    VirtioDevice,
};
use serio_volume::Volume;

use self::config::{F_FLUSH, features, render};
use self::worker::QueueWorker;
use crate::Notices;
use crate::count::DiskCounts;
use crate::limit::{Limiter, Limits};
use crate::worker::{Worker, finish_all, join_all};

/// Descriptors of a queue: also how many requests can be under way in it.
pub const QUEUE_SIZE: u16 = 256;
/// The most queues of a device.
pub const QUEUES_MAX: u16 = 16;
/// Bytes of the serial number that a guest sees (`VIRTIO_BLK_ID_BYTES`).
pub const SERIAL_BYTES: usize = 20;

/// The layout of the saved state: the size that the driver was last told, eight bytes.
const STATE_VERSION: u32 = 1;

/// How a disk appears to the guest.
#[derive(Clone, Debug)]
pub struct BlkConfig {
    /// The serial number; longer ones are cut to [`SERIAL_BYTES`]. Linux shows it below /dev/disk/by-id.
    pub serial: String,
    /// Queues: 1 to [`QUEUES_MAX`], values outside are brought in.
    pub queues: u16,
}

/// Tells the driver of a disk, if there is one, that the capacity has changed. Stays the same over resets.
#[derive(Clone, Default)]
pub struct CapacityBell(Arc<Mutex<Option<ConfigInterrupt>>>);

impl CapacityBell {
    /// The volume has its new size: the driver may look.
    pub fn ring(&self) {
        if let Some(interrupt) = &*self.lock() {
            interrupt.trigger();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<ConfigInterrupt>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for CapacityBell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CapacityBell").field("active", &self.lock().is_some()).finish()
    }
}

/// A disk.
pub struct Blk {
    volume: Volume,
    bell: CapacityBell,
    /// The size when the driver last began to read the capacity.
    told_bytes: Cell<u64>,
    limiter: Arc<Limiter>,
    notices: Notices,
    counts: Option<DiskCounts>,
    serial: [u8; SERIAL_BYTES],
    queue_sizes: Vec<u16>,
    workers: Vec<Worker<ActiveQueue>>,
}

impl Blk {
    /// A disk with the contents of `volume`; read-only if the volume is.
    #[must_use]
    pub fn new(volume: Volume, config: &BlkConfig) -> Self {
        let mut serial = [0; SERIAL_BYTES];
        for (to, from) in serial.iter_mut().zip(config.serial.as_bytes()) {
            *to = *from;
        }
        let queues = usize::from(config.queues.clamp(1, QUEUES_MAX));
        Self {
            told_bytes: Cell::new(volume.size_bytes()),
            volume,
            bell: CapacityBell::default(),
            limiter: Limiter::new(Limits::default()),
            notices: Notices::default(),
            counts: None,
            serial,
            queue_sizes: vec![QUEUE_SIZE; queues],
            workers: Vec::new(),
        }
    }

    /// The same, with a bell to ring when its volume has grown.
    #[must_use]
    pub fn with_bell(mut self, bell: CapacityBell) -> Self {
        self.bell = bell;
        self
    }

    /// The same, with limits. They are kept outside, so that a reset does not fill the buckets again.
    #[must_use]
    pub fn with_limiter(mut self, limiter: Arc<Limiter>) -> Self {
        self.limiter = limiter;
        self
    }

    /// The same, with somebody who hears of the host's errors.
    #[must_use]
    pub fn with_notices(mut self, notices: Notices) -> Self {
        self.notices = notices;
        self
    }

    /// The same, counted. The counters are kept outside, so that they go on over resets.
    #[must_use]
    pub fn with_counts(mut self, counts: DiskCounts) -> Self {
        self.counts = Some(counts);
        self
    }
}

impl VirtioDevice for Blk {
    fn device_id(&self) -> u16 {
        2
    }

    fn features(&self) -> u64 {
        features(self.volume.is_read_only(), self.queue_sizes.len())
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, out: &mut [u8]) {
        let size_bytes = self.volume.size_bytes();
        if offset == 0 {
            // The capacity's lower half comes first: if it grows before the upper one is read, it counts as not told.
            self.told_bytes.set(size_bytes);
        }
        let image = render(size_bytes, self.queue_sizes.len());
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        out.fill(0);
        for (byte, value) in out.iter_mut().zip(image.iter().skip(skip)) {
            *byte = *value;
        }
    }

    // Nothing is writable: `writeback` would be, with CONFIG_WCE, which is not offered.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let write_through = !activation.has_feature(F_FLUSH);
        for queue in activation.queues {
            let name = format!("blk-queue{}", queue.index);
            let counts = self.counts.as_ref().map(|counts| counts.queue(queue.index));
            let io = self.volume.queue(queue.queue.size()).map_err(ActivateError::io("make an I/O queue"))?;
            let started = QueueWorker::start(
                name,
                queue,
                io,
                worker::Rules {
                    volume: self.volume.clone(),
                    serial: self.serial,
                    write_through,
                    limiter: self.limiter.clone(),
                    notices: self.notices.clone(),
                    counts,
                },
                activation.failure.clone(),
            );
            match started {
                Ok(worker) => self.workers.push(worker),
                Err(error) => {
                    self.reset();
                    return Err(error);
                }
            }
        }
        *self.bell.lock() = Some(activation.config_interrupt);
        if self.told_bytes.get() != self.volume.size_bytes() {
            // It grew after the driver had read the capacity, and before there was somebody to tell.
            self.bell.ring();
        }
        Ok(())
    }

    fn reset(&mut self) {
        *self.bell.lock() = None;
        join_all(&mut self.workers);
    }

    fn suspend(&mut self) -> Result<Vec<ActiveQueue>, SuspendError> {
        *self.bell.lock() = None;
        finish_all(&mut self.workers)
    }

    fn save(&self) -> DeviceState {
        DeviceState::new(STATE_VERSION, self.told_bytes.get().to_le_bytes())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        if let Some(bytes) = state.fixed(STATE_VERSION)? {
            self.told_bytes.set(u64::from_le_bytes(bytes));
        }
        Ok(())
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        self.reset();
    }
}
