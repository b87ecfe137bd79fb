//! The balloon between a driver written here and memory of the host.

use proptest::prelude::*;
use serio_hv::{GuestMemory, create_memory};
use serio_virtio::testing::{Buffer, DriverQueue, Rig};
use vm_memory::Bytes;
use vm_memory::GuestAddress;

use super::*;

const LIST: u64 = 0x30_0000;
const ALL: u64 = 1 << F_STATS | 1 << F_REPORTING;

struct Guest {
    balloon: Balloon,
    handle: BalloonHandle,
    rig: Rig,
    queues: Vec<DriverQueue>,
    memory: GuestMemory,
}

fn guest(features: u64) -> Guest {
    let memory = create_memory(8 << 20).unwrap();
    let count = 2 + features.count_ones() as u64;
    let queues: Vec<_> =
        (0..count).map(|at| DriverQueue::new(&memory, 0x10_0000 + at * 0x1_0000, 8)).collect();
    let (rig, activation) =
        Rig::activation(&memory, queues.iter().map(|queue| queue.queue(false)).collect(), features);
    let handle = BalloonHandle::new().unwrap();
    let mut balloon = Balloon::new(handle.clone());
    balloon.activate(activation).unwrap();
    Guest { balloon, handle, rig, queues, memory }
}

impl Guest {
    fn ask(&mut self, queue: usize, buffers: &[Buffer]) {
        self.queues[queue].offer(buffers).unwrap();
        self.rig.kicks[queue].write(1).unwrap();
        while self.queues[queue].used().is_none() {
            self.rig.wait();
        }
    }

    fn inflate(&mut self, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.memory.write_slice(&bytes, GuestAddress(LIST)).unwrap();
        self.ask(0, &[Buffer::readable(LIST, bytes.len() as u32)]);
    }

    fn byte(&self, page: u64) -> u8 {
        self.memory.read_obj(GuestAddress(page * PAGE_BYTES + 17)).unwrap()
    }
}

#[test]
fn pages_in_the_balloon_are_released_and_only_those() {
    let mut guest = guest(ALL);
    guest.memory.write_slice(&vec![9u8; 64 * 4096], GuestAddress(0)).unwrap();
    guest.inflate(&[3, 4, 5, 20, 11, 10, 9]);
    let zero: Vec<u64> = (0..64).filter(|page| guest.byte(*page) == 0).collect();
    assert_eq!(zero, [3, 4, 5, 9, 10, 11, 20]);
    assert_eq!(guest.handle.status().released_bytes, 7 * PAGE_BYTES);
    guest.ask(1, &[Buffer::readable(LIST, 4)]);
    // Numbers that are no RAM, half a number, a list outside of memory: nothing happens.
    guest.inflate(&[u32::MAX, 1 << 30, 2048, u32::MAX - 1]);
    guest.ask(0, &[Buffer::readable(LIST, 3)]);
    guest.ask(0, &[Buffer::readable(1 << 40, 64)]);
    assert_eq!(guest.handle.status().released_bytes, 7 * PAGE_BYTES);
    assert!(!guest.rig.needs_reset());
}

#[test]
fn free_pages_are_reported_with_and_without_statistics() {
    for (features, queue) in [(ALL, 3), (1 << F_REPORTING, 2)] {
        let mut guest = guest(features);
        guest.memory.write_slice(&vec![9u8; 64 * 4096], GuestAddress(0)).unwrap();
        guest.ask(
            queue,
            &[
                Buffer::writable(4096, 8192),
                Buffer::writable(40 * 4096 + 1, 4096),
                Buffer::writable(u64::MAX - 4095, 4096),
            ],
        );
        assert_eq!((guest.byte(0), guest.byte(1), guest.byte(2), guest.byte(3)), (9, 0, 0, 9));
        assert_eq!((guest.byte(40), guest.byte(41)), (9, 9), "no whole page");
    }
}

#[test]
fn statistics_come_when_asked_for() {
    let mut guest = guest(ALL);
    let fill = |guest: &Guest, free: u64| {
        let stat = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        let bytes = [stat(4, free), stat(5, 1000), stat(999, 1)].concat();
        guest.memory.write_slice(&bytes, GuestAddress(LIST)).unwrap();
        bytes.len() as u32
    };
    let len = fill(&guest, 700);
    guest.queues[2].offer(&[Buffer::readable(LIST, len)]).unwrap();
    guest.rig.kicks[2].write(1).unwrap();
    for free in [650, 600] {
        guest.handle.refresh();
        // The buffer comes back, and the driver fills it again. Who asked before the device had the buffer asks again.
        while guest.queues[2].used().is_none() {
            std::thread::yield_now();
            guest.handle.refresh();
        }
        fill(&guest, free);
        guest.queues[2].offer(&[Buffer::readable(LIST, len)]).unwrap();
        guest.rig.kicks[2].write(1).unwrap();
        while guest.handle.status().guest.values[4] != Some(free) {
            std::thread::yield_now();
        }
    }
    let stats = guest.handle.status().guest;
    assert_eq!((stats.values[5], stats.values[0]), (Some(1000), None));
    // Suspended, the buffer is the ring's again; afterwards it can still be asked for.
    let queues = guest.balloon.suspend().unwrap();
    assert_eq!(queues.iter().map(|queue| queue.index).collect::<Vec<_>>(), [0, 1, 2, 3]);
    let (rig, activation) =
        Rig::activation(&guest.memory, queues.into_iter().map(|queue| queue.queue).collect(), ALL);
    guest.rig = rig;
    guest.balloon.activate(activation).unwrap();
    guest.rig.kicks[2].write(1).unwrap();
    while guest.queues[2].used().is_none() {
        guest.handle.refresh();
        std::thread::yield_now();
    }
    assert!(!guest.rig.needs_reset());
}

#[test]
fn the_target_is_told_and_what_the_driver_says_is_kept() {
    let mut guest = guest(ALL);
    guest.handle.set_target((100 << 20) + 5);
    guest.rig.wait();
    let mut config = [0; 8];
    guest.balloon.read_config(0, &mut config);
    assert_eq!(u32::from_le_bytes(config[..4].try_into().unwrap()), 25_600);
    guest.balloon.write_config(4, &7u32.to_le_bytes());
    guest.balloon.write_config(0, &9u32.to_le_bytes());
    guest.balloon.write_config(4, &[1]);
    assert_eq!(
        (guest.handle.status().target_bytes, guest.handle.status().actual_bytes),
        (100 << 20, 7 * PAGE_BYTES)
    );
    let saved = guest.balloon.save();
    let mut other = Balloon::new(BalloonHandle::new().unwrap());
    other.restore(&saved).unwrap();
    assert_eq!(other.config(), guest.balloon.config());
    assert!(other.restore(&DeviceState::new(9, [0; 8])).is_err());
    guest.balloon.reset();
    assert_eq!(guest.handle.status().actual_bytes, 0);
}

#[test]
fn a_broken_ring_costs_the_device() {
    let mut guest = guest(ALL);
    guest.queues[0].offer_head(99);
    guest.rig.kicks[0].write(1).unwrap();
    while !guest.rig.needs_reset() {
        guest.rig.wait();
    }
}

proptest! {
    #[test]
    fn any_bytes_are_statistics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        worker::parse_stats(&bytes);
    }
}
