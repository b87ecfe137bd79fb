//! The whole metadata of a qcow2 image, before any of its data are used: each L2 table and each cluster lies in the file,
//! has one owner, and is counted.
//!
//! ```text
//! owners: one bit for each cluster of the file        L1 ─► L2 ─► data: a bit that is set already is a second owner
//! counts: a used cluster whose refcount is 0 will be given away by the next writer: the image is damaged
//! ```
//! Memory: the L1 table (32 MiB at most), one L2 table, one refcount block, and twice the bits ([`CLUSTERS_MAX`]).

use super::{
    FormatError,
    qcow2::{COPIED, DIRTY, Entry, Header, OFFSET_MASK, Place, malformed},
    source::{Source, be64, field},
};

/// Clusters of the largest file that is looked at: 64 MiB of bits, 32 TiB with the usual clusters.
const CLUSTERS_MAX: u64 = 1 << 29;

struct Owners {
    bits: Vec<u64>,
    /// Of these, which hold compressed clusters: several may share one.
    packed: Vec<u64>,
    /// The fewest bytes that all compressed clusters can have.
    packed_bytes_min: u64,
    cluster_bits: u32,
}

impl Owners {
    /// Takes the clusters of a range; they must be nobody's.
    fn take(&mut self, what: &str, offset: u64, len: u64) -> Result<(), FormatError> {
        let last = offset.saturating_add(len.max(1) - 1) >> self.cluster_bits;
        for cluster in offset >> self.cluster_bits..=last {
            let bit = 1 << (cluster % 64);
            match self.bits.get_mut((cluster / 64) as usize) {
                Some(word) if *word & bit == 0 => *word |= bit,
                Some(_) => {
                    return malformed(format!("the {what} at {offset:#x} is used for something else, too"));
                }
                None => return malformed(format!("the {what} at {offset:#x} lies outside the file")),
            }
        }
        Ok(())
    }

    fn has(&self, cluster: u64) -> bool {
        self.bits.get((cluster / 64) as usize).is_some_and(|word| word >> (cluster % 64) & 1 != 0)
    }

    /// Takes the clusters of a compressed one: nobody's, or those of other compressed ones.
    fn share(&mut self, offset: u64, len: u64) -> Result<(), FormatError> {
        // The length counts sectors: the true one may be shorter by almost one.
        self.packed_bytes_min = self.packed_bytes_min.saturating_add(len.saturating_sub(511).max(1));
        let last = offset.saturating_add(len.max(1) - 1) >> self.cluster_bits;
        for cluster in offset >> self.cluster_bits..=last {
            let (at, bit) = ((cluster / 64) as usize, 1 << (cluster % 64));
            let (Some(word), Some(packed)) = (self.bits.get_mut(at), self.packed.get_mut(at)) else {
                return malformed(format!("a compressed cluster at {offset:#x} lies outside the file"));
            };
            if *word & !*packed & bit != 0 {
                return malformed(format!("the compressed cluster at {offset:#x} lies in something else"));
            }
            *word |= bit;
            *packed |= bit;
        }
        Ok(())
    }
}

/// See the head of this file.
pub(super) fn check(source: &Source, header: &Header, l1: &[u64]) -> Result<(), FormatError> {
    let clusters = source.len().div_ceil(header.cluster());
    if clusters > CLUSTERS_MAX {
        return malformed(format!("{clusters} clusters are too many: convert it to larger clusters first"));
    }
    let words = clusters.div_ceil(64) as usize;
    let mut owners = Owners {
        bits: vec![0; words],
        packed: vec![0; words],
        packed_bytes_min: 0,
        cluster_bits: header.cluster_bits,
    };
    owners.take("header", 0, 1)?;
    owners.take("L1 table", header.l1_offset, header.l1_entries * 8)?;
    owners.take("refcount table", header.refcount_offset, header.refcount_bytes)?;
    for entry in l1 {
        let offset = entry & OFFSET_MASK;
        if entry & !(OFFSET_MASK | COPIED) != 0 {
            return malformed(format!("an L1 entry has reserved bits: {entry:#x}"));
        }
        if offset == 0 {
            continue;
        }
        if !offset.is_multiple_of(header.cluster()) || !source.holds(offset, header.cluster()) {
            return malformed(format!("an L2 table at {offset:#x} is not a cluster of the file"));
        }
        owners.take("L2 table", offset, header.cluster())?;
        let table = be64(&source.table(offset, header.cluster() as usize)?);
        check_l2(source, header, &table, &mut owners)?;
    }
    // Many clusters over the same bytes would make a small file a huge disk.
    if owners.packed_bytes_min > source.len() {
        return malformed("its compressed clusters overlap");
    }
    check_refcounts(source, header, &owners)
}

