//! Volumes and cards that a VM gets or gives back after its creation.
//!
//! ```text
//!   attach   stopped: the rows            running: the rows, then Effect::Plug; refused: the rows as before
//!   detach   stopped: the rows            running: Effect::Unplug, then the rows
//! ```
//! So while a guest may have a device its row says so: a seriod that dies between the two finds a VM without a device of its
//! row, and gives it ([`State::complete_devices`]). What came while the VM ran is there at its next start like the others.
//!
//! Invariant: while a volume comes or goes nothing else is done to it ([`VolumeOp::Plug`]), nor is the VM paused or saved.

use serio_store::{
    Change,
    record::{Made, Run, VmRecord, VolumeRecord},
};
use serio_types::{LimitedDevice, MacAddr, NicSpec, VdcName, resource};
use std::time::Duration;
use uuid::Uuid;

use super::{
    Refused, State, check,
    effect::{Device, Effect, Link, PlugResult},
    phase::{Op, Phase, VolumeOp},
    refuse,
    vm_orders::Order,
    vms::{NICS_MAX, VOLUMES_MAX},
};
use crate::error::Error;

impl State {
    /// A VM whose devices may change now, and its process.
    fn pluggable(&self, name: &VdcName) -> Result<(VmRecord, Option<u32>), Error> {
        let vm = self.idle_vm(name)?;
        let resource = resource::vm(name);
        if matches!(vm.run, Run::Deleting | Run::DeletingKeepRoot) {
            return Err(Error::precondition(resource, "is being deleted"));
        }
        if vm.restore.is_some() {
            let why = "is about to go on from a snapshot, with the devices that it had then: try again when it runs";
            return Err(Error::precondition(resource, why));
        }
        let Some(Phase::Running { pid }) = self.phases.get(&vm.uid) else { return Ok((vm.clone(), None)) };
        if let Some(operation) = self.order_under_way(vm.uid) {
            return Err(Error::Busy { resource, operation });
        }
        if vm.run == Run::Paused {
            let why = "is paused, and its guest would not notice: resume it first";
            return Err(Error::precondition(resource, why));
        }
        Ok((vm.clone(), Some(*pid)))
    }

    pub(super) fn attach_volume(&mut self, name: &VdcName, volume: &VdcName, op: Op) -> Result<(), Refused> {
        let (vm, record, pid) = check!(op, self.plan_attach(name, volume));
        let (uid, volume_uid) = (vm.uid, record.uid);
        // Behind the root, and before a seed.
        let position = u32::try_from(vm.spec.volumes.len()).unwrap_or(u32::MAX);
        let rows = vec![Change::Vm(Box::new(vm)), Change::Volume(record)];
        self.attach_device(rows, (uid, pid), (Device::Volume(volume_uid), position), op)
    }

    /// Commits the rows of a VM that gets a device, and gives it to its guest if that runs.
    fn attach_device(
        &mut self,
        mut rows: Vec<Change>,
        (vm, pid): (Uuid, Option<u32>),
        (device, position): (Device, u32),
        op: Op,
    ) -> Result<(), Refused> {
        rows.extend(self.remember(&op, self.model.vm_resource(vm)));
        let Some(pid) = pid else {
            rows.push(self.told(vm, device, "attached"));
            check!(op, self.commit(rows));
            op.finish(self.answer_vm(vm));
            return Ok(());
        };
        check!(op, self.commit(rows));
        self.plug(vm, pid, (device, position), op);
        Ok(())
    }

    fn plug(&mut self, vm: Uuid, pid: u32, (device, position): (Device, u32), op: Op) {
        let Some(record) = self.model.vms.get(&vm) else { return };
        let (limits, link) = (self.model.limits_of(record), link_of(record));
        if let Device::Volume(volume) = device {
            self.volume_ops.insert(volume, VolumeOp::Plug);
        }
        self.hold_orders(vm, pid, Order::Plug, op);
        self.out.push(Effect::Plug { vm, pid, device, position, link, limits });
    }

    pub(super) fn attach_nic(&mut self, name: &VdcName, nic: NicSpec, op: Op) -> Result<(), Refused> {
        let (vm, mac, pid) = check!(op, self.plan_attach_nic(name, nic));
        let uid = vm.uid;
        let position = u32::try_from(vm.spec.nics.len().saturating_sub(1)).unwrap_or(u32::MAX);
        let rows = vec![Change::Vm(Box::new(vm))];
        self.attach_device(rows, (uid, pid), (Device::Nic(mac), position), op)
    }

    fn plan_attach_nic(
        &self,
        name: &VdcName,
        nic: NicSpec,
    ) -> Result<(VmRecord, MacAddr, Option<u32>), Error> {
        let (mut vm, pid) = self.pluggable(name)?;
        self.usable_vdc(&name.vdc)?;
        let place = vm.spec.nics.len();
        if place >= NICS_MAX {
            let why = format!("has {NICS_MAX} cards, and that is the most: detach one first");
            return Err(Error::precondition(resource::vm(name), why));
        }
        let (nic, mac) = self.with_mac(nic, vm.uid, place)?;
        vm.spec.nics.push(nic);
        vm.generation = vm.generation.next();
        Ok((vm, mac, pid))
    }

