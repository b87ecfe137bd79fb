//! PCI through ECAM: functions, BARs, capabilities, MSI-X.

use crate::acpi::Acpi;
use crate::cpu;
use crate::mem;
use alloc::vec::Vec;

/// Memory and I/O decoding and bus mastering in the command register.
pub const COMMAND_MEMORY: u16 = 2;
/// Bus mastering.
pub const COMMAND_MASTER: u16 = 4;

/// One function of the bus.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    /// Device number on bus 0.
    pub device: u8,
    /// Address of its configuration space.
    pub config: u64,
}

/// A base address register, as it is now.
#[derive(Clone, Copy, Debug)]
pub struct Bar {
    /// Number, 0 to 5.
    pub index: u8,
    /// Address.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
    /// Takes two registers.
    pub wide: bool,
    /// I/O ports instead of memory.
    pub ports: bool,
}

impl Function {
    /// Reads configuration space.
    pub fn get8(&self, at: u16) -> u8 {
        cpu::read8(self.config + u64::from(at))
    }
    /// Reads configuration space.
    pub fn get16(&self, at: u16) -> u16 {
        cpu::read16(self.config + u64::from(at))
    }
    /// Reads configuration space.
    pub fn get32(&self, at: u16) -> u32 {
        cpu::read32(self.config + u64::from(at))
    }
    /// Writes configuration space.
    pub fn set16(&self, at: u16, value: u16) {
        cpu::write16(self.config + u64::from(at), value);
    }
    /// Writes configuration space.
    pub fn set32(&self, at: u16, value: u32) {
        cpu::write32(self.config + u64::from(at), value);
    }
    /// Vendor id.
    pub fn vendor(&self) -> u16 {
        self.get16(0)
    }
    /// Device id.
    pub fn device_id(&self) -> u16 {
        self.get16(2)
    }
    /// The virtio device type (1 net, 2 block, 4 entropy …), if it is a modern or transitional virtio device.
    pub fn virtio_type(&self) -> Option<u16> {
        let id = self.device_id();
        match (self.vendor(), id) {
            (0x1af4, 0x1040..=0x107f) => Some(id - 0x1040),
            (0x1af4, 0x1000..=0x103f) => Some(self.get16(0x2e)),
            _ => None,
        }
    }
    /// Switches memory decoding and bus mastering.
    pub fn set_command(&self, bits: u16, on: bool) {
        let old = self.get16(4);
        self.set16(4, if on { old | bits } else { old & !bits });
    }
    /// Offsets of all capabilities with their ids; stops after 48 (a list that loops is longer than any real one).
    pub fn capabilities(&self) -> Vec<(u8, u16)> {
        let mut list = Vec::new();
        if self.get16(6) & 0x10 == 0 {
            return list;
        }
        let mut at = u16::from(self.get8(0x34) & 0xfc);
        while at != 0 && list.len() < 48 {
            list.push((self.get8(at), at));
            at = u16::from(self.get8(at + 1) & 0xfc);
        }
        list
    }
    /// Whether the bus has a type-0 function here (bridges have other registers).
    pub fn is_endpoint(&self) -> bool {
        self.get8(0x0e) & 0x7f == 0
    }
    /// Reads the BARs and finds their sizes; memory decoding is off meanwhile.
    pub fn bars(&self) -> Vec<Bar> {
        let mut bars = Vec::new();
        let command = self.get16(4);
        self.set16(4, command & !3);
        let mut index = 0u8;
        while index < 6 && self.is_endpoint() {
            let bar = self.probe(index);
            index += if bar.is_some_and(|bar| bar.wide) { 2 } else { 1 };
            bars.extend(bar);
        }
        self.set16(4, command);
        bars
    }
    fn probe(&self, index: u8) -> Option<Bar> {
        let at = 0x10 + u16::from(index) * 4;
        let old = self.get32(at);
        self.set32(at, u32::MAX);
        let mask = self.get32(at);
        self.set32(at, old);
        if mask == 0 {
            return None;
        }
        let ports = mask & 1 == 1;
        let wide = !ports && mask & 6 == 4;
        let flags = if ports { 3 } else { 15 };
        let (mut address, mut size_mask) =
            (u64::from(old & !flags), u64::from(mask & !flags) | 0xffff_ffff_0000_0000);
        if wide {
            let high = self.get32(at + 4);
            self.set32(at + 4, u32::MAX);
            size_mask = u64::from(mask & !flags) | u64::from(self.get32(at + 4)) << 32;
            self.set32(at + 4, high);
            address |= u64::from(high) << 32;
        }
        let len = if ports {
            u64::from(!(size_mask as u32)).wrapping_add(1) & 0xffff
        } else {
            (!size_mask).wrapping_add(1)
        };
        Some(Bar { index, address, len, wide, ports })
    }
    /// Puts a BAR at an address; memory decoding is off meanwhile.
    pub fn place(&self, bar: &Bar, address: u64) {
        let command = self.get16(4);
        self.set16(4, command & !3);
        let at = 0x10 + u16::from(bar.index) * 4;
        self.set32(at, address as u32);
        if bar.wide {
            self.set32(at + 4, (address >> 32) as u32);
        }
        self.set16(4, command);
    }
}

