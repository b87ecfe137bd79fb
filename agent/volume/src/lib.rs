//! Volumes: layers, maps, stacks and the engine that reads and writes them.
//!
//! ```text
//!   virtqueue / NBD connection          one thread each
//!        │ Op (owns its Buffers)   ▲ (tag, result, Buffers)
//!   ┌────▼─────────────────────────┴───┐
//!   │ IoQueue   slots, plan, copy-up   │  queue.rs, plan.rs
//!   └────┬─────────────────────────▲───┘
//!   ┌────▼─────────────────────────┴───┐
//!   │ Driver    io_uring or inline     │  uring/   (the only unsafe code)
//!   └────┬─────────────────────────▲───┘
//!     head.data   sealed.data …   bottom.data
//!
//!   Volume (shared): stack of layers + maps, gate, claims, keeper thread (map commits)
//! ```
//!
//! Owns: the format on disk (`agent/volume/README.md` has every byte), locking, durability, snapshots.
//! Never: opens a file by itself except in [`VolumeDir`] and its stand-alone users; talks to a socket; logs.
//!
//! Threads: an [`IoQueue`] belongs to one thread at a time. A [`Volume`] is shared. A layered writable
//! volume has one more thread, the keeper, that commits the map; it is named `volume-keeper`.
#![deny(unsafe_code)]

mod chain;
mod changes;
mod check;
mod chunks;
mod clones;
mod crypto;
mod dir;
mod dir_change;
mod direct;
mod error;
mod header;
mod keeper;
mod layer;
mod map;
mod media;
mod merge;
mod merge_copy;
mod op;
mod plan;
mod points;
mod queue;
mod reader;
mod release;
mod resize;
mod rollback;
mod runs;
mod scan;
mod scrub;
mod sealed;
mod shared;
mod slot;
mod snapshot;
mod stack;
mod sums;
#[allow(unsafe_code)]
mod uring;
mod visitor;
mod volume;

#[cfg(test)]
mod check_test;
#[cfg(test)]
mod clones_test;
#[cfg(test)]
mod crash_clones_test;
#[cfg(test)]
mod crash_test;
#[cfg(test)]
mod crypto_test;
#[cfg(test)]
mod direct_test;
#[cfg(test)]
mod layers_test;
#[cfg(test)]
mod release_test;
#[cfg(test)]
mod scrub_test;
#[cfg(test)]
mod sim_disk;
#[cfg(test)]
mod stack_test;

pub use changes::{ChangedExtent, ChangesError};
pub use check::{CheckReport, LayerReport, Problem};
pub use clones::{NewVolume, clone_image};
pub use crypto::{KeyError, VdcSecret, WrappedKey, create_encrypted};
pub use dir::{VolumeDir, VolumeDirError};
pub use dir_change::Share;
pub use direct::NotDirect;
pub use error::{
    CloneError, CreateError, DeleteError, IoError, MergeError, OpenError, ResizeError, RollbackError,
    SnapshotError,
};
pub use header::{BLOCK_BYTES, Header, HeaderError, HeaderState, MAP_OFFSET, NAME_BYTES_MAX, SIZE_BYTES_MAX};
pub use merge::{Deleted, Merge, MergeProgress};
pub use op::{Full, Op};
pub use points::Maps;
pub use queue::IoQueue;
pub use release::Release;
pub use rollback::RolledBack;
pub use runs::FileRun;
pub use scrub::{Rot, RotKind, ScrubOptions, ScrubPlace, ScrubProgress, ScrubReport};
pub use snapshot::Held;
pub use stack::Extent;
pub use uring::{Buffers, GuestRangeError};
pub use volume::{Access, Inspection, LayerFiles, SnapshotInfo, Volume, VolumeFiles, create_layer};
