//! Limits, and errors of the host.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use serio_virtio::testing::Buffer;
use serio_volume::Access;

use super::blk_test::{DATA, Disk};
use super::*;
use crate::limit::{Limits, Rate};

const FLUSH: u64 = 1 << F_FLUSH;

fn limited(limits: Limits) -> (Disk, Arc<Limiter>) {
    let limiter = Limiter::new(limits);
    let kept = limiter.clone();
    (Disk::with(Access::ReadWrite, FLUSH, |blk| blk.with_limiter(kept)), limiter)
}

#[test]
fn operations_are_limited_and_none_is_lost() {
    let operations = Rate { per_second: 100, burst: 5 };
    let (mut disk, _) = limited(Limits { operations, ..Limits::default() });
    let start = Instant::now();
    for _ in 0..25 {
        assert_eq!(disk.run(0, 0, &[Buffer::writable(DATA, 512)]), (0, 513));
    }
    // 5 at once, 20 more at 100 a second; the bucket is a little kinder than the clock.
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(180), "25 requests took {took:?}");
}

#[test]
fn bytes_are_limited_and_a_flush_costs_none() {
    let bytes = Rate { per_second: 100 << 10, burst: 4096 };
    let (mut disk, _) = limited(Limits { bytes, ..Limits::default() });
    let start = Instant::now();
    for _ in 0..100 {
        assert_eq!(disk.run(4, 0, &[]).0, 0);
    }
    let flushes = start.elapsed();
    for _ in 0..4 {
        assert_eq!(disk.run(1, 0, &[Buffer::readable(DATA, 8192)]).0, 0);
    }
    let took = start.elapsed() - flushes;
    assert!(took >= Duration::from_millis(180), "32 KiB at 100 KiB a second took {took:?}");
}

#[test]
fn a_reset_ends_a_disk_that_waits_and_fills_no_bucket() {
    // One request, and the next in an hour.
    let operations = Rate { per_second: 1, burst: 1 };
    let bytes = Rate { per_second: 1, burst: 1 };
    let (mut disk, limiter) = limited(Limits { operations, bytes });
    assert_eq!(disk.run(0, 0, &[Buffer::writable(DATA, 4096)]).0, 0);
    let start = Instant::now();
    disk.blk.reset();
    assert!(start.elapsed() < Duration::from_secs(60), "the reset waited for the limit");
    assert!(limiter.wait() > Duration::from_secs(3600));
}

#[test]
fn an_error_of_the_host_is_an_io_error_and_one_notice() {
    let said = Arc::new(Mutex::new(Vec::new()));
    let sink = said.clone();
    let notices = Notices::new(move |text| sink.lock().unwrap().push(text.to_owned()));
    let counts = DiskCounts::new(1);
    let kept = counts.clone();
    let mut disk = Disk::with(Access::ReadWrite, FLUSH, |blk| blk.with_notices(notices).with_counts(kept));
    assert_eq!(disk.run(0, 0, &[Buffer::writable(DATA, 1024)]).0, 0);
    disk.file.as_file().set_len(0).unwrap();
    for _ in 0..10 {
        assert_eq!(disk.run(0, 0, &[Buffer::writable(DATA, 512)]).0, 1);
    }
    // The guest's own mistakes are no news.
    assert_eq!(disk.run(99, 0, &[]).0, 2);
    let totals = counts.totals();
    assert_eq!(
        (totals.reads.done, totals.reads.bytes, totals.reads.errors, totals.refused),
        (1, 1024, 10, 1)
    );
    assert_eq!(totals.reads.times.buckets.iter().sum::<u64>(), 11);
    let said = said.lock().unwrap();
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains("shorter"), "{said:?}");
}
