//! Points of VMs: made, gone on from, cloned, deleted; and broken off at every step.

use std::time::Duration;

use serio_store::record::{Made, Run};
use serio_types::{DeviceLimits, IoLimits, LimitedDevice, Name, Quota, VdcLimits, VdcName};
use uuid::Uuid;

use super::{
    command::{Answer, LimitsChange, Mutation, VmState},
    effect::{CloneOne, Device, Effect, Input, Launch, PlugResult, SaveOne, SavedSize},
    sim_test::{Sim, spec},
    world_test::World,
};
use crate::error::Error;

impl World {
    pub(super) fn plug(&mut self, vm: Uuid, device: Device) -> PlugResult {
        if let Device::Volume(volume) = device {
            self.interrupt(volume);
        }
        if let Err(error) = self.failure() {
            return PlugResult::Refused(error);
        }
        if let Device::Volume(volume) = device {
            self.assert_closed(volume);
        }
        let Some(process) = self.processes.get_mut(&vm) else { return PlugResult::Refused(Error::Ending) };
        match device {
            Device::Volume(volume) => process.volumes.push(volume),
            Device::Nic(mac) => process.nics.push(mac),
        }
        PlugResult::Done
    }

    pub(super) fn unplug(&mut self, vm: Uuid, device: Device) -> Result<(), Error> {
        self.failure()?;
        let process = self.processes.get_mut(&vm).ok_or(Error::Ending)?;
        process.volumes.retain(|has| Device::Volume(*has) != device);
        process.nics.retain(|has| Device::Nic(*has) != device);
        Ok(())
    }

    /// Effects on VMs that are running or were saved.
    pub(super) fn perform_on_vm(&mut self, effect: Effect) -> Option<Input> {
        match effect {
            Effect::Balloon { vm, target_bytes } => {
                let process = self.processes.get_mut(&vm)?;
                process.balloon_bytes = target_bytes;
                None
            }
            Effect::Limits { vm, limits } => {
                self.processes.get_mut(&vm)?.limits = limits;
                None
            }
            Effect::Plug { vm, device, .. } => {
                Some(Input::Plugged { vm, device, result: self.plug(vm, device) })
            }
            Effect::Unplug { vm, device, .. } => {
                Some(Input::Unplugged { vm, device, result: self.unplug(vm, device) })
            }
            Effect::Clean { vm } => {
                // Its watcher would tell of the end: the state does not wait for it here.
                let process = self.processes.remove(&vm);
                process.iter().flat_map(|p| p.volumes.clone()).for_each(|volume| self.interrupt(volume));
                self.run_files.remove(&vm);
                Some(Input::Cleaned { vm })
            }
            Effect::Adopt { vm } => Some(Input::Adopted { vm, found: self.adopt(vm) }),
            Effect::Order { vm, pid, order } => {
                Some(Input::Ordered { vm, order, result: self.order(vm, pid, order) })
            }
            Effect::SaveVm(save) => Some(Input::VmSaved { group: save.group, result: self.save(&save) }),
            Effect::RemoveSaved { group, .. } => {
                self.saved.remove(&group);
                None
            }
            Effect::CloneVolumes { root, clones } => {
                Some(Input::VolumeCreated { volume: root, result: self.clone_volumes(&clones) })
            }
            other => panic!("not about a VM: {other:?}"),
        }
    }

    /// Saves a VM: all of it, or only some of its volumes.
    pub(super) fn save(
        &mut self,
        SaveOne { group, vm, name, volumes, bases, .. }: &SaveOne,
    ) -> Result<SavedSize, Error> {
        let process = self.processes.contains_key(vm);
        self.failure()?;
        if !process {
            return Err(Error::Ending);
        }
        for volume in volumes {
            self.interrupt(*volume);
            self.points.entry(*volume).or_default().push(name.clone());
        }
        self.saved.insert(*group);
        // As if it had never booted again.
        let base = bases.iter().max().copied();
        Ok(SavedSize { memory_bytes: 1, paused_ns: 1, base })
    }

