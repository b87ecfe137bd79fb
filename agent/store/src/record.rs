//! The rows.

use std::{fmt, str::FromStr};

use serio_types::{Desired, Generation, Name, Quota, VdcLimits, VmSpec};
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
        /// A process runs whose guest stands still.
        Paused = "paused",
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
    /// What a long operation does. Those above the line go on after a restart of seriod, the others end with it.
    OperationKind {
        /// Merges a snapshot's layer away.
        DeleteSnapshot = "delete-snapshot",
        /// Makes a volume independent of what it shares.
        FlattenVolume = "flatten-volume",
        /// Merges the layers of all snapshots of a vdc's point away.
        DeleteVdcSnapshot = "delete-vdc-snapshot",
        /// The same of a VM's point.
        DeleteVmSnapshot = "delete-vm-snapshot",
        // ----------
        /// Reads a volume in.
        ImportVolume = "import-volume",
        /// Compares a volume with its checksums.
        CheckVolume = "check-volume",
    }
}

impl OperationKind {
    /// Whether it deletes the parts of a whole: a point of a vdc or of a VM.
    #[must_use]
    pub const fn is_whole(self) -> bool {
        matches!(self, Self::DeleteVdcSnapshot | Self::DeleteVmSnapshot)
    }
}

words! {
    /// How far a long operation is.
    OperationState {
        /// It goes on.
        Running = "running",
        /// It is done.
        Done = "done",
        /// It ended by failure.
        Failed = "failed",
        /// It was asked to end.
        Cancelled = "cancelled",
    }
}

words! {
    /// What a point is good for.
    PointClass {
        /// As after a power cut at one instant.
        Crash = "crash",
        /// File systems were frozen and applications told.
        App = "app",
    }
}

words! {
    /// Whether the volumes of a vdc are encrypted.
    Encryption {
        /// They are not.
        Plain = "plain",
        /// Each under its own key, which the vdc's key opens.
        Encrypted = "encrypted",
        /// They were, and the vdc's key was destroyed.
        Erased = "erased",
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
    /// Its share, and the caps on it.
    pub limits: VdcLimits,
    /// Whether its volumes are encrypted.
    pub encryption: Encryption,
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
    /// The snapshot that it was cloned from, as the API names it (it may be gone).
    pub source_snapshot: Option<String>,
    /// Something was begun whose end is not known here: the headers are read at the next start.
    pub unsure: bool,
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
    /// The vdc's snapshot that it is a part of.
    pub group: Option<Uuid>,
    /// What it is good for.
    pub class: PointClass,
    /// Why it is not better although that was asked, or empty.
    pub reason: String,
}

/// A point of all volumes of a vdc, or of a VM with its memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VdcSnapshotRecord {
    /// Its id; its parts have it as `group`.
    pub uid: Uuid,
    /// Its vdc.
    pub vdc: Uuid,
    /// Its name in the vdc or the VM, and in each volume.
    pub name: Name,
    /// When it was made.
    pub create_time: Millis,
    /// How far it is made.
    pub state: Made,
    /// Of a VM: what was saved.
    pub saved: Option<Box<SavedVm>>,
}

/// What was saved of a VM.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SavedVm {
    /// The VM.
    #[serde(skip)]
    pub vm: Uuid,
    /// What it was: a VM that goes on from there must be the same.
    pub spec: VmSpec,
    /// Bytes of its memory that are kept: those that were not zero, and of one with `bases` only of pages that had changed.
    pub memory_bytes: u64,
    /// How long it stood still, nanoseconds.
    pub paused_ns: u64,
    /// The points without whose files it cannot be restored, the last one first, down to one that is whole; empty: it is whole
    /// itself. Their rows may be gone.
    #[serde(default, with = "uuids")]
    pub bases: Vec<Uuid>,
}

/// Ids as text.
mod uuids {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};
    use uuid::Uuid;

    pub(super) fn serialize<S: Serializer>(ids: &[Uuid], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(ids.iter().map(Uuid::to_string))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Uuid>, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        texts.iter().map(|text| text.parse().map_err(D::Error::custom)).collect()
    }
}

/// A long operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OperationRecord {
    /// Its id.
    pub uid: Uuid,
    /// What it does.
    pub kind: OperationKind,
    /// To what, as the API names it.
    pub target: String,
    /// The id of the volume, or of the vdc's snapshot.
    pub subject: Option<Uuid>,
    /// The volume's snapshot that it is about.
    pub point: Option<Name>,
    /// How far it is.
    pub state: OperationState,
    /// Bytes done; while it goes on, kept in memory only.
    pub done_bytes: u64,
    /// Bytes in all, 0 if not known.
    pub total_bytes: u64,
    /// Why it failed, or empty.
    pub error: String,
    /// When it was asked.
    pub create_time: Millis,
    /// When it ended.
    pub end_time: Option<Millis>,
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
    /// What it booted at its last start, if that was from its root disk.
    pub kernel: Option<serio_types::BootedKernel>,
    /// The point that its next start goes on from.
    pub restore: Option<Uuid>,
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
    /// When it ends by itself, by the steady clock.
    pub expire_time: Millis,
}

words! {
    /// For what a reservation is held.
    ReservationClass {
        /// For use.
        Normal = "normal",
        /// For a recovery.
        DrHeld = "dr-held",
    }
}

words! {
    /// Where a reservation was wished to lie.
    NumaWish {
        /// Wherever there is room.
        Any = "any",
        /// On one NUMA node, whichever.
        OneNode = "one-node",
        /// On the NUMA node that the row names.
        Node = "node",
    }
}

/// A reservation that was committed, or that a VM has taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReservationRecord {
    /// Its name.
    pub token: String,
    /// Which it is, over repetitions.
    pub key: String,
    /// For whom, as the API names it.
    pub resource: String,
    /// Without overhead.
    pub amount: Quota,
    /// For what.
    pub class: ReservationClass,
    /// Where it was wished to lie.
    pub wish: NumaWish,
    /// Where it lies; none: wherever there is room.
    pub numa_node: Option<u32>,
    /// Of who asked.
    pub fence_generation: u64,
    /// The VM that has taken it.
    pub vm: Option<Uuid>,
}

/// What is in force for the whole node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OrdersRecord {
    /// Why it takes nothing new; none: it does.
    pub drain_reason: Option<String>,
    /// What was promised under a lower one has ended.
    pub fence_generation: u64,
}

/// What the steady clock showed at the last start of seriod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClockRecord {
    /// Of the host.
    pub boot_id: String,
    /// Milliseconds since that boot.
    pub boot_ms: i64,
    /// What it showed then.
    pub steady: Millis,
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
    /// When, by the steady clock.
    pub time: Millis,
}
