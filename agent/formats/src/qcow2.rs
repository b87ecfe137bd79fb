//! qcow2, read: versions 2 and 3, compressed clusters (deflate, zstd), extended L2 entries, allowed backing files. What
//! the fields mean stands in `docs/interop/qcow2.txt` of QEMU; its words are used here.
//!
//! ```text
//! offset in the disk ──► L1[offset / (cluster · entries)] ──► L2[…] ──► cluster in the file | zeros | backing file
//! ```
//! Never read: internal snapshots other than the active state, external data files, encrypted images, bitmaps.
//! Invariant: `qcow2_check` has looked at all tables, so an entry that is met later points into the file.

use super::{
    Backings, Format, FormatError, Image, Run, printable, qcow2_check,
    source::{Source, be64, field},
};

/// `QFI\xfb`.
pub(super) const MAGIC: u32 = 0x5146_49fb;
/// QEMU's own bound of the L1 table.
const L1_BYTES_MAX: u64 = 32 << 20;
/// QEMU's own bound of the refcount table.
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
/// The longest name of a backing file.
const NAME_BYTES_MAX: u32 = 1023;
/// Header extension: the backing file's format.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Bits of an offset in an L1 or L2 entry.
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
pub(super) const COPIED: u64 = 1 << 63;
/// Whole cluster reads as zeros (version 3).
const ZERO: u64 = 1;
/// Subclusters of a cluster with extended L2 entries.
const SUBCLUSTERS: u64 = 32;

/// Incompatible features.
pub(super) const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

pub(super) fn malformed<T>(why: impl Into<String>) -> Result<T, FormatError> {
    Err(FormatError::Malformed { format: Format::Qcow2, why: why.into() })
}

fn unsupported<T>(why: impl Into<String>) -> Result<T, FormatError> {
    Err(FormatError::Unsupported { format: Format::Qcow2, why: why.into() })
}

/// The header, checked by itself and against the file's length.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) cluster_bits: u32,
    pub(super) size: u64,
    pub(super) l1_offset: u64,
    /// Entries that the disk needs.
    pub(super) l1_entries: u64,
    pub(super) refcount_offset: u64,
    pub(super) refcount_bytes: u64,
    pub(super) refcount_order: u32,
    pub(super) incompatible: u64,
    zstd: bool,
    backing: Option<(String, Option<String>)>,
}

impl Header {
    pub(super) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    pub(super) fn extended(&self) -> bool {
        self.incompatible & EXTENDED_L2 != 0
    }

    pub(super) fn l2_entry_bytes(&self) -> u64 {
        if self.extended() { 16 } else { 8 }
    }

    fn l2_entries(&self) -> u64 {
        self.cluster() / self.l2_entry_bytes()
    }

    /// Bytes of the disk that one L2 table maps.
    fn l2_span(&self) -> u64 {
        self.cluster() * self.l2_entries()
    }

    fn parse(source: &Source, size_max: u64) -> Result<Header, FormatError> {
        let mut bytes = [0; 112];
        source.read_padded_at(&mut bytes, 0)?;
        let u32_at = |at| u32::from_be_bytes(field(&bytes, at));
        let u64_at = |at| u64::from_be_bytes(field(&bytes, at));
        if u32_at(0) != MAGIC {
            return malformed("it does not start with QFI\\xfb");
        }
        let version = u32_at(4);
        let (incompatible, refcount_order, header_bytes) = match version {
            2 => (0, 4, 72),
            3 => (u64_at(72), u32_at(96), u32_at(100)),
            _ => return unsupported(format!("version {version} is not known: 2 and 3 are")),
        };
        let (cluster_bits, size) = (u32_at(20), u64_at(24));
        if !(9..=21).contains(&cluster_bits) {
            return malformed(format!("clusters of 2^{cluster_bits} bytes: 2^9 to 2^21 are possible"));
        }
        if version == 3 && !(104..=1 << cluster_bits).contains(&header_bytes) {
            return malformed(format!("a header of {header_bytes} bytes"));
        }
        if size == 0 || size > size_max {
            return Err(FormatError::TooLarge { size, max: size_max });
        }
        check_features(incompatible, u32_at(32))?;
        if incompatible & EXTENDED_L2 != 0 && cluster_bits < 14 {
            return malformed("extended L2 entries need clusters of 16 KiB at least");
        }
        if refcount_order > 6 {
            return malformed(format!("refcounts of 2^{refcount_order} bits"));
        }
        let kind = if header_bytes > 104 { field::<1>(&bytes, 104)[0] } else { 0 };
        if kind > 1 || (kind == 1) != (incompatible & COMPRESSION_TYPE != 0) {
            return malformed(format!("compression type {kind}, which its features do not announce"));
        }
        let mut header = Header {
            version,
            cluster_bits,
            size,
            l1_offset: u64_at(40),
            l1_entries: 0,
            refcount_offset: u64_at(48),
            refcount_bytes: u64::from(u32_at(56)) << cluster_bits,
            refcount_order,
            incompatible,
            zstd: kind == 1,
            backing: None,
        };
        header.check_tables(source, u32_at(36).into())?;
        let (name_offset, name_bytes) = (u64_at(8), u32_at(16));
        if name_offset != 0 {
            let name = backing_name(source, &header, name_offset, name_bytes)?;
            header.backing = Some((name, backing_format(source, &header, header_bytes.into())?));
        }
        Ok(header)
    }

