//! Points of whole VMs: memory, machine and volumes at one instant.
//!
//! They are points of vdcs in all but three things ([`super::vdc_snapshots`] has the course of both): their parts are the volumes
//! of one running VM, the VMM itself seals them while it stands still, and there are files beside the volumes, which
//! `STATE/vms/VM/saved/POINT` holds:
//!
//! ```text
//!   row `creating` ─▶ Effect::SaveVm ─▶ row `ready`, with what was saved
//!   row `deleting` ─▶ the files go (again at each start, until the row is gone), and the parts are merged away
//! ```
//!
//! A VM that was saved before, and has not booted since, is saved as a *diff*: only the pages that changed. The row of a diff
//! names all points that it goes on from (`bases`), and their files stay as long as such a row does: whoever deletes a
//! point deletes its row and its parts of the volumes at once, and gives the room of its memory back with the last diff that needs it. No more than
//! [`BASES_MAX`] diffs follow a whole point, so that this is not for ever.

use serio_store::{
    Change,
    record::{Made, Run, SavedVm, SnapshotRecord, VdcSnapshotRecord},
};
use serio_types::{Name, VdcName, resource};
use uuid::Uuid;

use super::{
    Refused, State, check,
    command::VdcSnapshotView,
    effect::{Effect, SaveOne, SavedSize},
    phase::{Op, Phase, VolumeOp},
    refuse,
    vm_orders::Order,
};
use crate::error::Error;

/// The most points of a VM: each has all its memory on the disk.
const SNAPSHOTS_MAX: usize = 64;

/// So many diffs follow a point that is whole; then comes the next whole one.
const BASES_MAX: usize = 8;

impl State {
    pub(super) fn snapshot_vm(&mut self, name: &VdcName, point: Name, op: Op) -> Result<(), Refused> {
        let (group, parts, pid) = check!(op, self.plan_vm_snapshot(name, &point));
        let Some(saved) = &group.saved else { return Ok(()) };
        let (uid, vm, memory_bytes) = (group.uid, saved.vm, saved.spec.memory.bytes());
        let volumes: Vec<Uuid> = parts.iter().map(|part| part.volume).collect();
        let bases = self.possible_bases(vm);
        let mut changes = vec![Change::VdcSnapshot(group)];
        changes.extend(parts.into_iter().map(Change::Snapshot));
        changes.extend(self.remember(&op, resource::vm_snapshot(name, &point)));
        check!(op, self.commit(changes));
        for volume in &volumes {
            self.volume_ops.insert(*volume, VolumeOp::VdcSnapshot);
        }
        self.hold_orders(vm, pid, Order::Save, Op::default());
        self.group_ops.insert(uid, op);
        let save = SaveOne { group: uid, vm, pid, name: point, volumes, memory_bytes, bases };
        self.out.push(Effect::SaveVm(save));
        Ok(())
    }

    fn plan_vm_snapshot(
        &self,
        name: &VdcName,
        point: &Name,
    ) -> Result<(VdcSnapshotRecord, Vec<SnapshotRecord>, u32), Error> {
        let vm = self.idle_vm(name)?;
        let resource = resource::vm(name);
        let Some(Phase::Running { pid }) = self.phases.get(&vm.uid) else {
            let why = "does not run: a snapshot of its volumes holds all of it";
            return Err(Error::precondition(resource, why));
        };
        if let Some(operation) = self.order_under_way(vm.uid) {
            return Err(Error::Busy { resource, operation });
        }
        if self.model.vm_snapshot(name, point).is_ok() {
            return Err(Error::Exists { resource: resource::vm_snapshot(name, point) });
        }
        if self.model.vm_snapshots(vm.uid).count() >= SNAPSHOTS_MAX {
            let why = format!("has {SNAPSHOTS_MAX} snapshots, which is the most");
            return Err(Error::precondition(resource, why));
        }
        let uid = Uuid::now_v7();
        let mut parts = Vec::new();
        for volume in self.model.volumes_of(vm) {
            let (record, _) = self.plan_point(&self.model.volume_name(volume), point)?;
            parts.push(SnapshotRecord { group: Some(uid), ..record });
        }
        self.admit_snapshots(&name.vdc, parts.len() as u64)?;
        let saved =
            SavedVm { vm: vm.uid, spec: vm.spec.clone(), memory_bytes: 0, paused_ns: 0, bases: Vec::new() };
        let group = VdcSnapshotRecord {
            uid,
            vdc: vm.vdc,
            name: point.clone(),
            create_time: self.now,
            state: Made::Creating,
            saved: Some(Box::new(saved)),
        };
        Ok((group, parts, *pid))
    }

