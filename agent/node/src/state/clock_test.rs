//! Somebody sets the host's clock: an hour forward, a day back, while seriod runs and while it does not.

use std::time::Duration;

use serio_types::{Name, RestartPolicy, VdcName};
use uuid::Uuid;

use super::{
    command::{Answer, ExportView, Mutation, Query, Request, VmState},
    effect::Timer,
    sim_test::{Sim, spec},
};
use crate::{error::Error, supervise::EndKind};

const MINUTE: i64 = 60_000;
const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = 24 * HOUR;
/// What clocks do.
const JUMPS: [i64; 6] = [HOUR, DAY, 400 * DAY, -HOUR, -DAY, -400 * DAY];

fn web() -> VdcName {
    "ardesio/web".parse().unwrap()
}

fn furnished() -> Sim {
    let mut sim = Sim::new();
    sim.furnish();
    sim
}

fn restart(sim: &mut Sim) {
    sim.kill();
    sim.start();
    sim.settle_without_timers();
}

/// An export for an hour.
fn export(sim: &mut Sim) -> Name {
    let name: VdcName = "ardesio/data".parse().unwrap();
    sim.ask(Mutation::CreateVolume {
        name: name.clone(),
        size: Some((1 << 20).try_into().unwrap()),
        image: None,
    })
    .unwrap();
    let export = Mutation::CreateExport {
        volume: name,
        snapshot: None,
        writable: false,
        once: false,
        release: false,
        ttl: Duration::from_secs(3600),
    };
    let Ok(Answer::Export(view)) = sim.ask(export) else { panic!("no export") };
    view.record.id
}

fn exports(sim: &mut Sim) -> Vec<ExportView> {
    let Ok(Answer::Exports(views)) = sim.query(Query::Exports) else { panic!("no list") };
    views
}

/// How long the last timer for the end of an export was to take.
fn export_left(sim: &Sim) -> Duration {
    let end = sim.asked.iter().rev().find(|(timer, _)| matches!(timer, Timer::ExportExpired { .. }));
    end.expect("its end is waited for").1
}

#[test]
fn an_exports_hour_is_an_hour_over_restarts_and_whatever_the_clock_shows() {
    for jump in JUMPS {
        let mut sim = furnished();
        let id = export(&mut sim);
        assert_eq!(export_left(&sim), Duration::from_secs(3600));
        sim.later(10 * MINUTE);
        sim.set_wall_by(jump);
        // People see the end as their clock will show it.
        let end = exports(&mut sim)[0].record.expire_time.0;
        assert!((end - sim.host.wall.0 - 50 * MINUTE).abs() <= 1000, "{jump}");
        restart(&mut sim);
        assert_eq!(exports(&mut sim).len(), 1, "{jump}: too early");
        assert_eq!(export_left(&sim), Duration::from_secs(50 * 60), "{jump}");
        sim.later(20 * MINUTE);
        sim.set_wall_by(-jump);
        restart(&mut sim);
        assert_eq!(export_left(&sim), Duration::from_secs(30 * 60), "{jump}, and back");
        // seriod is away at its end, and the clock shows anything.
        sim.kill();
        sim.later(31 * MINUTE);
        sim.set_wall_by(jump);
        sim.start();
        sim.settle_without_timers();
        assert_eq!(export_left(&sim), Duration::ZERO, "{jump}: too late");
        let due = sim.timers.iter().position(|t| matches!(t, Timer::ExportExpired { .. })).unwrap();
        let timer = sim.timers.remove(due);
        sim.input(super::effect::Input::Timer(timer));
        sim.settle_without_timers();
        assert!(exports(&mut sim).is_empty(), "{id} is kept");
    }
}

fn request(id: Uuid, digest: &str) -> Request {
    Request { id, method: "CreateVolume", digest: digest.to_owned() }
}

fn create(sim: &mut Sim, name: &str, request: Request) -> Result<Answer, Error> {
    let name = VdcName { vdc: "ardesio".parse().unwrap(), name: name.parse().unwrap() };
    let size = Some((1 << 20).try_into().unwrap());
    let mut waiting = sim.send(Mutation::CreateVolume { name, size, image: None }, Some(request));
    sim.settle_without_timers();
    waiting.try_recv().expect("it is answered")
}

#[test]
fn a_request_is_remembered_for_a_day_and_no_longer() {
    for jump in JUMPS {
        let mut sim = furnished();
        let id = Uuid::new_v4();
        create(&mut sim, "one", request(id, "one")).unwrap();
        sim.set_wall_by(jump);
        restart(&mut sim);
        // Others that come meanwhile do not drive it out.
        create(&mut sim, "two", request(Uuid::new_v4(), "two")).unwrap();
        assert!(create(&mut sim, "one", request(id, "one")).is_ok(), "{jump}: forgotten too early");
        assert!(create(&mut sim, "three", request(id, "three")).is_err(), "{jump}: the same id for another");
        sim.later(DAY + HOUR);
        create(&mut sim, "four", request(Uuid::new_v4(), "four")).unwrap();
        assert!(create(&mut sim, "three", request(id, "three")).is_ok(), "{jump}: kept for ever");
    }
}

fn running() -> (Sim, Uuid) {
    let mut sim = furnished();
    let mut spec = spec(1);
    spec.restart_policy = RestartPolicy::Always;
    sim.ask(Mutation::CreateVm { name: web(), spec, start: true }).unwrap();
    let uid = sim.vm("ardesio/web").unwrap().record.uid;
    (sim, uid)
}

/// It fails; how long the pause before its next start is, which then comes.
fn pause_after_failure(sim: &mut Sim, uid: Uuid) -> Duration {
    let ended = sim.world.end(uid, EndKind::GuestError);
    sim.ready.extend(ended);
    sim.settle();
    assert_eq!(sim.vm("ardesio/web").unwrap().state, VmState::Running);
    let restarts = sim.asked.iter().rev().find(|(timer, _)| matches!(timer, Timer::Restart { .. }));
    restarts.expect("it pauses").1
}

#[test]
fn whether_a_run_was_steady_does_not_depend_on_the_wall_clock() {
    for jump in JUMPS {
        let (mut sim, uid) = running();
        for seconds in [1, 2, 4, 8] {
            sim.later(MINUTE);
            sim.set_wall_by(jump);
            let pause = pause_after_failure(&mut sim, uid);
            assert_eq!(pause, Duration::from_secs(seconds), "{jump}: a minute is no steady run");
        }
        sim.later(11 * MINUTE);
        sim.set_wall_by(-jump);
        let pause = pause_after_failure(&mut sim, uid);
        assert_eq!(pause, Duration::from_secs(1), "{jump}: eleven minutes are");
    }
}
