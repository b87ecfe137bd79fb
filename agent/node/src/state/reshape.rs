//! Volumes that grow, are cloned, or go back to a snapshot; and how rows follow what the headers say.
//!
//! A row says `unsure` while such work is under way: whoever reads it next, after a failure or a restart of seriod, asks
//! the volume's headers what has become of it ([`State::inspected`]).

use serio_store::{
    Change, Key,
    record::{Made, SnapshotRecord, VolumeRecord},
};
use serio_types::{Generation, Name, Quota, SnapshotName, VdcName, VolumeSize, resource};
use uuid::Uuid;

use super::{
    Refused, State, check,
    effect::Effect,
    phase::{Op, Phase, VolumeOp},
    refuse,
};
use crate::{error::Error, supervise::VolumeInfo};

impl State {
    /// A volume that something may be done to now, and the VM to ask for it if one runs.
    pub(super) fn idle_volume(&self, name: &VdcName) -> Result<(VolumeRecord, Option<Uuid>), Error> {
        let volume = self.model.volume(name)?;
        let resource = resource::volume(name);
        if let Some(busy) = self.volume_ops.get(&volume.uid) {
            return Err(Error::Busy { resource, operation: busy.operation() });
        }
        if volume.state != Made::Ready {
            return Err(Error::precondition(resource, "is not whole: it is being made or deleted"));
        }
        if let Some(export) = self.model.head_export(volume.uid) {
            let why = format!("is in use: its head is exported as exports/{}; end that first", export.id);
            return Err(Error::precondition(resource, why));
        }
        let vm = match volume.vm.map(|vm| (vm, self.phases.get(&vm))) {
            None | Some((_, None | Some(Phase::Off | Phase::Pausing { .. }))) => None,
            Some((vm, Some(Phase::Running { .. }))) => Some(vm),
            Some((vm, Some(phase))) => {
                let operation = phase.operation().unwrap_or("another operation");
                return Err(Error::Busy { resource: self.model.vm_resource(vm), operation });
            }
        };
        Ok((volume.clone(), vm))
    }

    /// A snapshot that is whole.
    pub(super) fn whole_snapshot(&self, name: &SnapshotName) -> Result<SnapshotRecord, Error> {
        let volume = self.model.volume(&name.volume)?;
        let point = self.model.snapshot(volume.uid, &name.snapshot).filter(|s| s.state == Made::Ready);
        point.cloned().ok_or_else(|| Error::not_found(resource::snapshot(&name.volume, &name.snapshot)))
    }

    pub(super) fn resize_volume(&mut self, name: &VdcName, size: VolumeSize, op: Op) -> Result<(), Refused> {
        let (mut record, vm) = check!(op, self.idle_volume(name));
        let (now, asked) = (record.size_bytes, size.bytes());
        if asked < now {
            let problem = format!(
                "{} is less than now ({}): a volume only grows; to shrink, copy what is needed into a smaller one",
                serio_types::ByteSize::from_bytes(asked),
                serio_types::ByteSize::from_bytes(now)
            );
            return refuse(op, Error::invalid("size_bytes", problem));
        }
        let uid = record.uid;
        if asked == now {
            op.finish(self.answer_volume(uid));
            return Ok(());
        }
        let more = Quota { storage_bytes: asked.saturating_sub(now), ..Quota::default() };
        let vdc = check!(op, self.model.vdc(&name.vdc));
        check!(op, serio_vdc::admit(&self.pools(vdc), &more).map_err(Error::from));
        // The quota is taken from now on: a seriod that dies leaves the larger size until the headers are read.
        record.size_bytes = asked;
        record.unsure = true;
        let mut changes = vec![Change::Volume(record)];
        changes.extend(self.remember(&op, resource::volume(name)));
        check!(op, self.commit(changes));
        self.volume_ops.insert(uid, VolumeOp::Resize(op));
        self.out.push(Effect::Resize { volume: uid, size_bytes: asked, vm });
        Ok(())
    }

    pub(super) fn resized(&mut self, uid: Uuid, result: Result<(), Error>) {
        let Some(VolumeOp::Resize(op)) = self.volume_ops.remove(&uid) else { return };
        if let Err(error) = result {
            return self.look_after_failure(uid, op, error);
        }
        let Some(mut record) = self.model.volumes.get(&uid).cloned() else { return };
        record.unsure = false;
        record.generation = record.generation.next();
        let size = serio_types::ByteSize::from_bytes(record.size_bytes);
        let event =
            self.event(self.model.volume_resource(uid), "resized", format!("the volume has {size} now"));
        self.record(vec![Change::Volume(record), event]);
        op.finish(self.answer_volume(uid));
    }

