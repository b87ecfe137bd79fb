//! One error type per operation. `Display` says what and where; the source is chained, never repeated.

use std::io;

use crate::{crypto::KeyError, header::HeaderError};

/// Why one operation on a volume failed. Cheap: it is made on the I/O path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// The range does not lie within the volume.
    #[error("bytes {offset}+{len} lie outside the volume of {size} bytes")]
    OutOfRange {
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Size of the volume, bytes.
        size: u64,
    },
    /// A change of a volume that was opened read-only.
    #[error("the volume is open read-only")]
    ReadOnly,
    /// An earlier sync failed: what is on disk is unknown, so nothing more is promised.
    #[error("an earlier sync of this volume failed; it takes no more writes until it is reopened")]
    Poisoned,
    /// The file system or the device answered an error.
    #[error("the host answered errno {errno} to a {what}")]
    Host {
        /// Which primitive failed.
        what: &'static str,
        /// The errno.
        errno: i32,
    },
    /// A data file ends before the volume does: somebody truncated it.
    #[error("a data file of the volume is shorter than the volume")]
    Truncated,
}

impl IoError {
    pub(crate) fn host(what: &'static str, error: &io::Error) -> IoError {
        IoError::Host { what, errno: error.raw_os_error().unwrap_or(nix::libc::EIO) }
    }

    /// The errno that a guest's or an NBD client's protocol is told.
    pub fn errno(&self) -> i32 {
        match self {
            IoError::OutOfRange { .. } => nix::libc::EINVAL,
            IoError::ReadOnly => nix::libc::EPERM,
            IoError::Poisoned | IoError::Truncated => nix::libc::EIO,
            IoError::Host { errno, .. } => *errno,
        }
    }
}

/// Why a volume could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Somebody else has it open.
    #[error(
        "layer {layer} is in use by another process: stop the VM, the export or the job that has this volume open, then try again"
    )]
    InUse {
        /// Number of the layer whose lock is held elsewhere.
        layer: u64,
    },
    /// No layer was given.
    #[error("no layer was given: a volume has at least 00000000.data and 00000000.map")]
    Empty,
    /// More layers than a stack may have.
    #[error("{0} layers are more than a stack may have ({max}): flatten the volume", max = crate::stack::LAYERS_MAX)]
    TooManyLayers(usize),
    /// A header cannot be used.
    #[error("the map file given as number {index} (oldest is 0) is not usable")]
    Header {
        /// Position in the list that was given.
        index: usize,
        /// Why.
        #[source]
        source: HeaderError,
    },
    /// The layers do not belong together.
    #[error("the layers do not form a chain: {0}")]
    Chain(String),
    /// No sealed layer has this snapshot name.
    #[error("the volume has no snapshot named `{0}`")]
    NoSuchSnapshot(String),
    /// The layer is encrypted, and its data key is not to be had.
    #[error("layer {layer} of the volume cannot be decrypted")]
    Key {
        /// Number of the layer.
        layer: u64,
        /// Why.
        #[source]
        source: KeyError,
    },
    /// A map has block states that do not exist.
    #[error("the map of layer {layer} is damaged at map byte {at}")]
    DamagedMap {
        /// Number of the layer.
        layer: u64,
        /// Offset in the map file, bytes.
        at: u64,
    },
    /// A raw file that is neither a regular file nor a block device, or has no size.
    #[error("not a disk: {0}")]
    NotADisk(String),
    /// The host answered an error.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The answer.
        #[source]
        source: io::Error,
    },
}

/// Why a layer could not be created.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// A size of zero or beyond [`crate::SIZE_BYTES_MAX`].
    #[error("a volume has 1 to {max} bytes, not {0}", max = crate::header::SIZE_BYTES_MAX)]
    Size(u64),
    /// Another volume has the data file too, and would lose what it has there.
    #[error(
        "the new data file has {0} names, so another volume shares it: remove this one, and make a new file"
    )]
    Shared(u64),
    /// An encrypted volume is made of whole blocks.
    #[error("an encrypted volume has a multiple of 4096 bytes, not {0}: choose the next larger one")]
    Unaligned(u64),
    /// A new data key could not be made.
    #[error("the new layer has no data key")]
    Key(#[from] KeyError),
    /// Somebody else has the files open.
    #[error("the files of the new layer are in use by another process")]
    InUse,
    /// The host answered an error.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The answer.
        #[source]
        source: io::Error,
    },
}

/// Why a snapshot was not taken. The volume goes on as before, except after [`SnapshotError::Io`] at the
/// commit point, which poisons it.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A plain raw file has no layers.
    #[error("a plain raw file cannot be snapshotted: import it as a volume first")]
    Raw,
    /// Opened read-only.
    #[error("the volume is open read-only")]
    ReadOnly,
    /// An earlier sync failed.
    #[error("an earlier sync of this volume failed; reopen it first")]
    Poisoned,
    /// The name is empty, too long, or taken.
    #[error("`{name}` cannot be the snapshot's name: {why}")]
    Name {
        /// The name.
        name: String,
        /// Why not.
        why: &'static str,
    },
    /// The stack is as deep as it may be.
    #[error("the volume already has {0} layers: delete snapshots or flatten it first")]
    TooManyLayers(usize),
    /// I/O under way did not end in time.
    #[error("I/O on the volume did not drain within {0} ms; nothing was changed")]
    NotDrained(u64),
    /// The new head could not be made.
    #[error("the new head could not be made")]
    Create(#[from] CreateError),
    /// The host answered an error.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The answer.
        #[source]
        source: io::Error,
    },
}

