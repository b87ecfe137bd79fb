//! What clients see: the ordinary course of things, refusals, and ends that nobody asked for.

use std::time::Duration;

use serio_types::{Quota, RestartPolicy, SnapshotName, VdcLimits, VdcName};

use super::{
    command::{Answer, LimitsChange, Mutation, VmState},
    effect::Timer,
    sim_test::{Sim, spec},
};
use crate::{error::Error, supervise::EndKind};

const MINUTE: Duration = Duration::from_secs(60);

fn web() -> VdcName {
    "ardesio/web".parse().unwrap()
}

fn running() -> Sim {
    let mut sim = Sim::new();
    sim.furnish();
    sim.ask(Mutation::CreateVm { name: web(), spec: spec(1), start: true }).unwrap();
    sim
}

#[test]
fn a_vm_is_made_stopped_started_and_deleted() {
    let mut sim = running();
    let view = sim.vm("ardesio/web").unwrap();
    assert_eq!((view.state, view.pid), (VmState::Running, Some(1)));
    assert_eq!(view.root_volume.unwrap().to_string(), "ardesio/web-root");
    assert!(view.record.spec.nics[0].mac.is_some(), "an address was chosen");
    assert!(matches!(sim.ask(Mutation::StartVm { name: web() }), Err(Error::Precondition { .. })));
    sim.ask(Mutation::StopVm { name: web(), force: true, timeout: MINUTE }).unwrap();
    let view = sim.vm("ardesio/web").unwrap();
    assert_eq!((view.state, view.pid), (VmState::Stopped, None));
    assert_eq!(view.record.last_end.unwrap().kind.as_str(), "stopped");
    assert!(matches!(
        sim.ask(Mutation::StopVm { name: web(), force: true, timeout: MINUTE }),
        Err(Error::Precondition { .. })
    ));
    sim.ask(Mutation::StartVm { name: web() }).unwrap();
    assert!(matches!(
        sim.ask(Mutation::DeleteVm { name: web(), keep_root_volume: false, force: false }),
        Err(Error::Precondition { .. })
    ));
    sim.ask(Mutation::DeleteVm { name: web(), keep_root_volume: false, force: true }).unwrap();
    assert!(sim.vm("ardesio/web").is_none());
    sim.assert_agreement();
    sim.ask(Mutation::DeleteVdc { name: "ardesio".parse().unwrap() }).unwrap();
}

#[test]
fn the_guest_has_its_time_to_power_off() {
    let mut sim = running();
    let mut stop = sim.send(Mutation::StopVm { name: web(), force: false, timeout: MINUTE }, None);
    sim.settle_without_timers();
    assert!(stop.try_recv().is_err(), "it waits for the guest");
    assert_eq!(sim.vm("ardesio/web").unwrap().state, VmState::Stopping);
    let uid = sim.vm("ardesio/web").unwrap().record.uid;
    let ended = sim.world.end(uid, EndKind::PowerOff);
    sim.ready.extend(ended);
    sim.settle_without_timers();
    assert!(matches!(stop.try_recv().unwrap(), Ok(Answer::Vm(view)) if view.state == VmState::Stopped));
}

#[test]
fn a_guest_that_does_not_heed_the_button_runs_on_until_forced() {
    let mut sim = running();
    let mut stop = sim.send(Mutation::StopVm { name: web(), force: false, timeout: MINUTE }, None);
    sim.settle();
    assert!(matches!(stop.try_recv().unwrap(), Err(Error::Deadline { .. })));
    assert_eq!(sim.vm("ardesio/web").unwrap().state, VmState::Running);
    // Force overtakes a button.
    let mut stop = sim.send(Mutation::StopVm { name: web(), force: false, timeout: MINUTE }, None);
    let mut forced = sim.send(Mutation::StopVm { name: web(), force: true, timeout: MINUTE }, None);
    sim.settle_without_timers();
    assert!(stop.try_recv().unwrap().is_ok() && forced.try_recv().unwrap().is_ok());
    sim.settle();
    sim.assert_agreement();
}

#[test]
fn a_failed_creation_leaves_nothing() {
    let mut sim = Sim::new();
    sim.furnish();
    for skip in 0..2 {
        let mut create = sim.send(Mutation::CreateVm { name: web(), spec: spec(1), start: true }, None);
        // The volume fails, or the launch.
        for step in 0..=skip {
            sim.world.fail = step == skip;
            let effect = sim.todo.pop().unwrap();
            let input = sim.world.perform(effect);
            sim.ready.extend(input);
            let input = sim.ready.pop().unwrap();
            sim.input(input);
        }
        sim.settle();
        assert!(matches!(create.try_recv().unwrap(), Err(Error::Failed { .. })));
        assert!(sim.vm("ardesio/web").is_none() && sim.world.volumes.is_empty());
        sim.assert_agreement();
    }
}

