//! The guest whose memory changes in all ways, for snapshots: its disk is read into places of its memory, it writes pages itself,
//! and a part of its memory is full and stays as it is.
//!
//! Each round reads one of 64 blocks, which all differ, into one of many buffers that the guest never looks at, and writes one word into
//! one of many pages. It prints `churn: N` each hundred rounds, and then sleeps a little.

use crate::blk::{self, Disk};
use crate::mem::Dma;
use crate::modes;
use crate::suite::{Failure, Machine};
use crate::virtio::Result;
use crate::{clock, println};

const BLOCK: u64 = 4096;
const BLOCKS: u64 = 64;
/// Each buffer is two pages.
const BUFFERS: u64 = 1024;
const PAGES: u64 = 1024;
const STILL_BYTES: u64 = 16 << 20;
const ROUNDS_A_LINE: u64 = 100;
const SLEEP_NS: u64 = 20_000_000;

/// A sequence that comes back late enough (Numerical Recipes).
fn next(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *seed >> 33
}

fn rounds(machine: &mut Machine) -> core::result::Result<(), Failure> {
    let mut disk = Disk::open(machine.bus()?.virtio(2).first().copied().ok_or("no disk")?, 16)?;
    Dma::new(STILL_BYTES).fill(0x5a);
    let (buffers, pages) = (Dma::new(BUFFERS * 2 * BLOCK), Dma::new(PAGES * BLOCK));
    fill_disk(&mut disk)?;
    let (mut seed, mut count) = (1, 0u64);
    loop {
        for _ in 0..ROUNDS_A_LINE {
            count += 1;
            let (block, buffer, page) =
                (next(&mut seed) % BLOCKS, next(&mut seed) % BUFFERS, next(&mut seed) % PAGES);
            disk.read(block * BLOCK / 512, buffers.part(buffer * 2 * BLOCK, BLOCK))?;
            pages.set64(page * BLOCK + count % 512 * 8, count);
        }
        println!("churn: {count}");
        modes::sleep_until(clock::now_ns() + SLEEP_NS);
    }
}

fn fill_disk(disk: &mut Disk) -> Result<()> {
    let from = Dma::new(BLOCK);
    for block in 0..BLOCKS {
        blk::pattern(from, 0, block * BLOCK / 512, 7);
        disk.write(block * BLOCK / 512, from)?;
    }
    Ok(())
}

/// Changes memory until something is wrong; says what.
pub fn run(machine: &mut Machine) {
    match rounds(machine) {
        Ok(()) => {}
        Err(Failure::Failed(reason) | Failure::Skipped(reason)) => println!("churn: failed {reason}"),
    }
}
