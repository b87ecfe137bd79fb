//! Answers to questions: rows with what is.

use serio_store::record::{ExportRecord, Made, Run, SnapshotRecord, VdcRecord, VmRecord, VolumeRecord};
use uuid::Uuid;

use super::{
    State,
    command::{Answer, ExportView, Query, SnapshotView, VdcView, VmState, VmView, VolumeView},
    phase::{After, Phase},
};
use crate::error::Error;

/// Sorted by a key.
fn sorted<T, K: Ord>(items: impl Iterator<Item = T>, key: impl Fn(&T) -> K) -> Vec<T> {
    let mut all: Vec<T> = items.collect();
    all.sort_by_key(key);
    all
}

impl State {
    pub(super) fn query(&self, query: &Query) -> Result<Answer, Error> {
        let vdc_uid = |name: &Option<_>| name.as_ref().map(|n| self.model.vdc(n).map(|r| r.uid)).transpose();
        let within = |of: Uuid, vdc: Option<Uuid>| vdc.is_none_or(|vdc| vdc == of);
        Ok(match query {
            Query::Vdcs(Some(name)) => Answer::Vdcs(vec![self.vdc_view(self.model.vdc(name)?)]),
            Query::Vdcs(None) => {
                Answer::Vdcs(sorted(self.model.vdcs.values().map(|r| self.vdc_view(r)), |v| {
                    v.record.name.clone()
                }))
            }
            Query::Vm(name) => Answer::Vms(vec![self.vm_view(self.model.vm(name)?)]),
            Query::Vms(vdc) => {
                let vdc = vdc_uid(vdc)?;
                let rows = self.model.vms.values().filter(|r| within(r.vdc, vdc));
                Answer::Vms(sorted(rows.map(|r| self.vm_view(r)), |v| v.name.clone()))
            }
            Query::Volume(name) => Answer::Volumes(vec![self.volume_view(self.model.volume(name)?)]),
            Query::Volumes(vdc) => {
                let vdc = vdc_uid(vdc)?;
                let rows = self.model.volumes.values().filter(|r| within(r.vdc, vdc));
                Answer::Volumes(sorted(rows.map(|r| self.volume_view(r)), |v| v.name.clone()))
            }
            Query::Snapshots(volume) => {
                let uid = self.model.volume(volume)?.uid;
                let ready = self.model.snapshots_of(uid).filter(|r| r.state == Made::Ready);
                Answer::Snapshots(ready.map(|r| self.snapshot_view(r)).collect())
            }
            Query::VdcSnapshots(vdc) => Answer::VdcSnapshots(self.vdc_snapshots(vdc)?),
            Query::VmSnapshots(vm) => Answer::VdcSnapshots(self.vm_snapshots(vm)?),
            Query::Operation(uid) => Answer::Operation(self.operation(*uid)?.clone()),
            Query::Operations { target_prefix, running_only } => {
                Answer::Operations(self.list_operations(target_prefix, *running_only))
            }
            Query::Exports => {
                let ready = self.model.exports.values().filter(|r| r.state == Made::Ready);
                Answer::Exports(sorted(ready.map(|r| self.export_view(r)), |v| v.record.create_time))
            }
            Query::Images(Some(name)) => Answer::Images(vec![self.model.image(name)?.clone()]),
            Query::Images(None) => {
                let ready = self.model.images.values().filter(|r| r.state == Made::Ready);
                Answer::Images(sorted(ready.cloned(), |r| r.name.clone()))
            }
            Query::Events { from, limit } => Answer::Events(self.store.events(*from, *limit)?),
        })
    }

    pub(super) fn vdc_view(&self, record: &VdcRecord) -> VdcView {
        VdcView {
            record: record.clone(),
            used: self.model.used(Some(record.uid)),
            snapshots: self.model.snapshots_in(record.uid),
        }
    }

