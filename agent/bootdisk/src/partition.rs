//! Partition tables: GPT (UEFI 2.10 §5.3) from either of its copies, and MBR with extended partitions.
//!
//! Sectors have 512 bytes: what the VMs' disks have. A table that is damaged in both copies is an error; a disk without
//! a table is one file system, perhaps.

use crc::{CRC_32_ISO_HDLC, Crc};

use crate::disk::ReadAt;
use crate::disk::{Window, le32, le64};

const SECTOR: u64 = 512;
const GPT_MAGIC: &[u8; 8] = b"EFI PART";
/// UEFI asks for room for 128; more than these are no table that anyone makes.
const GPT_ENTRIES_MAX: u32 = 1024;
const GPT_ENTRY_BYTES: u32 = 128;
const GPT_ENTRY_BYTES_MAX: u32 = 1024;
/// Logical partitions that are followed.
const LOGICAL_MAX: u32 = 60;
const CRC32: Crc<u32> = Crc::<u32>::new(&CRC_32_ISO_HDLC);
/// C12A7328-F81F-11D2-BA4B-00A0C93EC93B as it lies on disk.
const ESP: [u8; 16] =
    [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b];

/// A place where a file system may be.
#[derive(Clone)]
pub(crate) struct Partition {
    /// As the kernel numbers it (`vda1`); 0: the whole disk.
    pub(crate) number: u32,
    /// It is marked as the firmware's.
    pub(crate) esp: bool,
    pub(crate) window: Window,
}

impl std::fmt::Display for Partition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.number {
            0 => f.write_str("the disk without partitions"),
            number => write!(f, "partition {number}"),
        }
    }
}

/// Both copies of a GPT are damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DamagedGpt;

/// The partitions in the order of their numbers; the whole disk when there is no table.
pub(crate) fn partitions(disk: &Window) -> Result<Vec<Partition>, DamagedGpt> {
    let protective = mbr_types(disk).is_some_and(|types| types.contains(&0xee));
    if let Some(found) = gpt(disk, 1).or_else(|| gpt(disk, (disk.size_bytes() / SECTOR).checked_sub(1)?)) {
        return Ok(found);
    }
    if protective {
        return Err(DamagedGpt);
    }
    let found = mbr(disk);
    if !found.is_empty() {
        return Ok(found);
    }
    Ok(vec![Partition { number: 0, esp: false, window: disk.clone() }])
}

/// A GPT whose header is in that sector, if it is whole.
fn gpt(disk: &Window, lba: u64) -> Option<Vec<Partition>> {
    let header: [u8; 512] = disk.peek(lba.checked_mul(SECTOR)?)?;
    let size = le32(&header, 12)? as usize;
    if header.get(..8)? != GPT_MAGIC || !(92..=512).contains(&size) || le64(&header, 24)? != lba {
        return None;
    }
    let mut summed = header;
    summed.get_mut(16..20)?.fill(0);
    if CRC32.checksum(summed.get(..size)?) != le32(&header, 16)? {
        return None;
    }
    let (at, count, entry_bytes) = (le64(&header, 72)?, le32(&header, 80)?, le32(&header, 84)?);
    let sane = count <= GPT_ENTRIES_MAX
        && (GPT_ENTRY_BYTES..=GPT_ENTRY_BYTES_MAX).contains(&entry_bytes)
        && entry_bytes.is_power_of_two();
    if !sane {
        return None;
    }
    let mut table = vec![0; (count as usize).checked_mul(entry_bytes as usize)?];
    disk.read_at(&mut table, at.checked_mul(SECTOR)?).ok()?;
    if CRC32.checksum(&table) != le32(&header, 88)? {
        return None;
    }
    let entries = table.chunks_exact(entry_bytes as usize).zip(1_u32..);
    Some(entries.filter_map(|(entry, number)| gpt_entry(disk, entry, number)).collect())
}

fn gpt_entry(disk: &Window, entry: &[u8], number: u32) -> Option<Partition> {
    let kind = entry.get(..16)?;
    if kind.iter().all(|byte| *byte == 0) {
        return None;
    }
    let (first, last) = (le64(entry, 32)?, le64(entry, 40)?);
    let sectors = last.checked_sub(first)?.checked_add(1)?;
    let window = disk.part(first.checked_mul(SECTOR)?, sectors.checked_mul(SECTOR)?)?;
    Some(Partition { number, esp: kind == ESP, window })
}

/// The four entries of a boot record: type, first sector, sectors.
fn mbr_entries(disk: &Window, lba: u64) -> Option<[(u8, u32, u32); 4]> {
    let sector: [u8; 512] = disk.peek(lba.checked_mul(SECTOR)?)?;
    if sector.get(510..512)? != [0x55, 0xaa] {
        return None;
    }
    let mut entries = [(0, 0, 0); 4];
    for (raw, entry) in sector.get(446..510)?.chunks_exact(16).zip(&mut entries) {
        // Anything but "boots" and "does not" is code, not a table.
        if !matches!(raw.first()?, 0 | 0x80) {
            return None;
        }
        *entry = (*raw.get(4)?, le32(raw, 8)?, le32(raw, 12)?);
    }
    Some(entries)
}

fn mbr_types(disk: &Window) -> Option<[u8; 4]> {
    Some(mbr_entries(disk, 0)?.map(|(kind, _, _)| kind))
}

const fn is_extended(kind: u8) -> bool {
    matches!(kind, 0x05 | 0x0f | 0x85)
}

fn sectors(disk: &Window, first: u64, count: u32) -> Option<Window> {
    disk.part(first.checked_mul(SECTOR)?, u64::from(count).checked_mul(SECTOR)?)
}

fn mbr(disk: &Window) -> Vec<Partition> {
    let mut found = Vec::new();
    let Some(entries) = mbr_entries(disk, 0) else { return found };
    for ((kind, first, count), number) in entries.into_iter().zip(1..) {
        if kind == 0 || first == 0 || is_extended(kind) {
            continue;
        }
        if let Some(window) = sectors(disk, first.into(), count) {
            found.push(Partition { number, esp: kind == 0xef, window });
        }
    }
    if let Some((_, base, _)) = entries.into_iter().find(|(kind, first, _)| is_extended(*kind) && *first > 0)
    {
        logical(disk, base.into(), &mut found);
    }
    found
}

/// The chain of records in an extended partition; numbers go on from 5.
fn logical(disk: &Window, base: u64, found: &mut Vec<Partition>) {
    let mut at = base;
    for number in 5..5 + LOGICAL_MAX {
        let Some([(kind, first, count), (next_kind, next, _), ..]) = mbr_entries(disk, at) else { return };
        let start = at.checked_add(first.into());
        if let Some(window) = start.filter(|_| kind != 0).and_then(|start| sectors(disk, start, count)) {
            found.push(Partition { number, esp: kind == 0xef, window });
        }
        match base.checked_add(next.into()) {
            Some(next) if is_extended(next_kind) && next > at => at = next,
            _ => return,
        }
    }
}
