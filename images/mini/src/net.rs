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
/// Length of `virtio_net_hdr` with VERSION_1.
pub const HEADER: u64 = 12;
/// Room for a packet of an ordinary size.
const BUFFER_BYTES: u64 = 2048;

/// A live card.
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
        let mut mac = [2, 0x5e, 0x10, 0, 0, 1];
        if features & F_MAC != 0 {
            mac = core::array::from_fn(|at| device.config8(at as u64));
        }
        let receive = device.queue(0, queue_size, NO_VECTOR)?;
        let transmit = device.queue(1, queue_size, NO_VECTOR)?;
        device.driver_ok();
        let buffers = alloc::vec![None; usize::from(receive.size)];
        let mut nic = Self { device, features, receive, transmit, mac, buffers };
        for _ in 0..nic.receive.size {
            nic.post(Dma::new(BUFFER_BYTES));
        }
        nic.receive.kick();
        Ok(nic)
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
