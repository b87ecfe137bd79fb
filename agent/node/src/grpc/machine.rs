//! Protobuf ⇄ what a VM's machine has, and the changes of a VM that a client asks for. Part of [`super::convert`].

use std::time::Duration;

use serio_api::v1;
use serio_control::message::BalloonStats;
use serio_types::{
    Balloon, CpuBaseline, DeviceLimits, IoLimits, LimitedDevice, MachineSpec, MemorySize, Name, PageSize,
    VdcName, Watchdog, resource,
};

use super::convert::{self, Fields};
use crate::{
    error::{Error, chain},
    state::command::{LimitField, TroubleView, VmChange},
};

fn watchdog(fields: &mut Fields, action: i32) -> Watchdog {
    match v1::WatchdogAction::try_from(action) {
        Ok(v1::WatchdogAction::Unspecified | v1::WatchdogAction::Reset) => Watchdog::Reset,
        Ok(v1::WatchdogAction::End) => Watchdog::End,
        Err(_) => {
            fields.wrong("spec.watchdog", format!("{action} is unknown"));
            Watchdog::Reset
        }
    }
}

fn limits(limits: Option<&v1::IoLimits>) -> IoLimits {
    limits.map_or_else(IoLimits::default, |limits| IoLimits {
        bytes_per_second: limits.bytes_per_second,
        bytes_burst: limits.bytes_burst,
        operations_per_second: limits.operations_per_second,
        operations_burst: limits.operations_burst,
    })
}

/// To the wire.
pub(super) fn trouble(view: &TroubleView) -> v1::VmTrouble {
    v1::VmTrouble {
        kind: view.report.kind.as_str().to_owned(),
        device: view.device.clone(),
        reason: view.report.reason.clone(),
        since: Some(convert::timestamp(view.since)),
    }
}

fn volume_name(vdc: &Name, name: &Name) -> String {
    resource::volume(&VdcName { vdc: vdc.clone(), name: name.clone() })
}

/// A disk or card as the API names it.
fn device(vdc: &Name, text: &str) -> Option<LimitedDevice> {
    if text == "root" {
        return Some(LimitedDevice::Root);
    }
    match text.strip_prefix("nics/") {
        Some(index) => index.parse().ok().map(LimitedDevice::Nic),
        None => resource::parse_volume(text)
            .ok()
            .filter(|name| name.vdc == *vdc)
            .map(|name| LimitedDevice::Volume(name.name)),
    }
}

/// The single devices of a spec whose names are right, with their places in it.
fn device_limits(
    fields: &mut Fields,
    vdc: &Name,
    spec: &v1::VmSpec,
) -> Vec<(usize, (LimitedDevice, Option<IoLimits>))> {
    let mut found = Vec::new();
    for (at, one) in spec.device_limits.iter().enumerate() {
        match device(vdc, &one.device) {
            Some(device) => {
                let own = one.limits.as_ref().map(|own| limits(Some(own)));
                found.push((at, (device, own)));
            }
            None => fields.wrong(
                format!("spec.device_limits[{at}].device"),
                format!(
                    "`{}` is not root, nics/N or a volume of this vdc: write for example {}",
                    one.device,
                    resource::volume(&VdcName { vdc: vdc.clone(), name: vdc.clone() })
                ),
            ),
        }
    }
    found
}

