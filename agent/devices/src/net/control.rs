//! The control queue (virtio 1.3 §5.1.6.5), which has one command here: how many queue pairs the driver uses.
//!
//! ```text
//!   class, command, virtqueue_pairs (le16) │ ack       MQ (4), VQ_PAIRS_SET (0)
//! ```
//!
//! Anything else is answered with an error; a chain without room for an answer breaks the device, as a ring that makes no sense does.
//! The first pair's thread serves it. A change takes a lock of the host's whole network configuration, and makes the other
//! processors of the host take note: so a guest may have few of them a second ([`LIMITS`]), and further commands wait in the ring.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use serio_hv::GuestMemory;
use serio_virtio::{ActiveQueue, Chain};
use vm_memory::Bytes;

use super::Link;
use super::worker::Broken;
use crate::limit::{Gate, Limits, Rate};

const CLASS_MQ: u8 = 4;
const VQ_PAIRS_SET: u8 = 0;
const OK: u8 = 0;
const ERR: u8 = 1;

/// Changes. A driver needs one when it starts, and one whenever an administrator of the guest wishes.
pub const LIMITS: Limits =
    Limits { bytes: Rate { per_second: 0, burst: 0 }, operations: Rate { per_second: 10, burst: 20 } };

/// The cables of a card, one for each queue pair, and how many the driver uses: the first ones.
pub(super) struct Pairs {
    links: Vec<Arc<dyn Link>>,
    active: AtomicU16,
}

impl Pairs {
    /// Until the driver says otherwise one pair is in use (§5.1.6.5.5).
    pub(super) fn new(links: Vec<Arc<dyn Link>>) -> Pairs {
        Pairs { links, active: AtomicU16::new(1) }
    }

    pub(super) fn links(&self) -> &[Arc<dyn Link>] {
        &self.links
    }

    /// How many there are: `max_virtqueue_pairs`.
    pub(super) fn count(&self) -> u16 {
        u16::try_from(self.links.len()).unwrap_or(u16::MAX)
    }

    pub(super) fn active(&self) -> u16 {
        self.active.load(Ordering::Acquire)
    }

    /// What is in use from the next start on, without a word to the host.
    pub(super) fn set_active(&self, pairs: u16) {
        self.active.store(pairs, Ordering::Release);
    }

    /// Has the host deliver to the first `pairs` only. In an order in which its numbers of the queues stay ours: a detached one
    /// gives its number to the last.
    pub(super) fn steer(&self, pairs: u16) -> std::io::Result<()> {
        let (used, unused) = self.links.split_at(usize::from(pairs).min(self.links.len()));
        // A card of one pair has nothing to steer, and its tap perhaps no way to.
        if self.links.len() > 1 {
            unused.iter().rev().try_for_each(|link| link.set_attached(false))?;
            used.iter().try_for_each(|link| link.set_attached(true))?;
        }
        self.set_active(pairs);
        Ok(())
    }
}

/// The queue and what it acts on.
pub(super) struct Control {
    ring: ActiveQueue,
    memory: GuestMemory,
    chain: Chain,
    gate: Gate,
    pairs: Arc<Pairs>,
    /// Pairs whose rings the driver has made.
    usable: u16,
}

impl Control {
    pub(super) fn new(ring: ActiveQueue, gate: Gate, pairs: Arc<Pairs>, usable: u16) -> Control {
        Control { memory: ring.queue.memory().clone(), ring, chain: Chain::default(), gate, pairs, usable }
    }

    /// Answers what is there, as far as the limit lets it.
    pub(super) fn serve(&mut self) -> Result<(), Broken> {
        loop {
            let mut answered = false;
            while self.gate.is_open() && self.ring.queue.pop(&mut self.chain)? {
                let place = self.chain.take_last_byte().ok_or(Broken::Control)?;
                let ack = if self.obey() { OK } else { ERR };
                self.memory.write_obj(ack, place).map_err(|_| Broken::Control)?;
                self.ring.queue.push_used(self.chain.head(), 1)?;
                answered = true;
            }
            if answered && self.ring.queue.interrupt_wanted()? {
                self.ring.interrupt.trigger();
            }
            if self.gate.is_closed() || !self.ring.queue.enable_kicks()? {
                return Ok(());
            }
        }
    }

    /// Does what the chain says; `false`: it makes no sense, or the host cannot.
    fn obey(&mut self) -> bool {
        let mut command = [0u8; 4];
        // Neither more nor less (§5.1.6.5.5).
        if self.chain.readable_len() != command.len() as u64 {
            return false;
        }
        if self.chain.take_header(&self.memory, &mut command).is_none() {
            return false;
        }
        let [CLASS_MQ, VQ_PAIRS_SET, low, high] = command else { return false };
        let pairs = u16::from_le_bytes([low, high]);
        if !(1..=self.usable).contains(&pairs) {
            return false;
        }
        if pairs != self.pairs.active() {
            self.gate.charge(0);
        }
        self.pairs.steer(pairs).is_ok()
    }

    /// The queue, for whoever goes on with it.
    pub(super) fn into_ring(self) -> ActiveQueue {
        self.ring
    }
}
