//! ext4 (and ext2, ext3), read-only: the library `ext4-view` over a reader that knows what it leaves out.
//!
//! The reader below lays the committed blocks of the [`journal`](crate::journal) over the file system, so that what a
//! crashed guest left is seen as its own mount would see it, and shows the library a superblock without the flags that
//! it refuses although they do not matter to a reader (recovery: done here; multi-mount protection; large extended
//! attributes). Group descriptors that are spread (meta_bg) are collected for it. Not read: inline data, casefold,
//! encryption, external journals.
//!
//! Symbolic links are followed here and not by the library: it would take any length for a link's target.

use std::{cell::Cell, collections::VecDeque, io, rc::Rc};

use ext4_view::{Ext4, Ext4Error, Ext4Read, Metadata};

use crate::disk::{ReadAt, Window, le16, le32};
use crate::fs::FsError;
use crate::journal::{self, Overlay};

/// Block groups: 128 TiB of the usual ones.
const GROUPS_MAX: u64 = 1 << 20;
/// The largest directory that is searched.
const DIR_BYTES_MAX: u64 = 64 << 20;
/// Names of a directory that are listed.
const ENTRIES_MAX: usize = 4096;
const LINKS_MAX: usize = 16;
const LINK_BYTES_MAX: u64 = 4096;
const COMPONENTS_MAX: usize = 64;

pub(crate) const INCOMPAT_RECOVERY: u32 = 0x4;
const INCOMPAT_META_BG: u32 = 0x10;
const INCOMPAT_64BIT: u32 = 0x80;
const INCOMPAT_MMP: u32 = 0x100;
const INCOMPAT_EA_INODE: u32 = 0x400;
const RO_COMPAT_SPARSE_SUPER: u32 = 0x1;
const RO_COMPAT_METADATA_CSUM: u32 = 0x400;
const COMPAT_SPARSE_SUPER2: u32 = 0x200;

/// crc32c as ext4 and its journal use it: a seed goes in as it comes out, without the final inversion.
pub(crate) fn checksum(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

fn damaged(what: &str) -> FsError {
    FsError::Read(what.to_owned())
}

/// The numbers of the superblock that are needed here.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    pub(crate) block_bytes: u64,
    pub(crate) first_block: u64,
    pub(crate) blocks: u64,
    pub(crate) blocks_per_group: u64,
    pub(crate) inodes_per_group: u32,
    pub(crate) inode_bytes: u16,
    pub(crate) descriptor_bytes: u64,
    pub(crate) journal_inode: u32,
    pub(crate) compat: u32,
    pub(crate) incompat: u32,
    pub(crate) ro_compat: u32,
}

impl Geometry {
    pub(crate) fn of(superblock: &[u8; 1024]) -> Option<Self> {
        let log = le32(superblock, 0x18).filter(|log| *log <= 6)?;
        let incompat = le32(superblock, 0x60)?;
        let wide = incompat & INCOMPAT_64BIT != 0;
        let high = if wide { u64::from(le32(superblock, 0x150)?) << 32 } else { 0 };
        let descriptor_bytes = if wide { u64::from(le16(superblock, 0xfe)?) } else { 32 };
        let found = Self {
            block_bytes: 1024 << log,
            first_block: le32(superblock, 0x14)?.into(),
            blocks: high | u64::from(le32(superblock, 0x4)?),
            blocks_per_group: le32(superblock, 0x20)?.into(),
            inodes_per_group: le32(superblock, 0x28)?,
            // Of the first revision the size is fixed.
            inode_bytes: if le32(superblock, 0x4c)? == 0 { 128 } else { le16(superblock, 0x58)? },
            descriptor_bytes,
            journal_inode: le32(superblock, 0xe0)?,
            compat: le32(superblock, 0x5c)?,
            incompat,
            ro_compat: le32(superblock, 0x64)?,
        };
        let sane = found.blocks_per_group > 0
            && (32..=found.block_bytes).contains(&descriptor_bytes)
            && found.groups()? <= GROUPS_MAX;
        sane.then_some(found)
    }

