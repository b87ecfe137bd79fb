//! What clients ask of VMs: create, start, stop, delete. What then happens to the processes is in [`super::run`].

use std::{collections::BTreeSet, time::Duration};

use serio_store::{
    Change,
    record::{ImageRecord, Made, Run, VdcRecord, VmRecord, VolumeRecord},
};
use serio_types::{
    BootFrom, Desired, Generation, MacAddr, Name, NicSpec, Quota, VdcName, VmSpec, VolumeSize, resource,
};
use serio_vdc::{Owner, Pool};
use uuid::Uuid;

use super::{
    Refused, State, check,
    effect::{Effect, Timer},
    phase::{After, Cause, Op, Phase},
    refuse,
};
use crate::error::{Error, FieldError};

/// The most cards of a VM, and the most volumes beside the root's: what fits its PCI bus with room to spare.
pub(super) const NICS_MAX: usize = 8;
pub(super) const VOLUMES_MAX: usize = 16;

impl State {
    /// The pools that something new in a vdc must fit.
    pub(super) fn pools(&self, vdc: &VdcRecord) -> [Pool; 2] {
        [
            Pool {
                owner: Owner::Vdc(vdc.name.as_str().to_owned()),
                limit: vdc.quota,
                used: self.model.used(Some(vdc.uid)),
            },
            Pool { owner: Owner::Node, limit: self.capacity, used: self.promised() },
        ]
    }

    pub(super) fn create_vm(
        &mut self,
        name: VdcName,
        spec: VmSpec,
        start: bool,
        op: Op,
    ) -> Result<(), Refused> {
        let (vm, root, mut changes) = check!(op, self.plan_vm(&name, spec, start));
        let effect = Effect::CreateVolume {
            volume: root.uid,
            size_bytes: root.size_bytes,
            image: self.disk_of(root.source_image.as_ref()),
            vdc: self.key_owner(root.vdc),
        };
        changes.extend(self.remember(&op, resource::vm(&name)));
        let uid = vm.uid;
        changes.splice(0..0, [Change::Vm(Box::new(vm)), Change::Volume(root)]);
        check!(op, self.commit(changes));
        self.phases.insert(uid, Phase::Creating { start, op });
        self.out.push(effect);
        Ok(())
    }

    /// The image whose disk a volume starts from; none if it has no disk.
    pub(super) fn disk_of(&self, image: Option<&Name>) -> Option<Uuid> {
        let image = self.model.image(image?).ok()?;
        (image.size_bytes > 0).then_some(image.uid)
    }

    /// Checks a new VM against all that is, and makes its rows.
    fn plan_vm(
        &self,
        name: &VdcName,
        spec: VmSpec,
        start: bool,
    ) -> Result<(VmRecord, VolumeRecord, Vec<Change>), Error> {
        let vdc = self.usable_vdc(&name.vdc)?;
        if self.model.vm(name).is_ok() {
            return Err(Error::Exists { resource: resource::vm(name) });
        }
        let image = self.model.image(&spec.image)?;
        let why = match (spec.boot, image.has_kernel) {
            (BootFrom::Image, false) => Some("has no kernel: boot from the disk, or import it with --kernel"),
            (BootFrom::Auto, false) | (BootFrom::Disk, _) if image.size_bytes == 0 => {
                Some("has no disk to boot from: import it with one, or with --kernel")
            }
            _ => None,
        };
        if let Some(why) = why {
            return Err(Error::precondition(resource::image(&image.name), why));
        }
        let root_name = root_volume_name(&name.name)?;
        let root_name = VdcName { vdc: name.vdc.clone(), name: root_name };
        if self.model.volume(&root_name).is_ok() {
            return Err(Error::Exists { resource: resource::volume(&root_name) });
        }
        let size = root_size(&spec, image)?;
        let uid = Uuid::now_v7();
        let mut attached = self.attach(vdc, &spec, uid)?;
        let spec = self.choose_macs(spec, uid)?;
        let ask = Quota {
            vcpus: u64::from(spec.vcpus.get()),
            memory_bytes: spec.memory.bytes(),
            storage_bytes: size.bytes(),
        };
        attached.extend(self.admit_vm(vdc, (name, uid), &ask)?);
        let root = VolumeRecord {
            uid: Uuid::now_v7(),
            vdc: vdc.uid,
            name: root_name.name,
            generation: Generation::FIRST,
            create_time: self.now,
            state: Made::Creating,
            size_bytes: size.bytes(),
            source_image: Some(image.name.clone()),
            source_snapshot: None,
            unsure: false,
            vm: Some(uid),
        };
        let vm = VmRecord {
            uid,
            vdc: vdc.uid,
            name: name.name.clone(),
            generation: Generation::FIRST,
            create_time: self.now,
            spec,
            root_volume: root.uid,
            desired: if start { Desired::Running } else { Desired::Stopped },
            run: Run::Creating,
            start_time: None,
            last_end: None,
            restarts: 0,
            kernel: None,
            restore: None,
        };
        Ok((vm, root, attached))
    }

