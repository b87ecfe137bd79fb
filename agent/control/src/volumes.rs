//! The messages about volumes beyond making one: prepared snapshots, growing, merging, cloning, checking, keys. Part of
//! [`crate::message`]; the same rule holds: tags are never reused.

use zeroize::Zeroize;

/// The secret of a vdc: what the data keys of its volumes' layers are wrapped with. Never logged, never kept; wiped when
/// it is dropped.
#[derive(Clone, PartialEq, Eq, prost::Message)]
#[prost(skip_debug)]
pub struct VdcKey {
    /// Which key: 16 bytes, also in the layers that it opens.
    #[prost(bytes = "vec", tag = "1")]
    pub id: Vec<u8>,
    /// 32 bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub secret: Vec<u8>,
}

impl Drop for VdcKey {
    fn drop(&mut self) {
        self.secret.zeroize();
    }
}

impl std::fmt::Debug for VdcKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VdcKey({} bytes)", self.secret.len())
    }
}

/// A volume that a prepared snapshot will seal, and the files of its new head.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct NewHead {
    /// The new head's data.
    #[prost(uint32, tag = "1")]
    pub data_fd: u32,
    /// The new head's map.
    #[prost(uint32, tag = "2")]
    pub map_fd: u32,
}

/// One volume of a [`PrepareSnapshot`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PreparedVolume {
    /// As in `Disk::volume_id`.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// Where it goes on.
    #[prost(message, optional, tag = "2")]
    pub head: Option<NewHead>,
}

/// Hold the writes of some volumes, so that all hosts of a vdc's volumes cut at one instant.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PrepareSnapshot {
    /// Chosen by the asker; [`FinishSnapshot`] repeats it.
    #[prost(string, tag = "1")]
    pub snapshot_id: String,
    /// The snapshot's name in each volume.
    #[prost(string, tag = "2")]
    pub snapshot: String,
    /// The volumes; all of this process.
    #[prost(message, repeated, tag = "3")]
    pub volumes: Vec<PreparedVolume>,
    /// Ask the guest agent to freeze the file systems first.
    #[prost(bool, tag = "4")]
    pub freeze: bool,
    /// How long the guest agent may take, milliseconds; 0: 10,000.
    #[prost(uint32, tag = "5")]
    pub freeze_timeout_ms: u32,
    /// After so long without a [`FinishSnapshot`] the process lets go by itself, milliseconds; 0: 5,000.
    #[prost(uint32, tag = "6")]
    pub hold_ms: u32,
    /// Freeze only, and answer; hold when [`HoldSnapshot`] comes. So a guest that freezes fast is not held while others freeze.
    /// Who does not know this holds at once, and its answer says so.
    #[prost(bool, tag = "7")]
    pub freeze_first: bool,
}

/// Hold what [`PrepareSnapshot`] with `freeze_first` has frozen → [`Prepared`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct HoldSnapshot {
    /// As in [`PrepareSnapshot`].
    #[prost(string, tag = "1")]
    pub snapshot_id: String,
}

/// What a point is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum PointClass {
    /// Not said.
    Unspecified = 0,
    /// As after a power cut at one instant.
    Crash = 1,
    /// The guest's file systems were frozen by its agent, whose hooks quiesce applications.
    App = 2,
}

/// Writes are held.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Prepared {
    /// What the point will be good for.
    #[prost(enumeration = "PointClass", tag = "1")]
    pub class: i32,
    /// Why it is not `App` although `freeze` was asked, or empty.
    #[prost(string, tag = "2")]
    pub reason: String,
    /// How many file systems are frozen.
    #[prost(uint32, tag = "3")]
    pub frozen: u32,
    /// Nothing is held yet: [`HoldSnapshot`] is waited for.
    #[prost(bool, tag = "4")]
    pub waits: bool,
}

/// End a [`PrepareSnapshot`]: seal or let go; both thaw. On any connection: a prepared snapshot belongs to the process.
/// Refused when it was let go meanwhile. The thaw follows the answer.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct FinishSnapshot {
    /// As in [`PrepareSnapshot`].
    #[prost(string, tag = "1")]
    pub snapshot_id: String,
    /// Seal; else nothing has happened.
    #[prost(bool, tag = "2")]
    pub commit: bool,
}

/// Grow a volume. To a VMM: no descriptors. To `serio-volumed`: data, map of each layer, oldest first.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ResizeVolume {
    /// The volume's id.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// Not less than now.
    #[prost(uint64, tag = "2")]
    pub size_bytes: u64,
    /// Of an encrypted volume.
    #[prost(message, optional, tag = "3")]
    pub key: Option<VdcKey>,
}

