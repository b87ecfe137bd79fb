//! Merges of layers in volumes that a guest uses: a thread a merge, paced, that others ask how far it is.
//!
//! ```text
//!   MergeLayer ──► thread "merge":  step ─► pause for the pace ─► step ─► … ─► done | failed | cancelled
//!   MergeQuery ──► the state of the last one of that volume; may cancel it
//! ```
//!
//! - One merge a volume. It is running, done, failed (with an error), or none of these: cancelled. What was asked last is remembered until the VM ends, so that whoever lost the answer may ask.
//! - Asked again while it runs, the same merge goes on, at the pace that was asked last; once it is over it begins
//!   again where it was. So `seriod` may be killed at any time and just ask again.
//! - A merge that is cut off by the end of the process costs nothing: see `serio_volume`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serio_control::message::{Body, Code, MergeLayer, MergeQuery, MergeState};
use serio_sandbox::{Kind, threads};
use serio_volume::{Merge, MergeError, MergeProgress};

use super::requests::{failed, no_volume};
use crate::devices::Devices;
use crate::end::chain;

/// Bytes copied between two looks at the clock. With a pace a step is shorter: an eighth of a second's worth.
const STEP_BYTES_MAX: u64 = 8 << 20;
const STEP_BYTES_MIN: u64 = 64 << 10;
/// A last step that the guest's I/O kept waiting is tried again so many times, after this pause.
const BUSY_TRIES: u32 = 5;
const BUSY_PAUSE: Duration = Duration::from_secs(1);
/// How long a request waits for a merge that was cancelled.
const STOP: Duration = Duration::from_secs(5);
/// How long the end of the VM waits for merges to notice.
const ABANDON: Duration = Duration::from_secs(2);
const STACK_BYTES: usize = 256 * 1024;

/// The last merge of each volume.
#[derive(Default)]
pub(super) struct Merges {
    jobs: Mutex<BTreeMap<String, Arc<Job>>>,
}

struct Job {
    volume_id: String,
    bytes_per_s: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    shown: MergeState,
    cancel: bool,
}

/// Why a merge does not go on.
enum Stopped {
    Cancelled,
    Failed(MergeError),
}

fn refused(error: &MergeError) -> (Code, &'static str) {
    match error {
        MergeError::NotSealed(_) => (Code::Invalid, "layer"),
        MergeError::Raw | MergeError::ReadOnly => (Code::Precondition, "volume_id"),
        MergeError::Io { .. } => (Code::Io, ""),
        _ => (Code::Precondition, ""),
    }
}

impl Merges {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Job>>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether one of that volume is under way.
    pub(super) fn is_busy(&self, volume_id: &str) -> bool {
        self.lock().get(volume_id).is_some_and(|job| job.lock().shown.running)
    }

    /// Begins a merge, or goes on with it; answers with its state when it has begun.
    pub(super) fn begin(&self, devices: &Devices, request: &MergeLayer) -> Body {
        let Some(disk) = devices.disk(&request.volume_id) else { return no_volume(&request.volume_id) };
        let mut jobs = self.lock();
        if let Some(job) = jobs.get(&request.volume_id) {
            let state = job.lock();
            // One that is about to stop is begun anew.
            let ending = |state: &mut State| state.shown.running && state.cancel;
            let waited = job.changed.wait_timeout_while(state, STOP, ending);
            let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if state.shown.running && state.shown.layer == request.layer && !state.cancel {
                job.bytes_per_s.store(request.bytes_per_s, Ordering::Relaxed);
                return Body::MergeState(state.shown.clone());
            }
            if state.shown.running {
                let why =
                    format!("layer {} is being merged: wait for its end, or cancel it", state.shown.layer);
                return failed(Code::Precondition, "layer", why);
            }
        }
        let merge = match disk.volume.merge(request.layer) {
            Ok(merge) => merge,
            Err(error) => {
                let (code, field) = refused(&error);
                return failed(code, field, format!("volume {}: {}", request.volume_id, chain(&error)));
            }
        };
        let total_bytes = disk.volume.size_bytes();
        let shown = MergeState { layer: request.layer, running: true, total_bytes, ..MergeState::default() };
        let job = Arc::new(Job {
            volume_id: request.volume_id.clone(),
            bytes_per_s: AtomicU64::new(request.bytes_per_s),
            state: Mutex::new(State { shown: shown.clone(), cancel: false }),
            changed: Condvar::new(),
        });
        let runs = job.clone();
        match threads::spawn(Kind::Merge, "merge", STACK_BYTES, move || runs.run(merge)) {
            Ok(_) => {
                jobs.insert(request.volume_id.clone(), job);
                Body::MergeState(shown)
            }
            Err(error) => failed(Code::Exhausted, "", format!("a thread could not be started: {error}")),
        }
    }

