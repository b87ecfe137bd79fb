//! What of a VM's spec changes when, and what of it its guest hears.

use serio_types::{IoLimits, LimitedDevice, RestartPolicy, VdcName};

use super::{
    command::{LimitField, Mutation, VmChange},
    sim_test::{Sim, spec},
};
use crate::{error::Error, supervise::DevicePlan};

fn web() -> VdcName {
    "ardesio/web".parse().unwrap()
}

fn update(sim: &mut Sim, changes: &[VmChange]) -> Result<(), Error> {
    sim.ask(Mutation::UpdateVm { name: web(), changes: changes.to_vec() }).map(drop)
}

#[test]
fn a_running_vm_changes_what_it_can_and_a_stopped_one_the_rest() {
    let mut sim = Sim::new();
    sim.furnish();
    sim.ask(Mutation::CreateVm { name: web(), spec: spec(1), start: true }).unwrap();
    let generation = sim.vm("ardesio/web").unwrap().record.generation;
    update(
        &mut sim,
        &[
            VmChange::RestartPolicy(RestartPolicy::Always),
            VmChange::BalloonTarget(8 << 20),
            VmChange::DiskLimit(LimitField::Operations, 100),
        ],
    )
    .unwrap();
    let record = sim.vm("ardesio/web").unwrap().record;
    assert!(record.generation > generation);
    assert_eq!(record.spec.restart_policy, RestartPolicy::Always);
    assert_eq!(record.spec.machine.disk_limits.operations_per_second, 100);
    assert_eq!(sim.world.processes[&record.uid].balloon_bytes, 8 << 20);
    // A new process hears it too, and a new seriod says it again.
    sim.kill();
    sim.world.processes.get_mut(&record.uid).unwrap().balloon_bytes = 0;
    sim.start();
    sim.settle();
    assert_eq!(sim.world.processes[&record.uid].balloon_bytes, 8 << 20);
    let vcpus = VmChange::Vcpus(2.try_into().unwrap());
    let both = [VmChange::RestartPolicy(RestartPolicy::Never), vcpus.clone()];
    assert!(matches!(update(&mut sim, &both), Err(Error::Precondition { .. })));
    assert_eq!(
        sim.vm("ardesio/web").unwrap().record.spec.restart_policy,
        RestartPolicy::Always,
        "all or nothing"
    );
    let timeout = std::time::Duration::from_secs(1);
    sim.ask(Mutation::StopVm { name: web(), force: true, timeout }).unwrap();
    update(&mut sim, &[vcpus, VmChange::Memory((64 << 20).try_into().unwrap())]).unwrap();
    sim.ask(Mutation::StartVm { name: web() }).unwrap();
    assert_eq!(sim.world.processes[&record.uid].balloon_bytes, 8 << 20);
    sim.assert_agreement();
}

#[test]
fn an_update_within_quota_and_reason() {
    let mut sim = Sim::new();
    sim.furnish();
    sim.ask(Mutation::CreateVm { name: web(), spec: spec(1), start: false }).unwrap();
    let too_many = update(&mut sim, &[VmChange::Vcpus(9.try_into().unwrap())]);
    assert!(matches!(too_many, Err(Error::Refused(_))), "{too_many:?}");
    // What it has counts: 1 + 7 are the 8 of the quota.
    update(&mut sim, &[VmChange::Vcpus(8.try_into().unwrap())]).unwrap();
    let wrong = update(&mut sim, &[VmChange::BalloonTarget(30 << 20), VmChange::Mtu(1)]);
    let Err(Error::Invalid(wrong)) = wrong else { panic!("{wrong:?}") };
    let wrong: Vec<&str> = wrong.iter().map(|w| w.field.as_str()).collect();
    assert_eq!(wrong, ["spec.balloon.target_bytes", "spec.mtu"]);
}

#[test]
fn limits_of_single_devices_reach_the_machine_at_once() {
    let mut sim = Sim::new();
    sim.furnish();
    sim.ask(Mutation::CreateVm { name: web(), spec: spec(1), start: true }).unwrap();
    let uid = sim.vm("ardesio/web").unwrap().record.uid;
    let limits = |n| IoLimits { operations_per_second: n, ..IoLimits::default() };
    let heard = |sim: &Sim| {
        let plan = &sim.world.processes[&uid].limits;
        plan.disks.iter().map(|(_, limits)| limits.operations_per_second).collect::<Vec<_>>()
    };
    assert_eq!(heard(&sim), [0]);
    let single = |limits| VmChange::DeviceLimits(vec![(LimitedDevice::Root, limits)]);
    update(&mut sim, &[VmChange::DiskLimit(LimitField::Operations, 100)]).unwrap();
    assert_eq!(heard(&sim), [100]);
    update(&mut sim, &[single(Some(limits(7)))]).unwrap();
    assert_eq!(heard(&sim), [7]);
    // A new seriod says it again: the old one may have ended between the row and the machine.
    sim.kill();
    sim.world.processes.get_mut(&uid).unwrap().limits = DevicePlan::default();
    sim.start();
    sim.settle();
    assert_eq!(heard(&sim), [7]);
    update(&mut sim, &[single(None)]).unwrap();
    assert_eq!(heard(&sim), [100]);
    let nobody = [LimitedDevice::Nic(9), LimitedDevice::Volume("no".parse().unwrap())];
    let nobody = nobody.map(|device| (device, Some(limits(1))));
    let wrong = update(&mut sim, &[VmChange::DeviceLimits(nobody.into())]);
    assert!(matches!(wrong, Err(Error::Invalid(wrong)) if wrong.len() == 2));
    assert_eq!(heard(&sim), [100]);
}
