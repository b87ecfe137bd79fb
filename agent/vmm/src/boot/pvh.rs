//! The PVH boot ABI: start info, module list and memory map in one page, RBX pointing to it.

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use serio_hv::vm_memory::{Bytes, GuestAddress};
use serio_hv::{BootMode, BootRegisters, GuestMemory};

use super::{BootError, Placement, registers};
use crate::layout;

/// XEN_HVM_START_MAGIC_VALUE
const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;
const MODULES_AT: u64 = layout::PVH_START_INFO + 0x100;
const MAP_AT: u64 = layout::PVH_START_INFO + 0x200;

/// Writes the start info.
pub(super) fn prepare(
    memory: &GuestMemory,
    placement: &Placement,
    entry: u64,
) -> Result<BootRegisters, BootError> {
    let map = layout::memory_map(placement.memory_bytes);
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: placement.rsdp,
        memmap_paddr: MAP_AT,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    if let Some(initrd) = placement.initrd {
        let module = hvm_modlist_entry { paddr: initrd.start, size: initrd.len, ..Default::default() };
        memory.write_obj(module, GuestAddress(MODULES_AT)).map_err(BootError::write("PVH modules"))?;
        info.nr_modules = 1;
        info.modlist_paddr = MODULES_AT;
    }
    let entry_bytes = size_of::<hvm_memmap_table_entry>() as u64;
    for (at, range) in (0..).map(|i| MAP_AT + i * entry_bytes).zip(&map) {
        let slot = hvm_memmap_table_entry {
            addr: range.start,
            size: range.len,
            type_: range.kind as u32,
            reserved: 0,
        };
        memory.write_obj(slot, GuestAddress(at)).map_err(BootError::write("the PVH memory map"))?;
    }
    memory
        .write_obj(info, GuestAddress(layout::PVH_START_INFO))
        .map_err(BootError::write("the PVH start info"))?;
    Ok(BootRegisters { rbx: layout::PVH_START_INFO, ..registers(BootMode::Protected, entry) })
}
