//! The driver's half of virtio-blk (virtio 1.2 §5.2), for cases and measurements.

use crate::mem::Dma;
use crate::pci::Function;
use crate::virtio::{NO_VECTOR, Queue, Result, Segment, Virtio};
use alloc::format;
use alloc::vec::Vec;

/// Feature bits.
pub mod feature {
    /// The disk cannot be written.
    pub const READ_ONLY: u64 = 1 << 5;
    /// Flush is offered.
    pub const FLUSH: u64 = 1 << 9;
    /// More than one queue.
    pub const MULTI_QUEUE: u64 = 1 << 12;
    /// Discard is offered.
    pub const DISCARD: u64 = 1 << 13;
    /// Write-zeroes is offered.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Request types.
pub mod kind {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Flush.
    pub const FLUSH: u32 = 4;
    /// Serial number.
    pub const GET_ID: u32 = 8;
    /// Discard.
    pub const DISCARD: u32 = 11;
    /// Write zeroes.
    pub const WRITE_ZEROES: u32 = 13;
}

/// Status bytes.
pub const OK: u8 = 0;
/// An error.
pub const IO_ERROR: u8 = 1;
/// An unknown request.
pub const UNSUPPORTED: u8 = 2;

/// A live disk.
pub struct Disk {
    /// The device.
    pub device: Virtio,
    /// Agreed features.
    pub features: u64,
    /// 512-byte sectors.
    pub sectors: u64,
    /// Its queues.
    pub queues: Vec<Queue>,
    header: Dma,
    /// Kept between requests: the heap never takes memory back.
    segments: Vec<Segment>,
}

impl Disk {
    /// Opens the device with all that it offers of the features above.
    pub fn open(function: Function, queue_size: u16) -> Result<Self> {
        let device = Virtio::open(function)?;
        let wanted = feature::READ_ONLY
            | feature::FLUSH
            | feature::MULTI_QUEUE
            | feature::DISCARD
            | feature::WRITE_ZEROES;
        let features = device.negotiate(wanted)?;
        let count = if features & feature::MULTI_QUEUE != 0 { device.config16(34) } else { 1 };
        if count == 0 || count > device.num_queues() {
            return Err(format!("num_queues is {count}, the transport has {}", device.num_queues()));
        }
        let queues =
            (0..count).map(|index| device.queue(index, queue_size, NO_VECTOR)).collect::<Result<_>>()?;
        device.driver_ok();
        let sectors = device.config64(0);
        Ok(Self { device, features, sectors, queues, header: Dma::new(4096), segments: Vec::new() })
    }

    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.features & feature::READ_ONLY != 0
    }

    /// One request through one queue; the answer is the status byte.
    pub fn request(&mut self, queue: usize, kind: u32, sector: u64, data: &[Segment]) -> Result<u8> {
        let (head, status) = (self.header.part(0, 16), self.header.part(16, 1));
        head.set32(0, kind);
        head.set32(4, 0);
        head.set64(8, sector);
        status.set8(0, 0xee);
        self.segments.clear();
        self.segments.push(Segment::out(head));
        self.segments.extend_from_slice(data);
        self.segments.push(Segment::into(status));
        let queue = self.queues.get_mut(queue).ok_or("no such queue")?;
        queue.request(&self.segments)?;
        match status.get8(0) {
            0xee => Err("completed without a status".into()),
            status => Ok(status),
        }
    }

    /// Reads, through queue 0.
    pub fn read(&mut self, sector: u64, into: Dma) -> Result<()> {
        self.expect(kind::IN, sector, &[Segment::into(into)])
    }
    /// Writes, through queue 0.
    pub fn write(&mut self, sector: u64, from: Dma) -> Result<()> {
        self.expect(kind::OUT, sector, &[Segment::out(from)])
    }
    /// Flushes, through queue 0.
    pub fn flush(&mut self) -> Result<()> {
        self.expect(kind::FLUSH, 0, &[])
    }
    /// A request that must succeed.
    pub fn expect(&mut self, kind: u32, sector: u64, data: &[Segment]) -> Result<()> {
        match self.request(0, kind, sector, data)? {
            OK => Ok(()),
            status => Err(format!("request type {kind} at sector {sector}: status {status}")),
        }
    }
}

/// Fills a buffer with what belongs at a sector of a disk: each sector says where it is.
pub fn pattern(into: Dma, disk: u64, sector: u64, seed: u64) {
    for at in (0..into.len).step_by(8) {
        let word = (sector + at / 512) << 20 | disk << 12 | (at % 512);
        into.set64(at, word ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }
}
