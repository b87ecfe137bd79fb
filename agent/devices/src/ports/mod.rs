//! A named virtio-serial port (virtio 1.2 §5.3 with VIRTIO_CONSOLE_F_MULTIPORT): a pipe between a program in the guest,
//! which finds it as /dev/virtio-ports/NAME, and this process.
//!
//! ```text
//!   queues 0, 1   port 0: reserved for a console by custom, there is none      max_nr_ports is 2
//!   queues 2, 3   control: device → driver, driver → device                    control.rs
//!   queues 4, 5   port 1, ours: device → driver, driver → device               worker.rs
//!                                    ▲
//!                               HostPort: two bounded buffers, a lock          host.rs
//! ```
//!
//! - The port is never at its end for the guest: a program that finds the host gone would look for it again and again.
//! - Nobody listens most of the time. What the guest sends then is thrown away unread, so it never waits, and nothing
//!   stale is there when somebody begins to listen. While somebody listens and does not read, the guest's port waits.
//! - Whatever the guest does is bounded: two buffers of [`BUFFER_BYTES_MAX`], one chain, three flags of control state.
//! - One thread, asleep unless there is something to carry.

mod control;
mod host;
mod worker;

#[cfg(test)]
mod ports_test;

use serio_virtio::{ActivateError, Activation, VirtioDevice};

pub use self::host::{BUFFER_BYTES_MAX, DeviceEnd, HostPort, PortError, Session};
use self::worker::PortWorker;
use crate::worker::{Worker, join_all};

/// The name by which a guest's QEMU guest agent looks for its port.
pub const GUEST_AGENT: &str = "org.qemu.guest_agent.0";

const F_MULTIPORT: u32 = 1;
/// Port 0 and ours.
const PORTS: u32 = 2;
const CONTROL_IN: u16 = 2;
const CONTROL_OUT: u16 = 3;
const RX: u16 = 4;
const TX: u16 = 5;
const QUEUE_SIZES: &[u16] = &[16, 16, 32, 32, 64, 64];
/// `max_nr_ports` in `struct virtio_console_config`.
const CONFIG_PORTS: usize = 4;

/// The device: one port with a name.
pub struct Ports {
    name: &'static str,
    host: HostPort,
    workers: Vec<Worker>,
}

impl Ports {
    /// A port that the guest finds by `name`. `host` stays the same over resets.
    #[must_use]
    pub fn new(name: &'static str, host: HostPort) -> Self {
        Self { name, host, workers: Vec::new() }
    }
}

impl VirtioDevice for Ports {
    fn device_id(&self) -> u16 {
        3
    }

    fn features(&self) -> u64 {
        1 << F_MULTIPORT
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, out: &mut [u8]) {
        let mut image = [0; 12];
        for (byte, value) in image.iter_mut().skip(CONFIG_PORTS).zip(PORTS.to_le_bytes()) {
            *byte = value;
        }
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        out.fill(0);
        for (byte, value) in out.iter_mut().zip(image.iter().skip(skip)) {
            *byte = *value;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        if !activation.has_feature(F_MULTIPORT) {
            // Such a driver knows port 0 only, where nobody is.
            return Ok(());
        }
        let queues = worker::Queues {
            control_in: activation.take_queue(CONTROL_IN)?,
            control_out: activation.take_queue(CONTROL_OUT)?,
            rx: activation.take_queue(RX)?,
            tx: activation.take_queue(TX)?,
        };
        let device = self.host.device();
        self.workers.push(PortWorker::start(self.name, queues, device, activation.failure)?);
        Ok(())
    }

    fn reset(&mut self) {
        join_all(&mut self.workers);
        self.host.device().set_open(false);
    }
}

impl Drop for Ports {
    fn drop(&mut self) {
        self.reset();
    }
}
