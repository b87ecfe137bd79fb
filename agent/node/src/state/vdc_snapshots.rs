//! Points of whole vdcs: all volumes sealed at one instant, or none.
//!
//! ```text
//!   rows: the whole and its parts `creating` ──▶ Effect::VdcSnapshot ──all sealed──▶ all `ready`   (one commit)
//!                                                       │ anything else, or seriod died
//!                                                       ▼
//!                             the whole and its parts `deleting` ──▶ an operation merges away what was sealed
//! ```
//! The commit of `ready` is the instant at which the whole exists; before it every end leads to nothing.

use std::collections::BTreeSet;

use serio_store::{
    Change, Key,
    record::{Made, OperationKind, SavedVm, SnapshotRecord, VdcSnapshotRecord, VolumeRecord},
};
use serio_types::{Name, VdcName, resource};
use uuid::Uuid;

use super::{
    Refused, State, check,
    command::{Answer, VdcSnapshotView},
    effect::{Effect, Goal, Part, SealedPart},
    phase::{Op, VolumeOp},
    refuse,
};
use crate::error::Error;

/// What is wanted of a vdc's snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Consistency {
    /// Ask the guests' agents to freeze.
    pub app: bool,
    /// Rather none than one that is not frozen.
    pub required: bool,
}

impl State {
    pub(super) fn create_vdc_snapshot(
        &mut self,
        name: &VdcName,
        consistency: Consistency,
        op: Op,
    ) -> Result<(), Refused> {
        let (parts, records) = check!(op, self.plan_vdc_snapshot(name));
        check!(op, self.admit_snapshots(&name.vdc, records.len() as u64));
        let vdc = check!(op, self.model.vdc(&name.vdc)).uid;
        let group = VdcSnapshotRecord {
            uid: Uuid::now_v7(),
            vdc,
            name: name.name.clone(),
            create_time: self.now,
            state: Made::Creating,
            saved: None,
        };
        let uid = group.uid;
        let mut changes = vec![Change::VdcSnapshot(group)];
        changes
            .extend(records.into_iter().map(|r| Change::Snapshot(SnapshotRecord { group: Some(uid), ..r })));
        changes.extend(self.remember(&op, resource::vdc_snapshot(name)));
        check!(op, self.commit(changes));
        for part in &parts {
            self.volume_ops.insert(part.volume, VolumeOp::VdcSnapshot);
        }
        self.group_ops.insert(uid, op);
        self.out.push(Effect::VdcSnapshot { group: uid, name: name.name.clone(), consistency, parts });
        Ok(())
    }

    fn plan_vdc_snapshot(&self, name: &VdcName) -> Result<(Vec<Part>, Vec<SnapshotRecord>), Error> {
        let vdc = self.model.vdc(&name.vdc)?.uid;
        if self.model.vdc_snapshot(name).is_ok() {
            return Err(Error::Exists { resource: resource::vdc_snapshot(name) });
        }
        let volumes: Vec<&VolumeRecord> = self.model.volumes.values().filter(|v| v.vdc == vdc).collect();
        if volumes.is_empty() {
            return Err(Error::precondition(resource::vdc(&name.vdc), "has no volumes"));
        }
        let mut parts = Vec::new();
        let mut records = Vec::new();
        for volume in volumes {
            let (record, vm) = self.plan_point(&self.model.volume_name(volume), &name.name)?;
            parts.push(Part { volume: volume.uid, name: self.model.volume_name(volume), vm });
            records.push(record);
        }
        Ok((parts, records))
    }

    pub(super) fn vdc_snapshotted(&mut self, group: Uuid, result: Result<Vec<SealedPart>, Error>) {
        self.group_sealed(group, result, None);
    }

