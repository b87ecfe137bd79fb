//! Images: begun, filled by the gRPC side, finished; or broken off.

use serio_store::{
    Change, Key,
    record::{ImageRecord, Made},
};
use serio_types::{Cmdline, Generation, Name, resource};
use uuid::Uuid;

use super::{
    Refused, State, check,
    command::{Answer, ImportedFiles},
    effect::Effect,
    phase::Op,
    refuse,
};
use crate::error::Error;

impl State {
    pub(super) fn begin_import(&mut self, name: Name, cmdline: &Cmdline, op: Op) -> Result<(), Refused> {
        if let Some(taken) = self.model.images.values().find(|r| r.name == name) {
            let resource = resource::image(&name);
            let error = match taken.state {
                Made::Ready => Error::Exists { resource },
                Made::Creating => Error::Busy { resource, operation: "its import" },
                Made::Deleting => Error::Busy { resource, operation: "its deletion" },
            };
            return refuse(op, error);
        }
        let record = ImageRecord {
            uid: Uuid::now_v7(),
            name: name.clone(),
            generation: Generation::FIRST,
            create_time: self.now,
            state: Made::Creating,
            size_bytes: 0,
            has_kernel: false,
            has_initrd: false,
            cmdline: cmdline.as_str().to_owned(),
            blake3: String::new(),
        };
        let uid = record.uid;
        let mut changes = vec![Change::Image(record)];
        changes.extend(self.remember(&op, resource::image(&name)));
        check!(op, self.commit(changes));
        // Only the first asker may write the files; the request's twin would have been answered before.
        op.finish(Ok(Answer::Import(uid)));
        Ok(())
    }

    pub(super) fn finish_import(&mut self, files: ImportedFiles) -> Result<Answer, Error> {
        let record = self.model.images.get(&files.uid).filter(|r| r.state == Made::Creating).cloned();
        let record = record.ok_or_else(|| Error::not_found("the image in import"))?;
        let resource = resource::image(&record.name);
        let ready = ImageRecord {
            state: Made::Ready,
            size_bytes: files.size_bytes,
            blake3: files.blake3,
            has_kernel: files.has_kernel,
            has_initrd: files.has_initrd,
            create_time: self.now,
            ..record
        };
        let event = self.event(resource, "imported", "the image is whole");
        self.commit(vec![Change::Image(ready.clone()), event])?;
        Ok(Answer::Image(ready))
    }

    /// Forgets an image that did not become whole; answered when its files are gone.
    pub(super) fn abort_import(&mut self, uid: Uuid, op: Op) {
        let Some(record) = self.model.images.get(&uid).filter(|r| r.state == Made::Creating).cloned() else {
            return op.finish(Ok(Answer::Nothing));
        };
        self.record(vec![Change::Delete(Key::RequestsOf(resource::image(&record.name)))]);
        self.remove_image(ImageRecord { state: Made::Deleting, ..record }, op);
    }

    pub(super) fn remove_image(&mut self, record: ImageRecord, op: Op) {
        let uid = record.uid;
        self.record(vec![Change::Image(record)]);
        self.image_ops.insert(uid, op);
        self.out.push(Effect::RemoveImage { image: uid });
    }

    pub(super) fn delete_image(&mut self, name: &Name, op: Op) -> Result<(), Refused> {
        let record = check!(op, self.model.image(name)).clone();
        let users: Vec<String> = self
            .model
            .vms
            .values()
            .filter(|vm| vm.spec.image == *name)
            .map(|vm| self.model.vm_name(vm).to_string())
            .collect();
        if !users.is_empty() {
            let why = format!("gives the kernel of {}: delete these VMs first", users.join(", "));
            return refuse(op, Error::precondition(resource::image(name), why));
        }
        let copying = self
            .model
            .volumes
            .values()
            .any(|v| v.state == Made::Creating && v.source_image.as_ref() == Some(name));
        if copying {
            return refuse(
                op,
                Error::Busy { resource: resource::image(name), operation: "a copy into a volume" },
            );
        }
        let uid = record.uid;
        let mut changes = vec![Change::Image(ImageRecord { state: Made::Deleting, ..record })];
        changes.extend(self.remember(&op, resource::image(name)));
        check!(op, self.commit(changes));
        self.image_ops.insert(uid, op);
        self.out.push(Effect::RemoveImage { image: uid });
        Ok(())
    }

    pub(super) fn image_removed(&mut self, uid: Uuid, result: Result<(), Error>) {
        let op = self.image_ops.remove(&uid).unwrap_or_default();
        if let Err(error) = result {
            self.record(Self::forget(op.request.as_ref()).into_iter().collect());
            return op.finish(Err(error));
        }
        let Some(record) = self.model.images.get(&uid) else { return };
        let name = resource::image(&record.name);
        // What has neither disk nor kernel was never whole, and nobody was told that it came.
        let event = if record.size_bytes == 0 && !record.has_kernel {
            self.event(name, "undone", "its import broke off and was undone")
        } else {
            self.event(name, "deleted", "the image was removed")
        };
        self.record(vec![Change::Delete(Key::Image(uid)), event]);
        op.finish(Ok(Answer::Nothing));
    }
}