    /// Makes the volumes of a clone, all or none.
    pub(super) fn clone_volumes(&mut self, clones: &[CloneOne]) -> Result<(), Error> {
        self.failure()?;
        for one in clones {
            let known = self.points.get(&one.source).is_some_and(|points| points.contains(&one.point));
            assert!(known, "a clone of a point that is not there");
            self.interrupt(one.source);
            self.make(one.volume, one.size_bytes);
        }
        Ok(())
    }

    /// What a launch does before its VMM starts.
    pub(super) fn go_back(&mut self, launch: &Launch) {
        let Some(from) = &launch.restore else { return };
        let mut needed = std::iter::once(&from.group).chain(&from.bases);
        assert!(needed.all(|group| self.saved.contains(group)), "a VM goes on from what was not saved");
        for (volume, point) in &from.rollback {
            let points = self.points.entry(*volume).or_default();
            let at = points.iter().position(|p| p == point).expect("the point is there");
            points.truncate(at + 1);
        }
    }
}

fn web() -> VdcName {
    "ardesio/web".parse().unwrap()
}

fn before() -> Name {
    "before".parse().unwrap()
}

fn snapshot() -> Mutation {
    Mutation::SnapshotVm { name: web(), point: before() }
}

fn stop() -> Mutation {
    Mutation::StopVm { name: web(), force: true, timeout: Duration::from_secs(1) }
}

fn restore(discard_later: bool) -> Mutation {
    Mutation::RestoreVm { name: web(), point: before(), discard_later }
}

fn clone() -> Mutation {
    Mutation::CloneVm { name: web(), point: before(), clone: "copy".parse().unwrap() }
}

/// A VM with a volume beside its root.
fn running() -> Sim {
    let mut sim = Sim::new();
    sim.furnish();
    let data: VdcName = "ardesio/data".parse().unwrap();
    sim.ask(Mutation::CreateVolume { name: data, size: Some((1 << 20).try_into().unwrap()), image: None })
        .unwrap();
    let mut spec = spec(1);
    spec.volumes.push("data".parse().unwrap());
    let limits = IoLimits { operations_per_second: 9, ..IoLimits::default() };
    let device = LimitedDevice::Volume("data".parse().unwrap());
    spec.machine.device_limits = vec![DeviceLimits { device, limits }];
    sim.ask(Mutation::CreateVm { name: web(), spec, start: true }).unwrap();
    sim
}

#[test]
fn a_vm_goes_back_to_its_point_and_on_from_there() {
    let mut sim = running();
    let made = sim.ask(snapshot()).unwrap();
    let Answer::VdcSnapshot(view) = made else { panic!("{made:?}") };
    assert_eq!((view.resource.as_str(), view.parts.len()), ("vdcs/ardesio/vms/web/snapshots/before", 2));
    assert_eq!(view.record.saved.as_ref().unwrap().memory_bytes, 1);
    assert!(matches!(sim.ask(snapshot()), Err(Error::Exists { .. })));
    assert!(matches!(sim.ask(restore(false)), Err(Error::Precondition { .. })), "it runs");
    let later = Mutation::SnapshotVm { name: web(), point: "later".parse().unwrap() };
    sim.ask(later).unwrap();
    sim.ask(stop()).unwrap();
    assert!(matches!(sim.ask(restore(false)), Err(Error::Precondition { .. })), "a later one would be lost");
    let answer = sim.ask(restore(true)).unwrap();
    assert!(matches!(answer, Answer::Vm(view) if view.state == VmState::Running));
    sim.settle();
    sim.assert_agreement();
    let saved: Vec<String> =
        sim.state().model().vdc_snapshots.values().map(|group| group.name.to_string()).collect();
    assert_eq!((saved, sim.world.saved.len()), (vec!["before".to_owned()], 1), "the later one went");
    sim.ask(Mutation::DeleteVmSnapshot { name: web(), point: before() }).unwrap();
    sim.settle();
    assert!(sim.world.saved.is_empty() && sim.state().model().vdc_snapshots.is_empty());
    sim.assert_agreement();
}

