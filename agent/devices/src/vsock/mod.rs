//! virtio-vsock (virtio 1.2 §5.10): stream connections between the guest and Unix sockets of the host.
//!
//! ```text
//!   host → guest   connect to the one listening socket, write `CONNECT PORT\n`, read `OK HOSTPORT\n`
//!   guest → host   connect to CID 2, port N: goes to the listening socket PATH_N (or to what the broker hands over)
//! ```
//!
//! - Needs no support of the host's kernel, and addresses need not be unique on a host.
//! - One thread. Credits are enforced both ways, each connection has its own bounded buffer, and nobody waits behind
//!   another connection.
//! - A reset of the device closes all connections; a suspension keeps them. A restored guest is told that its
//!   connections are gone.

mod connection;
mod greeting;
mod host;
#[cfg(any(test, feature = "testing"))]
pub(crate) mod hostile;
mod muxer;
mod packet;
mod worker;

#[cfg(test)]
mod guest;
#[cfg(test)]
mod vsock_test;

use std::sync::{Arc, Mutex};

use serio_sandbox::Kind;
use serio_virtio::{
    ActivateError, Activation, ActiveQueue, DeviceState, RestoreError, SuspendError, VirtioDevice,
};

pub use host::{Outgoing, VsockHost};

use crate::worker::{Poller, Worker, finish_all, join_all};
use muxer::Muxer;
use worker::{Engine, Rings, Shared, lock, watch};

const RX: u16 = 0;
const TX: u16 = 1;
const EVENT: u16 = 2;
const QUEUE_SIZES: &[u16] = &[256, 256, 16];
/// `VIRTIO_VSOCK_F_STREAM`.
const F_STREAM: u64 = 1;

/// The device.
pub struct Vsock {
    host: VsockHost,
    shared: Arc<Mutex<Shared>>,
    workers: Vec<Worker<Rings>>,
}

impl Vsock {
    /// A device over `host`, which the device of the next boot may share.
    #[must_use]
    pub fn new(host: VsockHost) -> Vsock {
        let shared = Shared { muxer: Muxer::new(host.guest_cid()), announce_reset: false };
        Vsock { host, shared: Arc::new(Mutex::new(shared)), workers: Vec::new() }
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u16 {
        19
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, out: &mut [u8]) {
        let cid = u64::from(self.host.guest_cid()).to_le_bytes();
        for (at, byte) in (offset..).zip(out) {
            *byte = usize::try_from(at).ok().and_then(|at| cid.get(at)).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let rings = Rings {
            rx: activation.take_queue(RX)?,
            tx: activation.take_queue(TX)?,
            event: activation.take_queue(EVENT)?,
        };
        let poller = Poller::new().map_err(ActivateError::io("make an epoll"))?;
        watch(&poller, &rings, &self.host)?;
        let engine = Engine::new(rings, self.host.clone(), self.shared.clone());
        let failure = activation.failure;
        let worker = Worker::spawn(Kind::Device, "vsock".to_owned(), poller, move |poller| {
            engine.run(&poller, &failure)
        })?;
        self.workers.push(worker);
        Ok(())
    }

    fn reset(&mut self) {
        join_all(&mut self.workers);
        let mut shared = lock(&self.shared);
        shared.muxer = Muxer::new(self.host.guest_cid());
        shared.announce_reset = false;
    }

    fn suspend(&mut self) -> Result<Vec<ActiveQueue>, SuspendError> {
        let left = finish_all(&mut self.workers)?;
        Ok(left.into_iter().flat_map(|rings| [rings.rx, rings.tx, rings.event]).collect())
    }

    /// Connections belong to sockets of the process that had them: the guest is told that they are gone.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        state.refuse_unless_empty()?;
        lock(&self.shared).announce_reset = true;
        Ok(())
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.reset();
    }
}
