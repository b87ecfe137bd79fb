//! Vdcs: made, changed and deleted at once; and the repetition of requests.

use serio_store::{
    Change, Key,
    record::{Encryption, Made, VdcRecord},
};
use serio_types::{Generation, Name, Quota, VdcLimits, resource};
use uuid::Uuid;

use super::{
    Refused, State, check,
    command::{Answer, LimitsChange, Mutation, Query},
    phase::{Op, Phase},
    refuse,
    vm_orders::Pending,
};
use crate::error::Error;

impl State {
    pub(super) fn create_vdc(
        &mut self,
        name: Name,
        (quota, limits): (Quota, VdcLimits),
        encrypted: bool,
        op: Op,
    ) -> Result<(), Refused> {
        if self.model.vdc(&name).is_ok() {
            return refuse(op, Error::Exists { resource: resource::vdc(&name) });
        }
        let record = VdcRecord {
            uid: Uuid::now_v7(),
            name: name.clone(),
            generation: Generation::FIRST,
            create_time: self.now,
            quota,
            limits,
            encryption: if encrypted { Encryption::Encrypted } else { Encryption::Plain },
        };
        let mut changes =
            vec![Change::Vdc(record), self.event(resource::vdc(&name), "created", "the vdc was created")];
        changes.extend(self.remember(&op, resource::vdc(&name)));
        check!(op, self.commit(changes));
        op.finish(self.answer_vdc(&name));
        Ok(())
    }

    pub(super) fn update_vdc(
        &mut self,
        name: &Name,
        (quota, change): (Quota, LimitsChange),
        expected: u64,
        op: Op,
    ) -> Result<(), Refused> {
        let mut record = check!(op, self.model.vdc(name).cloned());
        if expected != 0 && expected != record.generation.0 {
            let error =
                Error::Generation { resource: resource::vdc(name), expected, found: record.generation.0 };
            return refuse(op, error);
        }
        let used = self.model.used(Some(record.uid));
        if let Err(refusal) = serio_vdc::admit_quota(name.as_str(), &quota, &used) {
            let why = format!(
                "uses more than that: {refusal}; delete VMs or volumes first, or give a quota that holds what is in use"
            );
            return refuse(op, Error::precondition(resource::vdc(name), why));
        }
        let snapshots = self.model.snapshots_in(record.uid);
        if change.limits.snapshots > 0 && snapshots > u64::from(change.limits.snapshots) {
            let why =
                format!("has {snapshots} snapshots: delete some first, or give a quota that holds them");
            return refuse(op, Error::precondition(resource::vdc(name), why));
        }
        let VdcLimits { weight, burst_percent, .. } = record.limits;
        record.quota = quota;
        record.limits = change.limits;
        if change.keep_share {
            record.limits = VdcLimits { weight, burst_percent, ..record.limits };
        }
        record.generation = record.generation.next();
        let mut changes =
            vec![Change::Vdc(record), self.event(resource::vdc(name), "updated", "the quota was changed")];
        changes.extend(self.remember(&op, resource::vdc(name)));
        check!(op, self.commit(changes));
        op.finish(self.answer_vdc(name));
        Ok(())
    }

    pub(super) fn delete_vdc(&mut self, name: &Name, op: Op) -> Result<(), Refused> {
        let uid = check!(op, self.model.vdc(name)).uid;
        let vms = self.model.vms.values().filter(|r| r.vdc == uid).count();
        let volumes = self.model.volumes.values().filter(|r| r.vdc == uid).count();
        if vms + volumes > 0 {
            let why = format!("is not empty: it has {vms} VMs and {volumes} volumes; delete them first");
            return refuse(op, Error::precondition(resource::vdc(name), why));
        }
        let mut changes = vec![
            Change::Delete(Key::Vdc(uid)),
            self.event(resource::vdc(name), "deleted", "the vdc was deleted"),
        ];
        changes.extend(self.remember(&op, resource::vdc(name)));
        check!(op, self.commit(changes));
        op.finish(Ok(Answer::Nothing));
        Ok(())
    }

