//! Linux' 64-bit boot protocol: the zero page and page tables for the entry (Documentation/arch/x86/boot.rst,
//! "64-bit Boot Protocol").

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use serio_hv::vm_memory::{Bytes, GuestAddress};
use serio_hv::{BootMode, BootRegisters, GuestMemory};

use super::{BootError, Placement, registers};
use crate::layout;

const BOOT_FLAG: u16 = 0xaa55;
const MAGIC: u32 = 0x5372_6448;
/// "Undefined" in the list of boot loaders.
const LOADER_TYPE: u8 = 0xff;
/// For a kernel without a header of its own.
const ALIGNMENT: u32 = 0x100_0000;

const PRESENT_WRITABLE: u64 = 0b11;
const PAGE_2MIB: u64 = 1 << 7;

/// Writes the zero page and the page tables.
pub(super) fn prepare(
    memory: &GuestMemory,
    placement: &Placement,
    header: Option<setup_header>,
    entry: u64,
) -> Result<BootRegisters, BootError> {
    let page = zero_page(placement, header);
    memory.write_obj(page, GuestAddress(layout::ZERO_PAGE)).map_err(BootError::write("the zero page"))?;
    let page_table = write_page_tables(memory)?;
    Ok(BootRegisters { rsi: layout::ZERO_PAGE, ..registers(BootMode::Long { page_table }, entry) })
}

fn zero_page(placement: &Placement, header: Option<setup_header>) -> boot_params {
    let hdr = header.unwrap_or_else(|| setup_header {
        boot_flag: BOOT_FLAG,
        header: MAGIC,
        kernel_alignment: ALIGNMENT,
        ..Default::default()
    });
    let mut page = boot_params { hdr, ..Default::default() };
    page.hdr.type_of_loader = LOADER_TYPE;
    // All three lie below 4 GiB, by the layout and by the checks of the loader.
    page.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    page.hdr.cmdline_size = placement.cmdline_len as u32;
    if let Some(initrd) = placement.initrd {
        page.hdr.ramdisk_image = initrd.start as u32;
        page.hdr.ramdisk_size = initrd.len as u32;
    }
    page.acpi_rsdp_addr = placement.rsdp;
    let map = layout::memory_map(placement.memory_bytes);
    let mut entries = page.e820_table;
    for (slot, range) in entries.iter_mut().zip(&map) {
        *slot = boot_e820_entry { addr: range.start, size: range.len, r#type: range.kind as u32 };
    }
    page.e820_table = entries;
    page.e820_entries = map.len() as u8;
    page
}

/// Maps the first GiB to itself with 2 MiB pages: kernel, zero page and command line lie there; Linux maps the rest.
fn write_page_tables(memory: &GuestMemory) -> Result<u64, BootError> {
    const PAGE: u64 = serio_hv::PAGE_SIZE;
    let (top, middle, directory) =
        (layout::PAGE_TABLES, layout::PAGE_TABLES + PAGE, layout::PAGE_TABLES + 2 * PAGE);
    let entries: Vec<u8> =
        (0..512u64).flat_map(|i| (i << 21 | PAGE_2MIB | PRESENT_WRITABLE).to_le_bytes()).collect();
    let failed = BootError::write("page tables");
    memory
        .write_obj(middle | PRESENT_WRITABLE, GuestAddress(top))
        .and_then(|()| memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(middle)))
        .and_then(|()| memory.write_slice(&entries, GuestAddress(directory)))
        .map_err(failed)?;
    Ok(top)
}