    /// All parts are sealed, or some are perhaps; of a VM's point with what was saved.
    pub(super) fn group_sealed(
        &mut self,
        group: Uuid,
        result: Result<Vec<SealedPart>, Error>,
        saved: Option<Box<SavedVm>>,
    ) {
        let Some(op) = self.group_ops.remove(&group) else { return };
        let Some(record) = self.model.vdc_snapshots.get(&group).cloned() else { return };
        let parts: Vec<SnapshotRecord> = self.model.parts_of(group).cloned().collect();
        for part in &parts {
            self.volume_ops.remove(&part.volume);
        }
        let name = self.model.group_resource(&record);
        let committed = result.and_then(|sealed| {
            let mut changes = vec![Change::VdcSnapshot(VdcSnapshotRecord {
                state: Made::Ready,
                saved: saved.or(record.saved.clone()),
                ..record
            })];
            for part in &parts {
                let (class, reason) = sealed
                    .iter()
                    .find(|s| s.volume == part.volume)
                    .map_or((part.class, String::new()), |s| (s.class, s.reason.clone()));
                let state = Made::Ready;
                changes.push(Change::Snapshot(SnapshotRecord { class, reason, state, ..part.clone() }));
            }
            let message = format!("{} volumes were sealed at one instant", parts.len());
            changes.push(self.event(name.clone(), "snapshot", message));
            self.commit(changes)
        });
        match committed {
            Ok(()) => op.finish(self.answer_vdc_snapshot(group)),
            Err(error) => {
                self.record(Self::forget(op.request.as_ref()).into_iter().collect());
                self.undo_vdc_snapshot(group, &crate::error::chain(&error));
                op.finish(Err(error));
            }
        }
    }

    /// A whole that did not come about: what was sealed of it is merged away.
    pub(super) fn undo_vdc_snapshot(&mut self, group: Uuid, why: &str) {
        let Some(record) = self.model.vdc_snapshots.get(&group) else { return };
        let name = self.model.group_resource(record);
        let event = self.event(name, "undone", format!("the snapshot was not made: {why}"));
        if let Err(error) = self.dissolve(group, vec![event], &Op::default()) {
            tracing::error!("the next start tries again to undo: {}", crate::error::chain(&error));
        }
    }

    /// Begins the operation that deletes a whole with its parts.
    pub(super) fn dissolve(&mut self, group: Uuid, more: Vec<Change>, op: &Op) -> Result<Answer, Error> {
        let record = self.model.vdc_snapshots.get(&group).cloned();
        let record = record.ok_or_else(|| Error::not_found("the vdc's snapshot"))?;
        let target = self.model.group_resource(&record);
        let parts: Vec<SnapshotRecord> = self.model.parts_of(group).cloned().collect();
        let kind = if record.saved.is_some() {
            OperationKind::DeleteVmSnapshot
        } else {
            OperationKind::DeleteVdcSnapshot
        };
        let operation = self.new_operation(kind, target, Some(group));
        // Before the row goes: what is left over is removed by the next start.
        self.remove_saved(&record);
        let mut changes = more;
        changes.push(Change::VdcSnapshot(VdcSnapshotRecord { state: Made::Deleting, ..record }));
        let deleting = |p: &SnapshotRecord| SnapshotRecord { state: Made::Deleting, ..p.clone() };
        changes.extend(parts.iter().map(|p| Change::Snapshot(deleting(p))));
        self.begin_works(operation.clone(), changes, op)?;
        if parts.is_empty() {
            self.settle_operation(operation.uid, Ok(()), Vec::new());
        }
        for part in parts {
            self.push_work(part.volume, operation.uid, Goal::Snapshot(part.name));
        }
        self.operation(operation.uid).cloned().map(Answer::Operation)
    }

    pub(super) fn delete_vdc_snapshot(&mut self, name: &VdcName, op: Op) -> Result<(), Refused> {
        let record = check!(op, self.model.vdc_snapshot(name)).clone();
        self.delete_group(&record, op)
    }

