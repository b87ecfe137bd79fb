//! Random work with random deaths: of VMMs, and of seriod between any two steps of an effect. Afterwards rows and host
//! agree. The seed is printed; `SERIO_SEED=N` runs one.

use std::time::Duration;

use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serio_store::record::Run;
use serio_types::{MacAddr, Name, NicSpec, SnapshotName, VdcName};
use uuid::Uuid;

use super::{
    command::{Answer, Command, Consistency, Mutation, Request},
    effect::{Effect, Input},
    sim_test::{Sim, Waiting, spec},
};
use crate::{error::Error, supervise::EndKind};

const SECOND: Duration = Duration::from_secs(1);
const SEEDS: u64 = 150;
const STEPS: usize = 400;
/// How VMs end by themselves.
const ENDS: [EndKind; 4] = [EndKind::PowerOff, EndKind::GuestError, EndKind::Died, EndKind::Reset];

fn name(rng: &mut StdRng, prefix: &str) -> VdcName {
    format!("ardesio/{prefix}{}", rng.random_range(0..3)).parse().unwrap()
}

fn volume(rng: &mut StdRng) -> VdcName {
    if rng.random_bool(0.5) {
        name(rng, "disk")
    } else {
        format!("{}-root", name(rng, "vm")).parse().unwrap()
    }
}

fn mutation(rng: &mut StdRng, exports: &[Name]) -> Mutation {
    let point: Name = format!("p{}", rng.random_range(0..2)).parse().unwrap();
    match rng.random_range(0..37) {
        0..=4 => {
            let mut spec = spec(rng.random_range(1..4));
            if rng.random_bool(0.3) {
                spec.boot = serio_types::BootFrom::Disk;
            }
            if rng.random_bool(0.3) {
                spec.volumes.push(name(rng, "disk").name);
            }
            if rng.random_bool(0.2) {
                let (name, start, root) = (name(rng, "vm"), rng.random(), volume(rng));
                return Mutation::CreateVmOn { name, spec, root, start };
            }
            Mutation::CreateVm { name: name(rng, "vm"), spec, start: rng.random() }
        }
        5..=7 => Mutation::StartVm { name: name(rng, "vm") },
        8..=9 => Mutation::StopVm { name: name(rng, "vm"), force: rng.random(), timeout: SECOND },
        10 => Mutation::RebootVm { name: name(rng, "vm") },
        11..=12 => Mutation::DeleteVm {
            name: name(rng, "vm"),
            keep_root_volume: rng.random_bool(0.3),
            force: rng.random(),
        },
        13..=14 => Mutation::CreateVolume {
            name: name(rng, "disk"),
            size: Some((1 << 20).try_into().unwrap()),
            image: None,
        },
        15 => Mutation::DeleteVolume { name: volume(rng) },
        16..=17 => Mutation::CreateSnapshot { name: SnapshotName { volume: volume(rng), snapshot: point } },
        18 => Mutation::CreateExport {
            volume: volume(rng),
            snapshot: rng.random_bool(0.7).then_some(point),
            writable: false,
            once: false,
            release: false,
            ttl: Duration::from_secs(60),
        },
        19 => Mutation::DeleteSnapshot { name: SnapshotName { volume: volume(rng), snapshot: point } },
        20 => Mutation::ResizeVolume {
            name: volume(rng),
            size: (rng.random_range(1_u64..8) << 20).try_into().unwrap(),
        },
        21 => Mutation::CloneVolume {
            source: SnapshotName { volume: volume(rng), snapshot: point },
            name: name(rng, "disk").name,
            size: None,
        },
        22 => Mutation::RollbackVolume {
            name: SnapshotName { volume: volume(rng), snapshot: point },
            discard_later: rng.random(),
        },
        23 => Mutation::FlattenVolume { name: volume(rng) },
        24 => Mutation::CreateVdcSnapshot {
            name: name(rng, "all"),
            consistency: Consistency { app: rng.random(), required: false },
        },
        25 => Mutation::PauseVm { name: name(rng, "vm") },
        26 => Mutation::ResumeVm { name: name(rng, "vm") },
        27..=31 => of_vm_snapshots(rng, point),
        32 => Mutation::DeleteVdcSnapshot { name: name(rng, "all") },
        33..=35 => of_devices(rng),
        _ => Mutation::DeleteExport {
            id: exports.choose(rng).cloned().unwrap_or_else(|| "none".parse().unwrap()),
        },
    }
}

