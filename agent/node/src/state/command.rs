//! What clients ask of the state, and what it answers. Valid by type: the gRPC border parsed it.

use std::time::Duration;

use serio_store::record::{
    EventRecord, ExportRecord, ImageRecord, OperationKind, OperationRecord, RequestRecord, SnapshotRecord,
    VdcRecord, VdcSnapshotRecord, VmRecord, VolumeRecord,
};
use serio_types::{
    Cmdline, MacAddr, Name, NicSpec, Quota, SnapshotName, VdcLimits, VdcName, VmSpec, VolumeSize, resource,
};
use tokio::sync::oneshot;
use uuid::Uuid;

pub use super::{
    orders::{Order, Ordered},
    troubles::TroubleView,
    update::{LimitField, VmChange},
    vdc_snapshots::Consistency,
    vm_imports::{VmImport, VmImportPlan},
};
use crate::error::Error;

/// A client's request id, with what tells one request from another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Chosen by the client.
    pub id: Uuid,
    /// `CreateVm`.
    pub method: &'static str,
    /// Of its content.
    pub digest: String,
}

/// New caps of a vdc, and whether its weight and burst are meant too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LimitsChange {
    /// As they shall be.
    pub limits: VdcLimits,
    /// Weight and burst stay as they are.
    pub keep_share: bool,
}

/// A change that a client asks for. Each is idempotent by its request id.
#[allow(missing_docs, reason = "the fields are named by their types, the variants say what they are for")]
#[derive(Debug, Clone)]
pub enum Mutation {
    /// → [`Answer::Vdc`].
    CreateVdc { name: Name, quota: Quota, limits: VdcLimits, encrypted: bool },
    /// Without a weight, that and the burst stay → [`Answer::Vdc`].
    UpdateVdc { name: Name, quota: Quota, limits: LimitsChange, expected_generation: u64 },
    /// Nothing of it may run → [`Answer::Vdc`]. The key is destroyed by the caller, afterwards.
    EraseVdc { name: Name, uid: Uuid },
    /// → [`Answer::Nothing`].
    DeleteVdc { name: Name },
    /// → [`Answer::Vm`].
    CreateVm { name: VdcName, spec: Box<VmSpec>, start: bool },
    /// The same with a root that is there → [`Answer::Vm`].
    CreateVmOn { name: VdcName, spec: Box<VmSpec>, root: VdcName, start: bool },
    /// All of it or nothing → [`Answer::Vm`].
    UpdateVm { name: VdcName, changes: Vec<VmChange> },
    /// → [`Answer::Vm`].
    AttachVolume { name: VdcName, volume: VdcName },
    /// Its guest may take so long to let go of it → [`Answer::Vm`].
    DetachVolume { name: VdcName, volume: VdcName, wait: Duration },
    /// → [`Answer::Vm`].
    AttachNic { name: VdcName, nic: NicSpec },
    /// As with a volume → [`Answer::Vm`].
    DetachNic { name: VdcName, mac: MacAddr, wait: Duration },
    /// → [`Answer::Vm`].
    StartVm { name: VdcName },
    /// → [`Answer::Vm`].
    StopVm { name: VdcName, force: bool, timeout: Duration },
    /// → [`Answer::Vm`].
    RebootVm { name: VdcName },
    /// With its memory → [`Answer::VdcSnapshot`].
    SnapshotVm { name: VdcName, point: Name },
    /// → [`Answer::Operation`].
    DeleteVmSnapshot { name: VdcName, point: Name },
    /// The VM goes on from there; or a new one does → [`Answer::Vm`].
    RestoreVm { name: VdcName, point: Name, discard_later: bool },
    /// The same as a new VM of that vdc → [`Answer::Vm`].
    CloneVm { name: VdcName, point: Name, clone: Name },
    /// → [`Answer::VmImport`], or [`Answer::VdcSnapshot`] if the request was done before.
    BeginVmImport(Box<VmImport>),
    /// → [`Answer::Vm`].
    PauseVm { name: VdcName },
    /// → [`Answer::Vm`].
    ResumeVm { name: VdcName },
    /// → [`Answer::Nothing`].
    DeleteVm { name: VdcName, keep_root_volume: bool, force: bool },
    /// → [`Answer::Volume`].
    CreateVolume { name: VdcName, size: Option<VolumeSize>, image: Option<Name> },
    /// → [`Answer::Nothing`].
    DeleteVolume { name: VdcName },
    /// → [`Answer::Snapshot`].
    CreateSnapshot { name: SnapshotName },
    /// → [`Answer::Operation`].
    DeleteSnapshot { name: SnapshotName },
    /// → [`Answer::Volume`].
    ResizeVolume { name: VdcName, size: VolumeSize },
    /// → [`Answer::Volume`].
    CloneVolume { source: SnapshotName, name: Name, size: Option<VolumeSize> },
    /// → [`Answer::Volume`].
    RollbackVolume { name: SnapshotName, discard_later: bool },
    /// → [`Answer::Operation`].
    FlattenVolume { name: VdcName },
    /// → [`Answer::VdcSnapshot`].
    CreateVdcSnapshot { name: VdcName, consistency: Consistency },
    /// → [`Answer::Operation`].
    DeleteVdcSnapshot { name: VdcName },
    /// → [`Answer::Export`].
    CreateExport {
        volume: VdcName,
        snapshot: Option<Name>,
        writable: bool,
        once: bool,
        /// TRIM gives back what only the snapshot holds.
        release: bool,
        ttl: Duration,
    },
    /// → [`Answer::Nothing`].
    DeleteExport { id: Name },
    /// → [`Answer::Import`], or [`Answer::Image`] if the request was done before.
    BeginImport { name: Name, cmdline: Cmdline },
    /// → [`Answer::Nothing`].
    DeleteImage { name: Name },
    /// The creation of a VM, with the reservation that it takes; its answer.
    Taking { token: String, mutation: Box<Mutation> },
    /// The change, if what it is about is at that generation; its answer.
    At { expected: u64, mutation: Box<Mutation> },
}

