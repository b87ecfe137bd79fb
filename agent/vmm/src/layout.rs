//! The machine's address map: where everything lies that the guest finds at a fixed place.
//!
//! ```text
//!   0x0000_0500   GDT of the boot protocols            ┐
//!   0x0000_6000   PVH start info, module, memory map   │ usable RAM for the guest once it has read them
//!   0x0000_7000   Linux' zero page                     │
//!   0x0000_9000   page tables: 1 GiB, each address to itself
//!   0x0002_0000   command line                         ┘
//!   0x0009_fc00   ── end of conventional memory; reserved up to
//!   0x000e_0000   ACPI tables, RSDP first
//!   0x000f_e000   the generation identifier, a page of its own
//!   0x000f_fff0   a few instructions that reset the machine, where old ways to reboot jump to
//!   0x0010_0000   kernel (bzImage: where it prefers), initrd at the end of RAM below 2 GiB
//!   0xc000_0000   PCI hole: BARs up to 0xec00_0000, then ECAM of bus 0 (1 MiB)
//!   0xfec0_0000   IO-APIC
//!   0xfee0_0000   local APIC, MSI
//!   0x1_0000_0000 RAM beyond 3 GiB
//! ```
//!
//! Ports: 0x3f8 COM1 · 0x70, 0x71 clock · 0x600 sleep control, 0x601 sleep status, 0x602 reset · 0x608 watchdog · 0x610 hot plug · 0x64 the reset of the keyboard
//! controller (nothing else of it exists) · 0xcf8, 0xcfc PCI configuration for those that do not use ECAM.

use serio_hv::{LOW_RAM_END, ram_ranges};

/// Where the loader writes the descriptor table of the first vcpu.
pub const GDT_BASE: u64 = 0x500;
/// PVH: `hvm_start_info`, then the module list and the memory map in the same page.
pub const PVH_START_INFO: u64 = 0x6000;
/// Linux' `boot_params`, one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Three pages: PML4, PDPT, one page directory of 2 MiB pages.
pub const PAGE_TABLES: u64 = 0x9000;
/// Top of the stack that the 64-bit entry starts with; Linux sets its own at once.
pub const BOOT_STACK: u64 = 0x8ff0;
/// The kernel's command line, zero-terminated.
pub const CMDLINE: u64 = 0x2_0000;
/// Bytes kept for the command line, its end mark included.
pub const CMDLINE_BYTES_MAX: u64 = 0x1_0000;
/// End of what a guest may use below 1 MiB.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// The ACPI tables; the RSDP is at the very start, on a boundary where guests without boot data scan for it.
pub const ACPI_BASE: u64 = 0xe_0000;
/// Sixteen bytes that change when the VM goes on from a snapshot; nothing else is in their page.
pub const GENERATION_ID: u64 = 0xf_e000;
/// The reset vector as real mode sees it (FFFF:0000). Linux on reduced hardware without EFI reboots by a jump there.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// What lies there: `mov al, 0xfe; out 0x64, al; 1: hlt; jmp 1b`. Zeros would be executed for ever.
pub const RESET_CODE: [u8; 7] = [0xb0, 0xfe, 0xe6, KEYBOARD_COMMAND_PORT as u8, 0xf4, 0xeb, 0xfd];
/// Where RAM goes on above the legacy hole, and the lowest place for a kernel.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// The initrd ends below this: every kernel can reach it, and it is what Linux' own header says.
pub const INITRD_END_MAX: u64 = 0x8000_0000;

/// Memory BARs are placed here …
pub const BAR_WINDOW_BASE: u64 = LOW_RAM_END;
/// … up to here.
pub const BAR_WINDOW_END: u64 = 0xec00_0000;
/// Configuration space of bus 0.
pub const ECAM_BASE: u64 = 0xec00_0000;
/// 32 devices of 8 functions, 4 KiB each.
pub const ECAM_BYTES: u64 = 0x10_0000;
/// KVM's IO-APIC.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// KVM's local APICs.
pub const LOCAL_APIC_BASE: u64 = 0xfee0_0000;