/// Volumes and cards that come and go.
fn of_devices(rng: &mut StdRng) -> Mutation {
    let (vm, wait) = (name(rng, "vm"), SECOND);
    let mac = MacAddr::local([0, 0, 0, 0, rng.random_range(0..3)]);
    match rng.random_range(0..4) {
        0 => Mutation::AttachVolume { name: vm, volume: volume(rng) },
        1 => Mutation::DetachVolume { name: vm, volume: volume(rng), wait },
        2 => Mutation::AttachNic { name: vm, nic: NicSpec { mac: Some(mac), ..NicSpec::default() } },
        _ => Mutation::DetachNic { name: vm, mac, wait },
    }
}

/// What there is to do with points of VMs.
fn of_vm_snapshots(rng: &mut StdRng, point: Name) -> Mutation {
    let vm = name(rng, "vm");
    match rng.random_range(0..5) {
        0..=1 => Mutation::SnapshotVm { name: vm, point },
        2 => Mutation::DeleteVmSnapshot { name: vm, point },
        3 => Mutation::RestoreVm { name: vm, point, discard_later: rng.random() },
        _ => Mutation::CloneVm { name: vm, point, clone: name(rng, "vm").name },
    }
}

/// Leaves each effect that was handed out undone, done, or done without a word: seriod dies.
fn kill(sim: &mut Sim, rng: &mut StdRng) {
    for effect in std::mem::take(&mut sim.todo) {
        match effect {
            // The process may have got its VM, or only its run files.
            Effect::Launch(launch) => match rng.random_range(0..3) {
                0 => drop(sim.world.launch(&launch)),
                1 => drop(sim.world.run_files.insert(launch.vm)),
                _ => {}
            },
            // Half a volume.
            Effect::CreateVolume { volume, .. } | Effect::CloneVolume { volume, .. } if rng.random() => {
                sim.world.make(volume, 0);
            }
            // Half a clone.
            Effect::CloneVolumes { clones, .. } if rng.random() => {
                sim.world.make(clones[0].volume, 0);
            }
            // Only some of the volumes.
            Effect::VdcSnapshot { name, parts, .. } if rng.random() => {
                drop(sim.world.seal_parts(&name, &parts, false));
            }
            other if rng.random() => drop(sim.world.perform(other)),
            _ => {}
        }
    }
    sim.kill();
    // VMs go on, or end, while no seriod is there.
    let vms: Vec<Uuid> = sim.world.processes.keys().copied().collect();
    for vm in vms {
        if rng.random_bool(0.2) {
            sim.world.end(vm, if rng.random() { EndKind::PowerOff } else { EndKind::Reset });
        }
    }
    sim.start();
}

fn step(sim: &mut Sim, rng: &mut StdRng, waiting: &mut Vec<Waiting>, repeats: &mut Vec<(Mutation, Request)>) {
    sim.ready.append(&mut sim.world.aside);
    match rng.random_range(0..100) {
        0..=29 => {
            let exports: Vec<Name> = sim.world.exports.keys().cloned().collect();
            let mutation = mutation(rng, &exports);
            let request = rng.random_bool(0.5).then(|| Request {
                id: Uuid::new_v4(),
                method: "Test",
                digest: String::new(),
            });
            if let Some(request) = &request {
                repeats.push((mutation.clone(), request.clone()));
            }
            waiting.push(sim.send(mutation, request));
        }
        30..=34 => {
            if let Some((mutation, request)) = repeats.choose(rng).cloned() {
                waiting.push(sim.send(mutation, Some(request)));
            }
        }
        35..=60 if !sim.todo.is_empty() => {
            let effect = sim.todo.swap_remove(rng.random_range(0..sim.todo.len()));
            sim.world.fail = rng.random_bool(0.1);
            let input = sim.world.perform(effect);
            sim.world.fail = false;
            sim.ready.extend(input);
        }
        61..=90 if !sim.ready.is_empty() => {
            let input = sim.ready.remove(rng.random_range(0..sim.ready.len()));
            // Of one VM the launch is always told before the end, as its watcher does.
            if let Input::Ended { vm, .. } = &input {
                let untold = |i: &Input| matches!(i, Input::Launched { vm: of, .. } | Input::Adopted { vm: of, .. } if of == vm);
                if sim.ready.iter().any(untold) {
                    return sim.ready.push(input);
                }
            }
            sim.input(input);
        }
        91..=93 if !sim.timers.is_empty() => {
            let timer = sim.timers.swap_remove(rng.random_range(0..sim.timers.len()));
            sim.input(Input::Timer(timer));
        }
        94 if !sim.world.merges.is_empty() => {
            let volumes: Vec<Uuid> = sim.world.merges.keys().copied().collect();
            sim.world.fail = rng.random_bool(0.1);
            let input = volumes.choose(rng).and_then(|volume| sim.world.finish_merge(*volume));
            sim.world.fail = false;
            sim.ready.extend(input);
        }
        95 => {
            let operations: Vec<Uuid> = sim.state().model().operations.keys().copied().collect();
            if let Some(uid) = operations.choose(rng) {
                let (reply, answer) = tokio::sync::oneshot::channel();
                sim.input(Input::Command(Command::CancelOperation(*uid), reply));
                waiting.push(answer);
            }
        }
        96..=97 => {
            let vms: Vec<Uuid> = sim.world.processes.keys().copied().collect();
            if let Some(vm) = vms.choose(rng) {
                let kind = *ENDS.choose(rng).unwrap();
                let input = sim.world.end(*vm, kind);
                sim.ready.extend(input);
            }
        }
        98..=99 => kill(sim, rng),
        _ => {}
    }
}