fn check_l2(source: &Source, header: &Header, table: &[u64], owners: &mut Owners) -> Result<(), FormatError> {
    let words = (header.l2_entry_bytes() / 8) as usize;
    for pair in table.chunks(words) {
        let word = pair.first().copied().unwrap_or_default();
        let bitmap = pair.get(1).copied().unwrap_or_default();
        if word == 0 && bitmap == 0 {
            continue;
        }
        let entry = Entry { word, bitmap };
        if let (Place::Packed { offset, bytes }, _) = header.place(entry, 0) {
            let fits = offset < source.len() && bytes <= header.cluster().saturating_mul(2) && bitmap == 0;
            if !fits || word & COPIED != 0 {
                return malformed(format!("a compressed cluster of {bytes} bytes at {offset:#x}"));
            }
            owners.share(offset, bytes.min(source.len() - offset))?;
            continue;
        }
        let zero = u64::from(header.version == 3 && !header.extended());
        if word & !(OFFSET_MASK | COPIED | zero) != 0 {
            return malformed(format!("an L2 entry has reserved bits: {word:#x}"));
        }
        let offset = word & OFFSET_MASK;
        if bitmap & (bitmap >> 32) & 0xffff_ffff != 0 || (offset == 0 && bitmap & 0xffff_ffff != 0) {
            return malformed(format!("an L2 entry's bitmap makes no sense: {bitmap:#x}"));
        }
        if offset == 0 {
            continue;
        }
        // The last cluster of a file may be cut short.
        if !offset.is_multiple_of(header.cluster()) || offset >= source.len() {
            return malformed(format!("a cluster at {offset:#x} is not one of the file"));
        }
        owners.take("cluster", offset, header.cluster())?;
    }
    Ok(())
}

/// Each used cluster is counted, and the tables that count lie in the file.
fn check_refcounts(source: &Source, header: &Header, owners: &Owners) -> Result<(), FormatError> {
    let bits = 1_u64 << header.refcount_order;
    let in_block = header.cluster() * 8 / bits;
    let clusters = source.len().div_ceil(header.cluster());
    // It was not closed in order: its counts may be behind, and are made anew by the next writer.
    let trusted = header.incompatible & DIRTY == 0;
    for (i, entry) in
        be64(&source.table(header.refcount_offset, header.refcount_bytes as usize)?).iter().enumerate()
    {
        let first = (i as u64).saturating_mul(in_block);
        if *entry != 0 && (!entry.is_multiple_of(header.cluster()) || !source.holds(*entry, header.cluster()))
        {
            return malformed(format!("a refcount block at {entry:#x} is not a cluster of the file"));
        }
        if first >= clusters || !trusted {
            continue;
        }
        let block = if *entry == 0 { Vec::new() } else { source.table(*entry, header.cluster() as usize)? };
        for cluster in first..first.saturating_add(in_block).min(clusters) {
            if owners.has(cluster) && count(&block, cluster - first, header.refcount_order) == 0 {
                let at = cluster << header.cluster_bits;
                return malformed(format!(
                    "the cluster at {at:#x} is used, but its refcount is 0: repair it first, `qemu-img check -r all`"
                ));
            }
        }
    }
    let counted = (header.refcount_bytes / 8).saturating_mul(in_block);
    if trusted && (counted..clusters).any(|cluster| owners.has(cluster)) {
        return malformed("its refcount table is too short for the file");
    }
    Ok(())
}

/// An entry of a refcount block; 0 in a block that is not there.
fn count(block: &[u8], index: u64, order: u32) -> u64 {
    let index = index as usize;
    match order {
        0..3 => {
            // Less than a byte: the first entry is in the lowest bits.
            let (in_byte, bits) = (8 >> order, 1 << order);
            let byte = block.get(index / in_byte).copied().unwrap_or_default();
            u64::from(byte >> ((index % in_byte) * bits) & ((1_u16 << bits) - 1) as u8)
        }
        3 => block.get(index).copied().unwrap_or_default().into(),
        4 => u16::from_be_bytes(field(block, index * 2)).into(),
        5 => u32::from_be_bytes(field(block, index * 4)).into(),
        _ => u64::from_be_bytes(field(block, index * 8)),
    }
}