/// What a spec says of the machine; checked against the memory, if that is known.
pub(super) fn from_proto(
    fields: &mut Fields,
    vdc: &Name,
    spec: &v1::VmSpec,
    memory: Option<MemorySize>,
) -> MachineSpec {
    let mut machine = MachineSpec {
        vsock: spec.vsock,
        watchdog: watchdog(fields, spec.watchdog),
        pages: fields.take("spec.page_bytes", PageSize::try_from(spec.page_bytes)).unwrap_or_default(),
        cpu: fields.take("spec.cpu_baseline", spec.cpu_baseline.parse()).unwrap_or_default(),
        balloon: spec.balloon.as_ref().map_or_else(Balloon::default, |balloon| Balloon {
            target_bytes: balloon.target_bytes,
            floor_bytes: balloon.floor_bytes,
        }),
        disk_limits: limits(spec.disk_limits.as_ref()),
        nic_limits: limits(spec.nic_limits.as_ref()),
        mtu: spec.mtu,
        device_limits: Vec::new(),
    };
    for (at, (device, limits)) in device_limits(fields, vdc, spec) {
        let known = match &device {
            LimitedDevice::Root => true,
            LimitedDevice::Volume(name) => spec.volumes.contains(&volume_name(vdc, name)),
            LimitedDevice::Nic(index) => usize::try_from(*index).is_ok_and(|index| index < spec.nics.len()),
        };
        if !known {
            fields.wrong(format!("spec.device_limits[{at}].device"), "is no disk or card of this VM");
        } else if machine.device_limits.iter().any(|one| one.device == device) {
            fields.wrong(format!("spec.device_limits[{at}].device"), "is there twice");
        } else {
            machine.set_limits_of(device, Some(limits.unwrap_or_default()));
        }
    }
    for (field, problem) in memory.map(|memory| machine.problems(memory)).into_iter().flatten() {
        fields.wrong(format!("spec.{field}"), chain(&problem));
    }
    machine
}

fn proto_limits(limits: &IoLimits) -> Option<v1::IoLimits> {
    (!limits.is_none()).then(|| all_limits(limits))
}

const fn all_limits(limits: &IoLimits) -> v1::IoLimits {
    v1::IoLimits {
        bytes_per_second: limits.bytes_per_second,
        bytes_burst: limits.bytes_burst,
        operations_per_second: limits.operations_per_second,
        operations_burst: limits.operations_burst,
    }
}

fn proto_device_limits(vdc: &Name, one: &DeviceLimits) -> v1::DeviceLimits {
    let device = match &one.device {
        LimitedDevice::Root => "root".to_owned(),
        LimitedDevice::Volume(name) => volume_name(vdc, name),
        LimitedDevice::Nic(index) => format!("nics/{index}"),
    };
    v1::DeviceLimits { device, limits: Some(all_limits(&one.limits)) }
}

/// To the wire: these fields of a spec.
pub(super) fn to_proto(vdc: &Name, machine: &MachineSpec) -> v1::VmSpec {
    let balloon = &machine.balloon;
    v1::VmSpec {
        vsock: machine.vsock,
        watchdog: match machine.watchdog {
            Watchdog::Reset => v1::WatchdogAction::Unspecified,
            Watchdog::End => v1::WatchdogAction::End,
        }
        .into(),
        page_bytes: if machine.pages == PageSize::Small { 0 } else { machine.pages.bytes() },
        cpu_baseline: if machine.cpu == CpuBaseline::Host { "" } else { machine.cpu.as_str() }.to_owned(),
        balloon: (*balloon != Balloon::default())
            .then_some(v1::Balloon { target_bytes: balloon.target_bytes, floor_bytes: balloon.floor_bytes }),
        disk_limits: proto_limits(&machine.disk_limits),
        nic_limits: proto_limits(&machine.nic_limits),
        mtu: machine.mtu,
        device_limits: machine.device_limits.iter().map(|one| proto_device_limits(vdc, one)).collect(),
        ..v1::VmSpec::default()
    }
}

/// What a guest says of its memory, by the tags of virtio 1.2 §5.5.6.3.
pub(super) fn memory(stats: &BalloonStats) -> v1::GuestMemory {
    let said = |tag: u32| stats.guest.get(&tag).copied().unwrap_or_default();
    v1::GuestMemory {
        target_bytes: stats.target_bytes,
        balloon_bytes: stats.actual_bytes,
        released_bytes: stats.released_bytes,
        age: (!stats.guest.is_empty()).then(|| Duration::from_millis(stats.age_ms).into()),
        swapped_in_bytes: said(0),
        swapped_out_bytes: said(1),
        major_faults: said(2),
        minor_faults: said(3),
        free_bytes: said(4),
        total_bytes: said(5),
        available_bytes: said(6),
        caches_bytes: said(7),
    }
}

