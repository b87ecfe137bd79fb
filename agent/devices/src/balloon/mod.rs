//! virtio-balloon (virtio 1.2 §5.5): the guest gives memory back to the host, because it is asked to or by itself.
//!
//! ```text
//!   queue 0 inflate     page numbers that the guest gives up     ─┐
//!   queue 1 deflate     page numbers that it takes again          │ a page taken again is simply touched:
//!   queue 2 statistics  one buffer, which it fills when asked     │ the host gives a new one
//!   queue 3 reporting   ranges that are free just now            ─┘
//! ```
//!
//! - The guest's driver follows the **target** (`num_pages`) at its own pace; when it runs out of memory it takes pages back
//!   by itself (DEFLATE_ON_OOM). Free page reporting works without any target.
//! - Page numbers and ranges are hostile: what is no RAM is left alone. Released pages read as zeros.
//! - Queues follow each other without gaps: without statistics the reporting queue is number 2, as Linux has it.
//! - One thread, asleep unless the guest speaks or somebody asks for statistics.

#[cfg(any(test, feature = "testing"))]
pub(crate) mod hostile;
mod worker;

#[cfg(test)]
mod balloon_test;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serio_sandbox::Kind;
use serio_virtio::{
    ActivateError, Activation, ActiveQueue, ConfigInterrupt, DeviceState, RestoreError, SuspendError,
    VirtioDevice,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::worker::{Poller, Worker, finish_all, join_all};
use worker::{Engine, Role};

/// The unit of the balloon, whatever the pages of guest and host.
const PAGE_BYTES: u64 = 4096;
const QUEUE_SIZES: &[u16] = &[128, 128, 16, 64];
const F_STATS: u32 = 1;
const F_DEFLATE_ON_OOM: u32 = 2;
const F_REPORTING: u32 = 5;
/// Where the driver writes how many pages are in the balloon.
const ACTUAL: u64 = 4;
const STATE_VERSION: u32 = 1;
const STATE_BYTES: usize = 8;

/// How many kinds of statistics are kept; the standard names ten, newer drivers know sixteen.
pub const STATS_MAX: usize = 16;

/// What the guest last said of its memory: the value of each tag (`VIRTIO_BALLOON_S_*`, §5.5.6.3), in the standard's units.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestStats {
    /// By tag; tags that the guest did not send are `None`.
    pub values: [Option<u64>; STATS_MAX],
    /// When they came.
    pub at: Option<Instant>,
}

/// How the balloon stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonStatus {
    /// How much the guest shall give up.
    pub target_bytes: u64,
    /// How much it says that it has given up.
    pub actual_bytes: u64,
    /// What was given back to the host since the VM was made: by balloon, and by reports of free pages.
    pub released_bytes: u64,
    /// The guest's own statistics.
    pub guest: GuestStats,
    /// How old those are.
    pub age: Option<Duration>,
}

/// What the host holds on to: stays the same over resets.
#[derive(Clone)]
pub struct BalloonHandle(Arc<Inner>);

pub(crate) struct Inner {
    target_pages: AtomicU32,
    actual_pages: AtomicU32,
    released_bytes: AtomicU64,
    guest: Mutex<GuestStats>,
    interrupt: Mutex<Option<ConfigInterrupt>>,
    /// Rung when somebody wants fresh statistics.
    wanted: EventFd,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for BalloonHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BalloonHandle").field("status", &self.status()).finish()
    }
}

impl BalloonHandle {
    /// An empty balloon without a target.
    pub fn new() -> std::io::Result<BalloonHandle> {
        Ok(BalloonHandle(Arc::new(Inner {
            target_pages: AtomicU32::new(0),
            actual_pages: AtomicU32::new(0),
            released_bytes: AtomicU64::new(0),
            guest: Mutex::default(),
            interrupt: Mutex::default(),
            wanted: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })))
    }

