//! virtio-net (virtio 1.2 §5.1) over a tap, or whatever else carries packets with a `virtio_net_hdr` in front.
//!
//! One queue pair and one thread. Packets go between the tap and guest memory in one `readv` or `writev` each,
//! without a copy of ours: the header in front of them has the same shape on both sides, so checksum and
//! segmentation offloads pass through untouched. The tap is told what the guest negotiated, so that it never
//! hands over what the guest cannot take.
//!
//! Not offered: a control queue (so MAC filters and promiscuous mode stay with the bridge), several queue pairs.

#[cfg(any(test, feature = "testing"))]
pub(crate) mod hostile;
mod rx;
mod worker;

#[cfg(test)]
mod bounds_test;
#[cfg(test)]
mod net_test;

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use serio_hv::{Tap, TapOffloads};
use serio_virtio::{ActivateError, Activation, ActiveQueue, SuspendError, VirtioDevice};

use self::worker::NetWorker;
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

const RX: u16 = 0;
const TX: u16 = 1;
const QUEUE_SIZES: &[u16] = &[256, 256];
/// `VIRTIO_NET_S_LINK_UP`.
const LINK_UP: u16 = 1;
/// The MTU that is assumed where none is set.
const MTU_DEFAULT: u16 = 1500;

/// What carries packets: each read or write of its descriptor is one, non-blocking, a 12-byte header in front.
pub trait Link: AsFd + Send + Sync {
    /// Sets what packets may look like that are read from now on.
    fn set_offloads(&self, offloads: TapOffloads) -> io::Result<()>;
}

impl Link for Tap {
    fn set_offloads(&self, offloads: TapOffloads) -> io::Result<()> {
        Tap::set_offloads(self, offloads)
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
    link: Arc<dyn Link>,
    config: NetConfig,
    limits: [Arc<Limiter>; 2],
    notices: Notices,
    counts: Arc<NicCounts>,
    /// The tap is gone. Stays so over resets.
    lost: Arc<AtomicBool>,
    trouble: Trouble,
    raised: Arc<OnceLock<Raised>>,
    workers: Vec<Worker<[ActiveQueue; 2]>>,
}

impl Net {
    /// A card whose cable is `link`. The link may be shared with the card of the next boot, not with another card.
    #[must_use]
    pub fn new(link: Arc<dyn Link>, config: NetConfig) -> Self {
        Self {
            link,
            config,
            limits: [Limiter::new(Limits::default()), Limiter::new(Limits::default())],
            notices: Notices::default(),
            counts: Arc::default(),
            lost: Arc::default(),
            trouble: Trouble::default(),
            raised: Arc::default(),
            workers: Vec::new(),
        }
    }

    /// The same, with limits on what the guest receives and on what it sends. They are kept outside, so that a reset does
    /// not fill the buckets again.
    #[must_use]
    pub fn with_limiters(mut self, receive: Arc<Limiter>, send: Arc<Limiter>) -> Self {
        self.limits = [receive, send];
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
    pub fn with_counts(mut self, counts: Arc<NicCounts>) -> Self {
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
        let mtu = if self.config.mtu.is_some() { 1u64 << F_MTU } else { 0 };
        always.iter().fold(mtu, |bits, bit| bits | 1u64 << bit)
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, out: &mut [u8]) {
        // struct virtio_net_config: mac, status, max_virtqueue_pairs, mtu.
        let [m0, m1, m2, m3, m4, m5] = self.config.mac;
        let lost = self.lost.load(Ordering::Acquire);
        let [s0, s1] = if lost { 0 } else { LINK_UP }.to_le_bytes();
        let [u0, u1] = self.config.mtu.unwrap_or(0).to_le_bytes();
        let image = [m0, m1, m2, m3, m4, m5, s0, s1, 1, 0, u0, u1];
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
        match self.link.set_offloads(offloads) {
            // A cable that was pulled is no reason for the card not to start.
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => {}
            done => done.map_err(ActivateError::io("set the tap's offloads"))?,
        }
        let rx = activation.take_queue(RX)?;
        let tx = activation.take_queue(TX)?;
        let rules = rx::Rules {
            mergeable: activation.has_feature(F_MRG_RXBUF),
            packet_bytes_max: rx::packet_bytes_max(
                offloads.tso4 || offloads.tso6,
                self.config.mtu.unwrap_or(MTU_DEFAULT).max(MTU_DEFAULT),
            ),
        };
        let [rx_limiter, tx_limiter] = self.limits.clone();
        let (lost, notices) = (self.lost.clone(), self.notices.clone());
        let (trouble, raised) = (self.trouble.clone(), self.raised.clone());
        let bell = activation.config_interrupt;
        let shared = worker::Shared {
            rx_limiter,
            tx_limiter,
            cable: worker::Cable { lost, bell, notices, trouble, raised },
            counts: self.counts.clone(),
            failure: activation.failure,
        };
        self.workers.push(NetWorker::start(self.link.clone(), rx, tx, rules, shared)?);
        Ok(())
    }

    fn reset(&mut self) {
        join_all(&mut self.workers);
    }

    fn suspend(&mut self) -> Result<Vec<ActiveQueue>, SuspendError> {
        Ok(finish_all(&mut self.workers)?.into_iter().flatten().collect())
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.reset();
    }
}
