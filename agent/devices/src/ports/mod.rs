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
#[cfg(any(test, feature = "testing"))]
pub(crate) mod hostile;
mod worker;

#[cfg(test)]
mod ports_test;

use serio_virtio::{
    ActivateError, Activation, ActiveQueue, DeviceState, RestoreError, SuspendError, VirtioDevice,
};

use self::control::Control;
pub use self::host::{BUFFER_BYTES_MAX, DeviceEnd, HostPort, PortError, Session};
use self::worker::{Carry, Left, PortWorker};
use crate::worker::{Worker, finish_all, join_all};

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
    /// What a suspended worker was about to say and to carry.
    carry: Carry,
    workers: Vec<Worker<Left>>,
}

/// The layout of the saved state: flags (bit 0 the port is open; what is still to be said: bit 1 add, bit 2 name,
/// bit 3 open), then how many bytes of the next chain have arrived at the host, eight bytes.
const STATE_VERSION: u32 = 1;
const STATE_BYTES: usize = 9;

impl Ports {
    /// A port that the guest finds by `name`. `host` stays the same over resets.
    #[must_use]
    pub fn new(name: &'static str, host: HostPort) -> Self {
        Self { name, host, carry: Carry::default(), workers: Vec::new() }
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
        let carry = std::mem::take(&mut self.carry);
        self.workers.push(PortWorker::start(self.name, queues, device, carry, activation.failure)?);
        Ok(())
    }

    fn reset(&mut self) {
        join_all(&mut self.workers);
        self.carry = Carry::default();
        self.host.device().set_open(false);
    }

    fn suspend(&mut self) -> Result<Vec<ActiveQueue>, SuspendError> {
        let mut queues = Vec::new();
        for left in finish_all(&mut self.workers)? {
            self.carry = left.carry;
            queues.extend(left.queues);
        }
        Ok(queues)
    }

    fn save(&self) -> DeviceState {
        let mut bytes = [0; STATE_BYTES];
        let flags = u8::from(self.host.is_open()) | self.carry.control.bits() << 1;
        for (byte, value) in bytes.iter_mut().zip([flags].into_iter().chain(self.carry.sent.to_le_bytes())) {
            *byte = value;
        }
        DeviceState::new(STATE_VERSION, bytes)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let Some([flags, sent @ ..]) = state.fixed::<STATE_BYTES>(STATE_VERSION)? else { return Ok(()) };
        self.carry = Carry { control: Control::of_bits(flags >> 1), sent: u64::from_le_bytes(sent) };
        self.host.device().set_open(flags & 1 == 1);
        Ok(())
    }
}

impl Drop for Ports {
    fn drop(&mut self) {
        self.reset();
    }
}
