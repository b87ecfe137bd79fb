//! Measurements, natively at CPL3 and by polling: what the machine costs, without an operating system.
//!
//! One line each: `bench NAME VALUE UNIT`.

mod disk;
mod net;
mod vsock;

use crate::blk::{Disk, kind};
use crate::mem::Dma;
use crate::suite::Machine;
use crate::virtio::{Queue, Result, Segment};
use crate::{clock, cpu, println};
use alloc::format;
use alloc::vec::Vec;

/// Where a measurement of latency ends: after so many requests, or after that time.
const LATENCY_SAMPLES: usize = 100_000;
const LATENCY_NS: u64 = 1_000_000_000;

/// A set of block requests with their own buffers, to have in flight together.
pub struct Requests {
    slots: Vec<(Dma, Dma)>,
}

impl Requests {
    /// `count` requests of `len` bytes.
    pub fn new(count: u64, len: u64) -> Self {
        Self { slots: (0..count).map(|_| (Dma::new(64), Dma::new(len))).collect() }
    }
    /// The data of one.
    pub fn data(&self, slot: u64) -> Dma {
        self.slots[slot as usize].1
    }
    fn offer(&self, queue: &mut Queue, slot: usize, kind: u32, sector: u64) -> Result<u16> {
        let (header, data) = self.slots[slot];
        header.set32(0, kind);
        header.set64(8, sector);
        header.set8(16, 0xee);
        let data = Segment { dma: data, writable: kind == kind::IN };
        let all = [Segment::out(header.part(0, 16)), data, Segment::into(header.part(16, 1))];
        queue.add(&all).ok_or_else(|| "the queue is full".into())
    }
    /// Each request once, all at the same time, slot after slot on the disk.
    pub fn run_once(&self, queue: &mut Queue, kind: u32) -> Result<()> {
        for (slot, (_, data)) in self.slots.iter().enumerate() {
            self.offer(queue, slot, kind, slot as u64 * data.len / 512)?;
        }
        queue.kick();
        for _ in &self.slots {
            queue.wait(5000)?;
        }
        match self.slots.iter().position(|(header, _)| header.get8(16) != 0) {
            None => Ok(()),
            Some(slot) => Err(format!("request {slot}: status {}", self.slots[slot].0.get8(16))),
        }
    }
    /// Each place of the disk once, one after the other.
    pub fn sweep(&self, queue: &mut Queue, kind: u32, sectors: u64) -> Result<()> {
        let each = self.data(0).len / 512;
        for sector in (0..sectors / each * each).step_by(each as usize) {
            self.offer(queue, 0, kind, sector)?;
            queue.kick();
            queue.wait(20_000)?;
        }
        Ok(())
    }
    /// Keeps all of them in flight for `ms`, one after the other on the disk or anywhere; (requests, nanoseconds).
    pub fn measure_for(
        &self,
        queue: &mut Queue,
        (kind, sectors, sequential): (u32, u64, bool),
        ms: u64,
    ) -> Result<(u64, u64)> {
        let each = self.data(0).len / 512;
        let places = sectors / each;
        let (mut random, mut next) = (0x5e10u64, 0u64);
        let mut sector = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            next += 1;
            (if sequential { next } else { random >> 20 }) % places * each
        };
        let mut owner = alloc::vec![0usize; usize::from(queue.size)];
        let begun = clock::now_ns();
        let end = begun + ms * 1_000_000;
        for slot in 0..self.slots.len() {
            owner[usize::from(self.offer(queue, slot, kind, sector())?)] = slot;
        }
        queue.kick();
        let (mut done, mut flying) = (0, self.slots.len());
        while flying > 0 {
            // All that is there, then one ring for what takes its place.
            let (mut head, _) = queue.wait(20_000)?;
            loop {
                done += 1;
                flying -= 1;
                let slot = owner[usize::from(head)];
                if self.slots[slot].0.get8(16) != 0 {
                    return Err(format!("status {}", self.slots[slot].0.get8(16)));
                }
                if clock::now_ns() < end {
                    owner[usize::from(self.offer(queue, slot, kind, sector())?)] = slot;
                    flying += 1;
                }
                match queue.take() {
                    Some((more, _)) => head = more,
                    None => break,
                }
            }
            queue.kick_if_wanted();
        }
        Ok((done, clock::now_ns() - begun))
    }
    /// Keeps all of them in flight until `total` are done; the answer is nanoseconds for each.
    fn measure(&self, queue: &mut Queue, kind: u32, sectors: u64, total: u64) -> Result<u64> {
        let each = self.data(0).len / 512;
        let mut random = 0x5e10u64;
        let mut sector = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 20) % (sectors / each) * each
        };
        let mut owner = alloc::vec![0usize; usize::from(queue.size)];
        let start = clock::now_ns();
        let mut offered = 0;
        for slot in 0..self.slots.len() {
            owner[usize::from(self.offer(queue, slot, kind, sector())?)] = slot;
            offered += 1;
        }
        queue.kick();
        for done in 1..=total {
            let (head, _) = queue.wait(5000)?;
            let slot = owner[usize::from(head)];
            if self.slots[slot].0.get8(16) != 0 {
                return Err(format!("status {}", self.slots[slot].0.get8(16)));
            }
            if offered < total {
                owner[usize::from(self.offer(queue, slot, kind, sector())?)] = slot;
                offered += 1;
                queue.kick();
            } else if done == offered {
                break;
            }
        }
        Ok((clock::now_ns() - start) / total)
    }
}

