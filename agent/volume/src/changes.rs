//! What has changed since a snapshot, from the maps alone: nothing is read but bits in memory.
//!
//! ```text
//! layer 3  head        │ ■ │   │ 0 │   │      a block has changed since s1 if a layer above
//! layer 2  sealed "s2" │   │ ■ │   │   │      s1's own names it, as data or as zeros
//! layer 1  sealed "s1" │ ■ │ ■ │   │ ■ │
//!          since s1      ▲   ▲   ▲   –
//! ```
//!
//! Conservative only where a map is: a block that was written with the bytes that it had before counts as changed, and
//! so does what lies past the size of the smallest layer involved (the volume has grown). Otherwise exact, to a grain of
//! 4 KiB. Only layers *above* the snapshot are asked, and all of those keep bits: that the bottom layer keeps none
//! costs nothing here, it only means that "since the volume was empty" is no question that can be asked.

use crate::{
    header::{BLOCK_BYTES, HeaderState},
    map::State,
    stack::Stack,
    volume::Volume,
};

/// A run of bytes that has changed since a snapshot, or has not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChangedExtent {
    /// First byte, in the volume.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Whether it may differ; if not, it does not.
    pub dirty: bool,
}

/// Why changes cannot be told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangesError {
    /// No layer at or below the top of this volume, as it was opened, is the top of that snapshot.
    #[error("the volume as opened has no snapshot named `{0}` at or below it")]
    NoSuchSnapshot(String),
}

impl Volume {
    /// What has changed in `[offset, offset + len)`, cut to the volume, between the snapshot `since` and the volume as it
    /// was opened: its head as it is now, or the later (or same) snapshot that it was opened at.
    ///
    /// At most `extents_max` extents, in order, without gaps, from `offset` on; neighbours always differ in `dirty`.
    /// They end early when there would be more: ask again from the end of the last. Empty for an empty range.
    ///
    /// A write counts once it has completed, whether or not it was flushed.
    pub fn changed_extents(
        &self,
        since: &str,
        offset: u64,
        len: u64,
        extents_max: usize,
    ) -> Result<Vec<ChangedExtent>, ChangesError> {
        let stack = self.stack();
        let base = base_of(&stack, since).ok_or_else(|| ChangesError::NoSuchSnapshot(since.to_owned()))?;
        let end = offset.saturating_add(len).min(self.size_bytes());
        Ok(changes(&stack, base, offset, end, extents_max))
    }

    /// Whether [`Volume::changed_extents`] can answer for `since`.
    pub fn knows_changes_since(&self, since: &str) -> bool {
        base_of(&self.stack(), since).is_some()
    }
}

/// Index of the layer that is the top of the snapshot.
fn base_of(stack: &Stack, since: &str) -> Option<usize> {
    stack.layers.iter().position(|layer| {
        layer
            .header()
            .is_some_and(|h| h.state != HeaderState::Head && !h.snapshot.is_empty() && h.snapshot == since)
    })
}

fn changes(stack: &Stack, base: usize, offset: u64, end: u64, extents_max: usize) -> Vec<ChangedExtent> {
    let common = common_blocks(stack, base);
    let mut extents: Vec<ChangedExtent> = Vec::new();
    let mut at = offset;
    while at < end {
        let block = at / BLOCK_BYTES;
        let max = end.div_ceil(BLOCK_BYTES) - block;
        let (dirty, run) = match common.checked_sub(block) {
            None | Some(0) => (base < stack.head_index(), max),
            Some(left) => run(stack, base, block, max.min(left)),
        };
        let stop = ((block + run) * BLOCK_BYTES).min(end);
        let full = extents.len() >= extents_max.max(1);
        match extents.last_mut() {
            Some(last) if last.dirty == dirty => last.len += stop - at,
            _ if full => break,
            _ => extents.push(ChangedExtent { offset: at, len: stop - at, dirty }),
        }
        at = stop;
    }
    extents
}

/// Blocks that all layers from `base` up have. Where their sizes differ, one that a layer has only in part is none:
/// beyond that layer's end it was zeros.
fn common_blocks(stack: &Stack, base: usize) -> u64 {
    let sizes = || stack.layers.iter().skip(base).map(|layer| layer.size_bytes);
    let (least, most) = (sizes().min().unwrap_or(0), sizes().max().unwrap_or(0));
    if least == most { least.div_ceil(BLOCK_BYTES) } else { least / BLOCK_BYTES }
}

/// Whether `block` has changed above layer `base`, and for how many blocks (`max` at most) that is known to hold.
fn run(stack: &Stack, base: usize, block: u64, max: u64) -> (bool, u64) {
    let mut max = max;
    for layer in stack.layers.iter().skip(base + 1).rev() {
        // Only the bottom has no map, and it is not above anything.
        let Some(map) = &layer.map else { return (true, max) };
        match map.run(block, max) {
            (State::Absent, run) => max = run,
            (State::Data | State::Zero, run) => return (true, run),
        }
    }
    (false, max)
}