    /// How far the last merge of a volume is. A volume without one has a state of zeros.
    pub(super) fn query(&self, devices: &Devices, request: &MergeQuery) -> Body {
        if devices.disk(&request.volume_id).is_none() {
            return no_volume(&request.volume_id);
        }
        let job = self.lock().get(&request.volume_id).cloned();
        let Some(job) = job else { return Body::MergeState(MergeState::default()) };
        let mut state = job.lock();
        if request.cancel {
            state.cancel = true;
            job.changed.notify_all();
        }
        Body::MergeState(state.shown.clone())
    }

    /// The VM is at its end: cancels all, and waits a moment for them.
    pub(super) fn abandon(&self) {
        let jobs: Vec<Arc<Job>> = self.lock().values().cloned().collect();
        for job in &jobs {
            job.lock().cancel = true;
            job.changed.notify_all();
        }
        let deadline = Instant::now() + ABANDON;
        for job in &jobs {
            let left = deadline.saturating_duration_since(Instant::now());
            let _ = job.changed.wait_timeout_while(job.lock(), left, |state| state.shown.running);
        }
    }
}

impl Job {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread.
    fn run(&self, merge: Merge) {
        let result = self.steps(merge);
        let mut state = self.lock();
        state.shown.running = false;
        match result {
            Ok(()) => state.shown.done = true,
            // Neither done nor wrong: it may be asked again.
            Err(Stopped::Cancelled) => {}
            Err(Stopped::Failed(error)) => {
                let layer = state.shown.layer;
                state.shown.error = chain(&error);
                let why = &state.shown.error;
                super::say(format_args!(
                    "volume {}: the merge of layer {layer} failed: {why}",
                    self.volume_id
                ));
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    fn steps(&self, mut merge: Merge) -> Result<(), Stopped> {
        let (mut copied_bytes, mut busy) = (0, 0u32);
        loop {
            let begun = Instant::now();
            let pace = self.bytes_per_s.load(Ordering::Relaxed);
            let progress = match merge.step(step_bytes(pace)) {
                Ok(progress) => progress,
                Err(MergeError::NotDrained) if busy < BUSY_TRIES => {
                    busy = busy.saturating_add(1);
                    self.pause(BUSY_PAUSE)?;
                    continue;
                }
                Err(error) => return Err(Stopped::Failed(error)),
            };
            self.show(&progress);
            if progress.done {
                return Ok(());
            }
            let copied = progress.copied_bytes.saturating_sub(copied_bytes);
            copied_bytes = progress.copied_bytes;
            self.pause(time_for(copied, pace).saturating_sub(begun.elapsed()))?;
        }
    }

    fn show(&self, progress: &MergeProgress) {
        let mut state = self.lock();
        state.shown.done_bytes = progress.done_bytes;
        state.shown.total_bytes = progress.total_bytes;
        state.shown.stays = progress.stays;
    }

    /// Waits so long, unless it is cancelled.
    fn pause(&self, pause: Duration) -> Result<(), Stopped> {
        let state = self.lock();
        let (state, _) = self
            .changed
            .wait_timeout_while(state, pause, |state| !state.cancel)
            .unwrap_or_else(PoisonError::into_inner);
        if state.cancel { Err(Stopped::Cancelled) } else { Ok(()) }
    }
}

fn step_bytes(bytes_per_s: u64) -> u64 {
    match bytes_per_s {
        0 => STEP_BYTES_MAX,
        pace => (pace / 8).clamp(STEP_BYTES_MIN, STEP_BYTES_MAX),
    }
}

/// How long `bytes` take at a pace; no time at all without one.
fn time_for(bytes: u64, bytes_per_s: u64) -> Duration {
    let ns = u128::from(bytes).saturating_mul(1_000_000_000).checked_div(u128::from(bytes_per_s));
    Duration::from_nanos(u64::try_from(ns.unwrap_or(0)).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_is_kept_in_steps_of_an_eighth_of_a_second() {
        assert_eq!((step_bytes(0), time_for(1 << 40, 0)), (STEP_BYTES_MAX, Duration::ZERO));
        assert_eq!((step_bytes(1), time_for(1, 1)), (STEP_BYTES_MIN, Duration::from_secs(1)));
        let pace = 8 << 20;
        assert_eq!(time_for(step_bytes(pace), pace), Duration::from_millis(125));
        assert_eq!(step_bytes(u64::MAX), STEP_BYTES_MAX);
        assert_eq!(time_for(u64::MAX, 1), Duration::from_nanos(u64::MAX));
    }
}