    /// Marks a vdc as erased: from here on nothing of it starts. Who asked destroys the key then.
    pub(super) fn erase_vdc(&mut self, name: &Name, uid: Uuid, op: Op) -> Result<(), Refused> {
        let record = check!(op, self.model.vdc(name).cloned());
        check!(op, self.may_erase(&record, uid));
        if record.encryption == Encryption::Erased {
            op.finish(self.answer_vdc(name));
            return Ok(());
        }
        let erased =
            VdcRecord { encryption: Encryption::Erased, generation: record.generation.next(), ..record };
        let why = "its key is destroyed: its volumes cannot be read any more";
        let event = self.event(resource::vdc(name), "erased", why);
        check!(op, self.commit(vec![Change::Vdc(erased), event]));
        op.finish(self.answer_vdc(name));
        Ok(())
    }

    fn may_erase(&self, vdc: &VdcRecord, uid: Uuid) -> Result<(), Error> {
        let refused = |why: String| Err(Error::precondition(resource::vdc(&vdc.name), why));
        if vdc.uid != uid {
            return Err(Error::invalid("uid", format!("{} has the uid {}", vdc.name, vdc.uid)));
        }
        if vdc.encryption == Encryption::Plain {
            return refused("is not encrypted, so there is no key to destroy: delete its volumes".to_owned());
        }
        let runs = |vm: &&serio_store::record::VmRecord| {
            vm.vdc == uid && !matches!(self.phases.get(&vm.uid), None | Some(Phase::Off))
        };
        if let Some(vm) = self.model.vms.values().find(runs) {
            return refused(format!("has a VM that runs, {}: stop it first", vm.name));
        }
        let mine = |volume: &Uuid| self.model.volumes.get(volume).is_some_and(|r| r.vdc == uid);
        if let Some(export) = self.model.exports.values().find(|export| mine(&export.volume)) {
            return refused(format!("has an export, exports/{}: end it first", export.id));
        }
        if self.volume_ops.keys().any(mine) {
            return refused("has a volume that something is done to: try again when that is over".to_owned());
        }
        Ok(())
    }

    /// A vdc in which something may be made or started.
    pub(super) fn usable_vdc(&self, name: &Name) -> Result<&VdcRecord, Error> {
        let vdc = self.model.vdc(name)?;
        if vdc.encryption == Encryption::Erased {
            let why = "was erased: its volumes can only be deleted, and nothing new is made in it";
            return Err(Error::precondition(resource::vdc(name), why));
        }
        Ok(vdc)
    }

    /// The vdc whose key a new volume in it is encrypted under.
    pub(super) fn key_owner(&self, vdc: Uuid) -> Option<Uuid> {
        let record = self.model.vdcs.get(&vdc)?;
        (record.encryption != Encryption::Plain).then_some(vdc)
    }

    pub(super) fn answer_vdc(&self, name: &Name) -> Result<Answer, Error> {
        self.model.vdc(name).map(|r| Answer::Vdc(self.vdc_view(r)))
    }

    /// Looks whether a request was made before. `Some`: it is new. `None`: it was answered, or joined its twin.
    pub(super) fn replay(&mut self, mut op: Op) -> Result<Option<Op>, Refused> {
        let Some(request) = op.request.clone() else { return Ok(Some(op)) };
        let Some(known) = check!(op, self.store.request(request.id).map_err(Error::from)) else {
            return Ok(Some(op));
        };
        check!(op, request.same_as(&known));
        if let Some(twin) = self.twin(&known.resource) {
            // Only the twin itself is joined: another operation on the same resource has its own answer.
            if twin.request.as_ref().is_some_and(|r| r.id == request.id) {
                twin.replies.append(&mut op.replies);
                return Ok(None);
            }
        }
        let result =
            if known.method.starts_with("Delete") && resource::parse_operation(&known.resource).is_err() {
                Ok(Answer::Nothing)
            } else {
                self.answer_named(&known.resource)
            };
        op.finish(result);
        Ok(None)
    }

