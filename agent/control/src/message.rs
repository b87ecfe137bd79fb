//! The messages. Written as prost structs by hand: both ends are built from this file, and the tags below are
//! never reused, because a new `seriod` must talk to the VMMs that an older one started.

pub use crate::device::{
    DiskLimits, Limits, NIC_PAIRS_MAX, Nic, NicLimits, Plug, SetLimits, Unplug, nic_pairs,
};
pub use crate::{bootdisk::*, counters::*, devices::*, machine::*, volumes::*};

/// One frame: a request, its reply, or an event.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Frame {
    /// Chosen by the client, unique on its connection; a reply repeats it; 0 for events.
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// How many descriptors travel with this frame.
    #[prost(uint32, tag = "2")]
    pub descriptors: u32,
    /// What it says.
    #[prost(
        oneof = "Body",
        tags = "10, 11, 12, 13, 14, 15, 16, 17, 20, 21, 22, 23, 24, 30, 31, 32, 33, 34, 35, 36, 37, 38, 40, 50, 51, 52, \
                53, 54, 55, 60, 61, 62, 63, 64, 65, 70, 71, 80, 81, 82, 84, 85, 87, 88, \
                90, 91"
    )]
    pub body: Option<Body>,
}

/// What a frame says. 10 to 19 are asked of a VMM, 20 to 29 of `serio-volumed`, 30 to 39 are replies,
/// 40 to 49 events, 50 to 59 are asked of whoever has a volume's head open, 60 on of `serio-volumed`.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Body {
    /// → vmm: start this VM. Descriptors as the config's indexes say. Once.
    #[prost(message, tag = "10")]
    Launch(Launch),
    /// → either: how are you?
    #[prost(message, tag = "11")]
    Status(Empty),
    /// → vmm: press the ACPI power button.
    #[prost(message, tag = "12")]
    PowerButton(Empty),
    /// → either: end now; a VM loses what it has not flushed, as by a power cut.
    #[prost(message, tag = "13")]
    Stop(Empty),
    /// → vmm: reset the machine, as the guest could; `OnReset` says what follows.
    #[prost(message, tag = "14")]
    Reset(Empty),
    /// → vmm: stop the vcpus.
    #[prost(message, tag = "15")]
    Pause(Empty),
    /// → vmm: let them run again.
    #[prost(message, tag = "16")]
    Resume(Empty),
    /// → vmm: seal a volume's head and go on in the new one (two descriptors: data, map).
    #[prost(message, tag = "17")]
    SnapshotVolume(SnapshotVolume),

    /// → volumed: make a volume. Descriptors: data, map; with a key those of the encrypted head above, data, map; the
    /// image's data when `from_image`.
    #[prost(message, tag = "20")]
    CreateVolume(CreateVolume),
    /// → volumed: read an image from descriptor 0 (pipe or file) into descriptor 1.
    #[prost(message, tag = "21")]
    ImportImage(ImportImage),
    /// → volumed: seal the head of a stopped volume. Descriptors: data, map of each layer, oldest first, then
    /// data, map of the new head.
    #[prost(message, tag = "22")]
    SnapshotStopped(SnapshotStopped),
    /// → volumed: serve NBD. Descriptors: the listening socket, then data, map of each layer, oldest first.
    #[prost(message, tag = "23")]
    Export(Export),
    /// → volumed: what do the headers of a volume say? Descriptors as for `Export` without the socket.
    #[prost(message, tag = "24")]
    InspectVolume(InspectVolume),

    /// ← done, nothing to say.
    #[prost(message, tag = "30")]
    Done(Empty),
    /// ← refused or failed.
    #[prost(message, tag = "31")]
    Failed(Failed),
    /// ← a VM's status.
    #[prost(message, tag = "32")]
    VmStatus(VmStatus),
    /// ← a job's status.
    #[prost(message, tag = "33")]
    JobStatus(JobStatus),
    /// ← what a volume's headers say.
    #[prost(message, tag = "34")]
    VolumeInfo(VolumeInfo),

    /// ← writes are held.
    #[prost(message, tag = "35")]
    Prepared(Prepared),
    /// ← how far a merge is.
    #[prost(message, tag = "36")]
    MergeState(MergeState),
    /// ← what a check found.
    #[prost(message, tag = "37")]
    VolumeReport(VolumeReport),
    /// ← a page of changes.
    #[prost(message, tag = "38")]
    ChangedRanges(ChangedRanges),

    /// ← event: the VM's state changed.
    #[prost(message, tag = "40")]
    VmChanged(VmStatus),

    /// → vmm: hold writes for a snapshot.
    #[prost(message, tag = "50")]
    PrepareSnapshot(PrepareSnapshot),
    /// → vmm: seal what was prepared, or let go.
    #[prost(message, tag = "51")]
    FinishSnapshot(FinishSnapshot),
    /// → vmm, volumed: grow a volume.
    #[prost(message, tag = "52")]
    ResizeVolume(ResizeVolume),
    /// → vmm, volumed: merge a layer into the one above.
    #[prost(message, tag = "53")]
    MergeLayer(MergeLayer),
    /// → vmm: how far is the merge?
    #[prost(message, tag = "54")]
    MergeQuery(MergeQuery),
    /// → vmm: hold the writes of what is frozen.
    #[prost(message, tag = "55")]
    HoldSnapshot(HoldSnapshot),

    /// → volumed: make a volume over shared layers.
    #[prost(message, tag = "60")]
    CloneVolume(CloneVolume),
    /// → volumed: go back to a snapshot.
    #[prost(message, tag = "61")]
    RollbackVolume(RollbackVolume),
    /// → volumed: check or scrub.
    #[prost(message, tag = "62")]
    CheckVolume(CheckVolume),
    /// → volumed: what has changed between two points?
    #[prost(message, tag = "63")]
    ListChanges(ListChanges),
    /// → volumed: what does a volume boot with?
    #[prost(message, tag = "64")]
    FindKernel(FindKernel),
    /// ← what it boots with.
    #[prost(message, tag = "65")]
    FoundKernel(FoundKernel),

    /// → vmm: write the whole VM into two files.
    #[prost(message, tag = "70")]
    SaveVm(SaveVm),
    /// ← it is written.
    #[prost(message, tag = "71")]
    SavedVm(SavedVm),
    /// → vmm: ask the guest to give back memory, or to take it again.
    #[prost(message, tag = "80")]
    SetBalloon(SetBalloon),
    /// → vmm: how does the balloon stand? Also asks the guest for fresh statistics, for the next time.
    #[prost(message, tag = "81")]
    BalloonQuery(Empty),
    /// ← how the balloon stands.
    #[prost(message, tag = "82")]
    BalloonStats(BalloonStats),
    /// → vmm: what have you counted?
    #[prost(message, tag = "84")]
    CountersQuery(Empty),
    /// ← what it has counted.
    #[prost(message, tag = "85")]
    VmCounters(VmCounters),
    /// → vmm: where the guest's vsock connections go; one descriptor, a connected `SOCK_SEQPACKET` socket.
    #[prost(message, tag = "87")]
    SetVsockBroker(Empty),
    /// → vmm: what its disks and cards may do from now on.
    #[prost(message, tag = "88")]
    SetLimits(SetLimits),
    /// → vmm: give the guest one more disk or card. Descriptors as its indexes say.
    #[prost(message, tag = "90")]
    Plug(Plug),
    /// → vmm: take one away.
    #[prost(message, tag = "91")]
    Unplug(Unplug),
}

