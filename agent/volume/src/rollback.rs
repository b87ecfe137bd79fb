//! Back to a snapshot of a stopped volume: a new head over the snapshot's layer. What was written since is lost.
//!
//! ```text
//! before   0 ──► 1 "s1" ──► 2 "s2" ──► 3 (head)
//! after    0 ──► 1 "s1" ──► 4 (head, empty)          2 and 3 are leftovers
//! ```
//!
//! The new head is complete and synced before the header of the snapshot's layer names it, which is the commit point: one slot.
//! Its number is higher than all others of the chain, so that no file that it replaces can be one that a clone shares.

use std::io;

use crate::{
    chain::walk,
    crypto::{self, VdcSecret},
    error::{OpenError, RollbackError},
    header::{Header, HeaderState},
    layer,
    media::{Lock, Media},
    sealed::MapLock,
    volume::{Access, LayerFiles, VolumeFiles, now_s},
};

/// A volume that went back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RolledBack {
    /// Number of the new head.
    pub head: u64,
    /// Size of the volume, bytes: what it was at the snapshot.
    pub size_bytes: u64,
    /// Numbers of the layers that left the chain: their files may be removed.
    pub left: Vec<u64>,
}

impl VolumeFiles {
    /// Puts a stopped volume back to the snapshot `name`. `new_head` becomes layer `head + 1` and is emptied: the caller
    /// named it so and has synced the directory. Later snapshots are lost, and refused unless `discard_later`. `key` is that
    /// of the vdc when the volume may be encrypted.
    ///
    /// After a crash at any point the volume is as before, or went back.
    pub fn rollback(
        &self,
        name: &str,
        new_head: LayerFiles,
        discard_later: bool,
        key: Option<&VdcSecret>,
    ) -> Result<RolledBack, RollbackError> {
        let new_head = (Media::new(new_head.data), Media::new(new_head.map));
        Stopped::lock(self.media().map_err(io_error("duplicate a descriptor"))?)?.rollback(
            name,
            new_head,
            discard_later,
            key,
        )
    }
}

fn io_error(what: &'static str) -> impl Fn(io::Error) -> RollbackError {
    move |source| RollbackError::Io { what, source }
}

/// A volume whose head is locked, so that nobody has it open or changes its chain.
pub(crate) struct Stopped {
    files: Vec<(Media, Media)>,
    chain: Vec<(usize, Header)>,
    locked: Media,
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.locked.unlock();
    }
}

impl Stopped {
    pub(crate) fn lock(files: Vec<(Media, Media)>) -> Result<Stopped, RollbackError> {
        if files.is_empty() {
            return Err(OpenError::Empty.into());
        }
        let chain = walk(&files, Access::ReadWrite, None)?;
        let (top, head) = chain.last().expect("a walk has at least the bottom");
        let (locked, layer) = (files[*top].0.clone(), head.layer);
        let in_use = || RollbackError::Open(OpenError::InUse { layer });
        if !locked.try_lock(Lock::Exclusive).map_err(io_error("lock the head"))? {
            return Err(in_use());
        }
        let stopped = Stopped { files, chain, locked };
        // Between our look and our lock somebody may have changed the chain, and gone.
        match walk(&stopped.files, Access::ReadWrite, None) {
            Ok(again) if again == stopped.chain => Ok(stopped),
            _ => Err(in_use()),
        }
    }

    /// The number of the new head.
    pub(crate) fn next(&self) -> Result<u64, RollbackError> {
        let head = self.chain.last().map(|(_, head)| head.layer);
        head.and_then(|n| n.checked_add(1)).filter(|n| *n < u64::MAX).ok_or(RollbackError::Numbers)
    }

    pub(crate) fn rollback(
        &self,
        name: &str,
        new_head: (Media, Media),
        discard_later: bool,
        key: Option<&VdcSecret>,
    ) -> Result<RolledBack, RollbackError> {
        let went = self.go_back(name, &new_head, discard_later, key);
        new_head.0.unlock();
        went
    }

    fn go_back(
        &self,
        name: &str,
        (data, map_file): &(Media, Media),
        discard_later: bool,
        key: Option<&VdcSecret>,
    ) -> Result<RolledBack, RollbackError> {
        let named = |h: &Header| h.state != HeaderState::Head && !h.snapshot.is_empty();
        let at = self.chain.iter().position(|(_, header)| named(header) && header.snapshot == name);
        let Some((below, later)) = at.and_then(|at| self.chain.split_at_checked(at + 1)) else {
            return Err(OpenError::NoSuchSnapshot(name.to_owned()).into());
        };
        let (Some((index, point)), Some((_, head))) = (below.last(), later.last()) else {
            return Err(OpenError::NoSuchSnapshot(name.to_owned()).into());
        };
        let lost: Vec<_> = later.iter().filter(|(_, h)| named(h)).map(|(_, h)| h.snapshot.clone()).collect();
        if !lost.is_empty() && !discard_later {
            return Err(RollbackError::Later(lost));
        }
        let number = self.next()?;
        // The head that goes says whether the volume is encrypted; a snapshot's layer may be its plain bottom.
        if let (Some(wrapped), Some(key)) = (&head.key, key) {
            // Another vdc's key would make a volume that no single key opens.
            key.unwrap_key(wrapped, head.layer)?;
        }
        let (wrapped, _) = crypto::new_layer(head, key, number)?;
        let header = Header {
            layer: number,
            key: wrapped,
            parent: Some(point.layer),
            state: HeaderState::Head,
            snapshot: String::new(),
            time_s: now_s(),
            sequence: 0,
            // Who was the last writer is not forgotten by going back.
            generation: head.generation,
            ..point.clone()
        };
        layer::initialize(data, map_file, &header, false)?;
        let mut changed = point.clone();
        changed.state = HeaderState::Sealed { successor: number };
        changed.sequence = changed.sequence.wrapping_add(1);
        // Under the map's lock: who releases from this snapshot must know what lies above it (`release.rs`).
        let map = &self.files[*index].1;
        let held = MapLock::take(map).map_err(io_error("lock a map file"))?;
        layer::write_header(map, &changed).map_err(io_error("name the new head"))?;
        drop(held);
        let left = later.iter().map(|(_, header)| header.layer).collect();
        Ok(RolledBack { head: number, size_bytes: point.size_bytes, left })
    }
}
