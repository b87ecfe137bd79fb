//! The pieces of a merge: which blocks have to be copied from a layer to the one above, and the copying. `merge.rs` has the
//! whole, and the argument.
//!
//! The target is a sealed layer or the live head:
//!
//! - **sealed**: nobody else changes it. Its bits are set, in memory too, only after the data were synced: should that sync
//!   fail, nothing names what may be lost.
//! - **live**: each run of blocks is claimed, looked at again, copied, and its bits set before the claim is given back.
//!
//! A data file that other volumes share (more than one name) only ever gets the bytes that all of them agree upon for
//! that block, and no holes are punched into it. README.md, "Sharing", has the argument.

use std::{io, sync::Arc};

use nix::fcntl::FallocateFlags;

use crate::{
    error::MergeError,
    header::BLOCK_BYTES,
    layer::{self, Layer},
    map::{BlockMap, PAGE_BYTES, State},
    sealed::commit_merged,
    shared::Claim,
    stack::Stack,
    uring::Buffers,
    visitor::Inside,
};

/// Runs of blocks that are looked at inside the gate at a time, when nothing is to be copied.
const RUNS_MAX: u32 = 4096;
/// Blocks that are claimed at a time when only bits are set or holes made: 256 MiB.
const CLAIM_BLOCKS_MAX: u64 = 65_536;

/// The two layers of a merge, as the stack has them now.
pub(crate) struct View<'a> {
    /// Position of the layer that goes.
    pub(crate) index: usize,
    pub(crate) from: &'a Arc<Layer>,
    pub(crate) into: &'a Arc<Layer>,
    into_map: &'a BlockMap,
    /// The target is the head.
    pub(crate) live: bool,
}

