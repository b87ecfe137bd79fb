//! How much a device may do: bytes and operations a second, each with a burst. Token buckets.
//!
//! ```text
//!   before each request   admit ── both buckets above zero? ──► go, then charge what it was
//!                            └── else: how long until they are; sleep on a timer, take nothing off the ring
//! ```
//!
//! - A bucket may go below zero: a request is never cut up, the next ones wait for what it took. So the rate holds over
//!   time whatever the sizes, and a burst is how much may pass at once after a rest.
//! - Buckets outlive resets of the device: a guest does not get a new burst by resetting it.
//! - A thread that waits sleeps on a timer, an idle device has none armed. However long the wait is it looks again after
//!   [`SLEEP_MAX`], since limits may be changed meanwhile.
//!
//! [`Bucket`] is pure: time is an argument.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serio_virtio::ActivateError;
use vmm_sys_util::timerfd::TimerFd;

use crate::worker::Poller;

const SECOND_NS: u128 = 1_000_000_000;
/// The burst where none is given is what passes in this part of a second.
const DEFAULT_BURST_PART: u64 = 10;
/// The shortest sleep: below, waking costs more than waiting.
const SLEEP_MIN: Duration = Duration::from_micros(200);
/// The longest, after which changed limits are noticed.
const SLEEP_MAX: Duration = Duration::from_millis(250);

/// So many units a second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate {
    /// Units a second; 0: no limit.
    pub per_second: u64,
    /// Units that may pass at once after a rest; 0: a tenth of a second's.
    pub burst: u64,
}

/// What a device may do. The default limits nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Data, in bytes.
    pub bytes: Rate,
    /// Requests of a disk, packets of a network card.
    pub operations: Rate,
}

/// A bucket of tokens. Its content is kept in units times nanoseconds: nothing is lost by rounding.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    per_second: u64,
    full: i128,
    content: i128,
    filled_ns: u128,
}

impl Bucket {
    /// Full. `None`: no limit.
    fn new(rate: Rate) -> Option<Bucket> {
        if rate.per_second == 0 {
            return None;
        }
        let part = (rate.per_second / DEFAULT_BURST_PART).max(1);
        let burst = if rate.burst == 0 { part } else { rate.burst };
        let full = scaled(burst);
        Some(Bucket { per_second: rate.per_second, full, content: full, filled_ns: 0 })
    }

    /// How long until something may pass at this time; zero: now.
    fn wait(&mut self, now_ns: u128) -> Duration {
        let elapsed = now_ns.saturating_sub(self.filled_ns);
        self.filled_ns = self.filled_ns.max(now_ns);
        let more = i128::try_from(elapsed.saturating_mul(u128::from(self.per_second))).unwrap_or(i128::MAX);
        self.content = self.content.saturating_add(more).min(self.full);
        // One unit at least: a bucket that has just reached zero is still empty.
        let missing = u128::try_from(scaled(1).saturating_sub(self.content)).unwrap_or(0);
        let wait_ns = missing.div_ceil(u128::from(self.per_second.max(1)));
        Duration::from_nanos(u64::try_from(wait_ns).unwrap_or(u64::MAX))
    }

    /// Whether it has the same rate and size.
    fn is_like(&self, other: &Bucket) -> bool {
        (self.per_second, self.full) == (other.per_second, other.full)
    }

    fn take(&mut self, units: u64) {
        self.content = self.content.saturating_sub(scaled(units));
    }
}

fn scaled(units: u64) -> i128 {
    i128::try_from(u128::from(units).saturating_mul(SECOND_NS)).unwrap_or(i128::MAX)
}