    /// The rows of the volumes that a new VM takes.
    pub(super) fn attach(&self, vdc: &VdcRecord, spec: &VmSpec, vm: Uuid) -> Result<Vec<Change>, Error> {
        if spec.volumes.len() > VOLUMES_MAX {
            return Err(Error::invalid(
                "spec.volumes",
                format!("{} volumes: at most {VOLUMES_MAX}", spec.volumes.len()),
            ));
        }
        let mut seen = BTreeSet::new();
        let mut changes = Vec::new();
        for (index, name) in spec.volumes.iter().enumerate() {
            if !seen.insert(name) {
                let field = format!("spec.volumes[{index}]");
                return Err(Error::invalid(
                    field,
                    format!("volume {name} is named twice: a VM has a volume once"),
                ));
            }
            let full = VdcName { vdc: vdc.name.clone(), name: name.clone() };
            let volume = self.model.volume(&full)?;
            self.volume_free(volume)?;
            let mut record = volume.clone();
            record.vm = Some(vm);
            record.generation = record.generation.next();
            changes.push(Change::Volume(record));
        }
        Ok(changes)
    }

    /// Says whether a VM or its creation may take a volume.
    pub(super) fn volume_free(&self, volume: &VolumeRecord) -> Result<(), Error> {
        let name = resource::volume(&self.model.volume_name(volume));
        if let Some(vm) = volume.vm {
            let why = format!(
                "is in use by {}: a volume has one VM; delete that VM, or use another volume",
                self.model.vm_resource(vm)
            );
            return Err(Error::precondition(name, why));
        }
        if let Some(op) = self.volume_ops.get(&volume.uid) {
            return Err(Error::Busy { resource: name, operation: op.operation() });
        }
        if volume.state != Made::Ready {
            return Err(Error::precondition(name, "is not whole: delete it"));
        }
        Ok(())
    }

    /// Gives each card an address: its own, or one derived from the VM's id.
    pub(super) fn choose_macs(&self, mut spec: VmSpec, vm: Uuid) -> Result<VmSpec, Error> {
        if spec.nics.len() > NICS_MAX {
            return Err(Error::invalid(
                "spec.nics",
                format!("{} cards: at most {NICS_MAX}", spec.nics.len()),
            ));
        }
        let mut taken = self.macs();
        for (index, nic) in spec.nics.iter_mut().enumerate() {
            let mac = choose_mac(nic.mac, &taken, (vm, index));
            let mac = mac.map_err(|problem| Error::invalid(format!("spec.nics[{index}].mac"), problem))?;
            taken.insert(mac);
            nic.mac = Some(mac);
        }
        Ok(spec)
    }

    /// Gives the card that comes to a VM at that place an address.
    pub(super) fn with_mac(&self, nic: NicSpec, vm: Uuid, index: usize) -> Result<(NicSpec, MacAddr), Error> {
        let mac = choose_mac(nic.mac, &self.macs(), (vm, index));
        let mac = mac.map_err(|problem| Error::invalid("nic.mac", problem))?;
        Ok((NicSpec { mac: Some(mac), ..nic }, mac))
    }

    fn macs(&self) -> BTreeSet<MacAddr> {
        self.model.vms.values().flat_map(|r| &r.spec.nics).filter_map(|nic| nic.mac).collect()
    }

    pub(super) fn start_vm(&mut self, name: &VdcName, op: Op) -> Result<(), Refused> {
        let record = check!(op, self.idle_vm(name)).clone();
        match self.phases.get(&record.uid) {
            None | Some(Phase::Off) => {}
            Some(Phase::Running { .. }) => {
                return refuse(op, Error::precondition(resource::vm(name), "runs already"));
            }
            Some(_) => {
                let why = "is about to be started again by its policy: stop it first to start it now";
                return refuse(op, Error::precondition(resource::vm(name), why));
            }
        }
        if matches!(record.run, Run::Deleting | Run::DeletingKeepRoot) {
            return refuse(
                op,
                Error::precondition(resource::vm(name), "is being deleted: delete it again to finish that"),
            );
        }
        check!(op, self.usable_vdc(&name.vdc));
        check!(op, self.takes_new());
        check!(op, self.not_fenced(record.uid));
        check!(op, self.volumes_startable(&record));
        let mut record = record;
        record.desired = Desired::Running;
        record.run = Run::Starting;
        record.generation = record.generation.next();
        let uid = record.uid;
        let mut changes = vec![Change::Vm(Box::new(record))];
        changes.extend(self.remember(&op, resource::vm(name)));
        check!(op, self.commit(changes));
        self.streaks.remove(&uid);
        self.launch(uid, Cause::Start(op));
        Ok(())
    }

