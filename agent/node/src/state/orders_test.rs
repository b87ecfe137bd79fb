//! Orders: what is promised, who takes it, what a restart keeps; drains, fences, and many clients at once.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serio_store::Store;
use serio_types::{Quota, VdcName, resource};
use serio_vdc::ledger::{Ask, Stage, Veto, Want};
use tokio::sync::{mpsc, oneshot};

use super::{
    State,
    command::{Answer, Command, ImportedFiles, Mutation, Order, Ordered, Query, Reply, VmState},
    effect::{Effect, Input},
    model::Model,
    owner::{self, Client},
    recover::Found,
    sim_test::{Sim, Waiting, capacity, spec},
};
use crate::{
    clock::{Clock, Reading},
    error::Error,
};

const MINUTE: Duration = Duration::from_secs(60);

fn named(name: &str) -> VdcName {
    format!("ardesio/{name}").parse().unwrap()
}

/// For a VM of [`spec`] with so many vcpus, and some room.
fn ask(name: &str, vcpus: u64, fence: u64) -> Order {
    let amount = Quota { vcpus, memory_bytes: 32 << 20, storage_bytes: 4 << 20 };
    let want =
        Want { key: name.to_owned(), resource: resource::vm(&named(name)), amount, fence, ..Want::default() };
    let token = format!("token-{name}");
    Order::Reserve(Box::new(Ask { want, ttl_ms: 1000, expected_generation: 0, token }))
}

fn send(sim: &mut Sim, order: Order) -> Waiting {
    let (reply, waiting) = oneshot::channel();
    sim.input(Input::Command(Command::Order(order, None), reply));
    waiting
}

fn order(sim: &mut Sim, order: Order) -> Result<Ordered, Error> {
    match send(sim, order).try_recv().expect("answered at once") {
        Ok(Answer::Ordered(ordered)) => Ok(ordered),
        Ok(other) => panic!("{other:?}"),
        Err(error) => Err(error),
    }
}

fn create(name: &str, vcpus: u32, start: bool) -> Mutation {
    Mutation::CreateVm { name: named(name), spec: spec(vcpus), start }
}

fn taking(name: &str, vcpus: u32, start: bool) -> Mutation {
    create(name, vcpus, start).taking(format!("token-{name}"))
}

fn stage(sim: &Sim, name: &str) -> Option<Stage> {
    sim.state().ledger().promise(&format!("token-{name}")).map(|p| p.stage.clone())
}

fn furnished() -> Sim {
    let mut sim = Sim::new();
    sim.furnish();
    sim
}

fn restart(sim: &mut Sim) {
    sim.kill();
    sim.start();
    sim.settle();
}

#[test]
fn what_is_reserved_is_no_others_and_outlives_the_agent_once_committed() {
    let mut sim = furnished();
    order(&mut sim, ask("web", 6, 0)).unwrap();
    order(&mut sim, ask("lost", 2, 0)).unwrap();
    assert!(matches!(order(&mut sim, ask("third", 5, 0)), Err(Error::Veto(Veto::Full(_)))));
    let refused = sim.ask(create("other", 5, false)).unwrap_err().to_string();
    assert!(refused.starts_with("vcpus: 5 asked, 4 available: the capacity of this node is 12"), "{refused}");
    order(&mut sim, Order::Commit("token-web".into())).unwrap();
    restart(&mut sim);
    assert_eq!((stage(&sim, "web"), stage(&sim, "lost")), (Some(Stage::Committed), None));
    // Only its VM, and only as large as promised.
    assert!(sim.ask(create("other", 2, false).taking("token-web".into())).is_err());
    assert!(sim.ask(taking("web", 7, false)).is_err());
    sim.ask(taking("web", 6, false)).unwrap();
    let uid = sim.vm("ardesio/web").unwrap().record.uid.to_string();
    assert_eq!(stage(&sim, "web"), Some(Stage::Taken(uid.clone())));
    restart(&mut sim);
    assert_eq!(stage(&sim, "web"), Some(Stage::Taken(uid.clone())));
    let list = sim.state().snapshot().allocations;
    assert_eq!(
        list.iter().map(|a| (a.id.as_str(), a.token.as_str())).collect::<Vec<_>>(),
        [(uid.as_str(), "token-web")]
    );
    assert!(matches!(
        order(&mut sim, Order::Release("token-web".into())),
        Err(Error::Veto(Veto::Taken { .. }))
    ));
    sim.ask(Mutation::DeleteVm { name: named("web"), keep_root_volume: false, force: true }).unwrap();
    restart(&mut sim);
    assert_eq!(sim.state().ledger().promises().count(), 0);
    sim.assert_agreement();
}