/// First port of COM1, a 16550.
pub const COM1_PORT: u16 = 0x3f8;
/// Its interrupt pin.
pub const COM1_GSI: u32 = 4;
/// The interrupt pin of ACPI's event device: the power button.
pub const EVENT_GSI: u32 = 5;
/// The interrupt pin by which the event device tells that the generation identifier has changed.
pub const GENERATION_GSI: u32 = 6;
/// The interrupt pin by which the event device tells that devices have come or shall go.
pub const HOTPLUG_GSI: u32 = 7;
/// The first of three hot-plug registers of four bytes.
pub const HOTPLUG_PORT: u16 = 0x610;
/// The clock's index port; its data port is the next.
pub const CLOCK_PORT: u16 = 0x70;
/// The watchdog's control register, four bytes; the next four are its count.
pub const WATCHDOG_PORT: u16 = 0x608;
/// ACPI sleep control register (ACPI 6.5 §4.8.3.7); the status register is the next port, reset the one after.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// The sleep type that S5, soft off, has in the sleep control register.
pub const S5_SLEEP_TYPE: u8 = 5;
/// ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register.
pub const RESET_PORT: u16 = 0x602;
/// What ACPI writes to the reset register.
pub const RESET_VALUE: u8 = 0xfe;
/// Command port of the keyboard controller.
pub const KEYBOARD_COMMAND_PORT: u16 = 0x64;

/// What a range of the guest's addresses is, in the numbers that e820 and PVH share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum RangeKind {
    /// RAM.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// A range of the guest's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
    /// What it is.
    pub kind: RangeKind,
}

/// The memory map that the guest is told, ascending, for `memory_bytes` of RAM.
pub fn memory_map(memory_bytes: u64) -> Vec<Range> {
    let range = |start, end, kind| Range { start, len: end - start, kind };
    let mut map = vec![
        range(0, CONVENTIONAL_END, RangeKind::Ram),
        range(CONVENTIONAL_END, HIGH_MEMORY, RangeKind::Reserved),
    ];
    for (start, len) in ram_ranges(memory_bytes) {
        let end = start + len;
        let start = start.max(HIGH_MEMORY);
        if end > start {
            map.push(range(start, end, RangeKind::Ram));
        }
        if start == HIGH_MEMORY {
            // Linux takes ECAM into use only where the memory map or the DSDT reserves it.
            map.push(range(ECAM_BASE, ECAM_BASE + ECAM_BYTES, RangeKind::Reserved));
        }
    }
    map
}

/// End of the RAM below the PCI hole.
pub fn low_ram_end(memory_bytes: u64) -> u64 {
    memory_bytes.min(LOW_RAM_END)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram(map: &[Range]) -> u64 {
        map.iter().filter(|r| r.kind == RangeKind::Ram).map(|r| r.len).sum()
    }

    #[test]
    fn the_map_is_ascending_disjoint_and_complete_for_all_sizes() {
        let mib = 1 << 20;
        for size in [2 * mib, 64 * mib, 3071 * mib, 3072 * mib, 3073 * mib, 4096 * mib, 8192 * mib, 1 << 40] {
            let map = memory_map(size);
            for pair in map.windows(2) {
                assert!(pair[0].start + pair[0].len <= pair[1].start, "{size:#x}: {pair:x?}");
            }
            assert_eq!(ram(&map), size - (HIGH_MEMORY - CONVENTIONAL_END), "{size:#x}");
            let hole = map
                .iter()
                .filter(|r| r.kind == RangeKind::Ram)
                .all(|r| r.start + r.len <= BAR_WINDOW_BASE || r.start >= 4 << 30);
            assert!(hole, "{size:#x}: no RAM in the PCI hole");
        }
    }

    #[test]
    fn fixed_places_do_not_overlap() {
        let places = [
            (GDT_BASE, 0x100),
            (PVH_START_INFO, 0x1000),
            (ZERO_PAGE, 0x1000),
            (PAGE_TABLES, 0x3000),
            (CMDLINE, CMDLINE_BYTES_MAX),
            (CONVENTIONAL_END, ACPI_BASE - CONVENTIONAL_END),
            (ACPI_BASE, GENERATION_ID - ACPI_BASE),
            (GENERATION_ID, 0x1000),
            (RESET_VECTOR, HIGH_MEMORY - RESET_VECTOR),
            (BAR_WINDOW_BASE, BAR_WINDOW_END - BAR_WINDOW_BASE),
            (ECAM_BASE, ECAM_BYTES),
            (IOAPIC_BASE, 0x1000),
            (LOCAL_APIC_BASE, 0x1000),
        ];
        for pair in places.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }
}
