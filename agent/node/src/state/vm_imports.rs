//! VMs that come from another node with a snapshot: begun, filled by the gRPC side, finished; or broken off.
//!
//! ```text
//!   rows `creating`: VM, volumes, the point and its parts ─▶ Answer::VmImport: the archive may be read
//!     whole  ─▶ Command::FinishVmImport: all rows `ready`, the VM off
//!     else   ─▶ Command::AbortVmImport, or the next start: the rows of the point go, the VM is undone as any creation
//! ```
//! A VM in creation has no other snapshots, so that those which such a VM has are an import's.

use std::collections::BTreeMap;

use serio_store::{
    Change, Key,
    record::{
        Made, Millis, PointClass, Run, SavedVm, SnapshotRecord, VdcSnapshotRecord, VmRecord, VolumeRecord,
    },
};
use serio_types::{Desired, Generation, LimitedDevice, Name, Quota, VdcName, VmSpec, VolumeSize, resource};
use uuid::Uuid;

use super::{
    Refused, State, check,
    command::Answer,
    phase::{Op, Phase},
    vms::VOLUMES_MAX,
};
use crate::error::Error;

/// A VM as an archive has it, and what it shall be here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmImport {
    /// The VM's name here.
    pub name: VdcName,
    /// The point's name.
    pub point: Name,
    /// When it was saved, by the clock there.
    pub create_time: Millis,
    /// What it was; with the image that it has here.
    pub spec: VmSpec,
    /// The blake3 of that image's disk, if it must be the same.
    pub image_blake3: Option<String>,
    /// Its cards get other addresses.
    pub new_macs: bool,
    /// Root first, then as the spec has them; with the names that they had.
    pub volumes: Vec<(Name, VolumeSize)>,
    /// The volumes are named after the VM.
    pub rename: bool,
    /// How many points its own goes on from.
    pub bases: usize,
    /// Bytes of memory that the point holds.
    pub held_bytes: u64,
    /// How long it stood still, nanoseconds.
    pub paused_ns: u64,
}

/// What is to be filled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmImportPlan {
    /// The VM.
    pub vm: Uuid,
    /// The point, and those that it goes on from.
    pub points: Vec<Uuid>,
    /// Their ids and sizes, in the archive's order.
    pub volumes: Vec<(Uuid, u64)>,
    /// The vdc whose key encrypts them, if one does.
    pub key_owner: Option<Uuid>,
}

/// The rows.
struct Rows {
    vm: VmRecord,
    volumes: Vec<VolumeRecord>,
    group: VdcSnapshotRecord,
    parts: Vec<SnapshotRecord>,
    /// The reservation that it takes.
    taken: Option<Change>,
}

impl State {
    pub(super) fn begin_vm_import(&mut self, import: VmImport, op: Op) -> Result<(), Refused> {
        let name = resource::vm_snapshot(&import.name, &import.point);
        let rows = check!(op, self.plan_vm_import(import));
        let saved_bases = rows.group.saved.iter().flat_map(|saved| saved.bases.iter().copied());
        let plan = VmImportPlan {
            vm: rows.vm.uid,
            points: std::iter::once(rows.group.uid).chain(saved_bases).collect(),
            volumes: rows.volumes.iter().map(|v| (v.uid, v.size_bytes)).collect(),
            key_owner: self.key_owner(rows.vm.vdc),
        };
        let mut changes = vec![Change::Vm(Box::new(rows.vm))];
        changes.extend(rows.volumes.into_iter().map(Change::Volume));
        changes.push(Change::VdcSnapshot(rows.group));
        changes.extend(rows.parts.into_iter().map(Change::Snapshot));
        changes.extend(rows.taken);
        changes.extend(self.remember(&op, name));
        check!(op, self.commit(changes));
        self.phases.insert(plan.vm, Phase::Creating { start: false, op: Op::default() });
        // Only the first asker may write the files; the request's twin would have been answered before.
        op.finish(Ok(Answer::VmImport(plan)));
        Ok(())
    }