/// The functions of bus 0, with every BAR placed.
pub struct Bus {
    /// Address of segment 0's configuration space.
    pub ecam: u64,
    /// All functions found.
    pub functions: Vec<Function>,
    /// The root's memory windows and, for each, the next free address.
    windows: Vec<(u64, u64, u64)>,
}

impl Bus {
    /// Enumerates bus 0 and places BARs that nobody placed.
    /// `ecam`: where it is on a machine that has no table for it.
    pub fn enumerate(acpi: &Acpi, ecam: Option<u64>) -> Option<Self> {
        let (ecam, last_bus) = acpi.ecam().or(ecam.map(|ecam| (ecam, 0)))?;
        mem::map(ecam, 1 << 20);
        let mut functions = Vec::new();
        for device in 0..32u8 {
            for function in 0..8u64 {
                let config = ecam + u64::from(device) * 0x8000 + function * 0x1000;
                let found = Function { device, config };
                if found.vendor() == 0xffff {
                    if function == 0 {
                        break;
                    }
                    continue;
                }
                functions.push(found);
                if function == 0 && found.get8(0x0e) & 0x80 == 0 {
                    break;
                }
            }
        }
        let ecam_end = ecam + ((u64::from(last_bus) + 1) << 20);
        let windows = acpi.pci_windows().into_iter().map(|(start, len)| {
            // Some firmware describes configuration space as a part of the window.
            let first = if (start..start + len).contains(&ecam) { ecam_end } else { start };
            (start, start + len, first)
        });
        let windows = windows.collect();
        let mut bus = Self { ecam, functions, windows };
        bus.place_all();
        Some(bus)
    }

    fn place_all(&mut self) {
        let all: Vec<(Function, Bar)> = self
            .functions
            .iter()
            .flat_map(|&function| function.bars().into_iter().map(move |bar| (function, bar)))
            .collect();
        for window in &mut self.windows {
            for (_, bar) in
                all.iter().filter(|(_, bar)| !bar.ports && bar.address >= window.0 && bar.address < window.1)
            {
                window.2 = window.2.max(bar.address + bar.len);
            }
        }
        for (function, bar) in &all {
            if !bar.ports
                && bar.address == 0
                && let Some(address) = self.allocate(bar.len, bar.wide)
            {
                function.place(bar, address);
            }
        }
    }

    /// A free place in a window: above 4 GiB only for 64-bit BARs.
    pub fn allocate(&mut self, len: u64, wide: bool) -> Option<u64> {
        for (_, end, next) in &mut self.windows {
            let address = next.next_multiple_of(len);
            if address + len <= *end && (wide || address + len <= 1 << 32) {
                *next = address + len;
                return Some(address);
            }
        }
        None
    }

    /// The virtio devices of one type, in bus order.
    pub fn virtio(&self, kind: u16) -> Vec<Function> {
        self.functions.iter().copied().filter(|function| function.virtio_type() == Some(kind)).collect()
    }
}

/// A function's MSI-X capability.
#[derive(Clone, Copy, Debug)]
pub struct Msix {
    function: Function,
    at: u16,
    /// Address of the table.
    pub table: u64,
    /// Address of the pending bits.
    pub pending: u64,
    /// Number of entries.
    pub count: u16,
}

impl Msix {
    /// Finds it; all of the function's memory must be placed and decoded.
    pub fn find(function: Function) -> Option<Self> {
        let (_, at) = function.capabilities().into_iter().find(|(id, _)| *id == 0x11)?;
        let bars = function.bars();
        let locate = |value: u32| {
            let bar = bars.iter().find(|bar| u32::from(bar.index) == value & 7)?;
            mem::map(bar.address, bar.len);
            Some(bar.address + u64::from(value & !7))
        };
        let (table, pending) = (locate(function.get32(at + 4))?, locate(function.get32(at + 8))?);
        Some(Self { function, at, table, pending, count: (function.get16(at + 2) & 0x7ff) + 1 })
    }
    /// Switches MSI-X on or off, with or without the function mask.
    pub fn enable(&self, on: bool, mask_all: bool) {
        let control = self.function.get16(self.at + 2) & 0x3fff;
        self.function.set16(self.at + 2, control | u16::from(on) << 15 | u16::from(mask_all) << 14);
    }
    /// Points an entry at a vector of a processor, unmasked.
    pub fn route(&self, entry: u16, apic_id: u32, vector: u8) {
        let at = self.table + u64::from(entry) * 16;
        self.mask(entry, true);
        cpu::write32(at, 0xfee0_0000 | (apic_id & 0xff) << 12);
        cpu::write32(at + 4, 0);
        cpu::write32(at + 8, u32::from(vector));
        self.mask(entry, false);
    }
    /// Masks or unmasks an entry.
    pub fn mask(&self, entry: u16, masked: bool) {
        cpu::write32(self.table + u64::from(entry) * 16 + 12, u32::from(masked));
    }
    /// Whether an entry's pending bit is set.
    pub fn is_pending(&self, entry: u16) -> bool {
        cpu::read32(self.pending + u64::from(entry / 32) * 4) >> (entry % 32) & 1 == 1
    }
}
