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

use serio_store::{
    Change,
    record::{Made, Run, SavedVm, SnapshotRecord, VdcSnapshotRecord},
};
use serio_types::{Name, VdcName, resource};
use uuid::Uuid;

use super::{
    Refused, State, check,
    command::VdcSnapshotView,
    effect::{Effect, SavedSize},
    phase::{Op, Phase, VolumeOp},
    refuse,
};
use crate::error::Error;

/// The most points of a VM: each has all its memory on the disk.
const SNAPSHOTS_MAX: usize = 64;

impl State {
    pub(super) fn snapshot_vm(&mut self, name: &VdcName, point: Name, op: Op) -> Result<(), Refused> {
        let (group, parts, pid) = check!(op, self.plan_vm_snapshot(name, &point));
        let Some(saved) = &group.saved else { return Ok(()) };
        let (uid, vm, memory_bytes) = (group.uid, saved.vm, saved.spec.memory.bytes());
        let volumes: Vec<Uuid> = parts.iter().map(|part| part.volume).collect();
        let mut changes = vec![Change::VdcSnapshot(group)];
        changes.extend(parts.into_iter().map(Change::Snapshot));
        changes.extend(self.remember(&op, resource::vm_snapshot(name, &point)));
        check!(op, self.commit(changes));
        for volume in &volumes {
            self.volume_ops.insert(*volume, VolumeOp::VdcSnapshot);
        }
        self.hold_orders(vm, pid);
        self.group_ops.insert(uid, op);
        self.out.push(Effect::SaveVm { group: uid, vm, pid, name: point, volumes, memory_bytes });
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
        let saved = SavedVm { vm: vm.uid, spec: vm.spec.clone(), memory_bytes: 0, paused_ns: 0 };
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
        self.release_orders(saved.vm);
        let (result, saved) = match result {
            Ok(SavedSize { memory_bytes, paused_ns }) => {
                (Ok(Vec::new()), Some(Box::new(SavedVm { memory_bytes, paused_ns, ..*saved })))
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
        self.delete_group(&record, op)
    }

    /// Takes away the files of a VM's point; of a vdc's there are none.
    pub(super) fn remove_saved(&mut self, record: &VdcSnapshotRecord) {
        if let Some(saved) = &record.saved {
            self.out.push(Effect::RemoveSaved { vm: saved.vm, group: record.uid });
        }
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