/// Merge a sealed layer into the one above, so that its files can go. To a VMM: answered by its [`MergeState`]
/// when it has begun. To `serio-volumed` (data, map of each layer, oldest first): answered when it is done.
/// Interrupted at any time, it may be asked again and goes on.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct MergeLayer {
    /// The volume's id.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// Number of the layer that goes.
    #[prost(uint64, tag = "2")]
    pub layer: u64,
    /// Pace, bytes copied a second; 0: as fast as it goes.
    #[prost(uint64, tag = "3")]
    pub bytes_per_s: u64,
    /// Of an encrypted volume.
    #[prost(message, optional, tag = "4")]
    pub key: Option<VdcKey>,
}

/// → vmm: how far is the merge of this volume? Answered by [`MergeState`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct MergeQuery {
    /// The volume's id.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// End it half-way; what it has done stays done.
    #[prost(bool, tag = "2")]
    pub cancel: bool,
}

/// How far a merge is. Neither running nor done nor wrong: cancelled, or never asked for; it may be asked again.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct MergeState {
    /// Number of the layer that goes; what was asked last.
    #[prost(uint64, tag = "1")]
    pub layer: u64,
    /// It runs.
    #[prost(bool, tag = "2")]
    pub running: bool,
    /// It is done: the layer is out of the chain, and its files may go.
    #[prost(bool, tag = "3")]
    pub done: bool,
    /// Why it failed, or empty.
    #[prost(string, tag = "4")]
    pub error: String,
    /// Bytes looked at.
    #[prost(uint64, tag = "5")]
    pub done_bytes: u64,
    /// Bytes in all.
    #[prost(uint64, tag = "6")]
    pub total_bytes: u64,
    /// With `done`: the layer is the plain bottom of an encrypted volume and stays in the chain; nothing of its data is
    /// read any more. Its data file is to be replaced, by a rename, by an empty one of the same length.
    #[prost(bool, tag = "7")]
    pub stays: bool,
}

/// Make a volume over sealed layers that it shares with their owner: the data files were linked to the new
/// volume's directory by the caller. Descriptors: data, map of each source layer, oldest first up to the shared top
/// (an image is one layer without a map: `image`); then a new, empty map file for each of them; then data, map of the head.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CloneVolume {
    /// The new volume's id.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// At least the source's size.
    #[prost(uint64, tag = "2")]
    pub size_bytes: u64,
    /// The source is an image: one data file, no map of its own.
    #[prost(bool, tag = "3")]
    pub image: bool,
    /// The source's snapshot, the top of what is shared; empty for an image.
    #[prost(string, tag = "4")]
    pub snapshot: String,
    /// The new volume's bytes are encrypted under this key.
    #[prost(message, optional, tag = "5")]
    pub key: Option<VdcKey>,
}

/// Go back to a snapshot of a stopped volume: what was written since is lost. Descriptors: data, map of each layer,
/// oldest first, then data, map of the new head. Refused when later snapshots exist, unless `discard_later`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct RollbackVolume {
    /// The volume's id.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// The snapshot.
    #[prost(string, tag = "2")]
    pub snapshot: String,
    /// Later snapshots go too.
    #[prost(bool, tag = "3")]
    pub discard_later: bool,
    /// Of an encrypted volume.
    #[prost(message, optional, tag = "4")]
    pub key: Option<VdcKey>,
}

/// Compare a volume's maps with its files, and its sealed layers with their checksums. Descriptors: data, map of each
/// layer, oldest first; the map files may be written: checksums that are missing are added when `add_sums`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CheckVolume {
    /// The volume's id.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// Read all sealed data and compare (a scrub); else headers, maps and sizes only.
    #[prost(bool, tag = "2")]
    pub data: bool,
    /// Compute checksums that a sealed layer does not have yet.
    #[prost(bool, tag = "3")]
    pub add_sums: bool,
    /// Pace, bytes read a second; 0: as fast as it goes.
    #[prost(uint64, tag = "4")]
    pub bytes_per_s: u64,
    /// Compare from here on: an earlier one said that all before is right.
    #[prost(message, optional, tag = "5")]
    pub from: Option<ScrubPlace>,
}

/// A place in a scrub.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct ScrubPlace {
    /// Number of the layer.
    #[prost(uint64, tag = "1")]
    pub layer: u64,
    /// Page of its map: 64 MiB of the volume.
    #[prost(uint64, tag = "2")]
    pub page: u64,
}

/// Something wrong in a volume.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct VolumeProblem {
    /// What, where, what to do.
    #[prost(string, tag = "1")]
    pub message: String,
    /// The layer's number, when it is about one.
    #[prost(uint64, optional, tag = "2")]
    pub layer: Option<u64>,
    /// First byte of the volume that is affected, when bytes are.
    #[prost(uint64, optional, tag = "3")]
    pub offset: Option<u64>,
    /// How many.
    #[prost(uint64, tag = "4")]
    pub len: u64,
    /// The points that read these bytes; `""` is the head.
    #[prost(string, repeated, tag = "5")]
    pub points: Vec<String>,
}

