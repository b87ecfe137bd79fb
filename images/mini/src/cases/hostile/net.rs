//! Frames and headers that make no sense. A frame that cannot be sent is lost, as on a cable; the card goes on.

use super::On::Only;
use super::stage::{Kind, Stage, WRITE};
use super::{Must, Row, row};
use crate::mem::Dma;
use crate::suite::Outcome;
use crate::virtio::Segment;
use crate::{clock, ensure};

const NET: super::On = Only(Kind::Net);
/// CSUM, HOST_TSO4, HOST_TSO6 and what else a sender may use.
const OFFLOADS: u64 = 1 | 1 << 11 | 1 << 12 | 1 << 14;
const HEADER: u64 = 12;

pub const ROWS: &[Row] = &[
    row("frame-of-nothing", NET, Must::Go, |s| frame(s, 0, header(0, 0, 0, 0, 0, 0))),
    row("frame-of-13-bytes", NET, Must::Go, |s| frame(s, 13, header(0, 0, 0, 0, 0, 0))),
    row("frame-of-65550-bytes", NET, Must::Go, |s| frame(s, 65_550, header(0, 0, 0, 0, 0, 0))),
    row("frame-of-a-mib", NET, Must::Go, |s| frame(s, 1 << 20, header(0, 0, 0, 0, 0, 0))),
    row("checksum-behind-the-frame", NET, Must::Go, |s| frame(s, 60, header(1, 0, 0, 0, 14, 0xffff))),
    row("checksum-start-far-away", NET, Must::Go, |s| frame(s, 60, header(1, 0, 0, 0, 0xffff, 0))),
    row("checksum-start-wraps", NET, Must::Go, |s| frame(s, 60, header(1, 0, 0, 0, 0xfff0, 0xfff0))),
    row("tso-of-size-0", NET, Must::Go, |s| frame(s, 2000, header(1, 1, 54, 0, 34, 16))),
    row("tso-of-size-1", NET, Must::Go, |s| frame(s, 4000, header(1, 1, 54, 1, 34, 16))),
    row("tso-of-size-65535", NET, Must::Go, |s| frame(s, 4000, header(1, 1, 54, 0xffff, 34, 16))),
    row("tso-header-longer-than-the-frame", NET, Must::Go, |s| {
        frame(s, 60, header(1, 1, 0xffff, 1448, 34, 16))
    }),
    row("tso-without-checksum", NET, Must::Go, |s| frame(s, 4000, header(0, 1, 54, 1448, 0, 0))),
    row("tso6-on-nonsense", NET, Must::Go, |s| frame(s, 4000, header(1, 4, 74, 1428, 54, 16))),
    row("ufo-that-was-not-agreed", NET, Must::Go, |s| frame(s, 4000, header(1, 3, 42, 1472, 34, 6))),
    row("unknown-segmentation", NET, Must::Go, |s| frame(s, 4000, header(1, 0x7f, 54, 1448, 34, 16))),
    row("header-of-all-ones", NET, Must::Go, |s| frame(s, 1514, [0xff; 12])),
    row("offloads-that-were-not-agreed", NET, Must::Go, not_agreed),
    row("header-alone-in-bytes", NET, Must::Settle, |s| pieces(s, &[1; 12])),
    row("short-net-header", NET, Must::Settle, |s| pieces(s, &[11])),
    row("frame-in-single-bytes", NET, Must::Settle, |s| pieces(s, &[5; 16])),
    row("send-what-is-writable", NET, Must::Settle, writable),
    row("receive-buffers-too-small", NET, Must::Survive, |s| receive(s, 1)),
    row("receive-buffers-of-the-header", NET, Must::Survive, |s| receive(s, 12)),
    row("receive-buffers-readable", NET, Must::Survive, receive_readable),
    row("receive-buffers-behind-memory", NET, Must::Survive, receive_bad),
];

fn header(flags: u8, gso: u8, header: u16, size: u16, start: u16, offset: u16) -> [u8; 12] {
    let ([h0, h1], [s0, s1]) = (header.to_le_bytes(), size.to_le_bytes());
    let ([c0, c1], [o0, o1]) = (start.to_le_bytes(), offset.to_le_bytes());
    [flags, gso, h0, h1, s0, s1, c0, c1, o0, o1, 0, 0]
}

fn send(s: &mut Stage, len: u64, header: [u8; 12]) -> Outcome {
    let packet = Dma::new(HEADER + len);
    packet.copy_in(0, &header);
    for at in 0..len.min(6) {
        packet.set8(HEADER + at, 0xff);
    }
    if len > 14 {
        packet.copy_in(HEADER + 12, &[8, 0, 0x45]);
    }
    let queue = s.queue()?;
    queue.add(&[Segment::out(packet)]).ok_or("the queue is full")?;
    queue.kick();
    Ok(())
}

/// Sent with all offloads agreed, and then an honest one: both come back.
fn frame(s: &mut Stage, len: u64, header: [u8; 12]) -> Outcome {
    s.start(OFFLOADS)?;
    for round in 1..4u16 {
        send(s, len, header)?;
        ensure!(clock::poll(3000, || s.used() == round), "frame {round} does not come back");
        s.queue()?.take();
    }
    s.answers()
}

fn not_agreed(s: &mut Stage) -> Outcome {
    s.start(0)?;
    send(s, 4000, header(1, 1, 54, 1448, 34, 16))?;
    ensure!(clock::poll(3000, || s.used() == 1), "the frame does not come back");
    s.answers()
}

fn pieces(s: &mut Stage, lens: &[u32]) -> Outcome {
    s.start(0)?;
    let buffer = Dma::new(4096);
    let mut at = 0;
    let mut parts = alloc::vec::Vec::new();
    for len in lens {
        parts.push((buffer.address + at, *len, 0));
        at += u64::from(*len);
    }
    s.lay(0, &parts)?;
    s.offer(0)
}

fn writable(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let buffer = Dma::new(2048);
    s.lay(0, &[(buffer.address, 2048, WRITE)])?;
    s.offer(0)?;
    ensure!(clock::poll(3000, || s.used() == 1), "it does not come back");
    ensure!((0..2048).all(|at| buffer.get8(at) == 0), "the sender's buffer was written");
    Ok(())
}

/// Posts buffers for what arrives, and lets the card use them while it sends.
fn post(s: &mut Stage, address: u64, len: u32, flags: u16) -> Outcome {
    s.start(1 << 15)?;
    let queue = s.queues.first_mut().ok_or("no receive queue")?;
    for at in 0..queue.size {
        queue.set_descriptor(at, address, len, flags, 0);
        queue.offer(at);
    }
    queue.kick();
    for _ in 0..4 {
        // A frame that a peer may answer; the card may have given up.
        if s.answers().is_err() {
            break;
        }
    }
    Ok(())
}

fn receive(s: &mut Stage, len: u32) -> Outcome {
    let buffer = Dma::new(4096).address;
    post(s, buffer, len, WRITE)
}

fn receive_readable(s: &mut Stage) -> Outcome {
    let buffer = Dma::new(4096).address;
    post(s, buffer, 2048, 0)
}

fn receive_bad(s: &mut Stage) -> Outcome {
    let hole = s.places.hole;
    post(s, hole, 2048, WRITE)
}
