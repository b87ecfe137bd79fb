//! Merging a sealed layer into the next newer one, so that it can go; also while the volume is used.
//!
//! ```text
//! before     p ──► k ──► j            1  window by window: blocks that j has not and k has: copied to j's data, synced,
//! during     p ──► k ──► j ⊇ k           then j's map names them, synced. Every point reads as before at any moment.
//! after      p ──► j                  2  commit, the gate closed: one header slot. p: "my successor is j"; or, if k was the
//!                 (k: leftover)          bottom, j: "I have no parent". Then j's parent becomes p, and k's files may go.
//! ```
//!
//! Nothing is ever taken from k, and j's blocks are never overwritten: who reads goes on from k until the stack changes. If
//! j is the live head, each piece is copied under a *claim* (`shared.rs`), as a guest's first write to those blocks would be:
//! neither can overwrite the other. Each piece is inside the gate, so a snapshot or a resize waits for one piece at most, and
//! whatever it does, the next piece looks anew at which layers k and j are.
//!
//! Interrupted anywhere, the volume is whole; asked again, the merge goes on where j's map says that it was.
//! The pieces themselves are in `merge_copy.rs`. The caller's thread does all, and may pause between steps.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
};

use crate::{
    crypto::VdcSecret,
    error::{DeleteError, MergeError, OpenError},
    header::{BLOCK_BYTES, HeaderState},
    keeper,
    layer::Layer,
    media::Media,
    merge_copy::{Copier, View},
    shared::lock,
    snapshot::DRAIN_LIMIT,
    stack::Stack,
    visitor::Visitor,
    volume::{Access, Volume, VolumeFiles},
};

/// Bytes between two commits of the map, so that an interrupted merge repeats little.
const WINDOW_BYTES: u64 = 64 << 20;
/// The same in the live head: a guest's flush may have to write as much of it.
const LIVE_WINDOW_BYTES: u64 = 16 << 20;
/// Bytes that are copied inside the gate at a time. A guest that wants these blocks waits so long.
const PIECE_BYTES: u64 = 512 << 10;

/// A snapshot that was deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deleted {
    /// The layer that left the chain: its two files may be removed.
    pub layer: u64,
    /// Bytes copied to the layer above it by this call.
    pub copied_bytes: u64,
}

/// How far a merge is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MergeProgress {
    /// Bytes of the volume that are looked at.
    pub done_bytes: u64,
    /// Bytes of the volume.
    pub total_bytes: u64,
    /// Bytes that were copied so far, by this [`Merge`]: what a pace is kept by.
    pub copied_bytes: u64,
    /// The layer is out of the chain, and its files may go; but see `stays`.
    pub done: bool,
    /// The layer is the plain bottom of an encrypted volume and remains in the chain, but nobody needs its bytes any more: its
    /// data file may be replaced (by a rename) by an empty one of the same length.
    pub stays: bool,
}

/// A merge under way; dropping it leaves what was done. At most one of a volume.
#[derive(Debug)]
pub struct Merge {
    volume: Volume,
    /// Number of the layer that goes.
    layer: u64,
    visitor: Visitor,
    copier: Copier,
    window_bytes: u64,
    piece_bytes: u64,
    /// The layer above was the head when last looked at.
    live: bool,
    done: bool,
    stays: bool,
    failed: bool,
}

impl Drop for Merge {
    fn drop(&mut self) {
        self.volume.core.merging.store(false, Ordering::SeqCst);
    }
}

impl Volume {
    /// Begins, or goes on, to merge the sealed layer number `layer` into the one above it. Nothing happens until
    /// [`Merge::step`]. A layer that has left the chain already is merged at once.
    pub fn merge(&self, layer: u64) -> Result<Merge, MergeError> {
        self.merge_by(layer, WINDOW_BYTES, PIECE_BYTES)
    }

