//! Buckets with a clock of the tests' own, and one limiter with the real one.

use proptest::prelude::*;

use super::*;

const MS_NS: u64 = 1_000_000;

fn bucket(per_second: u64, burst: u64) -> Bucket {
    let bucket = Bucket::default();
    bucket.set(Rate { per_second, burst }, 0);
    bucket
}

fn charge(limiter: &Limiter, bytes: u64) {
    limiter.charge(limiter.now_ns(), bytes);
}

#[test]
fn no_rate_is_no_limit() {
    let burst_of_nothing = Limits { bytes: Rate { per_second: 0, burst: 9 }, ..Limits::default() };
    for limits in [Limits::default(), burst_of_nothing] {
        let limiter = Limiter::new(limits);
        charge(&limiter, u64::MAX);
        assert!(limiter.wait().is_zero());
    }
}

#[test]
fn limits_change_at_once_and_the_same_again_fills_no_bucket() {
    let slow = Limits { bytes: Rate { per_second: 1, burst: 1 }, ..Limits::default() };
    let limiter = Limiter::new(slow);
    charge(&limiter, 1000);
    assert!(limiter.wait() > Duration::from_secs(900));
    limiter.set(slow);
    assert!(limiter.wait() > Duration::from_secs(900), "a burst by saying the same again");
    limiter.set(Limits { operations: Rate { per_second: 1, burst: 1 }, ..slow });
    assert!(limiter.wait() > Duration::from_secs(900), "a burst of bytes by a limit of operations");
    limiter.set(Limits { bytes: Rate { per_second: 1 << 30, burst: 0 }, ..Limits::default() });
    assert!(limiter.wait().is_zero());
    limiter.set(slow);
    charge(&limiter, 1000);
    limiter.set(Limits::default());
    assert!(limiter.wait().is_zero());
}

#[test]
fn a_burst_passes_at_once_and_then_the_rate_holds() {
    let bucket = bucket(1000, 50);
    for _ in 0..50 {
        assert_eq!(bucket.wait(0), Duration::ZERO);
        bucket.take(0, 1);
    }
    assert_eq!(bucket.wait(0), Duration::from_millis(1));
    assert_eq!(bucket.wait(MS_NS), Duration::ZERO);
    bucket.take(MS_NS, 1);
    // A rest of an hour fills it to the burst and no further.
    let hour = 3_600_000 * MS_NS;
    for _ in 0..50 {
        assert_eq!(bucket.wait(hour), Duration::ZERO);
        bucket.take(hour, 1);
    }
    assert!(!bucket.wait(hour).is_zero());
}

#[test]
fn a_request_larger_than_the_burst_passes_and_is_paid_for_afterwards() {
    let bucket = bucket(1 << 20, 4096);
    assert_eq!(bucket.wait(0), Duration::ZERO);
    bucket.take(0, 1 << 20);
    let wait = bucket.wait(0);
    assert!(wait > Duration::from_millis(990) && wait < Duration::from_millis(1010), "{wait:?}");
}

#[test]
fn a_clock_that_stands_still_or_goes_back_gives_nothing() {
    let bucket = bucket(10, 1);
    assert_eq!(bucket.wait(5 * MS_NS), Duration::ZERO);
    bucket.take(5 * MS_NS, 1);
    assert!(!bucket.wait(5 * MS_NS).is_zero());
    assert!(!bucket.wait(0).is_zero());
    assert_eq!(bucket.wait(105 * MS_NS), Duration::ZERO);
}

#[test]
fn the_slower_of_the_two_limits_decides() {
    let limiter = Limiter::new(Limits {
        bytes: Rate { per_second: 1_000_000_000, burst: 1_000_000_000 },
        operations: Rate { per_second: 2, burst: 1 },
    });
    assert!(limiter.wait().is_zero());
    charge(&limiter, 1);
    assert!(limiter.wait() > Duration::from_millis(100));
}

/// The queues of a device take from the same bucket at once: nothing that they take is forgotten.
#[test]
fn threads_share_a_bucket_and_lose_nothing() {
    const TAKES: u64 = 200_000;
    let (bucket, start) = (bucket(1000, 1), std::sync::Barrier::new(4));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                start.wait();
                (0..TAKES).for_each(|_| bucket.take(0, 1));
            });
        }
    });
    assert_eq!(bucket.wait(0), Duration::from_secs(4 * TAKES / 1000));
}

proptest! {
    /// Whoever asks first and waits as told never gets more than burst and rate allow, and not much less.
    #[test]
    fn the_rate_holds_over_time(
        per_second in 1u64..10_000_000_000,
        burst in 1u64..1 << 30,
        sizes in prop::collection::vec(0u64..1 << 22, 1..200),
    ) {
        let bucket = bucket(per_second, burst);
        let (mut now_ns, mut sum) = (0u64, 0u128);
        let mut last = 0;
        for size in sizes {
            let wait = bucket.wait(now_ns);
            now_ns += u64::try_from(wait.as_nanos()).expect("short");
            prop_assert!(bucket.wait(now_ns).is_zero());
            bucket.take(now_ns, size);
            sum += u128::from(size);
            last = size;
        }
        // What came before the last request was within the burst and the time that passed.
        let allowed = u128::from(burst) + u128::from(now_ns) * u128::from(per_second) / SECOND_NS + 1;
        prop_assert!(sum - u128::from(last) <= allowed, "{sum} - {last} > {allowed}");
    }

    #[test]
    fn nothing_overflows(rate in any::<u64>(), burst in any::<u64>(), sizes in prop::collection::vec(any::<u64>(), 1..50), step in any::<u64>()) {
        let bucket = bucket(rate, burst);
        for (at, size) in (0u64..).zip(sizes) {
            bucket.wait(at.saturating_mul(step));
            bucket.take(at.saturating_mul(step), size);
        }
    }
}
