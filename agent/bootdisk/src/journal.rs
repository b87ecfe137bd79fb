//! The journal of an ext4 file system that was not unmounted (jbd2; kernel documentation, "ext4 data structures", "Journal").
//!
//! ```text
//!   superblock │ … first ──▶ log, in a ring ──▶ last │ fast commits (not read)
//!                     │
//!                     ├ descriptor   tags: "the next blocks belong at …", then these blocks
//!                     ├ revocation   "do not replay … of this and of earlier transactions"
//!                     └ commit       the transaction counts
//! ```
//!
//! What a mount would replay is laid over the file system in memory: a map from a block to its newest committed copy in
//! the journal. Checksums (versions 2 and 3) are verified; the first thing that does not fit ends the log, as in a mount.
//! The last, uncommitted transaction does not count. Bounds: each block of the ring is visited once.

use std::collections::{BTreeMap, BTreeSet};

use crate::disk::{be16, be32, le16, le32};
use crate::ext4::{Geometry, Reader, checksum};

/// Each block of the journal's own begins with it.
pub(crate) const MAGIC: u32 = 0xc03b_3998;
/// Blocks of a journal: 4 GiB of the usual ones.
const BLOCKS_MAX: u32 = 1 << 20;
/// Pieces that a journal may be in; mke2fs makes one to a few.
const EXTENTS_MAX: usize = 1 << 16;
const EXTENTS_FLAG: u32 = 0x8_0000;

const COMPAT_HAS_JOURNAL: u32 = 0x4;
const INCOMPAT_64BIT: u32 = 0x2;
const INCOMPAT_CSUM_V2: u32 = 0x8;
const INCOMPAT_CSUM_V3: u32 = 0x10;
const INCOMPAT_FAST_COMMIT: u32 = 0x20;
/// 64 bits, revocations, asynchronous commits, checksums, fast commits.
const INCOMPAT_KNOWN: u32 = 0x3f;

const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const SUPERBLOCK_V1: u32 = 3;
const SUPERBLOCK_V2: u32 = 4;
const REVOKE: u32 = 5;

const TAG_ESCAPED: u32 = 1;
const TAG_SAME_UUID: u32 = 2;
const TAG_LAST: u32 = 8;

/// The newest copy of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Copy {
    /// Of the file system, inside the journal.
    pub(crate) block: u64,
    /// Its first four bytes are the journal's magic, and zeros stand in for them.
    pub(crate) escaped: bool,
}

/// Blocks of the file system that the journal has newer.
pub(crate) type Overlay = BTreeMap<u64, Copy>;

/// A block of the journal.
type Blocks<'a> = &'a dyn Fn(u32) -> Option<Vec<u8>>;
/// Where it lies in the file system.
type Places<'a> = &'a dyn Fn(u32) -> Option<u64>;

/// A run of the journal's blocks.
struct Run {
    logical: u32,
    len: u32,
    physical: u64,
}

/// Reads what is committed.
///
/// # Errors
/// What is wrong with the journal, to follow "its journal".
pub(crate) fn load(reader: &Reader, geometry: &Geometry) -> Result<Overlay, String> {
    if geometry.compat & COMPAT_HAS_JOURNAL == 0 {
        return Ok(Overlay::new());
    }
    if geometry.journal_inode == 0 {
        return Err("lies on another disk".to_owned());
    }
    let damaged = || "is damaged".to_owned();
    let runs = runs(reader, geometry).ok_or_else(|| "cannot be found".to_owned())?;
    let block_bytes = usize::try_from(geometry.block_bytes).map_err(|_| damaged())?;
    let head = read(reader, &runs, 0, block_bytes).ok_or_else(damaged)?;
    let log = Log::new(&head, geometry).ok_or_else(damaged)?;
    if log.features & !INCOMPAT_KNOWN != 0 {
        return Err(format!("has features that are not known ({:#x})", log.features & !INCOMPAT_KNOWN));
    }
    if log.start == 0 {
        return Ok(Overlay::new());
    }
    Ok(log.replay(&|at| read(reader, &runs, at, block_bytes), &|at| physical(&runs, at)))
}

