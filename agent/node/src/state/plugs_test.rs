//! Volumes that come to a VM and leave it: rows and machine agree, whatever fails and whenever seriod ends.

use std::time::Duration;

use serio_types::{IoLimits, LimitedDevice, MacAddr, NicSpec, VdcName, VolumeSize};
use uuid::Uuid;

use super::{
    command::{Mutation, Request},
    sim_test::{Sim, spec},
};
use crate::error::Error;

fn name(text: &str) -> VdcName {
    text.parse().unwrap()
}

fn attach(sim: &mut Sim, volume: &str) -> Result<(), Error> {
    sim.ask(Mutation::AttachVolume { name: name("ardesio/web"), volume: name(volume) }).map(drop)
}

fn detach(sim: &mut Sim, volume: &str) -> Result<(), Error> {
    let wait = Duration::from_secs(1);
    sim.ask(Mutation::DetachVolume { name: name("ardesio/web"), volume: name(volume), wait }).map(drop)
}

/// A vdc with a VM and a volume; the VM's id.
fn begin(start: bool) -> (Sim, Uuid) {
    let mut sim = Sim::new();
    sim.furnish();
    sim.ask(Mutation::CreateVm { name: name("ardesio/web"), spec: spec(1), start }).unwrap();
    let size = Some(VolumeSize::try_from(64 << 20).unwrap());
    sim.ask(Mutation::CreateVolume { name: name("ardesio/data"), size, image: None }).unwrap();
    let uid = sim.vm("ardesio/web").unwrap().record.uid;
    (sim, uid)
}

fn disks(sim: &Sim, vm: Uuid) -> usize {
    sim.world.processes[&vm].volumes.len()
}

fn volumes(sim: &mut Sim) -> Vec<String> {
    let record = sim.vm("ardesio/web").unwrap().record;
    record.spec.volumes.iter().map(ToString::to_string).collect()
}

#[test]
fn a_running_vm_gets_a_volume_keeps_it_and_gives_it_back() {
    let (mut sim, vm) = begin(true);
    let generation = sim.vm("ardesio/web").unwrap().record.generation;
    attach(&mut sim, "ardesio/data").unwrap();
    assert_eq!((disks(&sim, vm), volumes(&mut sim)), (2, vec!["data".to_owned()]));
    assert!(sim.vm("ardesio/web").unwrap().record.generation > generation);
    assert!(matches!(attach(&mut sim, "ardesio/data"), Err(Error::Precondition { .. })), "it has it");
    // Over a new seriod, and over a stop and a start.
    sim.kill();
    sim.start();
    sim.settle();
    assert_eq!(disks(&sim, vm), 2);
    let timeout = Duration::from_secs(1);
    sim.ask(Mutation::StopVm { name: name("ardesio/web"), force: true, timeout }).unwrap();
    sim.ask(Mutation::StartVm { name: name("ardesio/web") }).unwrap();
    assert_eq!(disks(&sim, vm), 2);
    // A guest that does not let go keeps it.
    sim.world.fail = true;
    assert!(detach(&mut sim, "ardesio/data").is_err());
    assert_eq!((disks(&sim, vm), volumes(&mut sim)), (2, vec!["data".to_owned()]));
    detach(&mut sim, "ardesio/data").unwrap();
    assert_eq!((disks(&sim, vm), volumes(&mut sim)), (1, Vec::new()));
    sim.ask(Mutation::DeleteVolume { name: name("ardesio/data") }).unwrap();
    sim.assert_agreement();
}

#[test]
fn what_is_refused_leaves_everything_as_it_was() {
    let (mut sim, vm) = begin(true);
    sim.world.fail = true;
    assert!(attach(&mut sim, "ardesio/data").is_err());
    assert_eq!((disks(&sim, vm), volumes(&mut sim)), (1, Vec::new()));
    assert!(matches!(detach(&mut sim, "ardesio/web-root"), Err(Error::Precondition { .. })), "its root");
    assert!(matches!(detach(&mut sim, "ardesio/data"), Err(Error::Precondition { .. })), "not its");
    assert!(matches!(attach(&mut sim, "ardesio/none"), Err(Error::NotFound { .. })));
    assert!(matches!(attach(&mut sim, "other/data"), Err(Error::Invalid(_))), "of another vdc");
    sim.ask(Mutation::PauseVm { name: name("ardesio/web") }).unwrap();
    assert!(matches!(attach(&mut sim, "ardesio/data"), Err(Error::Precondition { .. })), "paused");
    sim.ask(Mutation::ResumeVm { name: name("ardesio/web") }).unwrap();
    attach(&mut sim, "ardesio/data").unwrap();
    sim.assert_agreement();
}

#[test]
fn a_stopped_vm_starts_with_what_came() {
    let (mut sim, vm) = begin(false);
    attach(&mut sim, "ardesio/data").unwrap();
    sim.ask(Mutation::StartVm { name: name("ardesio/web") }).unwrap();
    assert_eq!(disks(&sim, vm), 2);
    let timeout = Duration::from_secs(1);
    sim.ask(Mutation::StopVm { name: name("ardesio/web"), force: true, timeout }).unwrap();
    detach(&mut sim, "ardesio/data").unwrap();
    sim.ask(Mutation::StartVm { name: name("ardesio/web") }).unwrap();
    assert_eq!(disks(&sim, vm), 1);
    sim.assert_agreement();
}

