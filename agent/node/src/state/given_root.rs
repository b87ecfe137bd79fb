//! VMs whose root is a volume that is there already: a clone, a restored or an imported disk.
//!
//! Nothing is made, so the VM is there with one commit, and a start that fails undoes the VM but never takes the volume:
//! a root that was given has been changed since it was made (its generation says so), one that was made for its VM has not.

use serio_store::{
    Change,
    record::{Run, VmRecord, VolumeRecord},
};
use serio_types::{BootFrom, Desired, Generation, VdcName, VmSpec, resource};
use uuid::Uuid;

use super::{
    Refused, State, check,
    phase::{Cause, Op, Phase},
};
use crate::error::Error;

impl State {
    pub(super) fn create_vm_on(
        &mut self,
        name: &VdcName,
        (spec, root): (VmSpec, &VdcName),
        start: bool,
        op: Op,
    ) -> Result<(), Refused> {
        let (vm, mut changes) = check!(op, self.plan_vm_on(name, spec, root, start));
        let uid = vm.uid;
        let message = format!("the VM was created, with {} as its root", resource::volume(root));
        changes.push(self.event(resource::vm(name), "created", message));
        changes.extend(self.remember(&op, resource::vm(name)));
        changes.insert(0, Change::Vm(Box::new(vm)));
        check!(op, self.commit(changes));
        if start {
            self.launch(uid, Cause::Create(op));
        } else {
            self.phases.insert(uid, Phase::Off);
            op.finish(self.answer_vm(uid));
        }
        Ok(())
    }

    fn plan_vm_on(
        &self,
        name: &VdcName,
        spec: VmSpec,
        root: &VdcName,
        start: bool,
    ) -> Result<(VmRecord, Vec<Change>), Error> {
        let vdc = self.usable_vdc(&name.vdc)?;
        if self.model.vm(name).is_ok() {
            return Err(Error::Exists { resource: resource::vm(name) });
        }
        let image = self.model.image(&spec.image)?;
        if spec.boot == BootFrom::Image && !image.has_kernel {
            let why = "has no kernel: boot from the disk, or import it with --kernel";
            return Err(Error::precondition(resource::image(&image.name), why));
        }
        if spec.volumes.contains(&root.name) {
            let problem = format!("volume {root} is the root too: a VM has a volume once");
            return Err(Error::invalid("spec.volumes", problem));
        }
        let volume = self.model.volume(root)?;
        self.volume_free(volume)?;
        if let Some(export) = self.model.head_export(volume.uid) {
            let why = format!("is in use: it is exported as exports/{}; end that first", export.id);
            return Err(Error::precondition(resource::volume(root), why));
        }
        let uid = Uuid::now_v7();
        let taken = VolumeRecord { vm: Some(uid), generation: volume.generation.next(), ..volume.clone() };
        let mut changes = vec![Change::Volume(taken)];
        changes.extend(self.attach(vdc, &spec, uid)?);
        let spec = self.choose_macs(spec, uid)?;
        let ask = serio_types::Quota {
            vcpus: u64::from(spec.vcpus.get()),
            memory_bytes: spec.memory.bytes(),
            storage_bytes: 0,
        };
        changes.extend(self.admit_vm(vdc, (name, uid), &ask)?);
        let vm = VmRecord {
            uid,
            vdc: vdc.uid,
            name: name.name.clone(),
            generation: Generation::FIRST,
            create_time: self.now,
            spec,
            root_volume: volume.uid,
            desired: if start { Desired::Running } else { Desired::Stopped },
            run: if start { Run::Starting } else { Run::Off },
            start_time: None,
            last_end: None,
            restarts: 0,
            kernel: None,
            restore: None,
        };
        Ok((vm, changes))
    }

    /// Whether a VM's root was there before it, and stays when its creation is undone.
    pub(super) fn root_was_given(&self, vm: &VmRecord) -> bool {
        self.model.volumes.get(&vm.root_volume).is_some_and(|root| root.generation != Generation::FIRST)
    }
}
