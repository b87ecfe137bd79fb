//! Why the supervisor could not do what it was asked. One enum an operation.

use std::{io, path::PathBuf, time::Duration};

use serio_control::{
    ChannelError,
    message::{Code, Failed},
};

use crate::{keys::KeysError, net::NetError};

/// A file or directory that could not be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {path}")]
pub struct FileError {
    /// The verb: `open`, `create`, `sync`.
    pub doing: &'static str,
    /// The file.
    pub path: PathBuf,
    /// The system's word.
    #[source]
    pub source: io::Error,
}

impl FileError {
    pub(crate) fn at(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { doing, path: path.into(), source }
    }
}

/// A process that could not be talked to.
#[derive(Debug, thiserror::Error)]
pub enum TalkError {
    /// The protocol or the socket failed, or the process refused.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// It did not answer in time.
    #[error("{process} did not answer within {} s", .waited.as_secs())]
    Silent {
        /// `serio-vmm` or `serio-volumed`, with its process number.
        process: String,
        /// How long was waited.
        waited: Duration,
    },
}

impl TalkError {
    /// The process's own refusal: code, message and field.
    #[must_use]
    pub fn refusal(&self) -> Option<&Failed> {
        match self {
            Self::Channel(ChannelError::Refused(failed)) => Some(failed),
            _ => None,
        }
    }

    /// The refusal's code; [`Code::Unspecified`] for anything else.
    #[must_use]
    pub fn code(&self) -> Code {
        self.refusal().map_or(Code::Unspecified, Failed::code)
    }
}