impl<'a> View<'a> {
    /// None when `layer` is not in the chain, or nothing is above it.
    pub(crate) fn of(stack: &'a Stack, layer: u64) -> Option<View<'a>> {
        let index = stack.layers.iter().position(|l| l.header().is_some_and(|h| h.layer == layer))?;
        let (from, into) = (stack.layers.get(index)?, stack.layers.get(index + 1)?);
        Some(View { index, from, into, into_map: into.map.as_ref()?, live: index + 1 == stack.head_index() })
    }

    /// Whether the merge can be done at all.
    pub(crate) fn check(&self) -> Result<(), MergeError> {
        if self.is_bottom() && !self.keeps_bottom() && !self.into.data.can_punch() {
            // The guest's own discards would leave bytes behind that the map hides, and nobody asks the map of a bottom.
            return Err(MergeError::NoHoles);
        }
        Ok(())
    }

    /// The layer that goes has no map: its file answers for every block, and so must the target's in the end.
    fn is_bottom(&self) -> bool {
        self.from.map.is_none()
    }

    /// An encrypted layer cannot become the bottom, which is plain; so that remains, and only its bytes are copied.
    pub(crate) fn keeps_bottom(&self) -> bool {
        self.is_bottom() && self.into.cipher.is_some()
    }

    /// Whether the target's file itself must have zeros where its map says zero or absent.
    fn zeros_in_file(&self) -> bool {
        self.is_bottom() && !self.keeps_bottom()
    }

    /// What the layer that goes says about `block`, and for how many blocks.
    fn below(&self, block: u64, max: u64) -> (State, u64) {
        let Some(left) = self.from.blocks.checked_sub(block).filter(|left| *left > 0) else {
            // The volume was smaller then: zeros, here and in all layers below.
            return (State::Absent, max);
        };
        let max = max.min(left);
        if let Some(map) = &self.from.map {
            return map.run(block, max);
        }
        let start = block * BLOCK_BYTES;
        let end = (start + max * BLOCK_BYTES).min(self.from.size_bytes);
        let (len, hole) = self.from.data.extent_at(start, end);
        match (hole, len / BLOCK_BYTES) {
            (true, whole @ 1..) => (State::Absent, whole),
            // Partly a hole, or the end of the volume: copied like data.
            _ => (State::Data, len.div_ceil(BLOCK_BYTES).clamp(1, max)),
        }
    }

    /// What has to be done about `block`, and for how many blocks.
    fn duty(&self, block: u64, max: u64) -> (Duty, u64) {
        let (state, run) = self.into_map.run(block, max);
        match state {
            State::Data => (Duty::Nothing, run),
            State::Zero if self.zeros_in_file() => (Duty::ZeroFile, run),
            State::Zero => (Duty::Nothing, run),
            State::Absent => match self.below(block, run) {
                (State::Data, run) => (Duty::Copy, run),
                (State::Zero, run) => (Duty::MarkZero, run),
                (State::Absent, run) if self.zeros_in_file() => (Duty::ZeroFile, run),
                (State::Absent, run) => (Duty::Nothing, run),
            },
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Duty {
    Nothing,
    /// The bytes, then the bits.
    Copy,
    /// The bits.
    MarkZero,
    /// The file must read as zeros; no bits, since they are not asked afterwards.
    ZeroFile,
}

/// How far the copying is.
#[derive(Debug)]
pub(crate) struct Copier {
    pub(crate) next_block: u64,
    pub(crate) copied_bytes: u64,
    /// Copied since the last commit.
    pub(crate) uncommitted_bytes: u64,
    /// Runs of a sealed target whose bits wait for the sync of their data.
    pending: Vec<(u64, u64, State)>,
    /// Page-aligned: the head may go past the page cache.
    buffer: Buffers,
}

impl Copier {
    pub(crate) fn new(piece_bytes: u64) -> Copier {
        Copier {
            next_block: 0,
            copied_bytes: 0,
            uncommitted_bytes: 0,
            pending: Vec::new(),
            buffer: Buffers::owned(piece_bytes.max(BLOCK_BYTES) as usize),
        }
    }

    /// Goes on for about `budget` bytes of copying, inside the gate; false when the end is reached.
    pub(crate) fn piece(&mut self, view: &View<'_>, inside: &Inside<'_>, budget: u64) -> io::Result<bool> {
        let blocks = view.into.blocks;
        let until = self.copied_bytes + budget.min(self.buffer.len());
        for _ in 0..RUNS_MAX {
            if self.next_block >= blocks {
                return Ok(false);
            }
            if self.copied_bytes >= until {
                break;
            }
            let (duty, run) = view.duty(self.next_block, blocks - self.next_block);
            let run = match duty {
                Duty::Copy => run.min((until - self.copied_bytes).div_ceil(BLOCK_BYTES)),
                _ => run,
            };
            self.next_block += match (duty, view.live) {
                (Duty::Nothing, _) => run,
                (_, false) => self.sealed(view, duty, self.next_block, run)?,
                (_, true) => self.live(view, inside, duty, self.next_block, run)?,
            };
        }
        Ok(self.next_block < blocks)
    }

    fn sealed(&mut self, view: &View<'_>, duty: Duty, block: u64, run: u64) -> io::Result<u64> {
        let run = match duty {
            Duty::Copy => self.copy(view, block, run)?,
            _ => run,
        };
        match duty {
            Duty::Nothing => {}
            Duty::ZeroFile => self.zero_file(view, block, run)?,
            Duty::Copy => self.remember(block, run, State::Data),
            Duty::MarkZero => self.remember(block, run, State::Zero),
        }
        Ok(run)
    }

    fn remember(&mut self, block: u64, run: u64, state: State) {
        match self.pending.last_mut() {
            Some((first, count, last)) if *last == state && *first + *count == block => *count += run,
            _ => self.pending.push((block, run, state)),
        }
    }

    fn live(
        &mut self,
        view: &View<'_>,
        inside: &Inside<'_>,
        duty: Duty,
        block: u64,
        run: u64,
    ) -> io::Result<u64> {
        // A guest's write to any of these waits meanwhile: for one copy, or for some calls that copy nothing.
        let run = run.min(match duty {
            Duty::Copy => self.buffer.len() / BLOCK_BYTES,
            _ => CLAIM_BLOCKS_MAX,
        });
        let _claimed = inside.claim(Claim { first: block, count: run });
        // Before the claim, others may have written here.
        let (duty, run) = view.duty(block, run);
        match duty {
            Duty::Nothing => {}
            Duty::ZeroFile => self.zero_file(view, block, run)?,
            Duty::MarkZero => view.into_map.set(block, run, State::Zero),
            Duty::Copy => {
                let run = self.copy(view, block, run)?;
                view.into_map.set(block, run, State::Data);
                return Ok(run);
            }
        }
        Ok(run)
    }

    /// Copies at most as much as the buffer holds; the blocks that were.
    fn copy(&mut self, view: &View<'_>, block: u64, run: u64) -> io::Result<u64> {
        let run = run.min(self.buffer.len() / BLOCK_BYTES);
        let at = block * BLOCK_BYTES;
        let len = ((block + run) * BLOCK_BYTES).min(view.into.size_bytes) - at;
        let bytes = self.bytes(len);
        // The last block of a smaller layer ends early, and zeros follow.
        let (there, beyond) = bytes.split_at_mut(view.from.size_bytes.saturating_sub(at).min(len) as usize);
        layer::read_at(&view.from.data, view.from.cipher.as_deref(), there, at)?;
        beyond.fill(0);
        layer::write_at(&view.into.data, view.into.cipher.as_deref(), bytes, at)?;
        self.copied_bytes += len;
        self.uncommitted_bytes += len;
        Ok(run)
    }

    /// The first bytes of the buffer.
    fn bytes(&mut self, len: u64) -> &mut [u8] {
        let bytes = self.buffer.as_mut_slice().and_then(|bytes| bytes.get_mut(..len as usize));
        bytes.expect("what is asked for was cut to the buffer, which is owned")
    }

    /// Makes blocks of the target's file read as zeros.
    fn zero_file(&mut self, view: &View<'_>, block: u64, run: u64) -> io::Result<()> {
        let data = &view.into.data;
        let (mut at, end) = (block * BLOCK_BYTES, ((block + run) * BLOCK_BYTES).min(view.into.size_bytes));
        let shared = data.links()? > 1;
        while at < end {
            let (len, hole) = data.extent_at(at, end);
            let len = len.max(1);
            if !hole && !shared {
                let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                data.fallocate(punch, at, len)?;
                self.uncommitted_bytes += BLOCK_BYTES;
            } else if !hole {
                self.write_zeros(view, at, len)?;
            }
            at += len;
        }
        Ok(())
    }

    /// Without a hole, and without a write where zeros are already.
    fn write_zeros(&mut self, view: &View<'_>, mut at: u64, len: u64) -> io::Result<()> {
        let end = at + len;
        while at < end {
            let len = (end - at).min(self.buffer.len());
            let bytes = self.bytes(len);
            view.into.data.read_exact_at(bytes, at)?;
            if bytes.iter().any(|byte| *byte != 0) {
                bytes.fill(0);
                view.into.data.write_all_at(bytes, at)?;
                self.uncommitted_bytes += len;
            }
            at += len;
        }
        Ok(())
    }

    /// Data, then the bits, in memory and in the file.
    pub(crate) fn commit_sealed(&mut self, view: &View<'_>) -> io::Result<()> {
        if self.uncommitted_bytes > 0 {
            view.into.data.sync_data()?;
        }
        for (block, run, state) in self.pending.drain(..) {
            view.into_map.set(block, run, state);
        }
        let mut pages: Vec<(u64, [u8; PAGE_BYTES])> = Vec::new();
        view.into_map.take_dirty(&mut pages);
        if let (Some(file), Some(header)) = (&view.into.map_file, view.into.header()) {
            commit_merged(file, &header, &pages)?;
        }
        self.committed();
        Ok(())
    }

    pub(crate) fn committed(&mut self) {
        self.uncommitted_bytes = 0;
    }
}
