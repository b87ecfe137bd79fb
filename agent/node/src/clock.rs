//! The two clocks of a node: the wall's, for people, and a steady one, by which everything ends that ends after a while.
//!
//! ```text
//!                boot of the host          seriod dies, starts            the host boots again
//!   wall    ─────────┬──────── jumps ─────────────┬────── jumps ─────────────────┬────────
//!   steady  ─────────┴──── CLOCK_BOOTTIME + what the first seriod of the boot ───┴── never before what it was
//!                          took the wall to show (kept in the store)
//! ```
//! Owns: what time it is. Somebody who sets the host's clock, or a clock that is set when the network comes, ends no promise
//! too early and keeps none for ever: an export's hour is an hour, over restarts of seriod too. Never: what follows from it.
//! Invariants: the steady clock never goes back and never jumps while the host is up; time in which the host is off passes as
//! the wall clock says, but never backwards.

use serio_store::record::{ClockRecord, Millis};

/// An instant, by both clocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moment {
    /// Milliseconds since 1970, as far as the host knows: for people. It may jump either way.
    pub wall: Millis,
    /// Milliseconds by the steady clock: for all that lasts for a while.
    pub steady: Millis,
}

/// What a host shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    /// Of its boot.
    pub boot_id: String,
    /// Milliseconds since then, sleep included.
    pub boot_ms: i64,
    /// Milliseconds since 1970.
    pub wall: Millis,
}

impl Reading {
    /// Of this host, now.
    #[must_use]
    pub fn now() -> Self {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self { boot_id: boot_id.trim().to_owned(), boot_ms: crate::sys::since_boot_ms(), wall: wall() }
    }
}

/// See the head of this file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Clock {
    /// What the steady clock showed when the host booted.
    steady_at_boot: i64,
}

impl Clock {
    /// Goes on from what an earlier seriod kept; gives what the next one goes on from.
    #[must_use]
    pub fn go_on(kept: Option<&ClockRecord>, now: &Reading) -> (Self, ClockRecord) {
        let steady = match kept {
            None => now.wall.0,
            // A clock that went back is another boot's, whatever it is called.
            Some(kept) if kept.boot_id == now.boot_id && kept.boot_ms <= now.boot_ms => {
                kept.steady.0.saturating_add(now.boot_ms.saturating_sub(kept.boot_ms))
            }
            Some(kept) => now.wall.0.max(kept.steady.0),
        };
        let record =
            ClockRecord { boot_id: now.boot_id.clone(), boot_ms: now.boot_ms, steady: Millis(steady) };
        (Self { steady_at_boot: steady.saturating_sub(now.boot_ms) }, record)
    }

    /// The instant that a reading of the same boot means.
    #[must_use]
    pub fn at(&self, boot_ms: i64, wall: Millis) -> Moment {
        Moment { wall, steady: Millis(self.steady_at_boot.saturating_add(boot_ms)) }
    }

    /// Now.
    #[must_use]
    pub fn now(&self) -> Moment {
        self.at(crate::sys::since_boot_ms(), wall())
    }
}

/// Milliseconds since 1970, as far as the host knows.
#[must_use]
pub fn wall() -> Millis {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Millis(i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(boot: &str, boot_ms: i64, wall: i64) -> Reading {
        Reading { boot_id: boot.to_owned(), boot_ms, wall: Millis(wall) }
    }

    #[test]
    fn a_restart_of_seriod_goes_on_whatever_the_wall_shows() {
        let (first, kept) = Clock::go_on(None, &reading("a", 500, 1_000_000));
        assert_eq!(first.at(500, Millis(1_000_000)).steady, Millis(1_000_000));
        for wall in [0, 1_000_000, i64::MAX] {
            let (next, again) = Clock::go_on(Some(&kept), &reading("a", 700, wall));
            assert_eq!(next, first);
            assert_eq!((again.steady, again.boot_ms), (Millis(1_000_200), 700));
            assert_eq!(next.at(800, Millis(wall)), Moment { wall: Millis(wall), steady: Millis(1_000_300) });
        }
    }

    #[test]
    fn another_boot_begins_with_the_wall_but_never_goes_back() {
        let (_, kept) = Clock::go_on(None, &reading("a", 500, 1_000_000));
        let (later, _) = Clock::go_on(Some(&kept), &reading("b", 10, 3_000_000));
        assert_eq!(later.at(10, Millis(0)).steady, Millis(3_000_000));
        // A host whose battery is flat starts in 1970.
        let (flat, kept) = Clock::go_on(Some(&kept), &reading("b", 10, 0));
        assert_eq!(flat.at(15, Millis(0)).steady, Millis(1_000_005));
        // One that says it is the same boot, and is younger, is not.
        let (younger, _) = Clock::go_on(Some(&kept), &reading("b", 1, 5));
        assert_eq!(younger.at(1, Millis(0)).steady, Millis(1_000_000));
    }

    #[test]
    fn this_host_has_both() {
        let (clock, _) = Clock::go_on(None, &Reading::now());
        let (one, two) = (clock.now(), clock.now());
        assert!(one.steady <= two.steady && one.wall.0 > 0, "{one:?} {two:?}");
        assert!((one.wall.0 - one.steady.0).abs() < 60_000, "{one:?}");
    }
}