#[test]
fn clones_go_on_beside_it_with_volumes_of_their_own() {
    let mut sim = running();
    sim.ask(snapshot()).unwrap();
    sim.ask(clone()).unwrap();
    let (old, new) = (sim.vm("ardesio/web").unwrap(), sim.vm("ardesio/copy").unwrap());
    assert_eq!(new.state, VmState::Running);
    assert_eq!(new.record.restore, None);
    assert_ne!(old.record.spec.nics[0].mac, new.record.spec.nics[0].mac);
    assert_eq!(new.root_volume.unwrap().to_string(), "ardesio/copy-root");
    assert_eq!(new.record.spec.volumes[0].as_str(), "copy-data");
    let limited = &new.record.spec.machine.device_limits[0].device;
    assert_eq!(*limited, LimitedDevice::Volume("copy-data".parse().unwrap()));
    assert!(matches!(sim.ask(clone()), Err(Error::Exists { .. })));
    sim.assert_agreement();
    // With the VM go its points.
    sim.ask(Mutation::DeleteVm { name: web(), keep_root_volume: false, force: true }).unwrap();
    sim.settle();
    assert!(sim.world.saved.is_empty() && sim.state().model().vdc_snapshots.is_empty());
    assert_eq!(sim.vm("ardesio/copy").unwrap().state, VmState::Running);
    sim.assert_agreement();
}

/// Each of its volumes has a part.
#[test]
fn its_points_are_within_the_quota_of_snapshots() {
    let mut sim = running();
    let quota = Quota { vcpus: 100, memory_bytes: 1 << 41, storage_bytes: 1 << 30 };
    let update = |sim: &mut Sim, snapshots| {
        let limits =
            LimitsChange { limits: VdcLimits { snapshots, ..VdcLimits::default() }, keep_share: true };
        let name = web().vdc;
        sim.ask(Mutation::UpdateVdc { name, quota, limits, expected_generation: 0 }).unwrap();
    };
    update(&mut sim, 1);
    let refused = crate::error::chain(&sim.ask(snapshot()).unwrap_err());
    assert!(refused.contains("snapshots: 2 asked, 1 available"), "{refused}");
    update(&mut sim, 2);
    sim.ask(snapshot()).unwrap();
}

#[test]
fn while_it_is_saved_nothing_else_is_asked_of_it() {
    let mut sim = running();
    let mut save = sim.send(snapshot(), None);
    for other in [
        Mutation::PauseVm { name: web() },
        Mutation::RebootVm { name: web() },
        Mutation::StopVm { name: web(), force: false, timeout: Duration::from_secs(1) },
        Mutation::SnapshotVm { name: web(), point: "two".parse().unwrap() },
    ] {
        let (reply, mut answer) = tokio::sync::oneshot::channel();
        sim.input(Input::Command(super::command::Command::Mutate(other, None), reply));
        assert!(matches!(answer.try_recv().unwrap(), Err(Error::Busy { .. })));
    }
    sim.settle();
    assert!(save.try_recv().unwrap().is_ok());
    sim.ask(Mutation::PauseVm { name: web() }).unwrap();
}

#[test]
fn what_fails_leaves_nothing() {
    let mut sim = running();
    sim.world.fail = true;
    assert!(sim.ask(snapshot()).is_err());
    sim.settle();
    assert!(sim.state().model().vdc_snapshots.is_empty());
    sim.assert_agreement();
    sim.ask(snapshot()).unwrap();
    let volumes = sim.world.volumes.len();
    sim.world.fail = true;
    assert!(sim.ask(clone()).is_err());
    sim.settle();
    assert!(sim.vm("ardesio/copy").is_none());
    assert_eq!(sim.world.volumes.len(), volumes);
    sim.assert_agreement();
    // Made, and then not started.
    let mut cloned = sim.send(clone(), None);
    let effect = sim.todo.pop().unwrap();
    let input = sim.world.perform(effect).unwrap();
    sim.input(input);
    sim.world.fail = true;
    sim.settle();
    assert!(cloned.try_recv().unwrap().is_err());
    assert_eq!(sim.world.volumes.len(), volumes);
    sim.assert_agreement();
}

