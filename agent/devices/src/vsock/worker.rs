//! The thread of a vsock device: sleeps on queues, the listener, the broker and all sockets.
//!
//! Each round takes a bounded number of the guest's packets, then gives the guest's buffers to those that have
//! something to say, then looks at sockets again: neither side starves the other.

use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serio_virtio::{ActivateError, ActiveQueue, Chain, DeviceFailure, QueueError};
use vm_memory::Bytes;
use vmm_sys_util::epoll::EventSet;

use super::connection::NoMemory;
use super::host::{FromBroker, VsockHost};
use super::muxer::{Muxer, TOKEN_BASE, Turn};
use super::packet::{HEADER_BYTES, Header};
use crate::worker::{Poller, STOP};

const RX_KICK: u64 = 0;
const TX_KICK: u64 = 1;
const EVENT_KICK: u64 = 2;
const LISTENER: u64 = 3;
const BROKER: u64 = 4;
const BROKER_CHANGED: u64 = 5;

/// Packets of the guest that are taken in one round.
const ROUND_PACKETS_MAX: usize = 64;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (§5.10.6.7): the guest's connections are gone, its address may be another.
const TRANSPORT_RESET: u32 = 0;

/// The queues, while the device is active.
pub(super) struct Rings {
    pub(super) rx: ActiveQueue,
    pub(super) tx: ActiveQueue,
    pub(super) event: ActiveQueue,
}

/// What outlives the thread over a suspension.
pub(super) struct Shared {
    pub(super) muxer: Muxer,
    /// After a restore the guest is told that its connections are gone.
    pub(super) announce_reset: bool,
}

pub(super) fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The guest broke a ring, or gave buffers that are no memory.
struct Broken;

impl From<QueueError> for Broken {
    fn from(_: QueueError) -> Self {
        Broken
    }
}

impl From<NoMemory> for Broken {
    fn from(_: NoMemory) -> Self {
        Broken
    }
}

pub(super) struct Engine {
    rings: Rings,
    host: VsockHost,
    shared: Arc<Mutex<Shared>>,
    chain: Chain,
}

/// Watches what there always is.
pub(super) fn watch(poller: &Poller, rings: &Rings, host: &VsockHost) -> Result<(), ActivateError> {
    let events = [(&rings.rx.kick, RX_KICK), (&rings.tx.kick, TX_KICK), (&rings.event.kick, EVENT_KICK)];
    for (event, token) in events.into_iter().chain([(host.changed(), BROKER_CHANGED)]) {
        poller.add_event(event, token).map_err(ActivateError::io("watch a queue"))?;
    }
    // At each new client, not as long as one waits: if it cannot be accepted, trying again at once does not help.
    poller
        .add_set(host.listener().as_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER)
        .map_err(ActivateError::io("watch the socket for clients"))
}

impl Engine {
    pub(super) fn new(rings: Rings, host: VsockHost, shared: Arc<Mutex<Shared>>) -> Engine {
        Engine { rings, host, shared, chain: Chain::default() }
    }

    /// Works until told to stop. Each packet is answered as it is taken: there is nothing to finish.
    pub(super) fn run(mut self, poller: &Poller, failure: &DeviceFailure) -> Rings {
        self.watch_broker(poller);
        lock(&self.shared).muxer.watch_all(poller);
        let mut ready = Vec::new();
        let mut stop = false;
        while !stop {
            if !failure.is_marked() && self.work(poller).is_err() {
                failure.mark();
            }
            ready.clear();
            if poller.wait(|token, set| ready.push((token, set))).is_err() {
                failure.mark();
                break;
            }
            for (token, set) in ready.iter().copied() {
                stop |= token == STOP;
                self.reported(poller, token, set);
            }
        }
        self.rings
    }

    fn reported(&mut self, poller: &Poller, token: u64, set: EventSet) {
        match token {
            LISTENER => self.accept(poller),
            BROKER => self.hear_broker(poller),
            BROKER_CHANGED => {
                let _ = self.host.changed().read();
                lock(&self.shared).muxer.broker_gone();
                self.watch_broker(poller);
            }
            STOP => {}
            token => {
                let slot = token.checked_sub(TOKEN_BASE).and_then(|slot| usize::try_from(slot).ok());
                if let Some(slot) = slot {
                    lock(&self.shared).muxer.reported(slot, set);
                }
            }
        }
    }

