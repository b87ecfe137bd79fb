//! Pause and resume, as clients see them, and what a new seriod makes of a paused VM.

use std::time::Duration;

use serio_store::record::Run;
use serio_types::VdcName;
use uuid::Uuid;

use super::{
    command::{Answer, Mutation, VmState},
    effect::{Effect, Input},
    sim_test::{Sim, spec},
    vm_orders::Order,
    world_test::World,
};
use crate::{error::Error, supervise::EndKind};

impl World {
    /// Tells a process.
    pub(super) fn order(&mut self, vm: Uuid, pid: u32, order: Order) -> Result<(), Error> {
        if order == Order::Reset {
            return self.reset(vm);
        }
        self.failure()?;
        let process = self.processes.get_mut(&vm).filter(|p| p.pid == pid).ok_or(Error::Ending)?;
        process.paused = order == Order::Pause;
        Ok(())
    }
}

fn web() -> VdcName {
    "ardesio/web".parse().unwrap()
}

fn running() -> Sim {
    let mut sim = Sim::new();
    sim.furnish();
    sim.ask(Mutation::CreateVm { name: web(), spec: spec(1), start: true }).unwrap();
    sim
}

fn state(sim: &mut Sim) -> VmState {
    sim.vm("ardesio/web").unwrap().state
}

fn stands_still(sim: &Sim) -> bool {
    sim.world.processes.values().next().unwrap().paused
}

#[test]
fn a_paused_vm_stands_still_until_it_is_resumed() {
    let mut sim = running();
    let generation = sim.vm("ardesio/web").unwrap().record.generation;
    assert!(matches!(sim.ask(Mutation::ResumeVm { name: web() }), Err(Error::Precondition { .. })));
    let paused = sim.ask(Mutation::PauseVm { name: web() }).unwrap();
    assert!(matches!(&paused, Answer::Vm(view) if view.state == VmState::Paused && view.pid == Some(1)));
    assert!(matches!(&paused, Answer::Vm(view) if view.record.generation > generation));
    assert!(stands_still(&sim));
    for refused in [
        Mutation::PauseVm { name: web() },
        Mutation::StartVm { name: web() },
        // It could not hear them.
        Mutation::RebootVm { name: web() },
        Mutation::StopVm { name: web(), force: false, timeout: Duration::from_secs(1) },
    ] {
        assert!(matches!(sim.ask(refused), Err(Error::Precondition { .. })));
    }
    sim.ask(Mutation::ResumeVm { name: web() }).unwrap();
    assert_eq!((state(&mut sim), stands_still(&sim)), (VmState::Running, false));
    sim.ask(Mutation::PauseVm { name: web() }).unwrap();
    sim.ask(Mutation::StopVm { name: web(), force: true, timeout: Duration::from_secs(1) }).unwrap();
    assert_eq!(state(&mut sim), VmState::Stopped);
    sim.assert_agreement();
}

#[test]
fn a_new_seriod_makes_true_what_the_row_says() {
    let mut sim = running();
    // Died after the row, before the VMM heard of it.
    let _lost = sim.send(Mutation::PauseVm { name: web() }, None);
    sim.kill();
    sim.start();
    sim.settle();
    assert_eq!((state(&mut sim), stands_still(&sim)), (VmState::Paused, true));
    // Taken over as it is.
    sim.kill();
    sim.start();
    assert_eq!(state(&mut sim), VmState::Paused, "while it is looked for");
    sim.settle();
    assert_eq!((state(&mut sim), stands_still(&sim)), (VmState::Paused, true));
    // Died after the VMM heard, before the row.
    let _lost = sim.send(Mutation::ResumeVm { name: web() }, None);
    let effect = sim.todo.pop().unwrap();
    sim.world.perform(effect);
    assert!(!stands_still(&sim));
    sim.kill();
    sim.start();
    sim.settle();
    assert_eq!((state(&mut sim), stands_still(&sim)), (VmState::Paused, true), "nobody was told otherwise");
    // One that stands still and should not, as after work that was broken off.
    sim.ask(Mutation::ResumeVm { name: web() }).unwrap();
    sim.world.processes.values_mut().for_each(|p| p.paused = true);
    sim.kill();
    sim.start();
    sim.settle();
    assert_eq!((state(&mut sim), stands_still(&sim)), (VmState::Running, false));
}

#[test]
fn a_pause_that_fails_is_taken_back() {
    let mut sim = running();
    sim.world.fail = true;
    assert!(matches!(sim.ask(Mutation::PauseVm { name: web() }), Err(Error::Failed { .. })));
    assert_eq!((state(&mut sim), stands_still(&sim)), (VmState::Running, false));
    sim.ask(Mutation::PauseVm { name: web() }).unwrap();
    sim.world.fail = true;
    assert!(sim.ask(Mutation::ResumeVm { name: web() }).is_err());
    assert_eq!(state(&mut sim), VmState::Paused);
}

#[test]
fn an_order_to_a_process_that_ended_changes_nothing() {
    let mut sim = running();
    let mut pause = sim.send(Mutation::PauseVm { name: web() }, None);
    let Some(Effect::Order { vm, pid, order: Order::Pause }) = sim.todo.pop() else { panic!("no order") };
    assert!(matches!(sim.ask(Mutation::RebootVm { name: web() }), Err(Error::Busy { .. })));
    // It dies, and its policy starts it again before the word comes.
    let ended = sim.world.end(vm, EndKind::Died);
    sim.ready.extend(ended);
    sim.settle();
    assert_ne!(sim.vm("ardesio/web").unwrap().pid, Some(pid));
    sim.input(Input::Ordered { vm, order: Order::Pause, result: Ok(()) });
    assert!(pause.try_recv().unwrap().is_err());
    let view = sim.vm("ardesio/web").unwrap();
    assert_eq!((view.state, view.record.run), (VmState::Running, Run::Running));
    sim.assert_agreement();
}