    fn plan_vm_import(&self, import: VmImport) -> Result<Rows, Error> {
        let vdc = self.usable_vdc(&import.name.vdc)?;
        if self.model.vm(&import.name).is_ok() {
            return Err(Error::Exists { resource: resource::vm(&import.name) });
        }
        self.image_fits(&import)?;
        if !(1..=VOLUMES_MAX.saturating_add(1)).contains(&import.volumes.len()) {
            let problem =
                format!("{}: a VM has its root and at most {VOLUMES_MAX} more", import.volumes.len());
            return Err(Error::invalid("volumes", problem));
        }
        let uid = Uuid::now_v7();
        let mut spec = import.spec;
        if import.new_macs {
            spec.nics.iter_mut().for_each(|nic| nic.mac = None);
        }
        let mut spec = self.choose_macs(spec, uid)?;
        let (mut names, mut volumes) = (BTreeMap::new(), Vec::<VolumeRecord>::new());
        for (index, (old, size)) in import.volumes.iter().enumerate() {
            let name =
                if import.rename { after_vm(&import.name.name, old, index == 0)? } else { old.clone() };
            let full = VdcName { vdc: import.name.vdc.clone(), name: name.clone() };
            if self.model.volume(&full).is_ok() || volumes.iter().any(|volume| volume.name == name) {
                return Err(Error::Exists { resource: resource::volume(&full) });
            }
            names.insert(old.clone(), name.clone());
            volumes.push(self.volume_of_import((vdc.uid, uid), name, *size));
        }
        rename_volumes(&mut spec, &names);
        let ask = Quota {
            vcpus: u64::from(spec.vcpus.get()),
            memory_bytes: spec.memory.bytes(),
            storage_bytes: volumes.iter().fold(0, |sum, v| v.size_bytes.saturating_add(sum)),
        };
        let taken = self.admit_vm(vdc, (&import.name, uid), &ask)?;
        self.admit_snapshots(&import.name.vdc, volumes.len() as u64)?;
        let vm = VmRecord {
            uid,
            vdc: vdc.uid,
            name: import.name.name.clone(),
            generation: Generation::FIRST,
            create_time: self.now,
            spec,
            root_volume: volumes.first().map(|root| root.uid).unwrap_or_default(),
            desired: Desired::Stopped,
            run: Run::Creating,
            start_time: None,
            last_end: None,
            restarts: 0,
            kernel: None,
            restore: None,
        };
        let saved = SavedVm {
            vm: uid,
            spec: vm.spec.clone(),
            memory_bytes: import.held_bytes,
            paused_ns: import.paused_ns,
            bases: (0..import.bases).map(|_| Uuid::now_v7()).collect(),
        };
        let (group, parts) = self.point_of_import(&import.point, import.create_time, saved, &volumes);
        Ok(Rows { vm, volumes, group, parts, taken })
    }

    /// The rows of its point.
    fn point_of_import(
        &self,
        name: &Name,
        create_time: Millis,
        saved: SavedVm,
        volumes: &[VolumeRecord],
    ) -> (VdcSnapshotRecord, Vec<SnapshotRecord>) {
        // No point of the future, whatever the clock there showed.
        let create_time = create_time.min(self.now);
        let group = VdcSnapshotRecord {
            uid: Uuid::now_v7(),
            vdc: volumes.first().map(|root| root.vdc).unwrap_or_default(),
            name: name.clone(),
            create_time,
            state: Made::Creating,
            saved: Some(Box::new(saved)),
        };
        let part = |volume: &VolumeRecord| SnapshotRecord {
            volume: volume.uid,
            name: name.clone(),
            number: 1,
            create_time,
            state: Made::Creating,
            size_bytes: volume.size_bytes,
            group: Some(group.uid),
            class: PointClass::Crash,
            reason: String::new(),
        };
        let parts = volumes.iter().map(part).collect();
        (group, parts)
    }

    /// The image gives the kernel of a later boot, so it must be here, and be the same.
    fn image_fits(&self, import: &VmImport) -> Result<(), Error> {
        let image = self.model.image(&import.spec.image)?;
        match &import.image_blake3 {
            Some(blake3) if *blake3 != image.blake3 => {
                let why = "has another disk than the image of that name from which the VM was made: import that one, or name an image for it";
                Err(Error::precondition(resource::image(&image.name), why))
            }
            _ => Ok(()),
        }
    }

