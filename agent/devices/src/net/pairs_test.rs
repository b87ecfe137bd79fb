//! Several queue pairs: each on a cable of its own, and the commands that choose how many are in use.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, recv, send};
use serio_hv::GuestMemory;
use serio_virtio::testing::{Buffer, DriverQueue, Rig, memory};
use vm_memory::{Bytes, GuestAddress};

use super::net_test::{Cable, cable, packet};
use super::*;
use crate::limit::Rate;

const MQ: u64 = 1 << F_MQ | 1 << F_CTRL_VQ;
const CONFIG: NetConfig = NetConfig { mac: [2, 0, 0, 0, 0, 1], mtu: None };
/// Where a command lies, its answer, and packets.
const COMMAND: u64 = 0x10_0000;
const ACK: u64 = 0x10_1000;
const DATA: u64 = 0x20_0000;

/// A card of several pairs, and the driver's side of it.
struct Card {
    net: Net,
    rig: Rig,
    rings: Vec<DriverQueue>,
    cables: Vec<Arc<Cable>>,
    peers: Vec<OwnedFd>,
    memory: GuestMemory,
}

impl Card {
    fn new(pairs: usize) -> Card {
        let all: Vec<u16> = (0..=2 * pairs as u16).collect();
        Card::with(pairs, MQ, &all, |net| net)
    }

    /// Whose driver has these features, and has made these queues.
    fn with(pairs: usize, features: u64, made: &[u16], change: impl FnOnce(Net) -> Net) -> Card {
        let memory = memory(8 << 20);
        let (cables, peers): (Vec<_>, Vec<_>) = (0..pairs).map(|_| cable()).unzip();
        let net = change(Net::new(links(&cables), CONFIG));
        let rings: Vec<_> =
            (0..=2 * pairs as u64).map(|at| DriverQueue::new(&memory, 0x1000 + at * 0x4000, 32)).collect();
        let queues = rings.iter().map(|ring| ring.queue(false)).collect();
        let (rig, mut activation) = Rig::activation(&memory, queues, features);
        activation.queues.retain(|queue| made.contains(&queue.index));
        let mut card = Card { net, rig, rings, cables, peers, memory };
        card.net.activate(activation).unwrap();
        card
    }

    /// The driver resets the card and makes new rings.
    fn restart(&mut self) {
        self.net.reset();
        let place = |at| DriverQueue::new(&self.memory, 0x1000 + at * 0x4000, 32);
        self.memory.write_slice(&[0; 0x4_0000], GuestAddress(0x1000)).unwrap();
        self.rings = (0..self.rings.len() as u64).map(place).collect();
        let queues = self.rings.iter().map(|ring| ring.queue(false)).collect();
        let (rig, activation) = Rig::activation(&self.memory, queues, MQ);
        self.rig = rig;
        self.net.activate(activation).unwrap();
    }

    fn offer(&mut self, ring: usize, buffers: &[Buffer]) {
        self.rings[ring].offer(buffers).unwrap();
        self.rig.kicks[ring].write(1).unwrap();
    }

    fn used(&mut self, ring: usize) -> (u16, u32) {
        loop {
            if let Some(used) = self.rings[ring].used() {
                return used;
            }
            self.rig.wait();
        }
    }