    fn groups(&self) -> Option<u64> {
        Some(self.blocks.checked_sub(self.first_block)?.div_ceil(self.blocks_per_group))
    }

    /// Whether a group has a copy of the superblock before its descriptors.
    fn has_superblock(&self, group: u64, superblock: &[u8; 1024]) -> bool {
        if group == 0 {
            return true;
        }
        if self.compat & COMPAT_SPARSE_SUPER2 != 0 {
            let backups = [le32(superblock, 0x24c), le32(superblock, 0x250)];
            return backups.iter().flatten().any(|backup| u64::from(*backup) == group);
        }
        let is_power = |base: u64| {
            let mut power = base;
            while power < group {
                power = power.saturating_mul(base);
            }
            power == group
        };
        self.ro_compat & RO_COMPAT_SPARSE_SUPER == 0 || group == 1 || [3, 5, 7].into_iter().any(is_power)
    }
}

/// The file system's bytes with its journal over them.
pub(crate) struct Reader {
    pub(crate) window: Window,
    pub(crate) block_bytes: u64,
    pub(crate) overlay: Overlay,
}

impl Reader {
    /// Reads across blocks, each from where its newest content is.
    pub(crate) fn read(&self, start: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.overlay.is_empty() {
            return self.window.read_at(buf, start);
        }
        let (mut at, mut left) = (start, buf);
        while !left.is_empty() {
            let (block, within) = (at / self.block_bytes, at % self.block_bytes);
            let room = usize::try_from(self.block_bytes.saturating_sub(within)).unwrap_or(usize::MAX);
            let (piece, rest) = left.split_at_mut(room.min(left.len()));
            let copy = self.overlay.get(&block);
            let from = copy.map_or(block, |copy| copy.block);
            let offset = from.checked_mul(self.block_bytes).and_then(|base| base.checked_add(within));
            self.window.read_at(piece, offset.ok_or(io::ErrorKind::UnexpectedEof)?)?;
            if copy.is_some_and(|copy| copy.escaped) {
                // The journal took the magic away that this block begins with.
                let magic = journal::MAGIC.to_be_bytes();
                for (byte, real) in
                    piece.iter_mut().zip(magic.iter().skip(usize::try_from(within).unwrap_or(4)))
                {
                    *byte = *real;
                }
            }
            at = at.saturating_add(piece.len() as u64);
            left = rest;
        }
        Ok(())
    }
}

/// What the library reads through.
struct View {
    reader: Reader,
    superblock: [u8; 1024],
    /// Where the library looks for group descriptors, and what it shall find there while it loads.
    descriptors: Option<(u64, Vec<u8>)>,
    loading: Rc<Cell<bool>>,
}

impl Ext4Read for View {
    fn read(
        &mut self,
        start: u64,
        buf: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        if self.loading.get() {
            if start == 1024 && buf.len() == self.superblock.len() {
                buf.copy_from_slice(&self.superblock);
                return Ok(());
            }
            if let Some((base, table)) = &self.descriptors {
                let at = start.checked_sub(*base).and_then(|at| usize::try_from(at).ok());
                let found = at.and_then(|at| table.get(at..at.checked_add(buf.len())?));
                buf.copy_from_slice(found.ok_or(io::Error::from(io::ErrorKind::UnexpectedEof))?);
                return Ok(());
            }
        }
        Ok(self.reader.read(start, buf)?)
    }
}

/// The descriptors of a file system with meta_bg, one after the other.
fn collect_descriptors(reader: &Reader, geometry: &Geometry, superblock: &[u8; 1024]) -> Option<Vec<u8>> {
    let per_block = geometry.block_bytes.checked_div(geometry.descriptor_bytes)?;
    let first_meta = u64::from(le32(superblock, 0x104)?);
    let mut table = Vec::new();
    let mut block = vec![0; usize::try_from(geometry.block_bytes).ok()?];
    for index in 0..geometry.groups()?.div_ceil(per_block) {
        let at = if index < first_meta {
            geometry.first_block.checked_add(1)?.checked_add(index)?
        } else {
            let group = index.checked_mul(per_block)?;
            let start = group.checked_mul(geometry.blocks_per_group)?.checked_add(geometry.first_block)?;
            start.checked_add(u64::from(geometry.has_superblock(group, superblock)))?
        };
        reader.read(at.checked_mul(geometry.block_bytes)?, &mut block).ok()?;
        table.extend_from_slice(&block);
    }
    Some(table)
}