    /// The operation that is going on with a resource.
    fn twin(&mut self, name: &str) -> Option<&mut Op> {
        if let Ok(vm) = resource::parse_vm(name) {
            let uid = self.model.vm(&vm).ok()?.uid;
            if self.vm_orders.contains_key(&uid) {
                return self.vm_orders.get_mut(&uid).map(Pending::op_mut);
            }
            return self.phases.get_mut(&uid)?.op_mut();
        }
        if let Ok(export) = resource::parse_export(name) {
            return self.export_ops.get_mut(&export);
        }
        if let Ok(whole) = resource::parse_vdc_snapshot(name) {
            let uid = self.model.vdc_snapshot(&whole).ok()?.uid;
            return self.group_ops.get_mut(&uid);
        }
        if let Ok((vm, point)) = resource::parse_vm_snapshot(name) {
            let uid = self.model.vm_snapshot(&vm, &point).ok()?.uid;
            return self.group_ops.get_mut(&uid);
        }
        if let Ok(image) = resource::parse_image(name) {
            let uid = self.model.images.values().find(|r| r.name == image)?.uid;
            return self.image_ops.get_mut(&uid);
        }
        let volume = resource::parse_volume(name)
            .or_else(|_| resource::parse_snapshot(name).map(|s| s.volume))
            .ok()?;
        let uid = self.model.volume(&volume).ok()?.uid;
        self.volume_ops.get_mut(&uid)?.op_mut()
    }

    /// Whether what a change is about is still what its caller saw.
    pub(super) fn at_generation(&self, mutation: &Mutation, expected: u64) -> Result<(), Error> {
        let resource = match mutation {
            // The generation is the volume's; snapshots have none.
            Mutation::RollbackVolume { name, .. } => resource::volume(&name.volume),
            other => other.resource(),
        };
        let found = match self.answer_named(&resource)? {
            Answer::Vdc(view) => view.record.generation.0,
            Answer::Vm(view) => view.record.generation.0,
            Answer::Volume(view) => view.record.generation.0,
            _ => expected,
        };
        if found == expected { Ok(()) } else { Err(Error::Generation { resource, expected, found }) }
    }

    /// What a resource is now.
    fn answer_named(&self, name: &str) -> Result<Answer, Error> {
        if let Ok(vdc) = resource::parse_vdc(name) {
            return self.answer_vdc(&vdc);
        }
        if let Ok(vm) = resource::parse_vm(name) {
            return self.model.vm(&vm).map(|r| Answer::Vm(Box::new(self.vm_view(r))));
        }
        if let Ok(volume) = resource::parse_volume(name) {
            return self.model.volume(&volume).map(|r| Answer::Volume(self.volume_view(r)));
        }
        if let Ok(image) = resource::parse_image(name) {
            if self.model.images.values().any(|r| r.name == image && r.state == Made::Creating) {
                return Err(Error::Busy { resource: name.to_owned(), operation: "its import" });
            }
            return self.model.image(&image).cloned().map(Answer::Image);
        }
        if let Ok(export) = resource::parse_export(name) {
            return self.model.export(&export).map(|r| Answer::Export(self.export_view(r)));
        }
        if let Ok(id) = resource::parse_operation(name) {
            let uid = Uuid::parse_str(id.as_str()).map_err(|_| Error::not_found(name))?;
            return self.operation(uid).cloned().map(Answer::Operation);
        }
        if let Ok(whole) = resource::parse_vdc_snapshot(name) {
            let record = self.model.vdc_snapshot(&whole)?;
            return Ok(Answer::VdcSnapshot(self.vdc_snapshot_view(record)));
        }
        if let Ok((vm, point)) = resource::parse_vm_snapshot(name) {
            let record = self.model.vm_snapshot(&vm, &point)?;
            if record.state == Made::Creating {
                return Err(Error::Busy { resource: name.to_owned(), operation: "its import" });
            }
            return Ok(Answer::VdcSnapshot(self.vdc_snapshot_view(record)));
        }
        let snapshot = resource::parse_snapshot(name).map_err(|_| Error::not_found(name))?;
        let Answer::Snapshots(all) = self.query(&Query::Snapshots(snapshot.volume))? else {
            return Err(Error::not_found(name));
        };
        all.into_iter()
            .find(|s| s.record.name == snapshot.snapshot)
            .map(Answer::Snapshot)
            .ok_or_else(|| Error::not_found(name))
    }
}
