//! A watchdog timer: a guest that stops petting it is reset, or its VM ends.
//!
//! Found through the ACPI table WDAT, for which stock Linux kernels have a driver (`wdat_wdt`) whatever else they lack: it is
//! the least hardware that they all know. Two ports, 32 bits each:
//!
//! ```text
//!   0x608 control   write 1 start · 2 pet · 0 stop · 4 forget       read bit 0: running, bit 1: it ran out before this boot
//!   0x60c count     write how many periods of 100 ms it runs         read how many are left
//! ```
//!
//! One thread, made when the guest first starts it; it sleeps until the time is over. Time during which the vcpus are
//! paused does not count: a pause at the end gives a whole new turn.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serio_sandbox::{Kind, threads};

use super::vcpu::{GateState, Vcpus};
use crate::end::{End, EndSlot};

/// A period, as the WDAT says.
pub(crate) const PERIOD_MS: u32 = 100;
/// Periods that may be asked for: one second to about 100 minutes.
pub(crate) const COUNT_MIN: u32 = 10;
pub(crate) const COUNT_MAX: u32 = 0xffff;
/// What the control register takes.
pub(crate) const STOP: u32 = 0;
pub(crate) const START: u32 = 1;
pub(crate) const PET: u32 = 2;
pub(crate) const FORGET: u32 = 4;
/// What it shows.
pub(crate) const RUNNING: u32 = 1;
pub(crate) const RAN_OUT: u32 = 2;

const STACK_BYTES: usize = 64 * 1024;
/// Until the guest says otherwise: 30 s.
const COUNT_DEFAULT: u32 = 300;

/// What happens to a guest that does not pet it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum WatchdogAction {
    /// As if the guest had reset itself.
    #[default]
    Reset,
    /// The VM ends, with that reason.
    End,
}

/// A saved watchdog.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct WatchdogState {
    /// Periods of a turn.
    #[prost(uint32, tag = "1")]
    pub count: u32,
    /// Until it runs out; absent: it is stopped.
    #[prost(uint32, optional, tag = "2")]
    pub left_ms: Option<u32>,
    /// It ran out before this boot.
    #[prost(bool, tag = "3")]
    pub ran_out: bool,
}

/// The timer. Ends its thread when dropped.
pub(super) struct Watchdog {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    timer: Mutex<Timer>,
    changed: Condvar,
    action: WatchdogAction,
    end: Arc<EndSlot>,
    vcpus: Vcpus,
}

struct Timer {
    count: u32,
    /// When it runs out; `None`: it is stopped.
    deadline: Option<Instant>,
    ran_out: bool,
    over: bool,
}

fn lock(timer: &Mutex<Timer>) -> MutexGuard<'_, Timer> {
    timer.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Timer {
    fn turn(&self) -> Duration {
        Duration::from_millis(u64::from(self.count) * u64::from(PERIOD_MS))
    }
}

impl Watchdog {
    pub(super) fn new(action: WatchdogAction, end: Arc<EndSlot>, vcpus: Vcpus) -> Watchdog {
        let timer = Timer { count: COUNT_DEFAULT, deadline: None, ran_out: false, over: false };
        let shared = Shared { timer: Mutex::new(timer), changed: Condvar::new(), action, end, vcpus };
        Watchdog { shared: Arc::new(shared), thread: Mutex::default() }
    }

    /// Goes on where another one was saved: a guest that had started it is still watched.
    pub(super) fn restore(&self, saved: &WatchdogState) {
        let mut timer = lock(&self.shared.timer);
        timer.count = saved.count.clamp(COUNT_MIN, COUNT_MAX);
        timer.ran_out = saved.ran_out;
        let left = saved.left_ms.map(|ms| Duration::from_millis(ms.into()).min(timer.turn()));
        timer.deadline = left.map(|left| Instant::now() + left);
        drop(timer);
        if saved.left_ms.is_some() {
            self.begin();
        }
    }

    /// For [`Watchdog::restore`].
    pub(super) fn save(&self) -> WatchdogState {
        let timer = lock(&self.shared.timer);
        let left = timer.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        WatchdogState {
            count: timer.count,
            left_ms: left.map(|left| u32::try_from(left.as_millis()).unwrap_or(u32::MAX)),
            ran_out: timer.ran_out,
        }
    }

    pub(super) fn read_control(&self) -> u32 {
        let timer = lock(&self.shared.timer);
        let bit = |set, bit| if set { bit } else { 0 };
        bit(timer.deadline.is_some(), RUNNING) | bit(timer.ran_out, RAN_OUT)
    }

    pub(super) fn read_count(&self) -> u32 {
        let timer = lock(&self.shared.timer);
        let left = timer.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        left.map_or(timer.count, |left| u32::try_from(left.as_millis()).unwrap_or(u32::MAX) / PERIOD_MS)
    }

    pub(super) fn write_count(&self, count: u32) {
        let mut timer = lock(&self.shared.timer);
        timer.count = count.clamp(COUNT_MIN, COUNT_MAX);
        if timer.deadline.is_some() {
            timer.deadline = Some(Instant::now() + timer.turn());
        }
        self.shared.changed.notify_all();
    }

    pub(super) fn write_control(&self, value: u32) {
        let mut timer = lock(&self.shared.timer);
        match value {
            START => timer.deadline = Some(Instant::now() + timer.turn()),
            PET if timer.deadline.is_some() => timer.deadline = Some(Instant::now() + timer.turn()),
            STOP => timer.deadline = None,
            FORGET => timer.ran_out = false,
            _ => {}
        }
        drop(timer);
        if value == START {
            self.begin();
        }
        // A pet needs no waking: the thread looks again when the old time is over.
        if value != PET {
            self.shared.changed.notify_all();
        }
    }

