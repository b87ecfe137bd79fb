//! Limits, and a tap that goes away.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, recv, send};
use serio_virtio::testing::Buffer;
use std::os::fd::AsRawFd;

use super::net_test::{Card, HEADER, RX_DATA, cable, packet};
use super::*;
use crate::count::PacketTotals;
use crate::limit::{Limits, Rate};

fn limiter(bytes: Rate, operations: Rate) -> Arc<Limiter> {
    Limiter::new(Limits { bytes, operations })
}

#[test]
fn packets_sent_are_limited_and_none_is_lost() {
    let (link, peer) = cable();
    let limit = limiter(Rate::default(), Rate { per_second: 100, burst: 5 });
    let mut card =
        Card::with(link, 0, false, |net| net.with_limiters(Limiter::new(Limits::default()), limit));
    let start = Instant::now();
    let mut bytes = [0; 2048];
    for round in 0..25 {
        let sent = packet(60, round);
        card.transmit(&sent);
        while card.tx.used().is_none() {
            card.rig.wait();
        }
        let len = recv(peer.as_raw_fd(), &mut bytes, MsgFlags::empty()).unwrap();
        assert_eq!(bytes[..len], sent[..], "packet {round}");
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(180), "25 packets took {took:?}");
}

#[test]
fn bytes_received_are_limited_and_the_other_direction_is_not() {
    let (link, peer) = cable();
    let counts = NicCounts::new(1);
    let kept = counts.clone();
    // The header does not count.
    let limit = limiter(Rate { per_second: 10_000, burst: 1000 }, Rate::default());
    let mut card = Card::with(link, 0, false, |net| {
        net.with_limiters(limit, Limiter::new(Limits::default())).with_counts(kept)
    });
    for slot in 0..4u64 {
        card.post(&[Buffer::writable(RX_DATA + slot * 4096, 2048)]);
    }
    let start = Instant::now();
    for round in 0..4 {
        let bytes = packet(1000, round);
        send(peer.as_raw_fd(), &bytes, MsgFlags::empty()).unwrap();
    }
    for _ in 0..100 {
        card.transmit(&packet(1000, 9));
        while card.tx.used().is_none() {
            card.rig.wait();
        }
        recv(peer.as_raw_fd(), &mut [0; 2048], MsgFlags::empty()).unwrap();
    }
    for _ in 0..4 {
        assert_eq!(card.received().1 as usize, 1000 + HEADER);
    }
    let of = |totals: PacketTotals| (totals.packets, totals.bytes, totals.drops);
    let totals = counts.totals();
    assert_eq!((of(totals.received), of(totals.sent)), ((4, 4000, 0), (100, 100_000, 0)));
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(180), "3 packets behind the burst took {took:?}");
}

#[test]
fn a_tap_that_is_removed_is_a_link_that_is_down() {
    if let Err(error) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
        println!("skipped: a network namespace cannot be made here: {error}");
        return;
    }
    let ip = |arguments: &str| {
        std::process::Command::new("ip").args(arguments.split(' ')).status().is_ok_and(|done| done.success())
    };
    let tap = match Tap::open("seriotest1", 1) {
        Ok(mut taps) => taps.remove(0),
        Err(error) => {
            println!("skipped: a tap cannot be made here: {error}");
            return;
        }
    };
    if !ip("link set seriotest1 up") {
        println!("skipped: `ip link` does not work here");
        return;
    }
    let said = Arc::new(Mutex::new(Vec::new()));
    let sink = said.clone();
    let notices = Notices::new(move |text| sink.lock().unwrap().push(text.to_owned()));
    let mut card = Card::with(Arc::new(tap), 0, false, |net| net.with_notices(notices));
    for slot in 0..8u64 {
        card.post(&[Buffer::writable(RX_DATA + slot * 4096, 2048)]);
    }
    let status = |card: &Card| {
        let mut bytes = [0; 2];
        card.net.read_config(6, &mut bytes);
        u16::from_le_bytes(bytes)
    };
    assert_eq!(status(&card), LINK_UP);
    assert!(ip("link del seriotest1"));
    while status(&card) == LINK_UP {
        card.rig.wait();
    }
    // Packets are lost, as on a cable that was pulled; the card goes on and says so once.
    for round in 0..3 {
        card.transmit(&packet(60, round));
        while card.tx.used().is_none() {
            card.rig.wait();
        }
    }
    assert!(!card.rig.needs_reset());
    card.net.reset();
    assert_eq!(status(&card), 0);
    let said = said.lock().unwrap();
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains("tap is gone"), "{said:?}");
}