#[test]
fn an_uncommitted_reservation_ends_by_the_clock() {
    let mut sim = furnished();
    order(&mut sim, ask("web", 6, 0)).unwrap();
    assert_eq!(sim.timers.len(), 1, "the state is woken");
    assert_eq!(sim.state().snapshot().allocations.len(), 1);
    sim.later(1000);
    sim.settle();
    assert_eq!(sim.state().snapshot().allocations.len(), 0);
    assert!(matches!(
        order(&mut sim, Order::Commit("token-web".into())),
        Err(Error::Veto(Veto::Expired { .. }))
    ));
}

#[test]
fn a_creation_that_was_broken_off_gives_its_reservation_back() {
    let mut sim = furnished();
    order(&mut sim, ask("web", 6, 0)).unwrap();
    drop(sim.send(taking("web", 6, true), None));
    assert!(matches!(stage(&sim, "web"), Some(Stage::Taken(_))));
    restart(&mut sim);
    assert!(sim.vm("ardesio/web").is_none());
    assert_eq!(stage(&sim, "web"), Some(Stage::Committed));
    sim.ask(taking("web", 6, true)).unwrap();
    sim.assert_agreement();
}

#[test]
fn a_drained_node_takes_nothing_new_and_says_what_is_still_there() {
    let mut sim = furnished();
    sim.ask(create("web", 1, true)).unwrap();
    sim.ask(create("off", 1, false)).unwrap();
    order(&mut sim, ask("held", 1, 0)).unwrap();
    let blocking = order(&mut sim, Order::Drain("new disks".into())).unwrap();
    assert_eq!(blocking, Ordered::Blocking(vec!["vdcs/ardesio/vms/web".into()]));
    restart(&mut sim);
    assert_eq!(sim.vm("ardesio/web").unwrap().state, VmState::Running, "what runs goes on");
    let refusals = [
        sim.ask(create("new", 1, false)).unwrap_err(),
        sim.ask(taking("held", 1, false)).unwrap_err(),
        sim.ask(Mutation::StartVm { name: named("off") }).unwrap_err(),
        order(&mut sim, ask("new", 1, 0)).unwrap_err(),
    ];
    for refused in refusals {
        assert!(refused.to_string().starts_with("the node is drained (new disks)"), "{refused}");
    }
    assert_eq!(sim.state().snapshot().drain_reason.as_deref(), Some("new disks"));
    order(&mut sim, Order::Undrain).unwrap();
    sim.ask(Mutation::StartVm { name: named("off") }).unwrap();
}

#[test]
fn a_fence_is_answered_when_nothing_older_runs_any_more() {
    let mut sim = furnished();
    sim.ask(create("old", 1, true)).unwrap();
    order(&mut sim, ask("new", 1, 7)).unwrap();
    sim.ask(taking("new", 1, true)).unwrap();
    order(&mut sim, ask("held", 1, 6)).unwrap();
    let old = sim.vm("ardesio/old").unwrap().record.uid.to_string();
    let mut fence = send(&mut sim, Order::Fence { id: None, generation: 7 });
    assert!(fence.try_recv().is_err(), "the VM still runs");
    sim.settle_without_timers();
    let Ok(Answer::Ordered(Ordered::Ended(ended))) = fence.try_recv().unwrap() else { panic!("not fenced") };
    assert_eq!(ended, [old.clone(), "token-held".into()]);
    assert_eq!(sim.vm("ardesio/new").unwrap().state, VmState::Running);
    for _ in 0..2 {
        assert_eq!(sim.vm("ardesio/old").unwrap().state, VmState::Stopped);
        let refused = sim.ask(Mutation::StartVm { name: named("old") }).unwrap_err();
        assert!(refused.to_string().contains("ended by the fence of generation 7"), "{refused}");
        let low = order(&mut sim, Order::Fence { id: None, generation: 6 }).unwrap_err();
        assert!(matches!(low, Error::Veto(Veto::Fenced { in_force: 7, .. })), "{low}");
        restart(&mut sim);
    }
    // Again: nothing more. One alone: by its id.
    sim.ask(create("later", 1, true)).unwrap();
    assert_eq!(order(&mut sim, Order::Fence { id: None, generation: 7 }).unwrap(), Ordered::Ended(vec![old]));
    let later = sim.vm("ardesio/later").unwrap().record.uid.to_string();
    let mut fence = send(&mut sim, Order::Fence { id: Some(later), generation: 1 });
    sim.settle_without_timers();
    assert!(fence.try_recv().unwrap().is_ok());
    assert_eq!(sim.vm("ardesio/later").unwrap().state, VmState::Stopped);
    assert_eq!(sim.vm("ardesio/new").unwrap().state, VmState::Running);
    sim.assert_agreement();
}

