//! vmdk, written: monolithicSparse, grains of 64 KiB, for a disk that comes once from its start.
//!
//! ```text
//! header │ description │ grain directory │ grain tables … │ grains as they come …
//! ```
//! Tables lie at fixed places and are holes where nothing is written. The header is written last, after all else is
//! synced. Sector numbers have 32 bits, so the file is bounded ([`DATA_BYTES_MAX`]).

use std::{fs::File, io, os::unix::fs::FileExt};

use super::vmdk::SECTOR;

/// Bytes of a grain.
pub const GRAIN: u64 = 64 << 10;
/// Entries of a grain table.
const ENTRIES: u64 = 512;
const TABLE_BYTES: u64 = ENTRIES * 4;
/// The description, and where it lies.
const DESCRIPTION: (u64, u64) = (SECTOR, 20 * SECTOR);
/// The largest file that has a number for each of its sectors.
const FILE_BYTES_MAX: u64 = 1 << 41;
/// The largest disk whose tables and data surely fit.
pub const DATA_BYTES_MAX: u64 = FILE_BYTES_MAX - (FILE_BYTES_MAX >> 10);

/// See the head of this file.
#[derive(Debug)]
pub struct Writer<'a> {
    file: &'a File,
    /// Bytes of the disk, whole sectors.
    size: u64,
    tables: u64,
    directory_at: u64,
    tables_at: u64,
    data_at: u64,
    /// The grain table in use, and its entries.
    table: Option<(u64, Vec<u32>)>,
    next: u64,
}

impl<'a> Writer<'a> {
    /// Begins an image of `size` bytes in an empty file.
    pub fn new(file: &'a File, size: u64) -> io::Result<Writer<'a>> {
        if size > DATA_BYTES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "a vmdk of this kind holds not quite 2 TiB: export as raw or qcow2",
            ));
        }
        let size = size.next_multiple_of(SECTOR);
        let tables = size.div_ceil(GRAIN * ENTRIES);
        let directory_at = DESCRIPTION.0 + DESCRIPTION.1;
        let tables_at = directory_at + (tables * 4).next_multiple_of(SECTOR);
        let data_at = (tables_at + tables * TABLE_BYTES).next_multiple_of(GRAIN);
        Ok(Writer { file, size, tables, directory_at, tables_at, data_at, table: None, next: data_at })
    }

    /// Puts a grain; the last one of a disk may be shorter. Offsets only grow.
    pub fn put(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let number = offset / (GRAIN * ENTRIES);
        if self.table.as_ref().is_none_or(|(known, _)| *known != number) {
            self.end_table()?;
            self.table = Some((number, vec![0; ENTRIES as usize]));
        }
        let at = self.next;
        self.next += GRAIN;
        self.file.write_all_at(data, at)?;
        if let Some((_, table)) = &mut self.table
            && let Some(entry) = table.get_mut((offset / GRAIN % ENTRIES) as usize)
        {
            *entry = sector(at);
        }
        Ok(())
    }

    fn end_table(&mut self) -> io::Result<()> {
        let Some((number, table)) = self.table.take() else { return Ok(()) };
        self.file.write_all_at(&le32(&table), self.tables_at + number * TABLE_BYTES)
    }

    /// Writes what is left, syncs, and only then the header. Gives back the file's length.
    pub fn finish(mut self) -> io::Result<u64> {
        self.end_table()?;
        let entries: Vec<u32> = (0..self.tables).map(|i| sector(self.tables_at + i * TABLE_BYTES)).collect();
        self.file.write_all_at(&le32(&entries), self.directory_at)?;
        self.file.write_all_at(self.description().as_bytes(), DESCRIPTION.0)?;
        self.file.set_len(self.next)?;
        self.file.sync_all()?;
        self.file.write_all_at(&self.header(), 0)?;
        self.file.sync_all()?;
        Ok(self.next)
    }

    fn description(&self) -> String {
        let sectors = self.size / SECTOR;
        let cylinders = (sectors / (16 * 63)).min(16383);
        format!(
            "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\n\n\
             # Extent description\nRW {sectors} SPARSE \"disk.vmdk\"\n\n\
             # The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"4\"\nddb.geometry.cylinders = \"{cylinders}\"\n\
             ddb.geometry.heads = \"16\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"ide\"\n"
        )
    }

    fn header(&self) -> Vec<u8> {
        let mut out = b"KDMV".to_vec();
        out.extend(1_u32.to_le_bytes());
        // Newlines are there to be checked; no second directory.
        out.extend(1_u32.to_le_bytes());
        for sectors in [self.size, GRAIN, DESCRIPTION.0, DESCRIPTION.1].map(|bytes| bytes / SECTOR) {
            out.extend(sectors.to_le_bytes());
        }
        out.extend((ENTRIES as u32).to_le_bytes());
        for sectors in [0, self.directory_at, self.data_at].map(|bytes| bytes / SECTOR) {
            out.extend(sectors.to_le_bytes());
        }
        // Closed in order; the newlines; no compression.
        out.extend(b"\0\n \r\n\0\0");
        out.resize(SECTOR as usize, 0);
        out
    }
}

fn sector(at: u64) -> u32 {
    // The file is bounded when it is begun.
    (at / SECTOR) as u32
}

fn le32(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_le_bytes()).collect()
}
