//! Volumes and their snapshots.

use serio_store::{
    Change, Key,
    record::{Made, PointClass, SnapshotRecord, VolumeRecord},
};
use serio_types::{Generation, Name, Quota, SnapshotName, VdcName, VolumeSize, resource};
use uuid::Uuid;

use super::{
    Refused, State, check,
    command::Answer,
    effect::Effect,
    phase::{Cause, Op, Phase, VolumeOp},
    refuse,
};
use crate::error::Error;

/// The most sealed points of a volume: each is a layer that a reader may have to ask.
const SNAPSHOTS_MAX: usize = 64;

impl State {
    pub(super) fn create_volume(
        &mut self,
        name: VdcName,
        size: Option<VolumeSize>,
        image: Option<Name>,
        op: Op,
    ) -> Result<(), Refused> {
        let record = check!(op, self.plan_volume(&name, size, image));
        let effect = Effect::CreateVolume {
            volume: record.uid,
            size_bytes: record.size_bytes,
            image: self.disk_of(record.source_image.as_ref()),
            vdc: self.key_owner(record.vdc),
        };
        let uid = record.uid;
        let mut changes = vec![Change::Volume(record)];
        changes.extend(self.remember(&op, resource::volume(&name)));
        check!(op, self.commit(changes));
        self.volume_ops.insert(uid, VolumeOp::Create(op));
        self.out.push(effect);
        Ok(())
    }

    fn plan_volume(
        &self,
        name: &VdcName,
        size: Option<VolumeSize>,
        image: Option<Name>,
    ) -> Result<VolumeRecord, Error> {
        let vdc = self.usable_vdc(&name.vdc)?;
        if self.model.volume(name).is_ok() {
            return Err(Error::Exists { resource: resource::volume(name) });
        }
        let content =
            image.as_ref().map(|image| self.model.image(image)).transpose()?.map_or(0, |r| r.size_bytes);
        let least =
            VolumeSize::holding(content).map_err(|e| Error::invalid("source_image", e.to_string()))?;
        let size = match size {
            None if content == 0 => {
                return Err(Error::invalid("size_bytes", "an empty volume needs a size, for example 1GiB"));
            }
            None => least,
            Some(size) if size < least => {
                let least = serio_types::ByteSize::from_bytes(least.bytes());
                return Err(Error::invalid(
                    "size_bytes",
                    format!("less than the image's disk: at least {least}"),
                ));
            }
            Some(size) => size,
        };
        serio_vdc::admit(&self.pools(vdc), &Quota { storage_bytes: size.bytes(), ..Quota::default() })?;
        Ok(VolumeRecord {
            uid: Uuid::now_v7(),
            vdc: vdc.uid,
            name: name.name.clone(),
            generation: Generation::FIRST,
            create_time: self.now,
            state: Made::Creating,
            size_bytes: size.bytes(),
            source_image: image,
            source_snapshot: None,
            unsure: false,
            vm: None,
        })
    }

    pub(super) fn volume_created(&mut self, uid: Uuid, result: Result<(), Error>) {
        let Some(record) = self.model.volumes.get(&uid).cloned() else { return };
        if let Some(vm) = record.vm {
            return self.root_created(vm, result);
        }
        self.return_loan(uid);
        let Some(VolumeOp::Create(op)) = self.volume_ops.remove(&uid) else { return };
        let resource = self.model.volume_resource(uid);
        let committed = result.and_then(|()| {
            let ready = VolumeRecord { state: Made::Ready, ..record };
            self.commit(vec![
                Change::Volume(ready),
                self.event(resource.clone(), "created", "the volume was created"),
            ])
        });
        match committed {
            Ok(()) => op.finish(self.answer_volume(uid)),
            Err(error) => {
                // Its files may be there when only the commit failed: they go before the client hears.
                self.record(Self::forget(op.request.as_ref()).into_iter().collect());
                self.volume_ops.insert(uid, VolumeOp::Delete { op, undone: Some(error) });
                self.out.push(Effect::DeleteVolume { volume: uid });
            }
        }
    }

    /// The root volume of a VM in creation.
    fn root_created(&mut self, vm: Uuid, result: Result<(), Error>) {
        self.return_loans_of(vm);
        let Some(Phase::Creating { .. }) = self.phases.get(&vm) else { return };
        let Some(Phase::Creating { start, op }) = self.phases.remove(&vm) else { return };
        let Some(mut record) = self.model.vms.get(&vm).cloned() else { return };
        record.run = if start { serio_store::record::Run::Starting } else { serio_store::record::Run::Off };
        let committed = result.and_then(|()| {
            let event = self.event(self.model.vm_resource(vm), "created", "the VM was created");
            let mut changes = vec![Change::Vm(Box::new(record)), event];
            // With those that were cloned along with the root.
            let made = self.model.volumes.values().filter(|v| v.vm == Some(vm) && v.state == Made::Creating);
            changes.extend(made.map(|v| Change::Volume(VolumeRecord { state: Made::Ready, ..v.clone() })));
            self.commit(changes)
        });
        match committed {
            Err(error) => self.undo_create(vm, error, op),
            Ok(()) if start => self.launch(vm, Cause::Create(op)),
            Ok(()) => {
                self.phases.insert(vm, Phase::Off);
                op.finish(self.answer_vm(vm));
            }
        }
    }

