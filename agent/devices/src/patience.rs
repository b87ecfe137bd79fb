//! How long a device's thread looks for more work before it sleeps.
//!
//! A thread that sleeps is woken by another processor: by an interrupt to one that has gone idle meanwhile, and before that by a
//! guest that leaves itself to kick. Where requests follow each other closely that is most of what one takes. So a thread that was
//! woken soon after it went to sleep looks a little longer the next time, and one that slept long does not:
//!
//! ```text
//!   idle for less than LOOK_NS_MAX: twice as long, from LOOK_NS_MIN up      for longer: half as long, at last not at all
//!   another took the processor while we looked: not at all, for REST
//! ```
//! As the kernel does for idle vcpus (`halt_poll_ns` in Documentation/virt/kvm/halt-polling.rst). A device without requests costs nothing,
//! and one with a request now and then nothing either; on a host whose processors are all wanted it stops by itself.

use std::hint::spin_loop;
use std::time::{Duration, Instant};

/// Idle for longer than this it is cheaper to sleep.
const LOOK_NS_MAX: u64 = 32_000;
/// The first step.
const LOOK_NS_MIN: u64 = 4_000;
/// Two looks are some 20 ns apart: between these somebody else ran.
const ROBBED: Duration = Duration::from_micros(100);
/// How long it sleeps at once after that.
const REST: Duration = Duration::from_millis(10);

/// Of one thread.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    look_ns: u64,
    /// When there was nothing to do any more.
    idle_since: Option<Instant>,
    rest_until: Option<Instant>,
}

impl Patience {
    /// Asks again and again whether there is something, for as long as that was worth it of late. `true`: there is.
    pub(crate) fn look(&mut self, mut found: impl FnMut() -> bool) -> bool {
        let start = Instant::now();
        self.idle_since = Some(start);
        let patience = Duration::from_nanos(self.look_ns);
        let mut last = start;
        while last.saturating_duration_since(start) < patience {
            if found() {
                return true;
            }
            spin_loop();
            let now = Instant::now();
            if now.saturating_duration_since(last) > ROBBED {
                self.look_ns = 0;
                self.rest_until = Some(now + REST);
                return found();
            }
            last = now;
        }
        false
    }

    /// After a sleep.
    pub(crate) fn woken(&mut self) {
        self.woken_at(Instant::now());
    }

    fn woken_at(&mut self, now: Instant) {
        let Some(since) = self.idle_since.take() else { return };
        if self.rest_until.is_some_and(|until| now < until) {
            return;
        }
        self.rest_until = None;
        let short = now.saturating_duration_since(since) < Duration::from_nanos(LOOK_NS_MAX);
        self.look_ns = match (short, self.look_ns) {
            (true, ns) => ns.saturating_mul(2).clamp(LOOK_NS_MIN, LOOK_NS_MAX),
            (false, ns) if ns / 2 < LOOK_NS_MIN => 0,
            (false, ns) => ns / 2,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sleeps that end at once, or not.
    fn sleeps(patience: &mut Patience, times: u32, length: Duration) {
        for _ in 0..times {
            let now = Instant::now();
            patience.idle_since = Some(now);
            patience.woken_at(now + length);
        }
    }

    #[test]
    fn it_grows_with_short_sleeps_and_is_gone_after_long_ones() {
        let mut patience = Patience::default();
        let mut looks = 0;
        let mut count = || {
            looks += 1;
            false
        };
        assert!(!patience.look(&mut count));
        assert_eq!(looks, 0, "a new one sleeps at once");
        sleeps(&mut patience, 1, Duration::ZERO);
        assert_eq!(patience.look_ns, LOOK_NS_MIN);
        sleeps(&mut patience, 9, Duration::ZERO);
        assert_eq!(patience.look_ns, LOOK_NS_MAX);
        sleeps(&mut patience, 3, Duration::from_millis(1));
        assert_eq!(patience.look_ns, LOOK_NS_MIN);
        sleeps(&mut patience, 1, Duration::from_millis(1));
        assert_eq!(patience.look_ns, 0);
    }

    #[test]
    fn what_comes_is_found_and_what_does_not_is_not_waited_for() {
        let mut patience = Patience { look_ns: u64::MAX, ..Patience::default() };
        let mut asked = 0;
        let coming = || {
            asked += 1;
            asked > 1
        };
        assert!(patience.look(coming));
        let mut patience = Patience { look_ns: LOOK_NS_MAX, ..Patience::default() };
        assert!(!patience.look(|| false));
        assert!(
            patience.idle_since.is_some_and(|since| since.elapsed() >= Duration::from_nanos(LOOK_NS_MAX))
        );
    }

    #[test]
    fn a_processor_that_others_want_is_left_to_them() {
        let mut patience = Patience { look_ns: u64::MAX, ..Patience::default() };
        let mut asked = 0;
        // Stands for another thread that runs on our processor meanwhile.
        let robbed = || {
            asked += 1;
            std::thread::sleep(ROBBED * 2);
            false
        };
        assert!(!patience.look(robbed));
        assert_eq!(asked, 2, "and once more at the end");
        assert!(patience.rest_until.is_some());
        patience.rest_until = Some(Instant::now() + Duration::from_secs(3600));
        sleeps(&mut patience, 1, Duration::ZERO);
        assert_eq!(patience.look_ns, 0, "it rests");
        patience.rest_until = Some(Instant::now());
        sleeps(&mut patience, 1, Duration::ZERO);
        assert_eq!(patience.look_ns, LOOK_NS_MIN);
    }
}
