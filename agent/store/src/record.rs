//! The rows.

use std::{fmt, str::FromStr};

use serio_types::{Desired, Generation, Name, Quota, VmSpec};
use uuid::Uuid;

/// Milliseconds since 1970, UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Millis(pub i64);

/// Makes an enum of words that are stored as text.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$doc])* $variant),+ }

        impl $name {
            /// The word.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }
        }

        impl FromStr for $name {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                match text { $($word => Ok(Self::$variant),)+ _ => Err(format!("unknown word `{text}`")) }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.write_str(self.as_str()) }
        }
    };
}

words! {
    /// How far a thing with files is made.
    Made {
        /// Its files are being made; undone at the next start.
        Creating = "creating",
        /// Whole.
        Ready = "ready",
        /// Its files are being removed; finished at the next start.
        Deleting = "deleting",
    }
}

words! {
    /// How far a VM is. What is written here is always written before it is done.
    Run {
        /// Its root volume is being made; undone at the next start.
        Creating = "creating",
        /// No process.
        Off = "off",
        /// No process, by failure, and it stays so.
        Failed = "failed",
        /// A process is being started, or will be after a pause; started at the next start.
        Starting = "starting",
        /// A process runs.
        Running = "running",
        /// The power button was pressed.
        Stopping = "stopping",
        /// The plug is being pulled; finished at the next start.
        Killing = "killing",
        /// It is being deleted with its root volume; finished at the next start.
        Deleting = "deleting",
        /// It is being deleted without its root volume; finished at the next start.
        DeletingKeepRoot = "deleting-keep-root",
    }
}

words! {
    /// How a run ended.
    EndWord {
        /// The guest powered off.
        PowerOff = "power-off",
        /// The guest reset, and that ends it.
        Reset = "reset",
        /// It was asked to.
        Stopped = "stopped",
        /// The guest broke.
        GuestError = "guest-error",
        /// KVM or the host failed.
        HostError = "host-error",
        /// It never started.
        LaunchFailed = "launch-failed",
        /// The process died without a word.
        Died = "died",
    }
}

/// A vdc.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VdcRecord {
    /// Its id.
    pub uid: Uuid,
    /// Its name.
    pub name: Name,
    /// Counts changes.
    pub generation: Generation,
    /// When it was made.
    pub create_time: Millis,
    /// What it may use.
    pub quota: Quota,
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRecord {
    /// Its id, and its directory's name.
    pub uid: Uuid,
    /// Its name.
    pub name: Name,
    /// Counts changes.
    pub generation: Generation,
    /// When it was made.
    pub create_time: Millis,
    /// How far it is made.
    pub state: Made,
    /// Of the disk; 0 if it has none.
    pub size_bytes: u64,
    /// It brings a kernel.
    pub has_kernel: bool,
    /// It brings an initrd.
    pub has_initrd: bool,
    /// The kernel's default command line.
    pub cmdline: String,
    /// Of the disk, lower-case hex.
    pub blake3: String,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeRecord {
    /// Its id, and its directory's name.
    pub uid: Uuid,
    /// Its vdc.
    pub vdc: Uuid,
    /// Its name in the vdc.
    pub name: Name,
    /// Counts changes.
    pub generation: Generation,
    /// When it was made.
    pub create_time: Millis,
    /// How far it is made.
    pub state: Made,
    /// What a guest sees.
    pub size_bytes: u64,
    /// The image that it was made from (which may be gone).
    pub source_image: Option<Name>,
    /// The VM that has it.
    pub vm: Option<Uuid>,
}

/// A sealed point of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRecord {
    /// Its volume.
    pub volume: Uuid,
    /// Its name.
    pub name: Name,
    /// Counts up in the volume: the order.
    pub number: u64,
    /// When it was made.
    pub create_time: Millis,
    /// How far it is made.
    pub state: Made,
    /// The volume's size then.
    pub size_bytes: u64,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// When it was noticed.
    pub time: Millis,
    /// The kind.
    pub kind: EndWord,
    /// For the person.
    pub reason: String,
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmRecord {
    /// Its id.
    pub uid: Uuid,
    /// Its vdc.
    pub vdc: Uuid,
    /// Its name in the vdc.
    pub name: Name,
    /// Counts changes.
    pub generation: Generation,
    /// When it was made.
    pub create_time: Millis,
    /// What is wanted, with all choices made (MAC addresses).
    pub spec: VmSpec,
    /// Its root volume.
    pub root_volume: Uuid,
    /// Whether it should run.
    pub desired: Desired,
    /// How far it is.
    pub run: Run,
    /// When the guest of the present run started.
    pub start_time: Option<Millis>,
    /// How the last run ended.
    pub last_end: Option<End>,
    /// Times that it was started again by its policy.
    pub restarts: u32,
}

/// A point, or a stopped volume, that is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportRecord {
    /// Its id, which is also the name that clients ask for: a token that cannot be guessed.
    pub id: Name,
    /// The volume.
    pub volume: Uuid,
    /// The point, or none for the head.
    pub snapshot: Option<Name>,
    /// Clients may write.
    pub writable: bool,
    /// How far it is.
    pub state: Made,
    /// When it was made.
    pub create_time: Millis,
    /// When it ends by itself.
    pub expire_time: Millis,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventRecord {
    /// Counts up, without gaps.
    pub number: u64,
    /// When.
    pub time: Millis,
    /// What it happened to, as the API names it.
    pub resource: String,
    /// One word.
    pub kind: String,
    /// For the person.
    pub message: String,
}

/// What a request id was used for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestRecord {
    /// Chosen by the client.
    pub id: Uuid,
    /// `CreateVm`.
    pub method: String,
    /// Of the request without its id: the same id with another content is a mistake.
    pub digest: String,
    /// What it made or changed.
    pub resource: String,
    /// When.
    pub time: Millis,
}
