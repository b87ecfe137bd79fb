//! virtio-net (virtio 1.3 §5.1) over a tap, or whatever else carries packets with a `virtio_net_hdr` in front.
//!
//! ```text
//!   pair 0: receiveq 0, transmitq 1 ── thread ── queue 0 of the tap ─┐
//!   pair 1: receiveq 2, transmitq 3 ── thread ── queue 1 of the tap ─┼─ one interface, one address,
//!      ⋮                                                        ⋮    │  one set of limits
//!   controlq 2n (or 2, without MQ) ─── thread of pair 0 ─── steers ──┘
//! ```
//!
//! A queue pair has a thread and a queue of the tap of its own, so nothing is locked on the way of a packet. Packets go between
//! the tap and guest memory in one `readv` or `writev` each, without a copy of ours: the header in front of them has the
//! same shape on both sides, so checksum and segmentation offloads pass through untouched. The tap is told what the
//! guest negotiated, so that it never hands over what the guest cannot take. Where the host has vhost-net and nothing speaks against it,
//! the kernel does this by itself, and the thread sleeps: see `kernel.rs`.
//!
//! - As many pairs as there are cables ([`Net::new`]); with one there is neither MQ nor a control queue.
//! - The host chooses the pair of a packet to the guest: that on which the guest last sent to the same peer, else by hash.
//! - A pair that the driver does not use is detached from the tap, so that the host steers around it: were its packets left to
//!   be moved by us, they would pass between threads and out of order.
//!
//! Not offered: MAC filters and promiscuous mode (they stay with the bridge), RSS.

mod control;
#[cfg(any(test, feature = "testing"))]
pub(crate) mod hostile;
mod kernel;
mod rx;
mod worker;

#[cfg(test)]
mod bounds_test;
#[cfg(test)]
mod kernel_test;
#[cfg(test)]
mod net_test;
#[cfg(test)]
mod pairs_test;

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use serio_hv::{Tap, TapOffloads};
use serio_virtio::{
    ActivateError, Activation, ActiveQueue, DeviceState, RestoreError, SuspendError, VirtioDevice,
};

pub use self::control::LIMITS as COMMAND_LIMITS;
use self::control::Pairs;
pub use self::kernel::Shortcut;
use self::worker::{Cable, NetWorker, Shared};
use crate::count::NicCounts;
use crate::limit::{Limiter, Limits};
use crate::trouble::Raised;
use crate::worker::{Worker, finish_all, join_all};
use crate::{Notices, Trouble};

const F_CSUM: u32 = 0;
const F_GUEST_CSUM: u32 = 1;
const F_MTU: u32 = 3;
const F_MAC: u32 = 5;
const F_GUEST_TSO4: u32 = 7;
const F_GUEST_TSO6: u32 = 8;
const F_HOST_TSO4: u32 = 11;
const F_HOST_TSO6: u32 = 12;
const F_MRG_RXBUF: u32 = 15;
const F_STATUS: u32 = 16;
const F_CTRL_VQ: u32 = 17;
const F_MQ: u32 = 22;

/// Descriptors of a queue that carries packets.
const QUEUE_SIZE: u16 = 256;
/// Descriptors of the control queue.
const CONTROL_SIZE: u16 = 64;
/// The layout of the saved state: the pairs in use, two bytes. A card of one pair remembers nothing.
const STATE_VERSION: u32 = 1;
/// `VIRTIO_NET_S_LINK_UP`.
const LINK_UP: u16 = 1;
/// The MTU that is assumed where none is set.
const MTU_DEFAULT: u16 = 1500;

/// What carries packets: each read or write of its descriptor is one, non-blocking, a 12-byte header in front.
pub trait Link: AsFd + Send + Sync {
    /// Sets what packets may look like that are read from now on, from this and from all others of the card.
    fn set_offloads(&self, offloads: TapOffloads) -> io::Result<()>;

    /// Whether packets come to it rather than to the others of the card. It is attached at first.
    fn set_attached(&self, attached: bool) -> io::Result<()>;

    /// What can move its packets past this process, if anything can.
    fn shortcut(&self) -> Option<&dyn Shortcut> {
        None
    }
}

impl Link for Tap {
    fn set_offloads(&self, offloads: TapOffloads) -> io::Result<()> {
        Tap::set_offloads(self, offloads)
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        Tap::set_attached(self, attached)
    }

    fn shortcut(&self) -> Option<&dyn Shortcut> {
        self.vhost().map(|vhost| vhost as &dyn Shortcut)
    }
}

