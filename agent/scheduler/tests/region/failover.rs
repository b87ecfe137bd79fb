//! A region: two schedulers over a real etcd of three members, and what is left when one of either dies or stands still.
//!
//! Clients place and commit all the while, with the leader whoever that is; agents keep real ledgers. At the end every
//! placement that was acknowledged is known to the leader, and held by exactly one node.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serio_api::v1::{
    AgentMessage, CommitPlacementRequest, GetLeaderRequest, GetPlacementRequest, Hello, PlaceRequest,
    PlacementState, ReleasePlacementRequest, agent_message::What,
    scheduler_service_client::SchedulerServiceClient,
};
use serio_scheduler::{
    error::leader_of,
    simulate::{
        self, Chance,
        agent::{self, Counters, Timing},
        node::{Node, Size},
    },
    store::{self, Backend, Change, Kind, StoreError, etcd::Etcd as Leader},
};
use tokio::{sync::watch, task::JoinHandle};
use tokio_stream::StreamExt;
use tonic::{Code, transport::Channel};
use tonic_types::StatusExt;

use crate::processes::{
    Cluster, PATIENCE, Process, connect, leader, leads, memory_folder, scheduler as start, within,
};

/// A dead leader is replaced within that.
const FAILOVER_MAX: Duration = Duration::from_secs(5);

fn scheduler(cluster: &Cluster) -> (Process, String) {
    start(&["--store", &cluster.store()])
}

fn wish(id: &str) -> PlaceRequest {
    PlaceRequest {
        request_id: id.into(),
        vdc: "ardesio".into(),
        resource: format!("vdcs/ardesio/vms/{id}"),
        vcpus: 1,
        memory_bytes: 1 << 20,
        ttl_ms: 20_000,
        ..PlaceRequest::default()
    }
}

/// What was acknowledged, and whether it is to be there.
type History = Arc<Mutex<BTreeMap<String, bool>>>;

/// Until `stop`: places, commits and sometimes releases, each until it is done or refused for good.
async fn client(
    number: u64,
    at: Arc<watch::Receiver<String>>,
    stop: Arc<AtomicBool>,
    history: History,
    mut chance: Chance,
) {
    for count in 0_u64.. {
        if stop.load(Ordering::Relaxed) {
            return;
        }
        let id = format!("c{number}-{count}");
        let placed = again(Arc::clone(&at), |mut scheduler| {
            let request = wish(&id);
            async move { scheduler.place(request).await }
        });
        let Some(placed) = placed.await else { continue };
        let name = placed.into_inner().name;
        let committed = again(Arc::clone(&at), |mut scheduler| {
            let request = CommitPlacementRequest { name: name.clone() };
            async move { scheduler.commit_placement(request).await }
        });
        if committed.await.is_none() {
            continue;
        }
        if chance.one_in(3) {
            let released = again(Arc::clone(&at), |mut scheduler| {
                let request = ReleasePlacementRequest { name: name.clone() };
                async move { scheduler.release_placement(request).await }
            });
            if released.await.is_some() {
                history.lock().unwrap().insert(id, false);
            }
        } else {
            history.lock().unwrap().insert(id, true);
        }
        tokio::time::sleep(chance.up_to(Duration::from_millis(40))).await;
    }
}