fn run(seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut sim = Sim::new();
    sim.furnish();
    let (mut waiting, mut repeats) = (Vec::new(), Vec::new());
    for _ in 0..STEPS {
        step(&mut sim, &mut rng, &mut waiting, &mut repeats);
    }
    if rng.random() {
        kill(&mut sim, &mut rng);
    }
    sim.settle();
    assert!(sim.state().recovered());
    sim.assert_agreement();
    // Each client has its answer, or was cut off by a death of seriod; none waits for ever.
    for mut waiting in waiting {
        assert!(
            !matches!(waiting.try_recv(), Err(tokio::sync::oneshot::error::TryRecvError::Empty)),
            "unanswered"
        );
    }
    // And what a new seriod reads is the same.
    sim.kill();
    sim.start();
    sim.settle();
    sim.assert_agreement();
    // Now that nothing failed, what shall stand still does.
    let rows = sim.state().model().vms.values();
    let paused: Vec<Uuid> = rows.filter(|vm| vm.run == Run::Paused).map(|vm| vm.uid).collect();
    assert!(paused.iter().all(|vm| sim.world.processes[vm].paused), "it should stand still");
}

#[test]
fn whatever_dies_rows_and_host_agree() {
    let one = std::env::var("SERIO_SEED").ok().and_then(|seed| seed.parse().ok());
    for seed in one.map_or(0..SEEDS, |seed| seed..seed + 1) {
        if let Err(panic) = std::panic::catch_unwind(|| run(seed)) {
            eprintln!("SERIO_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn a_repeated_request_is_done_once() {
    let mut sim = Sim::new();
    sim.furnish();
    let create = Mutation::CreateVm { name: "ardesio/web".parse().unwrap(), spec: spec(1), start: true };
    let request = Request { id: Uuid::new_v4(), method: "CreateVm", digest: "d".to_owned() };
    // Twice while it is under way, once after, once after a restart of seriod.
    let mut first = sim.send(create.clone(), Some(request.clone()));
    let mut twin = sim.send(create.clone(), Some(request.clone()));
    sim.settle();
    let uid = |answer: Result<Answer, Error>| match answer {
        Ok(Answer::Vm(view)) => view.record.uid,
        other => panic!("{other:?}"),
    };
    let vm = uid(first.try_recv().unwrap());
    assert_eq!(uid(twin.try_recv().unwrap()), vm);
    let mut later = sim.send(create.clone(), Some(request.clone()));
    assert_eq!(uid(later.try_recv().unwrap()), vm);
    sim.kill();
    sim.start();
    sim.settle();
    let mut restarted = sim.send(create.clone(), Some(request.clone()));
    assert_eq!(uid(restarted.try_recv().unwrap()), vm);
    let other = Request { digest: "another".to_owned(), ..request };
    let mut misused = sim.send(create, Some(other));
    assert!(
        matches!(misused.try_recv().unwrap(), Err(Error::Invalid(fields)) if fields[0].field == "request_id")
    );
}
