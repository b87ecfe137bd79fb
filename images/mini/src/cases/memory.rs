//! RAM: that all of what the memory map promises is there, and distinct.

use crate::boot::Range;
use crate::mem::{self, Dma};
use crate::suite::{Case, Machine, Outcome};
use crate::{ensure, skip};
use alloc::vec::Vec;

pub const CASES: &[Case] = &[
    Case { group: "memory", name: "map", run: map },
    Case { group: "memory", name: "reachable", run: reachable },
    Case { group: "memory", name: "hole", run: hole },
    Case { group: "memory", name: "above-4g", run: above_4g },
];

fn map(machine: &mut Machine) -> Outcome {
    let ranges: Vec<Range> = machine.boot.ram().collect();
    ensure!(!ranges.is_empty(), "the memory map has no RAM");
    for (index, one) in ranges.iter().enumerate() {
        for other in &ranges[index + 1..] {
            let apart = one.start + one.len <= other.start || other.start + other.len <= one.start;
            ensure!(apart, "ranges overlap: {one:x?} {other:x?}");
        }
    }
    if let Some(wanted) = machine.boot.number("mini.memory_mib") {
        let total = ranges.iter().map(|range| range.len).sum::<u64>();
        let close = total <= wanted << 20 && total + (4 << 20) >= wanted << 20;
        ensure!(close, "{total:#x} bytes of RAM, the command line says {wanted} MiB");
    }
    Ok(())
}

/// Writes a different word into each probed page, then reads all of them back and restores them.
fn probe(ranges: &[Range]) -> Outcome {
    let mut saved = Vec::new();
    for range in ranges {
        mem::map(range.start, range.len);
        let first = range.start.max(mem::heap_end()).next_multiple_of(4096);
        let end = (range.start + range.len) & !4095;
        let mut at = first;
        while at + 4096 <= end {
            let page = Dma::at(at, 4096);
            saved.push((page, page.get64(8)));
            page.set64(8, at ^ 0x5e10_5e10_5e10_5e10);
            let last = end - 4096;
            at = if at < last { (at + (64 << 20)).min(last) } else { end };
        }
    }
    let wrong = saved
        .iter()
        .find(|(page, _)| page.get64(8) != page.address ^ 0x5e10_5e10_5e10_5e10)
        .map(|(page, _)| page.address);
    for (page, word) in &saved {
        page.set64(8, *word);
    }
    ensure!(wrong.is_none(), "page {:#x} does not keep what is written", wrong.unwrap_or(0));
    ensure!(!saved.is_empty(), "there was nothing to probe");
    Ok(())
}

fn reachable(machine: &mut Machine) -> Outcome {
    probe(&machine.boot.ram().collect::<Vec<_>>())
}

fn hole(machine: &mut Machine) -> Outcome {
    for range in machine.boot.ram() {
        let apart = range.start + range.len <= 0xfec0_0000 || range.start >= 1 << 32;
        ensure!(apart, "RAM where the interrupt controllers are: {range:x?}");
    }
    Ok(())
}

fn above_4g(machine: &mut Machine) -> Outcome {
    let high: Vec<_> = machine.boot.ram().filter(|range| range.start >= 1 << 32).collect();
    if high.is_empty() {
        skip!("no RAM above 4 GiB");
    }
    probe(&high)
}
