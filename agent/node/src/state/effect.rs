//! What the state wants done outside ([`Effect`]), and what it hears back ([`Input`]). Each effect but a timer is
//! answered by exactly one input, however it goes.

use std::{net::IpAddr, time::Duration};

use serio_store::record::PointClass;
use serio_types::{BootedKernel, Cidr, MacAddr, Name, VdcName};
use uuid::Uuid;

use super::{
    command::{Command, Reply},
    orders::HostLimits,
    vdc_snapshots::Consistency,
    vm_orders::Order,
};
use crate::{
    error::Error,
    supervise::{DevicePlan, EndRecord, TroubleReport, VolumeInfo},
};

/// Something to be done, by the executor.
#[allow(missing_docs, reason = "the fields are named by their types, the variants say what they are for")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Encrypted under the key of `vdc`, if there is one → [`Input::VolumeCreated`].
    CreateVolume { volume: Uuid, size_bytes: u64, image: Option<Uuid>, vdc: Option<Uuid> },
    /// → [`Input::VolumeDeleted`].
    DeleteVolume { volume: Uuid },
    /// → [`Input::Launched`], and later, if that was well, [`Input::Ended`].
    Launch(Box<Launch>),
    /// → [`Input::Adopted`], and later, if it runs, [`Input::Ended`].
    Adopt { vm: Uuid },
    /// Its answer is the VM's end, or a timer.
    PowerButton { vm: Uuid },
    /// Its answer is the VM's end.
    Stop { vm: Uuid },
    /// To that process → [`Input::Ordered`].
    Order { vm: Uuid, pid: u32, order: Order },
    /// Asks the guest to give back memory. Nobody waits for it: it follows in its own time.
    Balloon { vm: Uuid, target_bytes: u64 },
    /// Has its machine keep to other limits. Nobody waits for it.
    Limits { vm: Uuid, limits: DevicePlan },
    /// Gives the guest of that process a device → [`Input::Plugged`].
    Plug { vm: Uuid, pid: u32, device: Device, position: u32, link: Link, limits: DevicePlan },
    /// Has its guest let go of it → [`Input::Unplugged`].
    Unplug { vm: Uuid, pid: u32, device: Device, link: Link, wait: Duration },
    /// Ends what may still run, removes run files → [`Input::Cleaned`].
    Clean { vm: Uuid },
    /// Removes a VM's kept files (log, seed, points) and those of the volumes that go with it → [`Input::VmRemoved`].
    RemoveVm { vm: Uuid, volumes: Vec<Uuid> },
    /// Seals a point, through the VM if one runs → [`Input::Snapshotted`].
    Snapshot { volume: Uuid, name: Name, vm: Option<Uuid> },
    /// Makes a volume larger, through the VM if one runs → [`Input::Resized`].
    Resize { volume: Uuid, size_bytes: u64, vm: Option<Uuid> },
    /// Makes a volume from another one's snapshot → [`Input::VolumeCreated`].
    CloneVolume { volume: Uuid, size_bytes: u64, source: Uuid, point: Name },
    /// Takes a stopped volume back → [`Input::RolledBack`].
    Rollback { volume: Uuid, point: Name, discard_later: bool },
    /// Merges layers away, through the VM if one runs → [`Input::MergeProgress`]s, then one [`Input::Merged`]. Gives way
    /// to everything else that is done to the volume.
    Merge { volume: Uuid, operation: Uuid, goal: Goal, vm: Option<Uuid> },
    /// Has the work of an operation end → its own end.
    CancelOperation { operation: Uuid },
    /// Seals volumes at one instant → [`Input::VdcSnapshotted`].
    VdcSnapshot { group: Uuid, name: Name, consistency: Consistency, parts: Vec<Part> },
    /// Writes a VM's memory and state and seals its volumes at that point → [`Input::VmSaved`].
    SaveVm(SaveOne),
    /// Removes what was saved of a VM. What stays is removed by the next start.
    RemoveSaved { vm: Uuid, group: Uuid },
    /// Makes the volumes of a new VM, all or none → [`Input::VolumeCreated`] of its root.
    CloneVolumes { root: Uuid, clones: Vec<CloneOne> },
    /// → [`Input::Inspected`].
    Inspect { volume: Uuid },
    /// → [`Input::ExportStarted`].
    StartExport { id: Name, volume: Uuid, snapshot: Option<Name>, writable: bool, once: bool, release: bool },
    /// → [`Input::ExportAdopted`].
    AdoptExport { id: Name },
    /// → [`Input::ExportEnded`].
    EndExport { id: Name },
    /// → [`Input::ImageRemoved`].
    RemoveImage { image: Uuid },
    /// → [`Input::Timer`] then.
    Timer { after: Duration, timer: Timer },
}