#[derive(Debug)]
struct Buckets {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

/// The buckets of one device, shared by its queues. What they let through can be changed at any time.
#[derive(Debug)]
pub struct Limiter {
    start: Instant,
    buckets: Mutex<Buckets>,
    /// Whether there is a bucket: without one nobody takes the lock.
    limits: AtomicBool,
}

impl Limiter {
    /// Full buckets.
    #[must_use]
    pub fn new(limits: Limits) -> Arc<Limiter> {
        let limiter = Limiter {
            start: Instant::now(),
            buckets: Mutex::new(Buckets { bytes: None, operations: None }),
            limits: AtomicBool::new(false),
        };
        limiter.set(limits);
        Arc::new(limiter)
    }

    /// These count from now on, with full buckets where a limit is another than before: who waits learns of it within
    /// a quarter of a second.
    pub fn set(&self, limits: Limits) {
        let now_ns = self.start.elapsed().as_nanos();
        let mut buckets = self.lock();
        let Buckets { bytes, operations } = &mut *buckets;
        for (bucket, rate) in [(bytes, limits.bytes), (operations, limits.operations)] {
            let fresh = Bucket::new(rate).map(|fresh| Bucket { filled_ns: now_ns, ..fresh });
            // The same again: no new burst.
            let same = matches!((&*bucket, &fresh), (Some(old), Some(new)) if old.is_like(new));
            if !same {
                *bucket = fresh;
            }
        }
        let limited = buckets.bytes.is_some() || buckets.operations.is_some();
        self.limits.store(limited, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Buckets> {
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long to wait before the next request; zero: it may go.
    pub(crate) fn wait(&self) -> Duration {
        if !self.limits.load(Ordering::Acquire) {
            return Duration::ZERO;
        }
        let now_ns = self.start.elapsed().as_nanos();
        let mut buckets = self.lock();
        let bytes = buckets.bytes.as_mut().map_or(Duration::ZERO, |bucket| bucket.wait(now_ns));
        let operations = buckets.operations.as_mut().map_or(Duration::ZERO, |bucket| bucket.wait(now_ns));
        bytes.max(operations)
    }

    fn charge(&self, bytes: u64) {
        if !self.limits.load(Ordering::Acquire) {
            return;
        }
        let mut buckets = self.lock();
        if let Some(bucket) = &mut buckets.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut buckets.operations {
            bucket.take(1);
        }
    }
}

/// One thread's way past a limiter: tells whether it may go on, and wakes it when it may.
pub(crate) struct Gate {
    limiter: Arc<Limiter>,
    timer: TimerFd,
    closed: bool,
}

impl Gate {
    /// A gate whose timer the poller reports as `token`.
    pub(crate) fn new(limiter: Arc<Limiter>, poller: &Poller, token: u64) -> Result<Gate, ActivateError> {
        Ok(Gate { limiter, timer: poller.timer(token)?, closed: false })
    }

    /// Whether the next request may go now. If not, the timer is set for when it may.
    pub(crate) fn is_open(&mut self) -> bool {
        let wait = self.limiter.wait();
        self.closed = !wait.is_zero();
        if self.closed && self.timer.reset(wait.clamp(SLEEP_MIN, SLEEP_MAX), None).is_err() {
            // The kernel takes every time that we give it. If it did not, better no limit than a device that stands still.
            self.closed = false;
        }
        !self.closed
    }

    /// Whether the last answer was no: nothing is to be taken until the timer is reported.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Takes note of a request.
    pub(crate) fn charge(&self, bytes: u64) {
        self.limiter.charge(bytes);
    }
}

impl Poller {
    /// A timer that is reported as `token` once each time that it expires; it is never read.
    pub(crate) fn timer(&self, token: u64) -> Result<TimerFd, ActivateError> {
        let io = |error: vmm_sys_util::errno::Error| io::Error::from_raw_os_error(error.errno());
        let timer = TimerFd::new().map_err(io).map_err(ActivateError::io("make a timer"))?;
        self.add_edge(timer.as_raw_fd(), token).map_err(ActivateError::io("watch a timer"))?;
        Ok(timer)
    }
}

#[cfg(test)]
#[path = "limit_test.rs"]
mod tests;
