//! One layer's map against its data file, streamed: what `check` does with each layer. Any bytes are answered;
//! memory is one buffer, whatever the sizes.
//!
//! ```text
//! map        │ data ■ │ absent │ zero 0 │ data ■ │        ■ in the file or a hole: both right, a hole reads as zeros
//! data file  │ ■■■■■■ │ ■■     │        │        │ end    ■ where the map says absent or zero: leaked space, no damage
//!                       ▲ leak                    ▲ data beyond the end: damage
//! ```

use std::io;

use crate::{
    header::{BLOCK_BYTES, Header, MAP_OFFSET},
    map::PAGE_BYTES,
    media::Media,
};

/// Bytes of a map that are looked at together.
const PART_BYTES: u64 = 64 * 1024;

/// What a scan found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Scan {
    pub(crate) data_bytes: u64,
    pub(crate) zero_bytes: u64,
    pub(crate) leaked_bytes: u64,
    /// Bytes of the map with a state that does not exist, and the first one's place in the file.
    pub(crate) damaged: u64,
    pub(crate) damaged_at: u64,
    /// Bits set for blocks that the layer has not.
    pub(crate) beyond_at: Option<u64>,
    /// Bytes that the map calls data and that lie past the end of the data file.
    pub(crate) missing_bytes: u64,
}

/// Bytes of the map file of a layer, with header and padding.
pub(crate) fn map_file_bytes(header: &Header) -> u64 {
    MAP_OFFSET + header.blocks().div_ceil(4).next_multiple_of(PAGE_BYTES as u64)
}

/// Bytes of the file in `[at, end)` that are not holes.
pub(crate) fn allocated(data: &Media, mut at: u64, end: u64) -> u64 {
    let mut sum = 0;
    while at < end {
        let (len, hole) = data.extent_at(at, end);
        sum += if hole { 0 } else { len };
        // A file system that answered nothing would keep us here forever.
        at += len.max(1);
    }
    sum
}

/// Reads the map of a layer that has one below, and compares it with the data file of `data_len` bytes.
pub(crate) fn scan(map: &Media, data: &Media, data_len: u64, header: &Header) -> io::Result<Scan> {
    let map_end = map.len()?.min(map_file_bytes(header));
    let mut state = Scanner { scan: Scan::default(), header, data, data_len, block: 0, open: None };
    let mut buffer = vec![0; PART_BYTES as usize];
    let mut at = MAP_OFFSET;
    while at < map_end {
        let part_len = (map_end - at).min(PART_BYTES);
        let Some(part) = buffer.get_mut(..part_len as usize) else { break };
        map.read_exact_at(part, at)?;
        state.part(part, at);
        at += part_len;
    }
    // What the map file does not reach is absent.
    let rest = header.blocks().saturating_sub(state.block);
    state.blocks(0, rest);
    state.close();
    Ok(state.scan)
}

struct Scanner<'a> {
    scan: Scan,
    header: &'a Header,
    data: &'a Media,
    data_len: u64,
    /// The next block.
    block: u64,
    /// Where a run of blocks that are not data began.
    open: Option<u64>,
}

impl Scanner<'_> {
    fn part(&mut self, bytes: &[u8], at: u64) {
        let (words, rest) = bytes.as_chunks::<8>();
        let mut at = at;
        for word in words {
            self.word(u64::from_le_bytes(*word), 8, at);
            at += 8;
        }
        for byte in rest {
            self.word(u64::from(*byte), 1, at);
            at += 1;
        }
    }

    /// `bytes` bytes of states, 4 blocks each.
    fn word(&mut self, word: u64, bytes: u64, at: u64) {
        let left = self.header.blocks().saturating_sub(self.block);
        let count = (bytes * 4).min(left);
        let all = |bits: u64| word == (bits * 0x5555_5555_5555_5555) >> (64 - bytes * 8);
        if count == bytes * 4 && (all(0) || all(1) || all(2)) {
            return self.blocks(word & 3, count);
        }
        for i in 0..bytes * 4 {
            let bits = (word >> (i * 2)) & 3;
            if i < count && bits < 3 {
                self.blocks(bits, 1);
                continue;
            }
            if bits != 0 && i >= count {
                self.scan.beyond_at.get_or_insert(at);
            }
            if bits == 3 && i < count {
                if self.scan.damaged == 0 {
                    self.scan.damaged_at = at;
                }
                self.scan.damaged += 1;
                // What it meant is unknown, so it is no leak either.
                self.blocks(1, 1);
                self.scan.data_bytes = self.scan.data_bytes.saturating_sub(BLOCK_BYTES);
            }
        }
    }

    /// `count` blocks of one state.
    fn blocks(&mut self, bits: u64, count: u64) {
        if count == 0 {
            return;
        }
        let start = (self.block * BLOCK_BYTES).min(self.header.size_bytes);
        self.block += count;
        let end = (self.block * BLOCK_BYTES).min(self.header.size_bytes);
        if bits != 1 {
            self.scan.zero_bytes += if bits == 2 { end - start } else { 0 };
            self.open.get_or_insert(start);
            return;
        }
        self.close_at(start);
        self.scan.data_bytes += end - start;
        self.scan.missing_bytes += end.saturating_sub(self.data_len.max(start));
    }

    fn close_at(&mut self, end: u64) {
        if let Some(start) = self.open.take() {
            self.scan.leaked_bytes += allocated(self.data, start, end);
        }
    }

    fn close(&mut self) {
        self.close_at(self.header.size_bytes);
    }
}
