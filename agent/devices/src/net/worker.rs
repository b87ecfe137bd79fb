//! The thread of a queue pair: both directions, in turns of a bounded number of packets; that of the first pair serves the
//! control queue too.
//!
//! ```text
//!  asleep ── packets, buffers posted, packets offered ──► receive ≤ 64 → one interrupt
//!    ▲                                                    send ≤ 64 → one interrupt
//!    └──────────────── nothing left ◄──────────────────── again
//! ```
//!
//! - The tap is watched for edges: after `EAGAIN` it is left alone until the kernel says it is ready again. While
//!   the guest posts no buffers the tap is not read, and the kernel drops what does not fit its queue.
//! - A packet that the tap refuses is dropped, as a cable would. A full tap keeps it for later.
//! - Each direction has its own limits, which are the card's: all its pairs share them. What they hold back stays in the ring or in the tap, and the thread sleeps on a timer.
//! - A tap that was removed is a cable that was pulled: link down, packets are lost, the VM goes on.
//! - Where the kernel can do all this by itself, it does (`kernel.rs`), and the thread sleeps until something speaks against it.
//! - A broken ring sets DEVICE_NEEDS_RESET; no ring of the card is touched after it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use serio_hv::{GuestMemory, VNET_HEADER_BYTES, is_logged, receive_packet, send_packet};
use serio_sandbox::Kind;
use serio_virtio::{ActivateError, ActiveQueue, Chain, ConfigInterrupt, DeviceFailure, QueueError};

use vmm_sys_util::epoll::EventSet;

use super::Link;
use super::control::{Control, Pairs};
use super::kernel::Handover;
use super::rx::{Posts, Rules};
use crate::count::PairCounts;
use crate::limit::{Gate, Limiter};
use crate::trouble::Raised;
use crate::worker::{Poller, STOP, Worker};
use crate::{Notices, Trouble};

const RX_KICK: u64 = 0;
const TX_KICK: u64 = 1;
const LINK: u64 = 2;
/// The limits let packets through again.
const RX_LIMITS: u64 = 3;
const TX_LIMITS: u64 = 4;
const CONTROL_KICK: u64 = 5;
const CONTROL_LIMITS: u64 = 6;
/// The kernel has found a chain that makes no sense to it.
const KERNEL_ERROR: u64 = 7;
/// The limits are others now.
const CHANGED: u64 = 8;
/// Packets in one direction before the other has its turn.
const BATCH: usize = 64;

/// The driver broke a ring, or gave buffers that are no memory.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("a receive buffer is too short for its header, or outside of guest memory")]
    Buffer,
    #[error("a control command has no room for its answer, or none in guest memory")]
    Control,
    #[error("its events cannot be watched")]
    Poller(#[from] io::Error),
}

pub(super) struct NetWorker {
    link: Arc<dyn Link>,
    memory: GuestMemory,
    rx: ActiveQueue,
    tx: ActiveQueue,
    posts: Posts,
    /// The packet being sent; kept while the tap is full.
    outgoing: Chain,
    outgoing_waits: bool,
    link_readable: bool,
    link_writable: bool,
    /// Something is wrong with the tap or a ring: nothing for the kernel.
    unfit: bool,
    rx_gate: Gate,
    tx_gate: Gate,
    cable: Arc<Cable>,
    counts: Arc<PairCounts>,
    control: Option<Control>,
    /// There may be commands.
    commanded: bool,
    /// Where the kernel could do it.
    handover: Option<Handover>,
}

/// What the threads of a card share.
pub(super) struct Shared {
    pub(super) rx_limiter: Arc<Limiter>,
    pub(super) tx_limiter: Arc<Limiter>,
    /// Of the control queue.
    pub(super) commands: Arc<Limiter>,
    pub(super) cable: Arc<Cable>,
    pub(super) pairs: Arc<Pairs>,
    /// Pairs whose rings the driver has made.
    pub(super) usable: u16,
    pub(super) rules: Rules,
    /// What driver and device agreed on.
    pub(super) features: u64,
    pub(super) failure: DeviceFailure,
}