#[test]
fn a_given_root_outlives_a_creation_that_failed() {
    let mut sim = Sim::new();
    sim.furnish();
    let disk: VdcName = "ardesio/disk".parse().unwrap();
    let size = Some((1 << 20).try_into().unwrap());
    sim.ask(Mutation::CreateVolume { name: disk.clone(), size, image: None }).unwrap();
    let on = |start| Mutation::CreateVmOn { name: web(), spec: spec(1), root: disk.clone(), start };
    let mut create = sim.send(on(true), None);
    sim.world.fail = true;
    let launch = sim.todo.pop().unwrap();
    let failed = sim.world.perform(launch);
    sim.ready.extend(failed);
    sim.world.fail = false;
    sim.settle();
    assert!(matches!(create.try_recv().unwrap(), Err(Error::Failed { .. })));
    assert!(sim.vm("ardesio/web").is_none());
    assert_eq!(sim.world.volumes.len(), 1, "the volume is there");
    sim.assert_agreement();

    sim.ask(on(true)).unwrap();
    let view = sim.vm("ardesio/web").unwrap();
    assert_eq!((view.state, view.root_volume.unwrap()), (VmState::Running, disk.clone()));
    let second = Mutation::CreateVmOn {
        name: "ardesio/b".parse().unwrap(),
        spec: spec(1),
        root: disk.clone(),
        start: false,
    };
    assert!(matches!(sim.ask(second), Err(Error::Precondition { .. })), "a volume has one VM");
    sim.ask(Mutation::DeleteVm { name: web(), keep_root_volume: true, force: true }).unwrap();
    sim.ask(on(false)).unwrap();
    assert_eq!(sim.vm("ardesio/web").unwrap().state, VmState::Stopped);
    sim.ask(Mutation::StartVm { name: web() }).unwrap();
    sim.ask(Mutation::DeleteVm { name: web(), keep_root_volume: false, force: true }).unwrap();
    assert!(sim.world.volumes.is_empty());
    sim.assert_agreement();
}

#[test]
fn a_vm_that_breaks_is_started_again_with_growing_pauses() {
    let mut sim = running();
    let uid = sim.vm("ardesio/web").unwrap().record.uid;
    for round in 1..=3 {
        let ended = sim.world.end(uid, EndKind::GuestError);
        sim.ready.extend(ended);
        sim.settle_without_timers();
        let view = sim.vm("ardesio/web").unwrap();
        assert_eq!((view.state, view.record.restarts), (VmState::Starting, round));
        assert!(matches!(sim.timers.last(), Some(Timer::Restart { .. })));
        sim.settle();
        assert_eq!(sim.vm("ardesio/web").unwrap().state, VmState::Running);
    }
    // A clean power-off is no failure.
    let ended = sim.world.end(uid, EndKind::PowerOff);
    sim.ready.extend(ended);
    sim.settle();
    assert_eq!(sim.vm("ardesio/web").unwrap().state, VmState::Stopped);
}

#[test]
fn policies() {
    for (policy, kind, state) in [
        (RestartPolicy::Never, EndKind::Died, VmState::Failed),
        (RestartPolicy::Never, EndKind::PowerOff, VmState::Stopped),
        (RestartPolicy::OnFailure, EndKind::HostError, VmState::Running),
        (RestartPolicy::Always, EndKind::PowerOff, VmState::Running),
    ] {
        let mut sim = Sim::new();
        sim.furnish();
        let mut spec = spec(1);
        spec.restart_policy = policy;
        sim.ask(Mutation::CreateVm { name: web(), spec, start: true }).unwrap();
        let uid = sim.vm("ardesio/web").unwrap().record.uid;
        let ended = sim.world.end(uid, kind);
        sim.ready.extend(ended);
        sim.settle();
        assert_eq!(sim.vm("ardesio/web").unwrap().state, state, "{policy:?} {kind:?}");
    }
}

#[test]
fn a_stop_ends_the_pause_before_a_restart() {
    let mut sim = running();
    let uid = sim.vm("ardesio/web").unwrap().record.uid;
    let ended = sim.world.end(uid, EndKind::Died);
    sim.ready.extend(ended);
    sim.settle_without_timers();
    sim.ask(Mutation::StopVm { name: web(), force: false, timeout: MINUTE }).unwrap();
    sim.settle();
    assert_eq!(sim.vm("ardesio/web").unwrap().state, VmState::Failed);
    sim.assert_agreement();
}

#[test]
fn quotas_refuse_and_name_what_is_short() {
    let mut sim = running();
    let other = || "ardesio/other".parse().unwrap();
    let refused = sim.ask(Mutation::CreateVm { name: other(), spec: spec(8), start: true }).unwrap_err();
    assert!(
        refused.to_string().starts_with("vcpus: 8 asked, 7 available: the quota of vdc ardesio is 8"),
        "{refused}"
    );
    let mut big = spec(1);
    big.memory = (1 << 40).try_into().unwrap();
    let quota = Quota { vcpus: 100, memory_bytes: 1 << 41, storage_bytes: 1 << 30 };
    let update = Mutation::UpdateVdc {
        name: "ardesio".parse().unwrap(),
        quota,
        limits: LimitsChange::default(),
        expected_generation: 1,
    };
    sim.ask(update.clone()).unwrap();
    assert!(matches!(sim.ask(update), Err(Error::Generation { expected: 1, found: 2, .. })));
    let refused = sim.ask(Mutation::CreateVm { name: other(), spec: big, start: true }).unwrap_err();
    assert!(refused.to_string().contains("the capacity of this node"), "{refused}");
    let quota = Quota { vcpus: 1, memory_bytes: 1 << 20, storage_bytes: 1 << 30 };
    let shrink = Mutation::UpdateVdc {
        name: "ardesio".parse().unwrap(),
        quota,
        limits: LimitsChange::default(),
        expected_generation: 0,
    };
    assert!(matches!(sim.ask(shrink), Err(Error::Precondition { .. })));
}