    /// Gives a command to the queue at `ring`; the answer.
    fn command_at(&mut self, ring: usize, bytes: &[u8]) -> u8 {
        self.memory.write_slice(bytes, GuestAddress(COMMAND)).unwrap();
        self.memory.write_obj(0xee_u8, GuestAddress(ACK)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        self.offer(ring, &[Buffer::readable(COMMAND, len), Buffer::writable(ACK, 1)]);
        assert_eq!(self.used(ring).1, 1);
        self.memory.read_obj(GuestAddress(ACK)).unwrap()
    }

    fn set_pairs(&mut self, pairs: u16) -> u8 {
        let [low, high] = pairs.to_le_bytes();
        self.command_at(self.rings.len() - 1, &[4, 0, low, high])
    }

    fn transmit(&mut self, pair: usize, bytes: &[u8]) {
        let at = DATA + pair as u64 * 0x1_0000;
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        self.offer(2 * pair + 1, &[Buffer::readable(at, u32::try_from(bytes.len()).unwrap())]);
    }

    /// Those that packets are steered to.
    fn attached(&self) -> Vec<bool> {
        self.cables.iter().map(|cable| cable.attached.load(Ordering::Acquire)).collect()
    }
}

fn links(cables: &[Arc<Cable>]) -> Vec<Arc<dyn Link>> {
    cables.iter().map(|cable| cable.clone() as Arc<dyn Link>).collect()
}

fn received(peer: &OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    loop {
        match recv(peer.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
            Ok(len) => return bytes[..len].to_vec(),
            Err(nix::errno::Errno::EAGAIN) => std::thread::yield_now(),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn one_pair_looks_as_ever_and_several_say_how_many() {
    for (pairs, queues, features) in [(1, 2, 0), (2, 5, MQ), (4, 9, MQ)] {
        let cables: Vec<_> = (0..pairs).map(|_| cable().0).collect();
        let net = Net::new(links(&cables), CONFIG);
        assert_eq!((net.queue_sizes().len(), net.features() & MQ), (queues, features));
        let mut count = [0; 2];
        net.read_config(8, &mut count);
        assert_eq!(usize::from(u16::from_le_bytes(count)), pairs);
    }
}

#[test]
fn each_pair_has_its_own_way_and_all_are_counted() {
    let counts = NicCounts::new(2);
    let kept = counts.clone();
    let mut card = Card::with(2, MQ, &[0, 1, 2, 3, 4], |net| net.with_counts(kept));
    assert_eq!(card.attached(), [true, false], "one until the driver says otherwise");
    assert_eq!(card.set_pairs(2), 0);
    assert_eq!(card.attached(), [true, true]);
    for pair in 0..2usize {
        let out = packet(100, pair as u8);
        card.transmit(pair, &out);
        card.used(2 * pair + 1);
        assert_eq!(received(&card.peers[pair]), out);
        let at = DATA + 0x10_0000 * (pair as u64 + 1);
        card.offer(2 * pair, &[Buffer::writable(at, 2048)]);
        let back = packet(200, 7 + pair as u8);
        send(card.peers[pair].as_raw_fd(), &back, MsgFlags::empty()).unwrap();
        assert_eq!(card.used(2 * pair).1, 212);
        let mut got = vec![0; back.len()];
        card.memory.read_slice(&mut got, GuestAddress(at)).unwrap();
        assert_eq!(got[12..], back[12..]);
    }
    let totals = counts.totals();
    assert_eq!((totals.sent.packets, totals.sent.bytes), (2, 200));
    assert_eq!((totals.received.packets, totals.received.bytes), (2, 400));
    assert!(!card.rig.needs_reset());
}

/// What a driver says, in pieces, and the answer; none: the device breaks.
type Row = (&'static str, &'static [&'static [u8]], u32, Option<u8>);

const COMMANDS: &[Row] = &[
    ("two pairs", &[&[4, 0, 2, 0]], 1, Some(0)),
    ("the same again", &[&[4, 0, 2, 0]], 1, Some(0)),
    ("no pairs", &[&[4, 0, 0, 0]], 1, Some(1)),
    ("more than there are", &[&[4, 0, 3, 0]], 1, Some(1)),
    ("two, as a high byte", &[&[4, 0, 0, 2]], 1, Some(1)),
    ("as many as there can be", &[&[4, 0, 0, 0x80]], 1, Some(1)),
    ("all ones", &[&[0xff, 0xff, 0xff, 0xff]], 1, Some(1)),
    ("another class", &[&[0, 0, 1, 0]], 1, Some(1)),
    ("a class that needs a feature", &[&[5, 0, 1, 0]], 1, Some(1)),
    ("another command: hashes", &[&[4, 1, 1, 0]], 1, Some(1)),
    ("short", &[&[4, 0, 1]], 1, Some(1)),
    ("class alone", &[&[4]], 1, Some(1)),
    ("too long", &[&[4, 0, 1, 0, 0]], 1, Some(1)),
    ("an answer of many bytes", &[&[4, 0, 2, 0]], 64, Some(0)),
    ("byte by byte", &[&[4], &[0], &[2], &[0]], 1, Some(0)),
    ("no room for the answer", &[&[4, 0, 1, 0]], 0, None),
    ("nothing but an answer", &[], 1, Some(1)),
];

#[test]
fn commands_that_make_no_sense_change_nothing() {
    for (name, pieces, room, wanted) in COMMANDS {
        let mut card = Card::new(2);
        assert_eq!(card.set_pairs(2), 0);
        let mut buffers = Vec::new();
        for (at, piece) in (0u64..).zip(*pieces) {
            let at = COMMAND + 0x10 * at;
            card.memory.write_slice(piece, GuestAddress(at)).unwrap();
            buffers.push(Buffer::readable(at, piece.len() as u32));
        }
        card.memory.write_slice(&[0xee; 64], GuestAddress(ACK)).unwrap();
        buffers.extend((*room > 0).then(|| Buffer::writable(ACK, *room)));
        card.offer(4, &buffers);
        match wanted {
            Some(answer) => {
                assert_eq!(card.used(4).1, 1, "{name}");
                let last = GuestAddress(ACK + u64::from(*room) - 1);
                assert_eq!(card.memory.read_obj::<u8>(last).unwrap(), *answer, "{name}");
                assert!(!card.rig.needs_reset(), "{name}");
                // It goes on.
                assert_eq!(card.set_pairs(1), 0, "{name}");
                assert_eq!(card.attached(), [true, false], "{name}");
            }
            None => {
                while !card.rig.needs_reset() {
                    card.rig.wait();
                }
                assert_eq!(card.attached(), [true, true], "{name}");
            }
        }
    }
}

#[test]
fn rings_of_commands_that_make_no_sense_break_the_card_only() {
    let breaks = |name: &str, act: &dyn Fn(&mut Card)| {
        let mut card = Card::new(2);
        act(&mut card);
        card.rig.kicks[4].write(1).unwrap();
        while !card.rig.needs_reset() {
            card.rig.wait();
        }
        card.net.reset();
        assert_eq!(card.net.pairs.active(), 1, "{name}");
    };
    let next = 1;
    breaks("a loop", &|card| {
        let ring = &mut card.rings[4];
        ring.write_descriptor(ring.descriptors, 0, (COMMAND, 4), next, 1);
        ring.write_descriptor(ring.descriptors, 1, (COMMAND, 4), next, 0);
        ring.offer_head(0);
    });
    breaks("a head behind the ring", &|card| card.rings[4].offer_head(32));
    breaks("an answer behind memory", &|card| {
        let buffers = [Buffer::readable(COMMAND, 4), Buffer::writable(1 << 40, 1)];
        card.rings[4].offer(&buffers).unwrap();
    });
    breaks("an answer before the question", &|card| {
        let buffers = [Buffer::writable(ACK, 1), Buffer::readable(COMMAND, 4)];
        card.rings[4].offer(&buffers).unwrap();
    });
    // A question from nowhere is none, and is answered.
    let mut card = Card::new(2);
    card.offer(4, &[Buffer::readable(1 << 40, 4), Buffer::writable(ACK, 1)]);
    card.used(4);
    assert_eq!(card.memory.read_obj::<u8>(GuestAddress(ACK)).unwrap(), 1);
    assert!(!card.rig.needs_reset());
}

#[test]
fn a_reset_goes_back_to_one_pair() {
    let mut card = Card::new(4);
    assert_eq!(card.set_pairs(3), 0);
    assert_eq!(card.attached(), [true, true, true, false]);
    card.restart();
    assert_eq!(card.attached(), [true, false, false, false]);
}

#[test]
fn a_driver_that_does_not_know_of_pairs_has_one_and_its_commands_behind_it() {
    // With commands, and without.
    let mut card = Card::with(2, 1 << F_CTRL_VQ, &[0, 1, 2], |net| net);
    assert_eq!(card.command_at(2, &[4, 0, 2, 0]), 1);
    assert_eq!(card.command_at(2, &[4, 0, 1, 0]), 0);
    for features in [0, 1 << F_CTRL_VQ, 1 << F_MQ] {
        let mut card = Card::with(2, features, &[0, 1], |net| net);
        let out = packet(60, 1);
        card.transmit(0, &out);
        assert_eq!(received(&card.peers[0]), out);
        assert_eq!(card.attached(), [true, false]);
    }
    // Without the first pair there is no card.
    let memory = memory(8 << 20);
    let (rig, mut activation) = Rig::activation(&memory, Vec::new(), MQ);
    activation.queues.clear();
    let mut net = Net::new(links(&[cable().0, cable().0]), CONFIG);
    assert!(net.activate(activation).is_err());
    drop(rig);
}

#[test]
fn pairs_whose_rings_were_not_made_cannot_be_used() {
    for made in [&[0, 1, 8][..], &[0, 1, 2, 8], &[0, 1, 3, 8], &[0, 1, 4, 5, 8]] {
        let mut card = Card::with(4, MQ, made, |net| net);
        assert_eq!((card.set_pairs(2), card.set_pairs(1)), (1, 0), "{made:?}");
        let left: Vec<_> = card.net.suspend().unwrap().into_iter().map(|queue| queue.index).collect();
        let mut sorted = left.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, made, "all come back");
    }
    let mut card = Card::with(4, MQ, &[0, 1, 2, 3, 6, 7, 8], |net| net);
    assert_eq!((card.set_pairs(3), card.set_pairs(2)), (1, 0));
}

#[test]
fn a_card_goes_on_elsewhere_with_the_pairs_it_had() {
    let mut card = Card::new(4);
    assert_eq!(card.set_pairs(3), 0);
    for round in 0..10u8 {
        // A packet is on its way to each.
        for pair in 0..3 {
            send(card.peers[pair].as_raw_fd(), &packet(60, round), MsgFlags::empty()).unwrap();
        }
        let queues = card.net.suspend().unwrap();
        assert_eq!(queues.len(), 9);
        let state = card.net.save();
        assert_eq!((state.version, state.bytes.as_slice()), (1, &[3, 0][..]));
        // As new taps are.
        card.cables.iter().for_each(|cable| cable.attached.store(true, Ordering::Release));
        card.net = Net::new(links(&card.cables), CONFIG);
        card.net.restore(&state).unwrap();
        card.net.activate(card.rig.again(queues, MQ)).unwrap();
        assert_eq!(card.attached(), [true, true, true, false]);
        for pair in 0..3usize {
            card.offer(2 * pair, &[Buffer::writable(DATA + 0x1000 * pair as u64, 2048)]);
            assert_eq!(card.used(2 * pair).1, 72);
        }
    }
    assert_eq!(card.set_pairs(4), 0, "and obeys");
}

#[test]
fn states_that_no_card_had_are_refused() {
    let card = |pairs: usize| Net::new(links(&(0..pairs).map(|_| cable().0).collect::<Vec<_>>()), CONFIG);
    let states: [(u32, &[u8]); 6] =
        [(1, &[0, 0]), (1, &[5, 0]), (1, &[1, 1]), (1, &[1]), (1, &[1, 0, 0]), (2, &[1, 0])];
    for (version, bytes) in states {
        assert!(card(4).restore(&DeviceState::new(version, bytes)).is_err(), "{version} {bytes:?}");
    }
    assert!(card(1).restore(&DeviceState::new(1, [1, 0])).is_err(), "of a card of several");
    // What older programs saved: one pair, and nothing to remember.
    assert_eq!(card(1).save(), DeviceState::default());
    card(1).restore(&DeviceState::default()).unwrap();
}

#[test]
fn all_pairs_share_the_limits_of_their_card() {
    let limiter =
        Limiter::new(Limits { operations: Rate { per_second: 100, burst: 4 }, ..Limits::default() });
    let mut card = Card::with(2, MQ, &[0, 1, 2, 3, 4], |net| {
        net.with_limiters(Limiter::new(Limits::default()), limiter)
    });
    assert_eq!(card.set_pairs(2), 0);
    let start = Instant::now();
    for round in 0..15u8 {
        for pair in 0..2 {
            card.transmit(pair, &packet(60, round));
        }
        for pair in 0..2 {
            card.used(2 * pair + 1);
            assert_eq!(received(&card.peers[pair]), packet(60, round));
        }
    }
    // 30 packets; with a bucket each the 15 of a pair would take 110 ms.
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(200), "30 packets took {took:?}");
}

/// The host's other guests pay for each change: a storm of them is held back, and loses none. What changes nothing is free.
#[test]
fn a_storm_of_changes_is_held_back() {
    let mut card = Card::new(2);
    for _ in 0..200 {
        assert_eq!((card.set_pairs(1), card.set_pairs(9)), (0, 1));
    }
    assert!(card.net.commands.wait().is_zero());
    let start = Instant::now();
    for _ in 0..13 {
        assert_eq!((card.set_pairs(2), card.set_pairs(1)), (0, 0));
        // A driver that begins anew does not get away with it.
        card.restart();
    }
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(550), "26 changes took {took:?}");
}

/// A real tap with two queues: the kernel has as many in use as the guest.
#[test]
fn a_real_tap_follows_the_commands() {
    if let Err(error) = nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET) {
        println!("skipped: a network namespace cannot be made here: {error}");
        return;
    }
    let taps = match Tap::open("seriotest2", 2) {
        Ok(taps) => taps,
        Err(error) => return println!("skipped: a tap cannot be made here: {error}"),
    };
    let ip = |arguments: &str| {
        let output = std::process::Command::new("ip").args(arguments.split(' ')).output();
        output.map_or_else(|_| String::new(), |output| String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let in_use = |used: usize| {
        let shown = ip("-d link show seriotest2");
        let wanted = format!("numqueues {used} numdisabled {}", 2 - used);
        assert!(shown.contains(&wanted), "not {wanted}: {shown}");
    };
    if !ip("-d link show seriotest2").contains("numqueues") {
        return println!("skipped: `ip -d link` does not tell of queues here");
    }
    in_use(2);
    let mut card = Card::new(2);
    card.net = Net::new(taps.into_iter().map(|tap| Arc::new(tap) as Arc<dyn Link>).collect(), CONFIG);
    card.restart();
    in_use(1);
    for (pairs, used) in [(2, 2), (2, 2), (1, 1), (2, 2)] {
        assert_eq!(card.set_pairs(pairs), 0);
        in_use(used);
    }
    let queues = card.net.suspend().unwrap();
    card.net.activate(card.rig.again(queues, MQ)).unwrap();
    in_use(2);
    // A tap that is gone has no queues: the driver hears that, and the card goes on.
    ip("link del seriotest2");
    assert_eq!(card.set_pairs(1), 1);
    card.restart();
}
