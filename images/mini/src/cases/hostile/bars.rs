//! The BAR on top of everything, decoding switched while the device works, the command register.

use super::On::Devices;
use super::stage::Stage;
use super::{Must, Row, row};
use crate::pci::{COMMAND_MASTER, COMMAND_MEMORY};
use crate::suite::Outcome;
use crate::{cpu, ensure};

pub const ROWS: &[Row] = &[
    row("bar-at-0", Devices, Must::Survive, |s| moved(s, 0)),
    row("bar-on-memory", Devices, Must::Survive, |s| moved(s, 0x30_0000)),
    row("bar-at-the-end-of-memory", Devices, Must::Survive, |s| moved(s, s.places.ram_end - 0x4000)),
    row("bar-in-the-hole", Devices, Must::Survive, |s| moved(s, s.places.hole)),
    row("bar-on-configuration-space", Devices, Must::Survive, |s| moved(s, s.places.ecam)),
    row("bar-on-another-device", Devices, Must::Survive, |s| moved(s, s.other_bar)),
    row("bar-half-on-another-device", Devices, Must::Survive, |s| moved(s, s.other_bar + 0x1000)),
    row("bar-on-the-io-apic", Devices, Must::Survive, |s| moved(s, 0xfec0_0000)),
    row("bar-on-the-local-apic", Devices, Must::Survive, |s| moved(s, 0xfee0_0000)),
    row("bar-at-the-end-of-4-gib", Devices, Must::Survive, |s| moved(s, 0xffff_8000)),
    row("bar-of-all-ones", Devices, Must::Survive, |s| moved(s, 0xffff_ffff)),
    row("bar-moved-while-decoding", Devices, Must::Survive, moved_decoding),
    row("bar-moves-all-the-time", Devices, Must::Survive, wanders),
    row("bar-written-in-bytes", Devices, Must::Survive, in_bytes),
    row("decoding-off-while-live", Devices, Must::Go, decoding_off),
    row("mastering-off-while-live", Devices, Must::Survive, mastering_off),
    row("command-of-all-ones", Devices, Must::Survive, command_ones),
];

/// Moves the BAR while the device is live, knocks at both places, and moves it back.
fn moved(s: &mut Stage, address: u64) -> Outcome {
    s.start(0)?;
    s.device.function.place(&s.bar, address);
    cpu::write16(s.device.notify, 0);
    // Not where memory is: this program lies there.
    if address >= s.places.ram_end && address < s.places.ecam {
        cpu::read32(address + 20);
        cpu::write16(address + 0x3000, 0);
    }
    s.device.function.place(&s.bar, s.bar.address);
    cpu::read32(s.device.common);
    Ok(())
}

fn bar_register(s: &Stage) -> u16 {
    0x10 + u16::from(s.bar.index) * 4
}

fn moved_decoding(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let register = bar_register(s);
    for address in [s.places.hole, s.places.ram_end - 0x8000, s.places.hole + 0x8000, s.bar.address] {
        s.device.function.set32(register, address as u32);
        cpu::write16(s.device.notify, 0);
    }
    s.answers()
}

fn wanders(s: &mut Stage) -> Outcome {
    s.start(0)?;
    for round in 0..30 {
        s.device.function.set32(bar_register(s), (s.places.hole + round % 16 * 0x8000) as u32);
    }
    s.device.function.set32(bar_register(s), s.bar.address as u32);
    s.answers()
}

fn in_bytes(s: &mut Stage) -> Outcome {
    s.start(0)?;
    let at = s.device.function.config + u64::from(bar_register(s));
    for value in [0xffu8, 0, 0x5a] {
        for byte in 0..4 {
            cpu::write8(at + byte, value);
        }
        cpu::write16(at + 1, u16::from(value) << 8);
        cpu::write32(at - 2, u32::MAX);
    }
    Ok(())
}

fn decoding_off(s: &mut Stage) -> Outcome {
    s.start(0)?;
    for _ in 0..5 {
        s.device.function.set_command(COMMAND_MEMORY, false);
        cpu::write16(s.device.notify, 0);
        let status = s.device.status();
        ensure!(status == 0xff, "it answers {status:#x} with decoding off");
        s.device.function.set_command(COMMAND_MEMORY, true);
    }
    s.answers()
}

fn mastering_off(s: &mut Stage) -> Outcome {
    s.start(0)?;
    s.device.function.set_command(COMMAND_MASTER, false);
    cpu::write16(s.device.notify, 0);
    s.device.function.set_command(COMMAND_MASTER, true);
    s.answers()
}

fn command_ones(s: &mut Stage) -> Outcome {
    s.start(0)?;
    for value in [0xffffu16, 0, 0x5555, 0xaaaa, 7] {
        s.device.function.set16(4, value);
        s.device.function.set16(6, value);
    }
    Ok(())
}
