//! The driver's half of a virtio-serial port (virtio 1.2 §5.3, VIRTIO_CONSOLE_F_MULTIPORT), by polling.

use crate::mem::Dma;
use crate::suite::{Failure, Machine};
use crate::virtio::{NO_VECTOR, Queue, Result, Segment, Virtio};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

const MULTIPORT: u64 = 1 << 1;
/// Control events (§5.3.6.2).
const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;
const BUFFER: u64 = 4096;

/// An open port.
pub struct Port {
    /// The device.
    pub device: Virtio,
    id: u32,
    control_out: Queue,
    message: Dma,
    rx: Queue,
    rx_buffer: Dma,
    tx: Queue,
    tx_buffer: Dma,
}

impl Port {
    /// Finds the port with this name, as a driver would: asks the device for its ports, and opens it.
    pub fn open(machine: &mut Machine, name: &str) -> core::result::Result<Self, Failure> {
        for function in machine.bus()?.virtio(3) {
            let device = Virtio::open(function)?;
            if device.negotiate(MULTIPORT)? & MULTIPORT != 0 {
                return Ok(Self::of(device, name)?);
            }
            device.reset()?;
        }
        Err(Failure::Skipped("no virtio-serial with ports".into()))
    }

    /// The port with this name, of this device.
    pub fn on(device: Virtio, name: &str) -> Result<Self> {
        device.negotiate(MULTIPORT)?;
        Self::of(device, name)
    }

    fn of(device: Virtio, name: &str) -> Result<Self> {
        let ports = device.config32(4);
        let wanted = u16::try_from((ports + 1) * 2).map_err(|_| format!("{ports} ports"))?;
        if ports < 2 || device.num_queues() != wanted {
            return Err(format!("{ports} ports, {} queues", device.num_queues()));
        }
        let mut control_in = device.queue(2, 8, NO_VECTOR)?;
        let mut control_out = device.queue(3, 8, NO_VECTOR)?;
        let (rx, tx) = (device.queue(4, 8, NO_VECTOR)?, device.queue(5, 8, NO_VECTOR)?);
        device.driver_ok();
        let (message, told) = (Dma::new(8), Dma::new(64));
        let mut next = |event: u16| -> Result<(u32, u32)> {
            told.fill(0xcc);
            let len = control_in.request(&[Segment::into(told)])?;
            if len < 8 || told.get16(4) != event || told.get16(6) != 1 {
                return Err(format!("{len} bytes, event {} value {}", told.get16(4), told.get16(6)));
            }
            Ok((told.get32(0), len))
        };
        tell(&mut control_out, message, u32::MAX, DEVICE_READY, 1)?;
        let (id, _) = next(DEVICE_ADD)?;
        tell(&mut control_out, message, id, PORT_READY, 1)?;
        let (named, len) = next(PORT_NAME)?;
        let found: Vec<u8> = (8..u64::from(len)).map(|at| told.get8(at)).collect();
        let found = String::from_utf8_lossy(&found).into_owned();
        if named != id || found.trim_end_matches('\0') != name {
            return Err(format!("port {named} is named {found:?}"));
        }
        next(PORT_OPEN)?;
        tell(&mut control_out, message, id, PORT_OPEN, 1)?;
        let (rx_buffer, tx_buffer) = (Dma::new(BUFFER), Dma::new(BUFFER));
        let mut port = Self { device, id, control_out, message, rx, rx_buffer, tx, tx_buffer };
        port.post()?;
        Ok(port)
    }

    fn post(&mut self) -> Result<()> {
        self.rx.add(&[Segment::into(self.rx_buffer)]).ok_or("the queue is full")?;
        self.rx.kick();
        Ok(())
    }

    /// Says whether a program has the port open.
    pub fn set_open(&mut self, open: bool) -> Result<()> {
        tell(&mut self.control_out, self.message, self.id, PORT_OPEN, u16::from(open))
    }

    /// What has arrived, if something has; appended to `into`.
    pub fn poll(&mut self, into: &mut Vec<u8>) -> Result<bool> {
        let Some((_, len)) = self.rx.take() else { return Ok(false) };
        into.extend((0..u64::from(len)).map(|at| self.rx_buffer.get8(at)));
        self.post()?;
        Ok(true)
    }

    /// Sends bytes, at most a buffer; returns when the device has taken them.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.tx_buffer.copy_in(0, bytes);
        self.tx.request(&[Segment::out(self.tx_buffer.part(0, bytes.len() as u64))]).map(|_| ())
    }
}

fn tell(queue: &mut Queue, message: Dma, id: u32, event: u16, value: u16) -> Result<()> {
    message.set32(0, id);
    message.set16(4, event);
    message.set16(6, value);
    queue.request(&[Segment::out(message)]).map(|_| ())
}
