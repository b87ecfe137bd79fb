//! Receive buffers from bytes: a packet never gets more room than was posted, and never gives back what was not. And commands
//! from bytes: whatever they say, a card steers to at least one pair and to none that it has not.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serio_hv::TapOffloads;
use serio_virtio::hostile::{rings, with_queue};

use super::Link;
use super::control::{Control, Pairs};
use super::rx::{Posts, Rules, packet_bytes_max};
use crate::limit::{Gate, Limiter, Limits};
use crate::worker::Poller;

/// A cable that nobody sends through.
struct Unused {
    fd: io::Stdin,
    attached: AtomicBool,
}

impl AsFd for Unused {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Link for Unused {
    fn set_offloads(&self, _offloads: TapOffloads) -> io::Result<()> {
        Ok(())
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        self.attached.store(attached, Ordering::Relaxed);
        Ok(())
    }
}

/// Serves a control queue made of these bytes. The first says of how many pairs the driver has made the rings.
pub fn commands(data: &[u8]) {
    const PAIRS: u16 = 4;
    let cables: Vec<_> =
        (0..PAIRS).map(|_| Arc::new(Unused { fd: io::stdin(), attached: AtomicBool::new(true) })).collect();
    let links = cables.iter().map(|cable| cable.clone() as Arc<dyn Link>);
    let pairs = Arc::new(Pairs::new(links.collect()));
    pairs.steer(1).expect("it never fails");
    let usable = 1 + u16::from(data.first().copied().unwrap_or(0)) % PAIRS;
    let (_rig, activation) = rings(data, 1, u64::MAX);
    let poller = Poller::new().expect("an epoll");
    for ring in activation.queues {
        let gate = Gate::new(Limiter::new(Limits::default()), &poller, 0).expect("a timer");
        let _ = Control::new(ring, gate, pairs.clone(), usable).serve();
    }
    let active = usize::from(pairs.active());
    assert!((1..=usize::from(usable)).contains(&active), "{active} pairs of {usable}");
    let attached = cables.iter().map(|cable| cable.attached.load(Ordering::Relaxed));
    assert!(attached.enumerate().all(|(at, attached)| attached == (at < active)), "{active} pairs");
}

/// Posts what a ring made of these bytes offers, and delivers packets into it.
pub fn buffers(data: &[u8]) {
    let first = data.first().copied().unwrap_or(0);
    let rules = Rules { mergeable: first & 1 == 1, packet_bytes_max: packet_bytes_max(first & 2 == 2, 1500) };
    with_queue(data, |memory, queue| {
        let mut posts = Posts::new(rules);
        for byte in data.iter().take(64) {
            if posts.collect(queue).is_err() {
                return;
            }
            if !posts.ready(queue.size()) {
                return;
            }
            let (room, bytes) = posts.room();
            let sum: usize = room.map(|(_, len)| len).sum();
            assert_eq!(sum, bytes, "the segments are not what was counted");
            let len = (usize::from(*byte) * 300).min(bytes);
            if posts.perhaps_cut(len, bytes) {
                continue;
            }
            match posts.deliver(memory, queue, len) {
                Some(Ok(())) => {}
                Some(Err(_)) | None => return,
            }
        }
    });
}