/// As a client with patience does it: what is unavailable is tried again with whoever leads then.
async fn again<T, F: Future<Output = Result<T, tonic::Status>>>(
    at: Arc<watch::Receiver<String>>,
    call: impl Fn(SchedulerServiceClient<Channel>) -> F,
) -> Option<T> {
    let until = Instant::now() + PATIENCE;
    while Instant::now() < until {
        let address = at.borrow().clone();
        match call(connect(&address)).await {
            Ok(answer) => return Some(answer),
            // Agents need a moment to find the next leader, so that there is no node for a moment.
            Err(status)
                if matches!(
                    status.code(),
                    Code::Unavailable
                        | Code::DeadlineExceeded
                        | Code::Cancelled
                        | Code::Aborted
                        | Code::Unknown
                        | Code::ResourceExhausted
                ) =>
            {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(status) => {
                println!("refused: {status}");
                return None;
            }
        }
    }
    println!("no patience any more");
    None
}

/// Nodes, their agents, clients, and who tells them where the leader is.
struct World {
    nodes: Vec<Arc<Node>>,
    history: History,
    stop: Arc<AtomicBool>,
    schedulers: watch::Sender<Vec<String>>,
    helpers: Vec<JoinHandle<()>>,
    clients: Vec<JoinHandle<()>>,
}

impl World {
    fn start(leader_now: String, schedulers: Vec<String>) -> Self {
        let mut chance = Chance::new(u64::from(std::process::id()));
        let size = Size { vcpus: 10_000, memory: 1 << 40, storage: 1 << 40, overhead: 0 };
        let nodes = simulate::fleet(4, 0, size, &mut chance);
        let (to, at) = watch::channel(leader_now);
        let (schedulers, known) = watch::channel(schedulers);
        let counters = Arc::new(Counters::default());
        let timing = Timing {
            lease: Duration::from_millis(500),
            usage: Duration::from_millis(500),
            churn: Duration::ZERO,
            partition: Duration::ZERO,
        };
        let mut helpers: Vec<JoinHandle<()>> = nodes
            .iter()
            .map(|node| {
                agent::run(Arc::clone(node), known.clone(), timing, Arc::clone(&counters), chance.fork())
            })
            .map(tokio::spawn)
            .collect();
        helpers.push(tokio::spawn(async move {
            loop {
                let addresses = known.borrow().clone();
                for address in addresses {
                    if *to.borrow() != address && leads(&address).await {
                        to.send(address).unwrap();
                    }
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }));
        let (history, stop) = (History::default(), Arc::new(AtomicBool::new(false)));
        let at = Arc::new(at);
        let clients = (0..4)
            .map(|number| {
                client(number, Arc::clone(&at), Arc::clone(&stop), Arc::clone(&history), chance.fork())
            })
            .map(tokio::spawn)
            .collect();
        Self { nodes, history, stop, schedulers, helpers, clients }
    }

    fn done(&self) -> usize {
        self.history.lock().unwrap().len()
    }

    /// Clients get on.
    async fn gets_on(&self, what: &str) {
        let (start, before) = (Instant::now(), self.done());
        while self.done() < before + 20 {
            assert!(start.elapsed() < PATIENCE, "{what}: {} of 20 done", self.done() - before);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        println!("{what}: 20 placements after {} ms", start.elapsed().as_millis());
    }

    /// All that was acknowledged is at the leader and on exactly one node, and nothing else is committed for long.
    async fn check(self, address: &str) {
        self.stop.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.await.unwrap();
        }
        let history = self.history.lock().unwrap().clone();
        let mut scheduler = connect(address);
        for (id, kept) in &history {
            let name = format!("placements/{id}");
            let found = scheduler.get_placement(GetPlacementRequest { name }).await.unwrap().into_inner();
            let over = [PlacementState::Releasing, PlacementState::Released].contains(&found.state());
            assert_eq!((found.state() == PlacementState::Committed, over), (*kept, !*kept), "{found:?}");
        }
        let start = Instant::now();
        loop {
            let mut held: BTreeMap<String, usize> = BTreeMap::new();
            for key in self.nodes.iter().flat_map(|node| node.committed()) {
                *held.entry(key).or_default() += 1;
            }
            let doubled: Vec<_> = held.iter().filter(|(_, count)| **count > 1).collect();
            assert!(doubled.is_empty(), "on two nodes: {doubled:?}");
            let wrong = |(id, kept): &(&String, &bool)| held.contains_key(*id) != **kept;
            let wrong: Vec<_> = history.iter().filter(wrong).collect();
            if wrong.is_empty() {
                break;
            }
            assert!(wrong.iter().all(|(_, kept)| !**kept), "lost: {wrong:?}");
            assert!(start.elapsed() < PATIENCE, "given back and still held: {wrong:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let kept = history.values().filter(|kept| **kept).count();
        println!("{} placements, {kept} of them kept: none lost, none doubled", history.len());
        self.helpers.iter().for_each(JoinHandle::abort);
    }
}

/// It answers questions, refuses the rest, and says who leads.
async fn follows(address: &str, leader: &str) {
    let mut follower = connect(address);
    let said = follower.get_leader(GetLeaderRequest {}).await.unwrap().into_inner();
    assert_eq!((said.address.as_str(), said.is_self), (leader, false));
    let refused = follower.place(wish("elsewhere")).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    let info = refused.get_error_details().error_info().unwrap().clone();
    assert_eq!((info.reason.as_str(), info.metadata["leader"].as_str()), ("NOT_LEADER", leader));
    let hello = Hello { node_id: "stranger".into(), ..Hello::default() };
    let hello = AgentMessage { what: Some(What::Hello(hello)) };
    let stays = tokio_stream::once(hello.clone()).chain(tokio_stream::pending());
    let mut stream = follower.connect(stays).await.unwrap().into_inner();
    assert_eq!(leader_of(&stream.message().await.unwrap_err()).as_deref(), Some(leader));
    // One that hangs up at once hears it as well.
    for _ in 0..20 {
        let hangs_up = tokio_stream::once(hello.clone());
        let mut stream = follower.connect(hangs_up).await.unwrap().into_inner();
        assert_eq!(leader_of(&stream.message().await.unwrap_err()).as_deref(), Some(leader));
    }

    let placed = connect(leader).place(wish("seen")).await.unwrap().into_inner();
    let copied = async {
        let request = GetPlacementRequest { name: placed.name.clone() };
        while follower.get_placement(request.clone()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    within("the copy follows", PATIENCE, copied).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_region_outlives_its_leader_and_a_member_of_etcd() {
    let folder = memory_folder();
    let Some((mut cluster, _)) = Cluster::start(folder.path(), 3).await else { return };
    let (first, first_at) = scheduler(&cluster);
    assert_eq!(leader(std::slice::from_ref(&first_at)).await, first_at);
    let (mut second, second_at) = scheduler(&cluster);
    let world = World::start(first_at.clone(), vec![first_at.clone(), second_at.clone()]);
    world.gets_on("at the beginning").await;
    follows(&second_at, &first_at).await;

    let killed = Instant::now();
    drop(first);
    assert_eq!(leader(std::slice::from_ref(&second_at)).await, second_at);
    let took = killed.elapsed();
    println!("the other leads after {} ms", took.as_millis());
    assert!(took < FAILOVER_MAX, "{took:?}");
    world.gets_on("with another leader").await;

    let (mut third, third_at) = scheduler(&cluster);
    let both = vec![second_at.clone(), third_at.clone()];
    world.schedulers.send(both.clone()).unwrap();
    for number in 0..3 {
        cluster.members[number].signal("-STOP");
        let stopped = Instant::now();
        // Long enough that the others notice.
        while stopped.elapsed() < Duration::from_millis(1500) {
            world.gets_on(&format!("while member {number} stands still")).await;
        }
        cluster.members[number].signal("-CONT");
        world.gets_on(&format!("after member {number} stood still")).await;
    }
    drop(cluster.members.remove(0));
    world.gets_on("without a member").await;
    // One that ends gives the lead away.
    let (leading, next) =
        if leader(&both).await == second_at { (&mut second, third_at) } else { (&mut third, second_at) };
    leading.signal("-TERM");
    assert_eq!(leader(std::slice::from_ref(&next)).await, next);
    assert!(leading.0.wait().unwrap().success());
    world.gets_on("after an orderly end").await;
    world.check(&next).await;
}

fn plan(key: &str, value: &str) -> Vec<Change> {
    vec![Change { kind: Kind::Plan, key: key.into(), value: Some(value.into()) }]
}

/// As the owner's thread does it.
async fn write(mut store: Leader, changes: Vec<Change>) -> (Leader, Result<(), StoreError>) {
    let written = tokio::task::spawn_blocking(move || {
        let written = store.write(&changes);
        (store, written)
    });
    written.await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_is_done_once_in_order_and_not_after_the_lead_is_lost() {
    let folder = memory_folder();
    let Some((_cluster, etcd)) = Cluster::start(folder.path(), 1).await else { return };
    let lease = etcd.grant(60).await.unwrap();
    let candidate = etcd.stand(lease, "here:1").await.unwrap();
    // The same leader at three moments: as it is, one whose first answer was lost, and one that is late.
    let [now, lost, late] = [(); 3].map(|()| Leader::new(etcd.clone(), candidate.clone()));
    let content = async || store::etcd::records(etcd.everything().await.unwrap().0);

    write(now, plan("a", "1")).await.1.unwrap();
    let (lost, again) = write(lost, plan("a", "1")).await;
    again.expect("it was done, its answer was lost");
    let (next, done) = write(lost, plan("a", "2")).await;
    done.unwrap();
    assert!(matches!(write(late, plan("a", "1")).await.1, Err(StoreError::Deposed)));
    assert_eq!(content().await, plan("a", "2"));
    let many: Vec<Change> = (0..250).flat_map(|n| plan(&format!("b{n:03}"), "x")).collect();
    let (next, done) = write(next, many).await;
    done.unwrap();
    assert_eq!(content().await.len(), 251);

    etcd.revoke(lease).await.unwrap();
    assert!(matches!(write(next, plan("a", "3")).await.1, Err(StoreError::Deposed)));
    assert_eq!(content().await[0], plan("a", "2")[0]);
    assert!(!etcd.keep_alive(lease).await.unwrap());
}
