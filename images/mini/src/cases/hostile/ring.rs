//! Rings and chains that make no sense: indexes, loops, order, indirect tables.

use super::On::Queues;
use super::stage::{F_EVENT_IDX, F_INDIRECT, INDIRECT, NEXT, SIZE, Stage, WRITE};
use super::{Must, Row, row};
use crate::cpu;
use crate::mem::Dma;
use crate::suite::Outcome;
use crate::virtio::{VERSION_1, status};

pub const ROWS: &[Row] = &[
    row("chain-to-itself", Queues, Must::Break, |s| looped(s, 1)),
    row("chain-of-two-in-a-circle", Queues, Must::Break, |s| looped(s, 2)),
    row("chain-of-all-in-a-circle", Queues, Must::Break, |s| looped(s, SIZE)),
    row("next-is-the-size", Queues, Must::Break, |s| next_is(s, SIZE)),
    row("next-is-far-away", Queues, Must::Break, |s| next_is(s, 0xffff)),
    row("head-is-the-size", Queues, Must::Break, |s| head_is(s, SIZE)),
    row("head-is-far-away", Queues, Must::Break, |s| head_is(s, 0xffff)),
    row("index-one-too-far", Queues, Must::Break, |s| index_is(s, SIZE + 1)),
    row("index-half-around", Queues, Must::Break, |s| index_is(s, 0x8000)),
    row("index-goes-back", Queues, Must::Break, index_back),
    row("index-flickers", Queues, Must::Survive, index_flickers),
    row("readable-after-writable", Queues, Must::Break, |s| order(s, &[WRITE, 0])),
    row("readable-between-writables", Queues, Must::Break, |s| order(s, &[WRITE, 0, WRITE])),
    row("unknown-flags", Queues, Must::Settle, unknown_flags),
    row("one-head-twice", Queues, Must::Survive, |s| same_head(s, 2)),
    row("one-head-all-over-the-ring", Queues, Must::Survive, |s| same_head(s, SIZE)),
    row("chains-share-a-tail", Queues, Must::Survive, shared_tail),
    row("changed-after-it-was-offered", Queues, Must::Survive, changed_later),
    row("ring-is-its-own-buffer", Queues, Must::Survive, own_buffer),
    row("used-ring-scribbled-on", Queues, Must::Survive, scribbled),
    row("event-index-nonsense", Queues, Must::Survive, event_index),
    row("no-descriptors-at-all", Queues, Must::Settle, |s| zeroed(s, false)),
    row("indirect-honest", Queues, Must::Settle, |s| indirect(s, 0, |_| {})),
    row("indirect-not-agreed", Queues, Must::Settle, indirect_not_agreed),
    row("indirect-in-a-circle", Queues, Must::Break, |s| indirect(s, 0, |t| link(t, 2, 0))),
    row("indirect-next-far-away", Queues, Must::Break, |s| indirect(s, 0, |t| link(t, 2, 0xffff))),
    row("indirect-in-indirect", Queues, Must::Break, |s| indirect(s, 0, |t| t.set16(12, INDIRECT))),
    row("indirect-to-itself", Queues, Must::Break, indirect_to_itself),
    row("indirect-of-an-odd-length", Queues, Must::Break, |s| indirect(s, 7, |_| {})),
    row("indirect-of-no-length", Queues, Must::Break, |s| indirect_raw(s, None, 0)),
    row("indirect-too-long", Queues, Must::Break, |s| indirect_raw(s, None, 16 * 65_536)),
    row("indirect-of-4-gib", Queues, Must::Break, |s| indirect_raw(s, None, 0xffff_fff0)),
    row("indirect-at-the-end-of-memory", Queues, Must::Break, indirect_at_end),
    row("indirect-in-the-hole", Queues, Must::Break, |s| indirect_raw(s, Some(s.places.hole), 48)),
    row("indirect-in-its-bar", Queues, Must::Break, |s| indirect_raw(s, Some(s.bar.address), 48)),
    row("indirect-that-wraps", Queues, Must::Break, |s| indirect_raw(s, Some(u64::MAX - 15), 48)),
    row("indirect-and-next", Queues, Must::Survive, indirect_and_next),
    row("indirect-of-thousands", Queues, Must::Break, indirect_thousands),
];