/// Says when the other end of the cable is gone for good.
pub(super) struct Cable {
    /// What the configuration space shows.
    pub(super) lost: Arc<AtomicBool>,
    pub(super) bell: ConfigInterrupt,
    pub(super) notices: Notices,
    pub(super) trouble: Trouble,
    /// Lasts as long as the card's owner.
    pub(super) raised: Arc<OnceLock<Raised>>,
}

impl Cable {
    /// The tap was removed: the guest sees its link go down, the operator hears why. Once.
    fn lose(&self, error: &io::Error) {
        if !self.lost.swap(true, Ordering::AcqRel) {
            self.bell.trigger();
            let reason = format!("unplugged: its tap is gone ({error}); the guest sees its link as down");
            self.raised.get_or_init(|| self.trouble.raise(reason));
            self.notices.tell(format_args!("its tap is gone ({error}); the guest sees the link as down"));
        }
    }
}

/// Whether a direction could go on at once.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    More,
    Idle,
}

impl NetWorker {
    /// Starts the pair with this number, on the cable with this number.
    pub(super) fn start(
        index: usize,
        [rx, tx]: [ActiveQueue; 2],
        control: Option<ActiveQueue>,
        counts: Arc<PairCounts>,
        shared: &Shared,
    ) -> Result<Worker<Vec<ActiveQueue>>, ActivateError> {
        let link = shared.pairs.links().get(index).cloned();
        let link = link.ok_or_else(|| ActivateError::io("find the cable")(io::ErrorKind::NotFound.into()))?;
        let poller = Poller::new().map_err(ActivateError::io("make an epoll"))?;
        let watched = ActivateError::io("watch a queue");
        poller
            .add_event(&rx.kick, RX_KICK)
            .and_then(|()| poller.add_event(&tx.kick, TX_KICK))
            .map_err(watched)?;
        poller.add_both(link.as_fd(), LINK).map_err(ActivateError::io("watch the tap"))?;
        let control = control
            .map(|ring| {
                poller.add_event(&ring.kick, CONTROL_KICK).map_err(ActivateError::io("watch a queue"))?;
                let gate = Gate::new(shared.commands.clone(), &poller, CONTROL_LIMITS)?;
                Ok(Control::new(ring, gate, shared.pairs.clone(), shared.usable))
            })
            .transpose()?;
        let handover = link.shortcut().map(|shortcut| {
            let limiters = [&*shared.rx_limiter, &*shared.tx_limiter];
            Handover::new(shortcut, shared.features, limiters, (&poller, KERNEL_ERROR, CHANGED))
        });
        let handover = handover.transpose()?.flatten();
        let worker = NetWorker {
            rx_gate: Gate::new(shared.rx_limiter.clone(), &poller, RX_LIMITS)?,
            tx_gate: Gate::new(shared.tx_limiter.clone(), &poller, TX_LIMITS)?,
            cable: shared.cable.clone(),
            counts,
            link,
            memory: rx.queue.memory().clone(),
            rx,
            tx,
            posts: Posts::new(shared.rules),
            outgoing: Chain::default(),
            outgoing_waits: false,
            link_readable: true,
            link_writable: true,
            unfit: false,
            control,
            commanded: true,
            handover,
        };
        let failure = shared.failure.clone();
        let name = format!("net-pair{index}");
        Worker::spawn(Kind::Net, name, poller, move |poller| worker.run(&poller, &failure))
    }

