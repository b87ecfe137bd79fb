//! A disk against a driver in memory: a naive model of what a disk is, hostile rings, and resets.

use std::io::Write;

use proptest::prelude::*;
use serio_hv::GuestMemory;
use serio_virtio::testing::{Buffer, DriverQueue, Rig, memory};
use serio_volume::Access;
use vm_memory::{Bytes, GuestAddress};

use super::*;

#[path = "held_test.rs"]
mod held_test;

const DISK_SECTORS: u64 = 64;
const DISK_BYTES: usize = 64 * 512;
/// Where the tests put headers, data and status in guest memory.
const HEADER: u64 = 0x10_0000;
pub(super) const DATA: u64 = 0x20_0000;
const RING: u64 = 0x1000;

pub(super) struct Disk {
    pub(super) blk: Blk,
    rig: Rig,
    driver: DriverQueue,
    memory: GuestMemory,
    pub(super) file: tempfile::NamedTempFile,
}

fn pattern() -> Vec<u8> {
    (0..DISK_BYTES).map(|at| u8::try_from((at / 512 * 7 + at) % 256).unwrap()).collect()
}

impl Disk {
    fn new(access: Access, features: u64) -> Self {
        Self::with(access, features, |blk| blk)
    }

    pub(super) fn with(access: Access, features: u64, change: impl FnOnce(Blk) -> Blk) -> Self {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&pattern()).unwrap();
        Self::of(file, access, features, change)
    }

    fn of(
        file: tempfile::NamedTempFile,
        access: Access,
        features: u64,
        change: impl FnOnce(Blk) -> Blk,
    ) -> Self {
        let volume = Volume::open_raw(file.reopen().unwrap(), access).unwrap();
        let mut blk = change(Blk::new(volume, &BlkConfig { serial: "disk-0".to_owned(), queues: 1 }));
        let memory = memory(4 << 20);
        let driver = DriverQueue::new(&memory, RING, 16);
        let (rig, activation) = Rig::activation(&memory, vec![driver.queue(false)], features);
        blk.activate(activation).unwrap();
        Self { blk, rig, driver, memory, file }
    }

    fn header(&self, at: u64, kind: u32, sector: u64) {
        self.memory.write_obj(kind.to_le(), GuestAddress(at)).unwrap();
        self.memory.write_obj(0u32, GuestAddress(at + 4)).unwrap();
        self.memory.write_obj(sector.to_le(), GuestAddress(at + 8)).unwrap();
    }

    fn kick(&self) {
        self.rig.kicks[0].write(1).unwrap();
    }

    /// One request from start to end: its status and the used length.
    pub(super) fn run(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        self.header(HEADER, kind, sector);
        self.memory.write_obj(0xeeu8, GuestAddress(HEADER + 64)).unwrap();
        let mut buffers = vec![Buffer::readable(HEADER, 16)];
        buffers.extend_from_slice(data);
        buffers.push(Buffer::writable(HEADER + 64, 1));
        let head = self.driver.offer(&buffers).unwrap();
        self.kick();
        let (used, written) = self.wait();
        assert_eq!(used, head);
        (self.memory.read_obj(GuestAddress(HEADER + 64)).unwrap(), written)
    }

    fn wait(&mut self) -> (u16, u32) {
        loop {
            if let Some(used) = self.driver.used() {
                return used;
            }
            self.rig.wait();
        }
    }

    fn wait_first(&mut self, heads: &mut std::collections::BTreeSet<u16>) {
        let (head, _) = self.wait();
        assert!(heads.remove(&head));
    }

    fn status(&self, header: u64) -> u8 {
        self.memory.read_obj(GuestAddress(header + 64)).unwrap()
    }

    fn contents(&self) -> Vec<u8> {
        std::fs::read(self.file.path()).unwrap()
    }
}

const FLUSH: u64 = 1 << F_FLUSH;