    /// Places and sizes of the tables that the header names.
    fn check_tables(&mut self, source: &Source, l1_entries: u64) -> Result<(), FormatError> {
        self.l1_entries = self.size.div_ceil(self.l2_span());
        let l1_bytes = l1_entries.saturating_mul(8);
        if l1_entries < self.l1_entries || l1_bytes > L1_BYTES_MAX {
            return malformed(format!("an L1 table of {l1_entries} entries for {} bytes", self.size));
        }
        for (what, offset, bytes, max) in [
            ("L1 table", self.l1_offset, l1_bytes, L1_BYTES_MAX),
            ("refcount table", self.refcount_offset, self.refcount_bytes, REFCOUNT_TABLE_BYTES_MAX),
        ] {
            if offset == 0 || !offset.is_multiple_of(self.cluster()) || bytes == 0 || bytes > max {
                return malformed(format!("its {what} has {bytes} bytes at {offset:#x}"));
            }
            if !source.holds(offset, bytes) {
                return malformed(format!("its {what} at {offset:#x} lies outside the file"));
            }
        }
        Ok(())
    }
}

fn check_features(incompatible: u64, crypt: u32) -> Result<(), FormatError> {
    if crypt != 0 {
        return unsupported("it is encrypted: convert it to a plain image first, with qemu-img and its key");
    }
    if incompatible & CORRUPT != 0 {
        return malformed("it is marked as corrupt: repair it first, `qemu-img check -r all`");
    }
    if incompatible & EXTERNAL_DATA != 0 {
        return unsupported("its data lie in another file: convert it first, `qemu-img convert -O qcow2`");
    }
    match incompatible & !(DIRTY | COMPRESSION_TYPE | EXTENDED_L2) {
        0 => Ok(()),
        unknown => unsupported(format!("it uses unknown features {unknown:#x}")),
    }
}

fn backing_name(source: &Source, header: &Header, offset: u64, bytes: u32) -> Result<String, FormatError> {
    let inside = offset.checked_add(bytes.into()).is_some_and(|end| end <= header.cluster());
    if bytes == 0 || bytes > NAME_BYTES_MAX || !inside || !source.holds(offset, bytes.into()) {
        return malformed(format!("the name of its backing file has {bytes} bytes at {offset:#x}"));
    }
    let name = source.table(offset, bytes as usize)?;
    match String::from_utf8(name) {
        Ok(name) if !name.contains('\0') => Ok(name),
        _ => malformed("the name of its backing file is not text"),
    }
}

/// The header extension that names the backing file's format.
fn backing_format(source: &Source, header: &Header, start: u64) -> Result<Option<String>, FormatError> {
    let mut at = start;
    // At most one extension every 8 bytes of the first cluster.
    for _ in 0..header.cluster() / 8 {
        if at.saturating_add(8) > header.cluster().min(source.len()) {
            return Ok(None);
        }
        let head = source.table(at, 8)?;
        let (kind, bytes) = (u32::from_be_bytes(field(&head, 0)), u32::from_be_bytes(field(&head, 4)));
        let next = at.saturating_add(8).saturating_add(u64::from(bytes).next_multiple_of(8));
        if kind == 0 {
            return Ok(None);
        }
        if next > header.cluster().min(source.len()) {
            return malformed(format!("a header extension of {bytes} bytes at {at:#x}"));
        }
        if kind == BACKING_FORMAT {
            let name = source.table(at.saturating_add(8), bytes as usize)?;
            return Ok(Some(String::from_utf8_lossy(&name).into_owned()));
        }
        at = next;
    }
    Ok(None)
}

