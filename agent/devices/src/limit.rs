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
//! - Threads of one device share its buckets without a lock: a bucket is one number, the time at which it is empty, and
//!   taking from it moves that time on. Two threads that look at once may both go; what they took is waited for afterwards.
//! - A thread that waits sleeps on a timer, an idle device has none armed. However long the wait is it looks again after
//!   [`SLEEP_MAX`], since limits may be changed meanwhile.
//!
//! [`Bucket`] is pure: time is an argument.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use serio_virtio::ActivateError;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::worker::Poller;

const SECOND_NS: u128 = 1_000_000_000;
/// Buckets count in these parts of a nanosecond: fine enough for a byte of 32 GB/s, and 9 years fit.
const TICKS_PER_NS: u128 = 32;
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

/// A bucket of tokens, as the time at which it is empty: what it holds is the time since then, at most that of a burst.
/// All times in ticks since the limiter was made.
#[derive(Debug, Default)]
struct Bucket {
    /// 0: no limit, and the rest means nothing.
    per_second: AtomicU64,
    /// What a full one holds.
    full: AtomicI64,
    empty_at: AtomicI64,
}

impl Bucket {
    fn is_limit(&self) -> bool {
        self.per_second.load(Ordering::Acquire) != 0
    }

    /// Full, at this time; but left as it is if it has that rate and size already.
    fn set(&self, rate: Rate, now_ns: u64) {
        let part = (rate.per_second / DEFAULT_BURST_PART).max(1);
        let full = cost(if rate.burst == 0 { part } else { rate.burst }, rate.per_second);
        let same = (self.per_second.load(Ordering::Acquire), self.full.load(Ordering::Acquire))
            == (rate.per_second, full);
        if !same {
            // Whoever looks in between gets one request wrong.
            self.full.store(full, Ordering::Release);
            self.empty_at.store(ticks(now_ns).saturating_sub(full), Ordering::Release);
            self.per_second.store(rate.per_second, Ordering::Release);
        }
    }

    /// How long until something may pass at this time; zero: now.
    fn wait(&self, now_ns: u64) -> Duration {
        let per_second = self.per_second.load(Ordering::Acquire);
        if per_second == 0 {
            return Duration::ZERO;
        }
        // One unit at least: a bucket that has just reached zero is still empty.
        let open_at = self.empty_at.load(Ordering::Acquire).saturating_add(cost(1, per_second));
        let missing = u128::try_from(open_at.saturating_sub(ticks(now_ns))).unwrap_or(0);
        Duration::from_nanos(u64::try_from(missing.div_ceil(TICKS_PER_NS)).unwrap_or(u64::MAX))
    }

    fn take(&self, now_ns: u64, units: u64) {
        let per_second = self.per_second.load(Ordering::Acquire);
        if per_second == 0 {
            return;
        }
        let oldest = ticks(now_ns).saturating_sub(self.full.load(Ordering::Acquire));
        let cost = cost(units, per_second);
        let moved = |empty_at: i64| Some(empty_at.max(oldest).saturating_add(cost));
        // Never refused.
        let _ = self.empty_at.fetch_update(Ordering::AcqRel, Ordering::Acquire, moved);
    }
}

fn ticks(now_ns: u64) -> i64 {
    i64::try_from(u128::from(now_ns).saturating_mul(TICKS_PER_NS)).unwrap_or(i64::MAX)
}

/// How long so many units take, rounded up: a limit is never exceeded.
fn cost(units: u64, per_second: u64) -> i64 {
    let ticks = u128::from(units).saturating_mul(SECOND_NS.saturating_mul(TICKS_PER_NS));
    i64::try_from(ticks.div_ceil(u128::from(per_second.max(1)))).unwrap_or(i64::MAX)
}

/// The buckets of one device, shared by its queues. What they let through can be changed at any time.
#[derive(Debug)]
pub struct Limiter {
    start: Instant,
    bytes: Bucket,
    operations: Bucket,
    /// One change at a time; no request takes it. Who wants to hear of changes.
    change: Mutex<Vec<Weak<EventFd>>>,
}

impl Limiter {
    /// Full buckets.
    #[must_use]
    pub fn new(limits: Limits) -> Arc<Limiter> {
        let (bytes, operations) = (Bucket::default(), Bucket::default());
        let limiter = Limiter { start: Instant::now(), bytes, operations, change: Mutex::default() };
        limiter.set(limits);
        Arc::new(limiter)
    }

    /// These count from now on, with full buckets where a limit is another than before: who waits learns of it within
    /// a quarter of a second.
    pub fn set(&self, limits: Limits) {
        let mut watchers = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let now_ns = self.now_ns();
        self.bytes.set(limits.bytes, now_ns);
        self.operations.set(limits.operations, now_ns);
        // One whose counter is full was told.
        watchers.retain(|watcher| watcher.upgrade().map(|bell| bell.write(1)).is_some());
    }

    /// Rings `bell` after each change, as long as somebody holds it.
    pub(crate) fn watch(&self, bell: &Arc<EventFd>) {
        let mut watchers = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        watchers.retain(|watcher| watcher.strong_count() > 0);
        watchers.push(Arc::downgrade(bell));
    }

    /// Whether anything is limited.
    pub(crate) fn is_limit(&self) -> bool {
        self.bytes.is_limit() || self.operations.is_limit()
    }

    fn now_ns(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// How long to wait before the next request, and when that was asked; none: there is no limit.
    fn look(&self) -> Option<(Duration, u64)> {
        if !self.is_limit() {
            return None;
        }
        let now_ns = self.now_ns();
        Some((self.bytes.wait(now_ns).max(self.operations.wait(now_ns)), now_ns))
    }

    fn charge(&self, now_ns: u64, bytes: u64) {
        self.bytes.take(now_ns, bytes);
        self.operations.take(now_ns, 1);
    }

    /// How long to wait before the next request; zero: it may go.
    #[cfg(test)]
    pub(crate) fn wait(&self) -> Duration {
        self.look().map_or(Duration::ZERO, |(wait, _)| wait)
    }
}

/// One thread's way past a limiter: tells whether it may go on, and wakes it when it may.
pub(crate) struct Gate {
    limiter: Arc<Limiter>,
    timer: TimerFd,
    closed: bool,
    /// When the limiter was last asked.
    asked_ns: u64,
}

impl Gate {
    /// A gate whose timer the poller reports as `token`.
    pub(crate) fn new(limiter: Arc<Limiter>, poller: &Poller, token: u64) -> Result<Gate, ActivateError> {
        Ok(Gate { limiter, timer: poller.timer(token)?, closed: false, asked_ns: 0 })
    }

    /// Whether the next request may go now. If not, the timer is set for when it may.
    pub(crate) fn is_open(&mut self) -> bool {
        let Some((wait, now_ns)) = self.limiter.look() else {
            self.closed = false;
            return true;
        };
        self.asked_ns = now_ns;
        self.closed = !wait.is_zero();
        if self.closed && self.timer.reset(wait.clamp(SLEEP_MIN, SLEEP_MAX), None).is_err() {
            // The kernel takes every time that we give it. If it did not, better no limit than a device that stands still.
            self.closed = false;
        }
        !self.closed
    }

    /// Whether anything is limited at all.
    pub(crate) fn is_limit(&self) -> bool {
        self.limiter.is_limit()
    }

    /// Whether the last answer was no: nothing is to be taken until the timer is reported.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Takes note of a request that was let through.
    pub(crate) fn charge(&self, bytes: u64) {
        self.limiter.charge(self.asked_ns, bytes);
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