    pub(super) fn detach_nic(
        &mut self,
        name: &VdcName,
        mac: MacAddr,
        wait: Duration,
        op: Op,
    ) -> Result<(), Refused> {
        let (vm, pid) = check!(op, self.pluggable(name));
        if !vm.spec.nics.iter().any(|nic| nic.mac == Some(mac)) {
            return refuse(op, Error::precondition(resource::vm(name), format!("has no card {mac}")));
        }
        let (uid, link) = (vm.uid, link_of(&vm));
        let Some(pid) = pid else {
            let mut changes = self.without_nic(vm, mac);
            changes.extend(self.remember(&op, resource::vm(name)));
            check!(op, self.commit(changes));
            op.finish(self.answer_vm(uid));
            return Ok(());
        };
        self.hold_orders(uid, pid, Order::Plug, op);
        self.out.push(Effect::Unplug { vm: uid, pid, device: Device::Nic(mac), link, wait });
        Ok(())
    }

    /// The rows of a VM without that card, and an event that says so.
    fn without_nic(&self, mut vm: VmRecord, mac: MacAddr) -> Vec<Change> {
        let event = self.told(vm.uid, Device::Nic(mac), "detached");
        if let Some(place) = vm.spec.nics.iter().position(|nic| nic.mac == Some(mac)) {
            vm.spec.nics.remove(place);
            vm.spec.machine.forget_nic(u32::try_from(place).unwrap_or(u32::MAX));
        }
        vm.generation = vm.generation.next();
        vec![Change::Vm(Box::new(vm)), event]
    }

    fn plan_attach(
        &self,
        name: &VdcName,
        volume: &VdcName,
    ) -> Result<(VmRecord, VolumeRecord, Option<u32>), Error> {
        let (mut vm, pid) = self.pluggable(name)?;
        if volume.vdc != name.vdc {
            let problem = format!("is of vdc {}: a VM has volumes of its own vdc only", volume.vdc);
            return Err(Error::invalid("volume", problem));
        }
        self.usable_vdc(&name.vdc)?;
        let record = self.model.volume(volume)?;
        self.volume_free(record)?;
        if let Some(export) = self.model.head_export(record.uid) {
            let why = format!("is in use: it is exported as exports/{}; end that first", export.id);
            return Err(Error::precondition(resource::volume(volume), why));
        }
        if vm.spec.volumes.len() >= VOLUMES_MAX {
            let why =
                format!("has {VOLUMES_MAX} volumes beside its root, and that is the most: detach one first");
            return Err(Error::precondition(resource::vm(name), why));
        }
        let mut record = record.clone();
        record.vm = Some(vm.uid);
        record.generation = record.generation.next();
        vm.spec.volumes.push(volume.name.clone());
        vm.generation = vm.generation.next();
        Ok((vm, record, pid))
    }

    pub(super) fn detach_volume(
        &mut self,
        name: &VdcName,
        volume: &VdcName,
        wait: Duration,
        op: Op,
    ) -> Result<(), Refused> {
        let (vm, record, pid) = check!(op, self.plan_detach(name, volume));
        let (uid, volume_uid, link) = (vm.uid, record.uid, link_of(&vm));
        let Some(pid) = pid else {
            let mut changes = self.without(vm, record);
            changes.extend(self.remember(&op, resource::vm(name)));
            check!(op, self.commit(changes));
            op.finish(self.answer_vm(uid));
            return Ok(());
        };
        if self.works.get(&volume_uid).is_some_and(|works| !works.is_empty()) {
            let operation = "a merge of its layers (`serio operation list` shows it)";
            return refuse(op, Error::Busy { resource: resource::volume(volume), operation });
        }
        self.volume_ops.insert(volume_uid, VolumeOp::Plug);
        self.hold_orders(uid, pid, Order::Plug, op);
        self.out.push(Effect::Unplug { vm: uid, pid, device: Device::Volume(volume_uid), link, wait });
        Ok(())
    }

    fn plan_detach(
        &self,
        name: &VdcName,
        volume: &VdcName,
    ) -> Result<(VmRecord, VolumeRecord, Option<u32>), Error> {
        let (vm, pid) = self.pluggable(name)?;
        let record = self.model.volume(volume)?;
        let resource = resource::volume(volume);
        if record.vm != Some(vm.uid) {
            return Err(Error::precondition(resource, format!("is not attached to {}", resource::vm(name))));
        }
        if record.uid == vm.root_volume {
            let why = "is the root of its VM: a VM keeps that; delete the VM with --keep-root-volume instead";
            return Err(Error::precondition(resource, why));
        }
        match self.volume_ops.get(&record.uid) {
            Some(busy) => Err(Error::Busy { resource, operation: busy.operation() }),
            None if record.state != Made::Ready => Err(Error::precondition(resource, "is not whole")),
            None => Ok((vm, record.clone(), pid)),
        }
    }

