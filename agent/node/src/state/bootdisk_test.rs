//! VMs that boot from their own disk: a reset is the end of a process, and the start of the next.

use serio_store::record::EndWord;
use serio_types::{BootFrom, BootedKernel};
use uuid::Uuid;

use super::{
    command::{Mutation, VmState},
    effect::{Effect, Input, Started},
    sim_test::{Sim, spec},
    world_test::World,
};
use crate::{error::Error, supervise::EndKind};

impl World {
    /// A machine's reset: the process of one that boots from its disk ends.
    pub(super) fn reset(&mut self, vm: Uuid) -> Result<(), Error> {
        self.failure()?;
        if self.processes.get(&vm).is_some_and(|process| process.from_disk) {
            let ended = self.end(vm, EndKind::Reset);
            self.aside.extend(ended);
        }
        Ok(())
    }
}

fn running(boot: BootFrom) -> (Sim, Uuid) {
    let mut sim = Sim::new();
    sim.furnish();
    let mut spec = spec(1);
    spec.boot = boot;
    sim.ask(Mutation::CreateVm { name: "ardesio/web".parse().unwrap(), spec, start: true }).unwrap();
    let uid = sim.vm("ardesio/web").unwrap().record.uid;
    (sim, uid)
}

fn end(sim: &mut Sim, vm: Uuid, kind: EndKind) {
    let ended = sim.world.end(vm, kind);
    sim.ready.extend(ended);
    sim.settle_without_timers();
}

#[test]
fn a_reset_boots_again_at_once_in_another_process() {
    let (mut sim, uid) = running(BootFrom::Disk);
    for round in 2..5 {
        end(&mut sim, uid, EndKind::Reset);
        let view = sim.vm("ardesio/web").unwrap();
        assert_eq!((view.state, view.pid), (VmState::Running, Some(round)));
        // Neither a failure nor a restart.
        assert_eq!((view.record.restarts, view.record.last_end), (0, None));
    }
    assert!(sim.timers.is_empty(), "no pause: {:?}", sim.timers);
    end(&mut sim, uid, EndKind::PowerOff);
    let view = sim.vm("ardesio/web").unwrap();
    assert_eq!(
        (view.state, view.record.last_end.map(|end| end.kind)),
        (VmState::Stopped, Some(EndWord::PowerOff))
    );
}

#[test]
fn a_reset_of_another_vm_ends_it_as_it_says() {
    // Its VMM boots it again by itself: one that ends by a reset meant to.
    let (mut sim, uid) = running(BootFrom::Auto);
    end(&mut sim, uid, EndKind::Reset);
    assert_eq!(sim.vm("ardesio/web").unwrap().state, VmState::Stopped);
}

#[test]
fn a_reboot_that_a_client_asks_for_looks_again_too() {
    let (mut sim, _) = running(BootFrom::Disk);
    sim.ask(Mutation::RebootVm { name: "ardesio/web".parse().unwrap() }).unwrap();
    sim.settle_without_timers();
    let view = sim.vm("ardesio/web").unwrap();
    assert_eq!((view.state, view.pid), (VmState::Running, Some(2)));
}

#[test]
fn a_reset_while_seriod_is_away_is_a_reset() {
    let (mut sim, uid) = running(BootFrom::Disk);
    sim.kill();
    sim.world.end(uid, EndKind::Reset);
    sim.start();
    sim.settle_without_timers();
    let view = sim.vm("ardesio/web").unwrap();
    assert_eq!((view.state, view.pid, view.record.restarts), (VmState::Running, Some(2), 0));
}

#[test]
fn a_disk_without_a_kernel_after_a_reset_is_a_failure_that_is_tried_again() {
    let (mut sim, uid) = running(BootFrom::Disk);
    let ended = sim.world.end(uid, EndKind::Reset).unwrap();
    sim.input(ended);
    let clean = sim.todo.pop().unwrap();
    let cleaned = sim.world.perform(clean).unwrap();
    sim.input(cleaned);
    sim.world.fail = true;
    sim.settle_without_timers();
    let view = sim.vm("ardesio/web").unwrap();
    assert_eq!(view.record.last_end.map(|end| end.kind), Some(EndWord::LaunchFailed));
    assert_eq!((view.state, sim.timers.len()), (VmState::Starting, 1), "it pauses");
    sim.settle();
    assert_eq!(sim.vm("ardesio/web").unwrap().state, VmState::Running);
}

#[test]
fn what_was_booted_is_kept_and_told() {
    let (mut sim, uid) = running(BootFrom::Disk);
    let booted = BootedKernel { path: "/boot/vmlinuz-6.1".to_owned(), ..BootedKernel::default() };
    let ended = sim.world.end(uid, EndKind::Reset).unwrap();
    sim.input(ended);
    let clean = sim.todo.pop().unwrap();
    let cleaned = sim.world.perform(clean).unwrap();
    sim.input(cleaned);
    let Some(Effect::Launch(launch)) = sim.todo.pop() else { panic!("no launch") };
    assert!(launch.from_disk && launch.cmdline.is_empty(), "{launch:?}");
    let pid = sim.world.launch(&launch);
    sim.input(Input::Launched { vm: uid, result: Ok(Started { pid, kernel: Some(booted.clone()) }) });
    assert_eq!(sim.vm("ardesio/web").unwrap().record.kernel, Some(booted.clone()));
    sim.kill();
    sim.start();
    sim.settle();
    assert_eq!(sim.vm("ardesio/web").unwrap().record.kernel, Some(booted));
}