/// What shall go out of a volume's chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Goal {
    /// The layer of that snapshot.
    Snapshot(Name),
    /// All layers whose files are shared.
    Shared,
}

/// A volume to be made from another one's snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloneOne {
    /// The new one.
    pub volume: Uuid,
    /// Its size.
    pub size_bytes: u64,
    /// The other one.
    pub source: Uuid,
    /// Its snapshot.
    pub point: Name,
}

/// Where a VM goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restore {
    /// The VM that was saved.
    pub vm: Uuid,
    /// The point.
    pub group: Uuid,
    /// The points that it goes on from, as in the row.
    pub bases: Vec<Uuid>,
    /// Volumes that go back to it first.
    pub rollback: Vec<(Uuid, Name)>,
}

/// A VM to be saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveOne {
    /// The point.
    pub group: Uuid,
    /// The VM.
    pub vm: Uuid,
    /// Its process.
    pub pid: u32,
    /// The point's name in each volume.
    pub name: Name,
    /// All its volumes.
    pub volumes: Vec<Uuid>,
    /// Its RAM.
    pub memory_bytes: u64,
    /// Points of which one may be gone on from, if the VM was last saved there.
    pub bases: Vec<Uuid>,
}

/// How much was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SavedSize {
    /// Bytes of memory that were written.
    pub memory_bytes: u64,
    /// How long the VM stood still.
    pub paused_ns: u64,
    /// The point that it goes on from, if it is not whole.
    pub base: Option<Uuid>,
}

/// How a merge ended.
#[derive(Debug)]
pub enum Merged {
    /// What should go is gone, and its files too.
    Done,
    /// It gave way, or was cancelled: it can go on later.
    Interrupted,
    /// Somebody else has the volume open, or whoever has it does not answer.
    Busy(String),
    /// It cannot be done.
    Failed(Error),
}

/// A volume to be sealed with others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// The volume.
    pub volume: Uuid,
    /// For messages.
    pub name: VdcName,
    /// The VM that has it open.
    pub vm: Option<Uuid>,
}

/// A volume that was sealed with others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedPart {
    /// The volume.
    pub volume: Uuid,
    /// What the point is good for.
    pub class: PointClass,
    /// Why it is not better although that was asked, or empty.
    pub reason: String,
}

/// A VM to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The VM.
    pub vm: Uuid,
    /// For messages, and the guest's host name.
    pub name: VdcName,
    /// At this start.
    pub generation: u64,
    /// 1 to 64.
    pub vcpus: u32,
    /// A multiple of 1 MiB.
    pub memory_bytes: u64,
    /// Gives kernel and initrd, unless the root volume does.
    pub image: Uuid,
    /// The root volume does.
    pub from_disk: bool,
    /// It has an initrd.
    pub has_initrd: bool,
    /// The kernel's command line; empty: the root volume's.
    pub cmdline: String,
    /// Root first.
    pub volumes: Vec<Uuid>,
    /// The vdc, for the bridge's name.
    pub vdc: Uuid,
    /// The cards.
    pub nics: Vec<LaunchNic>,
    /// A seed disk, last.
    pub seed: Option<serio_types::CloudInit>,
    /// Its other devices.
    pub machine: serio_types::MachineSpec,
    /// What its disks and cards may do.
    pub limits: DevicePlan,
    /// It goes on from there instead of booting.
    pub restore: Option<Restore>,
}

/// A VM that was started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    /// Its process.
    pub pid: u32,
    /// What it booted, if that was from its root volume.
    pub kernel: Option<BootedKernel>,
}

/// A card of a VM to be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchNic {
    /// Its address.
    pub mac: MacAddr,
    /// For the seed.
    pub address: Option<Cidr>,
    /// For the seed.
    pub gateway: Option<IpAddr>,
}

/// Why the state wants to be woken.
#[allow(missing_docs, reason = "the fields are named by their types, the variants say what they are for")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Timer {
    /// The pause before starting again is over.
    Restart { vm: Uuid, ticket: u64 },
    /// The guest had its time to power off.
    StopDeadline { vm: Uuid, ticket: u64 },
    /// A VMM that did not answer is asked again.
    AdoptAgain { vm: Uuid },
    /// An export's time is over.
    ExportExpired { id: Name },
    /// A volume that was open elsewhere is tried again.
    MergeAgain { volume: Uuid },
    /// The time of an uncommitted reservation is over.
    ReservationsEnd,
}

