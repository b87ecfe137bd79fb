//! Every register, every width, every alignment; configuration space and the window in it.

use super::On::Devices;
use super::stage::Stage;
use super::{Must, Row, row};
use crate::suite::Outcome;
use crate::virtio::{NO_VECTOR, common};
use crate::{cpu, ensure};

pub const ROWS: &[Row] = &[
    row("read-common-every-way", Devices, Must::Go, |s| read_every_way(s, s.device.common, 72)),
    row("read-isr-every-way", Devices, Must::Go, |s| read_every_way(s, s.device.isr, 16)),
    row("read-config-every-way", Devices, Must::Go, |s| read_every_way(s, s.device.config, 72)),
    row("read-doorbells-every-way", Devices, Must::Go, |s| read_every_way(s, s.device.notify, 32)),
    row("read-the-whole-bar", Devices, Must::Go, read_bar),
    row("write-common-every-way-idle", Devices, Must::Survive, |s| write_every_way(s, s.device.common, 64)),
    row("write-common-every-way-live", Devices, Must::Survive, write_common_live),
    row("write-isr-every-way", Devices, Must::Go, |s| write_live(s, s.device.isr, 16)),
    row("write-config-every-way", Devices, Must::Go, |s| write_live(s, s.device.config, 72)),
    row("write-doorbells-every-way", Devices, Must::Go, |s| write_live(s, s.device.notify, 64)),
    row("write-between-structures", Devices, Must::Go, write_gaps),
    row("across-structures", Devices, Must::Survive, across),
    row("doorbells-of-absent-queues", Devices, Must::Go, absent_doorbells),
    row("doorbells-before-driver-ok", Devices, Must::Go, early_doorbells),
    row("configuration-space-all-ones", Devices, Must::Survive, |s| write_space(s, 0xff)),
    row("configuration-space-all-zeroes", Devices, Must::Survive, |s| write_space(s, 0)),
    row("configuration-space-every-width", Devices, Must::Survive, space_widths),
    row("configuration-space-past-its-end", Devices, Must::Go, extended_space),
    row("window-to-every-register", Devices, Must::Go, window_reads),
    row("window-out-of-bounds", Devices, Must::Go, window_bad),
    row("window-to-the-status", Devices, Must::Survive, window_status),
    row("registers-in-another-order", Devices, Must::Survive, random_registers),
];

const VALUES: [u64; 4] = [u64::MAX, 0, 0xa5a5_a5a5_a5a5_a5a5, 0x0001_0001_0001_0001];

fn read_every_way(s: &mut Stage, base: u64, len: u64) -> Outcome {
    s.start(0)?;
    if base == 0 {
        return Ok(());
    }
    for at in base..base + len {
        cpu::read8(at);
        cpu::read16(at);
        cpu::read32(at);
        cpu::read64(at);
    }
    s.answers()
}

fn read_bar(s: &mut Stage) -> Outcome {
    s.start(0)?;
    for at in (0..s.bar.len).step_by(64) {
        cpu::read32(s.bar.address + at);
    }
    for at in [s.bar.len - 1, s.bar.len - 2, s.bar.len - 4] {
        cpu::read8(s.bar.address + at);
    }
    s.answers()
}

fn write_every_way(_: &mut Stage, base: u64, len: u64) -> Outcome {
    if base == 0 {
        return Ok(());
    }
    for value in VALUES {
        for at in base..base + len {
            cpu::write8(at, value as u8);
            cpu::write16(at, value as u16);
            cpu::write32(at, value as u32);
            cpu::write64(at, value);
        }
    }
    Ok(())
}

fn write_common_live(s: &mut Stage) -> Outcome {
    s.start(0)?;
    write_every_way(s, s.device.common, 64)
}

fn write_live(s: &mut Stage, base: u64, len: u64) -> Outcome {
    s.start(0)?;
    write_every_way(s, base, len)?;
    s.answers()
}

fn write_gaps(s: &mut Stage) -> Outcome {
    s.start(0)?;
    // Behind the structures that the capabilities name, where nothing is.
    for page in [s.device.common + 0x40, s.device.isr + 4, s.device.config + 0x800, s.device.notify + 0x800] {
        for at in (page..page + 0x100).step_by(8) {
            cpu::write32(at, u32::MAX);
            cpu::write64(at, u64::MAX);
        }
    }
    s.answers()
}

/// Accesses that begin in one structure and end in the next.
fn across(s: &mut Stage) -> Outcome {
    s.start(0)?;
    for page in (s.bar.address + 0x1000..s.bar.address + s.bar.len).step_by(0x1000) {
        for before in 1..8 {
            cpu::read64(page - before);
            cpu::write64(page - before, u64::MAX);
            cpu::write32(page - before.min(3), 0);
        }
    }
    Ok(())
}