    pub(crate) fn merge_by(
        &self,
        layer: u64,
        window_bytes: u64,
        piece_bytes: u64,
    ) -> Result<Merge, MergeError> {
        let core = &self.core;
        if core.read_only {
            return Err(MergeError::ReadOnly);
        }
        if core.is_poisoned() {
            return Err(MergeError::Poisoned);
        }
        let stack = core.stack();
        let top = stack.head().header().ok_or(MergeError::Raw)?.layer;
        let view = View::of(&stack, layer);
        if view.is_none() && layer >= top {
            return Err(MergeError::NotSealed(layer));
        }
        if let Some(view) = &view {
            view.check()?;
        }
        let visitor = Visitor::new(core).map_err(io_error("make an eventfd"))?;
        if core.merging.swap(true, Ordering::SeqCst) {
            return Err(MergeError::Busy);
        }
        Ok(Merge {
            volume: self.clone(),
            layer,
            visitor,
            copier: Copier::new(piece_bytes),
            window_bytes,
            piece_bytes,
            live: false,
            done: view.is_none(),
            stays: false,
            failed: false,
        })
    }
}

fn io_error(what: &'static str) -> impl Fn(io::Error) -> MergeError {
    move |source| MergeError::Io { what, source }
}

impl Merge {
    /// Number of the layer that goes.
    pub fn layer(&self) -> u64 {
        self.layer
    }

    /// Goes on for about `bytes_max` bytes of copying, and says how far it is; the last step takes the layer out of the chain.
    ///
    /// It waits for others' I/O, so it must not be called by a thread that has to reap a queue of this volume. After an error
    /// this merge is over; a new one goes on, once the reason is gone.
    pub fn step(&mut self, bytes_max: u64) -> Result<MergeProgress, MergeError> {
        if self.failed {
            return Err(MergeError::Over);
        }
        let result = self.try_step(bytes_max);
        // A finish that others' I/O kept waiting may be tried again; nothing else may.
        self.failed = matches!(&result, Err(e) if !matches!(e, MergeError::NotDrained));
        result
    }

    fn try_step(&mut self, bytes_max: u64) -> Result<MergeProgress, MergeError> {
        let start = self.copier.copied_bytes;
        let until = start.saturating_add(bytes_max.max(1));
        while !self.done && self.copier.copied_bytes < until {
            if self.volume.core.is_poisoned() {
                return Err(MergeError::Poisoned);
            }
            let more = self.piece(until)?;
            let window = if self.live { self.window_bytes.min(LIVE_WINDOW_BYTES) } else { self.window_bytes };
            if self.copier.uncommitted_bytes >= window {
                self.commit()?;
            }
            if !more {
                self.finish()?;
            } else if self.copier.copied_bytes == start {
                // Nothing to copy for a long way: so that a caller may look up now and then.
                break;
            }
        }
        Ok(self.progress())
    }

    fn progress(&self) -> MergeProgress {
        let total_bytes = self.volume.size_bytes();
        let done_bytes = if self.done { total_bytes } else { self.copier.next_block * BLOCK_BYTES };
        MergeProgress {
            done_bytes: done_bytes.min(total_bytes),
            total_bytes,
            copied_bytes: self.copier.copied_bytes,
            done: self.done,
            stays: self.stays,
        }
    }

    /// One piece, inside the gate; false when there are no more.
    fn piece(&mut self, until: u64) -> Result<bool, MergeError> {
        let inside = self.visitor.enter();
        let stack = self.volume.core.stack();
        let view = View::of(&stack, self.layer).ok_or(MergeError::NotSealed(self.layer))?;
        self.live = view.live;
        let budget = until.saturating_sub(self.copier.copied_bytes).clamp(1, self.piece_bytes);
        self.copier.piece(&view, &inside, budget).map_err(io_error("copy to the layer above"))
    }

    /// Makes durable what was copied: data before the map that names them. Outside the gate, so that nobody who wants it closed
    /// waits for a disk: a sealed layer stays sealed, and who seals the head meanwhile has committed it.
    fn commit(&mut self) -> Result<(), MergeError> {
        let core = &self.volume.core;
        let stack = core.stack();
        let view = View::of(&stack, self.layer).ok_or(MergeError::NotSealed(self.layer))?;
        if view.live {
            keeper::commit(core)
                .map_err(|e| io_error("flush the head")(io::Error::from_raw_os_error(e.errno())))?;
            self.copier.committed();
            return Ok(());
        }
        self.copier.commit_sealed(&view).map_err(|source| {
            // What the disk has of the map is unknown, and the page cache may say otherwise: only a reopening tells.
            core.merge_broken.store(true, Ordering::SeqCst);
            io_error("sync the layer above")(source)
        })
    }