/// How a network card appears to the guest.
#[derive(Clone, Copy, Debug)]
pub struct NetConfig {
    /// The card's address. The first byte even, and `x2`, `x6`, `xa` or `xe` for an address of one's own.
    pub mac: [u8; 6],
    /// The largest packet behind the Ethernet header, if the guest shall be told.
    pub mtu: Option<u16>,
}

/// A network card.
pub struct Net {
    pairs: Arc<Pairs>,
    config: NetConfig,
    limits: [Arc<Limiter>; 2],
    commands: Arc<Limiter>,
    notices: Notices,
    counts: NicCounts,
    /// The tap is gone. Stays so over resets.
    lost: Arc<AtomicBool>,
    trouble: Trouble,
    raised: Arc<OnceLock<Raised>>,
    queue_sizes: Vec<u16>,
    workers: Vec<Worker<Vec<ActiveQueue>>>,
    /// Queues that the driver has made and cannot use with what it agreed to.
    idle: Vec<ActiveQueue>,
}

impl Net {
    /// A card with these cables, one for each queue pair: queues of one tap. They may be shared with the card of the next
    /// boot, not with another card.
    #[must_use]
    pub fn new(links: Vec<Arc<dyn Link>>, config: NetConfig) -> Self {
        let pairs = Arc::new(Pairs::new(links));
        let mut queue_sizes = vec![QUEUE_SIZE; pairs.links().len().saturating_mul(2)];
        if pairs.count() > 1 {
            queue_sizes.push(CONTROL_SIZE);
        }
        Self {
            counts: NicCounts::new(pairs.count()),
            pairs,
            config,
            limits: [Limiter::new(Limits::default()), Limiter::new(Limits::default())],
            commands: Limiter::new(COMMAND_LIMITS),
            notices: Notices::default(),
            lost: Arc::default(),
            trouble: Trouble::default(),
            raised: Arc::default(),
            queue_sizes,
            workers: Vec::new(),
            idle: Vec::new(),
        }
    }

    /// The same, with limits on what the guest receives and on what it sends. They are kept outside, so that a reset does
    /// not fill the buckets again.
    #[must_use]
    pub fn with_limiters(mut self, receive: Arc<Limiter>, send: Arc<Limiter>) -> Self {
        self.limits = [receive, send];
        self
    }

    /// The same, with a limit on how often the driver changes the number of pairs that it uses, which is [`COMMAND_LIMITS`] else.
    #[must_use]
    pub fn with_command_limiter(mut self, commands: Arc<Limiter>) -> Self {
        self.commands = commands;
        self
    }

    /// The same, with somebody who hears that the cable was pulled.
    #[must_use]
    pub fn with_notices(mut self, notices: Notices) -> Self {
        self.notices = notices;
        self
    }

    /// The same, with somebody who sees that the cable is gone.
    #[must_use]
    pub fn with_trouble(mut self, trouble: Trouble) -> Self {
        self.trouble = trouble;
        self
    }

    /// The same, counted there. The counters are kept outside, so that they go on over resets.
    #[must_use]
    pub fn with_counts(mut self, counts: NicCounts) -> Self {
        self.counts = counts;
        self
    }
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u16 {
        1
    }

