//! The port's thread: four rings, and the buffers of the host's end.
//!
//! A chain that the guest sends is carried in pieces as the host's end has room; meanwhile it is kept, and the ring
//! waits behind it. A chain that makes no sense breaks the ring: DEVICE_NEEDS_RESET, and nothing is touched any more.

use serio_hv::GuestRam;
use serio_sandbox::Kind;
use serio_virtio::{ActivateError, ActiveQueue, Chain, DeviceFailure, QueueError};
use vm_memory::{Bytes, GuestAddress};

use super::control::{Control, Heard, MESSAGE_BYTES};
use super::host::DeviceEnd;
use crate::worker::{Poller, STOP, Worker};

/// Bytes that are copied at a time.
const PIECE_BYTES: usize = 4096;
/// Which of the watched descriptors it is does not matter: each turn looks at all of them.
const ANY: u64 = 0;

/// The rings in use.
pub(super) struct Queues {
    pub(super) control_in: ActiveQueue,
    pub(super) control_out: ActiveQueue,
    pub(super) rx: ActiveQueue,
    pub(super) tx: ActiveQueue,
}

/// What outlives a suspension.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Carry {
    /// What is still to be said to the driver.
    pub(super) control: Control,
    /// How many bytes of the chain on its way to the host have arrived.
    pub(super) sent: u64,
}

/// What a worker leaves.
pub(super) struct Left {
    pub(super) queues: [ActiveQueue; 4],
    pub(super) carry: Carry,
}

pub(super) struct PortWorker {
    name: &'static str,
    queues: Queues,
    host: DeviceEnd,
    carry: Carry,
    chain: Chain,
    /// The chain on its way to the host.
    outgoing: Option<Chain>,
    piece: Vec<u8>,
}

/// The driver broke a ring, or gave buffers that are no memory.
struct Broken;

impl From<QueueError> for Broken {
    fn from(_: QueueError) -> Self {
        Broken
    }
}

impl From<vm_memory::GuestMemoryError> for Broken {
    fn from(_: vm_memory::GuestMemoryError) -> Self {
        Broken
    }
}

impl PortWorker {
    /// Starts the thread.
    pub(super) fn start(
        name: &'static str,
        queues: Queues,
        host: DeviceEnd,
        carry: Carry,
        failure: DeviceFailure,
    ) -> Result<Worker<Left>, ActivateError> {
        let poller = Poller::new().map_err(ActivateError::io("make an epoll"))?;
        for queue in [&queues.control_in, &queues.control_out, &queues.rx, &queues.tx] {
            poller.add_event(&queue.kick, ANY).map_err(ActivateError::io("watch a queue"))?;
        }
        poller.add_event(host.bell(), ANY).map_err(ActivateError::io("watch a port's host"))?;
        let worker = PortWorker {
            name,
            queues,
            host,
            carry,
            chain: Chain::default(),
            outgoing: None,
            piece: vec![0; PIECE_BYTES],
        };
        Worker::spawn(Kind::Ports, "ports".to_owned(), poller, move |poller| worker.run(&poller, &failure))
    }

    fn run(mut self, poller: &Poller, failure: &DeviceFailure) -> Left {
        let mut stop = false;
        while !stop {
            if !failure.is_marked() && self.turn().is_err() {
                failure.mark();
                self.host.set_open(false);
            }
            if poller.wait(|token, _| stop |= token == STOP).is_err() {
                failure.mark();
                break;
            }
        }
        let Queues { control_in, control_out, rx, mut tx } = self.queues;
        // What the host has had of it stands in `carry`.
        tx.queue.put_back(u16::from(self.outgoing.is_some()));
        Left { queues: [control_in, control_out, rx, tx], carry: self.carry }
    }

    /// Does all that can be done now, and asks for the kicks that it waits for.
    fn turn(&mut self) -> Result<(), Broken> {
        self.hear()?;
        self.say()?;
        self.carry_out()?;
        self.carry_in()
    }

    /// What the driver says on the control queue.
    fn hear(&mut self) -> Result<(), Broken> {
        let queue = &mut self.queues.control_out;
        let mut used = false;
        loop {
            while queue.queue.pop(&mut self.chain)? {
                let mut message = [0; MESSAGE_BYTES];
                if self.chain.take_header(queue.queue.memory(), &mut message).is_some() {
                    match self.carry.control.hear(message) {
                        Heard::Nothing => {}
                        Heard::Opened => self.host.set_open(true),
                        Heard::Closed => self.host.set_open(false),
                    }
                }
                queue.queue.push_used(self.chain.head(), 0)?;
                used = true;
            }
            if !queue.queue.enable_kicks()? {
                return signal(queue, used);
            }
        }
    }