    /// A volume is open in one process at a time: says whether none of a VM's is open elsewhere.
    pub(super) fn volumes_startable(&self, vm: &VmRecord) -> Result<(), Error> {
        for volume in self.model.volumes_of(vm) {
            let name = resource::volume(&self.model.volume_name(volume));
            if let Some(op) = self.volume_ops.get(&volume.uid) {
                return Err(Error::Busy { resource: name, operation: op.operation() });
            }
            if let Some(export) = self.model.head_export(volume.uid) {
                let why = format!("is in use: it is exported as exports/{}; end that first", export.id);
                return Err(Error::precondition(name, why));
            }
        }
        Ok(())
    }

    /// The VM, if no operation on it is going on.
    pub(super) fn idle_vm(&self, name: &VdcName) -> Result<&VmRecord, Error> {
        let record = self.model.vm(name)?;
        match self.phases.get(&record.uid).and_then(Phase::operation) {
            Some(operation) => Err(Error::Busy { resource: resource::vm(name), operation }),
            None => Ok(record),
        }
    }

    pub(super) fn stop_vm(
        &mut self,
        name: &VdcName,
        force: bool,
        timeout: Duration,
        op: Op,
    ) -> Result<(), Refused> {
        let record = check!(op, self.model.vm(name)).clone();
        match self.phases.get_mut(&record.uid) {
            Some(Phase::Running { pid }) => {
                let pid = *pid;
                if !force {
                    check!(op, self.listening(&record));
                }
                self.begin_stop(record, pid, force.then_some(()).map_or(Some(timeout), |()| None), op)
            }
            // Force overtakes a button that the guest does not heed.
            Some(Phase::Stopping { force: pulled @ false, after: After::Rest(waiting), .. }) if force => {
                waiting.replies.extend(op.replies);
                *pulled = true;
                let mut record = record;
                record.run = Run::Killing;
                let uid = record.uid;
                self.record(vec![Change::Vm(Box::new(record))]);
                self.out.push(Effect::Stop { vm: uid });
                Ok(())
            }
            Some(Phase::Pausing { .. }) => {
                let mut record = record;
                record.desired = Desired::Stopped;
                record.run = Run::Failed;
                record.restore = None;
                record.generation = record.generation.next();
                let uid = record.uid;
                let mut changes = vec![self.event(
                    resource::vm(name),
                    "stopped",
                    "it will not be started again by its policy",
                )];
                changes.insert(0, Change::Vm(Box::new(record)));
                changes.extend(self.remember(&op, resource::vm(name)));
                check!(op, self.commit(changes));
                self.phases.insert(uid, Phase::Off);
                op.finish(self.answer_vm(uid));
                Ok(())
            }
            None | Some(Phase::Off) => refuse(op, Error::precondition(resource::vm(name), "does not run")),
            Some(phase) => {
                let operation = phase.operation().unwrap_or("another operation");
                refuse(op, Error::Busy { resource: resource::vm(name), operation })
            }
        }
    }

    /// Presses the button, or pulls the plug when there is no time for the guest.
    fn begin_stop(
        &mut self,
        mut record: VmRecord,
        pid: u32,
        time: Option<Duration>,
        op: Op,
    ) -> Result<(), Refused> {
        let uid = record.uid;
        record.desired = Desired::Stopped;
        record.run = if time.is_some() { Run::Stopping } else { Run::Killing };
        record.generation = record.generation.next();
        let resource = self.model.vm_resource(uid);
        let mut changes = vec![Change::Vm(Box::new(record))];
        changes.extend(self.remember(&op, resource));
        check!(op, self.commit(changes));
        self.stopping(uid, pid, time, After::Rest(op));
        Ok(())
    }

