//! Snapshots: hold a volume still, seal its head, go on in a new one.
//!
//! ```text
//! Volume ──hold──► Held ──seal──► the gate opens; I/O goes to the new head
//!                    └───drop───► the gate opens; nothing has happened
//! ```
//!
//! While a [`Held`] exists, no operation of any queue is under way and none begins: what was answered before is in the
//! snapshot, what is answered later is not. Several volumes that are all held, and only then sealed, are cut at one
//! instant. A guest waits meanwhile, so a hold ahead flushes, and is meant to last milliseconds.
//!
//! The order of the syncs, which is the crash argument, stands in README.md.

use std::{io, sync::Arc, time::Duration};

use crate::{
    crypto,
    error::{CreateError, IoError, SnapshotError},
    header::{Header, HeaderState, NAME_BYTES_MAX},
    keeper,
    layer::{self, Layer},
    map::BlockMap,
    media::Media,
    shared::{Closed, lock},
    stack::{LAYERS_MAX, Stack},
    volume::{LayerFiles, SnapshotInfo, Volume, now_s},
};

/// How long a snapshot waits for I/O under way. The guest's new I/O waits as long.
pub(crate) const DRAIN_LIMIT: Duration = Duration::from_millis(5_000);

/// A volume that is held still. Dropping it lets go; see the head of `snapshot.rs`.
#[must_use = "dropping it lets the volume go again"]
pub struct Held {
    volume: Volume,
    closed: Closed,
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Held({:?})", self.volume)
    }
}

impl Volume {
    /// Holds the volume still: what is dirty is flushed ahead, new I/O of all queues waits, that under way ends
    /// (`limit` at most, else nothing was done).
    ///
    /// It must not be called by a thread that has to reap a queue of this volume, nor twice at once by one thread.
    pub fn hold(&self, limit: Duration) -> Result<Held, SnapshotError> {
        self.check_holdable()?;
        // Most of the work of the sync in `seal` is done before anybody has to wait for it.
        commit(self)?;
        let closed = self.core.close(limit);
        let closed =
            closed.ok_or(SnapshotError::NotDrained(limit.as_millis().try_into().unwrap_or(u64::MAX)))?;
        Ok(Held { volume: self.clone(), closed })
    }

    /// Makes durable what has been answered until now, as a guest's flush does. Who holds several volumes calls it for
    /// all of them first, so that none waits held while another one's disk is busy.
    pub fn flush(&self) -> Result<(), SnapshotError> {
        self.check_holdable()?;
        commit(self)
    }

    /// Seals the head under the name `name` and goes on in `new_head`, whose files are emptied and become layer
    /// `head + 1`: the caller named them so and has synced their directory.
    ///
    /// Waits for I/O under way in every queue, so it must not be called by a thread that has to reap one.
    /// After a crash at any point the volume opens either as before or with the snapshot, see README.md.
    pub fn snapshot(&self, new_head: LayerFiles, name: &str) -> Result<SnapshotInfo, SnapshotError> {
        self.snapshot_media((Media::new(new_head.data), Media::new(new_head.map)), name)
    }

    pub(crate) fn snapshot_media(
        &self,
        new_head: (Media, Media),
        name: &str,
    ) -> Result<SnapshotInfo, SnapshotError> {
        self.check_snapshot(name)?;
        self.hold(DRAIN_LIMIT)?.seal_media(new_head, name)
    }

    /// Whether a snapshot named `name` could be taken now: what would refuse it before anything is done.
    pub fn check_snapshot(&self, name: &str) -> Result<(), SnapshotError> {
        let bad = |why| Err(SnapshotError::Name { name: name.to_owned(), why });
        self.check_holdable()?;
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return bad("it must have 1 to 255 bytes");
        }
        if self.snapshots().iter().any(|s| s.name == name) {
            return bad("a snapshot of this volume has it already");
        }
        match self.layer_count() {
            n if n >= LAYERS_MAX => Err(SnapshotError::TooManyLayers(n)),
            _ => Ok(()),
        }
    }

    fn check_holdable(&self) -> Result<(), SnapshotError> {
        if self.core.read_only {
            return Err(SnapshotError::ReadOnly);
        }
        if self.core.is_poisoned() {
            return Err(SnapshotError::Poisoned);
        }
        if self.head_header().is_none() {
            return Err(SnapshotError::Raw);
        }
        Ok(())
    }
}

fn io_error(what: &'static str) -> impl Fn(io::Error) -> SnapshotError {
    move |source| SnapshotError::Io { what, source }
}

fn commit(volume: &Volume) -> Result<(), SnapshotError> {
    keeper::commit(&volume.core).map_err(|e| match e {
        IoError::Host { what, errno } => io_error(what)(io::Error::from_raw_os_error(errno)),
        _ => SnapshotError::Poisoned,
    })
}

impl Held {
    /// Seals the head as it is under the name `name` and goes on in `new_head`; as [`Volume::snapshot`].
    pub fn seal(self, new_head: LayerFiles, name: &str) -> Result<SnapshotInfo, SnapshotError> {
        self.seal_media((Media::new(new_head.data), Media::new(new_head.map)), name)
    }

    /// The order of the syncs is the crash argument.
    pub(crate) fn seal_media(
        self,
        (data, map_file): (Media, Media),
        name: &str,
    ) -> Result<SnapshotInfo, SnapshotError> {
        let volume = &self.volume;
        volume.check_snapshot(name)?;
        // 1. What the snapshot will promise is on disk.
        commit(volume)?;
        let _no_commit = lock(&volume.core.commit);
        let old = volume.core.stack();
        let Some(sealed) = old.head().header() else { return Err(SnapshotError::Raw) };
        let Some(number) = sealed.layer.checked_add(1).filter(|n| *n < u64::MAX) else {
            return Err(SnapshotError::TooManyLayers(volume.layer_count()));
        };
        // 2. The new head is complete and names its parent. Nobody names it yet.
        let header = Header {
            layer: number,
            parent: Some(sealed.layer),
            state: HeaderState::Head,
            snapshot: String::new(),
            time_s: now_s(),
            sequence: 0,
            ..sealed.clone()
        };
        // An encrypted volume goes on under a data key of its own.
        let (key, cipher) =
            crypto::new_layer(&sealed, volume.core.secret.as_ref(), number).map_err(CreateError::from)?;
        let header = Header { key, ..header };
        layer::initialize(&data, &map_file, &header, false)?;
        // 3. The commit point: one header slot, written and synced.
        let time_s = now_s();
        let seal = old.head().update_header(|h| {
            h.state = HeaderState::Sealed { successor: header.layer };
            h.snapshot = name.to_owned();
            h.time_s = time_s;
        });
        if let Err(e) = seal {
            // Whether it is on disk is unknown: only a reopening tells.
            volume.core.poison();
            return Err(io_error("seal the head")(e));
        }
        // 4. From here on new I/O goes to the new head.
        let map = BlockMap::new(header.blocks());
        let mut layers = old.layers.clone();
        let head = Arc::new(Layer::new(data, map_file, header, Some(map), cipher));
        volume.hand_over(old.head(), &head);
        layers.push(head);
        self.closed.replace_stack(Stack { layers });
        Ok(SnapshotInfo { name: name.to_owned(), layer: sealed.layer, time_s, size_bytes: sealed.size_bytes })
    }
}