/// What happened.
#[allow(missing_docs, reason = "the fields are named by their types, the variants say what they are for")]
#[derive(Debug)]
pub enum Input {
    /// A client asks.
    Command(Command, Reply),
    /// A volume's files are there and synced, or nothing of them is.
    VolumeCreated { volume: Uuid, result: Result<(), Error> },
    /// A volume's files are gone, or some are not.
    VolumeDeleted { volume: Uuid, result: Result<(), Error> },
    /// A guest runs (its process), or nothing of it is there.
    Launched { vm: Uuid, result: Result<Started, Error> },
    /// An earlier VMM runs, is gone, or cannot be asked.
    Adopted { vm: Uuid, found: Adopted },
    /// A VMM's process is gone.
    Ended { vm: Uuid, pid: u32, end: EndRecord },
    /// What of a running VM does not work now.
    Troubled { vm: Uuid, pid: u32, troubles: Vec<TroubleReport> },
    /// A machine was reset, paused or resumed, or not.
    Ordered { vm: Uuid, order: Order, result: Result<(), Error> },
    /// A guest has a device, or not.
    Plugged { vm: Uuid, device: Device, result: PlugResult },
    /// A guest has let go of a device and it is closed, or it has it still.
    Unplugged { vm: Uuid, device: Device, result: Result<(), Error> },
    /// No process and no run files any more.
    Cleaned { vm: Uuid },
    /// A VM's kept files are gone, or some are not.
    VmRemoved { vm: Uuid, result: Result<(), Error> },
    /// A point is sealed, or not.
    Snapshotted { volume: Uuid, result: Result<(), Error> },
    /// A volume is larger, or nobody knows.
    Resized { volume: Uuid, result: Result<(), Error> },
    /// A volume is as it was (what its headers say now), or nobody knows.
    RolledBack { volume: Uuid, result: Result<VolumeInfo, Error> },
    /// How far a merge is.
    MergeProgress { volume: Uuid, operation: Uuid, done_bytes: u64, total_bytes: u64 },
    /// A merge ended.
    Merged { volume: Uuid, operation: Uuid, outcome: Merged },
    /// How far an operation is whose work is done elsewhere.
    Progress { operation: Uuid, done_bytes: u64, total_bytes: u64 },
    /// Volumes are sealed at one instant, or perhaps some are.
    VdcSnapshotted { group: Uuid, result: Result<Vec<SealedPart>, Error> },
    /// A VM and its volumes are saved, or perhaps some volumes are sealed.
    VmSaved { group: Uuid, result: Result<SavedSize, Error> },
    /// What a volume's headers say.
    Inspected { volume: Uuid, result: Result<VolumeInfo, Error> },
    /// An export takes clients, or nothing of it is there.
    ExportStarted { id: Name, result: Result<(), Error> },
    /// Whether an earlier export still runs.
    ExportAdopted { id: Name, runs: bool },
    /// An export's process and files are gone (also when it ended by itself).
    ExportEnded { id: Name },
    /// An image's files are gone, or some are not.
    ImageRemoved { image: Uuid, result: Result<(), Error> },
    /// A timer.
    Timer(Timer),
    /// The host was read anew.
    Host(HostLimits),
}

/// What comes to a VM that runs, or leaves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// A volume.
    Volume(Uuid),
    /// The card with that address.
    Nic(MacAddr),
}

/// What a card is connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// The vdc, for the bridge's name.
    pub vdc: Uuid,
    /// Bytes of its largest frame.
    pub mtu: u32,
    /// The VM's, for the number of queue pairs.
    pub vcpus: u32,
}

/// Whether a guest has a device now.
#[derive(Debug)]
pub enum PlugResult {
    /// It has.
    Done,
    /// It has not.
    Refused(Error),
    /// Nobody knows.
    InDoubt(Error),
}

/// What became of an earlier VMM.
#[derive(Debug)]
pub enum Adopted {
    /// It runs.
    Runs {
        /// Its process.
        pid: u32,
        /// Its guest stands still.
        paused: bool,
        /// The volumes that it has; empty if it does not say what it has.
        volumes: Vec<Uuid>,
        /// The cards that it has.
        nics: Vec<MacAddr>,
    },
    /// It is gone, with what it said.
    Gone(Option<EndRecord>),
    /// It runs but does not answer.
    Silent(String),
}