/// The superblock without what the library refuses for no reason of ours.
fn shown(superblock: &[u8; 1024], geometry: &Geometry) -> [u8; 1024] {
    let mut shown = *superblock;
    let flags =
        geometry.incompat & !(INCOMPAT_RECOVERY | INCOMPAT_MMP | INCOMPAT_EA_INODE | INCOMPAT_META_BG);
    let was_right = le32(superblock, 0x3fc) == superblock.get(..0x3fc).map(|bytes| checksum(!0, bytes));
    if let Some(field) = shown.get_mut(0x60..0x64) {
        field.copy_from_slice(&flags.to_le_bytes());
    }
    if geometry.ro_compat & RO_COMPAT_METADATA_CSUM != 0 && was_right {
        let (summed, sum) = shown.split_at_mut(0x3fc);
        sum.copy_from_slice(&checksum(!0, summed).to_le_bytes());
    }
    shown
}

/// An ext4 file system.
pub(crate) struct Ext(Ext4);

fn failed(error: &Ext4Error) -> FsError {
    FsError::Read(format!("ext4: {error}"))
}

/// Splits a path; `None` if it is too deep to be anything's.
fn components(path: &str) -> Option<VecDeque<String>> {
    let found: VecDeque<String> =
        path.split('/').filter(|part| !part.is_empty() && *part != ".").map(str::to_owned).collect();
    (found.len() <= COMPONENTS_MAX).then_some(found)
}

impl Ext {
    pub(crate) fn open(window: Window) -> Result<Self, FsError> {
        let raw: [u8; 1024] = window.peek(1024).ok_or_else(|| damaged("ext4: it has no superblock"))?;
        let wrong = || damaged("ext4: the superblock makes no sense");
        let geometry = Geometry::of(&raw).ok_or_else(wrong)?;
        let mut reader = Reader { window, block_bytes: geometry.block_bytes, overlay: Overlay::new() };
        if geometry.incompat & INCOMPAT_RECOVERY != 0 {
            reader.overlay = journal::load(&reader, &geometry)
                .map_err(|why| FsError::Read(format!("ext4: it was not unmounted, and its journal {why}")))?;
        }
        let mut superblock = [0; 1024];
        reader.read(1024, &mut superblock).map_err(|e| FsError::Read(format!("ext4: {e}")))?;
        let geometry = Geometry::of(&superblock).ok_or_else(wrong)?;
        let descriptors = if geometry.incompat & INCOMPAT_META_BG == 0 {
            None
        } else {
            let table = collect_descriptors(&reader, &geometry, &superblock)
                .ok_or_else(|| damaged("ext4: its group descriptors cannot be read"))?;
            let block = if geometry.block_bytes == 1024 { 2 } else { 1 };
            Some((geometry.block_bytes.saturating_mul(block), table))
        };
        let loading = Rc::new(Cell::new(true));
        let view = View {
            superblock: shown(&superblock, &geometry),
            reader,
            descriptors,
            loading: Rc::clone(&loading),
        };
        let fs = Ext4::load(Box::new(view)).map_err(|e| failed(&e))?;
        loading.set(false);
        Ok(Self(fs))
    }

    pub(crate) fn uuid(&self) -> String {
        self.0.uuid().to_string()
    }

    pub(crate) fn label(&self) -> String {
        self.0.label().to_str().unwrap_or_default().to_owned()
    }

