//! virtio-rng (virtio 1.2 §5.4): the host kernel's randomness for the guest.
//!
//! A request gets at most [`REQUEST_BYTES_MAX`] bytes, and the used length says how many: a driver asks again.
//! A second's bytes are bounded ([`LIMITS`] unless another limiter is given): making them costs the host's processor, not
//! the guest's. What is beyond waits in the ring. One thread, asleep until a kick or until the limit lets it go on.

use std::sync::Arc;

use rustix::rand::GetRandomFlags;
use serio_sandbox::Kind;
use serio_virtio::{
    ActivateError, Activation, ActiveQueue, Chain, DeviceFailure, QueueError, SuspendError, VirtioDevice,
};
use vm_memory::Bytes;

use crate::limit::{Gate, Limiter, Limits, Rate};
use crate::worker::{Poller, STOP, Worker, finish_all, join_all};

/// Bytes that one request gets at most.
pub const REQUEST_BYTES_MAX: usize = 4096;
const QUEUE_SIZES: &[u16] = &[64];
const KICK: u64 = 0;
/// The limit lets requests through again.
const LIMIT: u64 = 1;

/// What a guest gets unless told otherwise: far more than its own generator ever asks for.
pub const LIMITS: Limits = Limits {
    bytes: Rate { per_second: 1 << 20, burst: 256 << 10 },
    operations: Rate { per_second: 0, burst: 0 },
};

/// The entropy device.
pub struct Rng {
    limiter: Arc<Limiter>,
    workers: Vec<Worker<ActiveQueue>>,
}

impl Rng {
    /// A device with this limit, kept outside so that a reset does not fill the bucket again.
    #[must_use]
    pub fn new(limiter: Arc<Limiter>) -> Self {
        Self { limiter, workers: Vec::new() }
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u16 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, out: &mut [u8]) {
        out.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let ring = activation.take_queue(0)?;
        let poller = Poller::new().map_err(ActivateError::io("make an epoll"))?;
        poller.add_event(&ring.kick, KICK).map_err(ActivateError::io("watch a queue"))?;
        let gate = Gate::new(self.limiter.clone(), &poller, LIMIT)?;
        let failure = activation.failure;
        let worker = Worker::spawn(Kind::Device, "rng".to_owned(), poller, move |poller| {
            run(&poller, ring, gate, &failure)
        })?;
        self.workers.push(worker);
        Ok(())
    }

    fn reset(&mut self) {
        join_all(&mut self.workers);
    }

    fn suspend(&mut self) -> Result<Vec<ActiveQueue>, SuspendError> {
        finish_all(&mut self.workers)
    }
}

impl Drop for Rng {
    fn drop(&mut self) {
        self.reset();
    }
}

/// Each request is answered as it is taken: there is nothing to finish.
fn run(poller: &Poller, mut ring: ActiveQueue, mut gate: Gate, failure: &DeviceFailure) -> ActiveQueue {
    let mut chain = Chain::default();
    let mut bytes = vec![0; REQUEST_BYTES_MAX];
    let mut stop = false;
    while !stop {
        if !failure.is_marked() && serve(&mut ring, &mut gate, &mut chain, &mut bytes).is_err() {
            failure.mark();
        }
        if poller.wait(|token, _| stop |= token == STOP).is_err() {
            failure.mark();
            break;
        }
    }
    ring
}

/// Until the ring is empty or the limit is reached, whose timer then wakes the thread.
fn serve(
    ring: &mut ActiveQueue,
    gate: &mut Gate,
    chain: &mut Chain,
    bytes: &mut [u8],
) -> Result<(), QueueError> {
    loop {
        let mut answered = false;
        while gate.is_open() && ring.queue.pop(chain)? {
            let written = fill(ring, chain, bytes);
            gate.charge(written.into());
            ring.queue.push_used(chain.head(), written)?;
            answered = true;
        }
        if answered && ring.queue.interrupt_wanted()? {
            ring.interrupt.trigger();
        }
        if gate.is_closed() || !ring.queue.enable_kicks()? {
            return Ok(());
        }
    }
}

/// Fills the chain as far as it goes, up to the bound; returns the bytes written.
fn fill(ring: &ActiveQueue, chain: &Chain, bytes: &mut [u8]) -> u32 {
    let len = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX).min(bytes.len());
    let Some(bytes) = bytes.get_mut(..len) else { return 0 };
    // The system call itself: a library that looks for it first may open /dev/random, which a sealed process must not.
    let bytes = match rustix::rand::getrandom(&mut *bytes, GetRandomFlags::empty()) {
        Ok(filled) => bytes.get(..filled).unwrap_or_default(),
        Err(_) => return 0,
    };
    let mut rest: &[u8] = bytes;
    let mut written = 0u32;
    for segment in chain.writable() {
        let n = rest.len().min(usize::try_from(segment.len).unwrap_or(usize::MAX));
        let Some((part, left)) = rest.split_at_checked(n) else { break };
        if ring.queue.memory().write_slice(part, segment.address).is_err() {
            break;
        }
        written = written.saturating_add(u32::try_from(n).unwrap_or(0));
        rest = left;
    }
    written
}

/// For fuzzers: serves a ring made of these bytes.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn requests(data: &[u8]) {
    let (_rig, activation) = serio_virtio::hostile::rings(data, 1, 0);
    let poller = Poller::new().expect("an epoll");
    let mut gate = Gate::new(Limiter::new(LIMITS), &poller, LIMIT).expect("a timer");
    for mut ring in activation.queues {
        let _ = serve(&mut ring, &mut gate, &mut Chain::default(), &mut vec![0; REQUEST_BYTES_MAX]);
    }
}
