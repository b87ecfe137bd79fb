//! ACPI: finds the tables and what the guest needs of them. No AML interpreter: the two things that live in
//! AML (the sleep type of S5, the memory windows of the PCI bus) are found by their byte shapes.

use crate::boot::Boot;
use crate::cpu;
use crate::mem::bytes_at;
use alloc::vec::Vec;

/// A table, header included.
#[derive(Clone, Copy)]
pub struct Table {
    /// Four letters.
    pub signature: [u8; 4],
    /// All of its bytes.
    pub bytes: &'static [u8],
}

impl Table {
    fn at(address: u64) -> Self {
        let len = u32_of(bytes_at(address, 8), 4) as usize;
        let bytes = bytes_at(address, len.clamp(8, 1 << 20));
        Self { signature: [bytes[0], bytes[1], bytes[2], bytes[3]], bytes }
    }
    /// Whether its bytes add up to zero.
    pub fn checksum_ok(&self) -> bool {
        sum(self.bytes) == 0
    }
}

/// Adds bytes up.
pub fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The u16 at an offset.
pub fn u16_of(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}
/// The u32 at an offset.
pub fn u32_of(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_of(bytes, at)) | u32::from(u16_of(bytes, at + 2)) << 16
}
/// The u64 at an offset.
pub fn u64_of(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_of(bytes, at)) | u64::from(u32_of(bytes, at + 4)) << 32
}

/// A register of the FADT (generic address structure).
#[derive(Clone, Copy, Debug)]
pub struct Register {
    /// 0 memory, 1 port.
    pub space: u8,
    /// Where.
    pub address: u64,
}

impl Register {
    fn of(fadt: &[u8], at: usize) -> Option<Self> {
        let register = Self { space: *fadt.get(at)?, address: u64_of(fadt.get(at..at + 12)?, 4) };
        (register.address != 0).then_some(register)
    }
    fn write8(&self, value: u8) {
        if self.space == 1 {
            cpu::outb(self.address as u16, value);
        } else {
            cpu::write8(self.address, value);
        }
    }
}

/// All the tables, and how they were found.
pub struct Acpi {
    /// Address of the root pointer.
    pub rsdp: u64,
    /// Every table that XSDT or RSDT names, and the DSDT.
    pub tables: Vec<Table>,
}

/// Finds the tables: where the loader says, else by the signature in the BIOS area.
pub fn find(boot: &Boot) -> Option<Acpi> {
    let named = (boot.rsdp != 0).then_some(boot.rsdp);
    let rsdp = named.or_else(|| {
        (0xe0000u64..0x100000)
            .step_by(16)
            .find(|&at| bytes_at(at, 8) == b"RSD PTR " && sum(bytes_at(at, 20)) == 0)
    })?;
    let root = bytes_at(rsdp, 36);
    let (address, width) =
        if root[15] >= 2 { (u64_of(root, 24), 8) } else { (u64::from(u32_of(root, 16)), 4) };
    let list = Table::at(address);
    let mut tables = alloc::vec![list];
    for entry in list.bytes.get(36..)?.chunks_exact(width) {
        let at = if width == 8 { u64_of(entry, 0) } else { u64::from(u32_of(entry, 0)) };
        tables.push(Table::at(at));
    }
    let mut acpi = Acpi { rsdp, tables };
    if let Some(fadt) = acpi.table(b"FACP") {
        let wide = if fadt.bytes.len() >= 148 { u64_of(fadt.bytes, 140) } else { 0 };
        let at = if wide != 0 { wide } else { u64::from(u32_of(fadt.bytes, 40)) };
        if at != 0 {
            acpi.tables.push(Table::at(at));
        }
    }
    Some(acpi)
}

/// A processor of the MADT that is enabled.
pub type ApicId = u32;

impl Acpi {
    /// The first table of that signature.
    pub fn table(&self, signature: &[u8; 4]) -> Option<&Table> {
        self.tables.iter().find(|table| &table.signature == signature)
    }

    /// Base address and last bus number of segment 0's configuration space.
    pub fn ecam(&self) -> Option<(u64, u8)> {
        let bytes = self.table(b"MCFG")?.bytes;
        let entry = bytes.get(44..60)?;
        Some((u64_of(entry, 0), entry[11]))
    }