fn looped(s: &mut Stage, count: u16) -> Outcome {
    s.start(0)?;
    let buffer = Dma::new(64);
    let flags = if s.honest().0.iter().any(|part| part.2 & WRITE != 0) { WRITE } else { 0 };
    let queue = s.queue()?;
    for at in 0..count {
        queue.set_descriptor(at, buffer.address, 1, flags | NEXT, (at + 1) % count);
    }
    s.offer(0)
}

fn next_is(s: &mut Stage, next: u16) -> Outcome {
    s.start(0)?;
    let (parts, _) = s.honest();
    s.lay(0, &parts)?;
    let last = parts.len() as u16 - 1;
    let (address, len, flags) = parts[usize::from(last)];
    s.queue()?.set_descriptor(last, address, len, flags | NEXT, next);
    s.offer(0)
}

fn head_is(s: &mut Stage, head: u16) -> Outcome {
    s.start(0)?;
    s.offer(head)
}

fn index_is(s: &mut Stage, index: u16) -> Outcome {
    s.start(0)?;
    let (parts, _) = s.honest();
    s.lay(0, &parts)?;
    let queue = s.queue()?;
    queue.available.set16(2, index);
    queue.kick();
    Ok(())
}

fn index_back(s: &mut Stage) -> Outcome {
    s.start(0)?;
    s.answers()?;
    s.answers()?;
    let queue = s.queue()?;
    queue.available.set16(2, 1);
    queue.kick();
    Ok(())
}

fn index_flickers(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let (parts, _) = s.honest();
    s.lay(0, &parts)?;
    let queue = s.queue()?;
    for round in 0..2000u16 {
        queue.available.set16(2, round.wrapping_mul(0x9e37) % (SIZE + 1));
        if round % 8 == 0 {
            queue.kick();
        }
    }
    Ok(())
}

fn order(s: &mut Stage, flags: &[u16]) -> Outcome {
    s.start(0)?;
    let buffer = Dma::new(64);
    let parts: alloc::vec::Vec<_> = flags.iter().map(|flags| (buffer.address, 16, *flags)).collect();
    s.lay(0, &parts)?;
    s.offer(0)
}

fn unknown_flags(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let (mut parts, _) = s.honest();
    for part in &mut parts {
        part.2 |= 0xfff8;
    }
    s.lay(0, &parts)?;
    s.offer(0)
}

fn same_head(s: &mut Stage, count: u16) -> Outcome {
    s.start(0)?;
    let (parts, _) = s.honest();
    s.lay(0, &parts)?;
    for _ in 0..count {
        s.queue()?.offer(0);
    }
    s.queue()?.kick();
    Ok(())
}

fn shared_tail(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let (parts, _) = s.honest();
    s.lay(0, &parts)?;
    let (address, len, flags) = parts[0];
    let queue = s.queue()?;
    for head in 8..SIZE {
        let more = if parts.len() > 1 { NEXT } else { 0 };
        queue.set_descriptor(head, address, len, flags | more, 1);
        queue.offer(head);
    }
    queue.kick();
    Ok(())
}

/// The driver races the device for the descriptors.
fn changed_later(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let (parts, _) = s.honest();
    for round in 0..300u16 {
        s.lay(0, &parts)?;
        s.offer(0)?;
        let hole = s.places.hole;
        let queue = s.queue()?;
        queue.set_descriptor(round % 3, hole, u32::MAX, NEXT, round);
        if s.device.status() & status::NEEDS_RESET != 0 {
            s.restart(0)?;
        }
    }
    Ok(())
}

/// The device is told to write over its own rings.
fn own_buffer(s: &mut Stage) -> Outcome {
    for which in 0..3 {
        s.restart(0)?;
        let (mut parts, data) = s.honest();
        let queue = s.queue()?;
        let ring = [queue.descriptors, queue.available, queue.used][which];
        parts[data].0 = ring.address;
        parts[data].1 = parts[data].1.min(ring.len as u32);
        s.lay(0, &parts)?;
        s.offer(0)?;
        crate::clock::delay_us(200);
    }
    Ok(())
}

fn scribbled(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let (parts, _) = s.honest();
    s.lay(0, &parts)?;
    for value in [0xffu8, 0, 0x80] {
        s.queue()?.used.fill(value);
        s.offer(0)?;
    }
    Ok(())
}

