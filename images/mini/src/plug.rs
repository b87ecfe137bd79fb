//! The guest whose devices come and go: it reads the hot-plug registers as the DSDT's methods do, uses each disk that comes, and
//! lets go of what shall go. First it is hostile to them: writes of every width at each place, ejects of everything.

use crate::blk::{Disk, pattern};
use crate::mem::Dma;
use crate::pci::Function;
use crate::suite::{Failure, Machine};
use crate::{clock, cpu, ensure, modes, println};
use alloc::vec::Vec;

const UP: u16 = 0x610;
const DOWN: u16 = 0x614;
const EJECT: u16 = 0x618;
const PAUSE_NS: u64 = 20_000_000;

fn function(ecam: u64, slot: u32) -> Function {
    Function { device: slot as u8, config: ecam + u64::from(slot) * 0x8000 }
}

/// Devices on the bus, a bit each.
fn present(ecam: u64) -> u32 {
    (0..32).filter(|slot| function(ecam, *slot).vendor() != 0xffff).fold(0, |bits, slot| bits | 1 << slot)
}

fn misuse(ecam: u64) -> Result<(), Failure> {
    let before = present(ecam);
    for value in [0, 1, 2, 0x8000_0000, u32::MAX] {
        for port in UP..EJECT + 8 {
            cpu::outb(port, value as u8);
            cpu::outw(port, value as u16);
            cpu::outl(port, value);
            // What the next byte belongs to is another device's.
            let _ = (cpu::inb(port), cpu::inw(port), cpu::inl(port));
        }
    }
    for _ in 0..2000 {
        cpu::outl(EJECT, u32::MAX);
    }
    ensure!(
        present(ecam) == before,
        "devices {before:#x} are {:#x} after ejects nobody asked for",
        present(ecam)
    );
    ensure!(cpu::inb(UP) == 0xff && cpu::inl(EJECT) == 0, "the registers have other widths or can be read");
    Ok(())
}

fn try_disk(number: u64, disk: &mut Disk) -> Result<(), Failure> {
    let (out, back) = (Dma::new(4096), Dma::new(4096));
    pattern(out, number, 8, 7);
    disk.write(8, out)?;
    disk.flush()?;
    disk.read(8, back)?;
    ensure!(out.first_difference(&back).is_none(), "what was read is not what was written");
    Ok(())
}

fn watch(machine: &mut Machine) -> Result<(), Failure> {
    let ecam = machine.bus()?.ecam;
    let keep = machine.boot.option("mini.plug") == Some("keep");
    let mut disks: Vec<(u32, Disk)> = Vec::new();
    for function in machine.bus()?.virtio(2) {
        disks.push((function.device.into(), Disk::open(function, 16)?));
    }
    misuse(ecam)?;
    for (slot, disk) in &mut disks {
        try_disk(u64::from(*slot), disk)?;
    }
    println!("plug: ready with {} disks, {} functions", disks.len(), present(ecam).count_ones());
    for round in 0u64.. {
        let (up, down) = (cpu::inl(UP), cpu::inl(DOWN));
        for slot in (0..32).filter(|slot| up >> slot & 1 == 1) {
            let function = function(ecam, slot);
            match function.virtio_type() {
                Some(2) => {
                    let mut disk = Disk::open(function, 16)?;
                    try_disk(u64::from(slot), &mut disk)?;
                    println!("plug: disk of {} sectors came to {slot}", disk.sectors);
                    disks.push((slot, disk));
                }
                Some(kind) => println!("plug: device of type {kind} came to {slot}"),
                None => println!("plug: failed: nothing came to {slot}"),
            }
        }
        for slot in (0..32).filter(|slot| down >> slot & 1 == 1) {
            println!("plug: {slot} shall go");
            if keep {
                continue;
            }
            if let Some(at) = disks.iter().position(|(used, _)| *used == slot) {
                disks.remove(at).1.device.reset()?;
            }
            // Others first: they stay.
            cpu::outl(EJECT, !(1 << slot));
            cpu::outl(EJECT, 1 << slot);
            ensure!(function(ecam, slot).vendor() == 0xffff, "{slot} is still there");
            println!("plug: {slot} is gone");
        }
        if round % 10 == 0 {
            for (slot, disk) in &mut disks {
                try_disk(u64::from(*slot), disk)?;
            }
            println!("plug: {} disks work", disks.len());
        }
        modes::sleep_until(clock::now_ns() + PAUSE_NS);
    }
    Ok(())
}

/// Watches until something is wrong; says what.
pub fn run(machine: &mut Machine) {
    match watch(machine) {
        Ok(()) => {}
        Err(Failure::Failed(reason) | Failure::Skipped(reason)) => println!("plug: failed: {reason}"),
    }
}
