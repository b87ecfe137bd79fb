//! The firmware tables.

use crate::acpi::sum;
use crate::ensure;
use crate::mem::bytes_at;
use crate::suite::{Case, Machine, Outcome};

pub const CASES: &[Case] = &[
    Case { group: "acpi", name: "root-pointer", run: root_pointer },
    Case { group: "acpi", name: "checksums", run: checksums },
    Case { group: "acpi", name: "processors", run: processors },
    Case { group: "acpi", name: "mcfg", run: mcfg },
    Case { group: "acpi", name: "reset-register", run: reset_register },
    Case { group: "acpi", name: "sleep", run: sleep },
    Case { group: "acpi", name: "pci-windows", run: pci_windows },
];

fn root_pointer(machine: &mut Machine) -> Outcome {
    let root = bytes_at(machine.acpi()?.rsdp, 36);
    ensure!(&root[..8] == b"RSD PTR ", "no signature at {:#x}", machine.acpi()?.rsdp);
    ensure!(sum(&root[..20]) == 0, "checksum of the first 20 bytes");
    ensure!(root[15] < 2 || sum(root) == 0, "extended checksum");
    Ok(())
}

fn checksums(machine: &mut Machine) -> Outcome {
    let acpi = machine.acpi()?;
    for table in &acpi.tables {
        let name = alloc::string::String::from_utf8_lossy(&table.signature);
        ensure!(table.checksum_ok(), "table {name} of {} bytes", table.bytes.len());
    }
    for wanted in [b"FACP", b"APIC", b"DSDT"] {
        ensure!(acpi.table(wanted).is_some(), "no {}", alloc::string::String::from_utf8_lossy(wanted));
    }
    Ok(())
}

fn processors(machine: &mut Machine) -> Outcome {
    let found = machine.acpi()?.processors().len() as u64;
    ensure!(found >= 1, "the MADT names no processor");
    if let Some(wanted) = machine.boot.number("mini.cpus") {
        ensure!(found == wanted, "the MADT names {found} processors, the command line {wanted}");
    }
    Ok(())
}

fn mcfg(machine: &mut Machine) -> Outcome {
    let Some((base, end)) = machine.acpi()?.ecam() else { return Err("no MCFG table".into()) };
    ensure!(base != 0 && base % (1 << 20) == 0, "configuration space at {base:#x} up to bus {end}");
    let len = (u64::from(end) + 1) << 20;
    for range in machine.boot.ram() {
        ensure!(base + len <= range.start || range.start + range.len <= base, "it lies in RAM: {base:#x}");
    }
    Ok(())
}

fn reset_register(machine: &mut Machine) -> Outcome {
    ensure!(machine.acpi()?.reset_register().is_some(), "the FADT names no reset register");
    Ok(())
}

fn sleep(machine: &mut Machine) -> Outcome {
    let acpi = machine.acpi()?;
    ensure!(acpi.sleep_type_s5().is_some(), "the DSDT has no _S5");
    if acpi.hardware_reduced() {
        ensure!(acpi.sleep_register().is_some(), "hardware-reduced, but no sleep control register");
    }
    Ok(())
}

fn pci_windows(machine: &mut Machine) -> Outcome {
    let windows = machine.acpi()?.pci_windows();
    ensure!(!windows.is_empty(), "the DSDT has no memory window for the PCI root");
    for (start, len) in windows {
        for range in machine.boot.ram() {
            let apart = start + len <= range.start || range.start + range.len <= start;
            ensure!(apart, "window {start:#x}+{len:#x} overlaps RAM at {:#x}", range.start);
        }
    }
    Ok(())
}
