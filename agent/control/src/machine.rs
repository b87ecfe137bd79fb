//! The messages about a whole VM as two files. Part of [`crate::message`]; the same rule holds: tags are never reused.

use crate::message::PreparedVolume;

/// Write the whole VM into two files, memory and all the rest, so that [`RestoreFrom`] goes on from there. The VM stands
/// still meanwhile. Answered by [`SavedVm`] when both files are on the disk. When it is refused or fails the VM goes on as it
/// was; what the files hold then is of no use, and no volume was sealed unless the message says so.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SaveVm {
    /// A file for the state, open for reading and writing. It is replaced.
    #[prost(uint32, tag = "1")]
    pub state_fd: u32,
    /// A file for the memory, open for reading and writing. It is replaced; pages of zeros become holes.
    #[prost(uint32, tag = "2")]
    pub memory_fd: u32,
    /// Leave the VM paused, so that it may be ended without having gone on. One that was paused before stays so anyway.
    #[prost(bool, tag = "3")]
    pub stay_paused: bool,
    /// The name under which `volumes` are sealed.
    #[prost(string, tag = "4")]
    pub snapshot: String,
    /// Volumes to seal at the very point of the memory, each with the files of its new head. The restored VM's disks are to
    /// begin at these points.
    #[prost(message, repeated, tag = "5")]
    pub volumes: Vec<PreparedVolume>,
    /// Sixteen bytes that name this snapshot for ever. Empty: no other one shall hold only what changed since.
    #[prost(bytes = "vec", tag = "6")]
    pub id: Vec<u8>,
    /// Ids of snapshots that the asker keeps: if the VM was last saved in one of them, or went on from it, only the pages that
    /// changed since may be written.
    #[prost(bytes = "vec", repeated, tag = "7")]
    pub bases: Vec<Vec<u8>>,
}

/// A VM was saved.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SavedVm {
    /// Bytes of memory that were written: those that were not zero, and of a diff only pages that had changed.
    #[prost(uint64, tag = "1")]
    pub memory_bytes: u64,
    /// How long the VM stood still for it, nanoseconds; of one that is left paused, until it was written.
    #[prost(uint64, tag = "2")]
    pub paused_ns: u64,
    /// The snapshot without which this one cannot be restored, one of [`SaveVm::bases`]; empty: it is whole.
    #[prost(bytes = "vec", tag = "3")]
    pub base: Vec<u8>,
}

/// The files of a snapshot that another one goes on from.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct BaseFds {
    /// The state.
    #[prost(uint32, tag = "1")]
    pub state_fd: u32,
    /// The memory.
    #[prost(uint32, tag = "2")]
    pub memory_fd: u32,
}

/// What [`SaveVm`] has written.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct RestoreFrom {
    /// The state.
    #[prost(uint32, tag = "1")]
    pub state_fd: u32,
    /// The memory, open for reading. It must not change while this VM runs: it is read as the guest touches it. Any number of
    /// VMs may run from one.
    #[prost(uint32, tag = "2")]
    pub memory_fd: u32,
    /// Do not let it run yet: `Resume` does.
    #[prost(bool, tag = "3")]
    pub stay_paused: bool,
    /// Do not check the memory against its checksums before the guest runs, but beside it: it is ended when damage is found.
    #[prost(bool, tag = "4")]
    pub check_beside: bool,
    /// The snapshots that it goes on from: its base, the base of that, down to one that is whole. Their memory must not change in
    /// what it holds either.
    #[prost(message, repeated, tag = "5")]
    pub bases: Vec<BaseFds>,
}