    pub(super) fn delete_volume(&mut self, name: &VdcName, op: Op) -> Result<(), Refused> {
        let mut record = check!(op, self.model.volume(name)).clone();
        let uid = record.uid;
        if let Some(busy) = self.volume_ops.get(&uid) {
            return refuse(op, Error::Busy { resource: resource::volume(name), operation: busy.operation() });
        }
        if let Some(vm) = record.vm {
            let why = format!("is in use by {}: delete that VM first", self.model.vm_resource(vm));
            return refuse(op, Error::precondition(resource::volume(name), why));
        }
        if let Some(export) = self.model.exports.values().find(|e| e.volume == uid) {
            let why = format!("is exported as exports/{}: end that first", export.id);
            return refuse(op, Error::precondition(resource::volume(name), why));
        }
        record.state = Made::Deleting;
        let mut changes = vec![Change::Volume(record)];
        changes.extend(self.remember(&op, resource::volume(name)));
        check!(op, self.commit(changes));
        self.drop_works(uid);
        self.volume_ops.insert(uid, VolumeOp::Delete { op, undone: None });
        self.out.push(Effect::DeleteVolume { volume: uid });
        Ok(())
    }

    pub(super) fn volume_deleted(&mut self, uid: Uuid, result: Result<(), Error>) {
        let Some(VolumeOp::Delete { op, undone }) = self.volume_ops.remove(&uid) else { return };
        if let Err(error) = result {
            // The row still says that it is not whole: a second delete, or the next start, tries again.
            self.record(Self::forget(op.request.as_ref()).into_iter().collect());
            return op.finish(Err(undone.unwrap_or(error)));
        }
        let (kind, message) = match &undone {
            None => ("deleted", "the volume was deleted".to_owned()),
            Some(error) => {
                ("undone", format!("its creation failed and was undone: {}", crate::error::chain(error)))
            }
        };
        let event = self.event(self.model.volume_resource(uid), kind, message);
        self.record(vec![Change::Delete(Key::Volume(uid)), event]);
        self.forget_empty_groups();
        op.finish(undone.map_or(Ok(Answer::Nothing), Err));
    }

    pub(super) fn create_snapshot(&mut self, name: &SnapshotName, op: Op) -> Result<(), Refused> {
        let (record, vm) = check!(op, self.plan_point(&name.volume, &name.snapshot));
        check!(op, self.admit_snapshots(&name.volume.vdc, 1));
        let resource = resource::snapshot(&name.volume, &name.snapshot);
        let volume = record.volume;
        let mut changes = vec![Change::Snapshot(record)];
        changes.extend(self.remember(&op, resource));
        check!(op, self.commit(changes));
        self.volume_ops.insert(volume, VolumeOp::Snapshot { name: name.snapshot.clone(), op });
        self.out.push(Effect::Snapshot { volume, name: name.snapshot.clone(), vm });
        Ok(())
    }

    /// Whether a vdc may have so many snapshots more.
    pub(super) fn admit_snapshots(&self, vdc: &Name, asked: u64) -> Result<(), Error> {
        let record = self.model.vdc(vdc)?;
        let used = self.model.snapshots_in(record.uid);
        Ok(serio_vdc::admit_snapshots(vdc.as_str(), record.limits.snapshots, used, asked)?)
    }

    /// The row of a new point, and the VM to ask for it if one runs.
    pub(super) fn plan_point(
        &self,
        name: &VdcName,
        point: &Name,
    ) -> Result<(SnapshotRecord, Option<Uuid>), Error> {
        let (volume, vm) = self.idle_volume(name)?;
        if self.model.snapshot(volume.uid, point).is_some() {
            return Err(Error::Exists { resource: resource::snapshot(name, point) });
        }
        if self.model.snapshots_of(volume.uid).count() >= SNAPSHOTS_MAX {
            return Err(Error::precondition(
                resource::volume(name),
                format!("has {SNAPSHOTS_MAX} snapshots, which is the most"),
            ));
        }
        let number = self.model.snapshots_of(volume.uid).map(|s| s.number).max().unwrap_or(0) + 1;
        let record = SnapshotRecord {
            volume: volume.uid,
            name: point.clone(),
            number,
            create_time: self.now,
            state: Made::Creating,
            size_bytes: volume.size_bytes,
            group: None,
            class: PointClass::Crash,
            reason: String::new(),
        };
        Ok((record, vm))
    }

    pub(super) fn snapshotted(&mut self, uid: Uuid, result: Result<(), Error>) {
        let Some(VolumeOp::Snapshot { name, op }) = self.volume_ops.remove(&uid) else { return };
        let Some(record) = self.model.snapshots_of(uid).find(|s| s.name == name).cloned() else { return };
        let resource = format!("{}/snapshots/{name}", self.model.volume_resource(uid));
        match result {
            Ok(()) => {
                let event = self.event(resource, "snapshot", "the point was sealed");
                let ready = SnapshotRecord { state: Made::Ready, ..record };
                self.record(vec![Change::Snapshot(ready.clone()), event]);
                op.finish(Ok(Answer::Snapshot(self.snapshot_view(&ready))));
            }
            Err(error) => {
                let mut changes = vec![Change::Delete(Key::Snapshot(uid, name))];
                changes.extend(Self::forget(op.request.as_ref()));
                self.record(changes);
                op.finish(Err(error));
            }
        }
    }
}