fn limit(name: &str, limits: &IoLimits) -> Option<(LimitField, u64)> {
    Some(match name {
        "bytes_per_second" => (LimitField::Bytes, limits.bytes_per_second),
        "bytes_burst" => (LimitField::BytesBurst, limits.bytes_burst),
        "operations_per_second" => (LimitField::Operations, limits.operations_per_second),
        "operations_burst" => (LimitField::OperationsBurst, limits.operations_burst),
        _ => return None,
    })
}

/// The change that a field of an update stands for; none if that field does not change, or is wrong.
fn change(fields: &mut Fields, vdc: &Name, name: &str, spec: &v1::VmSpec) -> Result<Option<VmChange>, ()> {
    let balloon = spec.balloon.unwrap_or_default();
    Ok(match name {
        "vcpus" => fields.take("spec.vcpus", spec.vcpus.try_into()).map(VmChange::Vcpus),
        "memory_bytes" => {
            fields.take("spec.memory_bytes", spec.memory_bytes.try_into()).map(VmChange::Memory)
        }
        "cmdline" if spec.cmdline.is_empty() => Some(VmChange::Cmdline(None)),
        "cmdline" => {
            let cmdline = fields.take("spec.cmdline", spec.cmdline.clone().try_into());
            cmdline.map(|cmdline| VmChange::Cmdline(Some(cmdline)))
        }
        "restart_policy" => {
            Some(VmChange::RestartPolicy(convert::restart_policy(fields, spec.restart_policy)))
        }
        "boot" => Some(VmChange::Boot(convert::boot(fields, spec.boot))),
        "vsock" => Some(VmChange::Vsock(spec.vsock)),
        "watchdog" => Some(VmChange::Watchdog(watchdog(fields, spec.watchdog))),
        "page_bytes" => fields.take("spec.page_bytes", spec.page_bytes.try_into()).map(VmChange::Pages),
        "cpu_baseline" => fields.take("spec.cpu_baseline", spec.cpu_baseline.parse()).map(VmChange::Cpu),
        "mtu" => Some(VmChange::Mtu(spec.mtu)),
        "balloon.target_bytes" => Some(VmChange::BalloonTarget(balloon.target_bytes)),
        "device_limits" => {
            let single = device_limits(fields, vdc, spec).into_iter().map(|(_, one)| one);
            Some(VmChange::DeviceLimits(single.collect()))
        }
        "balloon.floor_bytes" => Some(VmChange::BalloonFloor(balloon.floor_bytes)),
        other => match other.split_once('.') {
            Some(("disk_limits", part)) => {
                let found = limit(part, &limits(spec.disk_limits.as_ref()));
                Some(found.map(|(field, value)| VmChange::DiskLimit(field, value)).ok_or(())?)
            }
            Some(("nic_limits", part)) => {
                let found = limit(part, &limits(spec.nic_limits.as_ref()));
                Some(found.map(|(field, value)| VmChange::NicLimit(field, value)).ok_or(())?)
            }
            _ => return Err(()),
        },
    })
}