/// Does so many effects of a mutation, dies, and lets the next seriod come to rest.
fn broken_off(sim: &mut Sim, mutation: Mutation, steps: usize) {
    let _waiting = sim.send(mutation, None);
    for _ in 0..steps {
        if let Some(effect) = sim.todo.pop() {
            let input = sim.world.perform(effect);
            sim.ready.extend(input);
        }
        if !sim.ready.is_empty() {
            let input = sim.ready.remove(0);
            sim.input(input);
        }
    }
    // The next effect is done, and nobody hears of it.
    if let Some(effect) = sim.todo.pop() {
        sim.world.perform(effect);
    }
    sim.kill();
    sim.start();
    sim.settle();
    sim.assert_agreement();
}

#[test]
fn a_death_of_seriod_at_any_step_leaves_a_whole_or_nothing() {
    for steps in 0..5 {
        let mut sim = running();
        broken_off(&mut sim, snapshot(), steps);
        let model = sim.state().model();
        assert!(model.vdc_snapshots.values().all(|group| group.state == Made::Ready));
        assert_eq!(model.vdc_snapshots.len(), sim.world.saved.len(), "step {steps}");
        let mut sim = running();
        sim.ask(snapshot()).unwrap();
        broken_off(&mut sim, clone(), steps);
        if let Some(copy) = sim.vm("ardesio/copy") {
            assert_eq!((copy.state, copy.record.restore), (VmState::Running, None), "step {steps}");
        } else {
            assert_eq!(sim.world.volumes.len(), 2, "step {steps}");
        }
        sim.ask(stop()).unwrap();
        broken_off(&mut sim, restore(false), steps);
        let vm = sim.vm("ardesio/web").unwrap();
        assert_eq!((vm.state, vm.record.run, vm.record.restore), (VmState::Running, Run::Running, None));
        broken_off(&mut sim, Mutation::DeleteVmSnapshot { name: web(), point: before() }, steps);
        assert!(sim.world.saved.is_empty() && sim.state().model().vdc_snapshots.is_empty(), "step {steps}");
    }
}

fn named(name: &str) -> Mutation {
    Mutation::SnapshotVm { name: web(), point: name.parse().unwrap() }
}

fn delete(name: &str) -> Mutation {
    Mutation::DeleteVmSnapshot { name: web(), point: name.parse().unwrap() }
}

/// What a VM's next snapshot goes on from stays until nobody needs it; not all follow one another for ever.
#[test]
fn what_a_point_goes_on_from_is_kept_for_it() {
    let mut sim = running();
    for at in 0..11 {
        sim.ask(named(&format!("s{at:02}"))).unwrap();
    }
    let lengths = |sim: &Sim| -> Vec<usize> {
        let all = sim.state().model().vdc_snapshots.values();
        all.map(|r| r.saved.as_ref().unwrap().bases.len()).collect()
    };
    assert_eq!(lengths(&sim), [0, 1, 2, 3, 4, 5, 6, 7, 8, 8, 8], "the last ones go on from the eighth");
    for at in (0..7).chain([9, 10]) {
        sim.ask(delete(&format!("s{at:02}"))).unwrap();
        sim.settle();
    }
    assert_eq!(sim.state().model().vdc_snapshots.len(), 2);
    assert_eq!(sim.world.saved.len(), 9, "two that can be restored, and what they need");
    sim.ask(stop()).unwrap();
    let back = Mutation::RestoreVm { name: web(), point: "s08".parse().unwrap(), discard_later: true };
    sim.ask(back).unwrap();
    sim.kill();
    sim.start();
    sim.settle();
    sim.ask(delete("s07")).unwrap();
    sim.settle();
    assert_eq!(sim.world.saved.len(), 9);
    broken_off(&mut sim, delete("s08"), 2);
    assert!(sim.world.saved.is_empty() && sim.state().model().vdc_snapshots.is_empty());
    sim.assert_agreement();
}

/// The snapshot that is being made may go on from it.
#[test]
fn while_a_vm_is_saved_none_of_its_points_is_deleted() {
    let mut sim = running();
    sim.ask(named("one")).unwrap();
    let mut save = sim.send(named("two"), None);
    assert!(matches!(sim.ask(delete("one")), Err(Error::Busy { .. })));
    sim.settle();
    assert!(save.try_recv().unwrap().is_ok());
    sim.ask(delete("one")).unwrap();
    sim.settle();
    assert_eq!(sim.world.saved.len(), 2);
}
