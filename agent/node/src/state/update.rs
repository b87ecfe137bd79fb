//! Changes of a VM's spec: what may change while it runs, and what only while it is stopped.
//!
//! Whatever changes, the row says it first; a running guest is then told what counts at once (its balloon, its limits).

use serio_store::{Change, record::VmRecord};
use serio_types::{
    BootFrom, Cmdline, CpuBaseline, IoLimits, LimitedDevice, MemorySize, PageSize, Quota, RestartPolicy,
    VcpuCount, VdcName, VmSpec, Watchdog, resource,
};
use uuid::Uuid;

use super::{
    Refused, State, check,
    effect::Effect,
    phase::{Op, Phase},
};
use crate::error::{Error, FieldError, chain};

/// A change of a VM's spec.
#[allow(missing_docs, reason = "the variants are named after the fields of the spec")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmChange {
    Vcpus(VcpuCount),
    Memory(MemorySize),
    Cmdline(Option<Cmdline>),
    RestartPolicy(RestartPolicy),
    Boot(BootFrom),
    Vsock(bool),
    Watchdog(Watchdog),
    Pages(PageSize),
    Cpu(CpuBaseline),
    Mtu(u32),
    BalloonTarget(u64),
    BalloonFloor(u64),
    DiskLimit(LimitField, u64),
    NicLimit(LimitField, u64),
    DeviceLimits(Vec<(LimitedDevice, Option<IoLimits>)>),
}

/// A field of [`IoLimits`].
#[allow(missing_docs, reason = "the variants are named after the fields")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitField {
    Bytes,
    BytesBurst,
    Operations,
    OperationsBurst,
}

impl LimitField {
    const fn of(self, limits: &mut IoLimits) -> &mut u64 {
        match self {
            Self::Bytes => &mut limits.bytes_per_second,
            Self::BytesBurst => &mut limits.bytes_burst,
            Self::Operations => &mut limits.operations_per_second,
            Self::OperationsBurst => &mut limits.operations_burst,
        }
    }
}

impl VmChange {
    fn apply(&self, spec: &mut VmSpec) {
        let machine = &mut spec.machine;
        match self {
            Self::Vcpus(vcpus) => spec.vcpus = *vcpus,
            Self::Memory(memory) => spec.memory = *memory,
            Self::Cmdline(cmdline) => spec.cmdline.clone_from(cmdline),
            Self::RestartPolicy(policy) => spec.restart_policy = *policy,
            Self::Boot(boot) => spec.boot = *boot,
            Self::Vsock(vsock) => machine.vsock = *vsock,
            Self::Watchdog(watchdog) => machine.watchdog = *watchdog,
            Self::Pages(pages) => machine.pages = *pages,
            Self::Cpu(cpu) => machine.cpu = *cpu,
            Self::Mtu(mtu) => machine.mtu = *mtu,
            Self::BalloonTarget(bytes) => machine.balloon.target_bytes = *bytes,
            Self::BalloonFloor(bytes) => machine.balloon.floor_bytes = *bytes,
            Self::DiskLimit(field, value) => *field.of(&mut machine.disk_limits) = *value,
            Self::NicLimit(field, value) => *field.of(&mut machine.nic_limits) = *value,
            Self::DeviceLimits(single) => {
                for (device, limits) in single {
                    machine.set_limits_of(device.clone(), *limits);
                }
            }
        }
    }

    const fn is_limit(&self) -> bool {
        matches!(self, Self::DiskLimit(..) | Self::NicLimit(..) | Self::DeviceLimits(_))
    }

    /// Whether it may change while the VM has a process.
    const fn is_live(&self) -> bool {
        self.is_limit()
            || matches!(self, Self::RestartPolicy(_) | Self::BalloonTarget(_) | Self::BalloonFloor(_))
    }
}

