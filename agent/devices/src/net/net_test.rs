//! A network card against a socket pair as its cable, and against a real tap where one can be made.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use serio_hv::GuestMemory;
use serio_virtio::testing::{Buffer, DriverQueue, Rig, memory};
use std::os::fd::AsRawFd;
use vm_memory::{Bytes, GuestAddress};

use super::*;

pub(super) const HEADER: usize = serio_hv::VNET_HEADER_BYTES;
pub(super) const RX_DATA: u64 = 0x10_0000;
const TX_DATA: u64 = 0x20_0000;

pub(super) struct Cable {
    fd: OwnedFd,
    offloads: Mutex<Vec<TapOffloads>>,
    pub(super) attached: AtomicBool,
    pub(super) kernel: OnceLock<Arc<dyn Shortcut>>,
}

impl AsFd for Cable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Link for Cable {
    fn set_offloads(&self, offloads: TapOffloads) -> io::Result<()> {
        self.offloads.lock().unwrap().push(offloads);
        Ok(())
    }

    fn set_attached(&self, attached: bool) -> io::Result<()> {
        self.attached.store(attached, Ordering::Release);
        Ok(())
    }

    fn shortcut(&self) -> Option<&dyn Shortcut> {
        self.kernel.get().map(|kernel| &**kernel)
    }
}

pub(super) struct Card {
    pub(super) net: Net,
    pub(super) rig: Rig,
    pub(super) rx: DriverQueue,
    pub(super) tx: DriverQueue,
    memory: GuestMemory,
}

impl Card {
    fn new(link: Arc<dyn Link>, features: u64, event_idx: bool) -> Self {
        Self::with(link, features, event_idx, |net| net)
    }

    pub(super) fn with(
        link: Arc<dyn Link>,
        features: u64,
        event_idx: bool,
        change: impl FnOnce(Net) -> Net,
    ) -> Self {
        let memory = memory(8 << 20);
        let net = change(Net::new(vec![link], NetConfig { mac: [2, 0, 0, 0, 0, 1], mtu: None }));
        let rx = DriverQueue::new(&memory, 0x1000, 32);
        let tx = DriverQueue::new(&memory, 0x1_0000, 32);
        let queues = vec![rx.queue(event_idx), tx.queue(event_idx)];
        let (rig, activation) = Rig::activation(&memory, queues, features);
        let mut card = Self { net, rig, rx, tx, memory };
        card.net.activate(activation).unwrap();
        card
    }

    pub(super) fn post(&mut self, buffers: &[Buffer]) {
        self.rx.offer(buffers).unwrap();
        self.rig.kicks[0].write(1).unwrap();
    }

    pub(super) fn received(&mut self) -> (u16, u32) {
        loop {
            if let Some(used) = self.rx.used() {
                return used;
            }
            self.rig.wait();
        }
    }

    pub(super) fn transmit(&mut self, packet: &[u8]) {
        self.memory.write_slice(packet, GuestAddress(TX_DATA)).unwrap();
        let (head, tail) = (20, u32::try_from(packet.len()).unwrap() - 20);
        self.tx.offer(&[Buffer::readable(TX_DATA, head), Buffer::readable(TX_DATA + 20, tail)]).unwrap();
        self.rig.kicks[1].write(1).unwrap();
    }

    fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

pub(super) fn cable() -> (Arc<Cable>, OwnedFd) {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    let cable = Cable {
        fd: ours,
        offloads: Mutex::default(),
        attached: AtomicBool::new(true),
        kernel: OnceLock::new(),
    };
    (Arc::new(cable), theirs)
}

pub(super) fn packet(len: usize, seed: u8) -> Vec<u8> {
    let body = (0..len).map(|at| u8::try_from(at % 251).unwrap() ^ seed);
    [0; HEADER].into_iter().chain(body).collect()
}

fn bit(bit: u32) -> u64 {
    1 << bit
}

#[test]
fn packets_go_both_ways() {
    for event_idx in [false, true] {
        let (link, peer) = cable();
        let mut card = Card::new(link.clone(), bit(F_GUEST_CSUM), event_idx);
        assert_eq!(
            *link.offloads.lock().unwrap(),
            [TapOffloads { checksum: true, tso4: false, tso6: false }]
        );
        for round in 0..100u8 {
            // The driver wants to hear of each.
            card.rx.set_used_event(card.rx.used_count());
            let sent = packet(60 + usize::from(round), round);
            send(peer.as_raw_fd(), &sent, MsgFlags::empty()).unwrap();
            card.post(&[Buffer::writable(RX_DATA, 11), Buffer::writable(RX_DATA + 0x1000, 2000)]);
            let (_, len) = card.received();
            assert_eq!(usize::try_from(len).unwrap(), sent.len());
            let got = [card.read(RX_DATA, 11), card.read(RX_DATA + 0x1000, sent.len() - 11)].concat();
            assert_eq!(got[10..12], [1, 0], "one buffer");
            assert_eq!(got[12..], sent[12..]);

            let out = packet(80, round);
            card.transmit(&out);
            let mut back = vec![0; 4096];
            let n = loop {
                match recv(peer.as_raw_fd(), &mut back, MsgFlags::empty()) {
                    Ok(n) => break n,
                    Err(nix::errno::Errno::EAGAIN) => std::thread::yield_now(),
                    Err(error) => panic!("{error}"),
                }
            };
            assert_eq!(back[..n], out);
            while card.tx.used().is_none() {
                std::thread::yield_now();
            }
        }
        assert!(!card.rig.needs_reset());
    }
}

#[test]
fn a_large_packet_spans_mergeable_buffers() {
    let (link, peer) = cable();
    let mut card = Card::new(link, bit(F_MRG_RXBUF) | bit(F_GUEST_CSUM) | bit(F_GUEST_TSO4), false);
    let sent = packet(9000, 3);
    send(peer.as_raw_fd(), &sent, MsgFlags::empty()).unwrap();
    let small = packet(100, 9);
    send(peer.as_raw_fd(), &small, MsgFlags::empty()).unwrap();
    for slot in 0..20u64 {
        card.rx.offer(&[Buffer::writable(RX_DATA + slot * 4096, 4096)]).unwrap();
    }
    card.rig.kicks[0].write(1).unwrap();
    let lens: Vec<_> = (0..4).map(|_| card.received().1).collect();
    assert_eq!(lens, [4096, 4096, 820, 112]);
    let got = card.read(RX_DATA, sent.len());
    assert_eq!(got[10..12], [3, 0], "three buffers");
    assert_eq!(got[12..], sent[12..]);
    let got = card.read(RX_DATA + 3 * 4096, small.len());
    assert_eq!((&got[10..12], &got[12..]), (&[1u8, 0][..], &small[12..]));
}

#[test]
fn packets_wait_for_buffers_and_cut_ones_are_dropped() {
    let (link, peer) = cable();
    let mut card = Card::new(link, 0, false);
    for seed in [1, 2, 3] {
        let long = if seed == 2 { 1000 } else { 50 };
        send(peer.as_raw_fd(), &packet(long, seed), MsgFlags::empty()).unwrap();
    }
    card.post(&[Buffer::writable(RX_DATA, 200)]);
    assert_eq!(card.received().1, 62);
    card.post(&[Buffer::writable(RX_DATA, 200)]);
    assert_eq!(card.received().1, 62, "the second did not fit and is gone");
    assert_eq!(card.read(RX_DATA + 12, 50), packet(50, 3)[12..]);
}

#[test]
fn a_full_cable_keeps_what_was_offered() {
    let (link, peer) = cable();
    let mut card = Card::new(link, 0, false);
    let big = packet(8000, 1);
    card.memory.write_slice(&big, GuestAddress(TX_DATA)).unwrap();
    let len = u32::try_from(big.len()).unwrap();
    let mut received = 0;
    let mut used = 0;
    let mut offered = 0;
    while received < 200 {
        while offered < 200 && card.tx.offer(&[Buffer::readable(TX_DATA, len)]).is_some() {
            offered += 1;
        }
        card.rig.kicks[1].write(1).unwrap();
        let mut back = vec![0; 9000];
        while let Ok(n) = recv(peer.as_raw_fd(), &mut back, MsgFlags::empty()) {
            assert_eq!(back[..n], big);
            received += 1;
        }
        while card.tx.used().is_some() {
            used += 1;
        }
        std::thread::yield_now();
    }
    while used < 200 {
        used += usize::from(card.tx.used().is_some());
    }
    assert_eq!((offered, received, used), (200, 200, 200));
}

#[test]
fn buffers_outside_of_memory_break_the_card_only() {
    for buffers in [vec![Buffer::writable(1 << 40, 2000)], vec![Buffer::writable(RX_DATA, 5)]] {
        let (link, peer) = cable();
        let mut card = Card::new(link, bit(F_MRG_RXBUF), false);
        send(peer.as_raw_fd(), &packet(60, 0), MsgFlags::empty()).unwrap();
        for _ in 0..31 {
            card.rx.offer(&buffers).unwrap();
        }
        card.rig.kicks[0].write(1).unwrap();
        if buffers[0].len > 100 {
            card.rig.wait();
            assert!(card.rig.needs_reset(), "{buffers:?}");
        }
        card.net.reset();
    }
    // What the guest sends from nowhere is just lost.
    let (link, peer) = cable();
    let mut card = Card::new(link, 0, false);
    card.tx.offer(&[Buffer::readable(1 << 40, 100)]).unwrap();
    card.rig.kicks[1].write(1).unwrap();
    while card.tx.used().is_none() {
        card.rig.wait();
    }
    assert!(recv(peer.as_raw_fd(), &mut [0; 10], MsgFlags::empty()).is_err());
    assert!(!card.rig.needs_reset());
}

#[test]
fn a_reset_in_traffic_ends_and_the_cable_serves_the_next_card() {
    let (link, peer) = cable();
    for round in 0..30u8 {
        let mut card = Card::new(link.clone(), 0, round % 2 == 0);
        card.rx.set_used_event(0);
        for slot in 0..8u64 {
            card.rx.offer(&[Buffer::writable(RX_DATA + slot * 4096, 4096)]).unwrap();
        }
        for _ in 0..4 {
            send(peer.as_raw_fd(), &packet(60, round), MsgFlags::empty()).unwrap();
        }
        card.rig.kicks[0].write(1).unwrap();
        if round % 3 == 0 {
            card.received();
        }
        card.net.reset();
        let before = card.read(0, 0x2_0000);
        send(peer.as_raw_fd(), &packet(60, round), MsgFlags::empty()).unwrap();
        assert_eq!(card.read(0, 0x2_0000), before, "nothing touches the rings any more");
    }
}

/// A whole round through the kernel: the guest asks who has the tap's own address, the kernel answers.
/// Posted buffers and a packet that the cable did not take go to the next card.
#[test]
fn a_card_suspended_in_traffic_goes_on_as_another_one() {
    let (link, peer) = cable();
    let features = bit(F_MRG_RXBUF);
    let mut card = Card::new(link.clone(), features, false);
    for slot in 0..6u64 {
        card.post(&[Buffer::writable(RX_DATA + slot * 0x1000, 2048)]);
    }
    let mut seen = 0u8;
    let mut sent = 0u8;
    for round in 0..40u8 {
        // It may be read before, or after, by either card.
        send(peer.as_raw_fd(), &packet(100, round), MsgFlags::empty()).unwrap();
        let at = TX_DATA + u64::from(sent) * 0x1000;
        card.memory.write_slice(&packet(100, sent), GuestAddress(at)).unwrap();
        sent += u8::from(card.tx.offer(&[Buffer::readable(at, 112)]).is_some());
        let queues = card.net.suspend().unwrap();
        assert_eq!(queues.len(), 2);
        card.net = Net::new(vec![link.clone()], NetConfig { mac: [2, 0, 0, 0, 0, 1], mtu: None });
        card.net.activate(card.rig.again(queues, features)).unwrap();
        card.received();
        let slot = u64::from(round) % 6;
        assert_eq!(card.read(RX_DATA + slot * 0x1000 + 12, 100), packet(100, round)[12..], "in order");
        card.post(&[Buffer::writable(RX_DATA + slot * 0x1000, 2048)]);
        // The peer reads only now and then, so that the cable is full at times.
        while round % 8 == 7 && seen < sent {
            let mut bytes = [0; 200];
            match recv(peer.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
                Ok(len) => {
                    assert_eq!(bytes[12..len], packet(100, seen)[12..], "each once, in order");
                    seen += 1;
                    card.tx.used();
                }
                Err(_) => std::thread::yield_now(),
            }
        }
        while card.tx.used().is_some() {}
    }
    assert!(!card.rig.needs_reset() && seen > 20);
}

#[test]
fn a_real_tap_answers_arp() {
    if let Err(error) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
        println!("skipped: a network namespace cannot be made here: {error}");
        return;
    }
    let tap = match Tap::open("seriotest0", 1) {
        Ok(mut taps) => taps.remove(0),
        Err(error) => {
            println!("skipped: a tap cannot be made here: {error}");
            return;
        }
    };
    for command in ["link set seriotest0 up", "addr add 192.0.2.1/24 dev seriotest0"] {
        let done = std::process::Command::new("ip").args(command.split(' ')).status();
        if !done.is_ok_and(|status| status.success()) {
            println!("skipped: `ip {command}` does not work here");
            return;
        }
    }
    let features = bit(F_MRG_RXBUF) | bit(F_GUEST_CSUM) | bit(F_GUEST_TSO4) | bit(F_GUEST_TSO6);
    let mut card = Card::new(Arc::new(tap), features, true);
    for slot in 0..31u64 {
        card.rx.offer(&[Buffer::writable(RX_DATA + slot * 4096, 4096)]).unwrap();
    }
    card.rig.kicks[0].write(1).unwrap();
    let mac = [2, 0, 0, 0, 0, 1];
    let arp: Vec<u8> = [
        &[0; HEADER][..],
        &[0xff; 6],
        &mac,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &mac,
        &[192, 0, 2, 2],
        &[0; 6],
        &[192, 0, 2, 1],
        &[0; 18],
    ]
    .concat();
    card.transmit(&arp);
    let mut at = RX_DATA;
    loop {
        card.rx.set_used_event(card.rx.used_count());
        let (_, len) = card.received();
        let frame = card.read(at + 12, usize::try_from(len).unwrap() - 12);
        // Others may come first: the kernel announces itself by IPv6.
        if frame[12..14] == [8, 6] {
            assert_eq!(frame[..6], mac);
            assert_eq!(frame[20..22], [0, 2], "a reply");
            assert_eq!(frame[28..32], [192, 0, 2, 1]);
            return;
        }
        at += 4096;
    }
}
