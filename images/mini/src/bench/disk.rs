//! A disk for `scripts/bench machine`: sequential and random, at depth 1 and 32, each for a while.

use super::Requests;
use crate::blk::{Disk, kind};
use crate::println;
use crate::suite::Machine;
use crate::virtio::Result;

/// Measures the first disk; each cell takes `ms`.
pub fn run(machine: &Machine, ms: u64) -> Result<()> {
    let function =
        machine.bus.as_ref().and_then(|bus| bus.virtio(2).first().copied()).ok_or("there is no disk")?;
    let mut disk = Disk::open(function, 256)?;
    let sectors = disk.sectors;
    let queue = &mut disk.queues[0];
    for depth in [1, 32] {
        let (large, small) = (Requests::new(depth, 256 << 10), Requests::new(depth, 4096));
        // Once without being counted: what is measured lies in the host's cache, and has its blocks.
        if depth == 1 {
            large.sweep(queue, kind::OUT, sectors)?;
        }
        for (name, requests, kind, sequential) in [
            ("seq-read-256k", &large, kind::IN, true),
            ("seq-write-256k", &large, kind::OUT, true),
            ("rand-read-4k", &small, kind::IN, false),
            ("rand-write-4k", &small, kind::OUT, false),
        ] {
            let (done, ns) = requests.measure_for(queue, (kind, sectors, sequential), ms)?;
            println!("bench {name}-{depth} {} op/s", done * 1_000_000_000 / ns.max(1));
        }
    }
    disk.device.reset()
}
