//! A network card for `scripts/bench machine`: as many packets as go, in each direction, by polling.
//!
//! What is sent goes nowhere in particular: whoever measures has no address of ours. A stream is sent in segments of 64 KiB
//! for the host to cut (virtio 1.2 §5.1.6.2), as operating systems do.

use crate::mem::Dma;
use crate::net::{HEADER, Nic};
use crate::suite::Machine;
use crate::virtio::{Result, Segment};
use crate::{clock, println};

const QUEUE_SIZE: u16 = 256;
/// Packets between two rings of the doorbell.
const BATCH: u64 = 16;
const ETHERNET_BYTES: u64 = 14;
const IP_BYTES: u64 = 20;
const TCP_BYTES: u64 = 20;
/// Ethernet, IPv4 and TCP without options.
const HEADERS_BYTES: u64 = ETHERNET_BYTES + IP_BYTES + TCP_BYTES;

/// Measures the first card; each cell takes `ms`. What arrives is sent by the host's side once it reads `bench: receive`.
pub fn run(machine: &Machine, ms: u64) -> Result<()> {
    let function =
        machine.bus.as_ref().and_then(|bus| bus.virtio(1).first().copied()).ok_or("there is no card")?;
    let mut nic = Nic::open(function, QUEUE_SIZE)?;
    for (name, len) in [("send-60", 60), ("send-1514", 1514), ("send-stream", 65_000)] {
        if len > 1514 && !nic.segments() {
            println!("bench {name} is not offered");
            continue;
        }
        let (sent, ns) = send(&mut nic, len, ms)?;
        println!("bench {name} {} packets/s", sent * 1_000_000_000 / ns.max(1));
    }
    for name in ["receive-60", "receive-1514"] {
        println!("bench: {name}");
        let (got, ns) = receive(&mut nic, ms)?;
        // Whoever sends reads that it is over.
        println!("bench {name} {} packets/s", got * 1_000_000_000 / ns.max(1));
        drain(&mut nic);
    }
    nic.device.reset()
}

/// A packet of a TCP connection that nobody has.
fn packet(nic: &Nic, len: u64) -> Dma {
    let frame = Dma::new(HEADER + len);
    if len > 1514 {
        // NEEDS_CSUM, TCPV4, the headers' length, the segments', and where the sum goes (§5.1.6).
        frame.set8(0, 1);
        frame.set8(1, 1);
        frame.set16(2, HEADERS_BYTES as u16);
        frame.set16(4, 1448);
        frame.set16(6, (ETHERNET_BYTES + IP_BYTES) as u16);
        frame.set16(8, 16);
    }
    frame.copy_in(HEADER, &[0x02, 0, 0, 0, 0, 0x99]);
    frame.copy_in(HEADER + 6, &nic.mac);
    frame.copy_in(HEADER + 12, &[0x08, 0x00, 0x45, 0]);
    frame.copy_in(HEADER + 16, &((len - ETHERNET_BYTES) as u16).to_be_bytes());
    frame.copy_in(HEADER + ETHERNET_BYTES + 6, &[0x40, 0, 64, 6]);
    frame.copy_in(HEADER + ETHERNET_BYTES + 12, &[10, 99, 0, 2, 10, 99, 0, 1]);
    let sum: u32 = (0..10)
        .map(|word| {
            let at = HEADER + ETHERNET_BYTES + 2 * word;
            u32::from(frame.get8(at)) << 8 | u32::from(frame.get8(at + 1))
        })
        .sum();
    let folded = !((sum & 0xffff) + (sum >> 16)) as u16;
    frame.copy_in(HEADER + ETHERNET_BYTES + 10, &folded.to_be_bytes());
    frame.set8(HEADER + ETHERNET_BYTES + IP_BYTES + 12, 0x50);
    frame
}

/// Sends the same packet over and over, the ring full; (packets, nanoseconds).
fn send(nic: &mut Nic, len: u64, ms: u64) -> Result<(u64, u64)> {
    let frame = packet(nic, len);
    let begun = clock::now_ns();
    let (mut done, mut offered, mut rung, mut last) = (0u64, 0u64, 0u64, begun);
    loop {
        while nic.transmit.take().is_some() {
            done += 1;
            last = clock::now_ns();
        }
        let elapsed = clock::now_ns() - begun;
        if elapsed < ms * 1_000_000 {
            while offered - rung < BATCH && nic.transmit.add(&[Segment::out(frame)]).is_some() {
                offered += 1;
            }
        } else if done == offered {
            return Ok((done, last - begun));
        } else if elapsed > (ms + 5000) * 1_000_000 {
            return Err("packets are not taken".into());
        }
        if offered > rung {
            rung = offered;
            nic.transmit.kick_if_wanted();
        }
    }
}

/// Counts what comes from the first packet on; (packets, nanoseconds).
fn receive(nic: &mut Nic, ms: u64) -> Result<(u64, u64)> {
    if !clock::poll(10_000, || nic.receive.has_used()) {
        return Err("nothing comes".into());
    }
    let begun = clock::now_ns();
    let mut got = 0u64;
    while clock::now_ns() - begun < ms * 1_000_000 {
        let mut any = 0;
        while any < BATCH {
            let Some((head, _)) = nic.receive.take() else { break };
            if let Some(buffer) = nic.buffers[usize::from(head)].take() {
                nic.post(buffer);
            }
            any += 1;
        }
        if any > 0 {
            got += any;
            nic.receive.kick_if_wanted();
        }
    }
    Ok((got, clock::now_ns() - begun))
}

/// What is still on its way belongs to no measurement.
fn drain(nic: &mut Nic) {
    let mut quiet = clock::now_ns();
    while clock::now_ns() - quiet < 300_000_000 {
        if let Some((head, _)) = nic.receive.take() {
            quiet = clock::now_ns();
            if let Some(buffer) = nic.buffers[usize::from(head)].take() {
                nic.post(buffer);
            }
            nic.receive.kick_if_wanted();
        }
    }
}