impl Mutation {
    /// The change, if what it is about is at a generation; 0: at any.
    #[must_use]
    pub fn at(self, expected: u64) -> Self {
        if expected == 0 { self } else { Self::At { expected, mutation: Box::new(self) } }
    }

    /// The creation of a VM that takes a reservation; empty: without one.
    #[must_use]
    pub fn taking(self, token: String) -> Self {
        if token.is_empty() { self } else { Self::Taking { token, mutation: Box::new(self) } }
    }

    /// What it is about, as the API names it.
    #[must_use]
    pub fn resource(&self) -> String {
        match self {
            Self::CreateVdc { name, .. }
            | Self::UpdateVdc { name, .. }
            | Self::EraseVdc { name, .. }
            | Self::DeleteVdc { name } => resource::vdc(name),
            Self::CreateVm { name, .. }
            | Self::CreateVmOn { name, .. }
            | Self::UpdateVm { name, .. }
            | Self::AttachVolume { name, .. }
            | Self::DetachVolume { name, .. }
            | Self::AttachNic { name, .. }
            | Self::DetachNic { name, .. }
            | Self::StartVm { name }
            | Self::StopVm { name, .. }
            | Self::RebootVm { name }
            | Self::PauseVm { name }
            | Self::ResumeVm { name }
            | Self::DeleteVm { name, .. } => resource::vm(name),
            Self::RestoreVm { name, .. } => resource::vm(name),
            Self::CloneVm { name, clone, .. } => {
                resource::vm(&VdcName { vdc: name.vdc.clone(), name: clone.clone() })
            }
            Self::BeginVmImport(import) => resource::vm_snapshot(&import.name, &import.point),
            Self::SnapshotVm { name, point } | Self::DeleteVmSnapshot { name, point } => {
                resource::vm_snapshot(name, point)
            }
            Self::CreateVolume { name, .. }
            | Self::DeleteVolume { name }
            | Self::ResizeVolume { name, .. }
            | Self::FlattenVolume { name } => resource::volume(name),
            Self::CloneVolume { source, name, .. } => {
                resource::volume(&VdcName { vdc: source.volume.vdc.clone(), name: name.clone() })
            }
            Self::CreateSnapshot { name }
            | Self::DeleteSnapshot { name }
            | Self::RollbackVolume { name, .. } => resource::snapshot(&name.volume, &name.snapshot),
            Self::CreateVdcSnapshot { name, .. } | Self::DeleteVdcSnapshot { name } => {
                resource::vdc_snapshot(name)
            }
            Self::CreateExport { volume, .. } => resource::volume(volume),
            Self::DeleteExport { id } => format!("exports/{id}"),
            Self::BeginImport { name, .. } | Self::DeleteImage { name } => resource::image(name),
            Self::At { mutation, .. } | Self::Taking { mutation, .. } => mutation.resource(),
        }
    }
}