#[test]
fn reads_writes_flush_and_the_serial_number() {
    let mut disk = Disk::new(Access::ReadWrite, FLUSH);
    let want = pattern();
    assert_eq!(
        disk.run(0, 3, &[Buffer::writable(DATA, 700), Buffer::writable(DATA + 0x1000, 324)]),
        (0, 1025)
    );
    let mut got = [0; 1024];
    disk.memory.read_slice(&mut got[..700], GuestAddress(DATA)).unwrap();
    disk.memory.read_slice(&mut got[700..], GuestAddress(DATA + 0x1000)).unwrap();
    assert_eq!(got, want[3 * 512..5 * 512]);
    disk.memory.write_slice(&[0xab; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(disk.run(1, 63, &[Buffer::readable(DATA, 512)]), (0, 1));
    assert_eq!(disk.run(4, 0, &[]), (0, 1));
    assert_eq!(disk.contents()[63 * 512..], [0xab; 512]);
    assert_eq!(disk.run(8, 0, &[Buffer::writable(DATA, 20)]), (0, 21));
    let mut id = [0; 20];
    disk.memory.read_slice(&mut id, GuestAddress(DATA)).unwrap();
    assert_eq!(&id, b"disk-0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert!(!disk.rig.needs_reset());
}

#[test]
fn without_flush_each_write_is_durable_and_still_right() {
    let mut disk = Disk::new(Access::ReadWrite, 0);
    disk.memory.write_slice(&[0x5a; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(disk.run(1, 0, &[Buffer::readable(DATA, 512)]), (0, 1));
    assert_eq!(disk.contents()[..512], [0x5a; 512]);
}

#[test]
fn wrong_requests_are_answered() {
    let mut disk = Disk::new(Access::ReadWrite, FLUSH);
    assert_eq!(disk.run(0, DISK_SECTORS, &[Buffer::writable(DATA, 512)]).0, request::S_IOERR);
    assert_eq!(disk.run(0, DISK_SECTORS - 1, &[Buffer::writable(DATA, 1024)]).0, request::S_IOERR);
    assert_eq!(disk.run(0, u64::MAX, &[Buffer::writable(DATA, 512)]).0, request::S_IOERR);
    assert_eq!(disk.run(0, u64::MAX / 512, &[Buffer::writable(DATA, 512)]).0, request::S_IOERR);
    assert_eq!(disk.run(0, 0, &[Buffer::writable(DATA, 511)]).0, request::S_IOERR);
    assert_eq!(disk.run(0, 0, &[Buffer::writable(1 << 40, 512)]).0, request::S_IOERR);
    assert_eq!(disk.run(0, 0, &[Buffer::writable((4 << 20) - 256, 512)]).0, request::S_IOERR);
    assert_eq!(disk.run(0, 0, &[]).0, request::S_OK);
    assert_eq!(disk.run(77, 0, &[]).0, request::S_UNSUPP);
    assert_eq!(disk.run(11, 0, &[]).0, request::S_IOERR);
    assert_eq!(disk.contents(), pattern());
    let mut read_only = Disk::new(Access::ReadOnly, FLUSH);
    assert_eq!(read_only.run(1, 0, &[Buffer::readable(DATA, 512)]).0, request::S_IOERR);
    assert_eq!(read_only.run(4, 0, &[]).0, request::S_OK);
    assert_ne!(read_only.blk.features() & 1 << 5, 0);
    assert!(!disk.rig.needs_reset() && !read_only.rig.needs_reset());
}

#[test]
fn many_requests_at_once_and_both_kinds_of_table() {
    let mut disk = Disk::new(Access::ReadWrite, FLUSH);
    let want = pattern();
    for round in 0..20u64 {
        for slot in 0..12u64 {
            let at = HEADER + slot * 0x100;
            disk.header(at, 0, (slot * 5 + round) % DISK_SECTORS);
            let buffers = [
                Buffer::readable(at, 16),
                Buffer::writable(DATA + slot * 512, 512),
                Buffer::writable(at + 64, 1),
            ];
            disk.driver.offer_indirect(0x30_0000 + slot * 0x100, &buffers).unwrap();
        }
        disk.kick();
        for _ in 0..12 {
            assert_eq!(disk.wait().1, 513);
        }
        for slot in 0..12u64 {
            let sector = usize::try_from((slot * 5 + round) % DISK_SECTORS).unwrap();
            let mut got = [0; 512];
            disk.memory.read_slice(&mut got, GuestAddress(DATA + slot * 512)).unwrap();
            assert_eq!(got, want[sector * 512..][..512]);
        }
    }
}

#[test]
fn a_chain_that_cannot_be_answered_breaks_the_ring_only() {
    for buffers in [
        vec![Buffer::readable(HEADER, 16)],
        vec![Buffer::readable(HEADER, 15), Buffer::writable(DATA, 1)],
        vec![Buffer::readable(1 << 40, 16), Buffer::writable(DATA, 1)],
        vec![Buffer::readable(HEADER, 16), Buffer::writable(1 << 40, 1)],
    ] {
        let mut disk = Disk::new(Access::ReadWrite, FLUSH);
        disk.header(HEADER, 4, 0);
        disk.driver.offer(&buffers).unwrap();
        disk.kick();
        disk.rig.wait();
        assert!(disk.rig.needs_reset(), "{buffers:?}");
        disk.kick();
        disk.blk.reset();
        assert!(disk.driver.used().is_none());
    }
}

#[test]
fn a_reset_with_requests_under_way_ends_and_the_disk_works_again() {
    let mut disk = Disk::new(Access::ReadWrite, FLUSH);
    for round in 0..30 {
        for slot in 0..5u64 {
            let at = HEADER + slot * 0x100;
            disk.header(at, if slot == 4 { 4 } else { 0 }, slot);
            let status = Buffer::writable(at + 64, 1);
            let data = Buffer::writable(DATA + slot * 512, 512);
            disk.driver.offer(&[Buffer::readable(at, 16), data, status]).unwrap();
        }
        disk.kick();
        disk.blk.reset();
        // Nothing of the old ring lives on: guest memory is the guest's again.
        disk.memory.write_slice(&[0; 0x8000], GuestAddress(RING)).unwrap();
        disk.driver = DriverQueue::new(&disk.memory, RING, 16);
        let (rig, activation) = Rig::activation(&disk.memory, vec![disk.driver.queue(round % 2 == 0)], FLUSH);
        disk.rig = rig;
        disk.blk.activate(activation).unwrap();
        assert_eq!(disk.run(0, 9, &[Buffer::writable(DATA, 512)]), (0, 513));
    }
}

/// Each request is answered once, by the disk that took it or, if none had, by the next.
#[test]
fn a_disk_suspended_with_requests_under_way_goes_on_as_another_one() {
    let mut disk = Disk::new(Access::ReadWrite, FLUSH);
    let volume = disk.blk.volume.clone();
    for round in 0..40u64 {
        let slots: Vec<u64> = (0..5).map(|slot| HEADER + slot * 0x100).collect();
        let mut heads = std::collections::BTreeSet::new();
        for (slot, at) in (0u64..).zip(&slots) {
            disk.header(*at, if slot == 4 { 4 } else { u32::from(slot % 2 == 1) }, slot);
            disk.memory.write_obj(0xeeu8, GuestAddress(at + 64)).unwrap();
            let data = DATA + slot * 512;
            let data = if slot % 2 == 1 { Buffer::readable(data, 512) } else { Buffer::writable(data, 512) };
            let status = Buffer::writable(at + 64, 1);
            heads.insert(disk.driver.offer(&[Buffer::readable(*at, 16), data, status]).unwrap());
        }
        disk.kick();
        if round % 2 == 0 {
            // Some are under way for sure.
            disk.wait_first(&mut heads);
        }
        let queues = disk.blk.suspend().unwrap();
        assert_eq!(queues.len(), 1);
        assert!(disk.blk.suspend().unwrap().is_empty(), "it has given them away");
        let answered = |disk: &Disk| slots.iter().filter(|at| disk.status(**at) != 0xee).count();
        let before = answered(&disk);
        let mut next = Blk::new(volume.clone(), &BlkConfig { serial: "disk-0".to_owned(), queues: 1 });
        next.restore(&disk.blk.save()).unwrap();
        assert_eq!(answered(&disk), before, "nobody is at work between the two");
        disk.blk = next;
        disk.blk.activate(disk.rig.again(queues, FLUSH)).unwrap();
        while !heads.is_empty() {
            let (head, _) = disk.wait();
            assert!(heads.remove(&head), "once only");
        }
        assert!(slots.iter().all(|at| disk.status(*at) == 0));
    }
    assert!(!disk.rig.needs_reset());
}

#[test]
fn a_disk_remembers_the_size_that_its_driver_knows() {
    let mut disk = Disk::new(Access::ReadWrite, FLUSH);
    disk.blk.read_config(0, &mut [0; 8]);
    assert_eq!(disk.blk.save(), DeviceState::new(1, (DISK_BYTES as u64).to_le_bytes()));
    for (version, bytes) in [(1, vec![0; 7]), (2, vec![0; 8]), (0, vec![1])] {
        assert!(disk.blk.restore(&DeviceState { version, bytes }).is_err());
    }
    disk.blk.restore(&DeviceState::default()).unwrap();
}

#[test]
fn several_queues_work_side_by_side() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let volume = Volume::open_raw(file.reopen().unwrap(), Access::ReadWrite).unwrap();
    let mut blk =
        Blk::new(volume, &BlkConfig { serial: "a-serial-number-that-is-too-long".to_owned(), queues: 4 });
    assert_eq!(blk.queue_sizes().len(), 4);
    let mut config = [0; 64];
    blk.read_config(0, &mut config);
    assert_eq!(config[..8], 2048u64.to_le_bytes());
    assert_eq!(config[34..36], [4, 0]);
    blk.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 64]);
    let memory = memory(4 << 20);
    let mut drivers: Vec<_> = (0..4u64).map(|q| DriverQueue::new(&memory, 0x1000 + q * 0x8000, 8)).collect();
    let queues = drivers.iter().map(|driver| driver.queue(true)).collect();
    let (rig, activation) = Rig::activation(&memory, queues, FLUSH);
    blk.activate(activation).unwrap();
    for (index, driver) in (0u8..).zip(&mut drivers) {
        let at = HEADER + u64::from(index) * 0x1000;
        memory.write_obj(1u32.to_le(), GuestAddress(at)).unwrap();
        memory.write_obj(u64::from(index).to_le(), GuestAddress(at + 8)).unwrap();
        memory.write_slice(&[index + 1; 512], GuestAddress(at + 512)).unwrap();
        let buffers =
            [Buffer::readable(at, 16), Buffer::readable(at + 512, 512), Buffer::writable(at + 64, 1)];
        driver.offer(&buffers).unwrap();
    }
    for kick in &rig.kicks {
        kick.write(1).unwrap();
    }
    for driver in &mut drivers {
        while driver.used().is_none() {
            rig.wait();
        }
    }
    let bytes = std::fs::read(file.path()).unwrap();
    for index in 0..4u8 {
        assert_eq!(bytes[usize::from(index) * 512..][..512], [index + 1; 512]);
    }
}

/// A layered volume, which can grow.
fn growing(folder: &std::path::Path) -> Volume {
    let file = |name: &str| {
        let mut options = std::fs::OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).open(folder.join(name)).unwrap()
    };
    let files = || serio_volume::LayerFiles { data: file("data"), map: file("map") };
    serio_volume::create_layer(&files(), 1 << 20, [7; 16], false).unwrap();
    Volume::open(serio_volume::VolumeFiles { layers: vec![files()] }, Access::ReadWrite).unwrap()
}

#[test]
fn a_disk_that_grows_tells_its_driver() {
    let folder = tempfile::tempdir().unwrap();
    let volume = growing(folder.path());
    let bell = CapacityBell::default();
    let mut blk =
        Blk::new(volume.clone(), &BlkConfig { serial: String::new(), queues: 1 }).with_bell(bell.clone());
    let capacity = |blk: &Blk| {
        let mut bytes = [0; 8];
        blk.read_config(0, &mut bytes);
        u64::from_le_bytes(bytes)
    };
    assert_eq!(capacity(&blk), 2048);
    // Nobody is there to be told, and the driver has read the old size: it hears of it as soon as it is ready.
    volume.resize(2 << 20).unwrap();
    bell.ring();
    let memory = memory(4 << 20);
    let mut driver = DriverQueue::new(&memory, RING, 16);
    let (rig, activation) = Rig::activation(&memory, vec![driver.queue(false)], FLUSH);
    let config_interrupts =
        || rig.platform.take_delivered().iter().filter(|message| message.data == 1).count();
    blk.activate(activation).unwrap();
    assert_eq!(config_interrupts(), 1);
    assert_eq!(capacity(&blk), 4096);

    let read_at = |sector: u64, driver: &mut DriverQueue| {
        memory.write_obj(0u32, GuestAddress(HEADER)).unwrap();
        memory.write_obj(sector.to_le(), GuestAddress(HEADER + 8)).unwrap();
        let last = Buffer::writable(HEADER + 64, 1);
        driver.offer(&[Buffer::readable(HEADER, 16), Buffer::writable(DATA, 512), last]).unwrap();
        rig.kicks[0].write(1).unwrap();
        while driver.used().is_none() {
            rig.wait();
        }
        memory.read_obj::<u8>(GuestAddress(HEADER + 64)).unwrap()
    };
    assert_eq!(read_at(6143, &mut driver), request::S_IOERR);
    config_interrupts();
    volume.resize(3 << 20).unwrap();
    bell.ring();
    assert_eq!((config_interrupts(), capacity(&blk)), (1, 6144));
    assert_eq!(read_at(6143, &mut driver), request::S_OK);
    blk.reset();
    config_interrupts();
    bell.ring();
    assert_eq!(config_interrupts(), 0, "no driver, no interrupt");
}

#[derive(Clone, Debug)]
struct Attempt {
    kind: u32,
    sector: u64,
    cuts: Vec<u32>,
    fill: u8,
    range: (u64, u32, u32),
}

fn attempt() -> impl Strategy<Value = Attempt> {
    let kind = prop_oneof![4 => Just(0u32), 4 => Just(1), 1 => Just(4), 2 => Just(11), 2 => Just(13), 1 => any::<u32>()];
    let sector = prop_oneof![8 => 0..DISK_SECTORS + 2, 1 => any::<u64>()];
    let cuts = prop_oneof![
        4 => prop::collection::vec(prop_oneof![Just(512u32), Just(1024), Just(4096)], 1..5),
        1 => prop::collection::vec(0u32..2000, 0..5),
    ];
    let range =
        (0..DISK_SECTORS + 2, 0u32..20, prop_oneof![4 => Just(0u32), 2 => Just(1), 1 => any::<u32>()]);
    (kind, sector, cuts, any::<u8>(), range).prop_map(|(kind, sector, cuts, fill, range)| Attempt {
        kind,
        sector,
        cuts,
        fill,
        range,
    })
}

/// What a disk does, in the plainest way: the status, and the bytes that a read returns.
fn model(disk: &mut [u8], attempt: &Attempt) -> (u8, Vec<u8>) {
    let len: usize = attempt.cuts.iter().map(|cut| usize::try_from(*cut).unwrap()).sum();
    let place = |sector: u64, len: usize| {
        let start = usize::try_from(sector).ok()?.checked_mul(512)?;
        (len.is_multiple_of(512) && start.checked_add(len)? <= DISK_BYTES).then(|| start..start + len)
    };
    let (from, count, flags) = attempt.range;
    let zeros = place(from, usize::try_from(count).unwrap() * 512);
    match attempt.kind {
        0 => place(attempt.sector, len).map_or((1, Vec::new()), |place| (0, disk[place].to_vec())),
        1 => place(attempt.sector, len).map_or((1, Vec::new()), |place| {
            disk[place].fill(attempt.fill);
            (0, Vec::new())
        }),
        4 => (0, Vec::new()),
        8 => (0, Vec::new()),
        11 if flags != 0 => (2, Vec::new()),
        13 if flags > 1 => (2, Vec::new()),
        11 => (u8::from(zeros.is_none()), Vec::new()),
        13 => zeros.map_or((1, Vec::new()), |zeros| {
            disk[zeros].fill(0);
            (0, Vec::new())
        }),
        _ => (2, Vec::new()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any sequence of requests, right and wrong, does to the disk what it does to the model.
    #[test]
    fn as_the_model(attempts in prop::collection::vec(attempt(), 1..40)) {
        let mut disk = Disk::new(Access::ReadWrite, FLUSH);
        let mut plain = pattern();
        for attempt in attempts {
            // A discarded range may read as before or as zeros: the model cannot know, so it is written after.
            let (from, count, flags) = attempt.range;
            let mut at = DATA;
            let mut data = Vec::new();
            match attempt.kind {
                11 | 13 => {
                    disk.memory.write_obj(from.to_le(), GuestAddress(DATA)).unwrap();
                    disk.memory.write_obj(count.to_le(), GuestAddress(DATA + 8)).unwrap();
                    disk.memory.write_obj(flags.to_le(), GuestAddress(DATA + 12)).unwrap();
                    data.push(Buffer::readable(DATA, 16));
                }
                kind => {
                    for len in &attempt.cuts {
                        if kind == 1 {
                            let bytes = vec![attempt.fill; usize::try_from(*len).unwrap()];
                            disk.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
                            data.push(Buffer::readable(at, *len));
                        } else {
                            data.push(Buffer::writable(at, *len));
                        }
                        at += 0x1800;
                    }
                }
            }
            let (status, bytes) = model(&mut plain, &attempt);
            let got = disk.run(attempt.kind, attempt.sector, &data);
            prop_assert_eq!(got.0, status, "{:?}", attempt);
            if attempt.kind == 11 && status == 0 && count > 0 {
                let start = usize::try_from(from).unwrap() * 512;
                let place = start..start + usize::try_from(count).unwrap() * 512;
                plain[place.clone()].copy_from_slice(&disk.contents()[place]);
            }
            if attempt.kind == 0 && status == 0 {
                let mut read = Vec::new();
                let mut at = DATA;
                for len in &attempt.cuts {
                    let mut part = vec![0; usize::try_from(*len).unwrap()];
                    disk.memory.read_slice(&mut part, GuestAddress(at)).unwrap();
                    read.extend(part);
                    at += 0x1800;
                }
                prop_assert_eq!(read, bytes);
            }
        }
        prop_assert_eq!(disk.contents(), plain);
        prop_assert!(!disk.rig.needs_reset());
    }
}
