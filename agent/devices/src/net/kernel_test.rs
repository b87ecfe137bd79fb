//! Rings that go into the kernel's hands and come back, with a kernel that does what the test says.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, send};
use serio_hv::{EventFd, GuestMemory, Kvm, VhostRing, Vm, create_memory};
use serio_virtio::testing::{Buffer, DriverQueue, Rig};
use serio_virtio::{Chain, VirtQueue};
use vm_memory::{Bytes, GuestAddress};

use super::net_test::{Card, HEADER, RX_DATA, cable, packet};
use super::*;
use crate::limit::Rate;

const KNOWN: u64 = 1 << 15 | 1 << 28 | 1 << 29 | 1 << 32;
/// Enough for all that passes here.
const WIDE: Limits =
    Limits { bytes: Rate { per_second: 1 << 30, burst: 0 }, operations: Rate { per_second: 0, burst: 0 } };
const LONG: Duration = Duration::from_secs(20);

/// A ring that it has taken over.
struct Taken {
    places: [GuestAddress; 3],
    next_avail: u16,
    call: EventFd,
    error: EventFd,
}

#[derive(Default)]
struct Seen {
    taken: Vec<Taken>,
    starts: u32,
    stops: u32,
}

struct FakeKernel {
    features: u64,
    refuses: bool,
    seen: Mutex<Seen>,
    news: Condvar,
}

impl FakeKernel {
    fn new(features: u64, refuses: bool) -> Arc<FakeKernel> {
        Arc::new(FakeKernel { features, refuses, seen: Mutex::default(), news: Condvar::new() })
    }

    /// Waits until it was started and stopped so often.
    fn wait(&self, starts: u32, stops: u32) {
        let seen = self.seen.lock().unwrap();
        let differs = |seen: &mut Seen| (seen.starts, seen.stops) != (starts, stops);
        let (_seen, late) = self.news.wait_timeout_while(seen, LONG, differs).unwrap();
        assert!(!late.timed_out(), "not {starts} starts and {stops} stops");
    }

    /// Gives back the next chain of a ring, with that many bytes, and signals it.
    fn use_one(&self, index: usize, ring: &DriverQueue, len: u32) {
        let mut seen = self.seen.lock().unwrap();
        let taken = &mut seen.taken[index];
        let mut queue: VirtQueue = ring.queue(false);
        assert_eq!(queue.places(), taken.places);
        queue.catch_up().unwrap();
        assert_eq!(queue.next_avail(), taken.next_avail);
        let mut chain = Chain::default();
        assert!(queue.pop(&mut chain).unwrap(), "nothing is offered");
        queue.push_used(chain.head(), len).unwrap();
        taken.next_avail = queue.next_avail();
        taken.call.write(1).unwrap();
    }
}

impl Shortcut for FakeKernel {
    fn features(&self) -> u64 {
        self.features
    }

    fn start(
        &self,
        _memory: &GuestMemory,
        features: u64,
        _link: BorrowedFd<'_>,
        rings: &[VhostRing<'_>; 2],
    ) -> io::Result<()> {
        if self.refuses {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        assert_eq!(features & !self.features, 0);
        let mut seen = self.seen.lock().unwrap();
        assert!(seen.taken.is_empty(), "it runs already");
        let take = |ring: &VhostRing<'_>| Taken {
            places: [ring.descriptors, ring.avail, ring.used],
            next_avail: ring.next_avail,
            call: ring.call.try_clone().unwrap(),
            error: ring.error.try_clone().unwrap(),
        };
        seen.taken = rings.iter().map(take).collect();
        seen.starts += 1;
        self.news.notify_all();
        Ok(())
    }

    fn stop(&self) {
        let mut seen = self.seen.lock().unwrap();
        seen.taken.clear();
        seen.stops += 1;
        self.news.notify_all();
    }
}

/// A card that has this kernel behind it.
struct Bench {
    card: Card,
    kernel: Arc<FakeKernel>,
    peer: OwnedFd,
    limiter: Arc<Limiter>,
    counts: NicCounts,
}

impl Bench {
    fn new(kernel: Arc<FakeKernel>, features: u64, limits: Limits) -> Bench {
        let (link, peer) = cable();
        assert!(link.kernel.set(kernel.clone()).is_ok());
        let (limiter, counts) = (Limiter::new(limits), NicCounts::new(1));
        let with = |net: Net| net.with_limiters(limiter.clone(), limiter.clone()).with_counts(counts.clone());
        let card = Card::with(link, features, false, with);
        Bench { card, kernel, peer, limiter, counts }
    }