/// A question.
#[allow(missing_docs, reason = "the fields are named by their types, the variants say what they are for")]
#[derive(Debug, Clone)]
pub enum Query {
    /// → [`Answer::Vdcs`]: one, or all.
    Vdcs(Option<Name>),
    /// → [`Answer::Vms`]: one.
    Vm(VdcName),
    /// → [`Answer::Vms`]: of a vdc, or all.
    Vms(Option<Name>),
    /// → [`Answer::Volumes`]: one.
    Volume(VdcName),
    /// → [`Answer::Volumes`]: of a vdc, or all.
    Volumes(Option<Name>),
    /// → [`Answer::Snapshots`].
    Snapshots(VdcName),
    /// → [`Answer::VdcSnapshots`].
    VdcSnapshots(Name),
    /// → [`Answer::VdcSnapshots`]: of a VM.
    VmSnapshots(VdcName),
    /// → [`Answer::Operation`].
    Operation(Uuid),
    /// → [`Answer::Operations`].
    Operations { target_prefix: String, running_only: bool },
    /// → [`Answer::Exports`].
    Exports,
    /// → [`Answer::Images`]: one, or all.
    Images(Option<Name>),
    /// → [`Answer::Events`].
    Events { from: u64, limit: u32 },
}

/// What is asked of the state.
#[derive(Debug)]
pub enum Command {
    /// A change.
    Mutate(Mutation, Option<Request>),
    /// A question.
    Query(Query),
    /// An image's files are whole and synced → [`Answer::Image`].
    FinishImport(ImportedFiles),
    /// An import broke off → [`Answer::Nothing`].
    AbortImport(Uuid),
    /// All of this VM came, and is synced → [`Answer::VdcSnapshot`].
    FinishVmImport(Uuid),
    /// The import of this VM broke off → the reason, when nothing is left of it.
    AbortVmImport(Uuid, Error),
    /// Makes a resource of long work that the caller does itself: it says how far it is by [`super::owner::Client::progress`],
    /// ends it by [`Command::EndOperation`], and heeds [`super::Handles::cancelled`] → [`Answer::Operation`].
    BeginOperation {
        /// What it does.
        kind: OperationKind,
        /// To what, as the API names it.
        target: String,
        /// The volume's id, if it is about one.
        subject: Option<Uuid>,
        /// The client's, if it gave one: asked again → [`Answer::BegunBefore`].
        request: Option<Request>,
    },
    /// That work has ended → [`Answer::Nothing`].
    EndOperation(Uuid, Result<(), Error>),
    /// Raises an event about a resource → [`Answer::Nothing`].
    Note {
        /// As the API names it.
        resource: String,
        /// "damaged".
        kind: &'static str,
        /// For people.
        message: String,
    },
    /// Asks an operation to end → [`Answer::Operation`].
    CancelOperation(Uuid),
    /// Of a scheduler or an operator → [`Answer::Ordered`].
    Order(Order, Option<Request>),
}

/// What an import brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportedFiles {
    /// The image.
    pub uid: Uuid,
    /// Of the disk, 0 if there is none.
    pub size_bytes: u64,
    /// Of the disk.
    pub blake3: String,
    /// A kernel came.
    pub has_kernel: bool,
    /// An initrd came.
    pub has_initrd: bool,
}