#[test]
fn a_new_seriod_gives_the_volume_that_an_earlier_one_had_promised() {
    let (mut sim, vm) = begin(true);
    attach(&mut sim, "ardesio/data").unwrap();
    // As if it had ended between the row and the machine.
    sim.kill();
    sim.world.processes.get_mut(&vm).unwrap().volumes.truncate(1);
    sim.start();
    sim.settle();
    assert_eq!((disks(&sim, vm), volumes(&mut sim)), (2, vec!["data".to_owned()]));
    sim.assert_agreement();
}

fn cards(sim: &mut Sim) -> Vec<MacAddr> {
    sim.vm("ardesio/web").unwrap().record.spec.nics.iter().filter_map(|nic| nic.mac).collect()
}

#[test]
fn a_card_comes_stays_and_goes_and_those_behind_it_keep_their_limits() {
    let (mut sim, vm) = begin(true);
    let add = |sim: &mut Sim, mac| {
        let nic = NicSpec { mac, ..NicSpec::default() };
        sim.ask(Mutation::AttachNic { name: name("ardesio/web"), nic }).map(drop)
    };
    let remove = |sim: &mut Sim, mac| {
        let wait = Duration::from_secs(1);
        sim.ask(Mutation::DetachNic { name: name("ardesio/web"), mac, wait }).map(drop)
    };
    let third = MacAddr::local([9; 5]);
    add(&mut sim, None).unwrap();
    add(&mut sim, Some(third)).unwrap();
    let all = cards(&mut sim);
    assert_eq!((all.len(), all.last()), (3, Some(&third)));
    assert_eq!(sim.world.processes[&vm].nics, all);
    assert!(matches!(add(&mut sim, Some(third)), Err(Error::Invalid(_))), "a card has that address");
    let limits = IoLimits { operations_per_second: 7, ..IoLimits::default() };
    let of_third = vec![(LimitedDevice::Nic(2), Some(limits))];
    let changes = vec![super::update::VmChange::DeviceLimits(of_third)];
    sim.ask(Mutation::UpdateVm { name: name("ardesio/web"), changes }).unwrap();

    // Refused by the guest: as before. Then gone.
    sim.world.fail = true;
    assert!(remove(&mut sim, all[1]).is_err());
    assert_eq!((cards(&mut sim), &sim.world.processes[&vm].nics), (all.clone(), &all));
    remove(&mut sim, all[1]).unwrap();
    assert!(matches!(remove(&mut sim, all[1]), Err(Error::Precondition { .. })), "it has no such card");
    assert_eq!(cards(&mut sim), [all[0], third]);
    let spec = sim.vm("ardesio/web").unwrap().record.spec;
    assert_eq!(*spec.machine.limits_of(&LimitedDevice::Nic(1)), limits);

    // An earlier seriod ended between the row and the machine; then the VM starts anew.
    sim.kill();
    sim.world.processes.get_mut(&vm).unwrap().nics.truncate(1);
    sim.start();
    sim.settle();
    assert_eq!(sim.world.processes[&vm].nics, [all[0], third]);
    let timeout = Duration::from_secs(1);
    sim.ask(Mutation::StopVm { name: name("ardesio/web"), force: true, timeout }).unwrap();
    remove(&mut sim, all[0]).unwrap();
    sim.ask(Mutation::StartVm { name: name("ardesio/web") }).unwrap();
    assert_eq!(sim.world.processes[&vm].nics, [third]);
    sim.assert_agreement();
}

#[test]
fn a_copy_has_the_volumes_that_its_snapshot_had() {
    let (mut sim, _) = begin(true);
    attach(&mut sim, "ardesio/data").unwrap();
    let point: serio_types::Name = "before".parse().unwrap();
    sim.ask(Mutation::SnapshotVm { name: name("ardesio/web"), point: point.clone() }).unwrap();
    detach(&mut sim, "ardesio/data").unwrap();
    let clone = "copy".parse().unwrap();
    sim.ask(Mutation::CloneVm { name: name("ardesio/web"), point, clone }).unwrap();
    let copy = sim.vm("ardesio/copy").unwrap().record;
    assert_eq!(sim.world.processes[&copy.uid].volumes.len(), 2);
    assert_eq!(copy.spec.volumes, ["copy-data".parse().unwrap()]);
    sim.assert_agreement();
}

#[test]
fn the_same_request_is_done_once() {
    let (mut sim, vm) = begin(true);
    let request = |method| Request { id: Uuid::now_v7(), method, digest: "d".to_owned() };
    let (once, back) = (request("AttachVolume"), request("DetachVolume"));
    let volume = || name("ardesio/data");
    for _ in 0..2 {
        let attach = Mutation::AttachVolume { name: name("ardesio/web"), volume: volume() };
        let mut waiting = sim.send(attach, Some(once.clone()));
        sim.settle();
        assert!(matches!(waiting.try_recv(), Ok(Ok(_))), "attached, and so it is when asked again");
    }
    assert_eq!(disks(&sim, vm), 2);
    for _ in 0..2 {
        let wait = Duration::from_secs(1);
        let detach = Mutation::DetachVolume { name: name("ardesio/web"), volume: volume(), wait };
        let mut waiting = sim.send(detach, Some(back.clone()));
        sim.settle();
        assert!(matches!(waiting.try_recv(), Ok(Ok(_))), "detached, and so it is when asked again");
    }
    assert_eq!(disks(&sim, vm), 1);
}