#[test]
fn a_volume_has_one_user() {
    let mut sim = running();
    let root: VdcName = "ardesio/web-root".parse().unwrap();
    let mut second = spec(1);
    second.volumes.push(root.name.clone());
    let in_use =
        sim.ask(Mutation::CreateVm { name: "ardesio/thief".parse().unwrap(), spec: second, start: true });
    assert!(in_use.unwrap_err().to_string().contains("is in use by vdcs/ardesio/vms/web"));
    assert!(matches!(
        sim.ask(Mutation::DeleteVolume { name: root.clone() }),
        Err(Error::Precondition { .. })
    ));
    let export = |snapshot: Option<&str>| Mutation::CreateExport {
        volume: "ardesio/web-root".parse().unwrap(),
        snapshot: snapshot.map(|s| s.parse().unwrap()),
        writable: false,
        once: false,
        release: false,
        ttl: MINUTE,
    };
    assert!(matches!(sim.ask(export(None)), Err(Error::Precondition { .. })));
    let name = SnapshotName { volume: root, snapshot: "before".parse().unwrap() };
    assert!(matches!(sim.ask(export(Some("before"))), Err(Error::NotFound { .. })));
    sim.ask(Mutation::CreateSnapshot { name: name.clone() }).unwrap();
    assert!(matches!(sim.ask(Mutation::CreateSnapshot { name }), Err(Error::Exists { .. })));
    sim.ask(export(Some("before"))).unwrap();
    sim.ask(Mutation::StopVm { name: web(), force: true, timeout: MINUTE }).unwrap();
    let Ok(Answer::Export(head)) = sim.ask(export(None)) else { panic!("a stopped volume is exported") };
    // While its head is exported, the VM does not start.
    let refused = sim.ask(Mutation::StartVm { name: web() }).unwrap_err();
    assert!(refused.to_string().contains("is exported as"), "{refused}");
    sim.ask(Mutation::DeleteExport { id: head.record.id }).unwrap();
    sim.ask(Mutation::StartVm { name: web() }).unwrap();
    // An export ends by itself.
    let at = sim.timers.iter().position(|t| matches!(t, Timer::ExportExpired { .. })).unwrap();
    let timer = sim.timers.remove(at);
    sim.input(super::effect::Input::Timer(timer));
    sim.settle();
    sim.assert_agreement();
}

#[test]
fn a_restarted_seriod_takes_over() {
    let mut sim = running();
    sim.kill();
    sim.start();
    assert!(!sim.state().recovered());
    sim.settle();
    let view = sim.vm("ardesio/web").unwrap();
    assert_eq!((view.state, view.pid), (VmState::Running, Some(1)), "the same process");
    // It ended by itself while nobody looked.
    sim.kill();
    sim.world.end(view.record.uid, EndKind::PowerOff);
    sim.start();
    sim.settle();
    assert_eq!(sim.vm("ardesio/web").unwrap().record.last_end.unwrap().kind.as_str(), "power-off");
    sim.assert_agreement();
}

#[test]
fn snapshots_are_within_the_quota_and_the_share_stays() {
    let mut sim = running();
    let quota = Quota { vcpus: 100, memory_bytes: 1 << 41, storage_bytes: 1 << 30 };
    let update = |sim: &mut Sim, snapshots, keep_share| {
        let limits = VdcLimits { snapshots, weight: if keep_share { 0 } else { 7 }, ..VdcLimits::default() };
        let limits = LimitsChange { limits, keep_share };
        sim.ask(Mutation::UpdateVdc { name: web().vdc, quota, limits, expected_generation: 0 })
    };
    update(&mut sim, 1, false).unwrap();
    let take = |name: &str| Mutation::CreateSnapshot {
        name: SnapshotName { volume: "ardesio/web-root".parse().unwrap(), snapshot: name.parse().unwrap() },
    };
    sim.ask(take("a")).unwrap();
    let refused = crate::error::chain(&sim.ask(take("b")).unwrap_err());
    assert!(refused.contains("snapshots: 1 asked, 0 available: the quota of vdc ardesio is 1"), "{refused}");
    let Answer::Vdc(view) = update(&mut sim, 2, true).unwrap() else { panic!("a vdc") };
    assert_eq!((view.record.limits.weight, view.record.limits.snapshots, view.snapshots), (7, 2, 1));
    sim.ask(take("b")).unwrap();
    let refused = update(&mut sim, 1, true).unwrap_err();
    assert!(refused.to_string().contains("has 2 snapshots"), "{refused}");
}