/// What the state answers.
#[derive(Debug, Clone)]
pub enum Answer {
    /// Done, nothing to say.
    Nothing,
    /// A vdc.
    Vdc(VdcView),
    /// Vdcs by name.
    Vdcs(Vec<VdcView>),
    /// A VM.
    Vm(Box<VmView>),
    /// VMs by name.
    Vms(Vec<VmView>),
    /// A volume.
    Volume(VolumeView),
    /// Volumes by name.
    Volumes(Vec<VolumeView>),
    /// A snapshot.
    Snapshot(SnapshotView),
    /// Snapshots, oldest first.
    Snapshots(Vec<SnapshotView>),
    /// A vdc's snapshot.
    VdcSnapshot(VdcSnapshotView),
    /// A vdc's snapshots, oldest first.
    VdcSnapshots(Vec<VdcSnapshotView>),
    /// An operation.
    Operation(OperationRecord),
    /// An operation that an earlier call of the same request began.
    BegunBefore(OperationRecord),
    /// Operations, newest first.
    Operations(Vec<OperationRecord>),
    /// An export.
    Export(ExportView),
    /// Exports.
    Exports(Vec<ExportView>),
    /// An image.
    Image(ImageRecord),
    /// Images by name.
    Images(Vec<ImageRecord>),
    /// Events in order.
    Events(Vec<EventRecord>),
    /// The files of this image may be written now.
    Import(Uuid),
    /// The files of this VM may be written now.
    VmImport(VmImportPlan),
    /// An order is carried out.
    Ordered(Ordered),
}

/// Where an answer goes. Dropped unanswered (which only the end of the daemon does), the caller reads [`Error::Ending`].
pub type Reply = oneshot::Sender<Result<Answer, Error>>;

/// A vdc with what it uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VdcView {
    /// Its row.
    pub record: VdcRecord,
    /// What its VMs and volumes are promised.
    pub used: Quota,
    /// How many snapshots its volumes have.
    pub snapshots: u64,
}

/// The states of a VM, as the API shows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VmState {
    /// No process.
    Stopped,
    /// Being made or started, or waiting to be started again.
    Starting,
    /// Its guest runs.
    Running,
    /// Its guest stands still.
    Paused,
    /// Ending.
    Stopping,
    /// Ended by failure, for good.
    Failed,
}

/// A VM with what is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmView {
    /// Its row.
    pub record: VmRecord,
    /// `VDC/NAME`.
    pub name: VdcName,
    /// Its root volume's name; none while it is being deleted.
    pub root_volume: Option<VdcName>,
    /// What is.
    pub state: VmState,
    /// Its process.
    pub pid: Option<u32>,
    /// What of it does not work now, because of the host.
    pub troubles: Vec<TroubleView>,
}

/// A volume with what belongs to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeView {
    /// Its row.
    pub record: VolumeRecord,
    /// `VDC/NAME`.
    pub name: VdcName,
    /// The VM that has it.
    pub attached_to: Option<VdcName>,
    /// Its snapshots, oldest first.
    pub snapshots: Vec<Name>,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotView {
    /// Its row.
    pub record: SnapshotRecord,
    /// Its volume.
    pub volume: VdcName,
    /// The vdc's snapshot that it is a part of.
    pub group: Option<VdcName>,
}

/// A vdc's snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VdcSnapshotView {
    /// Its row.
    pub record: VdcSnapshotRecord,
    /// `VDC/NAME`.
    pub name: VdcName,
    /// As the API names it.
    pub resource: String,
    /// Of a VM's, the one that it goes on from, as the API names it.
    pub base: Option<String>,
    /// Its parts.
    pub parts: Vec<SnapshotView>,
}

/// An export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportView {
    /// Its row.
    pub record: ExportRecord,
    /// Its volume.
    pub volume: VdcName,
}

impl Request {
    /// Whether the one that is known by this id is this one.
    ///
    /// # Errors
    /// It is another.
    pub fn same_as(&self, known: &RequestRecord) -> Result<(), Error> {
        if known.method == self.method && known.digest == self.digest {
            return Ok(());
        }
        let problem =
            format!("{} was used for another request ({}): use a new UUID for each", self.id, known.method);
        Err(Error::invalid("request_id", problem))
    }

    /// The row that remembers it.
    #[must_use]
    pub fn record(&self, resource: String, time: serio_store::record::Millis) -> RequestRecord {
        RequestRecord {
            id: self.id,
            method: self.method.to_owned(),
            digest: self.digest.clone(),
            resource,
            time,
        }
    }
}
