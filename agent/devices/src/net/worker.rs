//! The thread of a network card: both directions, in turns of a bounded number of packets.
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
//! - A broken ring sets DEVICE_NEEDS_RESET; neither ring is touched after it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use serio_hv::{GuestMemory, receive_packet, send_packet};
use serio_sandbox::Kind;
use serio_virtio::{ActivateError, ActiveQueue, Chain, DeviceFailure, QueueError};

use super::Link;
use super::rx::{Posts, Rules};
use crate::worker::{Poller, STOP, Worker};

const RX_KICK: u64 = 0;
const TX_KICK: u64 = 1;
const LINK: u64 = 2;
/// Packets in one direction before the other has its turn.
const BATCH: usize = 64;

/// The driver broke a ring, or gave buffers that are no memory.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("a receive buffer is too short for its header, or outside of guest memory")]
    Buffer,
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
}

/// Whether a direction could go on at once.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    More,
    Idle,
}

impl NetWorker {
    pub(super) fn start(
        link: Arc<dyn Link>,
        rx: ActiveQueue,
        tx: ActiveQueue,
        rules: Rules,
        failure: DeviceFailure,
    ) -> Result<Worker<[ActiveQueue; 2]>, ActivateError> {
        let poller = Poller::new().map_err(ActivateError::io("make an epoll"))?;
        poller.add_event(&rx.kick, RX_KICK).map_err(ActivateError::io("watch a queue"))?;
        poller.add_event(&tx.kick, TX_KICK).map_err(ActivateError::io("watch a queue"))?;
        poller.add_both(link.as_fd(), LINK).map_err(ActivateError::io("watch the tap"))?;
        let worker = NetWorker {
            link,
            memory: rx.queue.memory().clone(),
            rx,
            tx,
            posts: Posts::new(rules),
            outgoing: Chain::default(),
            outgoing_waits: false,
            link_readable: true,
            link_writable: true,
        };
        Worker::spawn(Kind::Net, "net".to_owned(), poller, move |poller| worker.run(&poller, &failure))
    }

    fn run(mut self, poller: &Poller, failure: &DeviceFailure) -> [ActiveQueue; 2] {
        let mut stop = false;
        while !stop {
            if !failure.is_marked() && self.work().is_err() {
                failure.mark();
            }
            let (readable, writable) = (&mut self.link_readable, &mut self.link_writable);
            let waited = poller.wait(|token, ready| match token {
                STOP => stop = true,
                LINK => {
                    *readable |= ready.contains(vmm_sys_util::epoll::EventSet::IN);
                    *writable |= ready.contains(vmm_sys_util::epoll::EventSet::OUT);
                }
                _ => {}
            });
            if waited.is_err() {
                failure.mark();
                break;
            }
        }
        // For the next one: buffers that hold no packet, and the packet that the tap did not take.
        self.rx.queue.put_back(self.posts.give_up());
        self.tx.queue.put_back(u16::from(self.outgoing_waits));
        [self.rx, self.tx]
    }

    /// Both directions in turns, until neither can go on.
    fn work(&mut self) -> Result<(), Broken> {
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
        while reads < BATCH && self.link_readable {
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
                Err(_) | Ok(0) => self.link_readable = false,
                // The guest must not see half a packet. Its buffers are used for the next one.
                Ok(len) if self.posts.perhaps_cut(len, room_bytes) => {}
                Ok(len) => {
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
            if !self.outgoing_waits && !self.tx.queue.pop(&mut self.outgoing)? {
                empty = true;
                break;
            }
            if !transmit(self.link.as_fd(), &self.memory, &self.outgoing) {
                self.outgoing_waits = true;
                self.link_writable = false;
                break;
            }
            self.outgoing_waits = false;
            self.tx.queue.push_used(self.outgoing.head(), 0)?;
            sent = sent.saturating_add(1);
        }
        if sent > 0 && self.tx.queue.interrupt_wanted()? {
            self.tx.interrupt.trigger();
        }
        let more = if empty { self.tx.queue.enable_kicks()? } else { self.link_writable };
        Ok(if more { Turn::More } else { Turn::Idle })
    }
}

/// Sends one packet. `false`: the tap is full. Anything else that goes wrong loses the packet, as a cable would.
fn transmit(link: BorrowedFd<'_>, memory: &GuestMemory, packet: &Chain) -> bool {
    loop {
        let segments = packet.readable().iter();
        let ranges =
            segments.filter_map(|segment| Some((segment.address, usize::try_from(segment.len).ok()?)));
        match send_packet(link, memory, ranges) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            _ => return true,
        }
    }
}

/// `EFAULT`: no guest memory. `EINVAL` by us: more pieces than a packet may have.
fn is_bad_buffer(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::InvalidInput || error.raw_os_error() == Some(libc::EFAULT)
}
