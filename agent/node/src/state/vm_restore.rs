//! VMs that go on from a point: the same one in its place, or a new one beside it.
//!
//! ```text
//!   restore   volumes `unsure`, VM `starting`, `restore` = the point ─▶ Effect::Launch: the volumes go back, then it runs
//!   clone     rows `creating` ─▶ Effect::CloneVolumes ─▶ VM `starting`, `restore` = the point ─▶ Effect::Launch
//! ```
//! A row's `restore` stands until its guest runs or its start has failed for good: a seriod that dies before is continued by one
//! that takes the volumes back once more, which changes nothing, and starts again. What a clone was given is taken away
//! with it if it never ran.

use std::collections::BTreeMap;

use serio_store::{
    Change,
    record::{Made, Run, SnapshotRecord, VdcSnapshotRecord, VmRecord, VolumeRecord},
};
use serio_types::{Desired, Generation, Name, Quota, SnapshotName, VdcName, VmSpec, resource};
use uuid::Uuid;

use super::{
    Refused, State, check,
    effect::{CloneOne, Effect, Restore},
    phase::{Cause, Op, Phase, VolumeOp},
    vm_imports::rename_volumes,
};
use crate::error::Error;

/// What a clone takes: its row, those of its volumes, and how they are made.
struct Clone {
    vm: VmRecord,
    volumes: Vec<VolumeRecord>,
    clones: Vec<CloneOne>,
}

impl State {
    pub(super) fn restore_vm(
        &mut self,
        name: &VdcName,
        point: &Name,
        discard_later: bool,
        op: Op,
    ) -> Result<(), Refused> {
        let (mut record, volumes) = check!(op, self.plan_restore_in_place(name, point, discard_later));
        record.desired = Desired::Running;
        record.run = Run::Starting;
        record.generation = record.generation.next();
        let uid = record.uid;
        let mut changes = vec![Change::Vm(Box::new(record))];
        changes.extend(volumes.into_iter().map(|v| Change::Volume(VolumeRecord { unsure: true, ..v })));
        changes.extend(self.remember(&op, resource::vm(name)));
        check!(op, self.commit(changes));
        self.streaks.remove(&uid);
        self.launch(uid, Cause::Start(op));
        Ok(())
    }

    /// A point that a VM can go on from, with its parts.
    fn whole_vm_snapshot(
        &self,
        name: &VdcName,
        point: &Name,
    ) -> Result<(VdcSnapshotRecord, Vec<SnapshotRecord>), Error> {
        let group = self.model.vm_snapshot(name, point)?;
        if group.state != Made::Ready {
            let why = "is not whole: it is being made or deleted";
            return Err(Error::precondition(resource::vm_snapshot(name, point), why));
        }
        Ok((group.clone(), self.model.parts_of(group.uid).cloned().collect()))
    }

    fn plan_restore_in_place(
        &self,
        name: &VdcName,
        point: &Name,
        discard_later: bool,
    ) -> Result<(VmRecord, Vec<VolumeRecord>), Error> {
        let mut vm = self.idle_vm(name)?.clone();
        if !matches!(self.phases.get(&vm.uid), None | Some(Phase::Off)) {
            return Err(Error::precondition(
                resource::vm(name),
                "runs: stop it first, or restore it as a new one",
            ));
        }
        if matches!(vm.run, Run::Deleting | Run::DeletingKeepRoot) {
            return Err(Error::precondition(resource::vm(name), "is being deleted"));
        }
        let (group, parts) = self.whole_vm_snapshot(name, point)?;
        let mut volumes = Vec::new();
        for volume in self.model.volumes_of(&vm) {
            let volume_name = self.model.volume_name(volume);
            if !parts.iter().any(|part| part.volume == volume.uid) {
                let why = format!("has no part of {}", resource::volume(&volume_name));
                return Err(Error::precondition(resource::vm_snapshot(name, point), why));
            }
            let part = SnapshotName { volume: volume_name, snapshot: point.clone() };
            volumes.push(self.plan_rollback(&part, discard_later)?);
        }
        if let Some(lacking) =
            self.spec_of(&group)?.volumes.iter().find(|name| !vm.spec.volumes.contains(name))
        {
            let full = resource::volume(&VdcName { vdc: name.vdc.clone(), name: lacking.clone() });
            let why =
                format!("has a part of {full}, which the VM has given back since: attach it again first");
            return Err(Error::precondition(resource::vm_snapshot(name, point), why));
        }
        let before = (u64::from(vm.spec.vcpus.get()), vm.spec.memory.bytes());
        vm.spec = self.spec_of(&group)?;
        self.macs_free(&vm).map_err(|why| Error::precondition(resource::vm_snapshot(name, point), why))?;
        let more = Quota {
            vcpus: u64::from(vm.spec.vcpus.get()).saturating_sub(before.0),
            memory_bytes: vm.spec.memory.bytes().saturating_sub(before.1),
            storage_bytes: 0,
        };
        let vdc = self.usable_vdc(&name.vdc)?;
        if more != Quota::default() {
            serio_vdc::admit(&self.pools(vdc), &more)?;
        }
        vm.restore = Some(group.uid);
        Ok((vm, volumes))
    }

