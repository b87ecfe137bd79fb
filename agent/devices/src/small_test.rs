//! The small devices: randomness, and the console's two directions.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serio_hv::GuestMemory;
use serio_virtio::testing::{Buffer, DriverQueue, Rig, memory};
use serio_virtio::{ActivateError, VirtioDevice};
use vm_memory::{Bytes, GuestAddress};

use crate::console::{Console, ConsoleEnds};
use crate::limit::{Limiter, Limits, Rate};
use crate::rng::{LIMITS, REQUEST_BYTES_MAX, Rng};

const DATA: u64 = 0x10_0000;

fn entropy(limits: Limits) -> Rng {
    Rng::new(Limiter::new(limits))
}

#[test]
fn randomness_is_bounded_and_fills_what_it_says() {
    let memory = memory(4 << 20);
    let mut driver = DriverQueue::new(&memory, 0x1000, 8);
    let (rig, activation) = Rig::activation(&memory, vec![driver.queue(true)], 0);
    let mut rng = entropy(LIMITS);
    rng.activate(activation).unwrap();
    for (count, (asked, want)) in
        (0u16..).zip([(64u32, 64u32), (1, 1), (1 << 20, u32::try_from(REQUEST_BYTES_MAX).unwrap()), (0, 0)])
    {
        driver.set_used_event(count);
        driver.offer(&[
            Buffer::writable(DATA, asked / 2),
            Buffer::writable(DATA + 0x10_0000, asked - asked / 2),
        ]);
        rig.kicks[0].write(1).unwrap();
        rig.wait();
        assert_eq!(driver.used().unwrap().1, want);
    }
    let mut bytes = [0; 1024];
    memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
    assert!(bytes.iter().filter(|byte| **byte == 0).count() < 64, "not random at all");
    // Buffers outside of memory get nothing; a broken ring costs the device.
    driver.set_used_event(4);
    driver.offer(&[Buffer::writable(1 << 40, 8)]);
    rig.kicks[0].write(1).unwrap();
    rig.wait();
    assert_eq!(driver.used().unwrap().1, 0);
    assert!(!rig.needs_reset());
    driver.offer_head(99);
    rig.kicks[0].write(1).unwrap();
    rig.wait();
    assert!(rig.needs_reset());
    rng.reset();
}

/// The burst comes at once, the rest as time goes by; a guest that resets its device gets no new burst.
#[test]
fn randomness_has_a_limit() {
    let memory = memory(4 << 20);
    let limiter =
        Limiter::new(Limits { bytes: Rate { per_second: 20_000, burst: 1000 }, ..Limits::default() });
    let mut driver = DriverQueue::new(&memory, 0x1000, 8);
    let (rig, activation) = Rig::activation(&memory, vec![driver.queue(false)], 0);
    let mut rng = Rng::new(limiter.clone());
    let begun = std::time::Instant::now();
    rng.activate(activation).unwrap();
    for _ in 0..4 {
        driver.offer(&[Buffer::writable(DATA, 1000)]).unwrap();
    }
    rig.kicks[0].write(1).unwrap();
    for _ in 0..4 {
        while driver.used().is_none() {
            rig.wait();
        }
    }
    // The first is the burst, the last may go when the two before it are paid for.
    assert!(begun.elapsed() >= std::time::Duration::from_millis(90), "{:?}", begun.elapsed());
    // Now so slow that no time of a test pays for what one request took.
    limiter.set(Limits { bytes: Rate { per_second: 1, burst: 1000 }, ..Limits::default() });
    driver.offer(&[Buffer::writable(DATA, 4096)]).unwrap();
    rig.kicks[0].write(1).unwrap();
    while driver.used().is_none() {
        rig.wait();
    }
    rng.reset();
    assert!(!limiter.wait().is_zero(), "a reset filled the bucket");
}

#[test]
fn a_device_without_its_queue_does_not_start() {
    let memory = memory(1 << 20);
    let (_rig, activation) = Rig::activation(&memory, Vec::new(), 0);
    assert!(matches!(entropy(LIMITS).activate(activation), Err(ActivateError::QueueNotEnabled { index: 0 })));
}

struct Port {
    console: Console,
    ends: Arc<ConsoleEnds>,
    rig: Rig,
    rx: DriverQueue,
    tx: DriverQueue,
    memory: GuestMemory,
}

fn port(input: OwnedFd, output: OwnedFd) -> Port {
    let memory = memory(8 << 20);
    let (rx, tx) = (DriverQueue::new(&memory, 0x1000, 8), DriverQueue::new(&memory, 0x1_0000, 8));
    let (rig, activation) = Rig::activation(&memory, vec![rx.queue(false), tx.queue(false)], 0);
    let ends = Arc::new(ConsoleEnds { input, output });
    let mut console = Console::new(ends.clone());
    console.activate(activation).unwrap();
    Port { console, ends, rig, rx, tx, memory }
}

impl Port {
    fn post(&mut self, len: u32) {
        self.rx.offer(&[Buffer::writable(DATA, len)]).unwrap();
        self.rig.kicks[0].write(1).unwrap();
    }

    fn typed(&mut self) -> Vec<u8> {
        loop {
            if let Some((_, len)) = self.rx.used() {
                let mut bytes = vec![0; usize::try_from(len).unwrap()];
                self.memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
                return bytes;
            }
            self.rig.wait();
        }
    }
}