    fn watch_broker(&self, poller: &Poller) {
        if let Some(broker) = self.host.outgoing().broker() {
            // If it cannot be watched its answers stay unheard, and the guest's own timeout ends the wait.
            let _ = poller.add_set(broker, EventSet::IN | EventSet::EDGE_TRIGGERED, BROKER);
        }
    }

    fn accept(&mut self, poller: &Poller) {
        loop {
            match self.host.listener().accept() {
                Ok((stream, _)) => lock(&self.shared).muxer.accept(poller, stream),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    fn hear_broker(&mut self, poller: &Poller) {
        let outgoing = self.host.outgoing();
        loop {
            match outgoing.answer() {
                FromBroker::Answer(answer) => lock(&self.shared).muxer.brokered(poller, answer),
                FromBroker::Nothing => return,
                FromBroker::Gone => return lock(&self.shared).muxer.broker_gone(),
            }
        }
    }

    fn work(&mut self, poller: &Poller) -> Result<(), Broken> {
        self.announce()?;
        let more = self.take_packets(poller)?;
        self.send_packets()?;
        let stuck = more && !lock(&self.shared).muxer.may_take();
        if more && !stuck {
            // Another round, after a look at the sockets. Fails only when it is rung already.
            let _ = self.rings.tx.kick.write(1);
        }
        Ok(())
    }

    /// Takes packets of the guest. `true`: there may be more.
    fn take_packets(&mut self, poller: &Poller) -> Result<bool, Broken> {
        let mut shared = lock(&self.shared);
        let outgoing = self.host.outgoing();
        let tx = &mut self.rings.tx;
        let mut used = false;
        let mut more = true;
        for _ in 0..ROUND_PACKETS_MAX {
            if !shared.muxer.may_take() {
                break;
            }
            if !tx.queue.pop(&mut self.chain)? {
                if tx.queue.enable_kicks()? {
                    continue;
                }
                more = false;
                break;
            }
            let mut bytes = [0; HEADER_BYTES];
            // A packet without a whole header, or with less payload than it says, has nobody to answer to.
            if self.chain.take_header(tx.queue.memory(), &mut bytes).is_some() {
                let header = Header::parse(&bytes);
                if u64::from(header.len) <= self.chain.readable_len() {
                    let memory = tx.queue.memory().clone();
                    shared.muxer.take(&memory, (&header, self.chain.readable()), &outgoing, poller)?;
                }
            }
            tx.queue.push_used(self.chain.head(), 0)?;
            used = true;
        }
        if used && tx.queue.interrupt_wanted()? {
            tx.interrupt.trigger();
        }
        Ok(more)
    }

    /// Gives the guest's buffers to those that have something to say.
    fn send_packets(&mut self) -> Result<(), Broken> {
        let mut shared = lock(&self.shared);
        let rx = &mut self.rings.rx;
        let mut used = false;
        while shared.muxer.has_something() {
            if !rx.queue.pop(&mut self.chain)? {
                if rx.queue.enable_kicks()? {
                    continue;
                }
                break;
            }
            let memory = rx.queue.memory().clone();
            let written = match shared.muxer.fill(&memory, self.chain.writable())? {
                Turn::Sent(bytes) => bytes,
                Turn::TooSmall => 0,
                Turn::Nothing => {
                    rx.queue.put_back(1);
                    continue;
                }
            };
            rx.queue.push_used(self.chain.head(), written)?;
            used = true;
        }
        if used && rx.queue.interrupt_wanted()? {
            rx.interrupt.trigger();
        }
        Ok(())
    }

    /// Tells a restored guest that its connections are gone, as soon as it has a buffer for that.
    fn announce(&mut self) -> Result<(), Broken> {
        let mut shared = lock(&self.shared);
        if !shared.announce_reset {
            return Ok(());
        }
        let event = &mut self.rings.event;
        while !event.queue.pop(&mut self.chain)? {
            if !event.queue.enable_kicks()? {
                return Ok(());
            }
        }
        let buffer = self.chain.writable().iter().find(|segment| segment.len >= 4);
        if let Some(segment) = buffer {
            let bytes = TRANSPORT_RESET.to_le_bytes();
            event.queue.memory().write_slice(&bytes, segment.address).map_err(|_| Broken)?;
            shared.announce_reset = false;
        }
        let written = if buffer.is_some() { 4 } else { 0 };
        event.queue.push_used(self.chain.head(), written)?;
        if event.queue.interrupt_wanted()? {
            event.interrupt.trigger();
        }
        Ok(())
    }
}
