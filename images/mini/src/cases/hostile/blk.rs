//! Requests to a disk that make no sense. Each is answered with an error, and the disk goes on without a reset; only a
//! request without room for header or status breaks the ring.

use super::On::Only;
use super::stage::{Kind, Stage, WRITE, blk_goes_on, blk_status};
use super::{Must, Row, row};
use crate::blk::{IO_ERROR, OK, UNSUPPORTED, kind};
use crate::mem::Dma;
use crate::suite::Outcome;
use crate::virtio::{Segment, status};
use crate::{clock, ensure};

const BLK: super::On = Only(Kind::Blk);
const BAD: &[u8] = &[IO_ERROR, UNSUPPORTED];

pub const ROWS: &[Row] = &[
    row("read-at-the-end", BLK, Must::Go, |s| past_end(s, kind::IN, 0, 512)),
    row("read-across-the-end", BLK, Must::Go, |s| past_end(s, kind::IN, -1, 1024)),
    row("read-far-away", BLK, Must::Go, |s| sector(s, kind::IN, 1 << 60, 512)),
    row("read-where-bytes-overflow", BLK, Must::Go, |s| sector(s, kind::IN, u64::MAX / 512 + 1, 512)),
    row("read-at-the-last-sector-number", BLK, Must::Go, |s| sector(s, kind::IN, u64::MAX, 512)),
    row("write-at-the-end", BLK, Must::Go, |s| past_end(s, kind::OUT, 0, 512)),
    row("write-across-the-end", BLK, Must::Go, |s| past_end(s, kind::OUT, -1, 1024)),
    row("write-at-the-last-sector-number", BLK, Must::Go, |s| sector(s, kind::OUT, u64::MAX, 512)),
    row("read-of-half-a-sector", BLK, Must::Go, |s| sector(s, kind::IN, 0, 256)),
    row("read-of-a-sector-and-a-byte", BLK, Must::Go, |s| sector(s, kind::IN, 0, 513)),
    row("write-of-half-a-sector", BLK, Must::Go, |s| sector(s, kind::OUT, 0, 511)),
    row("read-of-nothing", BLK, Must::Go, |s| expect(s, kind::IN, 0, &[], &[OK, IO_ERROR, UNSUPPORTED])),
    row("write-of-nothing", BLK, Must::Go, |s| expect(s, kind::OUT, 0, &[], &[OK, IO_ERROR, UNSUPPORTED])),
    row("every-unknown-type", BLK, Must::Go, unknown_types),
    row("read-into-what-is-readable", BLK, Must::Go, |s| direction(s, kind::IN)),
    row("write-from-what-is-writable", BLK, Must::Go, |s| direction(s, kind::OUT)),
    row("identify-without-room", BLK, Must::Go, |s| expect(s, kind::GET_ID, 0, &[], &[OK, IO_ERROR])),
    row("identify-in-pieces", BLK, Must::Go, identify_pieces),
    row("discard-past-the-end", BLK, Must::Go, |s| range(s, kind::DISCARD, u64::MAX / 512, 8, 0)),
    row("discard-that-wraps", BLK, Must::Go, |s| range(s, kind::DISCARD, u64::MAX - 3, 8, 0)),
    row("discard-too-many-sectors", BLK, Must::Go, |s| range(s, kind::DISCARD, 0, u32::MAX, 0)),
    row("discard-with-unknown-flags", BLK, Must::Go, |s| range(s, kind::DISCARD, 0, 8, 0xffff_fffe)),
    row("discard-with-unmap", BLK, Must::Go, |s| range(s, kind::DISCARD, 0, 8, 1)),
    row("write-zeroes-past-the-end", BLK, Must::Go, |s| range(s, kind::WRITE_ZEROES, 1 << 55, 8, 0)),
    row("write-zeroes-too-many-sectors", BLK, Must::Go, |s| range(s, kind::WRITE_ZEROES, 0, 1 << 31, 0)),
    row("write-zeroes-with-unknown-flags", BLK, Must::Go, |s| range(s, kind::WRITE_ZEROES, 0, 8, 2)),
    row("discard-without-a-range", BLK, Must::Go, |s| range_bytes(s, 0)),
    row("discard-with-half-a-range", BLK, Must::Go, |s| range_bytes(s, 15)),
    row("discard-with-two-ranges", BLK, Must::Go, |s| range_bytes(s, 32)),
    row("discard-with-a-thousand-ranges", BLK, Must::Go, |s| range_bytes(s, 16_000)),
    row("no-header", BLK, Must::Break, |s| shape(s, &[(64, WRITE)])),
    row("short-header", BLK, Must::Break, |s| shape(s, &[(15, 0), (1, WRITE)])),
    row("no-status", BLK, Must::Break, |s| shape(s, &[(16, 0)])),
    row("empty-status", BLK, Must::Break, |s| shape(s, &[(16, 0), (0, WRITE)])),
    row("header-in-single-bytes", BLK, Must::Go, header_in_bytes),
    row("reserved-field-set", BLK, Must::Go, reserved_field),
    row("status-behind-memory", BLK, Must::Break, status_bad),
    row("data-over-the-status", BLK, Must::Go, data_over_status),
    row("reset-while-the-disk-works", BLK, Must::Go, reset_while_working),
];

fn expect(s: &mut Stage, kind: u32, sector: u64, data: &[Segment], allowed: &[u8]) -> Outcome {
    s.start(0)?;
    let status = blk_status(s, kind, sector, data)?;
    ensure!(status.is_some_and(|status| allowed.contains(&status)), "status {status:?}");
    blk_goes_on(s)
}