    fn madt_entries(&self) -> Vec<&'static [u8]> {
        let mut entries = Vec::new();
        let mut rest = self.table(b"APIC").map_or(&[][..], |table| table.bytes.get(44..).unwrap_or(&[]));
        while rest.len() >= 2 && usize::from(rest[1]) >= 2 && usize::from(rest[1]) <= rest.len() {
            let (entry, next) = rest.split_at(usize::from(rest[1]));
            entries.push(entry);
            rest = next;
        }
        entries
    }

    /// The APIC ids of the enabled processors.
    pub fn processors(&self) -> Vec<ApicId> {
        let mut ids = Vec::new();
        for entry in self.madt_entries() {
            match entry[0] {
                0 if entry.len() >= 8 && entry[4] & 1 == 1 => ids.push(u32::from(entry[3])),
                9 if entry.len() >= 16 && entry[8] & 1 == 1 => ids.push(u32_of(entry, 4)),
                _ => {}
            }
        }
        ids
    }

    /// Address and first line of the first IO-APIC.
    pub fn io_apic(&self) -> Option<(u64, u32)> {
        let entry = self.madt_entries().into_iter().find(|entry| entry[0] == 1 && entry.len() >= 12)?;
        Some((u64::from(u32_of(entry, 4)), u32_of(entry, 8)))
    }

    /// Whether the platform is hardware-reduced ACPI.
    pub fn hardware_reduced(&self) -> bool {
        self.table(b"FACP")
            .is_some_and(|fadt| fadt.bytes.len() >= 116 && u32_of(fadt.bytes, 112) & (1 << 20) != 0)
    }

    /// The reset register and the value to write, if the platform says that it has one.
    pub fn reset_register(&self) -> Option<(Register, u8)> {
        let fadt = self.table(b"FACP")?.bytes;
        let supported = fadt.len() >= 129 && u32_of(fadt, 112) & (1 << 10) != 0;
        supported.then(|| Register::of(fadt, 116).map(|register| (register, fadt[128])))?
    }

    /// The sleep control register (hardware-reduced platforms).
    pub fn sleep_register(&self) -> Option<Register> {
        Register::of(self.table(b"FACP")?.bytes, 244)
    }

    /// The sleep type of S5: `Name (_S5, Package { n, … })`.
    pub fn sleep_type_s5(&self) -> Option<u8> {
        let dsdt = self.table(b"DSDT")?.bytes;
        let name = dsdt.windows(5).position(|window| window == b"_S5_\x12")?;
        // Package length is one byte for so short a package, then the element count, then the first element.
        match *dsdt.get(name + 7)? {
            0x0a => dsdt.get(name + 8).copied(),
            value @ 0..=1 => Some(value),
            _ => None,
        }
    }

    /// The memory windows of the PCI root: (start, length), from the DSDT's address space descriptors.
    pub fn pci_windows(&self) -> Vec<(u64, u64)> {
        let mut windows = Vec::new();
        let Some(dsdt) = self.table(b"DSDT") else { return windows };
        for at in 0..dsdt.bytes.len() {
            let bytes = &dsdt.bytes[at..];
            let (start, len) = match bytes {
                [0x87, 0x17, 0, 0, ..] if bytes.len() >= 26 => {
                    (u64::from(u32_of(bytes, 10)), u64::from(u32_of(bytes, 22)))
                }
                [0x8a, 0x2b, 0, 0, ..] if bytes.len() >= 46 => (u64_of(bytes, 14), u64_of(bytes, 38)),
                _ => continue,
            };
            // Below 1 MiB lies what a display would have had.
            if len != 0 && start >= 1 << 20 {
                windows.push((start, len));
            }
        }
        windows
    }

    /// Switches the machine off.
    pub fn power_off(&self) {
        let kind = self.sleep_type_s5().unwrap_or(5);
        if let Some(register) = self.sleep_register() {
            register.write8(kind << 2 | 1 << 5);
        } else if let Some(fadt) = self.table(b"FACP") {
            let control = u32_of(fadt.bytes, 64) as u16;
            if control != 0 {
                cpu::outw(control, u16::from(kind) << 10 | 1 << 13);
            }
        }
    }

    /// Resets the machine.
    pub fn reset(&self) {
        if let Some((register, value)) = self.reset_register() {
            register.write8(value);
        }
    }
}
