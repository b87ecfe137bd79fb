//! What a misuse is done to, how it is told that it works, and who watches.

use crate::blk::{self, Disk, feature, kind as request};
use crate::mem::Dma;
use crate::net::F_CTRL_VQ;
use crate::pci::{Bar, COMMAND_MASTER, COMMAND_MEMORY, Function, Msix};
use crate::port::Port;
use crate::suite::{Failure, Machine, Outcome};
use crate::virtio::{NO_VECTOR, Queue, Segment, Virtio, status};
use crate::{apic, clock, cpu, ensure};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};

/// Queues get interrupts (`mini.vectors`), though nobody waits for them: where the host's kernel can serve a card's rings, it does so
/// only then.
pub static VECTORS: AtomicBool = AtomicBool::new(false);

/// Descriptor flags (virtio 1.2 §2.7.5).
pub const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;
/// A table of descriptors.
pub const INDIRECT: u16 = 4;
/// Feature bits of the transport.
pub const F_INDIRECT: u64 = 1 << 28;
/// Event suppression by index.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// Entries of each queue that a stage makes.
pub const SIZE: u16 = 16;

const F_MULTIPORT: u64 = 1 << 1;
const PORT_NAME: &str = "org.qemu.guest_agent.0";

/// The kinds of devices that rows know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A disk.
    Blk,
    /// A network card.
    Net,
    /// Random numbers.
    Rng,
    /// A console of one port.
    Console,
    /// Named ports.
    Ports,
    /// What this program does not drive: only its transport is tried.
    Other,
}

/// A device, or one queue of it.
#[derive(Clone, Debug)]
pub struct Subject {
    /// As it is printed.
    pub label: String,
    /// Where it is.
    pub function: Function,
    /// What it is.
    pub kind: Kind,
    /// The queue; None where a device has none that is known.
    pub target: Option<Target>,
    /// The first subject of its device: rows for devices use it alone.
    pub is_first: bool,
    bar: Bar,
    places: Places,
}

/// A queue.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its index.
    pub index: u16,
    /// The device reads what is offered at once, not when it has something to tell.
    pub eager: bool,
}

/// Addresses where no buffer can be.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// The end of RAM below 4 GiB.
    pub ram_end: u64,
    /// Between RAM and the first BAR, or behind the last.
    pub hole: u64,
    /// Configuration space.
    pub ecam: u64,
}

fn targets(kind: Kind, queues: u16) -> Vec<Target> {
    let list: &[(u16, bool)] = match kind {
        Kind::Blk | Kind::Rng => &[(0, true)],
        // The control queue, which a card of several queue pairs has.
        Kind::Net => &[(1, true), (0, false), (2, true)],
        Kind::Console => &[(1, true), (0, false)],
        Kind::Ports => &[(3, true), (2, false), (4, false), (5, true)],
        Kind::Other => &[(0, false), (1, false), (2, false)],
    };
    let known = list.iter().filter(|(index, _)| *index < queues);
    known.map(|&(index, eager)| Target { index, eager }).collect()
}

/// All devices of the bus, with each of their queues.
pub fn subjects(machine: &mut Machine) -> Result<Vec<Subject>, Failure> {
    let ram_end = machine.boot.ram().filter(|range| range.start < 1 << 32);
    let ram_end = ram_end.map(|range| range.start + range.len).max().unwrap_or(0);
    let bus = machine.bus()?;
    let (ecam, functions) = (bus.ecam, bus.functions.clone());
    let mut subjects: Vec<Subject> = Vec::new();
    let mut counts = [0usize; 8];
    for function in functions {
        let Some(number) = function.virtio_type() else { continue };
        let device = Virtio::open(function)?;
        device.reset()?;
        let bars = function.bars();
        let inside = |bar: &&Bar| (bar.address..bar.address + bar.len).contains(&device.common);
        let bar = *bars.iter().find(inside).ok_or("the common configuration lies in no BAR")?;
        let (kind, word) = match number {
            1 => (Kind::Net, "net"),
            2 => (Kind::Blk, "blk"),
            3 if device.device_features() & F_MULTIPORT != 0 => (Kind::Ports, "ports"),
            3 => (Kind::Console, "console"),
            4 => (Kind::Rng, "rng"),
            _ => (Kind::Other, "type"),
        };
        counts[kind as usize] += 1;
        let word = match (kind, counts[kind as usize]) {
            (Kind::Other, _) => format!("type{number}"),
            (_, 1) => String::from(word),
            (_, count) => format!("{word}{count}"),
        };
        let places = Places { ram_end, hole: (ram_end + (64 << 20)).max(0xe000_0000), ecam };
        let targets = targets(kind, device.num_queues());
        let mut add = |target: Option<Target>, is_first| {
            let label = target.filter(|_| targets.len() > 1).map(|target| format!("{word}.{}", target.index));
            let label = label.unwrap_or_else(|| word.clone());
            subjects.push(Subject { label, function, kind, target, is_first, bar, places });
        };
        if targets.is_empty() {
            add(None, true);
        }
        for (at, target) in targets.iter().enumerate() {
            add(Some(*target), at == 0);
        }
    }
    Ok(subjects)
}