    fn run(mut self, poller: &Poller, failure: &DeviceFailure) -> Vec<ActiveQueue> {
        let mut stop = false;
        while !stop {
            if self.settle(poller, failure).is_err() || (!failure.is_marked() && self.work().is_err()) {
                failure.mark();
            }
            let due = &mut self.handover.as_mut().map(|handover| &mut handover.due);
            let (readable, writable) = (&mut self.link_readable, &mut self.link_writable);
            let (commanded, unfit) = (&mut self.commanded, &mut self.unfit);
            let waited = poller.wait(|token, ready| match token {
                STOP => stop = true,
                LINK => {
                    *unfit |= ready.intersects(EventSet::ERROR | EventSet::HANG_UP);
                    // An error is found out by the next read.
                    *readable |= ready.intersects(EventSet::IN | EventSet::ERROR | EventSet::HANG_UP);
                    *writable |= ready.contains(EventSet::OUT);
                }
                CONTROL_KICK | CONTROL_LIMITS => *commanded = true,
                KERNEL_ERROR => *unfit = true,
                CHANGED => due.iter_mut().for_each(|due| **due = true),
                _ => {}
            });
            if waited.is_err() {
                failure.mark();
                break;
            }
        }
        if self.take_back(poller).is_err() {
            failure.mark();
        }
        // For the next one: buffers that hold no packet, and the packet that the tap did not take.
        self.rx.queue.put_back(self.posts.give_up());
        self.tx.queue.put_back(u16::from(self.outgoing_waits));
        [self.rx, self.tx].into_iter().chain(self.control.map(Control::into_ring)).collect()
    }

    /// Lets the kernel have the rings while nothing needs the packets to pass here.
    fn settle(&mut self, poller: &Poller, failure: &DeviceFailure) -> Result<(), Broken> {
        let Some(handover) = &self.handover else { return Ok(()) };
        let ours = failure.is_marked()
            || self.unfit
            || self.rx_gate.is_limit()
            || self.tx_gate.is_limit()
            || is_logged(&self.memory);
        match handover.is_taken() {
            true if ours => self.take_back(poller),
            false if !ours && handover.due => Ok(self.hand_over(poller)?),
            _ => Ok(()),
        }
    }

    fn hand_over(&mut self, poller: &Poller) -> io::Result<()> {
        let Some(handover) = &mut self.handover else { return Ok(()) };
        self.rx.queue.put_back(self.posts.give_up());
        self.tx.queue.put_back(u16::from(std::mem::take(&mut self.outgoing_waits)));
        if let Err(error) = handover.give(&*self.link, [&self.rx, &self.tx]) {
            self.cable.notices.tell(format_args!(
                "the kernel's vhost-net does not take its packets ({error}): they pass through the VM's own threads"
            ));
        }
        let taken = handover.is_taken();
        self.counts.set_in_kernel(taken);
        if taken { self.listen(poller, false) } else { Ok(()) }
    }

    /// Goes on where the kernel stops, if it has the rings.
    fn take_back(&mut self, poller: &Poller) -> Result<(), Broken> {
        let Some(handover) = self.handover.as_mut().filter(|handover| handover.is_taken()) else {
            return Ok(());
        };
        self.counts.set_in_kernel(false);
        handover.take(&*self.link, [&mut self.rx, &mut self.tx])?;
        (self.link_readable, self.link_writable) = (true, true);
        Ok(self.listen(poller, true)?)
    }

    /// Whether the driver's kicks and the tap's packets wake this thread. The end of the tap always does.
    fn listen(&self, poller: &Poller, on: bool) -> io::Result<()> {
        let edges =
            |set: EventSet| if on { set | EventSet::EDGE_TRIGGERED } else { EventSet::EDGE_TRIGGERED };
        poller.change(self.rx.kick.as_raw_fd(), edges(EventSet::IN), RX_KICK)?;
        poller.change(self.tx.kick.as_raw_fd(), edges(EventSet::IN), TX_KICK)?;
        poller.change(self.link.as_fd().as_raw_fd(), edges(EventSet::IN | EventSet::OUT), LINK)
    }

    /// Both directions in turns, until neither can go on.
    fn work(&mut self) -> Result<(), Broken> {
        if let Some(control) = self.control.as_mut().filter(|_| std::mem::take(&mut self.commanded)) {
            control.serve()?;
        }
        if self.handover.as_ref().is_some_and(Handover::is_taken) {
            return Ok(());
        }
        loop {
            let received = self.receive()?;
            let sent = self.send()?;
            if received == Turn::Idle && sent == Turn::Idle {
                return Ok(());
            }
        }
    }

