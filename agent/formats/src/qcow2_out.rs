//! qcow2, written: version 3, clusters of 64 KiB, refcounts of 16 bits, for a disk that comes once from its start.
//!
//! ```text
//! 0 header │ L1 │ data and L2 tables as they come … │ refcount blocks │ refcount table
//! ```
//! Clusters of zeros are left out. The header is written last, after all else is synced: a file that was broken off is no
//! image, and nobody takes it for one. Memory: the L1 table and one L2 table.

use std::{fs::File, io, os::unix::fs::FileExt};

use super::qcow2::{COPIED, MAGIC};

/// Bytes of a cluster.
pub const CLUSTER: u64 = 1 << CLUSTER_BITS;
const CLUSTER_BITS: u32 = 16;
/// Entries of an L2 table.
const L2_ENTRIES: u64 = CLUSTER / 8;
/// Entries of a refcount block.
const BLOCK_ENTRIES: u64 = CLUSTER / 2;

/// See the head of this file.
#[derive(Debug)]
pub struct Writer<'a> {
    file: &'a File,
    size: u64,
    l1: Vec<u64>,
    /// The L2 table in use: its place in the L1 table, and its entries.
    l2: Option<(usize, Vec<u64>)>,
    /// The first cluster that is free.
    next: u64,
}

impl<'a> Writer<'a> {
    /// Begins an image of `size` bytes in an empty file.
    pub fn new(file: &'a File, size: u64) -> Writer<'a> {
        let l1_entries = size.div_ceil(CLUSTER * L2_ENTRIES);
        let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER);
        // The size of a volume is bounded, and with it the table: 2^46 / 2^29.
        let l1 = vec![0; l1_entries as usize];
        Writer { file, size, l1, l2: None, next: 1 + l1_clusters }
    }

    /// Puts a cluster; the last one of a disk may be shorter. Offsets only grow.
    pub fn put(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let (cluster, span) = (offset / CLUSTER, CLUSTER * L2_ENTRIES);
        let index = (offset / span) as usize;
        if self.l2.as_ref().is_none_or(|(known, _)| *known != index) {
            self.end_l2()?;
            self.l2 = Some((index, vec![0; L2_ENTRIES as usize]));
        }
        let at = self.take();
        self.file.write_all_at(data, at)?;
        if let Some((_, table)) = &mut self.l2
            && let Some(entry) = table.get_mut((cluster % L2_ENTRIES) as usize)
        {
            *entry = at | COPIED;
        }
        Ok(())
    }

    fn take(&mut self) -> u64 {
        let at = self.next * CLUSTER;
        self.next += 1;
        at
    }

    fn end_l2(&mut self) -> io::Result<()> {
        let Some((index, table)) = self.l2.take() else { return Ok(()) };
        let at = self.take();
        self.file.write_all_at(&be64(&table), at)?;
        if let Some(entry) = self.l1.get_mut(index) {
            *entry = at | COPIED;
        }
        Ok(())
    }

    /// Writes what is left, syncs, and only then the header. Gives back the file's length.
    pub fn finish(mut self) -> io::Result<u64> {
        self.end_l2()?;
        self.file.write_all_at(&be64(&self.l1), CLUSTER)?;
        // The blocks and the table count themselves, too.
        let (mut blocks, mut table) = (1, 1);
        while blocks * BLOCK_ENTRIES < self.next + blocks + table {
            blocks = (self.next + blocks + table).div_ceil(BLOCK_ENTRIES);
            table = (blocks * 8).div_ceil(CLUSTER);
        }
        let total = self.next + blocks + table;
        let first = self.next;
        for block in 0..blocks {
            let used = total.saturating_sub(block * BLOCK_ENTRIES).min(BLOCK_ENTRIES) as usize;
            let mut counts = [0, 1].repeat(used);
            counts.resize(CLUSTER as usize, 0);
            self.file.write_all_at(&counts, (first + block) * CLUSTER)?;
        }
        let entries: Vec<u64> = (0..blocks).map(|block| (first + block) * CLUSTER).collect();
        let table_at = (first + blocks) * CLUSTER;
        self.file.write_all_at(&be64(&entries), table_at)?;
        self.file.set_len(total * CLUSTER)?;
        self.file.sync_all()?;
        self.file.write_all_at(&self.header(table_at, table), 0)?;
        self.file.sync_all()?;
        Ok(total * CLUSTER)
    }

    fn header(&self, table_at: u64, table_clusters: u64) -> Vec<u8> {
        let mut out = Vec::with_capacity(112);
        // Their number is bounded by that of the disk's clusters.
        let small = |n: u64| (n as u32).to_be_bytes();
        out.extend(MAGIC.to_be_bytes());
        out.extend(3_u32.to_be_bytes());
        // No backing file.
        out.extend([0; 12]);
        out.extend(CLUSTER_BITS.to_be_bytes());
        out.extend(self.size.to_be_bytes());
        out.extend(0_u32.to_be_bytes());
        out.extend(small(self.l1.len() as u64));
        out.extend(CLUSTER.to_be_bytes());
        out.extend(table_at.to_be_bytes());
        out.extend(small(table_clusters));
        // No snapshots, no features, refcounts of 2^4 bits, the header's length, deflate, padding, no extensions.
        out.extend([0; 12]);
        out.extend([0; 24]);
        out.extend(4_u32.to_be_bytes());
        out.extend(112_u32.to_be_bytes());
        out.extend([0; 8]);
        out.extend([0; 8]);
        out
    }
}

fn be64(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|n| n.to_be_bytes()).collect()
}