    /// What is to be said to the driver.
    fn say(&mut self) -> Result<(), Broken> {
        let queue = &mut self.queues.control_in;
        let mut used = false;
        while self.carry.control.has_some() {
            if !queue.queue.pop(&mut self.chain)? {
                if queue.queue.enable_kicks()? {
                    continue;
                }
                break;
            }
            let Some(message) = self.carry.control.next(self.name) else { break };
            let written = write_chain(queue.queue.memory(), &self.chain, &message)?;
            queue.queue.push_used(self.chain.head(), written)?;
            used = true;
        }
        signal(queue, used)
    }

    /// From the host to the guest.
    fn carry_in(&mut self) -> Result<(), Broken> {
        let queue = &mut self.queues.rx;
        let mut used = false;
        while self.host.has_some() {
            if !queue.queue.pop(&mut self.chain)? {
                if queue.queue.enable_kicks()? {
                    continue;
                }
                break;
            }
            let room = usize::try_from(self.chain.writable_len()).unwrap_or(usize::MAX).min(PIECE_BYTES);
            let count = self.host.take(self.piece.get_mut(..room).ok_or(Broken)?);
            let bytes = self.piece.get(..count).ok_or(Broken)?;
            let written = write_chain(queue.queue.memory(), &self.chain, bytes)?;
            queue.queue.push_used(self.chain.head(), written)?;
            used = true;
        }
        signal(queue, used)
    }

    /// From the guest to the host.
    fn carry_out(&mut self) -> Result<(), Broken> {
        let mut used = false;
        loop {
            let mut chain = match self.outgoing.take() {
                Some(chain) => chain,
                None => {
                    let mut chain = std::mem::take(&mut self.chain);
                    if !self.queues.tx.queue.pop(&mut chain)? {
                        self.chain = chain;
                        if self.queues.tx.queue.enable_kicks()? {
                            continue;
                        }
                        break;
                    }
                    chain
                }
            };
            if self.send(&mut chain)? {
                self.carry.sent = 0;
                self.queues.tx.queue.push_used(chain.head(), 0)?;
                used = true;
                self.chain = chain;
            } else {
                // The host's end rings when it has room.
                self.outgoing = Some(chain);
                break;
            }
        }
        signal(&mut self.queues.tx, used)
    }

    /// Carries one chain on from byte `carry.sent`. `true`: all of it has gone, or nobody wants it.
    fn send(&mut self, chain: &mut Chain) -> Result<bool, Broken> {
        loop {
            let Some(room) = self.host.room() else { return Ok(true) };
            let Some((address, len)) = at(chain, self.carry.sent)? else { return Ok(true) };
            if room == 0 {
                return Ok(false);
            }
            let count = room.min(PIECE_BYTES).min(usize::try_from(len).unwrap_or(PIECE_BYTES));
            let piece = self.piece.get_mut(..count).ok_or(Broken)?;
            self.queues.tx.queue.memory().read_slice(piece, address)?;
            self.host.offer(piece);
            self.carry.sent = self.carry.sent.saturating_add(count as u64);
        }
    }
}

/// Where byte `offset` of the chain's readable part lies, and how many follow in its segment.
fn at(chain: &Chain, mut offset: u64) -> Result<Option<(GuestAddress, u64)>, Broken> {
    for segment in chain.readable() {
        match u64::from(segment.len).checked_sub(offset) {
            None => offset = offset.saturating_sub(u64::from(segment.len)),
            Some(0) => offset = 0,
            Some(left) => {
                let address = segment.address.0.checked_add(offset).ok_or(Broken)?;
                return Ok(Some((GuestAddress(address), left)));
            }
        }
    }
    Ok(None)
}

/// Writes bytes into the chain's writable part as far as they fit; how many.
fn write_chain(memory: &GuestRam, chain: &Chain, bytes: &[u8]) -> Result<u32, Broken> {
    let mut rest = bytes;
    let mut written = 0u32;
    for segment in chain.writable() {
        let count = rest.len().min(usize::try_from(segment.len).unwrap_or(usize::MAX));
        let Some((part, left)) = rest.split_at_checked(count) else { break };
        memory.write_slice(part, segment.address)?;
        written = written.saturating_add(u32::try_from(count).unwrap_or(0));
        rest = left;
    }
    Ok(written)
}

fn signal(queue: &mut ActiveQueue, used: bool) -> Result<(), Broken> {
    if used && queue.queue.interrupt_wanted()? {
        queue.interrupt.trigger();
    }
    Ok(())
}
