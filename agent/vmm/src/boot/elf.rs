//! An ELF kernel: vmlinux, or a freestanding program. Loads its segments, finds its PVH entry.
//!
//! Only what booting needs of the format (ELF-64, little-endian, x86-64, PT_LOAD and PT_NOTE). Counts and sizes of
//! the file are bounded here, so that a hostile file costs no more than a small one.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serio_hv::GuestMemory;

use super::{BootError, Placed, check_place, copy};

const MACHINE_X86_64: u16 = 62;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const PROGRAM_HEADER_BYTES: usize = 56;
const PROGRAM_HEADERS_MAX: usize = 64;
const NOTES_BYTES_MAX: u64 = 64 * 1024;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// XEN_ELFNOTE_PHYS32_ENTRY: the 32-bit entry of the PVH boot ABI.
const NOTE_PVH_ENTRY: u32 = 18;

/// A loaded ELF.
#[derive(Debug, Clone, Copy)]
pub(super) struct Image {
    /// The ELF's own entry: for vmlinux the 64-bit one.
    pub(super) entry: u64,
    /// The 32-bit entry, when a note names one.
    pub(super) pvh_entry: Option<u64>,
    /// First address behind all segments.
    pub(super) end: u64,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// What is used of a program header.
struct Segment {
    kind: u32,
    offset: u64,
    physical: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

impl Segment {
    fn parse(header: &[u8]) -> Option<Segment> {
        Some(Segment {
            kind: u32_at(header, 0)?,
            offset: u64_at(header, 8)?,
            physical: u64_at(header, 24)?,
            file_bytes: u64_at(header, 32)?,
            memory_bytes: u64_at(header, 40)?,
        })
    }
}

/// Loads the file, whose first 64 bytes are `header`, to the physical addresses that it names.
pub(super) fn load(
    memory: &GuestMemory,
    memory_bytes: u64,
    file: &File,
    header: &[u8; 64],
) -> Result<Image, BootError> {
    let field = |what| BootError::Damaged { what };
    if header.get(4) != Some(&CLASS_64)
        || header.get(5) != Some(&LITTLE_ENDIAN)
        || u16_at(header, 18) != Some(MACHINE_X86_64)
    {
        return Err(BootError::UnknownFormat);
    }
    let entry = u64_at(header, 24).ok_or(field("it has no ELF header"))?;
    let table = u64_at(header, 32).ok_or(field("it has no ELF header"))?;
    let entry_bytes = usize::from(u16_at(header, 54).unwrap_or(0));
    let count = usize::from(u16_at(header, 56).unwrap_or(0));
    if entry_bytes != PROGRAM_HEADER_BYTES || count == 0 || count > PROGRAM_HEADERS_MAX {
        return Err(field("its ELF program headers are missing, too many, or of an unknown size"));
    }
    let mut headers = vec![0u8; count * PROGRAM_HEADER_BYTES];
    file.read_exact_at(&mut headers, table).map_err(BootError::kernel)?;

    let mut image = Image { entry, pvh_entry: None, end: 0 };
    for header in headers.chunks_exact(PROGRAM_HEADER_BYTES) {
        let segment = Segment::parse(header).ok_or(field("a program header is short"))?;
        match segment.kind {
            PT_LOAD if segment.memory_bytes > 0 => {
                let end = load_segment(memory, memory_bytes, file, &segment)?;
                image.end = image.end.max(end);
            }
            PT_NOTE if image.pvh_entry.is_none() => image.pvh_entry = pvh_note(file, &segment)?,
            _ => {}
        }
    }
    if image.end == 0 {
        return Err(field("it has nothing to load"));
    }
    Ok(image)
}

fn load_segment(
    memory: &GuestMemory,
    memory_bytes: u64,
    file: &File,
    segment: &Segment,
) -> Result<u64, BootError> {
    if segment.file_bytes > segment.memory_bytes {
        return Err(BootError::Damaged { what: "a segment is larger in the file than in memory" });
    }
    let end = check_place(memory_bytes, segment.physical, segment.memory_bytes)?;
    let placed = Placed { start: segment.physical, len: segment.file_bytes };
    copy(memory, file, segment.offset, placed).map_err(BootError::kernel)?;
    Ok(end)
}

/// Looks through one note segment for the PVH entry.
fn pvh_note(file: &File, segment: &Segment) -> Result<Option<u64>, BootError> {
    let mut notes = vec![0u8; usize::try_from(segment.file_bytes.min(NOTES_BYTES_MAX)).unwrap_or(0)];
    file.read_exact_at(&mut notes, segment.offset).map_err(BootError::kernel)?;
    Ok(find_pvh_entry(&notes))
}

/// Notes are (name length, descriptor length, type, name, descriptor), each part padded to four bytes.
pub(super) fn find_pvh_entry(notes: &[u8]) -> Option<u64> {
    let mut at = 0usize;
    loop {
        let name_len = usize::try_from(u32_at(notes, at)?).ok()?;
        let value_len = usize::try_from(u32_at(notes, at.checked_add(4)?)?).ok()?;
        let kind = u32_at(notes, at.checked_add(8)?)?;
        let name_at = at.checked_add(12)?;
        let value_at = name_at.checked_add(name_len.checked_next_multiple_of(4)?)?;
        let name = notes.get(name_at..name_at.checked_add(name_len)?)?;
        if kind == NOTE_PVH_ENTRY && name == b"Xen\0" && value_len >= 4 {
            // Four bytes or eight; the entry is below 4 GiB either way.
            return Some(u64::from(u32_at(notes, value_at)?));
        }
        at = value_at.checked_add(value_len.checked_next_multiple_of(4)?)?;
    }
}
