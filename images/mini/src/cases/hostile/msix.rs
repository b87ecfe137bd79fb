//! MSI-X: messages to nowhere, tables written in every way, masks that flicker while interrupts come.
//!
//! A message may name any vector of the guest itself, and INIT and NMI too: that harms only who wrote it. These rows
//! route such messages without letting them be sent, since the program has to go on.

use super::On::Devices;
use super::stage::Stage;
use super::{Must, Row, row};
use crate::apic::{self, vector};
use crate::pci::Msix;
use crate::suite::{Failure, Outcome};
use crate::virtio::common;
use crate::{clock, cpu, ensure};

pub const ROWS: &[Row] = &[
    row("message-never-written", Devices, Must::Survive, |s| message(s, 0, 0)),
    row("message-to-memory", Devices, Must::Survive, |s| message(s, 0x30_0000, 0x4040)),
    row("message-to-its-own-bar", Devices, Must::Survive, |s| message(s, s.bar.address, 0x40)),
    row("message-above-4-gib", Devices, Must::Survive, |s| message(s, 0x1_fee0_0000, 0x40)),
    row("message-far-above", Devices, Must::Survive, |s| message(s, u64::MAX, 0x40)),
    row("message-to-an-absent-processor", Devices, Must::Survive, |s| message(s, 0xfeef_f000, 0x40)),
    row("message-of-all-ones", Devices, Must::Survive, |s| route_only(s, 0xfeef_ffff, u32::MAX)),
    row("message-of-a-reserved-kind", Devices, Must::Survive, |s| route_only(s, 0xfee0_0000, 0x0340)),
    row("table-every-width", Devices, Must::Survive, table_widths),
    row("table-past-its-end", Devices, Must::Go, table_end),
    row("pending-bits-written", Devices, Must::Go, pending_written),
    row("masks-flicker", Devices, Must::Go, masks_flicker),
    row("enable-flickers", Devices, Must::Go, enable_flickers),
    row("vector-changes-while-live", Devices, Must::Go, vector_changes),
    row("vectors-rerouted-while-live", Devices, Must::Go, rerouted),
    row("pending-then-reset", Devices, Must::Go, pending_then_reset),
    row("pending-then-disabled", Devices, Must::Go, pending_then_disabled),
];

fn table(s: &Stage) -> Result<Msix, Failure> {
    Msix::find(s.device.function).ok_or_else(|| "no MSI-X".into())
}

fn write_entry(msix: &Msix, entry: u16, address: u64, data: u32) {
    let at = msix.table + u64::from(entry) * 16;
    msix.mask(entry, true);
    cpu::write32(at, address as u32);
    cpu::write32(at + 4, (address >> 32) as u32);
    cpu::write32(at + 8, data);
    msix.mask(entry, false);
}

/// Live, all queues at entry 0, which has this message; requests are made.
fn message(s: &mut Stage, address: u64, data: u32) -> Outcome {
    let msix = table(s)?;
    start_with_vector(s)?;
    write_entry(&msix, 0, address, data);
    msix.enable(true, false);
    for _ in 0..4 {
        // The interrupt may be lost, and the device may say so: then it does not answer any more.
        if s.answers().is_err() {
            break;
        }
    }
    Ok(())
}

/// The message is routed, and masked again before anything sends it.
fn route_only(s: &mut Stage, address: u64, data: u32) -> Outcome {
    let msix = table(s)?;
    msix.enable(true, false);
    for entry in 0..msix.count {
        write_entry(&msix, entry, address, data);
        msix.mask(entry, true);
    }
    Ok(())
}

fn start_with_vector(s: &mut Stage) -> Outcome {
    s.negotiate(0)?;
    s.queues.clear();
    for index in 0..s.device.num_queues() {
        s.queues.push(s.device.queue(index, super::stage::SIZE, 0)?);
    }
    s.device.driver_ok();
    Ok(())
}

