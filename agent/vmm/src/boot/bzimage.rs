//! A bzImage: Linux' compressed kernel with its setup header (Documentation/arch/x86/boot.rst).
//!
//! The real-mode part is left out: the 64-bit entry, 0x200 behind the start of the protected-mode part, needs only
//! the setup header, copied into the zero page.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use linux_loader::loader::bootparam::setup_header;
use serio_hv::GuestMemory;
use serio_hv::vm_memory::ByteValued;

use super::{BootError, Placed, check_place, copy};
use crate::layout;

const HEADER_AT: u64 = 0x1f1;
/// "HdrS"
const MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// The first protocol with `init_size` and `pref_address` is 2.10, with `xloadflags` 2.12.
const VERSION_MIN: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
/// XLF_KERNEL_64: there is a 64-bit entry at 0x200.
const ENTRY_64: u16 = 1;
const ENTRY_64_OFFSET: u64 = 0x200;

/// A loaded bzImage.
#[derive(Clone, Copy)]
pub(super) struct Image {
    /// The file's header, to be completed by the loader.
    pub(super) header: setup_header,
    /// The 64-bit entry.
    pub(super) entry: u64,
    /// First address behind the kernel and the memory it unpacks itself in.
    pub(super) end: u64,
    /// The initrd must end at or below this.
    pub(super) initrd_end_max: u64,
    /// Bytes of command line, without the end mark.
    pub(super) cmdline_max: u64,
}

fn read_header(file: &File) -> Result<Option<setup_header>, BootError> {
    let mut header = setup_header::default();
    match file.read_exact_at(header.as_mut_slice(), HEADER_AT) {
        Ok(()) => Ok(Some(header)),
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => Ok(None),
        Err(source) => Err(BootError::Read { field: "kernel", source }),
    }
}

/// Whether the file carries Linux' setup header.
pub(super) fn is_bzimage(file: &File) -> Result<bool, BootError> {
    Ok(read_header(file)?.is_some_and(|header| header.header == MAGIC && header.boot_flag == BOOT_FLAG))
}

/// Loads the file where it prefers to be, or at the lowest aligned place if memory is small.
pub(super) fn load(memory: &GuestMemory, memory_bytes: u64, file: &File) -> Result<Image, BootError> {
    let header = read_header(file)?.ok_or(BootError::UnknownFormat)?;
    if header.version < VERSION_MIN
        || header.loadflags & LOADED_HIGH == 0
        || header.xloadflags & ENTRY_64 == 0
    {
        return Err(BootError::NotLong);
    }
    let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    let offset = (setup_sectors + 1) * 512;
    let file_bytes = (&mut &*file).seek(SeekFrom::End(0)).map_err(BootError::kernel)?;
    let len = file_bytes
        .checked_sub(offset)
        .filter(|len| *len > ENTRY_64_OFFSET)
        .ok_or(BootError::Damaged { what: "it ends before its headers say" })?;
    let needed = u64::from(header.init_size).max(len);
    let start = place(&header, memory_bytes, needed)?;
    let end = check_place(memory_bytes, start, needed)?;
    copy(memory, file, offset, Placed { start, len }).map_err(BootError::kernel)?;
    Ok(Image {
        header,
        entry: start + ENTRY_64_OFFSET,
        end,
        initrd_end_max: u64::from(header.initrd_addr_max).saturating_add(1),
        cmdline_max: u64::from(header.cmdline_size),
    })
}

fn place(header: &setup_header, memory_bytes: u64, needed: u64) -> Result<u64, BootError> {
    let preferred = header.pref_address;
    if check_place(memory_bytes, preferred, needed).is_ok() || header.relocatable_kernel == 0 {
        return Ok(preferred);
    }
    let alignment = u64::from(header.kernel_alignment).max(layout::HIGH_MEMORY);
    layout::HIGH_MEMORY
        .checked_next_multiple_of(alignment)
        .ok_or(BootError::Damaged { what: "its alignment is impossible" })
}
