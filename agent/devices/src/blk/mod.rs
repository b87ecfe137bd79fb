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

mod config;
mod request;
mod worker;

#[cfg(test)]
mod blk_test;

use serio_virtio::{ActivateError, Activation, VirtioDevice};
use serio_volume::Volume;

use self::config::{F_FLUSH, features, render};
use self::worker::QueueWorker;
use crate::worker::{Worker, join_all};

/// Descriptors of a queue: also how many requests can be under way in it.
pub const QUEUE_SIZE: u16 = 256;
/// The most queues of a device.
pub const QUEUES_MAX: u16 = 16;
/// Bytes of the serial number that a guest sees (`VIRTIO_BLK_ID_BYTES`).
pub const SERIAL_BYTES: usize = 20;

/// How a disk appears to the guest.
#[derive(Clone, Debug)]
pub struct BlkConfig {
    /// The serial number; longer ones are cut to [`SERIAL_BYTES`]. Linux shows it below /dev/disk/by-id.
    pub serial: String,
    /// Queues: 1 to [`QUEUES_MAX`], values outside are brought in.
    pub queues: u16,
}

/// A disk.
pub struct Blk {
    volume: Volume,
    serial: [u8; SERIAL_BYTES],
    queue_sizes: Vec<u16>,
    workers: Vec<Worker>,
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
        Self { volume, serial, queue_sizes: vec![QUEUE_SIZE; queues], workers: Vec::new() }
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
        let image = render(self.volume.size_bytes(), self.queue_sizes.len());
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
            let io = self.volume.queue(queue.queue.size()).map_err(ActivateError::io("make an I/O queue"))?;
            let started = QueueWorker::start(
                name,
                queue,
                io,
                worker::Rules {
                    limits: request::Limits::of(&self.volume),
                    serial: self.serial,
                    write_through,
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
        Ok(())
    }

    fn reset(&mut self) {
        join_all(&mut self.workers);
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        self.reset();
    }
}