    fn volume_of_import(&self, (vdc, vm): (Uuid, Uuid), name: Name, size: VolumeSize) -> VolumeRecord {
        VolumeRecord {
            uid: Uuid::now_v7(),
            vdc,
            name,
            generation: Generation::FIRST,
            create_time: self.now,
            state: Made::Creating,
            size_bytes: size.bytes(),
            source_image: None,
            source_snapshot: None,
            unsure: false,
            vm: Some(vm),
        }
    }

    /// All of it is there, and synced.
    pub(super) fn finish_vm_import(&mut self, vm: Uuid) -> Result<Answer, Error> {
        let gone = || Error::not_found("the VM in import");
        let group = self.imported_points(vm).next().cloned().ok_or_else(gone)?;
        let record = self.model.vms.get(&vm).cloned().ok_or_else(gone)?;
        let resource = self.model.group_resource(&group);
        let mut changes = vec![Change::Vm(Box::new(VmRecord { run: Run::Off, ..record }))];
        let volumes = self.model.volumes.values().filter(|v| v.vm == Some(vm));
        changes.extend(volumes.map(|v| Change::Volume(VolumeRecord { state: Made::Ready, ..v.clone() })));
        let parts = self.model.parts_of(group.uid);
        changes.extend(parts.map(|p| Change::Snapshot(SnapshotRecord { state: Made::Ready, ..p.clone() })));
        let ready = VdcSnapshotRecord { state: Made::Ready, ..group };
        changes.push(Change::VdcSnapshot(ready.clone()));
        changes.push(self.event(
            resource,
            "imported",
            "the VM is here with its snapshot, and can be restored",
        ));
        self.commit(changes)?;
        self.phases.insert(vm, Phase::Off);
        Ok(Answer::VdcSnapshot(self.vdc_snapshot_view(&ready)))
    }

    /// Forgets a VM that did not become whole; answered when its files are gone, with `why`.
    pub(super) fn abort_vm_import(&mut self, vm: Uuid, why: Error, op: Op) {
        if self.imported_points(vm).next().is_none() {
            return op.finish(Err(why));
        }
        self.forget_imported_points(vm);
        let taken = self.give_back(vm);
        self.record(taken.into_iter().collect());
        self.undo_create(vm, why, op);
    }

    /// After a start: imports that were broken off by the end of seriod. Their VMs are undone as any creation.
    pub(super) fn recover_vm_imports(&mut self) {
        let begun: Vec<Uuid> =
            self.model.vms.values().filter(|vm| vm.run == Run::Creating).map(|vm| vm.uid).collect();
        begun.into_iter().for_each(|vm| self.forget_imported_points(vm));
    }

    fn imported_points(&self, vm: Uuid) -> impl Iterator<Item = &VdcSnapshotRecord> {
        let creating = self.model.vms.get(&vm).is_some_and(|r| r.run == Run::Creating);
        self.model.vm_snapshots(vm).filter(move |r| creating && r.state == Made::Creating)
    }

    /// The rows of the point go; its files are the VM's, and its parts the volumes', and go with them.
    fn forget_imported_points(&mut self, vm: Uuid) {
        let mut changes = Vec::new();
        for group in self.imported_points(vm) {
            let parts = self.model.parts_of(group.uid);
            changes.extend(parts.map(|p| Change::Delete(Key::Snapshot(p.volume, p.name.clone()))));
            changes.push(Change::Delete(Key::VdcSnapshot(group.uid)));
            changes.push(Change::Delete(Key::RequestsOf(self.model.group_resource(group))));
        }
        self.record(changes);
    }
}

/// What a volume is called that is named after its VM.
fn after_vm(vm: &Name, old: &Name, root: bool) -> Result<Name, Error> {
    let suffix = if root { "root" } else { old.as_str() };
    format!("{vm}-{suffix}").parse().map_err(|_| {
        Error::invalid("target.vm_id", format!("`{vm}` is too long: it has a volume {vm}-{suffix}"))
    })
}

/// In all places of a spec that name them.
pub(super) fn rename_volumes(spec: &mut VmSpec, names: &BTreeMap<Name, Name>) {
    let limited = spec.machine.device_limits.iter_mut().filter_map(|one| match &mut one.device {
        LimitedDevice::Volume(name) => Some(name),
        LimitedDevice::Root | LimitedDevice::Nic(_) => None,
    });
    for name in spec.volumes.iter_mut().chain(limited) {
        if let Some(new) = names.get(name) {
            name.clone_from(new);
        }
    }
}