#[test]
fn a_vm_that_is_just_starting_is_fenced_too() {
    let mut sim = furnished();
    drop(sim.send(create("web", 1, true), None));
    let mut fence = send(&mut sim, Order::Fence { id: None, generation: 1 });
    assert!(fence.try_recv().is_err());
    sim.settle_without_timers();
    assert!(fence.try_recv().unwrap().is_ok());
    assert!(sim.vm("ardesio/web").is_none_or(|vm| vm.state == VmState::Stopped));
    sim.assert_agreement();
}

/// A real owner over a store, whose volumes are made at once.
pub(crate) fn start(path: &Path) -> (Client, owner::Watches) {
    let (store, contents) = Store::open(path).unwrap();
    let mut state = State::new(store, Model::new(contents), capacity());
    let (clock, _) = Clock::go_on(None, &Reading::now());
    let effects = state.recover(clock.now(), &Found::default());
    let (inputs, receiver) = mpsc::channel(16);
    let (begun, effects_of) = std::sync::mpsc::channel::<Effect>();
    let back = inputs.downgrade();
    std::thread::spawn(move || {
        for effect in effects_of {
            let input = match effect {
                Effect::CreateVolume { volume, .. } => Input::VolumeCreated { volume, result: Ok(()) },
                Effect::RemoveVm { vm, .. } => Input::VmRemoved { vm, result: Ok(()) },
                Effect::Timer { .. } => continue,
                other => panic!("not of this test: {other:?}"),
            };
            let Some(inputs) = back.upgrade() else { return };
            let _ = inputs.blocking_send(input);
        }
    });
    let watches = owner::spawn(state, (clock, effects), receiver, move |effect| {
        let _ = begun.send(effect);
    })
    .unwrap();
    (Client::new(inputs, &watches), watches)
}

async fn furnish(client: &Client) {
    let mutate = async |mutation| client.ask(Command::Mutate(mutation, None)).await;
    let begin = Mutation::BeginImport { name: "tiny".parse().unwrap(), cmdline: Default::default() };
    let Ok(Answer::Import(uid)) = mutate(begin).await else { panic!("no import") };
    let files = ImportedFiles {
        uid,
        size_bytes: 1 << 20,
        blake3: String::new(),
        has_kernel: true,
        has_initrd: false,
    };
    client.ask(Command::FinishImport(files)).await.unwrap();
    let quota = Quota { vcpus: 1000, memory_bytes: 1 << 40, storage_bytes: 1 << 40 };
    let vdc = Mutation::CreateVdc {
        name: "ardesio".parse().unwrap(),
        quota,
        limits: serio_types::VdcLimits::default(),
        encrypted: false,
    };
    mutate(vdc).await.unwrap();
}