/// What is wrong with limits of a device that the VM does not have.
fn unknown(spec: &VmSpec, device: &LimitedDevice) -> Option<FieldError> {
    let what = match device {
        LimitedDevice::Volume(name) if !spec.volumes.contains(name) => format!("the VM has no volume {name}"),
        LimitedDevice::Nic(index) if usize::try_from(*index).is_ok_and(|index| index >= spec.nics.len()) => {
            format!("the VM has {} cards, and the first is nics/0", spec.nics.len())
        }
        _ => return None,
    };
    Some(FieldError::new("spec.device_limits", what))
}

impl State {
    pub(super) fn update_vm(&mut self, name: &VdcName, changes: &[VmChange], op: Op) -> Result<(), Refused> {
        let record = check!(op, self.plan_update(name, changes));
        let (uid, resource) = (record.uid, resource::vm(name));
        let event = self.event(resource.clone(), "updated", "its spec was changed");
        let mut rows = vec![Change::Vm(Box::new(record)), event];
        rows.extend(self.remember(&op, resource));
        check!(op, self.commit(rows));
        if changes.iter().any(|change| matches!(change, VmChange::BalloonTarget(_))) {
            self.set_balloon(uid, true);
        }
        if changes.iter().any(VmChange::is_limit) {
            self.set_limits(uid, true);
        }
        op.finish(self.answer_vm(uid));
        Ok(())
    }

    fn plan_update(&self, name: &VdcName, changes: &[VmChange]) -> Result<VmRecord, Error> {
        let mut record = self.idle_vm(name)?.clone();
        let off = matches!(self.phases.get(&record.uid), None | Some(Phase::Off));
        if !off && changes.iter().any(|change| !change.is_live()) {
            let why =
                "runs, and only its restart policy, balloon and limits can be changed now: stop it first";
            return Err(Error::precondition(resource::vm(name), why));
        }
        let before = record.spec.clone();
        changes.iter().for_each(|change| change.apply(&mut record.spec));
        let problems = record.spec.machine.problems(record.spec.memory);
        let field = |(field, problem): (&str, serio_types::MachineError)| {
            FieldError::new(format!("spec.{field}"), chain(&problem))
        };
        let mut wrong: Vec<FieldError> = problems.into_iter().map(field).collect();
        wrong.extend(
            record.spec.machine.device_limits.iter().filter_map(|one| unknown(&record.spec, &one.device)),
        );
        if !wrong.is_empty() {
            return Err(Error::Invalid(wrong));
        }
        let more = Quota {
            vcpus: u64::from(record.spec.vcpus.get().saturating_sub(before.vcpus.get())),
            memory_bytes: record.spec.memory.bytes().saturating_sub(before.memory.bytes()),
            storage_bytes: 0,
        };
        if more != Quota::default() {
            serio_vdc::admit(&self.pools(self.usable_vdc(&name.vdc)?), &more)?;
        }
        record.generation = record.generation.next();
        Ok(record)
    }

    /// Has the machine of a running guest keep to the limits of its row; at a start of ours only if there are any.
    pub(super) fn set_limits(&mut self, uid: Uuid, always: bool) {
        let Some(vm) = self.model.vms.get(&uid) else { return };
        let limits = self.model.limits_of(vm);
        if matches!(self.phases.get(&uid), Some(Phase::Running { .. })) && (always || !limits.is_none()) {
            self.out.push(Effect::Limits { vm: uid, limits });
        }
    }

    /// Tells a running guest what its row says of its balloon; at a start only if there is something to tell.
    pub(super) fn set_balloon(&mut self, uid: Uuid, always: bool) {
        let Some(vm) = self.model.vms.get(&uid) else { return };
        let target_bytes = vm.spec.machine.balloon.target_bytes;
        if matches!(self.phases.get(&uid), Some(Phase::Running { .. })) && (always || target_bytes > 0) {
            self.out.push(Effect::Balloon { vm: uid, target_bytes });
        }
    }
}
