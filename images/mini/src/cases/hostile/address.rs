//! Buffers where no memory is, and lengths that no memory has.

use super::On::Queues;
use super::stage::{SIZE, Stage};
use super::{Must, Row, row};
use crate::mem::Dma;
use crate::suite::Outcome;

/// Memory at its end that nobody uses.
const FREE: u64 = 4 << 20;

pub const ROWS: &[Row] = &[
    row("buffer-behind-memory", Queues, Must::Settle, |s| data_at(s, s.places.ram_end, None)),
    row("buffer-across-the-end-of-memory", Queues, Must::Settle, |s| data_at(s, s.places.ram_end - 8, None)),
    row("buffer-in-the-hole", Queues, Must::Settle, |s| data_at(s, s.places.hole, None)),
    row("buffer-in-its-bar", Queues, Must::Settle, |s| data_at(s, s.bar.address, None)),
    row("buffer-in-another-bar", Queues, Must::Settle, |s| data_at(s, s.other_bar, None)),
    row("buffer-in-configuration-space", Queues, Must::Settle, |s| data_at(s, s.places.ecam, None)),
    row("buffer-on-the-io-apic", Queues, Must::Settle, |s| data_at(s, 0xfec0_0000, None)),
    row("buffer-on-the-local-apic", Queues, Must::Settle, |s| data_at(s, 0xfee0_0000, None)),
    row("buffer-on-the-reset-vector", Queues, Must::Settle, |s| data_at(s, 0xffff_fff0, None)),
    row("buffer-across-4-gib", Queues, Must::Settle, |s| data_at(s, 0xffff_ff00, Some(0x200))),
    row("buffer-far-beyond", Queues, Must::Settle, |s| data_at(s, 1 << 52, None)),
    row("buffer-that-wraps", Queues, Must::Settle, |s| data_at(s, u64::MAX - 7, None)),
    row("buffer-at-the-last-byte", Queues, Must::Settle, |s| data_at(s, u64::MAX, Some(1))),
    row("buffer-of-4-gib", Queues, Must::Settle, |s| whole(s, u32::MAX)),
    row("buffer-of-2-gib", Queues, Must::Settle, |s| whole(s, 1 << 31)),
    row("buffer-of-nothing", Queues, Must::Settle, |s| whole(s, 0)),
    row("buffer-of-one-byte", Queues, Must::Settle, |s| whole(s, 1)),
    row("every-part-empty", Queues, Must::Settle, every_empty),
    row("every-part-behind-memory", Queues, Must::Settle, every_bad),
    row("sum-of-lengths-overflows", Queues, Must::Settle, sum_overflows),
    row("many-pieces-the-last-bad", Queues, Must::Settle, last_bad),
];

/// The honest request, its data somewhere else.
fn data_at(s: &mut Stage, address: u64, len: Option<u32>) -> Outcome {
    s.start(0)?;
    let (mut parts, data) = s.honest();
    parts[data].0 = address;
    parts[data].1 = len.unwrap_or(parts[data].1);
    s.lay(0, &parts)?;
    s.offer(0)
}

/// The honest request, its data of another length.
fn whole(s: &mut Stage, len: u32) -> Outcome {
    s.start(0)?;
    let (mut parts, data) = s.honest();
    if len > parts[data].1 {
        // What the device writes before it finds the end must not be ours.
        parts[data].0 = s.places.ram_end - FREE;
    }
    parts[data].1 = len;
    s.lay(0, &parts)?;
    s.offer(0)
}

fn every_empty(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let (mut parts, _) = s.honest();
    parts.iter_mut().for_each(|part| part.1 = 0);
    s.lay(0, &parts)?;
    s.offer(0)
}

fn every_bad(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let (mut parts, _) = s.honest();
    parts.iter_mut().for_each(|part| part.0 = s.places.hole);
    s.lay(0, &parts)?;
    s.offer(0)
}

fn sum_overflows(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let (mut parts, data) = s.honest();
    let (address, flags) = (s.places.ram_end - FREE, parts[data].2);
    parts[data].0 = address;
    parts[data].1 = u32::MAX;
    for _ in 0..3 {
        parts.insert(data, (address, u32::MAX, flags));
    }
    s.lay(0, &parts)?;
    s.offer(0)
}

fn last_bad(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let (mut parts, data) = s.honest();
    let (_, _, flags) = parts[data];
    parts[data].0 = s.places.hole;
    let small = Dma::new(64);
    while parts.len() < usize::from(SIZE) {
        parts.insert(data, (small.address, 1, flags));
    }
    s.lay(0, &parts)?;
    s.offer(0)
}