/// Why a process did not start.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// A file of its run directory.
    #[error(transparent)]
    File(#[from] FileError),
    /// The socket's path is longer than Unix allows, or it could not be bound.
    #[error(
        "cannot listen on {path}: a Unix socket's path has at most 107 bytes; choose a shorter run_dir if this is longer"
    )]
    Listen {
        /// The socket.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// The program did not start.
    #[error("cannot run {path}: is it installed, executable, and named rightly in seriod.toml?")]
    Exec {
        /// The program.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

/// Why a volume's files cannot be passed on.
#[derive(Debug, thiserror::Error)]
pub enum VolumeFilesError {
    /// There is no such directory, or nothing in it.
    #[error("volume {volume} has no files at {path}")]
    Missing {
        /// Its id.
        volume: uuid::Uuid,
        /// Where they should be.
        path: PathBuf,
    },
    /// A file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
}

/// Why a VM did not start. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A VMM of that id runs.
    #[error("the VM runs already, as process {pid}")]
    Running {
        /// Its process.
        pid: u32,
    },
    /// The kernel cannot be opened.
    #[error("the kernel cannot be used")]
    Kernel(#[source] FileError),
    /// The initrd cannot be opened.
    #[error("the initrd cannot be used")]
    Initrd(#[source] FileError),
    /// No kernel was found on the root disk.
    #[error("the VM cannot boot from its root disk")]
    NoKernel(#[source] Box<JobError>),
    /// /dev/kvm cannot be opened.
    #[error("KVM cannot be used on this host: `serio doctor` says what is missing")]
    Kvm(#[source] FileError),
    /// The key of an encrypted volume.
    #[error("the key of an encrypted volume is not to be had")]
    Key(#[from] KeysError),
    /// A disk cannot be opened.
    #[error("disk {index} cannot be used")]
    Disk {
        /// Its place in the plan, from 0.
        index: usize,
        /// Why.
        #[source]
        source: VolumeFilesError,
    },
    /// The network could not be made.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A file of the run directory or the log.
    #[error(transparent)]
    File(#[from] FileError),
    /// The VMM did not start.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// The VMM refused, or did not answer.
    #[error("the VMM did not start the VM")]
    Talk(#[source] TalkError),
    /// The VMM died on the way.
    #[error("the VMM ended before the VM ran: {reason}")]
    Died {
        /// What it said, or how it died.
        reason: String,
    },
    /// The daemon is ending.
    #[error("seriod is ending")]
    Ending,
}

impl LaunchError {
    /// The VMM's refusal, when it is one.
    #[must_use]
    pub fn refusal(&self) -> Option<&Failed> {
        match self {
            Self::Talk(talk) => talk.refusal(),
            Self::NoKernel(job) => job.refusal(),
            _ => None,
        }
    }
}

/// Why a process of an earlier seriod could not be taken over (it could not be told whether it runs).
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// A file of the run directory.
    #[error(transparent)]
    File(#[from] FileError),
    /// The process is there but does not answer.
    #[error("process {pid} runs but does not answer; end it with `kill -9 {pid}` if it stays so")]
    Silent {
        /// The process.
        pid: u32,
        /// Why.
        #[source]
        source: TalkError,
    },
}

/// Why a job on a volume or image was not done.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// The key of an encrypted volume.
    #[error("the volume's key is not to be had")]
    Key(#[from] KeysError),
    /// The volume's files.
    #[error(transparent)]
    Volume(#[from] VolumeFilesError),
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// There is a volume of that id.
    #[error("volume {0} exists already")]
    Exists(uuid::Uuid),
    /// The id would not make a file name.
    #[error("`{0}` cannot be an export's id: use letters, digits and -")]
    ExportId(String),
    /// serio-volumed did not start.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// A card's tap or bridge.
    #[error(transparent)]
    Net(#[from] NetError),
    /// It refused, or did not answer.
    #[error("the process that has it failed")]
    Talk(#[from] TalkError),
    /// It died.
    #[error("serio-volumed ended before the work was done: {reason}")]
    Died {
        /// How.
        reason: String,
    },
    /// The sender of an image broke off.
    #[error("the image broke off after {received} of {expected} bytes")]
    BrokenOff {
        /// Bytes that came.
        received: u64,
        /// Bytes that were announced.
        expected: u64,
    },
    /// Chunks are not in order, or beyond the announced size.
    #[error("a chunk at {offset} came when the next could lie between {next} and {end}")]
    Order {
        /// Where the chunk lies.
        offset: u64,
        /// The first place it could.
        next: u64,
        /// The announced size.
        end: u64,
    },
    /// A VM ended while its volumes were to be sealed with others.
    #[error("the VM of {who} ended meanwhile, so the snapshot was not made: take it again")]
    VmEnded {
        /// Its volumes.
        who: String,
    },
    /// An earlier snapshot of this volume was not answered, and may still be going on.
    #[error(
        "an earlier snapshot of volume {0} was not answered and may still be going on: try again later, or stop the VM first"
    )]
    InDoubt(uuid::Uuid),
    /// A file cannot be shared between volumes.
    #[error("{path} cannot be shared")]
    Link {
        /// The file.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// More layers than one message can carry.
    #[error(
        "{count} layers lie below that snapshot, and a clone can share {max}: flatten the volume, or delete older snapshots"
    )]
    TooManyLayers {
        /// Layers of the source.
        count: usize,
        /// The most.
        max: usize,
    },
    /// The headers do not have that snapshot.
    #[error("volume {volume} has no snapshot {name}")]
    NoSnapshot {
        /// The volume.
        volume: uuid::Uuid,
        /// The snapshot.
        name: String,
    },
    /// Somebody was not ready in time.
    #[error("{who} did not hold writes within {} s, so all were let go: try again when the host is less busy", .waited.as_secs())]
    Late {
        /// Which volumes.
        who: String,
        /// How long the others waited.
        waited: std::time::Duration,
    },
    /// A guest could not be frozen, and that was required.
    #[error("{who} cannot be taken application-consistent: {why}")]
    NotApp {
        /// Which volumes.
        who: String,
        /// Why.
        why: String,
    },
    /// The daemon is ending.
    #[error("seriod is ending")]
    Ending,
}

impl JobError {
    /// The process's refusal, when it is one.
    #[must_use]
    pub fn refusal(&self) -> Option<&Failed> {
        match self {
            Self::Talk(talk) => talk.refusal(),
            _ => None,
        }
    }
}