    pub(super) fn delete_group(&mut self, record: &VdcSnapshotRecord, op: Op) -> Result<(), Refused> {
        let resource = self.model.group_resource(record);
        if record.state == Made::Creating {
            return refuse(op, Error::Busy { resource, operation: "its creation" });
        }
        if self.list_operations(&resource, true).iter().any(|r| r.subject == Some(record.uid)) {
            return refuse(op, Error::Busy { resource, operation: "its deletion" });
        }
        for part in self.model.parts_of(record.uid) {
            if let Some(export) = self.export_of(part.volume, &part.name) {
                let point = format!("{}/snapshots/{}", self.model.volume_resource(part.volume), part.name);
                let why = format!("is exported as exports/{export}: end that first");
                return refuse(op, Error::precondition(point, why));
            }
        }
        let answer = check!(op, self.dissolve(record.uid, Vec::new(), &op));
        op.finish(Ok(answer));
        Ok(())
    }

    /// After a start: a whole that was not finished is undone, and a deletion that had failed is tried again.
    pub(super) fn recover_vdc_snapshots(&mut self) {
        let deleting: Vec<_> =
            self.model.vdc_snapshots.values().filter(|r| r.state == Made::Deleting).cloned().collect();
        deleting.iter().for_each(|record| self.remove_saved(record));
        let going: BTreeSet<Uuid> =
            self.list_operations("", true).iter().filter_map(|operation| operation.subject).collect();
        let unfinished =
            self.model.vdc_snapshots.values().filter(|r| r.state != Made::Ready && !going.contains(&r.uid));
        let unfinished: Vec<(Uuid, Made)> = unfinished.map(|r| (r.uid, r.state)).collect();
        for (group, state) in unfinished {
            if state == Made::Deleting {
                if let Err(error) = self.dissolve(group, Vec::new(), &Op::default()) {
                    tracing::error!("the next start tries again to delete: {}", crate::error::chain(&error));
                }
                continue;
            }
            if let Some(record) = self.model.vdc_snapshots.get(&group) {
                let name = self.model.group_resource(record);
                self.record(vec![Change::Delete(Key::RequestsOf(name))]);
            }
            self.undo_vdc_snapshot(group, "seriod ended meanwhile");
        }
    }

    /// Wholes whose last part went with its volume go too.
    pub(super) fn forget_empty_groups(&mut self) {
        let gone =
            |r: &&VdcSnapshotRecord| r.state == Made::Ready && self.model.parts_of(r.uid).next().is_none();
        let empty: Vec<_> = self.model.vdc_snapshots.values().filter(gone).cloned().collect();
        for record in empty {
            self.remove_saved(&record);
            self.record(vec![Change::Delete(Key::VdcSnapshot(record.uid))]);
        }
    }

    pub(super) fn vdc_snapshot_view(&self, record: &VdcSnapshotRecord) -> VdcSnapshotView {
        VdcSnapshotView {
            name: self.model.vdc_snapshot_name(record),
            resource: self.model.group_resource(record),
            parts: self.model.parts_of(record.uid).map(|p| self.snapshot_view(p)).collect(),
            record: record.clone(),
            base: self.base_name(record),
        }
    }

    /// The point that one goes on from, as the API names it, if that is not deleted.
    fn base_name(&self, record: &VdcSnapshotRecord) -> Option<String> {
        let base = record.saved.as_ref()?.bases.first()?;
        let base = self.model.vdc_snapshots.get(base).filter(|r| r.state == Made::Ready)?;
        Some(self.model.group_resource(base))
    }

    /// The snapshots of a vdc, oldest first.
    pub(super) fn vdc_snapshots(&self, vdc: &Name) -> Result<Vec<VdcSnapshotView>, Error> {
        let vdc = self.model.vdc(vdc)?.uid;
        let of = self
            .model
            .vdc_snapshots
            .values()
            .filter(|r| r.vdc == vdc && r.saved.is_none() && r.state != Made::Creating);
        Ok(of.map(|r| self.vdc_snapshot_view(r)).collect())
    }

    fn answer_vdc_snapshot(&self, group: Uuid) -> Result<Answer, Error> {
        let record = self.model.vdc_snapshots.get(&group);
        let record = record.ok_or_else(|| Error::not_found("the vdc's snapshot"))?;
        Ok(Answer::VdcSnapshot(self.vdc_snapshot_view(record)))
    }
}