    /// Takes the layer out of the chain. All of it is in the layer above, since blocks there never become absent again.
    fn finish(&mut self) -> Result<(), MergeError> {
        self.commit()?;
        let core = Arc::clone(&self.volume.core);
        if core.merge_broken.load(Ordering::SeqCst) {
            return Err(MergeError::Poisoned);
        }
        let closed = core.close(DRAIN_LIMIT).ok_or(MergeError::NotDrained)?;
        let stack = core.stack();
        let view = View::of(&stack, self.layer).ok_or(MergeError::NotSealed(self.layer))?;
        if view.keeps_bottom() {
            (self.done, self.stays) = (true, true);
            return Ok(());
        }
        if view.live {
            // What the guest has done since, too: then the argument need not tell its writes from the merge's.
            keeper::commit(&core)
                .map_err(|e| io_error("flush the head")(io::Error::from_raw_os_error(e.errno())))?;
        }
        let _no_commit = lock(&core.commit);
        let below = view.index.checked_sub(1).and_then(|below| stack.layers.get(below));
        let into = view.into;
        let number = into.header().ok_or(MergeError::Raw)?.layer;
        let poisoned = |source| {
            // Whether it is on disk is unknown: only a reopening tells.
            core.poison();
            io_error("take the layer out of the chain")(source)
        };
        if let Some(below) = below {
            below.update_header(|h| h.state = HeaderState::Sealed { successor: number }).map_err(poisoned)?;
        }
        // For a new bottom this is the commit point. Else it only tidies: the walk accepts both parents.
        let parent = below.and_then(|below| below.header()).map(|h| h.layer);
        into.update_header(|h| h.parent = parent).map_err(poisoned)?;
        let mut layers = stack.layers.clone();
        layers.remove(view.index);
        if let (None, Some(first), Some(map_file), Some(header)) =
            (below, layers.first_mut(), &into.map_file, into.header())
        {
            // The file answers for every block now, and is read as files without a map are.
            into.end_direct();
            *first =
                Arc::new(Layer::new(into.data.clone(), map_file.clone(), header, None, into.cipher.clone()));
        }
        closed.replace_stack(Stack { layers });
        self.done = true;
        Ok(())
    }
}

impl VolumeFiles {
    /// Deletes the snapshot `name` of a stopped volume, whose files are open for writing: all other points and the head
    /// keep their bytes. See the head of `merge.rs` for what an interruption leaves.
    pub fn delete_snapshot(&self, name: &str) -> Result<Deleted, DeleteError> {
        self.delete_snapshot_with_key(name, None)
    }

    /// Like [`VolumeFiles::delete_snapshot`], with the key of the vdc when the volume may be encrypted: what one layer's
    /// data key opens is written under the other's.
    pub fn delete_snapshot_with_key(
        &self,
        name: &str,
        key: Option<&VdcSecret>,
    ) -> Result<Deleted, DeleteError> {
        let files =
            self.media().map_err(|source| OpenError::Io { what: "duplicate a descriptor", source })?;
        delete(files, name, key, (WINDOW_BYTES, PIECE_BYTES))
    }
}

/// `by`: bytes of a window, bytes of a piece.
pub(crate) fn delete(
    files: Vec<(Media, Media)>,
    name: &str,
    key: Option<&VdcSecret>,
    by: (u64, u64),
) -> Result<Deleted, DeleteError> {
    let volume = Volume::open_keyed(files, Access::ReadWrite, None, key)?;
    let found = volume.snapshots().into_iter().find(|s| s.name == name);
    let layer = found.ok_or_else(|| OpenError::NoSuchSnapshot(name.to_owned()))?.layer;
    let mut merge = volume.merge_by(layer, by.0, by.1)?;
    loop {
        let progress = merge.step(u64::MAX)?;
        if progress.done {
            return Ok(Deleted { layer, copied_bytes: progress.copied_bytes });
        }
    }
}
