//! The guest whose disk grows: it says how large its first disk is, waits for the interrupt that tells of a change, uses
//! the new end, and so on.

use crate::apic::{self, vector};
use crate::blk::{Disk, pattern};
use crate::mem::Dma;
use crate::pci::Msix;
use crate::suite::{Failure, Machine};
use crate::virtio::common;
use crate::{clock, cpu, ensure, println};

const WAIT_MS: u64 = 30_000;
const SAY_MS: u64 = 500;

fn watch(machine: &mut Machine) -> Result<(), Failure> {
    let function = *machine.bus()?.virtio(2).first().ok_or("no disk")?;
    let mut disk = Disk::open(function, 16)?;
    let msix = Msix::find(function).ok_or("no MSI-X capability")?;
    msix.enable(true, false);
    let entry = msix.count - 1;
    msix.route(entry, apic::id(), vector::DEVICE);
    cpu::write16(disk.device.common + common::CONFIG_MSIX_VECTOR, entry);
    let (out, back) = (Dma::new(4096), Dma::new(4096));
    loop {
        let seen = cpu::interrupt_count(vector::DEVICE);
        let generation = cpu::read8(disk.device.common + common::CONFIG_GENERATION);
        let sectors = disk.device.config64(0);
        pattern(out, 0, sectors, 1);
        disk.write(sectors - 8, out)?;
        disk.read(sectors - 8, back)?;
        ensure!(out.first_difference(&back).is_none(), "the last block is not what was written");
        ensure!(disk.read(sectors, back).is_err(), "sector {sectors} can be read");
        // Again and again: who grows the disk may begin to listen late, and must not grow it before all of this was done.
        let told = (0..WAIT_MS / SAY_MS).any(|_| {
            println!("grow: {sectors} sectors");
            clock::poll(SAY_MS, || cpu::interrupt_count(vector::DEVICE) > seen)
        });
        ensure!(told, "no interrupt");
        let now = cpu::read8(disk.device.common + common::CONFIG_GENERATION);
        ensure!(now != generation, "an interrupt, but the generation is {now} still");
    }
}

/// Watches until something is wrong; says what.
pub fn run(machine: &mut Machine) {
    match watch(machine) {
        Ok(()) => {}
        Err(Failure::Failed(reason) | Failure::Skipped(reason)) => println!("grow: {reason}"),
    }
}
