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
//! - A request that finds the host's disk full is held until there is room: see `held.rs`.
//! - A volume may grow while it is a disk: whoever grows it rings the [`CapacityBell`], and the driver reads the capacity
//!   again (§5.2.5, a configuration change). Requests beyond what the driver knows are fine as soon as the volume has it.

mod config;
mod held;
#[cfg(any(test, feature = "testing"))]
pub(crate) mod hostile;
mod request;
mod slot;
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
use crate::count::DiskCounts;
use crate::limit::{Limiter, Limits};
use crate::worker::{Worker, finish_all, join_all};
use crate::{Notices, Trouble};

/// Descriptors of a queue: also how many requests can be under way in it.
pub const QUEUE_SIZE: u16 = 256;
/// The most queues of a device.
pub const QUEUES_MAX: u16 = 16;
/// Bytes of the serial number that a guest sees (`VIRTIO_BLK_ID_BYTES`).
pub const SERIAL_BYTES: usize = 20;

/// The layout of the saved state: the size that the driver was last told, eight bytes.
const STATE_VERSION: u32 = 1;
/// The same, and behind it the held requests: number of the queue and of the head, two bytes each. Written only when there
/// are some, so that an older program takes all the others.
const STATE_WITH_HELD: u32 = 2;
const HELD_BYTES: usize = 4;

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
    trouble: Trouble,
    counts: Option<DiskCounts>,
    serial: [u8; SERIAL_BYTES],
    queue_sizes: Vec<u16>,
    /// Taken off a ring and not answered when the device was suspended, in each queue.
    held: Vec<(u16, Vec<u16>)>,
    workers: Vec<Worker<QueueLeft>>,
}

/// What a queue's thread leaves: the ring, and the heads of requests that still wait for room on the host's disk.
struct QueueLeft {
    ring: ActiveQueue,
    held: Vec<u16>,
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
            trouble: Trouble::default(),
            counts: None,
            serial,
            queue_sizes: vec![QUEUE_SIZE; queues],
            held: Vec::new(),
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

    /// The same, with somebody who sees while the host's disk is full.
    #[must_use]
    pub fn with_trouble(mut self, trouble: Trouble) -> Self {
        self.trouble = trouble;
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
        let held = std::mem::take(&mut self.held);
        for queue in activation.queues {
            let of_queue = held.iter().find(|(index, _)| *index == queue.index);
            let held = of_queue.map(|(_, heads)| heads.clone()).unwrap_or_default();
            let name = format!("blk-queue{}", queue.index);
            let counts = self.counts.as_ref().map(|counts| counts.queue(queue.index));
            let io = self.volume.queue(queue.queue.size()).map_err(ActivateError::io("make an I/O queue"))?;
            let started = QueueWorker::start(
                name,
                QueueLeft { ring: queue, held },
                io,
                worker::Rules {
                    volume: self.volume.clone(),
                    serial: self.serial,
                    write_through,
                    limiter: self.limiter.clone(),
                    notices: self.notices.clone(),
                    trouble: self.trouble.clone(),
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
        self.held.clear();
    }

    fn suspend(&mut self) -> Result<Vec<ActiveQueue>, SuspendError> {
        *self.bell.lock() = None;
        let left = finish_all(&mut self.workers)?;
        self.held.extend(left.iter().map(|left| (left.ring.index, left.held.clone())));
        self.held.retain(|(_, heads)| !heads.is_empty());
        Ok(left.into_iter().map(|left| left.ring).collect())
    }

    fn save(&self) -> DeviceState {
        let mut bytes = self.told_bytes.get().to_le_bytes().to_vec();
        for (queue, heads) in &self.held {
            for head in heads {
                bytes.extend(queue.to_le_bytes());
                bytes.extend(head.to_le_bytes());
            }
        }
        DeviceState::new(if self.held.is_empty() { STATE_VERSION } else { STATE_WITH_HELD }, bytes)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        if state.version == STATE_WITH_HELD {
            return self.restore_with_held(&state.bytes);
        }
        if let Some(bytes) = state.fixed(STATE_VERSION)? {
            self.told_bytes.set(u64::from_le_bytes(bytes));
        }
        Ok(())
    }
}

impl Blk {
    fn restore_with_held(&mut self, bytes: &[u8]) -> Result<(), RestoreError> {
        let malformed = |what: &str| RestoreError::Malformed { what: what.to_owned() };
        let (told, held) = bytes.split_first_chunk().ok_or_else(|| malformed("a disk's size is cut"))?;
        let (held, rest) = held.as_chunks::<HELD_BYTES>();
        let queues = self.queue_sizes.len();
        if held.is_empty() || !rest.is_empty() || held.len() > queues.saturating_mul(usize::from(QUEUE_SIZE))
        {
            return Err(malformed("the number of held requests cannot be"));
        }
        let mut by_queue: Vec<(u16, Vec<u16>)> = Vec::new();
        for [q0, q1, h0, h1] in held {
            let (queue, head) = (u16::from_le_bytes([*q0, *q1]), u16::from_le_bytes([*h0, *h1]));
            match by_queue.iter_mut().find(|(index, _)| *index == queue) {
                Some((_, heads)) if heads.contains(&head) => {
                    return Err(malformed("a request is held twice"));
                }
                Some((_, heads)) => heads.push(head),
                None if usize::from(queue) < queues => by_queue.push((queue, vec![head])),
                None => return Err(malformed("a request is held in a queue that there is not")),
            }
        }
        self.told_bytes.set(u64::from_le_bytes(*told));
        self.held = by_queue;
        Ok(())
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        self.reset();
    }
}