/// What an L2 entry says of a piece of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Ask the backing file, or zeros.
    Absent,
    Zeros,
    /// In the file, from here.
    At(u64),
    /// Compressed, in these bytes of the file; the whole cluster.
    Packed {
        offset: u64,
        bytes: u64,
    },
}

/// An L2 entry: the word of its cluster, and with extended entries the bitmap.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) word: u64,
    pub(super) bitmap: u64,
}

impl Header {
    /// What an entry says of the piece at `within` of its cluster, and how many bytes of the cluster are alike from there.
    pub(super) fn place(&self, entry: Entry, within: u64) -> (Place, u64) {
        let left = self.cluster().saturating_sub(within);
        let Entry { word, bitmap } = entry;
        if word & COMPRESSED != 0 {
            let bits = 62 - (self.cluster_bits - 8);
            let offset = word & ((1 << bits) - 1);
            let sectors = (word & !COPIED & !COMPRESSED) >> bits;
            let bytes = ((sectors + 1) * 512).saturating_sub(offset % 512);
            return (Place::Packed { offset, bytes }, left);
        }
        let offset = word & OFFSET_MASK;
        if !self.extended() {
            let zero = self.version == 3 && word & ZERO != 0;
            let place = match (zero, offset) {
                (true, _) => Place::Zeros,
                (false, 0) => Place::Absent,
                _ => Place::At(offset.saturating_add(within)),
            };
            return (place, left);
        }
        let piece = self.cluster() / SUBCLUSTERS;
        let first = within / piece;
        let kind = |i: u64| (bitmap >> i & 1 != 0, bitmap >> (i + SUBCLUSTERS) & 1 != 0);
        let alike = (first..SUBCLUSTERS).take_while(|i| kind(*i) == kind(first)).count() as u64;
        let place = match kind(first) {
            (_, true) => Place::Zeros,
            (true, false) => Place::At(offset.saturating_add(within)),
            (false, false) => Place::Absent,
        };
        (place, ((first + alike) * piece).saturating_sub(within).min(left))
    }
}

/// An opened image. See the head of this file.
pub struct Qcow2 {
    source: Source,
    header: Header,
    l1: Vec<u64>,
    /// The L2 table in use: its place in the L1 table, and its words.
    l2: (usize, Vec<u64>),
    /// The cluster that was decompressed last: its number and bytes.
    unpacked: (u64, Vec<u8>),
    backing: Option<Box<dyn Image + Send>>,
}

impl Qcow2 {
    /// Opens it and validates all its metadata.
    pub fn open(source: Source, size_max: u64, backings: &mut dyn Backings) -> Result<Qcow2, FormatError> {
        let header = Header::parse(&source, size_max)?;
        // The size is bounded, and with it the table.
        let l1 = be64(&source.table(header.l1_offset, header.l1_entries as usize * 8)?);
        qcow2_check::check(&source, &header, &l1)?;
        let backing = match &header.backing {
            None => None,
            Some((name, format)) => {
                let Some(format) = format else {
                    return unsupported(format!(
                        "it does not say which format its backing file `{}` has: say so with `qemu-img rebase -u -F FORMAT`",
                        printable(name)
                    ));
                };
                let format = format.parse().or_else(|e| unsupported(format!("of its backing file: {e}")))?;
                Some(backings.open(name, format)?)
            }
        };
        let l2 = (usize::MAX, Vec::new());
        Ok(Qcow2 { source, header, l1, l2, unpacked: (u64::MAX, Vec::new()), backing })
    }

    /// The entry of the cluster at `offset`; `Err` with the bytes that have no L2 table.
    fn entry(&mut self, offset: u64) -> Result<Result<Entry, u64>, FormatError> {
        let span = self.header.l2_span();
        let index = (offset / span) as usize;
        let table = self.l1.get(index).copied().unwrap_or_default() & OFFSET_MASK;
        if table == 0 {
            return Ok(Err(span.saturating_sub(offset % span)));
        }
        if self.l2.0 != index {
            self.l2 = (index, be64(&self.source.table(table, self.header.cluster() as usize)?));
        }
        let words = if self.header.extended() { 2 } else { 1 };
        let at = ((offset % span) / self.header.cluster()) as usize * words;
        let word = |at: usize| self.l2.1.get(at).copied().unwrap_or_default();
        Ok(Ok(Entry { word: word(at), bitmap: if words == 2 { word(at.saturating_add(1)) } else { 0 } }))
    }