fn sector(s: &mut Stage, kind: u32, sector: u64, len: u64) -> Outcome {
    let data = Dma::new(1024).part(0, len);
    let data = if kind == kind::IN { Segment::into(data) } else { Segment::out(data) };
    expect(s, kind, sector, &[data], BAD)
}

fn past_end(s: &mut Stage, kind: u32, before: i64, len: u64) -> Outcome {
    let sectors = s.device.config64(0);
    sector(s, kind, sectors.wrapping_add_signed(before), len)
}

fn unknown_types(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let types = [2u32, 3, 5, 6, 7, 9, 10, 12, 14, 15, 0x10, 0xff, 0x8000_0000, 0xffff_ffff];
    for kind in types {
        let status = blk_status(s, kind, 0, &[])?;
        ensure!(status == Some(UNSUPPORTED) || status == Some(IO_ERROR), "type {kind}: {status:?}");
    }
    blk_goes_on(s)
}

fn direction(s: &mut Stage, kind: u32) -> Outcome {
    let data = Dma::new(512);
    let wrong = if kind == kind::IN { Segment::out(data) } else { Segment::into(data) };
    expect(s, kind, 0, &[wrong], &[OK, IO_ERROR, UNSUPPORTED])?;
    ensure!((0..512).all(|at| data.get8(at) == 0), "data was written into what is not for it");
    Ok(())
}

fn identify_pieces(s: &mut Stage) -> Outcome {
    let data = Dma::new(64);
    let pieces = [data.part(0, 1), data.part(9, 2), data.part(20, 40)].map(Segment::into);
    expect(s, kind::GET_ID, 0, &pieces, &[OK])?;
    ensure!((1..9).all(|at| data.get8(at) == 0), "bytes between the pieces were written");
    Ok(())
}

fn range(s: &mut Stage, kind: u32, sector: u64, sectors: u32, flags: u32) -> Outcome {
    let range = Dma::new(16);
    range.set64(0, sector);
    range.set32(8, sectors);
    range.set32(12, flags);
    expect(s, kind, 0, &[Segment::out(range)], BAD)
}

fn range_bytes(s: &mut Stage, len: u64) -> Outcome {
    let data = Dma::new(16_000);
    let data = if len == 0 { alloc::vec![] } else { alloc::vec![Segment::out(data.part(0, len))] };
    expect(s, kind::DISCARD, 0, &data, BAD)
}

/// A chain of these parts, all in one zeroed buffer.
fn shape(s: &mut Stage, parts: &[(u32, u16)]) -> Outcome {
    s.start(0)?;
    let buffer = Dma::new(64).address;
    let parts: alloc::vec::Vec<_> = parts.iter().map(|(len, flags)| (buffer, *len, *flags)).collect();
    s.lay(0, &parts)?;
    s.offer(0)
}

fn header_in_bytes(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let (header, answer) = (Dma::new(16), Dma::new(16));
    header.set32(0, kind::GET_ID);
    answer.set8(0, 0xee);
    let bytes = [1u64, 1, 1, 1, 4, 1, 1, 1, 1, 1, 3];
    let mut at = 0;
    let mut parts = alloc::vec::Vec::new();
    for len in bytes {
        parts.push((header.address + at, len as u32, 0));
        at += len;
    }
    parts.push((answer.address, 1, WRITE));
    s.lay(0, &parts)?;
    s.offer(0)?;
    ensure!(clock::poll(3000, || answer.get8(0) != 0xee), "no answer");
    ensure!(answer.get8(0) == OK, "status {}", answer.get8(0));
    Ok(())
}

fn reserved_field(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let (header, answer) = (Dma::new(16), Dma::new(1024));
    header.set32(4, u32::MAX);
    answer.set8(0, 0xee);
    s.lay(0, &[(header.address, 16, 0), (answer.address + 512, 512, WRITE), (answer.address, 1, WRITE)])?;
    s.offer(0)?;
    ensure!(clock::poll(3000, || answer.get8(0) != 0xee), "no answer");
    blk_goes_on(s)
}

fn status_bad(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let header = Dma::new(16);
    s.lay(0, &[(header.address, 16, 0), (header.address, 512, WRITE), (s.places.hole, 1, WRITE)])?;
    s.offer(0)
}

fn data_over_status(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let (header, both) = (Dma::new(16), Dma::new(512));
    s.lay(0, &[(header.address, 16, 0), (both.address, 512, WRITE), (both.address, 1, WRITE)])?;
    s.offer(0)?;
    ensure!(clock::poll(3000, || s.used() == 1), "no answer");
    blk_goes_on(s)
}

/// Large reads in every slot, and a reset at once: many times over.
fn reset_while_working(s: &mut Stage) -> Outcome {
    let (header, answer, data) = (Dma::new(16), Dma::new(16), Dma::new(1 << 20));
    for _ in 0..40 {
        s.restart(0)?;
        for slot in 0..5u16 {
            let parts = [(header.address, 16, 0), (data.address, 1 << 20, WRITE), (answer.address, 1, WRITE)];
            s.lay(slot * 3, &parts)?;
            s.queue()?.offer(slot * 3);
        }
        s.queue()?.kick();
        s.device.reset()?;
        data.set8(0, 0x77);
        clock::delay_us(50);
        ensure!(data.get8(0) == 0x77, "a read went on after the reset");
    }
    s.start(0)?;
    ensure!(s.device.status() & status::NEEDS_RESET == 0, "broken");
    blk_goes_on(s)
}