impl Subject {
    /// Drives the device as an honest driver would.
    pub fn works(&self) -> Outcome {
        let device = match self.kind {
            Kind::Blk => {
                let mut disk = Disk::open(self.function, SIZE)?;
                disk.read(0, Dma::new(4096))?;
                disk.device
            }
            Kind::Ports => {
                let mut port = Port::on(Virtio::open(self.function)?, PORT_NAME)?;
                port.send(b"still here")?;
                port.device
            }
            _ => {
                let mut stage = Stage::of(self)?;
                stage.start(0)?;
                stage.answers()?;
                stage.device
            }
        };
        let after = device.status();
        device.reset()?;
        ensure!(
            after & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK,
            "status {after:#x} after a reset and honest use"
        );
        Ok(())
    }
}

/// A device in the hands of a row.
pub struct Stage {
    /// The device, reset.
    pub device: Virtio,
    /// What it is.
    pub kind: Kind,
    /// Its BAR, as it was placed.
    pub bar: Bar,
    /// Where nothing is.
    pub places: Places,
    /// Another device's BAR.
    pub other_bar: u64,
    /// Its queues, once it is live.
    pub queues: Vec<Queue>,
    /// Bytes that the device may write into what was laid.
    pub writable: u64,
    target: Option<Target>,
    buffer: Dma,
}

impl Stage {
    /// Resets the device.
    pub fn new(subject: &Subject, all: &[Subject]) -> Result<Self, Failure> {
        let mut stage = Self::of(subject)?;
        let other = all.iter().find(|other| other.function.device != subject.function.device);
        stage.other_bar = other.map_or(stage.places.hole, |other| other.bar.address);
        Ok(stage)
    }

    fn of(subject: &Subject) -> Result<Self, Failure> {
        let device = Virtio::open(subject.function)?;
        device.reset()?;
        Ok(Self {
            device,
            kind: subject.kind,
            bar: subject.bar,
            places: subject.places,
            other_bar: subject.places.hole,
            queues: Vec::new(),
            writable: 0,
            target: subject.target,
            buffer: Dma::new(8192),
        })
    }

    /// The features with which an honest driver would work.
    pub fn negotiate(&self, more: u64) -> Outcome {
        let own = match self.kind {
            Kind::Blk => feature::FLUSH | feature::MULTI_QUEUE | feature::DISCARD | feature::WRITE_ZEROES,
            Kind::Ports => F_MULTIPORT,
            // Without MQ the control queue is the third.
            Kind::Net => F_CTRL_VQ,
            _ => 0,
        };
        self.device.negotiate(own | more)?;
        Ok(())
    }

    /// Brings the device up with all its queues, and `more` features if it has them.
    pub fn start(&mut self, more: u64) -> Outcome {
        self.negotiate(more)?;
        self.queues.clear();
        let msix = Msix::find(self.device.function).filter(|_| VECTORS.load(Ordering::Relaxed));
        if let Some(msix) = &msix {
            msix.enable(true, false);
        }
        for index in 0..self.device.num_queues() {
            let vector = msix.as_ref().map_or(NO_VECTOR, |msix| {
                msix.route(index, apic::id(), apic::vector::DEVICE);
                index
            });
            self.queues.push(self.device.queue(index, SIZE, vector)?);
        }
        self.device.driver_ok();
        Ok(())
    }

    /// Resets, and starts again from nothing.
    pub fn restart(&mut self, more: u64) -> Outcome {
        self.device.reset()?;
        self.start(more)
    }

    /// Whether the device reads its queue unasked.
    pub fn is_eager(&self) -> bool {
        self.target.is_some_and(|target| target.eager)
    }

    /// The queue in question.
    pub fn queue(&mut self) -> Result<&mut Queue, Failure> {
        let index = self.target.map_or(0, |target| usize::from(target.index));
        self.queues.get_mut(index).ok_or_else(|| "the device is not live".into())
    }

    fn ring(&self) -> Option<&Queue> {
        self.queues.get(usize::from(self.target?.index))
    }

    /// How many chains the device has given back.
    pub fn used(&self) -> u16 {
        self.ring().map_or(0, |queue| queue.used.get16(2))
    }

    /// What it says it wrote into the first.
    pub fn first_used_len(&self) -> u64 {
        self.ring().map_or(0, |queue| u64::from(queue.used.get32(8)))
    }

    /// A request that the device answers: (address, length, flags without NEXT), and which part is its data.
    pub fn honest(&self) -> (Vec<(u64, u32, u16)>, usize) {
        let at = self.buffer.address;
        let data = at + 4096;
        self.buffer.part(0, 64).fill(0);
        // One queue pair, which is what there is.
        if let (Kind::Net, Some(Target { index: 2, .. })) = (self.kind, self.target) {
            self.buffer.copy_in(0, &[4, 0, 1, 0]);
            return (alloc::vec![(at, 4, 0), (at + 32, 1, WRITE)], 1);
        }
        match (self.kind, self.target.map_or(0, |target| target.index)) {
            (Kind::Blk, _) => (alloc::vec![(at, 16, 0), (data, 512, WRITE), (at + 32, 1, WRITE)], 1),
            (Kind::Net, 1) => (alloc::vec![(data, 72, 0)], 0),
            (Kind::Console, 1) | (Kind::Ports, 1 | 5) => (alloc::vec![(data, 16, 0)], 0),
            (Kind::Ports, 3) => (alloc::vec![(at, 8, 0)], 0),
            _ => (alloc::vec![(data, 2048, WRITE)], 0),
        }
    }