    /// Where the bytes at `offset` are, and how many of them are alike.
    fn place(&mut self, offset: u64) -> Result<(Place, u64), FormatError> {
        let left = self.header.size.saturating_sub(offset);
        let within = offset % self.header.cluster();
        let (place, len) = match self.entry(offset)? {
            Ok(entry) => self.header.place(entry, within),
            Err(len) => (Place::Absent, len),
        };
        Ok((place, len.min(left).max(1)))
    }

    fn unpack(&mut self, cluster: u64, offset: u64, bytes: u64) -> Result<&[u8], FormatError> {
        if self.unpacked.0 != cluster {
            let bytes = bytes.min(self.source.len().saturating_sub(offset));
            let packed = self.source.table(offset, bytes as usize)?;
            let mut out = vec![0; self.header.cluster() as usize];
            let whole = if self.header.zstd { unzstd(&packed, &mut out) } else { inflate(&packed, &mut out) };
            if !whole {
                return malformed(format!("the compressed cluster at {offset:#x} cannot be decompressed"));
            }
            self.unpacked = (cluster, out);
        }
        Ok(&self.unpacked.1)
    }
}

/// Raw deflate into a buffer that it must fill.
fn inflate(packed: &[u8], out: &mut [u8]) -> bool {
    use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};
    let mut state = Box::<DecompressorOxide>::default();
    let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
    let (_, _, n) = decompress(&mut state, packed, out, 0, flags);
    n == out.len()
}

/// zstd into a buffer that it must fill.
fn unzstd(packed: &[u8], out: &mut [u8]) -> bool {
    let Ok(mut decoder) = ruzstd::decoding::StreamingDecoder::new(packed) else { return false };
    std::io::Read::read_exact(&mut decoder, out).is_ok()
}

impl Image for Qcow2 {
    fn size_bytes(&self) -> u64 {
        self.header.size
    }

    fn run(&mut self, offset: u64) -> Result<Run, FormatError> {
        let (place, len) = self.place(offset)?;
        match (place, &mut self.backing) {
            (Place::At(_) | Place::Packed { .. }, _) => Ok(Run { len, zero: false }),
            (Place::Zeros, _) | (Place::Absent, None) => Ok(Run { len, zero: true }),
            // A backing file may be shorter: zeros follow it.
            (Place::Absent, Some(backing)) if offset >= backing.size_bytes() => Ok(Run { len, zero: true }),
            (Place::Absent, Some(backing)) => {
                let run = backing.run(offset)?;
                Ok(Run { len: run.len.min(len), zero: run.zero })
            }
        }
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), FormatError> {
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let (place, len) = self.place(at)?;
            let n = usize::try_from(len).unwrap_or(usize::MAX).min(rest.len());
            let (part, more) = std::mem::take(&mut rest).split_at_mut(n);
            match place {
                Place::At(from) => self.source.read_padded_at(part, from)?,
                Place::Zeros => part.fill(0),
                Place::Packed { offset, bytes } => {
                    let within = (at % self.header.cluster()) as usize;
                    let cluster = self.unpack(at / self.header.cluster(), offset, bytes)?;
                    part.copy_from_slice(cluster.get(within..within + n).unwrap_or(&vec![0; n]));
                }
                Place::Absent => read_backing(self.backing.as_deref_mut(), at, part)?,
            }
            at = at.saturating_add(n as u64);
            rest = more;
        }
        Ok(())
    }
}

fn read_backing(
    backing: Option<&mut (dyn Image + Send + 'static)>,
    offset: u64,
    buffer: &mut [u8],
) -> Result<(), FormatError> {
    let size = backing.as_ref().map_or(0, |b| b.size_bytes());
    let here = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX).min(buffer.len());
    let (there, beyond) = buffer.split_at_mut(here);
    beyond.fill(0);
    match backing {
        Some(backing) if !there.is_empty() => backing.read(offset, there),
        _ => Ok(()),
    }
}