    /// Work on a volume failed, perhaps half-way: the headers say how it is; then the client hears why.
    fn look_after_failure(&mut self, uid: Uuid, op: Op, error: Error) {
        self.record(Self::forget(op.request.as_ref()).into_iter().collect());
        self.volume_ops.insert(uid, VolumeOp::Inspect { failed: Some((op, error)) });
        self.out.push(Effect::Inspect { volume: uid });
    }

    pub(super) fn clone_volume(
        &mut self,
        source: &SnapshotName,
        name: Name,
        size: Option<VolumeSize>,
        op: Op,
    ) -> Result<(), Refused> {
        let name = VdcName { vdc: source.volume.vdc.clone(), name };
        let (record, lender) = check!(op, self.plan_clone(source, &name, size));
        let effect = Effect::CloneVolume {
            volume: record.uid,
            size_bytes: record.size_bytes,
            source: lender,
            point: source.snapshot.clone(),
        };
        let uid = record.uid;
        let mut changes = vec![Change::Volume(record)];
        changes.extend(self.remember(&op, resource::volume(&name)));
        check!(op, self.commit(changes));
        self.lend(lender, uid);
        self.volume_ops.insert(uid, VolumeOp::Create(op));
        self.out.push(effect);
        Ok(())
    }

    pub(super) fn plan_clone(
        &self,
        source: &SnapshotName,
        name: &VdcName,
        size: Option<VolumeSize>,
    ) -> Result<(VolumeRecord, Uuid), Error> {
        let vdc = self.usable_vdc(&name.vdc)?;
        let point = self.whole_snapshot(source)?;
        match self.volume_ops.get(&point.volume) {
            None | Some(VolumeOp::Lend { .. }) => {}
            Some(busy) => {
                let resource = resource::volume(&source.volume);
                return Err(Error::Busy { resource, operation: busy.operation() });
            }
        }
        let vm = self.model.volumes.get(&point.volume).and_then(|v| v.vm);
        if vm.and_then(|vm| self.phases.get(&vm)).is_some_and(Phase::is_deletion) {
            return Err(Error::Busy {
                resource: resource::volume(&source.volume),
                operation: "the deletion of its VM",
            });
        }
        if self.model.volume(name).is_ok() {
            return Err(Error::Exists { resource: resource::volume(name) });
        }
        let size_bytes = match size {
            Some(size) if size.bytes() < point.size_bytes => {
                let least = serio_types::ByteSize::from_bytes(point.size_bytes);
                return Err(Error::invalid(
                    "size_bytes",
                    format!("less than the snapshot's: at least {least}"),
                ));
            }
            Some(size) => size.bytes(),
            None => point.size_bytes,
        };
        serio_vdc::admit(&self.pools(vdc), &Quota { storage_bytes: size_bytes, ..Quota::default() })?;
        let origin = self.model.volumes.get(&point.volume).and_then(|v| v.source_image.clone());
        let record = VolumeRecord {
            uid: Uuid::now_v7(),
            vdc: vdc.uid,
            name: name.name.clone(),
            generation: Generation::FIRST,
            create_time: self.now,
            state: Made::Creating,
            size_bytes,
            source_image: origin,
            source_snapshot: Some(resource::snapshot(&source.volume, &source.snapshot)),
            unsure: false,
            vm: None,
        };
        Ok((record, point.volume))
    }

    /// The source may not change under the clone's hands.
    pub(super) fn lend(&mut self, lender: Uuid, clone: Uuid) {
        match self.volume_ops.get_mut(&lender) {
            Some(VolumeOp::Lend { clones }) => drop(clones.insert(clone)),
            _ => {
                let clones = std::iter::once(clone).collect();
                self.volume_ops.insert(lender, VolumeOp::Lend { clones });
            }
        }
    }

    /// A volume was made, or not: whoever lent it layers has them back.
    pub(super) fn return_loan(&mut self, clone: Uuid) {
        let lender = self.volume_ops.iter_mut().find_map(|(uid, op)| match op {
            VolumeOp::Lend { clones } => clones.remove(&clone).then_some((*uid, clones.is_empty())),
            _ => None,
        });
        if let Some((lender, true)) = lender {
            self.volume_ops.remove(&lender);
        }
    }

    pub(super) fn rollback_volume(
        &mut self,
        name: &SnapshotName,
        discard_later: bool,
        op: Op,
    ) -> Result<(), Refused> {
        let mut record = check!(op, self.plan_rollback(name, discard_later));
        record.unsure = true;
        let uid = record.uid;
        let mut changes = vec![Change::Volume(record)];
        changes.extend(self.remember(&op, resource::volume(&name.volume)));
        check!(op, self.commit(changes));
        self.volume_ops.insert(uid, VolumeOp::Rollback { point: name.snapshot.clone(), op });
        self.out.push(Effect::Rollback { volume: uid, point: name.snapshot.clone(), discard_later });
        Ok(())
    }

