//! What devices have done, for whoever watches the VM: counted where it happens, read from any thread.
//!
//! - **One writer a number**: the thread of its queue. So adding is a plain load and store, without a lock, a locked
//!   instruction or memory; a reader sees some recent value of each number, not all of one instant.
//! - They are kept outside of the devices, and go on over resets of the guest. They never go back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of all but the last bucket of a [`Histogram`] are 2^4 to 2^22 microseconds: 16 µs to about 4.2 s.
const FIRST_BOUND_LOG2: u32 = 4;
/// Buckets of a histogram; the last has no bound.
pub const BUCKETS: usize = 20;

/// The upper bound of a bucket, in microseconds; `None`: the last one has none.
#[must_use]
pub fn bucket_bound_us(bucket: usize) -> Option<u64> {
    let bucket = u32::try_from(bucket).ok().filter(|_| bucket < BUCKETS.saturating_sub(1))?;
    1u64.checked_shl(bucket.saturating_add(FIRST_BOUND_LOG2))
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Adds; by one thread only.
    pub fn add(&self, more: u64) {
        // No read-modify-write: nobody else writes it.
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
    }

    /// What it is by now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How long something took, in buckets that double.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Count; BUCKETS],
    sum_us: Count,
}

impl Histogram {
    fn add(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        // The smallest power of two that is not less.
        let log2 = u64::BITS.saturating_sub(us.saturating_sub(1).leading_zeros());
        let place = usize::try_from(log2.saturating_sub(FIRST_BOUND_LOG2)).unwrap_or(usize::MAX);
        if let Some(bucket) = self.buckets.get(place.min(BUCKETS.saturating_sub(1))) {
            bucket.add(1);
        }
        self.sum_us.add(us);
    }
}

/// What a histogram holds.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Times {
    /// How many fell into each bucket (not into those below it too); see [`bucket_bound_us`].
    pub buckets: [u64; BUCKETS],
    /// All of them together, in microseconds.
    pub sum_us: u64,
}

impl Times {
    fn take(&mut self, histogram: &Histogram) {
        for (sum, bucket) in self.buckets.iter_mut().zip(&histogram.buckets) {
            *sum = sum.saturating_add(bucket.get());
        }
        self.sum_us = self.sum_us.saturating_add(histogram.sum_us.get());
    }
}

/// What a request of a disk was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskOp {
    /// Bytes from the disk.
    Read,
    /// Bytes to the disk.
    Write,
    /// All of it shall be durable.
    Flush,
    /// Discards and zeroes.
    Discard,
}

/// One kind of request in one queue.
#[derive(Debug, Default)]
struct OpCounts {
    done: Count,
    bytes: Count,
    errors: Count,
    times: Histogram,
}

/// One queue of a disk.
#[derive(Debug, Default)]
pub struct DiskQueueCounts {
    ops: [OpCounts; 4],
    refused: Count,
}

impl DiskQueueCounts {
    /// A request was answered.
    pub(crate) fn done(&self, op: DiskOp, bytes: u64, took: Duration, ok: bool) {
        // The discriminants are the places.
        let Some(counts) = self.ops.get(op as usize) else { return };
        if ok {
            counts.done.add(1);
            counts.bytes.add(bytes);
        } else {
            counts.errors.add(1);
        }
        counts.times.add(took);
    }

    /// A request was answered with an error before it got to the volume.
    pub(crate) fn refused(&self) {
        self.refused.add(1);
    }
}

/// What was done to one kind of request.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct OpTotals {
    /// Requests that were done.
    pub done: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Requests that the guest got an error for.
    pub errors: u64,
    /// From the ring to the answer, of both.
    pub times: Times,
}

/// All queues of a disk together.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct DiskTotals {
    /// Reads.
    pub reads: OpTotals,
    /// Writes.
    pub writes: OpTotals,
    /// Flushes.
    pub flushes: OpTotals,
    /// Discards and zeroes.
    pub discards: OpTotals,
    /// Requests that made no sense to the device: beyond the end, of an unknown kind, writes to what is read-only.
    pub refused: u64,
}

/// A disk's counters; clones are the same.
#[derive(Debug, Clone)]
pub struct DiskCounts(Arc<[DiskQueueCounts]>);

impl DiskCounts {
    /// For a disk with at most so many queues.
    #[must_use]
    pub fn new(queues: u16) -> DiskCounts {
        DiskCounts((0..queues).map(|_| DiskQueueCounts::default()).collect())
    }

    /// What the queue with this number counts with, by itself.
    pub(crate) fn queue(&self, index: u16) -> QueueHandle {
        QueueHandle { all: self.clone(), index: usize::from(index) }
    }

    /// All of it.
    #[must_use]
    pub fn totals(&self) -> DiskTotals {
        let mut totals = DiskTotals::default();
        for queue in self.0.iter() {
            let DiskTotals { reads, writes, flushes, discards, refused } = &mut totals;
            for (total, counts) in [reads, writes, flushes, discards].into_iter().zip(&queue.ops) {
                total.done = total.done.saturating_add(counts.done.get());
                total.bytes = total.bytes.saturating_add(counts.bytes.get());
                total.errors = total.errors.saturating_add(counts.errors.get());
                total.times.take(&counts.times);
            }
            *refused = refused.saturating_add(queue.refused.get());
        }
        totals
    }
}

