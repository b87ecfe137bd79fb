//! The guest that others kill: it writes its first disk for ever, and says on the serial port what is safe there.
//!
//! The disk carries a counter. Round N writes a block stamped with N at one of [`PLACES`] positions (`mini.places`) in
//! turn, then the same stamp at position 0, then flushes; only when the flush has completed does it print `writer: N`. Whoever starts
//! the disk again must therefore find at least the last N that was printed: `writer: found N`. Each stamp fills its
//! block with words that follow from it, and ends in a checksum. A block that is not what the counter says prints
//! `writer: damaged …`, and so does position 0 when it is not what this very run wrote last: somebody else writes.

use crate::blk::Disk;
use crate::mem::Dma;
use crate::suite::Machine;
use crate::virtio::Result;
use crate::{clock, modes, println};
use alloc::format;

const MAGIC: u64 = 0x7772_6974_6572_2121;
const BLOCK: u64 = 4096;
/// Positions that the rounds take in turn, behind position 0, unless the command line says how many.
const PLACES: u64 = 7;
const PACE_NS: u64 = 20_000_000;

/// Offsets in a block.
const COUNT: u64 = 8;
const PLACE: u64 = 16;
const RUN: u64 = 24;
const FILLER: u64 = 32;
const CHECKSUM: u64 = BLOCK - 8;

/// Words that no other stamp has.
fn filler(count: u64, run: u64, at: u64) -> u64 {
    (count ^ run.rotate_left(32) ^ at << 48).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn checksum(block: Dma) -> u64 {
    (0..CHECKSUM)
        .step_by(8)
        .fold(MAGIC, |sum, at| (sum ^ block.get64(at)).wrapping_mul(0x0000_0100_0000_01b3))
}

fn stamp(block: Dma, count: u64, place: u64, run: u64) {
    for (at, word) in [(0, MAGIC), (COUNT, count), (PLACE, place), (RUN, run)] {
        block.set64(at, word);
    }
    (FILLER..CHECKSUM).step_by(8).for_each(|at| block.set64(at, filler(count, run, at)));
    block.set64(CHECKSUM, checksum(block));
}

/// The counter and the run of a block; a block of zeroes was never written and counts 0.
fn examine(block: Dma, place: u64) -> Result<(u64, u64)> {
    if (0..BLOCK).step_by(8).all(|at| block.get64(at) == 0) {
        return Ok((0, 0));
    }
    let (count, run) = (block.get64(COUNT), block.get64(RUN));
    let same = |at: &u64| block.get64(*at) == filler(count, run, *at);
    let wrong = (FILLER..CHECKSUM).step_by(8).find(|at| !same(at));
    if block.get64(0) != MAGIC || block.get64(PLACE) != place || wrong.is_some() {
        return Err(format!("block {place}: no stamp of round {count}, first wrong filler {wrong:?}"));
    }
    if block.get64(CHECKSUM) != checksum(block) {
        return Err(format!("block {place}: checksum of round {count}"));
    }
    Ok((count, run))
}

/// The disk and the last round that is on it.
struct Writer {
    disk: Disk,
    places: u64,
    block: Dma,
    count: u64,
    run: u64,
}

impl Writer {
    /// Where a round goes, besides position 0.
    fn place_of(&self, count: u64) -> u64 {
        1 + count % self.places
    }

    fn read(&mut self, place: u64) -> Result<(u64, u64)> {
        self.block.fill(0xcc);
        self.disk.read(place * BLOCK / 512, self.block)?;
        examine(self.block, place)
    }

    /// Position 0 says how far it went; the others must agree. One round further may have begun.
    fn find(&mut self) -> Result<()> {
        self.count = self.read(0)?.0;
        let next = self.count + 1;
        for back in 0..self.places {
            let wanted = self.count.saturating_sub(back);
            let place = 1 + (next + self.places - 1 - back) % self.places;
            let (count, _) = self.read(place)?;
            if count != wanted && !(count == next && place == self.place_of(next)) {
                return Err(format!("block {place}: round {count}, should be {wanted}"));
            }
        }
        Ok(())
    }

    /// One more round; it is safe when this returns.
    fn round(&mut self) -> Result<()> {
        let next = self.count + 1;
        for place in [self.place_of(next), 0] {
            stamp(self.block, next, place, self.run);
            self.disk.write(place * BLOCK / 512, self.block)?;
        }
        self.disk.flush()?;
        self.count = next;
        Ok(())
    }

    /// What was written last is still there.
    fn look_back(&mut self) -> Result<()> {
        let wanted = (self.count, self.run);
        for place in [0, self.place_of(self.count)] {
            let found = self.read(place)?;
            if found != wanted {
                return Err(format!("block {place}: (round, run) {found:?}, written {wanted:?}"));
            }
        }
        Ok(())
    }
}

/// Writes until something is wrong; says what.
pub fn run(machine: &Machine) {
    let function = machine.bus.as_ref().and_then(|bus| bus.virtio(2).first().copied());
    let Some(function) = function else {
        return println!("writer: no disk");
    };
    let places = machine.boot.number("mini.places").unwrap_or(PLACES).max(1);
    let disk = match Disk::open(function, 16) {
        Ok(disk) if disk.sectors >= (1 + places) * BLOCK / 512 => disk,
        Ok(disk) => return println!("writer: {} sectors are too few", disk.sectors),
        Err(reason) => return println!("writer: {reason}"),
    };
    let mut writer = Writer { disk, places, block: Dma::new(BLOCK), count: 0, run: clock::now_ns() };
    if let Err(reason) = writer.find() {
        return println!("writer: damaged {reason}");
    }
    println!("writer: found {}", writer.count);
    loop {
        if let Err(reason) = writer.round() {
            return println!("writer: failed {reason}");
        }
        println!("writer: {}", writer.count);
        modes::sleep_until(clock::now_ns() + PACE_NS);
        if let Err(reason) = writer.look_back() {
            return println!("writer: damaged {reason}");
        }
    }
}