/// Nothing.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Empty {}

/// Why a request was not done.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Failed {
    /// For the program.
    #[prost(enumeration = "Code", tag = "1")]
    pub code: i32,
    /// For the person: what, where, what to do.
    #[prost(string, tag = "2")]
    pub message: String,
    /// The field of the request that is to blame, or empty.
    #[prost(string, tag = "3")]
    pub field: String,
}

/// The kinds of failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Code {
    /// Not said.
    Unspecified = 0,
    /// The request is malformed.
    Invalid = 1,
    /// The state does not allow it.
    Precondition = 2,
    /// Something is in use by another process.
    InUse = 3,
    /// An operation of the host failed.
    Io = 4,
    /// No room (disk, memory).
    Exhausted = 5,
    /// Our mistake.
    Internal = 6,
}

/// Everything a VMM needs. A `*_fd` is an index into the descriptors of the frame.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Launch {
    /// The VM's id, as text; also its SMBIOS-like identity and the name of its threads.
    #[prost(string, tag = "1")]
    pub vm_id: String,
    /// `VDC/NAME`, for messages.
    #[prost(string, tag = "2")]
    pub name: String,
    /// 1 to 64.
    #[prost(uint32, tag = "3")]
    pub vcpus: u32,
    /// A multiple of 1 MiB.
    #[prost(uint64, tag = "4")]
    pub memory_bytes: u64,
    /// An open /dev/kvm.
    #[prost(uint32, tag = "5")]
    pub kvm_fd: u32,
    /// The kernel: bzImage or vmlinux.
    #[prost(uint32, tag = "6")]
    pub kernel_fd: u32,
    /// The initrd, if there is one.
    #[prost(uint32, optional, tag = "7")]
    pub initrd_fd: Option<u32>,
    /// The kernel's command line.
    #[prost(string, tag = "8")]
    pub cmdline: String,
    /// In the order that the guest sees them: vda, vdb, …
    #[prost(message, repeated, tag = "9")]
    pub disks: Vec<Disk>,
    /// In the order that the guest sees them.
    #[prost(message, repeated, tag = "10")]
    pub nics: Vec<Nic>,
    /// Where the serial output is kept. The VMM bounds its size.
    #[prost(uint32, tag = "11")]
    pub log_fd: u32,
    /// A listening Unix stream socket: each client sees the serial output from now on, and types to it.
    #[prost(uint32, tag = "12")]
    pub console_fd: u32,
    /// A file where the VMM writes an [`EndRecord`] (encoded, no framing) as the last thing it does.
    #[prost(uint32, tag = "13")]
    pub exit_fd: u32,
    /// The user and group that the process becomes, or 0 to stay as it is.
    #[prost(uint32, tag = "14")]
    pub uid: u32,
    /// What a guest's reset does.
    #[prost(enumeration = "OnReset", tag = "15")]
    pub on_reset: i32,
    /// Go on where a VM was saved, instead of booting; a reset boots. All else as that VM had it.
    #[prost(message, optional, tag = "30")]
    pub restore: Option<RestoreFrom>,
    /// Connections between the guest and Unix sockets, if it shall have them.
    #[prost(message, optional, tag = "16")]
    pub vsock: Option<Vsock>,
    /// What happens to a guest that does not pet its watchdog.
    #[prost(enumeration = "OnWatchdog", tag = "17")]
    pub on_watchdog: i32,
    /// The host's pages behind the memory: 4 KiB (or 0), 2 MiB or 1 GiB.
    #[prost(uint64, tag = "18")]
    pub page_bytes: u64,
    /// `x86-64-v2`, `x86-64-v3`, or `host` (or empty).
    #[prost(string, tag = "19")]
    pub cpu_baseline: String,
}