    /// Writes a chain into the descriptors from `first` on.
    pub fn lay(&mut self, first: u16, parts: &[(u64, u32, u16)]) -> Outcome {
        self.writable = parts.iter().filter(|part| part.2 & WRITE != 0).map(|part| u64::from(part.1)).sum();
        let queue = self.queue()?;
        for (at, (address, len, flags)) in (first..).zip(parts) {
            let last = usize::from(at - first) + 1 == parts.len();
            queue.set_descriptor(at, *address, *len, flags | u16::from(!last), (at + 1) % SIZE);
        }
        Ok(())
    }

    /// Offers the chain at `head` and rings.
    pub fn offer(&mut self, head: u16) -> Outcome {
        let queue = self.queue()?;
        queue.offer(head);
        queue.kick();
        Ok(())
    }

    /// An honest request is answered now, if the device answers unasked.
    pub fn answers(&mut self) -> Outcome {
        if !self.is_eager() {
            return Ok(());
        }
        let (parts, _) = self.honest();
        let before = self.used();
        self.lay(0, &parts)?;
        self.offer(0)?;
        let answered = clock::poll(3000, || self.used() != before);
        ensure!(answered, "no answer to an honest request, status {:#x}", self.device.status());
        Ok(())
    }

    /// Puts the function back where it was, MSI-X off, and resets the device.
    pub fn heal(&self) -> Outcome {
        let function = self.device.function;
        function.place(&self.bar, self.bar.address);
        function.set16(4, COMMAND_MEMORY | COMMAND_MASTER);
        if let Some(msix) = Msix::find(function) {
            for entry in 0..msix.count {
                msix.mask(entry, true);
            }
            msix.enable(false, false);
        }
        Ok(self.device.reset()?)
    }

    /// A register of the common configuration.
    pub fn register(&self, offset: u64) -> u64 {
        self.device.common + offset
    }

    /// Selects a queue.
    pub fn select(&self, queue: u16) {
        cpu::write16(self.register(crate::virtio::common::QUEUE_SELECT), queue);
    }
}

/// A device that does its work before, during and after a row on another one.
pub struct Witness(Stage);

impl Witness {
    /// Another device that answers; None if there is none.
    pub fn choose(subject: &Subject, all: &[Subject]) -> Result<Option<Self>, Failure> {
        let apart = |other: &&Subject| {
            other.function.device != subject.function.device
                && other.is_first
                && matches!(other.kind, Kind::Rng | Kind::Blk)
        };
        let mut found = all.iter().filter(apart);
        let Some(other) = found.next_back() else { return Ok(None) };
        let mut stage = Stage::of(other)?;
        stage.start(0)?;
        Ok(Some(Self(stage)))
    }

    /// Makes a request of it.
    pub fn ask(&mut self, when: &str) -> Outcome {
        self.0.answers().map_err(|failure| super::prefix(&format!("another device, {when}"), failure))
    }

    /// Lets it go.
    pub fn dismiss(&self) -> Outcome {
        Ok(self.0.device.reset()?)
    }
}

/// One request to a disk, with parts of the caller's; the status, or None if the device gave up instead.
pub fn blk_status(
    stage: &mut Stage,
    kind: u32,
    sector: u64,
    data: &[Segment],
) -> Result<Option<u8>, Failure> {
    let (head, answer) = (Dma::new(16), Dma::new(16));
    head.set32(0, kind);
    head.set64(8, sector);
    answer.set8(0, 0xee);
    let mut parts = alloc::vec![Segment::out(head)];
    parts.extend_from_slice(data);
    parts.push(Segment::into(answer.part(0, 1)));
    let queue = stage.queue()?;
    queue.add(&parts).ok_or("the queue is full")?;
    queue.kick();
    let broken = |stage: &Stage| stage.device.status() & status::NEEDS_RESET != 0;
    let settled = clock::poll(3000, || answer.get8(0) != 0xee || broken(stage));
    ensure!(settled, "no answer to request type {kind}");
    // The status is written before the chain comes back.
    let returned = broken(stage) || stage.queue()?.wait(3000).is_ok();
    ensure!(returned, "request type {kind} has a status and does not come back");
    Ok((!broken(stage)).then(|| answer.get8(0)))
}

/// A read that must succeed: the disk goes on without a reset.
pub fn blk_goes_on(stage: &mut Stage) -> Outcome {
    let status = blk_status(stage, request::IN, 0, &[Segment::into(Dma::new(512))])?;
    ensure!(status == Some(blk::OK), "an honest read afterwards: {status:?}");
    Ok(())
}