    pub(super) fn plan_rollback(
        &self,
        name: &SnapshotName,
        discard_later: bool,
    ) -> Result<VolumeRecord, Error> {
        let (volume, vm) = self.idle_volume(&name.volume)?;
        let resource = resource::volume(&name.volume);
        if let Some(vm) = vm {
            let why = format!("is in use by {}, which runs: stop it first", self.model.vm_resource(vm));
            return Err(Error::precondition(resource, why));
        }
        let point = self.whole_snapshot(name)?;
        if self.has_works(volume.uid) {
            let operation = "a merge of its layers (`serio operation list` shows it)";
            return Err(Error::Busy { resource, operation });
        }
        let later: Vec<&SnapshotRecord> =
            self.model.snapshots_of(volume.uid).filter(|s| s.number > point.number).collect();
        if !later.is_empty() && !discard_later {
            let names = later.iter().map(|s| s.name.to_string()).collect::<Vec<_>>().join(", ");
            let why = format!(
                "has later snapshots ({names}), which would be lost: discard them, or delete them first"
            );
            return Err(Error::precondition(resource, why));
        }
        for snapshot in later {
            if let Some(export) = self.export_of(volume.uid, &snapshot.name) {
                let why = format!("is exported as exports/{export}: end that first");
                return Err(Error::precondition(resource::snapshot(&name.volume, &snapshot.name), why));
            }
        }
        Ok(volume)
    }

    pub(super) fn rolled_back(&mut self, uid: Uuid, result: Result<VolumeInfo, Error>) {
        let Some(VolumeOp::Rollback { point, op }) = self.volume_ops.remove(&uid) else { return };
        match result {
            Err(error) => self.look_after_failure(uid, op, error),
            Ok(info) => {
                let mut changes = self.follow_headers(uid, &info);
                let message = format!("the volume is as it was at snapshot {point}");
                changes.push(self.event(self.model.volume_resource(uid), "rolled-back", message));
                self.record(changes);
                self.forget_empty_groups();
                op.finish(self.answer_volume(uid));
            }
        }
    }

    /// Reads what the headers say of a volume, after a start or a failure.
    pub(super) fn inspected(&mut self, uid: Uuid, result: Result<VolumeInfo, Error>) {
        let Some(VolumeOp::Inspect { failed }) = self.volume_ops.remove(&uid) else { return };
        match result {
            Ok(info) => {
                let changes = self.follow_headers(uid, &info);
                self.record(changes);
                self.forget_empty_groups();
            }
            Err(error) => {
                let why = crate::error::chain(&error);
                tracing::warn!(volume = %uid, "its headers could not be read, the next start tries again: {why}");
            }
        }
        if let Some((op, error)) = failed {
            op.finish(Err(error));
        }
    }

    /// The changes that make the rows say what the headers say.
    fn follow_headers(&self, uid: Uuid, info: &VolumeInfo) -> Vec<Change> {
        let Some(record) = self.model.volumes.get(&uid) else { return Vec::new() };
        let name = self.model.volume_resource(uid);
        let mut changes = Vec::new();
        for point in self.model.snapshots_of(uid) {
            let sealed = info.snapshots.iter().any(|s| s.name == point.name.as_str());
            // A part of a vdc's snapshot stands or falls with the whole.
            let whole = point.group.and_then(|group| self.model.vdc_snapshots.get(&group));
            let undecided = whole.is_some_and(|group| group.state != Made::Ready);
            let waits = self.works.get(&uid).into_iter().flatten().any(|w| w.is_about(&point.name));
            match (point.state, sealed) {
                (Made::Deleting, false) if !waits => {
                    changes.push(Change::Delete(Key::Snapshot(uid, point.name.clone())));
                }
                _ if undecided || waits => {}
                (Made::Ready, true) => {}
                (Made::Ready, false) if !record.unsure => {
                    tracing::error!(volume = name, "its headers do not have the snapshot {}", point.name);
                }
                (_, true) => {
                    changes.push(Change::Snapshot(SnapshotRecord { state: Made::Ready, ..point.clone() }));
                }
                (_, false) => {
                    changes.push(Change::Delete(Key::RequestsOf(format!("{name}/snapshots/{}", point.name))));
                    changes.push(Change::Delete(Key::Snapshot(uid, point.name.clone())));
                }
            }
        }
        if record.unsure {
            let generation = record.generation.next();
            let size_bytes = info.size_bytes;
            changes.push(Change::Volume(VolumeRecord {
                unsure: false,
                size_bytes,
                generation,
                ..record.clone()
            }));
        }
        changes
    }
}