    pub(super) fn vm_saved(&mut self, group: Uuid, result: Result<SavedSize, Error>) {
        let Some(saved) = self.model.vdc_snapshots.get(&group).and_then(|r| r.saved.clone()) else { return };
        self.release_orders(saved.vm, Order::Save);
        let whole = result.and_then(|size| Ok((self.bases_of(size.base)?, size)));
        let (result, saved) = match whole {
            Ok((bases, SavedSize { memory_bytes, paused_ns, .. })) => {
                (Ok(Vec::new()), Some(Box::new(SavedVm { memory_bytes, paused_ns, bases, ..*saved })))
            }
            Err(error) => (Err(error), None),
        };
        self.group_sealed(group, result, saved);
    }

    pub(super) fn delete_vm_snapshot(&mut self, name: &VdcName, point: &Name, op: Op) -> Result<(), Refused> {
        let record = check!(op, self.model.vm_snapshot(name, point)).clone();
        if let Some(user) = self.model.vms.values().find(|vm| vm.restore == Some(record.uid)) {
            let why = format!("is where {} is about to go on", self.model.vm_resource(user.uid));
            return refuse(op, Error::precondition(resource::vm_snapshot(name, point), why));
        }
        let vm = record.saved.as_ref().map(|saved| saved.vm);
        let saving = vm.is_some_and(|vm| self.model.vm_snapshots(vm).any(|r| r.state == Made::Creating));
        if saving && record.state != Made::Creating {
            // It may be going on from this one.
            let resource = resource::vm_snapshot(name, point);
            return refuse(op, Error::Busy { resource, operation: "another snapshot of its VM" });
        }
        self.delete_group(&record, op)
    }

    /// The points of a VM that the next one may go on from.
    fn possible_bases(&self, vm: Uuid) -> Vec<Uuid> {
        let short = |r: &&VdcSnapshotRecord| r.saved.as_ref().is_some_and(|s| s.bases.len() < BASES_MAX);
        self.model.vm_snapshots(vm).filter(|r| r.state == Made::Ready).filter(short).map(|r| r.uid).collect()
    }

    /// What is to be kept for a point that goes on from `base`.
    fn bases_of(&self, base: Option<Uuid>) -> Result<Vec<Uuid>, Error> {
        let Some(base) = base else { return Ok(Vec::new()) };
        let row = self.model.vdc_snapshots.get(&base).filter(|r| r.state == Made::Ready);
        let saved = row.and_then(|r| r.saved.as_ref()).ok_or_else(|| {
            Error::not_found(format!("the snapshot {base}, from which the VM says that it goes on"))
        })?;
        Ok(std::iter::once(base).chain(saved.bases.iter().copied()).collect())
    }

    /// Takes away the files of a VM's point, and those that were only kept for it; of a vdc's there are none.
    pub(super) fn remove_saved(&mut self, record: &VdcSnapshotRecord) {
        let Some(saved) = &record.saved else { return };
        if !self.is_base(record.uid, record.uid) {
            self.out.push(Effect::RemoveSaved { vm: saved.vm, group: record.uid });
        }
        for base in &saved.bases {
            let there = self.model.vdc_snapshots.get(base).is_some_and(|r| r.state != Made::Deleting);
            if !there && !self.is_base(*base, record.uid) {
                self.out.push(Effect::RemoveSaved { vm: saved.vm, group: *base });
            }
        }
    }

    /// Whether a point other than `but` cannot be restored without this one.
    fn is_base(&self, group: Uuid, but: Uuid) -> bool {
        let needs = |r: &VdcSnapshotRecord| r.saved.as_ref().is_some_and(|s| s.bases.contains(&group));
        self.model.vdc_snapshots.values().any(|r| r.uid != but && r.state != Made::Deleting && needs(r))
    }

    /// A VM is gone: its points are of no use to anybody, and what is left of them goes.
    pub(super) fn drop_vm_snapshots(&mut self, vm: Uuid) {
        let left: Vec<Uuid> =
            self.model.vm_snapshots(vm).filter(|r| r.state == Made::Ready).map(|r| r.uid).collect();
        for group in left {
            if let Err(error) = self.dissolve(group, Vec::new(), &Op::default()) {
                tracing::error!("the next start tries again to delete: {}", crate::error::chain(&error));
            }
        }
    }

    /// The snapshots of a VM, oldest first.
    pub(super) fn vm_snapshots(&self, vm: &VdcName) -> Result<Vec<VdcSnapshotView>, Error> {
        let uid = self.model.vm(vm)?.uid;
        let whole = self.model.vm_snapshots(uid).filter(|r| r.state != Made::Creating);
        Ok(whole.map(|r| self.vdc_snapshot_view(r)).collect())
    }

    /// Whether a VM was to go on from another one's point and never did.
    pub(super) fn is_unborn_clone(&self, vm: &serio_store::record::VmRecord) -> bool {
        let from = vm.restore.and_then(|group| self.model.vdc_snapshots.get(&group));
        let other = from.and_then(|r| r.saved.as_ref()).is_some_and(|saved| saved.vm != vm.uid);
        other && vm.run != Run::DeletingKeepRoot
    }
}
