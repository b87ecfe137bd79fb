//! The rows in memory, as the store has them: looked up here, changed only by [`Model::apply`] after a commit.

use std::collections::BTreeMap;

use serio_store::{
    Change, Contents, Key,
    record::{
        ExportRecord, ImageRecord, Made, OperationRecord, OrdersRecord, ReservationRecord, SnapshotRecord,
        VdcRecord, VdcSnapshotRecord, VmRecord, VolumeRecord,
    },
};
use serio_types::{BootFrom, LimitedDevice, Name, NicSpec, Quota, VdcName, resource};
use serio_vdc::add;
use uuid::Uuid;

use crate::{error::Error, supervise::DevicePlan};

/// All rows.
#[derive(Debug, Default)]
pub struct Model {
    /// The node's id.
    pub node: Uuid,
    /// By id.
    pub vdcs: BTreeMap<Uuid, VdcRecord>,
    /// By id.
    pub images: BTreeMap<Uuid, ImageRecord>,
    /// By id.
    pub vms: BTreeMap<Uuid, VmRecord>,
    /// By id.
    pub volumes: BTreeMap<Uuid, VolumeRecord>,
    /// By volume and number.
    pub snapshots: BTreeMap<(Uuid, u64), SnapshotRecord>,
    /// By id.
    pub exports: BTreeMap<Name, ExportRecord>,
    /// By id.
    pub vdc_snapshots: BTreeMap<Uuid, VdcSnapshotRecord>,
    /// By id.
    pub operations: BTreeMap<Uuid, OperationRecord>,
    /// VMs that were ended by a fence, with its generation.
    pub fenced: BTreeMap<Uuid, u64>,
    /// As they were at the start: the ledger has taken them over.
    pub reservations: Vec<ReservationRecord>,
    /// As they were at the start: the ledger has taken them over.
    pub orders: OrdersRecord,
    /// The newest event.
    pub last_event: u64,
}

impl Model {
    /// What the store had.
    #[must_use]
    pub fn new(contents: Contents) -> Self {
        Self {
            node: contents.node.unwrap_or_default(),
            vdcs: contents.vdcs.into_iter().map(|r| (r.uid, r)).collect(),
            images: contents.images.into_iter().map(|r| (r.uid, r)).collect(),
            vms: contents.vms.into_iter().map(|r| (r.uid, r)).collect(),
            volumes: contents.volumes.into_iter().map(|r| (r.uid, r)).collect(),
            snapshots: contents.snapshots.into_iter().map(|r| ((r.volume, r.number), r)).collect(),
            exports: contents.exports.into_iter().map(|r| (r.id.clone(), r)).collect(),
            vdc_snapshots: contents.vdc_snapshots.into_iter().map(|r| (r.uid, r)).collect(),
            operations: contents.operations.into_iter().map(|r| (r.uid, r)).collect(),
            fenced: contents.fenced.into_iter().collect(),
            reservations: contents.reservations,
            orders: contents.orders,
            last_event: contents.last_event,
        }
    }

