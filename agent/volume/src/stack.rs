//! The layers of a volume, and where a block's bytes are.

use std::sync::Arc;

use crate::{
    header::BLOCK_BYTES,
    layer::Layer,
    map::{BlockMap, State},
    uring::Backing,
};

/// Layers in one stack: two descriptors each must fit into one control message (253). Past it a snapshot is refused.
pub(crate) const LAYERS_MAX: usize = 120;

/// A run of bytes of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes.
    pub len: u64,
    /// No space is used for it and it reads as zeros.
    pub hole: bool,
}

/// Where a run of blocks is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// In this layer's data file, at its own offset.
    Layer(usize),
    /// Nowhere: zeros.
    Zero,
}

/// The layers, bottom first. Immutable: a snapshot makes a new one.
pub(crate) struct Stack {
    pub(crate) layers: Vec<Arc<Layer>>,
}

impl Stack {
    pub(crate) fn head(&self) -> &Arc<Layer> {
        self.layers.last().expect("a stack is made with at least one layer")
    }

    /// Index of the head, which is also its index in a driver's files.
    pub(crate) fn head_index(&self) -> usize {
        self.layers.len() - 1
    }

    /// The head's map, if there is something below it to ask.
    pub(crate) fn head_map(&self) -> Option<&BlockMap> {
        self.head().map.as_ref()
    }

    pub(crate) fn files(&self) -> Vec<Backing> {
        let backing = |layer: &Arc<Layer>| Backing {
            media: layer.data.clone(),
            cipher: layer.cipher.clone(),
            direct: layer.is_direct(),
        };
        self.layers.iter().map(backing).collect()
    }

    /// Where `block` is, asking the layers below index `top`, and for how many blocks (`max` at most) that holds.
    pub(crate) fn resolve(&self, top: usize, block: u64, max: u64) -> (Source, u64) {
        let mut max = max;
        for (index, layer) in self.layers.iter().enumerate().take(top).rev() {
            if block >= layer.blocks {
                // The volume was smaller then: what it has grown by since is zeros until written.
                return (Source::Zero, max);
            }
            let inside = max.min(layer.blocks - block);
            let Some(map) = &layer.map else { return (Source::Layer(index), inside) };
            match map.run(block, inside) {
                (State::Data, run) => return (Source::Layer(index), run),
                (State::Zero, run) => return (Source::Zero, run),
                (State::Absent, run) => max = run,
            }
        }
        (Source::Zero, max)
    }

    /// Calls `each` for the runs of bytes `[offset, offset + len)` in order, each from one source; a run never
    /// reaches past the end of its layer's file.
    pub(crate) fn byte_runs(&self, offset: u64, len: u64, mut each: impl FnMut(Source, u64, u64)) {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let block = at / BLOCK_BYTES;
            let (source, run) = self.resolve(self.layers.len(), block, end.div_ceil(BLOCK_BYTES) - block);
            let stop = ((block + run) * BLOCK_BYTES).min(end);
            match source {
                Source::Layer(index) if self.layers[index].size_bytes < stop => {
                    // A smaller layer's last block ends inside a block; zeros follow.
                    let edge = self.layers[index].size_bytes.max(at);
                    if edge > at {
                        each(source, at, edge - at);
                    }
                    each(Source::Zero, edge, stop - edge);
                }
                _ => each(source, at, stop - at),
            }
            at = stop;
        }
    }

    /// Calls `each` with the extents of `[offset, offset + len)` in order until it returns false. Adjacent
    /// extents may be alike.
    pub(crate) fn extents(&self, offset: u64, len: u64, mut each: impl FnMut(Extent) -> bool) {
        let end = offset + len;
        let mut at = offset;
        let mut go_on = true;
        while at < end && go_on {
            let block = at / BLOCK_BYTES;
            let (source, run) = self.resolve(self.layers.len(), block, end.div_ceil(BLOCK_BYTES) - block);
            let stop = ((block + run) * BLOCK_BYTES).min(end);
            match source {
                Source::Zero => go_on = each(Extent { len: stop - at, hole: true }),
                // Only the bottom has no map; the file system knows its holes.
                Source::Layer(index) if self.layers[index].map.is_none() => {
                    while at < stop && go_on {
                        let (len, hole) = self.layers[index].data.extent_at(at, stop);
                        go_on = each(Extent { len, hole });
                        at += len;
                    }
                }
                Source::Layer(_) => go_on = each(Extent { len: stop - at, hole: false }),
            }
            at = stop;
        }
    }
}
