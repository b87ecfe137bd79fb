//! The tables as a guest reads them: sums, pointers, and what a stranger's interpreter makes of them.

use std::process::Command;

use super::*;

fn table(tables: &Tables, signature: &[u8; 4]) -> Vec<u8> {
    let all = tables.bytes();
    let at = tables.offsets.iter().copied().find(|&at| &all[at..at + 4] == signature).expect("is there");
    let len = u32::from_le_bytes(all[at + 4..at + 8].try_into().expect("four")) as usize;
    all[at..at + len].to_vec()
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

#[test]
fn all_sums_are_zero() {
    for vcpus in [1, 2, 64, 254] {
        let tables = Tables::new(vcpus);
        assert_eq!(&tables.bytes()[..8], b"RSD PTR ");
        assert_eq!(sum(&tables.bytes()[..20]), 0, "the RSDP of ACPI 1.0");
        assert_eq!(sum(&tables.bytes()[..36]), 0, "the RSDP of ACPI 2.0");
        for signature in [b"XSDT", b"FACP", b"APIC", b"MCFG", b"WDAT", b"DSDT"] {
            let table = table(&tables, signature);
            assert_eq!(sum(&table), 0, "{}", String::from_utf8_lossy(signature));
        }
        assert!(tables.bytes().len() < (layout::GENERATION_ID - layout::ACPI_BASE) as usize);
    }
}

#[test]
fn pointers_point_to_tables() {
    let tables = Tables::new(2);
    let at = |address: u64| &tables.bytes()[(address - layout::ACPI_BASE) as usize..];
    let u64_at = |bytes: &[u8], i: usize| u64::from_le_bytes(bytes[i..i + 8].try_into().expect("eight"));
    let xsdt = at(u64_at(tables.bytes(), 24));
    assert_eq!(&xsdt[..4], b"XSDT");
    let found: Vec<&[u8]> = (0..4).map(|i| &at(u64_at(xsdt, 36 + 8 * i))[..4]).collect();
    assert_eq!(found, [b"FACP", b"APIC", b"MCFG", b"WDAT"]);
    let fadt = table(&tables, b"FACP");
    assert_eq!(&at(u64_at(&fadt, 140))[..4], b"DSDT");
}

#[test]
fn every_vcpu_has_an_entry() {
    for vcpus in [1u32, 3, 254] {
        let madt = table(&Tables::new(vcpus), b"APIC");
        // Header and fixed part 44 bytes, 8 a local APIC, 12 the IO-APIC.
        assert_eq!(madt.len() as u32, 44 + 8 * vcpus + 12);
    }
}

/// Decompiles all tables with ACPICA's own tool, which complains about what it cannot read.
#[test]
fn a_strangers_decompiler_reads_them() {
    let dir = tempfile::tempdir().expect("a directory");
    let tables = Tables::new(2);
    let run = |name: &str, signature: &[u8; 4]| -> Option<String> {
        let file = dir.path().join(format!("{name}.aml"));
        std::fs::write(&file, table(&tables, signature)).expect("written");
        let output = match Command::new("iasl").arg("-d").arg(&file).output() {
            Ok(output) => output,
            Err(error) => {
                println!("skipped: iasl cannot be run: {error}");
                return None;
            }
        };
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{name}: {said}");
        assert!(!said.contains("Error") && !said.contains("Invalid"), "{name}: {said}");
        Some(std::fs::read_to_string(dir.path().join(format!("{name}.dsl"))).expect("decompiled"))
    };
    let Some(dsdt) = run("dsdt", b"DSDT") else { return };
    for expected in [
        "PNP0A08",
        "PNP0501",
        "PNP0C0C",
        "ACPI0013",
        "_S5",
        "Notify (\\_SB.PWRB, 0x80)",
        "PNP0B00",
        "VMGENCTR",
        "Notify (\\_SB.VGEN, 0x80)",
        "OperationRegion (\\_SB.PCI0.HPRG, SystemIO, 0x0610, 0x0C)",
        "Device (\\_SB.PCI0.SL01)",
        "Notify (\\_SB.PCI0.SL01, One)",
        "Notify (\\_SB.PCI0.SL1F, 0x03)",
        "\\_SB.PCI0.PSCN",
    ] {
        assert!(dsdt.contains(expected), "no {expected} in:\n{dsdt}");
    }
    // What a name stands for that no table defines, a decompiler takes for another table's.
    assert!(!dsdt.contains("External ("), "a name is not defined:\n{dsdt}");
    let fadt = run("facp", b"FACP").expect("iasl is there");
    assert!(fadt.contains("Hardware Reduced (V5) : 1"), "{fadt}");
    run("apic", b"APIC");
    run("mcfg", b"MCFG");
    let wdat = run("wdat", b"WDAT").expect("iasl is there");
    assert!(wdat.contains("Watchdog Action : 21") && wdat.contains("Timer Period : 00000064"), "{wdat}");
}
