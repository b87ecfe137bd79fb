//! vmdk, read: hosted sparse extents in one file, as `monolithicSparse` and `streamOptimized` have them. The words are those
//! of VMware's "Virtual Disk Format 5.0".
//!
//! ```text
//! offset in the disk ──► grain directory[offset / (512 · grain)] ──► grain table[…] ──► grain in the file | zeros
//! ```
//! Never read: disks over a parent. [`vmdk_parts`](super::vmdk_parts) has disks over several files. Invariant: [`Vmdk::open`] has looked at all tables.

use super::{
    Format, FormatError, Image, Run, printable,
    source::{Source, field, le32},
};

/// `KDMV`, as it stands in the file.
const MAGIC: u32 = 0x564d_444b;
pub(super) const SECTOR: u64 = 512;
/// The directory of a disk that a tool would make: 4 MiB of it map 2 TiB.
const DIRECTORY_BYTES_MAX: u64 = 16 << 20;
/// Largest grain, sectors: 2 MiB.
const GRAIN_MAX: u64 = 4096;
/// The descriptor is some lines of text.
const DESCRIPTOR_BYTES_MAX: u64 = 64 << 10;
/// "The grain directory is at the end": the header is repeated there.
const AT_END: u64 = u64::MAX;

const ZERO_GRAINS: u32 = 1 << 2;
const COMPRESSED: u32 = 1 << 16;

pub(super) fn malformed<T>(why: impl Into<String>) -> Result<T, FormatError> {
    Err(FormatError::Malformed { format: Format::Vmdk, why: why.into() })
}

pub(super) fn unsupported<T>(why: impl Into<String>) -> Result<T, FormatError> {
    Err(FormatError::Unsupported { format: Format::Vmdk, why: why.into() })
}

/// The sparse header; lengths in sectors.
#[derive(Debug, Clone)]
struct Header {
    flags: u32,
    capacity: u64,
    grain: u64,
    descriptor: (u64, u64),
    entries: u64,
    directory: u64,
}

impl Header {
    fn parse(source: &Source, at: u64) -> Result<Header, FormatError> {
        let mut bytes = [0; 80];
        source.read_padded_at(&mut bytes, at)?;
        let u32_at = |at| u32::from_le_bytes(field(&bytes, at));
        let u64_at = |at| u64::from_le_bytes(field(&bytes, at));
        if u32_at(0) != MAGIC {
            return malformed("it does not start with KDMV");
        }
        if !(1..=3).contains(&u32_at(4)) {
            return unsupported(format!("version {} is not known: 1 to 3 are", u32_at(4)));
        }
        let newlines = bytes.get(73..77).unwrap_or_default();
        if u32_at(8) & 1 != 0 && newlines != b"\n \r\n" {
            return malformed("it was damaged by a transfer as text");
        }
        let header = Header {
            flags: u32_at(8),
            capacity: u64_at(12),
            grain: u64_at(20),
            descriptor: (u64_at(28), u64_at(36)),
            entries: u32_at(44).into(),
            directory: u64_at(56),
        };
        let compression = u16::from_le_bytes(field(&bytes, 77));
        if compression > 1 || (header.flags & COMPRESSED != 0) != (compression == 1) {
            return unsupported(format!("compression {compression}: none and deflate are known"));
        }
        if !header.grain.is_power_of_two() || header.grain > GRAIN_MAX {
            return malformed(format!("grains of {} sectors", header.grain));
        }
        if header.entries == 0 || header.entries > 512 {
            return malformed(format!("grain tables of {} entries", header.entries));
        }
        Ok(header)
    }

    fn grain_bytes(&self) -> u64 {
        self.grain * SECTOR
    }

    /// Bytes of the disk that one grain table maps.
    fn span(&self) -> u64 {
        self.grain_bytes() * self.entries
    }

    fn is_packed(&self) -> bool {
        self.flags & COMPRESSED != 0
    }
}

/// An opened image. See the head of this file.
#[derive(Debug)]
pub struct Vmdk {
    source: Source,
    header: Header,
    size: u64,
    directory: Vec<u32>,
    /// The grain table in use: its place in the directory, and its entries.
    table: (usize, Vec<u32>),
    /// The grain that was decompressed last: its number and bytes.
    unpacked: (u64, Vec<u8>),
}

enum Grain {
    Zeros,
    /// At this byte of the file.
    At(u64),
}

impl Vmdk {
    /// Opens it and validates all its metadata.
    pub fn open(source: Source, size_max: u64) -> Result<Vmdk, FormatError> {
        let first = Header::parse(&source, 0)?;
        check_description(&source, &first)?;
        Vmdk::with_header(source, first, size_max)
    }

