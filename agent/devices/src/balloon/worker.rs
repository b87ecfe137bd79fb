//! The thread of a balloon: takes page numbers and ranges, and keeps the statistics' one buffer.

use std::sync::atomic::Ordering;
use std::time::Instant;

use serio_hv::{GuestMemory, release_memory};
use serio_virtio::{ActiveQueue, Chain, DeviceFailure, QueueError};
use vm_memory::{Bytes, GuestAddress};

use super::{BalloonHandle, GuestStats, PAGE_BYTES, lock};
use crate::worker::{Poller, STOP};

/// Somebody wants statistics; the queues' tokens are their numbers.
pub(super) const WANTED: u64 = 16;
/// Bytes of page numbers that one request may have: 16,384 pages. Linux sends 256. What is beyond stays with the guest.
const NUMBERS_BYTES_MAX: usize = 64 << 10;
/// Bytes of one statistic: a tag of two bytes, a value of eight.
const STAT_BYTES: usize = 10;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Inflate,
    Deflate,
    Stats,
    Reporting,
}

pub(super) struct Engine {
    rings: Vec<(Role, ActiveQueue)>,
    handle: BalloonHandle,
    memory: GuestMemory,
    /// The statistics' buffer is with us.
    held: Option<u16>,
    wanted: bool,
    chain: Chain,
    numbers: Vec<u8>,
}

impl Engine {
    pub(super) fn new(rings: Vec<(Role, ActiveQueue)>, handle: BalloonHandle, memory: GuestMemory) -> Engine {
        Engine {
            rings,
            handle,
            memory,
            held: None,
            wanted: false,
            chain: Chain::default(),
            numbers: Vec::new(),
        }
    }

    /// Works until told to stop; then gives the statistics' buffer back to its ring, as if it had not been taken.
    pub(super) fn run(mut self, poller: &Poller, failure: &DeviceFailure) -> Vec<ActiveQueue> {
        let mut stop = false;
        while !stop {
            if !failure.is_marked() && self.work().is_err() {
                failure.mark();
            }
            let wanted = &mut self.wanted;
            let waited = poller.wait(|token, _| match token {
                STOP => stop = true,
                WANTED => *wanted = true,
                _ => {}
            });
            if waited.is_err() {
                failure.mark();
                break;
            }
        }
        let held = self.held.is_some();
        let give = |(role, mut ring): (Role, ActiveQueue)| {
            if role == Role::Stats && held {
                ring.queue.put_back(1);
            }
            ring
        };
        self.rings.into_iter().map(give).collect()
    }

    /// For tests: one look at all rings, as when somebody wants statistics.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn look(&mut self) -> Result<(), QueueError> {
        self.wanted = true;
        self.work()
    }

    fn work(&mut self) -> Result<(), QueueError> {
        // Taken out, so that the rest of `self` is free.
        let mut rings = std::mem::take(&mut self.rings);
        let result = rings.iter_mut().try_for_each(|(role, ring)| match role {
            Role::Stats => self.serve_stats(ring),
            role => self.serve(*role, ring),
        });
        self.rings = rings;
        result
    }

    fn serve(&mut self, role: Role, ring: &mut ActiveQueue) -> Result<(), QueueError> {
        let mut used = false;
        loop {
            while ring.queue.pop(&mut self.chain)? {
                match role {
                    Role::Inflate => self.inflate(),
                    Role::Reporting => self.release_reported(),
                    // The guest takes its pages again: they come back when it touches them.
                    Role::Deflate | Role::Stats => {}
                }
                ring.queue.push_used(self.chain.head(), 0)?;
                used = true;
            }
            if !ring.queue.enable_kicks()? {
                break;
            }
        }
        if used && ring.queue.interrupt_wanted()? {
            ring.interrupt.trigger();
        }
        Ok(())
    }

    /// Releases the pages whose numbers the chain has, joining neighbours: upward or downward, as drivers send them.
    fn inflate(&mut self) {
        let mut numbers = std::mem::take(&mut self.numbers);
        copy_out(&self.memory, &self.chain, &mut numbers);
        let mut run: Option<(u64, u64)> = None;
        for number in numbers.chunks_exact(4) {
            let page = u64::from(number.iter().rev().fold(0u32, |sum, byte| sum << 8 | u32::from(*byte)));
            run = match run {
                Some((first, count)) if page == first.saturating_add(count) => {
                    Some((first, count.saturating_add(1)))
                }
                Some((first, count)) if page.checked_add(1) == Some(first) => {
                    Some((page, count.saturating_add(1)))
                }
                other => {
                    self.release_run(other);
                    Some((page, 1))
                }
            };
        }
        self.release_run(run);
        numbers.clear();
        self.numbers = numbers;
    }

    fn release_run(&self, run: Option<(u64, u64)>) {
        if let Some((first, count)) = run {
            // Numbers have 32 bits: far from an overflow.
            self.release(first.saturating_mul(PAGE_BYTES), count.saturating_mul(PAGE_BYTES));
        }
    }

    fn release_reported(&self) {
        for segment in self.chain.writable() {
            self.release(segment.address.0, u64::from(segment.len));
        }
    }

    /// A host that refuses (out of memory itself) keeps the pages: nothing is lost but the gain.
    fn release(&self, start: u64, len: u64) {
        let bytes = release_memory(&self.memory, GuestAddress(start), len).unwrap_or(0);
        self.handle.0.released_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The driver's one buffer: read when it comes, kept, and given back when somebody wants news (§5.5.6.3).
    fn serve_stats(&mut self, ring: &mut ActiveQueue) -> Result<(), QueueError> {
        if std::mem::take(&mut self.wanted) {
            let _ = self.handle.0.wanted.read();
            if let Some(head) = self.held.take() {
                ring.queue.push_used(head, 0)?;
                if ring.queue.interrupt_wanted()? {
                    ring.interrupt.trigger();
                }
            }
        }
        loop {
            while self.held.is_none() && ring.queue.pop(&mut self.chain)? {
                let mut bytes = std::mem::take(&mut self.numbers);
                copy_out(&self.memory, &self.chain, &mut bytes);
                *lock(&self.handle.0.guest) = parse_stats(&bytes);
                bytes.clear();
                self.numbers = bytes;
                self.held = Some(self.chain.head());
            }
            // A second buffer, which the standard does not foresee, waits for its turn.
            if self.held.is_some() || !ring.queue.enable_kicks()? {
                return Ok(());
            }
        }
    }
}

/// The readable part of a chain, as far as it is memory and within the bound.
fn copy_out(memory: &GuestMemory, chain: &Chain, out: &mut Vec<u8>) {
    out.clear();
    for segment in chain.readable() {
        let start = out.len();
        let len =
            usize::try_from(segment.len).unwrap_or(usize::MAX).min(NUMBERS_BYTES_MAX.saturating_sub(start));
        out.resize(start.saturating_add(len), 0);
        let read = out.get_mut(start..).map(|part| memory.read_slice(part, segment.address));
        if !matches!(read, Some(Ok(()))) {
            out.truncate(start);
            return;
        }
    }
}

/// Reads tags and values; tags that are not known are skipped, of one that comes twice the last counts.
pub(super) fn parse_stats(bytes: &[u8]) -> GuestStats {
    let mut stats = GuestStats { at: Some(Instant::now()), ..GuestStats::default() };
    for stat in bytes.chunks_exact(STAT_BYTES) {
        let (tag, value) = stat.split_at(2);
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
        let slot = usize::try_from(number(tag)).ok().and_then(|tag| stats.values.get_mut(tag));
        if let Some(slot) = slot {
            *slot = Some(number(value));
        }
    }
    stats
}