/// Why a volume was not grown. It goes on as before, except after [`ResizeError::Io`] at the commit point, which
/// poisons it.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    /// A plain raw file.
    #[error("a plain raw file cannot grow while it is open: close it, make the file longer, open it again")]
    Raw,
    /// Opened read-only.
    #[error("the volume is open read-only")]
    ReadOnly,
    /// An earlier sync failed.
    #[error("an earlier sync of this volume failed; reopen it first")]
    Poisoned,
    /// Less than it has.
    #[error(
        "the volume has {from} bytes and cannot shrink to {to}: make a smaller volume and copy what is needed into it"
    )]
    Shrink {
        /// Bytes that it has.
        from: u64,
        /// Bytes that were asked for.
        to: u64,
    },
    /// More than a volume may have.
    #[error("a volume has at most {max} bytes, not {0}", max = crate::header::SIZE_BYTES_MAX)]
    TooLarge(u64),
    /// An encrypted volume is made of whole blocks.
    #[error("an encrypted volume has a multiple of 4096 bytes, not {0}: choose the next larger one")]
    Unaligned(u64),
    /// I/O under way did not end in time.
    #[error("I/O on the volume did not drain in time; nothing was changed")]
    NotDrained,
    /// The host answered an error.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The answer.
        #[source]
        source: io::Error,
    },
}

/// Why a clone was not made. What is in the new files then is no volume.
#[derive(Debug, thiserror::Error)]
pub enum CloneError {
    /// The source cannot be read, or has no such snapshot.
    #[error("cannot read the volume that is cloned")]
    Open(#[from] OpenError),
    /// Smaller than the source.
    #[error("the source has {least} bytes there, the clone would have {size}: ask for at least as many")]
    Size {
        /// Bytes that were asked for.
        size: u64,
        /// Bytes of the source.
        least: u64,
    },
    /// A data file of the source was cut.
    #[error("the data file of layer {0} is shorter than its header promises")]
    Cut(u64),
    /// The chain is as long as it may be.
    #[error("the source has {0} layers there, and a clone needs one more than may be: flatten it first")]
    TooManyLayers(usize),
    /// The source is encrypted and its key was not given, or no new data key can be made.
    #[error("the clone's key cannot be made")]
    Key(#[from] KeyError),
    /// The new map files do not fit the layers.
    #[error("each layer of the source needs a new map file")]
    Maps,
    /// The head could not be made.
    #[error("the clone's head could not be made")]
    Create(#[from] CreateError),
    /// The host answered an error.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The answer.
        #[source]
        source: io::Error,
    },
}

/// Why a volume was not rolled back.
#[derive(Debug, thiserror::Error)]
pub enum RollbackError {
    /// The volume cannot be opened for it, is in use, or has no such snapshot.
    #[error("cannot go back to the snapshot")]
    Open(#[from] OpenError),
    /// Later snapshots would be lost.
    #[error("later snapshots would be lost ({}): say that they may be discarded, or clone the snapshot instead", .0.join(", "))]
    Later(Vec<String>),
    /// The highest layer has the highest number that there is.
    #[error("the volume's layers have no number left for a new one")]
    Numbers,
    /// The volume is encrypted, and its key was not given or is another.
    #[error("the new head cannot be encrypted")]
    Key(#[from] KeyError),
    /// The new head could not be made.
    #[error("the new head could not be made")]
    Create(#[from] CreateError),
    /// The host answered an error; asked again, it starts over.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The answer.
        #[source]
        source: io::Error,
    },
}

/// Why a snapshot was not deleted. Whatever the reason, all points but perhaps this one are as before, and asking again
/// goes on.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// The volume cannot be opened for it, is in use, or has no such snapshot.
    #[error("cannot delete the snapshot")]
    Open(#[from] OpenError),
    /// Its layer could not be merged into the one above.
    #[error("cannot merge the snapshot's layer into the one above")]
    Merge(#[from] MergeError),
}

/// Why a merge does not go on. The volume is whole, every point reads as before, and asking again goes on.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// A plain raw file has no layers.
    #[error("a plain raw file has no layers to merge")]
    Raw,
    /// Opened read-only.
    #[error("the volume is open read-only")]
    ReadOnly,
    /// An earlier sync failed.
    #[error("an earlier sync of this volume failed; reopen it first")]
    Poisoned,
    /// It failed before.
    #[error("this merge has failed; begin it again")]
    Over,
    /// Not a sealed layer of this volume.
    #[error("layer {0} is no sealed layer of the volume")]
    NotSealed(u64),
    /// Another merge of this volume is under way.
    #[error("another merge of this volume is under way: wait for its end, or end it")]
    Busy,
    /// The file system makes no holes.
    #[error(
        "the file system of the volume cannot make holes in files, which this merge needs: move the volume to another one"
    )]
    NoHoles,
    /// I/O under way did not end in time. The same merge may go on.
    #[error("I/O on the volume did not drain in time for the last step of the merge; it may be tried again")]
    NotDrained,
    /// The host answered an error.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The answer.
        #[source]
        source: io::Error,
    },
}
