//! The driver's half of virtio-net (virtio 1.2 §5.1), by polling: for cases, measurements and modes.

use crate::mem::Dma;
use crate::pci::Function;
use crate::virtio::{NO_VECTOR, Queue, Result, Segment, Virtio};
use alloc::vec::Vec;

const F_MAC: u64 = 1 << 5;
const F_STATUS: u64 = 1 << 16;
/// Checksums that the host completes, and segments that it cuts.
const F_CSUM: u64 = 1;
const F_HOST_TSO4: u64 = 1 << 11;
/// It has a control queue.
pub const F_CTRL_VQ: u64 = 1 << 17;
const F_MQ: u64 = 1 << 22;
/// Length of `virtio_net_hdr` with VERSION_1.
pub const HEADER: u64 = 12;
/// Room for a packet of an ordinary size.
const BUFFER_BYTES: u64 = 2048;

/// A live card, or one queue pair of it.
pub struct Nic {
    /// The device.
    pub device: Virtio,
    /// Packets to us.
    pub receive: Queue,
    /// Packets from us.
    pub transmit: Queue,
    features: u64,
    /// Its address, or one of our own.
    pub mac: [u8; 6],
    /// Buffers of the receive queue by the head of their chain.
    pub buffers: Vec<Option<Dma>>,
}

impl Nic {
    /// Opens the device, with all its receive buffers offered.
    pub fn open(function: Function, queue_size: u16) -> Result<Self> {
        let device = Virtio::open(function)?;
        let features = device.negotiate(F_MAC | F_STATUS | F_CSUM | F_HOST_TSO4)?;
        let mut nic = Self::pair(&device, features, 0, queue_size)?;
        device.driver_ok();
        nic.fill();
        Ok(nic)
    }

    /// Opens all queue pairs of a device that has several, and its control queue behind them. It is not live yet, and no buffers
    /// are offered.
    pub fn open_pairs(function: Function, queue_size: u16) -> Result<Option<(Vec<Self>, Queue)>> {
        let device = Virtio::open(function)?;
        let features = device.negotiate(F_MAC | F_STATUS | F_CTRL_VQ | F_MQ)?;
        if features & F_MQ == 0 {
            return Ok(None);
        }
        let count = device.config16(8);
        let pairs: Result<Vec<Self>> =
            (0..count).map(|pair| Self::pair(&device, features, pair, queue_size)).collect();
        Ok(Some((pairs?, device.queue(2 * count, queue_size, NO_VECTOR)?)))
    }

    fn pair(device: &Virtio, features: u64, pair: u16, queue_size: u16) -> Result<Self> {
        let mut mac = [2, 0x5e, 0x10, 0, 0, 1];
        if features & F_MAC != 0 {
            mac = core::array::from_fn(|at| device.config8(at as u64));
        }
        let receive = device.queue(2 * pair, queue_size, NO_VECTOR)?;
        let transmit = device.queue(2 * pair + 1, queue_size, NO_VECTOR)?;
        let buffers = alloc::vec![None; usize::from(receive.size)];
        Ok(Self { device: device.clone(), features, receive, transmit, mac, buffers })
    }

    /// Offers all receive buffers. The device is live.
    pub fn fill(&mut self) {
        for _ in 0..self.receive.size {
            self.post(Dma::new(BUFFER_BYTES));
        }
        self.receive.kick();
    }

    /// Offers a buffer, without ringing.
    pub fn post(&mut self, buffer: Dma) {
        if let Some(head) = self.receive.add(&[Segment::into(buffer)]) {
            self.buffers[usize::from(head)] = Some(buffer);
        }
    }

    /// Whether the host cuts segments of TCP.
    pub fn segments(&self) -> bool {
        let both = F_CSUM | F_HOST_TSO4;
        self.features & both == both
    }

    /// What the device says of its cable.
    pub fn link_is_up(&self) -> bool {
        self.device.config16(6) & 1 != 0
    }
}