    /// What a VM does, and the process that runs it.
    pub(super) fn standing(&self, record: &VmRecord) -> (VmState, Option<u32>) {
        match self.phases.get(&record.uid).unwrap_or(&Phase::Off) {
            Phase::Off if record.run == Run::Failed => (VmState::Failed, None),
            Phase::Off => (VmState::Stopped, None),
            Phase::Creating { .. }
            | Phase::Launching { .. }
            | Phase::Pausing { .. }
            | Phase::Cleaning { after: After::Again { .. } | After::Launch } => (VmState::Starting, None),
            Phase::Running { pid } if record.run == Run::Paused => (VmState::Paused, Some(*pid)),
            Phase::Running { pid } => (VmState::Running, Some(*pid)),
            Phase::Stopping { pid, .. } => (VmState::Stopping, Some(*pid)),
            Phase::Cleaning { .. } | Phase::Deleting { .. } => (VmState::Stopping, None),
            Phase::Adopting { .. } if record.run == Run::Paused => (VmState::Paused, None),
            Phase::Adopting { .. } if record.run == Run::Running => (VmState::Running, None),
            Phase::Adopting { .. } if record.run == Run::Starting => (VmState::Starting, None),
            Phase::Adopting { .. } => (VmState::Stopping, None),
        }
    }

    pub(super) fn vm_view(&self, record: &VmRecord) -> VmView {
        let (state, pid) = self.standing(record);
        VmView {
            name: self.model.vm_name(record),
            root_volume: self.model.volumes.get(&record.root_volume).map(|v| self.model.volume_name(v)),
            record: record.clone(),
            state,
            pid,
            troubles: self.troubles.get(&record.uid).cloned().unwrap_or_default(),
        }
    }

    pub(super) fn volume_view(&self, record: &VolumeRecord) -> VolumeView {
        let ready = self.model.snapshots_of(record.uid).filter(|r| r.state == Made::Ready);
        VolumeView {
            name: self.model.volume_name(record),
            attached_to: record.vm.and_then(|vm| self.model.vms.get(&vm)).map(|vm| self.model.vm_name(vm)),
            snapshots: ready.map(|r| r.name.clone()).collect(),
            record: record.clone(),
        }
    }

    pub(super) fn snapshot_view(&self, record: &SnapshotRecord) -> SnapshotView {
        let volume = self.model.volumes.get(&record.volume).map(|v| self.model.volume_name(v));
        SnapshotView {
            volume: volume.expect("foreign keys keep a snapshot's volume"),
            group: record
                .group
                .and_then(|group| self.model.vdc_snapshots.get(&group))
                .map(|group| self.model.vdc_snapshot_name(group)),
            record: record.clone(),
        }
    }

    pub(super) fn export_view(&self, record: &ExportRecord) -> ExportView {
        let volume = self.model.volumes.get(&record.volume).map(|v| self.model.volume_name(v));
        let mut record = record.clone();
        // As the wall clock will show it then; in whole seconds, so that it is the same each time.
        let ahead_s = self.now.0.saturating_sub(self.steady.0) / 1000;
        record.expire_time.0 = record.expire_time.0.saturating_add(ahead_s.saturating_mul(1000));
        ExportView { volume: volume.expect("foreign keys keep an export's volume"), record }
    }

    /// The answer of an operation on a VM.
    pub(super) fn answer_vm(&self, uid: Uuid) -> Result<Answer, Error> {
        let record = self.model.vms.get(&uid).ok_or_else(|| Error::not_found(format!("vms/{uid}")))?;
        Ok(Answer::Vm(Box::new(self.vm_view(record))))
    }

    /// The answer of an operation on a volume.
    pub(super) fn answer_volume(&self, uid: Uuid) -> Result<Answer, Error> {
        let record =
            self.model.volumes.get(&uid).ok_or_else(|| Error::not_found(format!("volumes/{uid}")))?;
        Ok(Answer::Volume(self.volume_view(record)))
    }
}