    fn features(&self) -> u64 {
        let always = [
            F_CSUM,
            F_GUEST_CSUM,
            F_MAC,
            F_GUEST_TSO4,
            F_GUEST_TSO6,
            F_HOST_TSO4,
            F_HOST_TSO6,
            F_MRG_RXBUF,
            F_STATUS,
        ];
        let mtu = self.config.mtu.map(|_| F_MTU);
        let several = if self.pairs.count() > 1 { &[F_CTRL_VQ, F_MQ][..] } else { &[] };
        always.iter().chain(several).chain(&mtu).fold(0, |bits, bit| bits | 1u64 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, out: &mut [u8]) {
        // struct virtio_net_config: mac, status, max_virtqueue_pairs, mtu.
        let [m0, m1, m2, m3, m4, m5] = self.config.mac;
        let lost = self.lost.load(Ordering::Acquire);
        let [s0, s1] = if lost { 0 } else { LINK_UP }.to_le_bytes();
        let [u0, u1] = self.config.mtu.unwrap_or(0).to_le_bytes();
        let [p0, p1] = self.pairs.count().to_le_bytes();
        let image = [m0, m1, m2, m3, m4, m5, s0, s1, p0, p1, u0, u1];
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        out.fill(0);
        for (byte, value) in out.iter_mut().zip(image.iter().skip(skip)) {
            *byte = *value;
        }
    }

    // The address is read-only in devices of version 1 (§5.1.4).
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let offloads = TapOffloads {
            checksum: activation.has_feature(F_GUEST_CSUM),
            tso4: activation.has_feature(F_GUEST_TSO4),
            tso6: activation.has_feature(F_GUEST_TSO6),
        };
        let rules = rx::Rules {
            mergeable: activation.has_feature(F_MRG_RXBUF),
            packet_bytes_max: rx::packet_bytes_max(
                offloads.tso4 || offloads.tso6,
                self.config.mtu.unwrap_or(MTU_DEFAULT).max(MTU_DEFAULT),
            ),
        };
        let several = activation.has_feature(F_MQ);
        let count = if several { self.pairs.count() } else { 1 };
        // Behind the pairs that were agreed, not behind those that there are (§5.1.2).
        let control =
            activation.has_feature(F_CTRL_VQ).then(|| activation.take_queue(count.saturating_mul(2)));
        // A driver that does not make it has no use for it.
        let mut control = control.and_then(Result::ok);
        let rings = take_pairs(&mut activation, count)?;
        self.prepare(offloads, u16::try_from(rings.len()).unwrap_or(u16::MAX))?;
        self.idle = activation.queues;
        let [rx_limiter, tx_limiter] = self.limits.clone();
        let shared = Shared {
            rx_limiter,
            tx_limiter,
            commands: self.commands.clone(),
            cable: Arc::new(Cable {
                lost: self.lost.clone(),
                bell: activation.config_interrupt,
                notices: self.notices.clone(),
                trouble: self.trouble.clone(),
                raised: self.raised.clone(),
            }),
            pairs: self.pairs.clone(),
            usable: u16::try_from(rings.len()).unwrap_or(u16::MAX),
            rules,
            features: activation.features,
            failure: activation.failure,
        };
        for (index, rings) in rings.into_iter().enumerate() {
            let counts = self.counts.pair(index);
            match NetWorker::start(index, rings, control.take(), counts, &shared) {
                Ok(worker) => self.workers.push(worker),
                Err(error) => {
                    self.reset();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        join_all(&mut self.workers);
        self.idle.clear();
        // Whatever drives the card next begins with one (§5.1.6.5.5).
        self.pairs.set_active(1);
    }

    fn suspend(&mut self) -> Result<Vec<ActiveQueue>, SuspendError> {
        let left = finish_all(&mut self.workers)?;
        Ok(left.into_iter().flatten().chain(self.idle.drain(..)).collect())
    }

    fn save(&self) -> DeviceState {
        if self.pairs.count() == 1 {
            return DeviceState::default();
        }
        DeviceState::new(STATE_VERSION, self.pairs.active().to_le_bytes())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        if self.pairs.count() == 1 {
            return state.refuse_unless_empty();
        }
        let active = state.fixed(STATE_VERSION)?.map_or(1, u16::from_le_bytes);
        if !(1..=self.pairs.count()).contains(&active) {
            let what = format!("{active} queue pairs are in use of {}", self.pairs.count());
            return Err(RestoreError::Malformed { what });
        }
        self.pairs.set_active(active);
        Ok(())
    }
}

impl Net {
    /// Tells the tap what its guest takes, and on how many pairs: as many as were in use when the card was suspended, else one.
    fn prepare(&self, offloads: TapOffloads, usable: u16) -> Result<(), ActivateError> {
        let Some(first) = self.pairs.links().first() else { return Ok(()) };
        match first.set_offloads(offloads) {
            // A cable that was pulled is no reason for the card not to start.
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => return Ok(()),
            done => done.map_err(ActivateError::io("set the tap's offloads"))?,
        }
        let active = self.pairs.active().min(usable);
        self.pairs.steer(active).map_err(ActivateError::io("choose the tap's queues"))
    }
}

/// The rings of up to `count` pairs: of the first one, and of those behind it that the driver has made.
fn take_pairs(activation: &mut Activation, count: u16) -> Result<Vec<[ActiveQueue; 2]>, ActivateError> {
    let mut pairs = vec![[activation.take_queue(0)?, activation.take_queue(1)?]];
    for rx in (2..count.saturating_mul(2)).step_by(2) {
        let tx = rx.saturating_add(1);
        let is_made = |index| activation.queues.iter().any(|queue| queue.index == index);
        if !is_made(rx) || !is_made(tx) {
            break;
        }
        pairs.push([activation.take_queue(rx)?, activation.take_queue(tx)?]);
    }
    Ok(pairs)
}

impl Drop for Net {
    fn drop(&mut self) {
        self.reset();
    }
}