    /// Follows a commit.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Node(uid) => self.node = uid,
            Change::Vdc(r) => drop(self.vdcs.insert(r.uid, r)),
            Change::Image(r) => drop(self.images.insert(r.uid, r)),
            Change::Vm(r) => drop(self.vms.insert(r.uid, *r)),
            Change::Volume(r) => drop(self.volumes.insert(r.uid, r)),
            Change::Snapshot(r) => drop(self.snapshots.insert((r.volume, r.number), r)),
            Change::Export(r) => drop(self.exports.insert(r.id.clone(), r)),
            Change::VdcSnapshot(r) => drop(self.vdc_snapshots.insert(r.uid, r)),
            Change::Operation(r) => drop(self.operations.insert(r.uid, r)),
            Change::Event(r) => self.last_event = r.number,
            Change::Fenced(vm, generation) => drop(self.fenced.insert(vm, generation)),
            // The ledger's.
            Change::Reservation(_) | Change::Orders(_) | Change::Request(_) | Change::Clock(_) => {}
            Change::Delete(key) => self.delete(&key),
        }
    }

    fn delete(&mut self, key: &Key) {
        match key {
            Key::Vdc(uid) => drop(self.vdcs.remove(uid)),
            Key::Image(uid) => drop(self.images.remove(uid)),
            Key::Vm(uid) => {
                self.vms.remove(uid);
                self.fenced.remove(uid);
            }
            Key::Volume(uid) => {
                self.snapshots.retain(|(volume, _), _| volume != uid);
                self.volumes.remove(uid);
            }
            Key::Snapshot(uid, name) => {
                self.snapshots.retain(|(volume, _), r| volume != uid || r.name != *name)
            }
            Key::Export(id) => drop(self.exports.remove(id)),
            Key::VdcSnapshot(uid) => drop(self.vdc_snapshots.remove(uid)),
            Key::Operation(uid) => drop(self.operations.remove(uid)),
            Key::Reservation(_) | Key::Request(_) | Key::RequestsOf(_) => {}
        }
    }

    /// The vdc of that name.
    pub fn vdc(&self, name: &Name) -> Result<&VdcRecord, Error> {
        self.vdcs.values().find(|r| r.name == *name).ok_or_else(|| Error::NotFound {
            resource: resource::vdc(name),
            hint: ": `serio vdc list` shows those of this node",
        })
    }

    /// The image of that name, if it is whole.
    pub fn image(&self, name: &Name) -> Result<&ImageRecord, Error> {
        self.images.values().find(|r| r.name == *name && r.state == Made::Ready).ok_or_else(|| {
            Error::NotFound {
                resource: resource::image(name),
                hint: ": import it first, `serio image list` shows those of this node",
            }
        })
    }

    /// The VM of that name.
    pub fn vm(&self, name: &VdcName) -> Result<&VmRecord, Error> {
        let vdc = self.vdc(&name.vdc)?;
        self.vms
            .values()
            .find(|r| r.vdc == vdc.uid && r.name == name.name)
            .ok_or_else(|| Error::not_found(resource::vm(name)))
    }

    /// The volume of that name.
    pub fn volume(&self, name: &VdcName) -> Result<&VolumeRecord, Error> {
        let vdc = self.vdc(&name.vdc)?;
        self.volumes
            .values()
            .find(|r| r.vdc == vdc.uid && r.name == name.name)
            .ok_or_else(|| Error::not_found(resource::volume(name)))
    }

    /// The export of that id.
    pub fn export(&self, id: &Name) -> Result<&ExportRecord, Error> {
        self.exports.get(id).ok_or_else(|| Error::not_found(format!("exports/{id}")))
    }

    /// The snapshot of a vdc of that name.
    pub fn vdc_snapshot(&self, name: &VdcName) -> Result<&VdcSnapshotRecord, Error> {
        let vdc = self.vdc(&name.vdc)?;
        self.vdc_snapshots
            .values()
            .find(|r| r.vdc == vdc.uid && r.name == name.name && r.saved.is_none())
            .ok_or_else(|| Error::not_found(resource::vdc_snapshot(name)))
    }

    /// The snapshots of a VM, oldest first.
    pub fn vm_snapshots(&self, vm: Uuid) -> impl Iterator<Item = &VdcSnapshotRecord> {
        self.vdc_snapshots.values().filter(move |r| r.saved.as_ref().is_some_and(|saved| saved.vm == vm))
    }

    /// The snapshot of a VM of that name.
    pub fn vm_snapshot(&self, vm: &VdcName, name: &Name) -> Result<&VdcSnapshotRecord, Error> {
        let uid = self.vm(vm)?.uid;
        let found = self.vm_snapshots(uid).find(|r| r.name == *name);
        found.ok_or_else(|| Error::not_found(resource::vm_snapshot(vm, name)))
    }

    /// The API's name of a snapshot of a vdc or of a VM.
    #[must_use]
    pub fn group_resource(&self, record: &VdcSnapshotRecord) -> String {
        match &record.saved {
            Some(saved) => format!("{}/snapshots/{}", self.vm_resource(saved.vm), record.name),
            None => resource::vdc_snapshot(&self.vdc_snapshot_name(record)),
        }
    }

    /// The parts of a vdc's snapshot.
    pub fn parts_of(&self, group: Uuid) -> impl Iterator<Item = &SnapshotRecord> {
        self.snapshots.values().filter(move |r| r.group == Some(group))
    }

    /// `VDC/NAME` of a vdc's snapshot.
    #[must_use]
    pub fn vdc_snapshot_name(&self, record: &VdcSnapshotRecord) -> VdcName {
        VdcName { vdc: self.vdc_name(record.vdc), name: record.name.clone() }
    }

    /// A volume's snapshot.
    #[must_use]
    pub fn snapshot(&self, volume: Uuid, name: &Name) -> Option<&SnapshotRecord> {
        self.snapshots_of(volume).find(|r| r.name == *name)
    }

    fn vdc_name(&self, uid: Uuid) -> Name {
        // Foreign keys keep it there.
        self.vdcs
            .get(&uid)
            .map(|r| r.name.clone())
            .unwrap_or_else(|| "unknown".parse().expect("a valid name"))
    }

    /// `VDC/NAME` of a VM.
    #[must_use]
    pub fn vm_name(&self, record: &VmRecord) -> VdcName {
        VdcName { vdc: self.vdc_name(record.vdc), name: record.name.clone() }
    }

    /// `VDC/NAME` of a volume.
    #[must_use]
    pub fn volume_name(&self, record: &VolumeRecord) -> VdcName {
        VdcName { vdc: self.vdc_name(record.vdc), name: record.name.clone() }
    }

    /// The API's name of a VM, for events and errors; its id when it is gone.
    #[must_use]
    pub fn vm_resource(&self, uid: Uuid) -> String {
        self.vms.get(&uid).map_or_else(|| format!("vms/{uid}"), |r| resource::vm(&self.vm_name(r)))
    }

    /// The API's name of a volume; its id when it is gone.
    #[must_use]
    pub fn volume_resource(&self, uid: Uuid) -> String {
        self.volumes
            .get(&uid)
            .map_or_else(|| format!("volumes/{uid}"), |r| resource::volume(&self.volume_name(r)))
    }

    /// A volume's snapshots, oldest first.
    pub fn snapshots_of(&self, volume: Uuid) -> impl Iterator<Item = &SnapshotRecord> {
        self.snapshots.range((volume, 0)..=(volume, u64::MAX)).map(|(_, r)| r)
    }

    /// The volumes that a VM has: root first, then as its spec says.
    #[must_use]
    pub fn volumes_of(&self, vm: &VmRecord) -> Vec<&VolumeRecord> {
        let named = |name: &Name| {
            self.volumes.values().find(|v| v.vdc == vm.vdc && v.name == *name && v.vm == Some(vm.uid))
        };
        self.volumes
            .get(&vm.root_volume)
            .into_iter()
            .chain(vm.spec.volumes.iter().filter_map(named))
            .collect()
    }

    /// What each disk and card of a VM may do.
    #[must_use]
    pub fn limits_of(&self, vm: &VmRecord) -> DevicePlan {
        let machine = &vm.spec.machine;
        let disk = |volume: &VolumeRecord| {
            let device = match volume.uid == vm.root_volume {
                true => LimitedDevice::Root,
                false => LimitedDevice::Volume(volume.name.clone()),
            };
            (volume.uid, *machine.limits_of(&device))
        };
        let nic = |(index, nic): (u32, &NicSpec)| {
            Some((nic.mac?.bytes(), *machine.limits_of(&LimitedDevice::Nic(index))))
        };
        DevicePlan {
            disks: self.volumes_of(vm).into_iter().map(disk).collect(),
            nics: (0..).zip(&vm.spec.nics).filter_map(nic).collect(),
        }
    }

    /// Whether a VM's kernel is looked for on its root volume.
    #[must_use]
    pub fn boots_from_disk(&self, vm: &VmRecord) -> bool {
        match vm.spec.boot {
            BootFrom::Image => false,
            BootFrom::Disk => true,
            BootFrom::Auto => self.image(&vm.spec.image).is_ok_and(|image| !image.has_kernel),
        }
    }

    /// What the VMs and volumes of a vdc (of all, when `None`) are promised.
    #[must_use]
    pub fn used(&self, vdc: Option<Uuid>) -> Quota {
        let counts = |of: Uuid| vdc.is_none_or(|vdc| vdc == of);
        let vms = self.vms.values().filter(|r| counts(r.vdc)).map(|r| Quota {
            vcpus: u64::from(r.spec.vcpus.get()),
            memory_bytes: r.spec.memory.bytes(),
            storage_bytes: 0,
        });
        let volumes = self
            .volumes
            .values()
            .filter(|r| counts(r.vdc))
            .map(|r| Quota { storage_bytes: r.size_bytes, ..Quota::default() });
        vms.chain(volumes).fold(Quota::default(), |sum, one| add(&sum, &one))
    }

    /// How many snapshots the volumes of a vdc have.
    #[must_use]
    pub fn snapshots_in(&self, vdc: Uuid) -> u64 {
        let volumes = self.volumes.values().filter(|r| r.vdc == vdc);
        volumes.map(|r| self.snapshots_of(r.uid).count() as u64).sum()
    }

    /// The export of a volume's head, if there is one.
    #[must_use]
    pub fn head_export(&self, volume: Uuid) -> Option<&ExportRecord> {
        self.exports.values().find(|r| r.volume == volume && r.snapshot.is_none())
    }
}