    /// The volumes that a VM had when its snapshot with those parts was taken: it may have given some back since.
    fn volumes_then(
        &self,
        vm: &VmRecord,
        names: &[Name],
        parts: &[SnapshotRecord],
    ) -> Result<Vec<&VolumeRecord>, Error> {
        let root = self.model.volumes.get(&vm.root_volume);
        let mut then: Vec<&VolumeRecord> = root.into_iter().collect();
        for name in names {
            let full = VdcName { vdc: self.model.vm_name(vm).vdc, name: name.clone() };
            let volume = self.model.volume(&full)?;
            if !parts.iter().any(|part| part.volume == volume.uid) {
                let why =
                    "is another volume than the one that the VM's snapshot has a part of, which is deleted";
                return Err(Error::precondition(resource::volume(&full), why));
            }
            then.push(volume);
        }
        Ok(then)
    }

    /// A VM that goes back to a snapshot may have given a card away since, and another one its address.
    fn macs_free(&self, vm: &VmRecord) -> Result<(), String> {
        let others = self.model.vms.values().filter(|other| other.uid != vm.uid);
        let taken: Vec<_> = others.flat_map(|other| &other.spec.nics).filter_map(|nic| nic.mac).collect();
        match vm.spec.nics.iter().filter_map(|nic| nic.mac).find(|mac| taken.contains(mac)) {
            Some(mac) => Err(format!("has a card with the address {mac}, which another VM has now")),
            None => Ok(()),
        }
    }

    fn spec_of(&self, group: &VdcSnapshotRecord) -> Result<VmSpec, Error> {
        let gone = || Error::not_found(self.model.group_resource(group));
        group.saved.as_ref().map(|saved| saved.spec.clone()).ok_or_else(gone)
    }

    pub(super) fn clone_vm(
        &mut self,
        name: &VdcName,
        point: &Name,
        clone: Name,
        op: Op,
    ) -> Result<(), Refused> {
        let clone = VdcName { vdc: name.vdc.clone(), name: clone };
        let Clone { vm, volumes, clones } = check!(op, self.plan_vm_clone(name, point, &clone));
        let (uid, root) = (vm.uid, vm.root_volume);
        let mut changes = vec![Change::Vm(Box::new(vm))];
        changes.extend(volumes.into_iter().map(Change::Volume));
        changes.extend(self.remember(&op, resource::vm(&clone)));
        check!(op, self.commit(changes));
        for one in &clones {
            self.lend(one.source, one.volume);
        }
        self.phases.insert(uid, Phase::Creating { start: true, op });
        self.out.push(Effect::CloneVolumes { root, clones });
        Ok(())
    }

