//! Requests to a disk from bytes: what is let through lies on the disk.

use serio_virtio::Chain;
use serio_virtio::hostile::with_queue;

use super::request::{Limits, Request, parse};

/// Parses each chain of a ring made of these bytes.
pub fn requests(data: &[u8]) {
    let size_bytes = data.first().map_or(0, |byte| u64::from(*byte) * 512);
    let limits = Limits { size_bytes, read_only: data.len() % 2 == 1 };
    with_queue(data, |memory, queue| {
        let mut chain = Chain::default();
        while queue.pop(&mut chain).is_ok_and(|some| some) {
            let Ok(parsed) = parse(&mut chain, memory, &limits) else { continue };
            let (range, writes) = match parsed.request {
                Request::Read { offset } => ((offset, chain.writable_len()), false),
                Request::Write { offset } => ((offset, chain.readable_len()), true),
                Request::Discard { offset, len } | Request::WriteZeroes { offset, len, .. } => {
                    ((offset, len), true)
                }
                Request::Flush | Request::GetId | Request::Refused { .. } => continue,
            };
            let end = range.0.checked_add(range.1).expect("a range that was let through does not wrap");
            assert!(end <= size_bytes, "{range:?} of {size_bytes}");
            assert!(!writes || !limits.read_only, "a change of a read-only disk");
        }
    });
}