    /// Asks the guest to have so much in the balloon, rounded down to pages. It follows in its own time, or not at all.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        self.0.target_pages.store(pages, Ordering::Release);
        if let Some(interrupt) = &*lock(&self.0.interrupt) {
            interrupt.trigger();
        }
    }

    /// Asks the guest for fresh statistics; they are in [`BalloonHandle::status`] a little later.
    pub fn refresh(&self) {
        // Fails only when it is rung already.
        let _ = self.0.wanted.write(1);
    }

    /// How it stands.
    pub fn status(&self) -> BalloonStatus {
        let guest = *lock(&self.0.guest);
        BalloonStatus {
            target_bytes: u64::from(self.0.target_pages.load(Ordering::Acquire)).saturating_mul(PAGE_BYTES),
            actual_bytes: u64::from(self.0.actual_pages.load(Ordering::Acquire)).saturating_mul(PAGE_BYTES),
            released_bytes: self.0.released_bytes.load(Ordering::Relaxed),
            guest,
            age: guest.at.map(|at| at.elapsed()),
        }
    }
}

/// The device.
pub struct Balloon {
    handle: BalloonHandle,
    workers: Vec<Worker<Vec<ActiveQueue>>>,
}

impl Balloon {
    /// A device over `handle`, which the device of the next boot may share.
    #[must_use]
    pub fn new(handle: BalloonHandle) -> Balloon {
        Balloon { handle, workers: Vec::new() }
    }

    fn inner(&self) -> &Inner {
        &self.handle.0
    }

    fn config(&self) -> [u8; 16] {
        let mut config = [0; 16];
        let target = self.inner().target_pages.load(Ordering::Acquire).to_le_bytes();
        let actual = self.inner().actual_pages.load(Ordering::Acquire).to_le_bytes();
        for (slot, byte) in config.iter_mut().zip(target.into_iter().chain(actual)) {
            *slot = byte;
        }
        config
    }
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u16 {
        5
    }

    fn features(&self) -> u64 {
        1 << F_STATS | 1 << F_DEFLATE_ON_OOM | 1 << F_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, out: &mut [u8]) {
        let config = self.config();
        for (at, byte) in (offset..).zip(out) {
            *byte = usize::try_from(at).ok().and_then(|at| config.get(at)).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(bytes)) = (offset, <[u8; 4]>::try_from(data)) {
            self.inner().actual_pages.store(u32::from_le_bytes(bytes), Ordering::Release);
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let mut roles = vec![Role::Inflate, Role::Deflate];
        roles.extend(activation.has_feature(F_STATS).then_some(Role::Stats));
        roles.extend(activation.has_feature(F_REPORTING).then_some(Role::Reporting));
        let poller = Poller::new().map_err(ActivateError::io("make an epoll"))?;
        let mut rings = Vec::with_capacity(roles.len());
        for (index, role) in (0u16..).zip(roles) {
            // What a driver leaves out it does not use; without the first two there is no balloon.
            let ring = match activation.take_queue(index) {
                Err(_) if index >= 2 => continue,
                other => other?,
            };
            poller.add_event(&ring.kick, u64::from(index)).map_err(ActivateError::io("watch a queue"))?;
            rings.push((role, ring));
        }
        poller
            .add_event(&self.inner().wanted, worker::WANTED)
            .map_err(ActivateError::io("watch an eventfd"))?;
        *lock(&self.inner().interrupt) = Some(activation.config_interrupt.clone());
        let engine = Engine::new(rings, self.handle.clone(), activation.memory.clone());
        let failure = activation.failure;
        let worker = Worker::spawn(Kind::Device, "balloon".to_owned(), poller, move |poller| {
            engine.run(&poller, &failure)
        })?;
        self.workers.push(worker);
        Ok(())
    }

    fn reset(&mut self) {
        *lock(&self.inner().interrupt) = None;
        join_all(&mut self.workers);
        self.inner().actual_pages.store(0, Ordering::Release);
    }

    fn suspend(&mut self) -> Result<Vec<ActiveQueue>, SuspendError> {
        *lock(&self.inner().interrupt) = None;
        Ok(finish_all(&mut self.workers)?.into_iter().flatten().collect())
    }

    /// The target and what is in the balloon: the first eight bytes of the configuration.
    fn save(&self) -> DeviceState {
        let config = self.config();
        DeviceState::new(STATE_VERSION, config.get(..STATE_BYTES).unwrap_or_default())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        if let Some([a, b, c, d, e, f, g, h]) = state.fixed::<STATE_BYTES>(STATE_VERSION)? {
            self.inner().target_pages.store(u32::from_le_bytes([a, b, c, d]), Ordering::Release);
            self.inner().actual_pages.store(u32::from_le_bytes([e, f, g, h]), Ordering::Release);
        }
        Ok(())
    }
}

impl Drop for Balloon {
    fn drop(&mut self) {
        self.reset();
    }
}
