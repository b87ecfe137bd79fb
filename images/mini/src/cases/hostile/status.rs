//! The status machine (virtio 1.2 §2.1, §3.1.1), features, and what describes the queues.

use super::On::Devices;
use super::stage::Stage;
use super::{Must, Row, all_of, row};
use crate::suite::Outcome;
use crate::virtio::{NO_VECTOR, VERSION_1, common, status};
use crate::{cpu, ensure};

pub const ROWS: &[Row] = &[
    row("driver-ok-first", Devices, Must::Go, |s| refused(s, &[4], 4)),
    row("driver-ok-without-features", Devices, Must::Go, |s| refused(s, &[1, 3, 7], 4)),
    row("features-ok-without-driver", Devices, Must::Go, |s| refused(s, &[1, 9], 8)),
    row("features-ok-without-version-1", Devices, Must::Go, |s| refused(s, &[1, 3, 11], 8)),
    row("needs-reset-by-the-driver", Devices, Must::Go, |s| refused(s, &[1, 3, 0x43], 0x40)),
    row("all-status-bits-at-once", Devices, Must::Go, |s| refused(s, &[0xff], 4 | 0x40)),
    row("failed-bit", Devices, Must::Go, failed_bit),
    row("status-bits-taken-away", Devices, Must::Go, taken_away),
    row("status-written-wide", Devices, Must::Go, status_wide),
    row("driver-ok-again", Devices, Must::Go, driver_ok_again),
    row("unoffered-features", Devices, Must::Go, unoffered),
    row("features-after-ok", Devices, Must::Go, features_after_ok),
    row("feature-selectors", Devices, Must::Go, selectors),
    row("no-queue-enabled", Devices, Must::Survive, |s| with_queues(s, |_, _| false)),
    row("only-the-last-queue", Devices, Must::Survive, |s| with_queues(s, |index, count| index + 1 == count)),
    row("all-but-the-first-queue", Devices, Must::Survive, |s| with_queues(s, |index, _| index > 0)),
    row("absent-queue-enabled", Devices, Must::Survive, absent_queue),
    row("queue-sizes", Devices, Must::Go, sizes),
    row("queue-enable-values", Devices, Must::Go, enable_values),
    row("ring-at-0", Devices, Must::Survive, |s| rings_at(s, 0)),
    row("ring-unaligned", Devices, Must::Survive, |s| rings_at(s, 0x30_0001)),
    row("ring-at-the-end-of-memory", Devices, Must::Survive, |s| rings_at(s, s.places.ram_end - 16)),
    row("ring-beyond-memory", Devices, Must::Survive, |s| rings_at(s, s.places.ram_end)),
    row("ring-in-the-hole", Devices, Must::Survive, |s| rings_at(s, s.places.hole)),
    row("ring-in-its-bar", Devices, Must::Survive, |s| rings_at(s, s.bar.address)),
    row("ring-in-configuration-space", Devices, Must::Survive, |s| rings_at(s, s.places.ecam)),
    row("ring-that-wraps", Devices, Must::Survive, |s| rings_at(s, u64::MAX - 15)),
    row("rings-on-each-other", Devices, Must::Survive, same_rings),
    row("queue-changed-while-live", Devices, Must::Go, changed_live),
    row("queue-enabled-while-live", Devices, Must::Survive, enabled_live),
    row("vectors-that-do-not-exist", Devices, Must::Go, vectors),
];

/// These status writes leave the bits unset.
fn refused(s: &mut Stage, writes: &[u8], bits: u8) -> Outcome {
    for write in writes {
        s.device.set_status(*write);
    }
    let status = s.device.status();
    ensure!(status & bits == 0, "status {status:#x} after {writes:x?}");
    Ok(())
}

fn failed_bit(s: &mut Stage) -> Outcome {
    s.start(0)?;
    s.device.set_status(s.device.status() | 0x80);
    ensure!(s.device.status() & 0x80 != 0, "FAILED does not stay");
    Ok(())
}

fn taken_away(s: &mut Stage) -> Outcome {
    s.start(0)?;
    for write in [1u8, 2, 3, 8, 11] {
        s.device.set_status(write);
    }
    s.answers()
}

fn status_wide(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let at = s.register(common::DEVICE_STATUS);
    cpu::write16(at, 0);
    cpu::write32(at, 0);
    cpu::write64(at, 0);
    cpu::write16(at - 1, 0);
    cpu::write32(at - 2, 0);
    s.answers()
}

fn driver_ok_again(s: &mut Stage) -> Outcome {
    s.start(0)?;
    for _ in 0..50 {
        s.device.driver_ok();
        s.device.set_status(status::DRIVER_OK);
    }
    s.answers()
}

fn unoffered(s: &mut Stage) -> Outcome {
    let offered = s.device.device_features();
    for bit in (0..64).filter(|bit| offered >> bit & 1 == 0) {
        s.device.reset()?;
        s.device.set_status(3);
        s.device.set_driver_features(VERSION_1 | 1 << bit);
        s.device.set_status(11);
        let status = s.device.status();
        ensure!(status & status::FEATURES_OK == 0, "bit {bit} was not offered, and is taken");
    }
    Ok(())
}

fn features_after_ok(s: &mut Stage) -> Outcome {
    s.start(0)?;
    s.device.set_driver_features(u64::MAX);
    s.device.set_driver_features(0);
    s.answers()
}

fn selectors(s: &mut Stage) -> Outcome {
    s.device.set_status(3);
    for select in [2u32, 3, 0x8000_0000, u32::MAX] {
        cpu::write32(s.register(common::DEVICE_FEATURE_SELECT), select);
        let value = cpu::read32(s.register(common::DEVICE_FEATURE));
        ensure!(value == 0, "feature word {select:#x} reads {value:#x}");
        cpu::write32(s.register(common::DRIVER_FEATURE_SELECT), select);
        cpu::write32(s.register(common::DRIVER_FEATURE), u32::MAX);
    }
    s.restart(0)?;
    s.answers()
}

