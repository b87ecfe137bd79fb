//! For fuzzers and property tests: a driver that does anything, from bytes.
//!
//! Built with the feature `testing`. [`drive_transport`] turns bytes into accesses of any width at any offset of a PCI
//! function's configuration space and BAR, and walks the rings that come out of it. [`with_queue`] makes a ring whose
//! descriptors are those bytes, for devices' own parsers; [`rings`] hands several to a whole device.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use std::sync::Arc;

use serio_hv::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::device::{ActivateError, Activation, ActiveQueue, VirtioDevice};
use crate::pci::bus::PciFunction;
use crate::pci::transport::VirtioPci;
use crate::queue::{Chain, VirtQueue};
use crate::state::SuspendError;
use crate::testing::{DriverQueue, FakePlatform, Rig, memory};

const MEMORY_BYTES: usize = 1 << 18;
/// Where the buffers of [`with_queue`] and [`rings`] lie.
const DATA: u64 = 0x1_0000;
const QUEUE_SIZES: &[u16] = &[8, 64, 256];
/// Bytes of one access: what, width, offset, value.
const ACCESS_BYTES: usize = 12;
/// Chains that are taken after one access.
const CHAINS_MAX: usize = 32;
/// Where the BAR begins.
const BAR: u32 = 0xc000_0000;
/// Where the status lies in the BAR.
const STATUS: u64 = 20;

/// A device without threads: it looks at its rings when it is told to.
#[derive(Default)]
struct Idle {
    queues: Vec<ActiveQueue>,
    chain: Chain,
}

impl VirtioDevice for Idle {
    fn device_id(&self) -> u16 {
        42
    }