    fn post(&mut self, slot: u64) {
        self.card.post(&[Buffer::writable(RX_DATA + slot * 4096, 4096)]);
    }

    /// A packet through the cable into the next buffer, by the card's own thread.
    fn receive(&mut self, slot: u64, seed: u8) {
        let sent = packet(100, seed);
        send(self.peer.as_raw_fd(), &sent, MsgFlags::empty()).unwrap();
        assert_eq!(self.card.received().1 as usize, sent.len());
        let mut got = vec![0; sent.len()];
        self.card.rig.memory.read_slice(&mut got, GuestAddress(RX_DATA + slot * 4096)).unwrap();
        assert_eq!(got[HEADER..], sent[HEADER..]);
    }
}

/// How often a thread of this process with this name has gone to sleep.
fn sleeps(name: &str) -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let named = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).unwrap());
    let status = named.into_iter().find(|status| status.starts_with(&format!("Name:\t{name}\n"))).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
    line.trim().parse().unwrap()
}

#[test]
fn the_rings_go_to_the_kernel_and_come_back_where_it_stops() {
    let mut bench = Bench::new(FakeKernel::new(KNOWN, false), KNOWN, Limits::default());
    let kernel = bench.kernel.clone();
    kernel.wait(1, 0);
    (0..4).for_each(|slot| bench.post(slot));
    kernel.use_one(0, &bench.card.rx, 60);
    assert_eq!(bench.card.received().1, 60, "its interrupt reaches the driver");
    bench.card.transmit(&packet(80, 1));
    kernel.use_one(1, &bench.card.tx, 0);
    // It is told a moment after the kernel has begun.
    while bench.counts.totals().in_kernel != 1 {
        std::thread::yield_now();
    }

    bench.limiter.set(WIDE);
    kernel.wait(1, 1);
    while bench.card.tx.used().is_none() {
        bench.card.rig.wait();
    }
    bench.receive(1, 7);
    let totals = bench.counts.totals();
    assert_eq!((totals.in_kernel, totals.received.packets, totals.sent.packets), (0, 1, 0));

    // Two buffers are with the thread, unused: they go along.
    bench.limiter.set(Limits::default());
    kernel.wait(2, 1);
    kernel.use_one(0, &bench.card.rx, 61);
    assert_eq!(bench.card.received().1, 61);

    let queues = bench.card.net.suspend().unwrap();
    kernel.wait(2, 2);
    let next: Vec<u16> = queues.iter().map(|active| active.queue.next_avail()).collect();
    assert_eq!(next, [3, 1]);
    bench.card.net.activate(bench.card.rig.again(queues, KNOWN)).unwrap();
    kernel.wait(3, 2);
    kernel.use_one(0, &bench.card.rx, 62);
    assert_eq!(bench.card.received().1, 62);
    bench.card.net.reset();
    kernel.wait(3, 3);
    assert!(!bench.card.rig.needs_reset());
}

#[test]
fn the_thread_sleeps_while_the_kernel_works() {
    let mut bench = Bench::new(FakeKernel::new(KNOWN, false), KNOWN, Limits::default());
    bench.kernel.wait(1, 0);
    // Once more, so that the thread has long gone to sleep when it is looked at.
    bench.limiter.set(WIDE);
    bench.kernel.wait(1, 1);
    bench.limiter.set(Limits::default());
    bench.kernel.wait(2, 1);
    let before = sleeps("net-pair0");
    for round in 0..50 {
        bench.post(round % 8);
        bench.kernel.use_one(0, &bench.card.rx, 60);
        bench.card.rig.kicks[1].write(1).unwrap();
        send(bench.peer.as_raw_fd(), &packet(100, 1), MsgFlags::empty()).unwrap();
        bench.card.received();
        // The thread's turn, if it wants one.
        std::thread::sleep(Duration::from_millis(1));
    }
    let woken = sleeps("net-pair0") - before;
    assert!(woken <= 2, "woken {woken} times by what is the kernel's business");
    assert_eq!(bench.counts.totals().received.packets, 0);
}

#[test]
fn what_speaks_against_the_kernel() {
    let cases: [(&str, Arc<FakeKernel>, Limits); 3] = [
        ("it does not know event indexes", FakeKernel::new(KNOWN & !(1 << 29), false), Limits::default()),
        ("the card is limited", FakeKernel::new(KNOWN, false), WIDE),
        ("it refuses", FakeKernel::new(KNOWN, true), Limits::default()),
    ];
    for (why, kernel, limits) in cases {
        let mut bench = Bench::new(kernel, KNOWN, limits);
        bench.post(0);
        bench.receive(0, 5);
        assert_eq!(bench.kernel.seen.lock().unwrap().starts, 0, "{why}");
        assert!(!bench.card.rig.needs_reset(), "{why}");
    }
}