fn with_queues(s: &mut Stage, chosen: fn(u16, u16) -> bool) -> Outcome {
    s.negotiate(0)?;
    let count = s.device.num_queues();
    for index in (0..count).filter(|index| chosen(*index, count)) {
        s.device.queue(index, 8, NO_VECTOR)?;
    }
    s.device.driver_ok();
    for index in 0..u64::from(count) {
        cpu::write16(s.device.notify + index * u64::from(s.device.notify_multiplier), index as u16);
    }
    Ok(())
}

fn absent_queue(s: &mut Stage) -> Outcome {
    for index in [s.device.num_queues(), 0x100, 0x7fff, 0xffff] {
        s.negotiate(0)?;
        s.select(index);
        cpu::write16(s.register(common::QUEUE_SIZE), 8);
        cpu::write32(s.register(common::QUEUE_DESC), 0x30_0000);
        cpu::write16(s.register(common::QUEUE_MSIX_VECTOR), 0);
        cpu::write16(s.register(common::QUEUE_ENABLE), 1);
        let (size, on) =
            (cpu::read16(s.register(common::QUEUE_SIZE)), cpu::read16(s.register(common::QUEUE_ENABLE)));
        ensure!(size == 0 && on == 0, "queue {index} has {size} entries, enabled {on}");
    }
    s.device.driver_ok();
    Ok(())
}

fn sizes(s: &mut Stage) -> Outcome {
    s.negotiate(0)?;
    s.select(0);
    let at = s.register(common::QUEUE_SIZE);
    let max = cpu::read16(at);
    for size in [0u16, 3, 7, max - 1, max + 1, max.wrapping_mul(2), 0x8000, 0xffff] {
        cpu::write16(at, size);
        let now = cpu::read16(at);
        ensure!(now.is_power_of_two() && now <= max, "{size} was written, {now} is read");
    }
    s.restart(0)?;
    s.answers()
}

fn enable_values(s: &mut Stage) -> Outcome {
    s.start(0)?;
    for index in 0..s.device.num_queues() {
        s.select(index);
        for value in [0u16, 2, 0xfffe, 0xffff, 0x101] {
            cpu::write16(s.register(common::QUEUE_ENABLE), value);
        }
        cpu::write32(s.register(common::QUEUE_ENABLE), 0);
        cpu::write8(s.register(common::QUEUE_ENABLE), 0);
    }
    s.answers()
}

fn set_rings(s: &Stage, rings: [u64; 3]) {
    for (offset, address) in
        [common::QUEUE_DESC, common::QUEUE_DRIVER, common::QUEUE_DEVICE].iter().zip(rings)
    {
        cpu::write32(s.register(*offset), address as u32);
        cpu::write32(s.register(*offset + 4), (address >> 32) as u32);
    }
}

/// Each of the three rings there while the others are good, then all of them.
fn rings_at(s: &mut Stage, address: u64) -> Outcome {
    let good = crate::mem::Dma::new(3 * 4096).address;
    for bad in 0..4usize {
        s.negotiate(0)?;
        s.select(0);
        cpu::write16(s.register(common::QUEUE_SIZE), 16);
        let place = |at: usize| if bad == at || bad == 3 { address } else { good + 4096 * at as u64 };
        set_rings(s, [place(0), place(1), place(2)]);
        cpu::write16(s.register(common::QUEUE_ENABLE), 1);
        s.device.driver_ok();
        cpu::write16(s.device.notify, 0);
        s.device.reset()?;
    }
    Ok(())
}

fn same_rings(s: &mut Stage) -> Outcome {
    let one = crate::mem::Dma::new(4096).address;
    s.negotiate(0)?;
    for index in 0..s.device.num_queues() {
        s.select(index);
        cpu::write16(s.register(common::QUEUE_SIZE), 16);
        set_rings(s, [one, one, one]);
        cpu::write16(s.register(common::QUEUE_ENABLE), 1);
    }
    s.device.driver_ok();
    for index in 0..u64::from(s.device.num_queues()) {
        cpu::write16(s.device.notify + index * u64::from(s.device.notify_multiplier), index as u16);
    }
    Ok(())
}

fn changed_live(s: &mut Stage) -> Outcome {
    s.start(0)?;
    for index in 0..s.device.num_queues() {
        s.select(index);
        set_rings(s, [s.places.hole, u64::MAX, 0]);
        cpu::write16(s.register(common::QUEUE_SIZE), 2);
    }
    s.answers()
}

fn enabled_live(s: &mut Stage) -> Outcome {
    s.negotiate(0)?;
    s.device.driver_ok();
    for index in 0..s.device.num_queues() {
        s.device.queue(index, 8, NO_VECTOR)?;
        cpu::write16(s.device.notify + u64::from(index) * u64::from(s.device.notify_multiplier), index);
    }
    Ok(())
}

fn vectors(s: &mut Stage) -> Outcome {
    s.negotiate(0)?;
    let read_back = |offset: u64, value: u16| {
        cpu::write16(s.register(offset), value);
        let now = cpu::read16(s.register(offset));
        ensure!(now == NO_VECTOR, "vector {value:#x} was written, {now:#x} is read");
        Ok(())
    };
    let count = s.device.num_queues();
    all_of(
        [count + 1, 0x7ff, 0x800, 0xfffe]
            .iter()
            .flat_map(|value| [(common::CONFIG_MSIX_VECTOR, *value), (common::QUEUE_MSIX_VECTOR, *value)])
            .map(|(offset, value)| read_back(offset, value))
            .collect(),
    )
}