/// Where a block of the journal lies.
fn physical(runs: &[Run], at: u32) -> Option<u64> {
    let run = runs.iter().find(|run| at.checked_sub(run.logical).is_some_and(|by| by < run.len))?;
    run.physical.checked_add(u64::from(at.checked_sub(run.logical)?))
}

fn read(reader: &Reader, runs: &[Run], at: u32, block_bytes: usize) -> Option<Vec<u8>> {
    let mut block = vec![0; block_bytes];
    let start = physical(runs, at)?.checked_mul(reader.block_bytes)?;
    reader.read(start, &mut block).ok()?;
    Some(block)
}

/// The extents of the journal's inode.
fn runs(reader: &Reader, geometry: &Geometry) -> Option<Vec<Run>> {
    let index = geometry.journal_inode.checked_sub(1)?;
    let group = u64::from(index.checked_div(geometry.inodes_per_group)?);
    // Its inode is one of the first: its descriptor is in the first block of them, with meta_bg too.
    let table = geometry.first_block.checked_add(1)?.checked_mul(geometry.block_bytes)?;
    let mut descriptor = vec![0; usize::try_from(geometry.descriptor_bytes).ok()?];
    reader.read(table.checked_add(group.checked_mul(geometry.descriptor_bytes)?)?, &mut descriptor).ok()?;
    let high = if descriptor.len() >= 64 { u64::from(le32(&descriptor, 0x28)?) << 32 } else { 0 };
    let inodes = (high | u64::from(le32(&descriptor, 0x8)?)).checked_mul(geometry.block_bytes)?;
    let within = u64::from(index.checked_rem(geometry.inodes_per_group)?)
        .checked_mul(u64::from(geometry.inode_bytes))?;
    let mut inode = [0; 128];
    reader.read(inodes.checked_add(within)?, &mut inode).ok()?;
    if le32(&inode, 0x20)? & EXTENTS_FLAG == 0 {
        return mapped(reader, &inode);
    }
    let mut found = Vec::new();
    extents(reader, inode.get(0x28..0x28 + 60)?, 5, &mut found)?;
    Some(found)
}

/// A node of the extent tree and all below it.
fn extents(reader: &Reader, node: &[u8], depth_max: u16, found: &mut Vec<Run>) -> Option<()> {
    let (entries, depth) = (le16(node, 2)?, le16(node, 6)?);
    if le16(node, 0)? != 0xf30a || depth > depth_max {
        return None;
    }
    for entry in 0..usize::from(entries) {
        let entry = node.get(entry.checked_add(1)?.checked_mul(12)?..)?;
        if depth == 0 {
            let physical = u64::from(le16(entry, 6)?) << 32 | u64::from(le32(entry, 8)?);
            found.push(Run { logical: le32(entry, 0)?, len: le16(entry, 4)?.into(), physical });
        } else {
            let child = u64::from(le16(entry, 8)?) << 32 | u64::from(le32(entry, 4)?);
            let mut block = vec![0; usize::try_from(reader.block_bytes).ok()?];
            reader.read(child.checked_mul(reader.block_bytes)?, &mut block).ok()?;
            extents(reader, &block, depth.checked_sub(1)?, found)?;
        }
        if found.len() > EXTENTS_MAX {
            return None;
        }
    }
    Some(())
}