    fn plan_vm_clone(&self, name: &VdcName, point: &Name, clone: &VdcName) -> Result<Clone, Error> {
        let source = self.model.vm(name)?.clone();
        let (group, parts) = self.whole_vm_snapshot(name, point)?;
        if self.model.vm(clone).is_ok() {
            return Err(Error::Exists { resource: resource::vm(clone) });
        }
        let uid = Uuid::now_v7();
        let mut spec = self.spec_of(&group)?;
        spec.nics.iter_mut().for_each(|nic| nic.mac = None);
        let mut spec = self.choose_macs(spec, uid)?;
        let (mut volumes, mut clones, mut names) = (Vec::new(), Vec::new(), BTreeMap::new());
        for volume in self.volumes_then(&source, &spec.volumes, &parts)? {
            let root = volume.uid == source.root_volume;
            let suffix = if root { "root" } else { volume.name.as_str() };
            let new = format!("{}-{suffix}", clone.name).parse::<Name>().map_err(|_| {
                Error::invalid(
                    "as_new",
                    format!("`{}` is too long: it has a volume {}-{suffix}", clone.name, clone.name),
                )
            })?;
            let part = SnapshotName { volume: self.model.volume_name(volume), snapshot: point.clone() };
            let full = VdcName { vdc: clone.vdc.clone(), name: new.clone() };
            let (record, source) = self.plan_clone(&part, &full, None)?;
            if !root {
                names.insert(volume.name.clone(), new);
            }
            let (volume, size_bytes) = (record.uid, record.size_bytes);
            clones.push(CloneOne { volume, size_bytes, source, point: point.clone() });
            volumes.push(VolumeRecord { vm: Some(uid), ..record });
        }
        rename_volumes(&mut spec, &names);
        let ask = Quota {
            vcpus: u64::from(spec.vcpus.get()),
            memory_bytes: spec.memory.bytes(),
            storage_bytes: volumes.iter().fold(0, |sum, v| v.size_bytes.saturating_add(sum)),
        };
        serio_vdc::admit(&self.pools(self.usable_vdc(&clone.vdc)?), &ask)?;
        let root_volume = volumes.first().map(|root| root.uid).unwrap_or_default();
        let vm = VmRecord {
            uid,
            name: clone.name.clone(),
            generation: Generation::FIRST,
            create_time: self.now,
            spec,
            root_volume,
            desired: Desired::Running,
            run: Run::Creating,
            start_time: None,
            last_end: None,
            restarts: 0,
            kernel: None,
            restore: Some(group.uid),
            vdc: source.vdc,
        };
        Ok(Clone { vm, volumes, clones })
    }

    /// The volumes of a new VM were made, or not.
    pub(super) fn return_loans_of(&mut self, vm: Uuid) {
        let made: Vec<Uuid> =
            self.model.volumes.values().filter(|v| v.vm == Some(vm)).map(|v| v.uid).collect();
        made.into_iter().for_each(|volume| self.return_loan(volume));
    }

    /// Where a VM goes on at its next start, if not from its boot.
    pub(super) fn plan_restore(&self, vm: &VmRecord) -> Result<Option<Restore>, Error> {
        let Some(group) = vm.restore else { return Ok(None) };
        let gone =
            || Error::precondition(self.model.vm_resource(vm.uid), "was to go on from a point that is gone");
        let saved = self.model.vdc_snapshots.get(&group).and_then(|r| r.saved.as_ref()).ok_or_else(gone)?;
        let in_place = saved.vm == vm.uid;
        let parts = self.model.parts_of(group).filter(|_| in_place);
        let rollback = parts.map(|part| (part.volume, part.name.clone())).collect();
        Ok(Some(Restore { vm: saved.vm, group, bases: saved.bases.clone(), rollback }))
    }

    /// A VM was found running: where it was to go on, it has.
    pub(super) fn restored(&mut self, uid: Uuid) {
        let Some(vm) = self.model.vms.get(&uid).filter(|vm| vm.restore.is_some()) else { return };
        let vm = VmRecord { restore: None, ..vm.clone() };
        self.record(vec![Change::Vm(Box::new(vm))]);
        self.look_at_volumes(uid);
    }

    /// Whether nobody knows what a volume's headers say, and it may be asked now.
    pub(super) fn to_be_looked_at(&self, volume: &VolumeRecord) -> bool {
        let vm = volume.vm.and_then(|vm| self.model.vms.get(&vm));
        volume.unsure && volume.state == Made::Ready && vm.is_none_or(|vm| vm.restore.is_none())
    }

    /// After a restore: the rows follow what the headers of the volumes say.
    pub(super) fn look_at_volumes(&mut self, vm: Uuid) {
        let unsure: Vec<Uuid> = self
            .model
            .volumes
            .values()
            .filter(|v| v.vm == Some(vm) && self.to_be_looked_at(v) && !self.volume_ops.contains_key(&v.uid))
            .map(|v| v.uid)
            .collect();
        for volume in unsure {
            self.volume_ops.insert(volume, VolumeOp::Inspect { failed: None });
            self.out.push(Effect::Inspect { volume });
        }
    }

    /// The volume of a clone that never ran goes with it. The row that says so.
    pub(super) fn drop_clone(&mut self, volume: VolumeRecord) -> Option<Change> {
        if self.volume_ops.contains_key(&volume.uid) {
            // After a start it is on its way already.
            return Some(Change::Volume(VolumeRecord { vm: None, ..volume }));
        }
        self.volume_ops.insert(volume.uid, VolumeOp::Delete { op: Op::default(), undone: None });
        self.out.push(Effect::DeleteVolume { volume: volume.uid });
        Some(Change::Volume(VolumeRecord { vm: None, state: Made::Deleting, ..volume }))
    }
}