#[test]
fn a_driver_that_polls_keeps_its_rings_here() {
    let kernel = FakeKernel::new(KNOWN, false);
    let (link, peer) = cable();
    assert!(link.kernel.set(kernel.clone()).is_ok());
    let memory = serio_virtio::testing::memory(8 << 20);
    let mut net = Net::new(vec![link], NetConfig { mac: [2, 0, 0, 0, 0, 1], mtu: None });
    let mut rings = [0x1000, 0x1_0000].map(|at| DriverQueue::new(&memory, at, 32));
    let (rig, activation) =
        Rig::activation(&memory, rings.iter().map(|ring| ring.queue(false)).collect(), KNOWN);
    rig.mute(1);
    net.activate(activation).unwrap();
    rings[0].offer(&[Buffer::writable(RX_DATA, 4096)]).unwrap();
    rig.kicks[0].write(1).unwrap();
    send(peer.as_raw_fd(), &packet(100, 1), MsgFlags::empty()).unwrap();
    while rings[0].used().is_none() {
        rig.wait();
    }
    assert_eq!(kernel.seen.lock().unwrap().starts, 0);
}

#[test]
fn a_guest_whose_memory_is_logged_keeps_its_rings_here() {
    let kvm = match Kvm::open() {
        Ok(kvm) => kvm,
        Err(error) => return println!("skipped: {error}"),
    };
    let kernel = FakeKernel::new(KNOWN, false);
    let (link, peer) = cable();
    assert!(link.kernel.set(kernel.clone()).is_ok());
    let memory = create_memory(8 << 20).unwrap();
    let vm = Vm::new(&kvm, &memory).unwrap();
    let mut net = Net::new(vec![link], NetConfig { mac: [2, 0, 0, 0, 0, 1], mtu: None });
    let mut rings = [0x1000, 0x1_0000].map(|at| DriverQueue::new(&memory, at, 32));
    let (rig, activation) =
        Rig::activation(&memory, rings.iter().map(|ring| ring.queue(false)).collect(), KNOWN);
    net.activate(activation).unwrap();
    kernel.wait(1, 0);
    // As a snapshot does it: the devices stand still meanwhile.
    let queues = net.suspend().unwrap();
    vm.start_log().unwrap();
    net.activate(rig.again(queues, KNOWN)).unwrap();
    rings[0].offer(&[Buffer::writable(RX_DATA, 4096)]).unwrap();
    rig.kicks[0].write(1).unwrap();
    send(peer.as_raw_fd(), &packet(100, 1), MsgFlags::empty()).unwrap();
    while rings[0].used().is_none() {
        rig.wait();
    }
    kernel.wait(1, 1);
}

/// It has taken a chain, and says that it makes no sense: what becomes of that is decided here.
#[test]
fn what_makes_no_sense_to_the_kernel_is_judged_here() {
    for broken in [false, true] {
        let mut bench = Bench::new(FakeKernel::new(KNOWN, false), KNOWN, Limits::default());
        bench.kernel.wait(1, 0);
        bench.post(0);
        bench.kernel.use_one(0, &bench.card.rx, 60);
        if broken {
            // The device's own thread refuses a head that is no descriptor.
            bench.card.tx.offer_head(5000);
        } else {
            bench.card.transmit(&packet(80, 1));
        }
        bench.kernel.seen.lock().unwrap().taken[1].error.write(1).unwrap();
        bench.kernel.wait(1, 1);
        while !broken && bench.card.tx.used().is_none() {
            bench.card.rig.wait();
        }
        while broken && !bench.card.rig.needs_reset() {
            std::thread::yield_now();
        }
        assert_eq!(bench.card.rig.needs_reset(), broken);
        // It stays here until the card starts anew.
        bench.limiter.set(Limits::default());
        if !broken {
            bench.post(1);
            assert_eq!(bench.card.received().1, 60);
            bench.receive(1, 3);
        }
        bench.kernel.wait(1, 1);
    }
}

#[test]
fn a_cable_that_is_pulled_ends_it() {
    let bench = Bench::new(FakeKernel::new(KNOWN, false), KNOWN, Limits::default());
    bench.kernel.wait(1, 0);
    drop(bench.peer);
    bench.kernel.wait(1, 1);
    assert!(!bench.card.rig.needs_reset());
}