/// One client: makes VMs with and without reservations, gives reservations back, deletes; says what it holds at the end.
async fn work(client: Client, me: u64, round: u64, refused: Arc<AtomicU64>) -> BTreeMap<String, bool> {
    // Name to whether a VM has it.
    let mut held = BTreeMap::new();
    for step in 0..12 {
        let name = format!("n{round}-{me}-{step}");
        let token = format!("token-{name}");
        let vm = |mutation| client.ask(Command::Mutate(mutation, None));
        let order = |order| client.ask(Command::Order(order, None));
        if (me + step).is_multiple_of(3) {
            match vm(create(&name, 1, false)).await {
                Ok(_) => drop(held.insert(name, true)),
                Err(Error::Refused(_)) => drop(refused.fetch_add(1, Ordering::Relaxed)),
                Err(other) => panic!("{other}"),
            }
        } else {
            match order(ask(&name, 1 + me % 2, 0)).await {
                Ok(_) => {}
                Err(Error::Veto(Veto::Full(_))) => {
                    refused.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                Err(other) => panic!("{other}"),
            }
            match (me + step) % 5 {
                0 => drop(order(Order::Release(token)).await.unwrap()),
                1 => {
                    vm(taking(&name, 1, false)).await.unwrap();
                    held.insert(name, true);
                }
                _ => {
                    order(Order::Commit(token)).await.unwrap();
                    held.insert(name, false);
                }
            }
        }
        if step % 4 == 3
            && let Some((name, is_vm)) = held.pop_first()
        {
            let gone = Mutation::DeleteVm { name: named(&name), keep_root_volume: false, force: false };
            let done =
                if is_vm { vm(gone).await } else { order(Order::Release(format!("token-{name}"))).await };
            done.unwrap();
        }
    }
    held
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_clients_and_restarts_never_bring_a_node_over_its_capacity() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let refused = Arc::new(AtomicU64::new(0));
    let mut held: BTreeMap<String, bool> = BTreeMap::new();
    for round in 0..3 {
        let (client, watches) = start(&path);
        if round == 0 {
            furnish(&client).await;
        }
        // Each state that anybody could see is within the capacity.
        let mut seen = watches.snapshot.clone();
        let watcher = tokio::spawn(async move {
            loop {
                let vcpus: u64 =
                    seen.borrow_and_update().allocations.iter().map(|a| u64::from(a.vcpus)).sum();
                assert!(vcpus <= capacity().vcpus, "{vcpus}");
                if seen.changed().await.is_err() {
                    return;
                }
            }
        });
        let workers: Vec<_> =
            (0..8).map(|me| tokio::spawn(work(client.clone(), me, round, Arc::clone(&refused)))).collect();
        for worker in workers {
            held.append(&mut worker.await.unwrap());
        }
        // An answer comes just before what it changed can be seen; the next answer comes after that.
        client.ask(Command::Query(Query::Vdcs(None))).await.unwrap();
        let last = watches.snapshot.borrow().allocations.clone();
        let names: BTreeMap<String, bool> = last
            .iter()
            .map(|a| (a.resource.rsplit('/').next().unwrap().to_owned(), a.id != a.token))
            .collect();
        assert_eq!(names.len(), last.len(), "nothing is promised twice");
        assert_eq!(names, held, "nothing is lost");
        // The owner ends with its last client: what the next one finds is what was written down.
        drop(client);
        watcher.await.unwrap();
        // Room for the next round.
        let (client, watches) = start(&path);
        while held.len() > 2
            && let Some((name, is_vm)) = held.pop_first()
        {
            let gone = Mutation::DeleteVm { name: named(&name), keep_root_volume: false, force: false };
            let command = match is_vm {
                true => Command::Mutate(gone, None),
                false => Command::Order(Order::Release(format!("token-{name}")), None),
            };
            client.ask(command).await.unwrap();
        }
        drop(client);
        let mut snapshot = watches.snapshot.clone();
        while snapshot.changed().await.is_ok() {}
    }
    assert!(refused.load(Ordering::Relaxed) > 0, "the node was full now and then");
}

/// A reply that nobody reads does not stop the state.
#[test]
fn a_client_that_is_gone_does_not_matter() {
    let mut sim = furnished();
    let (reply, waiting): (Reply, Waiting) = oneshot::channel();
    drop(waiting);
    sim.input(Input::Command(Command::Order(ask("web", 1, 0), None), reply));
    assert!(stage(&sim, "web").is_some());
    sim.ask(Mutation::StopVm { name: named("none"), force: true, timeout: MINUTE }).unwrap_err();
}