/// What a check found.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct VolumeReport {
    /// Nothing is in here when all is well. At most 1,000.
    #[prost(message, repeated, tag = "1")]
    pub problems: Vec<VolumeProblem>,
    /// How many problems there are in all.
    #[prost(uint64, tag = "2")]
    pub problem_count: u64,
    /// Space that is used and not named by any map.
    #[prost(uint64, tag = "3")]
    pub leaked_bytes: u64,
    /// Bytes whose checksum was compared.
    #[prost(uint64, tag = "4")]
    pub compared_bytes: u64,
    /// Bytes that got their checksum now.
    #[prost(uint64, tag = "5")]
    pub added_bytes: u64,
    /// Remarks that are not problems.
    #[prost(string, repeated, tag = "6")]
    pub notes: Vec<String>,
}

/// Ask for a page of [`ChangedRanges`]. Descriptors: data, map of each layer, oldest first.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ListChanges {
    /// The volume's id.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// The earlier snapshot.
    #[prost(string, tag = "2")]
    pub from: String,
    /// The later snapshot, or empty for the head of a stopped volume.
    #[prost(string, tag = "3")]
    pub to: String,
    /// Where to go on, bytes.
    #[prost(uint64, tag = "4")]
    pub offset: u64,
    /// At most so many ranges, 1 to 4096.
    #[prost(uint32, tag = "5")]
    pub ranges_max: u32,
}

/// A range that changed.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct ChangedRange {
    /// First byte.
    #[prost(uint64, tag = "1")]
    pub offset: u64,
    /// Bytes.
    #[prost(uint64, tag = "2")]
    pub len: u64,
    /// It reads as zeros at the later point.
    #[prost(bool, tag = "3")]
    pub zero: bool,
}

/// A page of changes.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ChangedRanges {
    /// In order.
    #[prost(message, repeated, tag = "1")]
    pub ranges: Vec<ChangedRange>,
    /// Where the next page starts; absent: this was the last.
    #[prost(uint64, optional, tag = "2")]
    pub next_offset: Option<u64>,
}

/// Read an image.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ImportImage {
    /// `raw`, for now. Never guessed.
    #[prost(string, tag = "1")]
    pub format: String,
    /// Bytes that must arrive, or 0 if the sender does not know.
    #[prost(uint64, tag = "2")]
    pub expected_bytes: u64,
    /// More than this is refused.
    #[prost(uint64, tag = "3")]
    pub size_bytes_max: u64,
}

/// Ask for [`VolumeInfo`].
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct InspectVolume {
    /// The volume's id.
    #[prost(string, tag = "1")]
    pub volume_id: String,
}

/// What the headers of a volume say.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct VolumeInfo {
    /// The size that a guest sees.
    #[prost(uint64, tag = "1")]
    pub size_bytes: u64,
    /// The sealed points, oldest first.
    #[prost(message, repeated, tag = "2")]
    pub snapshots: Vec<SnapshotInfo>,
    /// How many of the passed layers are in the chain; those beyond are leftovers of a snapshot that did not happen.
    #[prost(uint32, tag = "3")]
    pub layers: u32,
    /// Numbers of the layers in the chain, oldest first.
    #[prost(uint64, repeated, tag = "4")]
    pub chain: Vec<u64>,
}

/// A sealed point.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SnapshotInfo {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its layer's number.
    #[prost(uint32, tag = "2")]
    pub layer: u32,
    /// Seconds since the epoch.
    #[prost(uint64, tag = "3")]
    pub create_time: u64,
}

/// How far a job is.
#[derive(Clone, PartialEq, prost::Message)]
pub struct JobStatus {
    /// Bytes done.
    #[prost(uint64, tag = "1")]
    pub done_bytes: u64,
    /// Bytes in all, 0 if not known.
    #[prost(uint64, tag = "2")]
    pub total_bytes: u64,
    /// An export's connected clients.
    #[prost(uint32, tag = "3")]
    pub clients: u32,
    /// For an import when done: the disk's size in bytes.
    #[prost(uint64, tag = "4")]
    pub size_bytes: u64,
    /// For an import when done: blake3 of the content, 32 bytes, or empty.
    #[prost(bytes = "vec", tag = "5")]
    pub blake3: Vec<u8>,
    /// For a scrub: all before this place is right.
    #[prost(message, optional, tag = "6")]
    pub scrubbed: Option<ScrubPlace>,
}