/// What a guest's reset does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum OnReset {
    /// Boot again in the same process.
    Reboot = 0,
    /// End, as a power-off.
    End = 1,
}

/// A disk of a VM.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Disk {
    /// The volume's id, or a name such as `seed` for a plain file; at most 20 bytes of it are the disk's serial.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// Its layers, oldest first. A plain raw file is one layer without a map.
    #[prost(message, repeated, tag = "2")]
    pub layers: Vec<LayerFds>,
    /// The guest cannot write.
    #[prost(bool, tag = "3")]
    pub read_only: bool,
    /// Opens the layers of an encrypted volume.
    #[prost(message, optional, tag = "4")]
    pub key: Option<VdcKey>,
    /// What it may do.
    #[prost(message, optional, tag = "5")]
    pub limits: Option<Limits>,
    /// Goes past the page cache where it can.
    #[prost(bool, tag = "6")]
    pub direct: bool,
}

/// The descriptors of a layer, as indexes into the frame's.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct LayerFds {
    /// The data file.
    #[prost(uint32, tag = "1")]
    pub data_fd: u32,
    /// The map file; absent for a plain raw file.
    #[prost(uint32, optional, tag = "2")]
    pub map_fd: Option<u32>,
}

/// The states of a VM inside its process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum VmState {
    /// No `Launch` yet.
    Waiting = 0,
    /// Its vcpus run.
    Running = 1,
    /// Its vcpus are stopped.
    Paused = 2,
    /// It ended; the process is about to.
    Ended = 3,
}