/// The blocks of an inode of ext3: twelve, then those named in a block, then those named in blocks named in a block.
fn mapped(reader: &Reader, inode: &[u8; 128]) -> Option<Vec<Run>> {
    let numbers = |block: u32| -> Option<Vec<u32>> {
        let mut bytes = vec![0; usize::try_from(reader.block_bytes).ok()?];
        reader.read(u64::from(block).checked_mul(reader.block_bytes)?, &mut bytes).ok()?;
        Some(bytes.chunks_exact(4).filter_map(|number| le32(number, 0)).collect())
    };
    let mut blocks: Vec<u32> = (0..12).filter_map(|index| le32(inode, 0x28 + 4 * index)).collect();
    if let Some(indirect) = le32(inode, 0x58).filter(|block| *block != 0) {
        blocks.extend(numbers(indirect)?);
    }
    if let Some(double) = le32(inode, 0x5c).filter(|block| *block != 0) {
        for indirect in numbers(double)?.into_iter().take_while(|block| *block != 0) {
            blocks.extend(numbers(indirect)?);
            if blocks.len() > BLOCKS_MAX as usize {
                return None;
            }
        }
    }
    let mut found: Vec<Run> = Vec::new();
    for (logical, block) in (0..).zip(blocks).take_while(|(_, block)| *block != 0) {
        match found.last_mut() {
            Some(run) if run.physical + u64::from(run.len) == u64::from(block) => run.len += 1,
            _ => found.push(Run { logical, len: 1, physical: block.into() }),
        }
    }
    Some(found)
}

/// The journal's superblock, and where the log is.
struct Log {
    first: u32,
    last: u32,
    start: u32,
    sequence: u32,
    features: u32,
    /// Of its checksums.
    seed: u32,
}

/// One block that a descriptor announces.
struct Tag {
    block: u64,
    flags: u32,
    /// Of the block; of version 2 only the lower half is kept.
    sum: Option<(u32, u32)>,
}

impl Log {
    fn new(head: &[u8], geometry: &Geometry) -> Option<Self> {
        let kind = be32(head, 4)?;
        if be32(head, 0)? != MAGIC || u64::from(be32(head, 12)?) != geometry.block_bytes {
            return None;
        }
        let features = match kind {
            SUPERBLOCK_V1 => 0,
            SUPERBLOCK_V2 => be32(head, 40)?,
            _ => return None,
        };
        if features & (INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3) != 0 {
            let mut summed = head.get(..1024)?.to_vec();
            summed.get_mut(0xfc..0x100)?.fill(0);
            if checksum(!0, &summed) != be32(head, 0xfc)? {
                return None;
            }
        }
        let (blocks, first) = (be32(head, 16)?, be32(head, 20)?);
        let fast = match features & INCOMPAT_FAST_COMMIT {
            0 => 0,
            // 0 stands for the default.
            _ => be32(head, 84).filter(|count| *count > 0).unwrap_or(256),
        };
        let last = blocks.checked_sub(fast)?;
        let start = be32(head, 28)?;
        let sane = blocks <= BLOCKS_MAX && first > 0 && first < last && start < last;
        sane.then_some(Self {
            first,
            last,
            start,
            sequence: be32(head, 24)?,
            features,
            seed: checksum(!0, head.get(48..64)?),
        })
    }

    const fn has_sums(&self) -> bool {
        self.features & (INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3) != 0
    }

    /// The next block of the ring.
    const fn after(&self, at: u32) -> u32 {
        if at.saturating_add(1) >= self.last { self.first } else { at.saturating_add(1) }
    }

    /// Whether the sum in a block's last four bytes is right.
    fn tail_is_right(&self, block: &[u8]) -> bool {
        if !self.has_sums() {
            return true;
        }
        let Some((body, tail)) = block.split_last_chunk::<4>() else { return false };
        checksum(checksum(self.seed, body), &[0; 4]) == u32::from_be_bytes(*tail)
    }

    fn replay(&self, read: Blocks<'_>, place: Places<'_>) -> Overlay {
        let mut overlay = Overlay::new();
        let (mut pending, mut revoked) = (Overlay::new(), BTreeSet::new());
        let (mut at, mut sequence) = (self.start, self.sequence);
        let mut left = self.last.saturating_sub(self.first);
        while left > 0 {
            let Some(block) = read(at) else { break };
            if be32(&block, 0) != Some(MAGIC) || be32(&block, 8) != Some(sequence) {
                break;
            }
            (at, left) = (self.after(at), left - 1);
            let fits = match be32(&block, 4) {
                Some(DESCRIPTOR) if self.tail_is_right(&block) => {
                    self.descriptor(&block, sequence, (&mut at, &mut left), (read, place), &mut pending)
                }
                Some(REVOKE) if self.tail_is_right(&block) => self.revocation(&block, &mut revoked),
                Some(COMMIT) if self.commit_is_right(&block) => {
                    overlay.append(&mut pending);
                    for block in std::mem::take(&mut revoked) {
                        overlay.remove(&block);
                    }
                    sequence = sequence.wrapping_add(1);
                    Some(())
                }
                _ => None,
            };
            if fits.is_none() {
                break;
            }
        }
        overlay
    }