fn absent_doorbells(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let queues = s.device.num_queues();
    for queue in u64::from(queues)..1024 {
        cpu::write16(s.device.notify + queue * 4, queue as u16);
    }
    // The right place, with the number of another.
    for queue in [queues, 0x7fff, 0xffff] {
        cpu::write16(s.device.notify, queue);
        cpu::write32(s.device.notify, u32::from(queue) << 16);
    }
    s.answers()
}

fn early_doorbells(s: &mut Stage) -> Outcome {
    for queue in 0..u64::from(s.device.num_queues()) {
        cpu::write16(s.device.notify + queue * 4, queue as u16);
    }
    s.negotiate(0)?;
    for queue in 0..s.device.num_queues() {
        s.device.queue(queue, 16, NO_VECTOR)?.kick();
    }
    s.restart(0)?;
    s.answers()
}

fn write_space(s: &mut Stage, value: u8) -> Outcome {
    s.start(0)?;
    let config = s.device.function.config;
    let before = cpu::read32(config);
    for at in 0..256 {
        cpu::write8(config + at, value);
    }
    for at in (0..4096).step_by(4) {
        cpu::write32(config + at, u32::from_le_bytes([value; 4]));
    }
    let after = cpu::read32(config);
    ensure!(before == after, "vendor and device became {after:#x}");
    Ok(())
}

fn space_widths(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let config = s.device.function.config;
    for value in VALUES {
        for at in 0..253 {
            cpu::write8(config + at, value as u8);
            cpu::write16(config + at, value as u16);
            cpu::write32(config + at, value as u32);
            cpu::write64(config + at, value);
            cpu::read64(config + at);
        }
    }
    Ok(())
}

fn extended_space(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let config = s.device.function.config;
    for at in (256..4096).step_by(4) {
        cpu::write32(config + at, u32::MAX);
        let value = cpu::read32(config + at);
        ensure!(value == 0 || value == u32::MAX, "{at:#x} reads {value:#x}");
    }
    // The last bytes, and on into the next function.
    for at in 4089..4096 {
        cpu::read64(config + at);
        cpu::write64(config + at, 0);
    }
    s.answers()
}

/// The configuration access capability (virtio 1.2 §4.1.4.9).
fn window(s: &Stage) -> Option<u16> {
    let function = s.device.function;
    let found = function.capabilities().into_iter().find(|(id, at)| *id == 9 && function.get8(at + 3) == 5);
    found.map(|(_, at)| at)
}

fn through_window(s: &Stage, at: u16, bar: u32, offset: u32, len: u32, write: Option<u32>) -> u32 {
    let function = s.device.function;
    function.set32(at + 4, bar);
    function.set32(at + 8, offset);
    function.set32(at + 12, len);
    if let Some(value) = write {
        function.set32(at + 16, value);
    }
    function.get32(at + 16)
}

fn window_reads(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let Some(at) = window(s) else { return Ok(()) };
    for offset in (0..s.bar.len as u32).step_by(0x80) {
        for len in [1, 2, 4] {
            through_window(s, at, 0, offset, len, None);
        }
    }
    s.answers()
}

fn window_bad(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let Some(at) = window(s) else { return Ok(()) };
    let size = s.bar.len as u32;
    for bar in [0, 1, 5, 6, 0xff] {
        for offset in [size, size - 1, size - 2, u32::MAX, u32::MAX - 3, 0x8000_0000, 21] {
            for len in [0, 1, 2, 3, 4, 8, 0x1000, u32::MAX] {
                if bar != 0 || offset != 21 {
                    through_window(s, at, bar, offset, len, Some(u32::MAX));
                }
            }
        }
    }
    s.answers()
}

/// The window's data register is the status: each access resets or starts the device.
fn window_status(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let Some(at) = window(s) else { return Ok(()) };
    let offset = (s.register(common::DEVICE_STATUS) - s.bar.address) as u32;
    for value in [0u32, 1, 3, 11, 15, 0xff, 0, 0] {
        through_window(s, at, 0, offset, 1, Some(value));
    }
    s.restart(0)?;
    s.answers()
}

/// Common configuration in an order that nobody foresees; the numbers are always the same.
fn random_registers(s: &mut Stage) -> Outcome {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..2000 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let at = s.device.common + state % 64;
        let value = (state >> 8) as u32;
        match state >> 61 {
            0 | 1 => cpu::write8(at, value as u8 & 0x8f),
            2 | 3 => cpu::write16(at & !1, value as u16 & 0x3f),
            4 | 5 => cpu::write32(at & !3, value),
            6 => s.device.set_status(value as u8 & 0x0f),
            _ => cpu::write16(s.register(common::QUEUE_ENABLE), 1),
        }
    }
    Ok(())
}
