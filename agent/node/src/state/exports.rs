//! Exports: points, or the heads of stopped volumes, served over NBD for a while.

use std::time::Duration;

use serio_store::{
    Change, Key,
    record::{ExportRecord, Made, Millis},
};
use serio_types::{Name, VdcName, resource};
use uuid::Uuid;

use super::{
    Refused, State, check,
    command::Answer,
    effect::{Effect, Timer},
    phase::{Op, Phase},
    refuse,
};
use crate::error::Error;

/// The most exports of a node: each is a process.
const EXPORTS_MAX: usize = 256;

impl State {
    pub(super) fn create_export(
        &mut self,
        volume: &VdcName,
        snapshot: Option<Name>,
        (writable, once, release): (bool, bool, bool),
        ttl: Duration,
        op: Op,
    ) -> Result<(), Refused> {
        if release && snapshot.is_none() {
            let why = "is for a snapshot: name one, or export the volume itself as writable, where TRIM is a discard";
            return refuse(op, Error::invalid("release_on_trim", why));
        }
        let uid = check!(op, self.exportable(volume, snapshot.as_ref(), writable));
        // The id is what clients must know to be served: random, not to be guessed.
        let id: Name = Uuid::new_v4().simple().to_string().parse().expect("hex digits are a name");
        let ttl_ms = i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX);
        let record = ExportRecord {
            id: id.clone(),
            volume: uid,
            snapshot: snapshot.clone(),
            writable,
            state: Made::Creating,
            create_time: self.now,
            expire_time: Millis(self.steady.0.saturating_add(ttl_ms)),
        };
        let mut changes = vec![Change::Export(record)];
        changes.extend(self.remember(&op, format!("exports/{id}")));
        check!(op, self.commit(changes));
        self.export_ops.insert(id.clone(), op);
        self.out.push(Effect::StartExport { id, volume: uid, snapshot, writable, once, release });
        Ok(())
    }

    fn exportable(&self, name: &VdcName, snapshot: Option<&Name>, writable: bool) -> Result<Uuid, Error> {
        self.usable_vdc(&name.vdc)?;
        let volume = self.model.volume(name)?;
        let resource = resource::volume(name);
        if self.model.exports.len() >= EXPORTS_MAX {
            return Err(Error::precondition(
                "exports",
                format!("are {EXPORTS_MAX} on this node, the most: end one first"),
            ));
        }
        if let Some(op) = self.volume_ops.get(&volume.uid) {
            return Err(Error::Busy { resource, operation: op.operation() });
        }
        if volume.state != Made::Ready {
            return Err(Error::precondition(resource, "is not whole: it is being made or deleted"));
        }
        if let Some(snapshot) = snapshot {
            if writable {
                return Err(Error::invalid(
                    "writable",
                    "a snapshot never changes: leave writable out, or export the volume itself",
                ));
            }
            if !self.model.snapshots_of(volume.uid).any(|s| s.name == *snapshot && s.state == Made::Ready) {
                return Err(Error::not_found(resource::snapshot(name, snapshot)));
            }
            return Ok(volume.uid);
        }
        let stopped = |vm: Uuid| matches!(self.phases.get(&vm), None | Some(Phase::Off));
        if let Some(vm) = volume.vm.filter(|vm| !stopped(*vm)) {
            let why = format!(
                "is in use by {}, which runs: make a snapshot and export that, or stop the VM",
                self.model.vm_resource(vm)
            );
            return Err(Error::precondition(resource, why));
        }
        if let Some(export) = self.model.head_export(volume.uid) {
            let why = format!("is in use: it is exported as exports/{} already", export.id);
            return Err(Error::precondition(resource, why));
        }
        Ok(volume.uid)
    }

    pub(super) fn export_started(&mut self, id: Name, result: Result<(), Error>) {
        let Some(op) = self.export_ops.remove(&id) else { return };
        let Some(record) = self.model.exports.get(&id).cloned() else { return };
        match result {
            Ok(()) => {
                let ready = ExportRecord { state: Made::Ready, ..record };
                let what = format!("a client may read it as exports/{id}");
                let event = self.event(self.model.volume_resource(ready.volume), "exported", what);
                self.watch_expiry(&ready);
                self.record(vec![Change::Export(ready.clone()), event]);
                op.finish(Ok(Answer::Export(self.export_view(&ready))));
            }
            Err(error) => {
                let mut changes = vec![Change::Delete(Key::Export(id))];
                changes.extend(Self::forget(op.request.as_ref()));
                self.record(changes);
                op.finish(Err(error));
            }
        }
    }

    pub(super) fn watch_expiry(&mut self, export: &ExportRecord) {
        let left = u64::try_from(export.expire_time.0.saturating_sub(self.steady.0)).unwrap_or(0);
        let timer = Timer::ExportExpired { id: export.id.clone() };
        self.out.push(Effect::Timer { after: Duration::from_millis(left), timer });
    }

    pub(super) fn export_expired(&mut self, id: &Name) {
        if !self.model.exports.contains_key(id) || self.export_ops.contains_key(id) {
            return;
        }
        if let Err(refused) = self.delete_export(id, Op::default()) {
            tracing::warn!("exports/{id} could not be ended: {}", crate::error::chain(&refused.0.1));
        }
    }

    pub(super) fn delete_export(&mut self, id: &Name, op: Op) -> Result<(), Refused> {
        let record = check!(op, self.model.export(id)).clone();
        if self.export_ops.contains_key(id) {
            return refuse(
                op,
                Error::Busy { resource: format!("exports/{id}"), operation: "its start or end" },
            );
        }
        let mut changes = vec![Change::Export(ExportRecord { state: Made::Deleting, ..record })];
        changes.extend(self.remember(&op, format!("exports/{id}")));
        check!(op, self.commit(changes));
        self.export_ops.insert(id.clone(), op);
        self.out.push(Effect::EndExport { id: id.clone() });
        Ok(())
    }

    /// Its process is gone: because it was asked to, or by itself.
    pub(super) fn export_ended(&mut self, id: &Name) {
        let op = self.export_ops.remove(id);
        let Some(record) = self.model.exports.get(id).cloned() else {
            self.strangers = self.strangers.saturating_sub(1);
            return;
        };
        let event = self.event(
            self.model.volume_resource(record.volume),
            "unexported",
            format!("exports/{id} ended"),
        );
        self.record(vec![Change::Delete(Key::Export(id.clone())), event]);
        if let Some(op) = op {
            op.finish(Ok(Answer::Nothing));
        }
    }

    pub(super) fn export_adopted(&mut self, id: &Name, runs: bool) {
        self.export_ops.remove(id);
        let Some(record) = self.model.exports.get(id).cloned() else { return };
        if runs {
            self.watch_expiry(&record);
        } else {
            self.export_ended(id);
        }
    }
}