    pub(super) fn stopping(&mut self, uid: Uuid, pid: u32, time: Option<Duration>, after: After) {
        let ticket = self.next_ticket();
        self.phases.insert(uid, Phase::Stopping { pid, force: time.is_none(), ticket, after });
        match time {
            Some(time) => {
                self.out.push(Effect::PowerButton { vm: uid });
                self.out.push(Effect::Timer { after: time, timer: Timer::StopDeadline { vm: uid, ticket } });
            }
            None => self.out.push(Effect::Stop { vm: uid }),
        }
    }

    pub(super) fn delete_vm(
        &mut self,
        name: &VdcName,
        keep_root: bool,
        force: bool,
        op: Op,
    ) -> Result<(), Refused> {
        let record = check!(op, self.idle_vm(name)).clone();
        let uid = record.uid;
        check!(op, self.deletable(&record, keep_root));
        match self.phases.get(&uid) {
            Some(Phase::Running { pid }) if force => {
                let pid = *pid;
                let mut record = record;
                record.desired = Desired::Stopped;
                record.run = Run::Killing;
                let mut changes = vec![Change::Vm(Box::new(record))];
                changes.extend(self.remember(&op, resource::vm(name)));
                check!(op, self.commit(changes));
                self.stopping(uid, pid, None, After::Delete { keep_root, op });
                Ok(())
            }
            Some(Phase::Running { .. } | Phase::Pausing { .. }) if !force => refuse(
                op,
                Error::precondition(resource::vm(name), "runs: stop it first, or delete it with force"),
            ),
            _ => {
                let remember = self.remember(&op, resource::vm(name));
                self.begin_delete(uid, keep_root, remember, op)
            }
        }
    }

    /// Says whether the volumes of a VM let it go.
    fn deletable(&self, vm: &VmRecord, keep_root: bool) -> Result<(), Error> {
        for volume in self.model.volumes_of(vm) {
            let name = resource::volume(&self.model.volume_name(volume));
            if let Some(op) = self.volume_ops.get(&volume.uid) {
                return Err(Error::Busy { resource: name, operation: op.operation() });
            }
            let root = volume.uid == vm.root_volume && !keep_root;
            if let Some(export) = self.model.exports.values().find(|e| root && e.volume == volume.uid) {
                let why =
                    format!("is exported as exports/{}: end that first, or keep the root volume", export.id);
                return Err(Error::precondition(name, why));
            }
        }
        Ok(())
    }
}

/// `NAME-root`.
fn root_volume_name(vm: &Name) -> Result<Name, Error> {
    format!("{vm}-root").parse().map_err(|_| {
        let problem = format!(
            "`{vm}` is too long: its root volume is named {vm}-root, which has at most 63 characters"
        );
        Error::invalid("vm_id", problem)
    })
}

/// The root volume's size: as asked, else the image's; never less than the image's.
fn root_size(spec: &VmSpec, image: &ImageRecord) -> Result<VolumeSize, Error> {
    const FIELD: &str = "spec.root_disk_bytes";
    let least = || VolumeSize::holding(image.size_bytes).map_err(|e| Error::invalid(FIELD, e.to_string()));
    match spec.root_disk {
        None if image.size_bytes == 0 => Err(Error::invalid(
            FIELD,
            format!("image {} has no disk: say how large the root volume shall be", image.name),
        )),
        None => least(),
        Some(size) if size.bytes() < image.size_bytes => {
            let problem = format!(
                "{} is less than the disk of image {}: at least {}",
                serio_types::ByteSize::from_bytes(size.bytes()),
                image.name,
                serio_types::ByteSize::from_bytes(least()?.bytes())
            );
            Err(Error::Invalid(vec![FieldError::new(FIELD, problem)]))
        }
        Some(size) => Ok(size),
    }
}

/// The address that was asked for, or one made of the VM's id and the card's place; why not.
fn choose_mac(
    asked: Option<MacAddr>,
    taken: &BTreeSet<MacAddr>,
    (vm, index): (Uuid, usize),
) -> Result<MacAddr, String> {
    match asked {
        Some(mac) if taken.contains(&mac) => Err(format!(
            "{mac} is the address of another card on this node: leave it empty to have one chosen"
        )),
        Some(mac) => Ok(mac),
        None => {
            let [.., a, b, c, d] = *vm.as_bytes();
            let last = u8::try_from(index).unwrap_or(u8::MAX);
            let mut all = (last..=u8::MAX).chain(0..last).map(|e| MacAddr::local([a, b, c, d, e]));
            all.find(|mac| !taken.contains(mac)).ok_or_else(|| "no address is free: give one".to_owned())
        }
    }
}