    /// The rows of a VM without that volume, and an event that says so.
    fn without(&self, mut vm: VmRecord, mut volume: VolumeRecord) -> Vec<Change> {
        let event = self.told(vm.uid, Device::Volume(volume.uid), "detached");
        vm.spec.volumes.retain(|name| *name != volume.name);
        vm.spec.machine.set_limits_of(LimitedDevice::Volume(volume.name.clone()), None);
        vm.generation = vm.generation.next();
        volume.vm = None;
        volume.generation = volume.generation.next();
        vec![Change::Vm(Box::new(vm)), Change::Volume(volume), event]
    }

    fn named(&self, device: Device) -> String {
        match device {
            Device::Volume(volume) => self.model.volume_resource(volume),
            Device::Nic(mac) => format!("card {mac}"),
        }
    }

    fn told(&self, vm: Uuid, device: Device, kind: &str) -> Change {
        self.event(self.model.vm_resource(vm), kind, format!("{} is {kind}", self.named(device)))
    }

    /// The rows of a VM without that device; none when it is gone.
    fn without_device(&self, vm: Uuid, device: Device) -> Option<Vec<Change>> {
        let record = self.model.vms.get(&vm)?.clone();
        Some(match device {
            Device::Volume(volume) => self.without(record, self.model.volumes.get(&volume)?.clone()),
            Device::Nic(mac) => self.without_nic(record, mac),
        })
    }

    fn plug_ended(&mut self, vm: Uuid, device: Device) -> Option<(bool, Op)> {
        if let Device::Volume(volume) = device {
            self.volume_ops.remove(&volume);
        }
        let (pid, op) = self.release_orders(vm, Order::Plug)?;
        let is_same = matches!(self.phases.get(&vm), Some(Phase::Running { pid: now }) if *now == pid);
        Some((is_same, op))
    }

    pub(super) fn plugged(&mut self, vm: Uuid, device: Device, result: PlugResult) {
        let Some((is_same, op)) = self.plug_ended(vm, device) else { return };
        let begun_by_client = !op.replies.is_empty() || op.request.is_some();
        match result {
            PlugResult::Refused(error) if is_same && begun_by_client => {
                let mut changes: Vec<Change> = Self::forget(op.request.as_ref()).into_iter().collect();
                // It was never there: no event.
                let rows = self.without_device(vm, device).into_iter().flatten();
                changes.extend(rows.filter(|change| !matches!(change, Change::Event(_))));
                self.record(changes);
                op.finish(Err(error));
            }
            // One that has ended meanwhile has it at its next start.
            PlugResult::Refused(error) | PlugResult::InDoubt(error) if is_same => {
                let why = crate::error::chain(&error);
                let message = format!(
                    "{} is attached, but its guest may not see it before its next start: {why}",
                    self.named(device)
                );
                let event = self.event(self.model.vm_resource(vm), "attach-unsure", message);
                self.record(vec![event]);
                op.finish(Err(error));
            }
            _ => {
                let event = self.told(vm, device, "attached");
                self.record(vec![event]);
                op.finish(self.answer_vm(vm));
            }
        }
    }

    pub(super) fn unplugged(&mut self, vm: Uuid, device: Device, result: Result<(), Error>) {
        let Some((is_same, op)) = self.plug_ended(vm, device) else { return };
        let rows = self.without_device(vm, device);
        let resource = self.model.vm_resource(vm);
        match (result, rows) {
            (Err(error), _) => op.finish(Err(error)),
            (Ok(()), Some(mut changes)) if is_same => {
                changes.extend(self.remember(&op, resource));
                self.record(changes);
                op.finish(self.answer_vm(vm));
            }
            // It may have been started again, with the device.
            (Ok(()), _) => op.finish(Err(Error::precondition(resource, "ended meanwhile: ask again"))),
        }
    }

    /// Gives a VM that was taken over, and `has` these volumes and cards, the first device of its row that it lacks: an earlier
    /// seriod ended in the middle of that.
    pub(super) fn complete_devices(&mut self, uid: Uuid, pid: u32, has: (&[Uuid], &[MacAddr])) {
        let Some(vm) = self.model.vms.get(&uid) else { return };
        // An older program does not say what it has; each has a root.
        if has.0.is_empty() || self.order_under_way(uid).is_some() || vm.run == Run::Paused {
            return;
        }
        let volumes = self.model.volumes_of(vm).into_iter().map(|volume| volume.uid);
        let volume = (0u32..).zip(volumes).find(|(_, volume)| !has.0.contains(volume));
        let macs = vm.spec.nics.iter().filter_map(|nic| nic.mac);
        let nic = (0u32..).zip(macs).find(|(_, mac)| !has.1.contains(mac));
        let lacking = match (volume, nic) {
            (Some((at, volume)), _) if !self.volume_ops.contains_key(&volume) => (Device::Volume(volume), at),
            (None, Some((at, mac))) => (Device::Nic(mac), at),
            _ => return,
        };
        self.plug(uid, pid, lacking, Op::default());
    }
}

fn link_of(vm: &VmRecord) -> Link {
    Link { vdc: vm.vdc, mtu: vm.spec.machine.mtu(), vcpus: vm.spec.vcpus.into() }
}
