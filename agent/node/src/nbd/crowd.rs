//! Whether clients come so fast that their handshakes' thread works in turns: it is woken once for all that happened in
//! [`TURN`] instead of once for each packet. What a wake-up takes from a guest's processor is then taken a hundred times a
//! second, however many come; a handshake takes a few turns longer.

use std::{
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// As many in one [`WINDOW`] are a crowd.
const CROWD: u32 = 20;
const WINDOW: Duration = Duration::from_millis(200);
/// How long what comes is gathered.
const TURN: Duration = Duration::from_millis(10);

/// See the head of this file.
#[derive(Debug, Default)]
pub(super) struct Crowd {
    windows: Mutex<Windows>,
    /// Turns that were waited for.
    turns: AtomicU64,
}

#[derive(Debug, Default)]
struct Windows {
    since: Option<Instant>,
    /// Who came in this window.
    now: u32,
    /// And in the one before.
    before: u32,
}

impl Windows {
    fn at(&mut self, now: Instant) {
        let age = self.since.map_or(Duration::MAX, |since| now.saturating_duration_since(since));
        if age < WINDOW {
            return;
        }
        // Nobody for a whole window ends it.
        self.before = if age < WINDOW * 2 { self.now } else { 0 };
        (self.since, self.now) = (Some(now), 0);
    }
}

impl Crowd {
    fn windows<T>(&self, look: impl FnOnce(&mut Windows) -> T) -> T {
        // Three numbers, replaced together.
        look(&mut self.windows.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A client was accepted.
    pub(super) fn came(&self, now: Instant) {
        self.windows(|windows| {
            windows.at(now);
            windows.now = windows.now.saturating_add(1);
        });
    }

    fn is_there(&self, now: Instant) -> bool {
        self.windows(|windows| {
            windows.at(now);
            windows.now.max(windows.before) >= CROWD
        })
    }

    /// Before the thread waits: gathers what comes, in a crowd.
    pub(super) fn gather(&self) {
        if self.is_there(Instant::now()) {
            self.turns.fetch_add(1, Ordering::Relaxed);
            thread::sleep(TURN);
        }
    }

    /// How often it has gathered.
    #[cfg(test)]
    pub(super) fn turns(&self) -> u64 {
        self.turns.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowd_is_there_while_it_comes_and_for_a_window_after() {
        let (crowd, start) = (Crowd::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        for ms in 0..u64::from(CROWD) - 1 {
            crowd.came(at(ms));
            assert!(!crowd.is_there(at(ms)), "a few are none");
        }
        crowd.came(at(100));
        assert!(crowd.is_there(at(100)));
        assert!(crowd.is_there(at(399)), "a window later, still");
        assert!(!crowd.is_there(at(400 + 200)), "nobody came for a window");
        for ms in 0..CROWD {
            crowd.came(at(10_000 + 100 * u64::from(ms)));
            assert!(!crowd.is_there(at(10_000 + 100 * u64::from(ms))), "ten a second are none");
        }
    }
}
