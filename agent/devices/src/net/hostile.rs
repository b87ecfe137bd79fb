//! Receive buffers from bytes: a packet never gets more room than was posted, and never gives back what was not.

use serio_virtio::hostile::with_queue;

use super::rx::{Posts, Rules, packet_bytes_max};

/// Posts what a ring made of these bytes offers, and delivers packets into it.
pub fn buffers(data: &[u8]) {
    let first = data.first().copied().unwrap_or(0);
    let rules = Rules { mergeable: first & 1 == 1, packet_bytes_max: packet_bytes_max(first & 2 == 2, 1500) };
    with_queue(data, |memory, queue| {
        let mut posts = Posts::new(rules);
        for byte in data.iter().take(64) {
            if posts.collect(queue).is_err() {
                return;
            }
            if !posts.ready(queue.size()) {
                return;
            }
            let (room, bytes) = posts.room();
            let sum: usize = room.map(|(_, len)| len).sum();
            assert_eq!(sum, bytes, "the segments are not what was counted");
            let len = (usize::from(*byte) * 300).min(bytes);
            if posts.perhaps_cut(len, bytes) {
                continue;
            }
            match posts.deliver(memory, queue, len) {
                Some(Ok(())) => {}
                Some(Err(_)) | None => return,
            }
        }
    });
}