/// How long a cell of a measurement by time takes, unless `mini.bench_ms` says so.
const CELL_MS: u64 = 1000;

/// Measures what `choice` names.
pub fn run(machine: &mut Machine, choice: &str) {
    let ms = machine.boot.number("mini.bench_ms").unwrap_or(CELL_MS);
    let by_time = match choice {
        "disk" => disk::run(machine, ms),
        "net" => net::run(machine, ms),
        "vsock" => vsock::run(machine, ms),
        _ => Ok(()),
    };
    if let Err(reason) = by_time {
        println!("mini: {choice}: {reason}");
    }
    match choice {
        "disk" | "net" | "vsock" => {}
        "blk" => blk(machine),
        "latency" => latency(machine),
        "exit" => exits(machine),
        _ => println!("mini: nothing to measure is named {choice}"),
    }
}

fn blk(machine: &mut Machine) {
    let disks = machine.bus.as_ref().map(|bus| bus.virtio(2)).unwrap_or_default();
    for (index, function) in disks.into_iter().enumerate() {
        if let Err(reason) = blk_one(index, function) {
            println!("mini: disk {index}: {reason}");
        }
    }
}

fn blk_one(index: usize, function: crate::pci::Function) -> Result<()> {
    let mut disk = Disk::open(function, 256)?;
    let sectors = disk.sectors;
    for (name, kind, len, depth, total) in [
        ("read-4k-1", kind::IN, 4096, 1, 4000),
        ("read-4k-32", kind::IN, 4096, 32, 20_000),
        ("write-4k-1", kind::OUT, 4096, 1, 4000),
        ("write-4k-32", kind::OUT, 4096, 32, 20_000),
        ("read-256k-4", kind::IN, 256 << 10, 4, 1000),
        ("write-256k-4", kind::OUT, 256 << 10, 4, 1000),
    ] {
        if kind == kind::OUT && disk.read_only() || sectors < 2 * len / 512 {
            continue;
        }
        let ns = Requests::new(depth, len).measure(&mut disk.queues[0], kind, sectors, total)?;
        println!("bench blk{index}-{name} {ns} ns/op");
    }
    disk.device.reset()
}

/// How long single requests of 4 KiB to the first disk take, one after the other, reads and writes in turn.
fn latency(machine: &mut Machine) {
    let disk = machine.bus.as_ref().and_then(|bus| bus.virtio(2).first().copied());
    let result = disk.ok_or_else(|| "there is none".into()).and_then(latency_of);
    if let Err(reason) = result {
        println!("mini: disk 0: {reason}");
    }
}

fn latency_of(function: crate::pci::Function) -> Result<()> {
    let mut disk = Disk::open(function, 16)?;
    let sectors = disk.sectors;
    let request = Requests::new(1, 4096);
    let mut times = Vec::with_capacity(LATENCY_SAMPLES);
    let end = clock::now_ns() + LATENCY_NS;
    let mut random = 0x5e10u64;
    while times.len() < LATENCY_SAMPLES && clock::now_ns() < end {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let kind = if times.len() % 2 == 0 { kind::IN } else { kind::OUT };
        let start = clock::now_ns();
        request.offer(&mut disk.queues[0], 0, kind, (random >> 20) % (sectors / 8) * 8)?;
        disk.queues[0].kick();
        disk.queues[0].wait(5000)?;
        times.push(clock::now_ns() - start);
        if request.slots[0].0.get8(16) != 0 {
            return Err(format!("status {}", request.slots[0].0.get8(16)));
        }
    }
    times.sort_unstable();
    let share = |thousandths: usize| times[(times.len() - 1) * thousandths / 1000];
    println!("bench latency-count {} requests", times.len());
    for (name, thousandths) in [("p50", 500), ("p90", 900), ("p99", 990), ("p999", 999)] {
        println!("bench latency-{name} {} ns", share(thousandths));
    }
    disk.device.reset()
}

/// The cost of leaving the guest: a port read that the VMM answers.
fn exits(machine: &mut Machine) {
    let rounds = 20_000u64;
    let start = clock::now_ns();
    for _ in 0..rounds {
        cpu::inb(0x3f8 + 7);
    }
    println!("bench exit-port {} ns/op", (clock::now_ns() - start) / rounds);
    let Some(bus) = &machine.bus else { return };
    let start = clock::now_ns();
    for _ in 0..rounds {
        cpu::read32(bus.ecam);
    }
    println!("bench exit-config {} ns/op", (clock::now_ns() - start) / rounds);
}