    /// Makes the thread, once. Without one (the host has no room) the watchdog does not bite, which the log says.
    fn begin(&self) {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_some() {
            return;
        }
        let shared = self.shared.clone();
        match threads::spawn(Kind::Device, "watchdog".to_owned(), STACK_BYTES, move || shared.watch()) {
            Ok(handle) => *thread = Some(handle),
            Err(error) => {
                eprintln!("serio-vmm: the guest's watchdog has no thread and will not bite: {error}")
            }
        }
    }
}

impl Shared {
    fn watch(&self) {
        let mut timer = lock(&self.timer);
        while !timer.over {
            let Some(deadline) = timer.deadline else {
                timer = self.changed.wait(timer).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if !left.is_zero() {
                timer = self.changed.wait_timeout(timer, left).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            if self.vcpus.gate.get() == GateState::Paused {
                timer.deadline = Some(Instant::now() + timer.turn());
                continue;
            }
            timer.deadline = None;
            timer.ran_out = true;
            let what = format!("the guest did not pet its watchdog for {} s", timer.turn().as_secs());
            drop(timer);
            self.bite(what);
            return;
        }
    }

    fn bite(&self, what: String) {
        eprintln!("serio-vmm: {what}");
        self.end.set(match self.action {
            WatchdogAction::Reset => End::Reset,
            WatchdogAction::End => End::GuestError(what),
        });
        self.vcpus.set(GateState::Over);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        lock(&self.shared.timer).over = true;
        self.shared.changed.notify_all();
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // Its panic would be a mistake of ours, and the VM is over.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::vcpu::Gate;
    use super::*;

    fn watchdog(action: WatchdogAction) -> (Watchdog, Arc<EndSlot>, Vcpus) {
        let end = Arc::new(EndSlot::new().expect("an eventfd"));
        let vcpus =
            Vcpus { gate: Arc::new(Gate::new(GateState::Running)), kicks: Arc::new([]), exits: Arc::new([]) };
        (Watchdog::new(action, end.clone(), vcpus.clone()), end, vcpus)
    }

    /// As if so much time had gone by.
    fn expire(watchdog: &Watchdog) {
        lock(&watchdog.shared.timer).deadline = Some(Instant::now());
        watchdog.shared.changed.notify_all();
    }

    #[test]
    fn who_does_not_pet_it_is_bitten() {
        for action in [WatchdogAction::Reset, WatchdogAction::End] {
            let (watchdog, end, vcpus) = watchdog(action);
            watchdog.write_count(20);
            watchdog.write_control(START);
            assert_eq!(watchdog.read_control(), RUNNING);
            assert!((18..=20).contains(&watchdog.read_count()));
            expire(&watchdog);
            while !end.is_set() {
                std::thread::yield_now();
            }
            match (action, end.get().expect("set")) {
                (WatchdogAction::Reset, End::Reset) => {}
                (WatchdogAction::End, End::GuestError(why)) => {
                    assert!(why.contains("watchdog for 2 s"), "{why}")
                }
                other => panic!("{other:?}"),
            }
            while vcpus.gate.get() != GateState::Over {
                std::thread::yield_now();
            }
            assert_eq!(watchdog.read_control(), RAN_OUT);
            watchdog.write_control(FORGET);
            assert_eq!(watchdog.read_control(), 0);
        }
    }

    #[test]
    fn a_restored_one_goes_on() {
        let (first, _, _) = watchdog(WatchdogAction::End);
        assert_eq!(first.save(), WatchdogState { count: COUNT_DEFAULT, left_ms: None, ran_out: false });
        first.write_count(50);
        first.write_control(START);
        let saved = first.save();
        assert!(saved.left_ms.is_some_and(|ms| (4900..=5000).contains(&ms)), "{saved:?}");
        first.write_control(STOP);
        let (second, end, _) = watchdog(WatchdogAction::End);
        second.restore(&saved);
        assert_eq!(second.read_control(), RUNNING);
        assert!((48..=50).contains(&second.read_count()));
        expire(&second);
        while !end.is_set() {
            std::thread::yield_now();
        }
        // Anybody's: bounded, and no panic.
        let (third, _, _) = watchdog(WatchdogAction::End);
        third.restore(&WatchdogState { count: u32::MAX, left_ms: Some(u32::MAX), ran_out: true });
        assert_eq!((third.read_count() <= COUNT_MAX, third.read_control()), (true, RUNNING | RAN_OUT));
    }

    #[test]
    fn stopped_petted_or_paused_it_does_not_bite() {
        let (watchdog, end, vcpus) = watchdog(WatchdogAction::End);
        watchdog.write_control(PET);
        assert_eq!(watchdog.read_control(), 0, "a pet does not start it");
        for count in [0, u32::MAX] {
            watchdog.write_count(count);
            assert!((COUNT_MIN..=COUNT_MAX).contains(&watchdog.read_count()));
        }
        watchdog.write_control(START);
        vcpus.set(GateState::Paused);
        expire(&watchdog);
        while watchdog.read_count() < COUNT_MAX / 2 {
            std::thread::yield_now();
        }
        watchdog.write_control(STOP);
        expire(&watchdog);
        watchdog.write_control(STOP);
        drop(watchdog);
        assert!(!end.is_set());
    }
}