fn table_widths(s: &mut Stage) -> Outcome {
    let msix = table(s)?;
    s.start(0)?;
    for value in [u64::MAX, 0, 0x4040_4040_4040_4040] {
        for at in msix.table..msix.table + u64::from(msix.count) * 16 {
            cpu::write8(at, value as u8);
            cpu::write16(at, value as u16);
            cpu::write32(at, value as u32);
            cpu::write64(at, value);
            cpu::read64(at);
        }
    }
    Ok(())
}

fn table_end(s: &mut Stage) -> Outcome {
    let msix = table(s)?;
    s.start(0)?;
    let end = msix.table + u64::from(msix.count) * 16;
    for at in (end..end + 0x400).step_by(8) {
        cpu::write64(at, u64::MAX);
        cpu::write32(at, 0);
        cpu::read64(at);
    }
    s.answers()
}

fn pending_written(s: &mut Stage) -> Outcome {
    let msix = table(s)?;
    s.start(0)?;
    for at in msix.pending..msix.pending + 64 {
        cpu::write8(at, 0xff);
        cpu::write64(at, u64::MAX);
    }
    for entry in 0..msix.count {
        ensure!(!msix.is_pending(entry), "entry {entry} is pending");
    }
    s.answers()
}

/// A live device whose entry 0 goes to a vector that is counted.
fn counted(s: &mut Stage) -> Result<(Msix, u8), Failure> {
    let msix = table(s)?;
    let target = vector::DEVICE + 9;
    start_with_vector(s)?;
    msix.route(0, apic::id(), target);
    msix.enable(true, false);
    Ok((msix, target))
}

fn still_arrives(s: &mut Stage, target: u8) -> Outcome {
    let seen = cpu::interrupt_count(target);
    s.answers()?;
    let arrived = !s.is_eager() || clock::poll(2000, || cpu::interrupt_count(target) > seen);
    ensure!(arrived, "interrupts have stopped");
    Ok(())
}

fn masks_flicker(s: &mut Stage) -> Outcome {
    let (msix, target) = counted(s)?;
    for round in 0..60 {
        msix.mask(0, round % 2 == 0);
        s.answers()?;
        msix.enable(true, round % 3 == 0);
    }
    msix.enable(true, false);
    msix.mask(0, false);
    still_arrives(s, target)
}

fn enable_flickers(s: &mut Stage) -> Outcome {
    let (msix, target) = counted(s)?;
    for round in 0..60 {
        msix.enable(round % 2 == 0, false);
        s.answers()?;
    }
    msix.enable(true, false);
    still_arrives(s, target)
}

fn vector_changes(s: &mut Stage) -> Outcome {
    let (_, target) = counted(s)?;
    for vector in [1u16, 0xffff, 0x7ff, 0, 0xffff, 0] {
        for queue in 0..s.device.num_queues() {
            s.select(queue);
            cpu::write16(s.register(common::QUEUE_MSIX_VECTOR), vector);
        }
        cpu::write16(s.register(common::CONFIG_MSIX_VECTOR), vector);
        s.answers()?;
    }
    still_arrives(s, target)
}

fn rerouted(s: &mut Stage) -> Outcome {
    let (msix, target) = counted(s)?;
    for round in 0..40u8 {
        msix.route(0, apic::id(), vector::DEVICE + round % 8);
        s.answers()?;
    }
    msix.route(0, apic::id(), target);
    still_arrives(s, target)
}

fn pending_then_reset(s: &mut Stage) -> Outcome {
    for _ in 0..5 {
        let (msix, _) = counted(s)?;
        msix.mask(0, true);
        s.answers()?;
        s.device.reset()?;
        msix.mask(0, false);
    }
    let (_, target) = counted(s)?;
    still_arrives(s, target)
}

fn pending_then_disabled(s: &mut Stage) -> Outcome {
    let (msix, target) = counted(s)?;
    msix.mask(0, true);
    s.answers()?;
    msix.enable(false, false);
    s.answers()?;
    msix.enable(true, false);
    msix.mask(0, false);
    still_arrives(s, target)
}