    fn receive(&mut self) -> Result<Turn, Broken> {
        self.rx.queue.disable_kicks()?;
        let mut reads = 0usize;
        let mut delivered = false;
        while reads < BATCH && self.link_readable && self.rx_gate.is_open() {
            self.posts.collect(&mut self.rx.queue)?;
            if !self.posts.ready(self.rx.queue.size()) {
                // Wait for buffers, not for packets.
                if self.rx.queue.enable_kicks()? {
                    continue;
                }
                break;
            }
            reads = reads.saturating_add(1);
            let (room, room_bytes) = self.posts.room();
            match receive_packet(self.link.as_fd(), &self.memory, room) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.link_readable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_bad_buffer(&error) => return Err(Broken::Buffer),
                // An interface that is down, or an empty read: nothing to be had until the next edge.
                Err(error) => {
                    self.link_readable = false;
                    if error.raw_os_error() == Some(libc::EBADFD) {
                        self.cable.lose(&error);
                    }
                }
                Ok(0) => self.link_readable = false,
                // The guest must not see half a packet. Its buffers are used for the next one.
                Ok(len) if self.posts.perhaps_cut(len, room_bytes) => self.counts.received.drops.add(1),
                Ok(len) => {
                    let bytes = packet_bytes(len as u64);
                    self.rx_gate.charge(bytes);
                    self.counts.received.packets.add(1);
                    self.counts.received.bytes.add(bytes);
                    self.posts.deliver(&self.memory, &mut self.rx.queue, len).ok_or(Broken::Buffer)??;
                    delivered = true;
                }
            }
        }
        if delivered && self.rx.queue.interrupt_wanted()? {
            self.rx.interrupt.trigger();
        }
        Ok(if reads == BATCH { Turn::More } else { Turn::Idle })
    }

    fn send(&mut self) -> Result<Turn, Broken> {
        self.tx.queue.disable_kicks()?;
        let mut sent = 0usize;
        let mut empty = false;
        while sent < BATCH && self.link_writable {
            if !self.outgoing_waits {
                if !self.tx_gate.is_open() {
                    break;
                }
                if !self.tx.queue.pop(&mut self.outgoing)? {
                    empty = true;
                    break;
                }
                self.tx_gate.charge(packet_bytes(self.outgoing.readable_len()));
            }
            match transmit(self.link.as_fd(), &self.memory, &self.outgoing) {
                Fate::Sent => {
                    self.counts.sent.packets.add(1);
                    self.counts.sent.bytes.add(packet_bytes(self.outgoing.readable_len()));
                }
                Fate::Lost => self.counts.sent.drops.add(1),
                Fate::Waits => {
                    self.outgoing_waits = true;
                    self.link_writable = false;
                    break;
                }
            }
            self.outgoing_waits = false;
            self.tx.queue.push_used(self.outgoing.head(), 0)?;
            sent = sent.saturating_add(1);
        }
        if sent > 0 && self.tx.queue.interrupt_wanted()? {
            self.tx.interrupt.trigger();
        }
        let more = if empty {
            self.tx.queue.enable_kicks()?
        } else {
            self.link_writable && !self.tx_gate.is_closed()
        };
        Ok(if more { Turn::More } else { Turn::Idle })
    }
}

/// What counts of a packet: all behind its header.
fn packet_bytes(len: u64) -> u64 {
    len.saturating_sub(VNET_HEADER_BYTES as u64)
}

/// What became of a packet.
enum Fate {
    Sent,
    /// The tap is full.
    Waits,
    Lost,
}

/// Sends one packet. What goes wrong, but for a full tap, loses the packet, as a cable would.
fn transmit(link: BorrowedFd<'_>, memory: &GuestMemory, packet: &Chain) -> Fate {
    loop {
        let segments = packet.readable().iter();
        let ranges =
            segments.filter_map(|segment| Some((segment.address, usize::try_from(segment.len).ok()?)));
        match send_packet(link, memory, ranges) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Fate::Waits,
            Err(_) => return Fate::Lost,
            Ok(_) => return Fate::Sent,
        }
    }
}

/// `EFAULT`: no guest memory. `EINVAL` by us: more pieces than a packet may have.
fn is_bad_buffer(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::InvalidInput || error.raw_os_error() == Some(libc::EFAULT)
}