    /// The same for one of several files, which has no description of its own.
    pub(super) fn open_extent(source: Source, size_max: u64) -> Result<Vmdk, FormatError> {
        let first = Header::parse(&source, 0)?;
        Vmdk::with_header(source, first, size_max)
    }

    fn with_header(source: Source, first: Header, size_max: u64) -> Result<Vmdk, FormatError> {
        let mut header = first.clone();
        if header.directory == AT_END {
            let Some(footer) = source.len().checked_sub(1024) else {
                return malformed("its footer is missing");
            };
            header = Header::parse(&source, footer)?;
            let same = |h: &Header| (h.flags, h.capacity, h.grain, h.entries);
            if header.directory == AT_END || same(&header) != same(&first) {
                return malformed("its footer says something else than its header");
            }
        }
        let size = match header.capacity.checked_mul(SECTOR) {
            Some(size) if size > 0 && size <= size_max => size,
            size => return Err(FormatError::TooLarge { size: size.unwrap_or(u64::MAX), max: size_max }),
        };
        let bytes = size.div_ceil(header.span()).saturating_mul(4);
        let at = header.directory.saturating_mul(SECTOR);
        if at == 0 || bytes > DIRECTORY_BYTES_MAX || !source.holds(at, bytes) {
            return malformed(format!(
                "its grain directory of {bytes} bytes at {at:#x} lies outside the file"
            ));
        }
        let directory = le32(&source.table(at, bytes as usize)?);
        let image = Vmdk {
            source,
            header,
            size,
            directory,
            table: (usize::MAX, Vec::new()),
            unpacked: (u64::MAX, Vec::new()),
        };
        image.check()?;
        Ok(image)
    }

    /// All tables: each lies in the file and is named once, and the grains are no more than the file can hold.
    fn check(&self) -> Result<(), FormatError> {
        let mut tables: Vec<u32> = self.directory.iter().copied().filter(|t| *t != 0).collect();
        tables.sort_unstable();
        // A table and the next one must not overlap, else one could be named many times.
        let sectors = (self.header.entries * 4).div_ceil(SECTOR);
        if tables.windows(2).any(|pair| matches!(pair, [a, b] if u64::from(b - a) < sectors)) {
            return malformed("two grain tables overlap");
        }
        let (len, grain) = (self.source.len(), self.header.grain_bytes());
        let mut used: u64 = 0;
        for table in tables {
            for entry in self.read_table(table)? {
                let Grain::At(at) = self.grain(entry) else { continue };
                if at >= len {
                    return malformed(format!("a grain at {at:#x} lies outside the file"));
                }
                // A compressed one has its 12 bytes of head at least.
                used = used.saturating_add(if self.header.is_packed() { 12 } else { grain });
            }
        }
        if used > len.saturating_add(grain) {
            return malformed("its grains overlap");
        }
        Ok(())
    }

    fn read_table(&self, sector: u32) -> Result<Vec<u32>, FormatError> {
        let (at, bytes) = (u64::from(sector) * SECTOR, self.header.entries * 4);
        if !self.source.holds(at, bytes) {
            return malformed(format!("a grain table at {at:#x} lies outside the file"));
        }
        Ok(le32(&self.source.table(at, bytes as usize)?))
    }

    fn grain(&self, entry: u32) -> Grain {
        match entry {
            0 => Grain::Zeros,
            1 if self.header.flags & ZERO_GRAINS != 0 => Grain::Zeros,
            sector => Grain::At(u64::from(sector) * SECTOR),
        }
    }

    /// Where the grain at `offset` is, and how many bytes of it are left; without a table more.
    fn place(&mut self, offset: u64) -> Result<(Grain, u64), FormatError> {
        let (span, grain) = (self.header.span(), self.header.grain_bytes());
        let left = self.size.saturating_sub(offset);
        let index = (offset / span) as usize;
        let sector = self.directory.get(index).copied().unwrap_or_default();
        if sector == 0 {
            return Ok((Grain::Zeros, span.saturating_sub(offset % span).min(left)));
        }
        if self.table.0 != index {
            self.table = (index, self.read_table(sector)?);
        }
        let entry = self.table.1.get((offset % span / grain) as usize).copied().unwrap_or_default();
        Ok((self.grain(entry), grain.saturating_sub(offset % grain).min(left)))
    }