#[test]
fn a_console_carries_bytes_both_ways() {
    let (input, mut keyboard) = std::io::pipe().unwrap();
    let (mut screen, output) = std::io::pipe().unwrap();
    let mut port = port(input.into(), output.into());
    keyboard.write_all(b"before any buffer").unwrap();
    port.post(6);
    assert_eq!(port.typed(), b"before");
    port.post(100);
    assert_eq!(port.typed(), b" any buffer");
    port.post(100);
    keyboard.write_all(b"later").unwrap();
    assert_eq!(port.typed(), b"later");

    // More than a pipe holds: it comes out as it is read, and nothing is lost.
    let long: Vec<u8> = (0..300_000u32).map(|at| u8::try_from(at % 253).unwrap()).collect();
    port.memory.write_slice(&long, GuestAddress(DATA)).unwrap();
    port.tx.offer(&[Buffer::readable(DATA, 100_000), Buffer::readable(DATA + 100_000, 200_000)]).unwrap();
    port.rig.kicks[1].write(1).unwrap();
    let mut got = vec![0; long.len()];
    screen.read_exact(&mut got).unwrap();
    assert!(got == long);
    while port.tx.used().is_none() {
        port.rig.wait();
    }
    assert!(!port.rig.needs_reset());
}

#[test]
fn a_console_whose_ends_are_gone_goes_on() {
    let (input, keyboard) = std::io::pipe().unwrap();
    let (screen, output) = std::io::pipe().unwrap();
    let mut port = port(input.into(), output.into());
    drop((keyboard, screen));
    port.post(10);
    for _ in 0..20 {
        port.tx.offer(&[Buffer::readable(DATA, 10_000)]).unwrap();
        port.rig.kicks[1].write(1).unwrap();
        while port.tx.used().is_none() {
            port.rig.wait();
        }
    }
    assert!(!port.rig.needs_reset());
}

#[test]
fn a_console_that_nobody_reads_can_be_reset() {
    let (input, _keyboard) = std::io::pipe().unwrap();
    let (_screen, output) = std::io::pipe().unwrap();
    let mut port = port(input.into(), output.into());
    for _ in 0..8 {
        port.tx.offer(&[Buffer::readable(DATA, 1_000_000)]).unwrap();
    }
    port.rig.kicks[1].write(1).unwrap();
    port.console.reset();
    assert!(port.tx.used().is_none());
}

#[test]
fn a_file_is_an_end_too() {
    let mut file = tempfile::tempfile().unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let mut port = port(null.into(), file.try_clone().unwrap().into());
    port.memory.write_slice(b"to a file", GuestAddress(DATA)).unwrap();
    port.tx.offer(&[Buffer::readable(DATA, 9)]).unwrap();
    port.rig.kicks[1].write(1).unwrap();
    port.rig.wait();
    std::io::Seek::rewind(&mut file).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "to a file");
}

/// Half a chain is out when it stops; another console sends the rest, and no byte twice.
#[test]
fn a_console_suspended_half_way_goes_on_as_another_one() {
    let (input, _keyboard) = std::io::pipe().unwrap();
    let (mut screen, output) = std::io::pipe().unwrap();
    let mut port = port(input.into(), output.into());
    let long: Vec<u8> = (0..300_000u32).map(|at| u8::try_from(at % 253).unwrap()).collect();
    port.memory.write_slice(&long, GuestAddress(DATA)).unwrap();
    port.tx.offer(&[Buffer::readable(DATA, 100_000), Buffer::readable(DATA + 100_000, 200_000)]).unwrap();
    port.rig.kicks[1].write(1).unwrap();
    let mut got = Vec::new();
    let mut states = std::collections::BTreeSet::new();
    while got.len() < long.len() {
        let mut piece = vec![0; 20_000.min(long.len() - got.len())];
        screen.read_exact(&mut piece).unwrap();
        got.extend(piece);
        let queues = port.console.suspend().unwrap();
        assert_eq!(queues.len(), 2);
        let state = port.console.save();
        states.insert(state.bytes.clone());
        let mut next = Console::new(port.ends.clone());
        next.restore(&state).unwrap();
        port.console = next;
        port.console.activate(port.rig.again(queues, 0)).unwrap();
    }
    assert!(got == long && states.len() > 3, "{} states", states.len());
    while port.tx.used().is_none() {
        port.rig.wait();
    }
    assert!(port.console.restore(&serio_virtio::DeviceState::new(9, [])).is_err());
    assert!(!port.rig.needs_reset());
}

#[test]
fn randomness_goes_on_where_it_stopped() {
    let memory = memory(1 << 20);
    let mut driver = DriverQueue::new(&memory, 0x1000, 16);
    let (rig, activation) = Rig::activation(&memory, vec![driver.queue(false)], 0);
    let mut rng = entropy(LIMITS);
    rng.activate(activation).unwrap();
    for _ in 0..50 {
        for _ in 0..3 {
            driver.offer(&[Buffer::writable(0x8000, 64)]).unwrap();
        }
        let queues = rng.suspend().unwrap();
        rng = entropy(LIMITS);
        rng.activate(rig.again(queues, 0)).unwrap();
        for _ in 0..3 {
            while driver.used().is_none() {
                rig.wait();
            }
        }
    }
    assert!(rng.restore(&serio_virtio::DeviceState::new(1, [])).is_err(), "it has no state");
}