fn event_index(s: &mut Stage) -> Outcome {
    s.start(F_EVENT_IDX)?;
    let (parts, _) = s.honest();
    s.lay(0, &parts)?;
    for value in [0xffffu16, 0x8000, 0, 1] {
        let queue = s.queue()?;
        queue.available.set16(4 + 2 * u64::from(SIZE), value);
        queue.available.set16(0, value);
        s.offer(0)?;
    }
    Ok(())
}

fn zeroed(s: &mut Stage, _: bool) -> Outcome {
    s.start(0)?;
    s.queue()?.descriptors.fill(0);
    s.writable = 0;
    s.offer(0)
}

fn link(table: &Dma, last: u64, next: u16) {
    table.set16(last * 16 + 12, table.get16(last * 16 + 12) | NEXT);
    table.set16(last * 16 + 14, next);
}

/// An indirect table of three with the honest request in it (padded with empty parts), spoiled, and `more` bytes
/// added to its length.
fn indirect(s: &mut Stage, more: u32, spoil: fn(&Dma)) -> Outcome {
    s.start(F_INDIRECT)?;
    let table = honest_table(s);
    spoil(&table);
    s.queue()?.set_descriptor(0, table.address, 48 + more, INDIRECT, 0);
    s.offer(0)
}

fn honest_table(s: &mut Stage) -> Dma {
    let table = Dma::new(4096);
    let (mut parts, _) = s.honest();
    while parts.len() < 3 {
        let (address, _, flags) = parts[0];
        parts.push((address, 0, flags));
    }
    s.writable = parts.iter().filter(|part| part.2 & WRITE != 0).map(|part| u64::from(part.1)).sum();
    for (at, (address, len, flags)) in (0..).zip(parts) {
        table.set64(at * 16, address);
        table.set32(at * 16 + 8, len);
        table.set16(at * 16 + 12, flags | u16::from(at < 2));
        table.set16(at * 16 + 14, (at + 1) as u16 % 3);
    }
    table
}

fn indirect_not_agreed(s: &mut Stage) -> Outcome {
    s.start(VERSION_1)?;
    let table = honest_table(s);
    s.queue()?.set_descriptor(0, table.address, 48, INDIRECT, 0);
    s.offer(0)
}

fn indirect_raw(s: &mut Stage, address: Option<u64>, len: u32) -> Outcome {
    s.start(F_INDIRECT)?;
    let table = Dma::new(4096);
    for at in 0..256 {
        table.set16(at * 16 + 12, NEXT);
        table.set16(at * 16 + 14, (at as u16 + 1) % 256);
    }
    s.queue()?.set_descriptor(0, address.unwrap_or(table.address), len, INDIRECT, 0);
    s.offer(0)
}

fn indirect_to_itself(s: &mut Stage) -> Outcome {
    s.start(F_INDIRECT)?;
    let queue = s.queue()?;
    queue.set_descriptor(0, queue.descriptors.address, 16 * u32::from(SIZE), INDIRECT, 0);
    s.offer(0)
}

fn indirect_at_end(s: &mut Stage) -> Outcome {
    let end = s.places.ram_end;
    // Its first descriptor is the last of memory, and has a successor.
    let last = end - 16;
    cpu::write64(last, 0x30_0000);
    cpu::write32(last + 8, 0);
    let flags = if s.honest().0.iter().any(|part| part.2 & WRITE != 0) { WRITE } else { 0 };
    cpu::write16(last + 12, flags | NEXT);
    cpu::write16(last + 14, 1);
    indirect_raw(s, Some(last), 48)
}

fn indirect_and_next(s: &mut Stage) -> Outcome {
    s.start(F_INDIRECT)?;
    let table = honest_table(s);
    s.queue()?.set_descriptor(0, table.address, 48, INDIRECT | NEXT | WRITE, 1);
    s.offer(0)
}

fn indirect_thousands(s: &mut Stage) -> Outcome {
    s.start(F_INDIRECT)?;
    let entries = 5000u64;
    let table = Dma::new(entries * 16);
    let flags = if s.honest().0.iter().any(|part| part.2 & WRITE != 0) { WRITE } else { 0 };
    for at in 0..entries {
        table.set64(at * 16, 0x30_0000);
        table.set16(at * 16 + 12, flags | u16::from(at + 1 < entries));
        table.set16(at * 16 + 14, (at + 1) as u16);
    }
    s.queue()?.set_descriptor(0, table.address, entries as u32 * 16, INDIRECT, 0);
    s.offer(0)
}