    fn unpack(&mut self, number: u64, at: u64) -> Result<&[u8], FormatError> {
        if self.unpacked.0 != number {
            let damaged = || malformed(format!("the compressed grain at {at:#x} cannot be decompressed"));
            let mut head = [0; 12];
            self.source.read_padded_at(&mut head, at)?;
            let (lba, bytes) = (u64::from_le_bytes(field(&head, 0)), u32::from_le_bytes(field(&head, 8)));
            let bytes = u64::from(bytes);
            let fits =
                bytes > 0 && bytes <= self.header.grain_bytes() * 2 && self.source.holds(at + 12, bytes);
            if !fits || lba != number * self.header.grain {
                return damaged();
            }
            let packed = self.source.table(at + 12, bytes as usize)?;
            let max = self.header.grain_bytes() as usize;
            let Ok(mut out) = miniz_oxide::inflate::decompress_to_vec_zlib_with_limit(&packed, max) else {
                return damaged();
            };
            // The last grain of a disk may be cut short.
            out.resize(max, 0);
            self.unpacked = (number, out);
        }
        Ok(&self.unpacked.1)
    }
}

/// The text in the file: one extent, no parent.
fn check_description(source: &Source, header: &Header) -> Result<(), FormatError> {
    let (at, bytes) =
        (header.descriptor.0.saturating_mul(SECTOR), header.descriptor.1.saturating_mul(SECTOR));
    let part = "it is one of the files of a disk: give the description that names them all, and allow each by its name";
    if at == 0 || bytes == 0 {
        return unsupported(part);
    }
    let description = Description::read(source, at, bytes)?;
    description.check_no_parent()?;
    let extents = description.extents().count();
    match description.value("createType").as_deref() {
        Some("monolithicSparse" | "streamOptimized") if extents <= 1 => Ok(()),
        // Room for one, as some tools leave it.
        None if extents == 0 => unsupported(part),
        kind => unsupported(format!(
            "it is a `{}` of {extents} files: convert it first, `qemu-img convert -O vmdk`",
            printable(kind.unwrap_or_default())
        )),
    }
}

/// The lines of text that say what a disk is made of.
#[derive(Debug)]
pub(super) struct Description(String);

impl Description {
    /// Reads it from a place in a file.
    pub(super) fn read(source: &Source, at: u64, bytes: u64) -> Result<Description, FormatError> {
        if bytes > DESCRIPTOR_BYTES_MAX || !source.holds(at, bytes) {
            return malformed(format!("its description of {bytes} bytes at {at:#x} lies outside the file"));
        }
        Ok(Description(String::from_utf8_lossy(&source.table(at, bytes as usize)?).into_owned()))
    }

    fn lines(&self) -> impl Iterator<Item = &str> {
        self.0.split('\0').next().unwrap_or_default().lines().map(str::trim)
    }

    /// What stands behind `key=`.
    pub(super) fn value(&self, key: &str) -> Option<String> {
        self.lines().find_map(|line| {
            let (name, value) = line.split_once('=')?;
            name.trim().eq_ignore_ascii_case(key).then(|| value.trim().trim_matches('"').to_owned())
        })
    }

    /// The lines that name an extent.
    pub(super) fn extents(&self) -> impl Iterator<Item = String> {
        let is_extent = |line: &&str| ["RW ", "RDONLY ", "NOACCESS "].iter().any(|k| line.starts_with(k));
        self.lines().filter(is_extent).map(ToOwned::to_owned)
    }

    /// A disk of its own, not the difference to another one.
    pub(super) fn check_no_parent(&self) -> Result<(), FormatError> {
        if self.value("parentCID").is_none_or(|id| id.eq_ignore_ascii_case("ffffffff")) {
            return Ok(());
        }
        let parent = self.value("parentFileNameHint").unwrap_or_default();
        unsupported(format!(
            "it leans on the file `{}`: flatten it first, `qemu-img convert`",
            printable(&parent)
        ))
    }
}

impl Image for Vmdk {
    fn size_bytes(&self) -> u64 {
        self.size
    }

    fn run(&mut self, offset: u64) -> Result<Run, FormatError> {
        let (grain, len) = self.place(offset)?;
        Ok(Run { len: len.max(1), zero: matches!(grain, Grain::Zeros) })
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), FormatError> {
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let (grain, len) = self.place(at)?;
            let n = usize::try_from(len.max(1)).unwrap_or(usize::MAX).min(rest.len());
            let (part, more) = std::mem::take(&mut rest).split_at_mut(n);
            let within = at % self.header.grain_bytes();
            match grain {
                Grain::Zeros => part.fill(0),
                Grain::At(from) if self.header.is_packed() => {
                    let bytes = self.unpack(at / self.header.grain_bytes(), from)?;
                    part.copy_from_slice(
                        bytes.get(within as usize..within as usize + n).unwrap_or(&vec![0; n]),
                    );
                }
                Grain::At(from) => self.source.read_padded_at(part, from.saturating_add(within))?,
            }
            at = at.saturating_add(n as u64);
            rest = more;
        }
        Ok(())
    }
}