/// The changes that an update asks for.
///
/// # Errors
/// All wrong fields.
pub(super) fn changes(
    vdc: &Name,
    names: &[String],
    spec: Option<v1::VmSpec>,
) -> Result<Vec<VmChange>, Error> {
    let spec = spec.unwrap_or_default();
    let mut fields = Fields::default();
    let mut changes = Vec::new();
    for (index, name) in names.iter().enumerate() {
        match change(&mut fields, vdc, name, &spec) {
            Ok(change) => changes.extend(change),
            Err(()) => {
                let problem = format!("`{name}` cannot be changed: the API says at UpdateVmRequest what can");
                fields.wrong(format!("fields[{index}]"), problem);
            }
        }
    }
    if names.is_empty() {
        fields.wrong("fields", "is empty: name what shall change");
    }
    fields.done(Some(changes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    #[test]
    fn a_machine_goes_to_the_wire_and_back() {
        let machine = MachineSpec {
            vsock: true,
            watchdog: Watchdog::End,
            pages: PageSize::Huge,
            cpu: CpuBaseline::X86_64V3,
            balloon: Balloon { target_bytes: 16 << 20, floor_bytes: 32 << 20 },
            disk_limits: IoLimits { operations_per_second: 100, ..IoLimits::default() },
            nic_limits: IoLimits { bytes_per_second: 1 << 20, bytes_burst: 1, ..IoLimits::default() },
            mtu: 9000,
            device_limits: [LimitedDevice::Root, LimitedDevice::Volume(name("data")), LimitedDevice::Nic(1)]
                .map(|device| DeviceLimits { device, limits: IoLimits::default() })
                .into(),
        };
        for machine in [machine, MachineSpec::default()] {
            let mut fields = Fields::default();
            let memory = MemorySize::try_from(64 << 20).ok();
            let spec = v1::VmSpec {
                volumes: vec!["vdcs/ardesio/volumes/data".to_owned()],
                nics: vec![v1::NicSpec::default(); 2],
                ..to_proto(&name("ardesio"), &machine)
            };
            assert_eq!(from_proto(&mut fields, &name("ardesio"), &spec, memory), machine);
            let stored = serde_json::to_string(&machine).unwrap();
            assert_eq!(serde_json::from_str::<MachineSpec>(&stored).unwrap(), machine);
            fields.done(Some(())).unwrap();
        }
    }

    #[test]
    fn every_wrong_field_is_named() {
        let limits_of =
            |device: &str| v1::DeviceLimits { device: device.to_owned(), ..v1::DeviceLimits::default() };
        let spec = v1::VmSpec {
            device_limits: ["disk", "root", "nics/0", "root", "vdcs/b/volumes/a"].map(limits_of).into(),
            page_bytes: 3,
            cpu_baseline: "z80".to_owned(),
            watchdog: 9,
            mtu: 1,
            ..v1::VmSpec::default()
        };
        let mut fields = Fields::default();
        from_proto(&mut fields, &name("ardesio"), &spec, MemorySize::try_from(64 << 20).ok());
        let Err(Error::Invalid(wrong)) = fields.done(Some(())) else { panic!("nothing is wrong") };
        let wrong: Vec<&str> = wrong.iter().map(|w| w.field.as_str()).collect();
        let device = [0, 4, 2, 3].map(|at| format!("spec.device_limits[{at}].device"));
        let first = ["spec.watchdog", "spec.page_bytes", "spec.cpu_baseline"];
        let all = first.into_iter().chain(device.iter().map(String::as_str)).chain(["spec.mtu"]);
        assert_eq!(wrong, all.collect::<Vec<_>>());
    }

    #[test]
    fn an_update_is_its_fields() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let spec = v1::VmSpec {
            vcpus: 2,
            disk_limits: Some(v1::IoLimits { bytes_burst: 7, ..v1::IoLimits::default() }),
            ..v1::VmSpec::default()
        };
        let found =
            changes(&name("ardesio"), &names(&["vcpus", "disk_limits.bytes_burst"]), Some(spec.clone()))
                .unwrap();
        assert_eq!(
            found,
            [VmChange::Vcpus(2.try_into().unwrap()), VmChange::DiskLimit(LimitField::BytesBurst, 7)]
        );
        for wrong in ["image", "disk_limits", "disk_limits.x", "x.bytes_burst", ""] {
            let error = changes(&name("ardesio"), &names(&["vcpus", wrong]), Some(spec.clone())).unwrap_err();
            assert!(matches!(error, Error::Invalid(wrong) if wrong[0].field == "fields[1]"));
        }
        assert!(changes(&name("ardesio"), &[], Some(spec)).is_err());
    }
}