    fn features(&self) -> u64 {
        0xff
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, out: &mut [u8]) {
        out.fill(offset.to_le_bytes()[0]);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // The way in for the fuzzer: a write here makes the device look.
        let mut left = CHAINS_MAX;
        for active in &mut self.queues {
            while left > 0 && active.queue.pop(&mut self.chain).is_ok_and(|some| some) {
                left -= 1;
                let _ = active.queue.push_used(self.chain.head(), 1);
            }
            let _ = active.queue.enable_kicks();
            if active.queue.interrupt_wanted().is_ok_and(|wanted| wanted) {
                active.interrupt.trigger();
            }
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.queues = activation.queues;
        Ok(())
    }

    fn reset(&mut self) {
        self.queues.clear();
    }

    fn suspend(&mut self) -> Result<Vec<ActiveQueue>, SuspendError> {
        Ok(std::mem::take(&mut self.queues))
    }
}

/// Does to a transport what the bytes say. Panics when something holds no longer that always must.
pub fn drive_transport(data: &[u8]) {
    let memory = memory(MEMORY_BYTES);
    // Rings, should they be put there, have the same bytes in them.
    for at in (0..MEMORY_BYTES).step_by(data.len().max(4096)) {
        let room = (MEMORY_BYTES - at).min(data.len());
        memory.write_slice(&data[..room], GuestAddress(at as u64)).unwrap();
    }
    let platform = Arc::new(FakePlatform::default());
    let mut function = VirtioPci::new(Box::new(Idle::default()), platform.clone(), memory).unwrap();
    function.place_bar(BAR);
    function.config_write(4, &[6, 0]);
    for access in data.chunks_exact(ACCESS_BYTES).take(4096) {
        step(&mut function, access);
        check(&mut function, &platform);
    }
    function.reset();
    assert!(platform.watched.lock().unwrap().is_empty(), "a doorbell is watched after a reset");
}

fn step(function: &mut VirtioPci, access: &[u8]) {
    let len = [1, 2, 4, 8][usize::from(access[1] & 3)];
    let offset = u16::from_le_bytes([access[2], access[3]]);
    let value = &access[4..4 + len];
    let mut out = [0u8; 8];
    match access[0] % 16 {
        0 => function.config_read(offset % 4096, &mut out[..len]),
        1 | 2 => function.config_write(offset % 4096, value),
        3 => function.bar_read(u64::from(offset), &mut out[..len]),
        4 => function.bar_write(u64::from(offset), value),
        // Where most of what happens is: common configuration, doorbells, table.
        5..=9 => function.bar_write(u64::from(offset % 64), value),
        10 => function.bar_write(STATUS, &value[..1]),
        11 => function.bar_write(u64::from(0x4000 + offset % 96), value),
        12 => function.bar_write(u64::from(0x3000 + offset % 16), value),
        13 => function.bar_write(0x2000, value),
        // A whole start: features, a queue, DRIVER_OK.
        14 => start(function, u16::from(access[1]) % 3, offset),
        _ if access[2] == 0 => function.reset(),
        _ => function.bar_read(u64::from(offset % 64), &mut out[..len]),
    }
}

fn start(function: &mut VirtioPci, queue: u16, place: u16) {
    let base = u64::from(place & 0x3f) << 12;
    for (offset, value) in [(20, 0u64), (20, 1), (20, 3)] {
        function.bar_write(offset, &[value as u8]);
    }
    function.bar_write(8, &1u32.to_le_bytes());
    function.bar_write(12, &1u32.to_le_bytes());
    function.bar_write(STATUS, &[11]);
    function.bar_write(22, &queue.to_le_bytes());
    function.bar_write(26, &queue.to_le_bytes());
    for (offset, ring) in [(32, base), (40, base + 0x1000), (48, base + 0x2000)] {
        function.bar_write(offset, &ring.to_le_bytes());
    }
    function.bar_write(28, &1u16.to_le_bytes());
    function.bar_write(STATUS, &[15]);
}

fn check(function: &mut VirtioPci, platform: &FakePlatform) {
    let mut identity = [0; 4];
    function.config_read(0, &mut identity);
    assert_eq!(identity, [0xf4, 0x1a, 0x6a, 0x10], "vendor and device changed");
    let mut status = [0];
    function.bar_read(STATUS, &mut status);
    let [status] = status;
    assert!(status & 4 == 0 || status & 8 != 0, "status {status:#x}: DRIVER_OK without FEATURES_OK");
    if let Some(range) = function.decoded() {
        assert!(range.start.is_multiple_of(0x8000) && range.end - range.start == 0x8000, "{range:x?}");
    }
    let watched = platform.watched.lock().unwrap();
    assert!(watched.len() <= QUEUE_SIZES.len(), "{} doorbells are watched", watched.len());
    assert!(status & 4 != 0 || status & 64 != 0 || watched.is_empty(), "an idle device is watched");
    drop(watched);
    // Messages would pile up; nobody looks at them here.
    platform.take_delivered();
}

/// A queue of 16 whose descriptor table, and the memory behind it, are these bytes; all chains are available.
pub fn with_queue(data: &[u8], act: impl FnOnce(&GuestMemory, &mut VirtQueue)) {
    let memory = memory(MEMORY_BYTES);
    spread(&memory, data);
    let driver = lay_out(&memory, 0x1000, data);
    act(&memory, &mut driver.queue(false));
}

/// So many rings of 16, as a transport hands them to a device whose driver has all `features`: each is made of the bytes, and
/// from another place in them on.
pub fn rings(data: &[u8], count: usize, features: u64) -> (Rig, Activation) {
    const RING_BYTES: u64 = 0x3000;
    let memory = memory(MEMORY_BYTES);
    spread(&memory, data);
    let part = data.len().div_ceil(count.max(1));
    let queues = (0..count).map(|queue| {
        let base = 0x1000 + RING_BYTES * queue as u64;
        assert!(base + RING_BYTES <= DATA, "{count} rings do not fit");
        lay_out(&memory, base, &data[(part * queue).min(data.len())..]).queue(false)
    });
    Rig::activation(&memory, queues.collect(), features)
}

/// Fills the memory behind the rings.
fn spread(memory: &GuestMemory, data: &[u8]) {
    for at in (DATA as usize..MEMORY_BYTES).step_by(data.len().max(4096)) {
        let room = (MEMORY_BYTES - at).min(data.len());
        memory.write_slice(&data[..room], GuestAddress(at as u64)).unwrap();
    }
}

/// Writes a table of descriptors from the bytes, eight each, and makes one chain available for each.
fn lay_out(memory: &GuestMemory, base: u64, data: &[u8]) -> DriverQueue {
    const SIZE: u16 = 16;
    let driver = DriverQueue::new(memory, base, SIZE);
    for (slot, bytes) in (0..SIZE).zip(data.chunks_exact(8)) {
        let at = GuestAddress(driver.descriptors + u64::from(slot) * 16);
        // Mostly in memory, mostly short, mostly with sane flags: else nothing behind the walker is reached.
        let wild = bytes[7] & 0xc0 == 0xc0;
        let address = u64::from(u16::from_le_bytes([bytes[0], bytes[1]]));
        let len = u32::from(u16::from_le_bytes([bytes[2], bytes[3]]) & 0x1fff);
        let flags = u16::from(bytes[4] & if wild { 7 } else { 3 });
        memory.write_obj(if wild { address << 44 } else { DATA + address }, at).unwrap();
        memory.write_obj(if wild { u32::MAX } else { len }, GuestAddress(at.0 + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
        memory.write_obj(u16::from(bytes[5]) % (SIZE + 2), GuestAddress(at.0 + 14)).unwrap();
        memory
            .write_obj(u16::from(bytes[6]) % SIZE, GuestAddress(driver.driver + 4 + 2 * u64::from(slot)))
            .unwrap();
    }
    let offered = u16::try_from(data.len() / 8).unwrap_or(SIZE).min(SIZE);
    memory.write_obj(offered, GuestAddress(driver.driver + 2)).unwrap();
    driver
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_access_does_harm(data in prop::collection::vec(any::<u8>(), 0..3000)) {
            drive_transport(&data);
        }

        #[test]
        fn no_ring_does_harm(data in prop::collection::vec(any::<u8>(), 0..200)) {
            with_queue(&data, |_, queue| {
                let mut chain = Chain::default();
                let mut taken = 0;
                while queue.pop(&mut chain).is_ok_and(|some| some) {
                    taken += 1;
                }
                assert!(taken <= 16, "{taken} chains of 16");
            });
        }
    }

    #[test]
    fn a_whole_start_makes_the_device_live() {
        let mut data = vec![0u8; ACCESS_BYTES];
        data[0] = 14;
        drive_transport(&data);
        let mut function = VirtioPci::new(
            Box::new(Idle::default()),
            Arc::new(FakePlatform::default()),
            memory(MEMORY_BYTES),
        )
        .unwrap();
        start(&mut function, 0, 1);
        let mut status = [0];
        function.bar_read(STATUS, &mut status);
        assert_eq!(status, [15]);
    }
}
