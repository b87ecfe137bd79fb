//! The bus, through ECAM.

use crate::pci::{Bar, COMMAND_MEMORY, Function};
use crate::suite::{Case, Machine, Outcome};
use crate::{cpu, ensure, mem, skip};
use alloc::vec::Vec;

pub const CASES: &[Case] = &[
    Case { group: "pci", name: "enumerate", run: enumerate },
    Case { group: "pci", name: "absent", run: absent },
    Case { group: "pci", name: "widths", run: widths },
    Case { group: "pci", name: "read-only", run: read_only },
    Case { group: "pci", name: "capabilities", run: capabilities },
    Case { group: "pci", name: "bars", run: bars },
    Case { group: "pci", name: "bar-move", run: bar_move },
    Case { group: "pci", name: "decode-off", run: decode_off },
];

fn enumerate(machine: &mut Machine) -> Outcome {
    let wanted = machine.boot.number("mini.devices");
    let bus = machine.bus()?;
    ensure!(!bus.functions.is_empty(), "nothing answers");
    let virtio = bus.functions.iter().filter(|function| function.virtio_type().is_some()).count() as u64;
    if let Some(wanted) = wanted {
        ensure!(virtio == wanted, "{virtio} virtio devices, the command line says {wanted}");
    }
    Ok(())
}

fn absent(machine: &mut Machine) -> Outcome {
    let bus = machine.bus()?;
    let used = |device: u8| bus.functions.iter().any(|function| function.device == device);
    for device in (0..32u8).filter(|&device| !used(device)) {
        let config = bus.ecam + u64::from(device) * 0x8000;
        for at in [0, 0x10, 0x100, 0xffc] {
            let value = cpu::read32(config + at);
            ensure!(value == u32::MAX, "absent device {device} reads {value:#x} at {at:#x}");
        }
        cpu::write32(config + 0x10, 0);
    }
    Ok(())
}

fn widths(machine: &mut Machine) -> Outcome {
    for function in &machine.bus()?.functions {
        for at in (0..0x40u16).step_by(4) {
            let whole = function.get32(at);
            let halves = u32::from(function.get16(at)) | u32::from(function.get16(at + 2)) << 16;
            let bytes = (0..4).fold(0, |sum, byte| sum | u32::from(function.get8(at + byte)) << (8 * byte));
            ensure!(
                whole == halves && whole == bytes,
                "device {} at {at:#x}: {whole:#x} {halves:#x} {bytes:#x}",
                function.device
            );
        }
    }
    Ok(())
}

fn read_only(machine: &mut Machine) -> Outcome {
    for function in machine.bus()?.functions.clone() {
        for at in [0u16, 8] {
            let old = function.get32(at);
            function.set32(at, !old);
            let new = function.get32(at);
            ensure!(old == new, "device {}: the word at {at:#x} became {new:#x}", function.device);
        }
    }
    Ok(())
}

fn capabilities(machine: &mut Machine) -> Outcome {
    for function in &machine.bus()?.functions {
        let list = function.capabilities();
        ensure!(list.len() < 48, "device {}: the list does not end", function.device);
        for (id, at) in &list {
            ensure!(
                *at >= 0x40,
                "device {}: capability {id:#x} lies in the header, at {at:#x}",
                function.device
            );
        }
        if function.virtio_type().is_some() {
            ensure!(list.iter().any(|(id, _)| *id == 0x11), "device {}: no MSI-X", function.device);
        }
    }
    Ok(())
}

fn memory_bars(machine: &mut Machine) -> Result<Vec<(Function, Bar)>, crate::suite::Failure> {
    let functions = machine.bus()?.functions.clone();
    let pairs = functions
        .into_iter()
        .flat_map(|function| function.bars().into_iter().map(move |bar| (function, bar)));
    Ok(pairs.filter(|(_, bar)| !bar.ports).collect())
}

fn bars(machine: &mut Machine) -> Outcome {
    let all = memory_bars(machine)?;
    for (index, (function, bar)) in all.iter().enumerate() {
        let device = function.device;
        ensure!(
            bar.len.is_power_of_two() && bar.len >= 16,
            "device {device}: BAR {} of {:#x} bytes",
            bar.index,
            bar.len
        );
        ensure!(
            bar.address % bar.len == 0 && bar.address != 0,
            "device {device}: BAR {} at {:#x}",
            bar.index,
            bar.address
        );
        for (_, other) in &all[index + 1..] {
            let apart = bar.address + bar.len <= other.address || other.address + other.len <= bar.address;
            ensure!(apart, "device {device}: {bar:x?} overlaps {other:x?}");
        }
        for range in machine.boot.ram() {
            let apart = bar.address + bar.len <= range.start || range.start + range.len <= bar.address;
            ensure!(apart, "device {device}: {bar:x?} overlaps RAM");
        }
    }
    Ok(())
}

/// The memory BAR of a virtio device in which its common configuration lies.
fn virtio_bar(machine: &mut Machine) -> Result<(Function, Bar, u64), crate::suite::Failure> {
    let bus = machine.bus()?;
    let found = bus.functions.iter().copied().find(|function| function.virtio_type().is_some());
    let Some(function) = found else { skip!("no virtio device") };
    let device = crate::virtio::Virtio::open(function)?;
    let bars = function.bars();
    let bar = bars
        .iter()
        .find(|bar| !bar.ports && device.common >= bar.address && device.common < bar.address + bar.len);
    let Some(bar) = bar else { return Err("the common configuration lies in no BAR".into()) };
    Ok((function, *bar, device.common - bar.address))
}

fn bar_move(machine: &mut Machine) -> Outcome {
    let (function, bar, common) = virtio_bar(machine)?;
    let Some(place) = machine.bus()?.allocate(bar.len, bar.wide) else {
        skip!("no free room in the windows")
    };
    mem::map(place, bar.len);
    let queues = |base: u64| cpu::read16(base + common + crate::virtio::common::NUM_QUEUES);
    let before = queues(bar.address);
    function.place(&bar, place);
    let (moved, old) = (queues(place), queues(bar.address));
    function.place(&bar, bar.address);
    let back = queues(bar.address);
    ensure!(moved == before, "{before} queues at {:#x}, {moved} at {place:#x}", bar.address);
    ensure!(old != before, "it still answers at the old place: {old:#x}");
    ensure!(back == before, "moved back, it says {back} queues");
    Ok(())
}

fn decode_off(machine: &mut Machine) -> Outcome {
    let (function, bar, common) = virtio_bar(machine)?;
    let at = bar.address + common + crate::virtio::common::NUM_QUEUES;
    let before = cpu::read16(at);
    function.set_command(COMMAND_MEMORY, false);
    let off = cpu::read16(at);
    function.set_command(COMMAND_MEMORY, true);
    let on = cpu::read16(at);
    ensure!(off != before, "it answers {off:#x} with memory decoding off");
    ensure!(on == before, "{before} before, {on} after decoding came back");
    Ok(())
}