    fn metadata(&self, path: &str) -> Result<Option<Metadata>, FsError> {
        let metadata = match self.0.symlink_metadata(path) {
            Ok(metadata) => metadata,
            Err(Ext4Error::NotFound | Ext4Error::NotADirectory) => return Ok(None),
            Err(error) => return Err(failed(&error)),
        };
        if metadata.is_dir() && metadata.len() > DIR_BYTES_MAX {
            let (path, bytes) = (path.to_owned(), metadata.len());
            return Err(FsError::TooLarge { path, bytes, max: DIR_BYTES_MAX });
        }
        Ok(Some(metadata))
    }

    /// Follows symbolic links to what a path means; `None` when there is nothing.
    fn resolve(&self, path: &str) -> Result<Option<(String, Metadata)>, FsError> {
        let too_deep = || damaged(&format!("ext4: {path} is too deep, or its symbolic links make no end"));
        let mut open = components(path).ok_or_else(too_deep)?;
        let mut done: Vec<String> = Vec::new();
        let mut links = 0;
        let Some(mut metadata) = self.metadata("/")? else { return Ok(None) };
        while let Some(part) = open.pop_front() {
            if part == ".." {
                done.pop();
                continue;
            }
            done.push(part);
            let at = format!("/{}", done.join("/"));
            metadata = match self.metadata(&at)? {
                Some(metadata) => metadata,
                None => return Ok(None),
            };
            if metadata.is_symlink() {
                links += 1;
                if links > LINKS_MAX || metadata.len() > LINK_BYTES_MAX {
                    return Err(too_deep());
                }
                let target = self.0.read_link(at.as_str()).map_err(|e| failed(&e))?;
                let target = target.to_str().map_err(|_| too_deep())?.to_owned();
                done.pop();
                if target.starts_with('/') {
                    done.clear();
                }
                for part in components(&target).ok_or_else(too_deep)?.into_iter().rev() {
                    open.push_front(part);
                }
            } else if !metadata.is_dir() && !open.is_empty() {
                return Ok(None);
            }
            if open.len().saturating_add(done.len()) > COMPONENTS_MAX {
                return Err(too_deep());
            }
        }
        let at = format!("/{}", done.join("/"));
        // The last step may have been upwards.
        Ok(self.metadata(&at)?.map(|found| (at, if found.is_dir() { found } else { metadata })))
    }

    /// The size of a regular file; `None` when there is none.
    pub(crate) fn size(&self, path: &str) -> Result<Option<u64>, FsError> {
        let found = self.resolve(path)?;
        Ok(found.filter(|(_, metadata)| metadata.file_type().is_regular_file()).map(|(_, found)| found.len()))
    }

    /// The names in a directory; none when there is no such directory.
    pub(crate) fn list(&self, path: &str) -> Result<Vec<String>, FsError> {
        let Some((at, _)) = self.resolve(path)?.filter(|(_, metadata)| metadata.is_dir()) else {
            return Ok(Vec::new());
        };
        let entries = self.0.read_dir(at.as_str()).map_err(|e| failed(&e))?;
        let mut names = Vec::new();
        for entry in entries.take(ENTRIES_MAX) {
            let entry = entry.map_err(|e| failed(&e))?;
            // A name that is no UTF-8 is nothing that is looked for.
            names.extend(entry.file_name().as_str().ok().map(str::to_owned));
        }
        Ok(names)
    }

    /// Hands a file's bytes on, piece by piece.
    pub(crate) fn read(
        &self,
        path: &str,
        each: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), FsError> {
        let missing = || damaged(&format!("ext4: {path} is not there"));
        let (at, _) = self.resolve(path)?.ok_or_else(missing)?;
        let mut file = self.0.open(at.as_str()).map_err(|e| failed(&e))?;
        let mut piece = vec![0; 64 * 1024];
        loop {
            let mut filled = 0;
            while let Some(room) = piece.get_mut(filled..).filter(|room| !room.is_empty()) {
                match file.read_bytes(room).map_err(|e| failed(&e))? {
                    0 => break,
                    len => filled += len,
                }
            }
            if filled == 0 {
                return Ok(());
            }
            each(piece.get(..filled).unwrap_or_default()).map_err(FsError::Write)?;
        }
    }
}