/// One queue's part of a disk's counters.
#[derive(Debug, Clone)]
pub(crate) struct QueueHandle {
    all: DiskCounts,
    index: usize,
}

impl QueueHandle {
    /// None for a disk that was made with fewer queues.
    pub(crate) fn get(&self) -> Option<&DiskQueueCounts> {
        self.all.0.get(self.index)
    }
}

/// One direction of a network card.
#[derive(Debug, Default)]
pub struct PacketCounts {
    /// Packets that got through.
    pub packets: Count,
    /// Their bytes, without the header of virtio.
    pub bytes: Count,
    /// Packets that were lost here.
    pub drops: Count,
}

/// One queue pair of a network card. The guest's point of view: received is what it got.
#[derive(Debug, Default)]
pub struct PairCounts {
    /// To the guest.
    pub received: PacketCounts,
    /// From the guest.
    pub sent: PacketCounts,
    /// The kernel has its rings: it counts at the tap only.
    in_kernel: AtomicBool,
}

impl PairCounts {
    pub(crate) fn set_in_kernel(&self, is: bool) {
        self.in_kernel.store(is, Ordering::Release);
    }
}

/// A network card's counters, a set for each of its queue pairs; clones are the same.
#[derive(Debug, Clone)]
pub struct NicCounts(Arc<[Arc<PairCounts>]>);

/// What one direction has counted.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct PacketTotals {
    /// As in [`PacketCounts`].
    pub packets: u64,
    /// As in [`PacketCounts`].
    pub bytes: u64,
    /// As in [`PacketCounts`].
    pub drops: u64,
}

/// All queue pairs of a network card together.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct NicTotals {
    /// To the guest.
    pub received: PacketTotals,
    /// From the guest.
    pub sent: PacketTotals,
    /// Pairs whose packets pass inside the kernel, and are not in here.
    pub in_kernel: u16,
}

impl NicCounts {
    /// For a card with so many pairs.
    #[must_use]
    pub fn new(pairs: u16) -> NicCounts {
        NicCounts((0..pairs).map(|_| Arc::default()).collect())
    }

    /// What the pair with this number counts with; a card that was made with fewer loses what it counts.
    pub(crate) fn pair(&self, index: usize) -> Arc<PairCounts> {
        self.0.get(index).cloned().unwrap_or_default()
    }

    /// All of it.
    #[must_use]
    pub fn totals(&self) -> NicTotals {
        let mut totals = NicTotals::default();
        for pair in self.0.iter() {
            let NicTotals { received, sent, in_kernel } = &mut totals;
            *in_kernel = in_kernel.saturating_add(pair.in_kernel.load(Ordering::Acquire).into());
            for (total, counts) in [(received, &pair.received), (sent, &pair.sent)] {
                total.packets = total.packets.saturating_add(counts.packets.get());
                total.bytes = total.bytes.saturating_add(counts.bytes.get());
                total.drops = total.drops.saturating_add(counts.drops.get());
            }
        }
        totals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_falls_into_the_bucket_that_bounds_it() {
        for us in [0u64, 1, 15, 16, 17, 32, 33, 1000, 1 << 22, (1 << 22) + 1, u64::MAX / 2] {
            let histogram = Histogram::default();
            histogram.add(Duration::from_micros(us));
            let mut times = Times::default();
            times.take(&histogram);
            let place = times.buckets.iter().position(|count| *count == 1).expect("one");
            assert!(bucket_bound_us(place).is_none_or(|bound| us <= bound), "{us} in {place}");
            let below = place.checked_sub(1).and_then(bucket_bound_us);
            assert!(below.is_none_or(|bound| us > bound), "{us} in {place}");
            assert_eq!(times.sum_us, us);
        }
        assert_eq!(
            (bucket_bound_us(0), bucket_bound_us(18), bucket_bound_us(19)),
            (Some(16), Some(1 << 22), None)
        );
    }

    #[test]
    fn queues_are_summed_up_and_kinds_are_not() {
        let counts = DiskCounts::new(2);
        for index in 0..2 {
            let queue = counts.queue(index);
            let queue = queue.get().expect("there");
            queue.done(DiskOp::Read, 4096, Duration::from_micros(20), true);
            queue.done(DiskOp::Write, 512, Duration::from_micros(20), false);
        }
        assert!(counts.queue(2).get().is_none());
        let totals = counts.totals();
        assert_eq!((totals.reads.done, totals.reads.bytes, totals.reads.errors), (2, 8192, 0));
        assert_eq!((totals.writes.done, totals.writes.bytes, totals.writes.errors), (0, 0, 2));
        assert_eq!((totals.reads.times.buckets[1], totals.reads.times.sum_us), (2, 40));
        assert_eq!(totals.flushes, OpTotals::default());
    }
}