    /// A descriptor and the blocks that follow it.
    fn descriptor(
        &self,
        block: &[u8],
        sequence: u32,
        (at, left): (&mut u32, &mut u32),
        (read, place): (Blocks<'_>, Places<'_>),
        pending: &mut Overlay,
    ) -> Option<()> {
        for tag in self.tags(block) {
            *left = left.checked_sub(1)?;
            if let Some((sum, mask)) = tag.sum {
                let seed = checksum(self.seed, &sequence.to_be_bytes());
                if checksum(seed, &read(*at)?) & mask != sum {
                    return None;
                }
            }
            let copy = Copy { block: place(*at)?, escaped: tag.flags & TAG_ESCAPED != 0 };
            pending.insert(tag.block, copy);
            *at = self.after(*at);
        }
        Some(())
    }

    fn tags(&self, block: &[u8]) -> Vec<Tag> {
        let body = match self.has_sums() {
            true => block.get(..block.len().saturating_sub(4)).unwrap_or_default(),
            false => block,
        };
        let mut tags = Vec::new();
        let mut at = 12_usize;
        while let Some((tag, bytes)) = body.get(at..).and_then(|rest| self.tag(rest)) {
            let uuid = if tag.flags & TAG_SAME_UUID == 0 { 16 } else { 0 };
            at = at.saturating_add(bytes).saturating_add(uuid);
            let last = tag.flags & TAG_LAST != 0;
            tags.push(tag);
            if last {
                break;
            }
        }
        tags
    }

    /// A tag and its size.
    fn tag(&self, bytes: &[u8]) -> Option<(Tag, usize)> {
        let wide = self.features & INCOMPAT_64BIT != 0;
        let low = u64::from(be32(bytes, 0)?);
        if self.features & INCOMPAT_CSUM_V3 != 0 {
            let high = if wide { u64::from(be32(bytes, 8)?) << 32 } else { 0 };
            let sum = Some((be32(bytes, 12)?, u32::MAX));
            return Some((Tag { block: high | low, flags: be32(bytes, 4)?, sum }, 16));
        }
        let high = if wide { u64::from(be32(bytes, 8)?) << 32 } else { 0 };
        let second = self.features & INCOMPAT_CSUM_V2 != 0;
        let sum = if second { Some((be16(bytes, 4)?.into(), 0xffff)) } else { None };
        let size = 8 + if wide { 4 } else { 0 } + if second { 2 } else { 0 };
        bytes.get(..size)?;
        Some((Tag { block: high | low, flags: be16(bytes, 6)?.into(), sum }, size))
    }

    fn revocation(&self, block: &[u8], revoked: &mut BTreeSet<u64>) -> Option<()> {
        let used = usize::try_from(be32(block, 12)?).ok()?;
        let wide = self.features & INCOMPAT_64BIT != 0;
        for entry in block.get(16..used)?.chunks_exact(if wide { 8 } else { 4 }) {
            let number = match wide {
                true => u64::from(be32(entry, 0)?) << 32 | u64::from(be32(entry, 4)?),
                false => be32(entry, 0)?.into(),
            };
            revoked.insert(number);
        }
        Some(())
    }

    fn commit_is_right(&self, block: &[u8]) -> bool {
        if !self.has_sums() {
            return true;
        }
        let sum = be32(block, 16);
        let mut summed = block.to_vec();
        if let Some(field) = summed.get_mut(16..20) {
            field.fill(0);
        }
        sum == Some(checksum(self.seed, &summed))
    }
}