/// A VM's status.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VmStatus {
    /// The VM's id.
    #[prost(string, tag = "1")]
    pub vm_id: String,
    /// Its state.
    #[prost(enumeration = "VmState", tag = "2")]
    pub state: i32,
    /// Why it ended, when it has.
    #[prost(message, optional, tag = "3")]
    pub end: Option<EndRecord>,
    /// Times that the guest was reset since `Launch`.
    #[prost(uint64, tag = "4")]
    pub resets: u64,
    /// Nanoseconds of the host's monotonic clock since the first vcpu ran.
    #[prost(uint64, tag = "5")]
    pub uptime_ns: u64,
    /// The process's version of `serio-vmm`.
    #[prost(string, tag = "6")]
    pub version: String,
    /// What of it does not work now, because of the host.
    #[prost(message, repeated, tag = "7")]
    pub troubles: Vec<Trouble>,
    /// The disks that it has now, as in [`Disk::volume_id`]; empty in what older programs say.
    #[prost(string, repeated, tag = "8")]
    pub disks: Vec<String>,
    /// The addresses of the cards that it has now, as `52:54:00:12:34:56`.
    #[prost(string, repeated, tag = "9")]
    pub nics: Vec<String>,
}

/// Why a VM ended. Kept in the file `exit` of its run directory too, since the process may end while nobody listens.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct EndRecord {
    /// The kind.
    #[prost(enumeration = "EndKind", tag = "1")]
    pub kind: i32,
    /// For the person: what happened, with what is needed to look further.
    #[prost(string, tag = "2")]
    pub reason: String,
}

/// The kinds of end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum EndKind {
    /// Not said: the process died without a word.
    Unspecified = 0,
    /// The guest powered off.
    PowerOff = 1,
    /// The guest reset and `OnReset::End` was set.
    Reset = 2,
    /// `Stop` was asked.
    Stopped = 3,
    /// The guest broke: triple fault, an exit that cannot be handled.
    GuestError = 4,
    /// KVM or the host failed.
    HostError = 5,
    /// The configuration could not be started.
    LaunchFailed = 6,
}

/// Seal a volume of a running VM.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SnapshotVolume {
    /// As in [`Disk::volume_id`].
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// The snapshot's name.
    #[prost(string, tag = "2")]
    pub snapshot: String,
    /// The new head's data.
    #[prost(uint32, tag = "3")]
    pub data_fd: u32,
    /// The new head's map.
    #[prost(uint32, tag = "4")]
    pub map_fd: u32,
}

/// Make a volume.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CreateVolume {
    /// Its id, as text.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// At least the image's size.
    #[prost(uint64, tag = "2")]
    pub size_bytes: u64,
    /// The third descriptor is an image to start from.
    #[prost(bool, tag = "3")]
    pub from_image: bool,
    /// The volume's bytes are encrypted under this key.
    #[prost(message, optional, tag = "4")]
    pub key: Option<VdcKey>,
}

/// Seal the head of a stopped volume.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SnapshotStopped {
    /// The volume's id.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// The snapshot's name.
    #[prost(string, tag = "2")]
    pub snapshot: String,
    /// Of an encrypted volume.
    #[prost(message, optional, tag = "3")]
    pub key: Option<VdcKey>,
}

/// Serve NBD.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Export {
    /// The volume's id.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// The name that clients ask for.
    #[prost(string, tag = "2")]
    pub export_name: String,
    /// The point to serve, or empty for the head of a stopped volume.
    #[prost(string, tag = "3")]
    pub snapshot: String,
    /// Refuse writes. Always true for a point.
    #[prost(bool, tag = "4")]
    pub read_only: bool,
    /// The user and group that the process becomes, or 0.
    #[prost(uint32, tag = "5")]
    pub uid: u32,
    /// Opens the layers of an encrypted volume.
    #[prost(message, optional, tag = "6")]
    pub key: Option<VdcKey>,
    /// End when a client has said goodbye and no other is connected.
    #[prost(bool, tag = "7")]
    pub once: bool,
    /// Of a snapshot, whose layer's files came open for writing: TRIM gives back what only it holds.
    #[prost(bool, tag = "8")]
    pub release: bool,
}
