//! Nobody is promised what is not there, and nobody's promise is lost or doubled: fifty clients on twenty nodes, with
//! random deaths of every party (clients that forget what they asked, agents that restart or are cut off, a scheduler
//! that is killed and started again), and a checker over what was acknowledged.
//!
//! The checker knows nothing of ledger or scheduler: it compares what clients were told with what nodes hold at the end.
//! It is itself tested with a node that books twice, one that loses, and one that is over its capacity.
#![allow(clippy::unwrap_used, reason = "the helpers of a test may panic as the test does")]

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serio_api::v1::{
    CommitPlacementRequest, PlaceRequest, ReleasePlacementRequest,
    scheduler_service_client::SchedulerServiceClient,
};
use serio_scheduler::simulate::{
    self, Chance,
    agent::{self, Counters, Timing},
    node::{Node, Size},
};
use tokio::{sync::watch, task::JoinHandle};
use tonic::transport::{Channel, Endpoint};

const CLIENTS: u64 = 50;
const NODES: usize = 20;

/// What a client was told last of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    /// It may or may not be there: the client died, or its call failed.
    Unknown,
    /// It is kept.
    Committed,
    /// It is over.
    Over,
}

#[derive(Debug, Clone)]
struct Entry {
    told: Told,
    vcpus: u64,
}

/// What a node holds: keys of its promises.
struct Held {
    node: String,
    vcpus: u64,
    keys: Vec<String>,
}

/// Every violation, in words.
fn violations(history: &BTreeMap<String, Entry>, nodes: &[Held]) -> Vec<String> {
    let mut found = Vec::new();
    let mut places: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for held in nodes {
        let sum: u64 = held.keys.iter().map(|key| history.get(key).map_or(0, |entry| entry.vcpus)).sum();
        if sum > held.vcpus {
            found.push(format!("{} is over capacity: {sum} of {}", held.node, held.vcpus));
        }
        for key in &held.keys {
            places.entry(key).or_default().push(&held.node);
            if !history.contains_key(key) {
                found.push(format!("{} holds {key}, which nobody asked for", held.node));
            }
        }
    }
    for (key, at) in &places {
        if at.len() > 1 {
            found.push(format!("{key} is doubled: {}", at.join(" and ")));
        }
    }
    for (key, entry) in history {
        match (entry.told, places.contains_key(key.as_str())) {
            (Told::Committed, false) => found.push(format!("{key} was acknowledged and is lost")),
            (Told::Over, true) => found.push(format!("{key} was given back and is still held")),
            _ => {}
        }
    }
    found
}

#[test]
fn the_checker_sees_what_is_wrong() {
    let entry = |told, vcpus| Entry { told, vcpus };
    let history = BTreeMap::from([
        ("a".to_owned(), entry(Told::Committed, 4)),
        ("b".to_owned(), entry(Told::Over, 4)),
        ("c".to_owned(), entry(Told::Unknown, 4)),
    ]);
    let held = |node: &str, keys: &[&str]| Held {
        node: node.into(),
        vcpus: 8,
        keys: keys.iter().map(|key| (*key).to_owned()).collect(),
    };
    assert!(violations(&history, &[held("x", &["a"]), held("y", &["c"])]).is_empty());
    assert!(violations(&history, &[held("x", &["a"])]).is_empty());
    let cases: [(&[Held], &str); 6] = [
        (&[held("x", &["a"]), held("y", &["a"])], "doubled"),
        (&[held("x", &["a", "a"])], "doubled"),
        (&[held("x", &[])], "lost"),
        (&[held("x", &["a", "b"])], "still held"),
        (&[held("x", &["a", "c", "c"])], "over capacity"),
        (&[held("x", &["a", "stranger"])], "nobody asked"),
    ];
    for (nodes, word) in cases {
        let found = violations(&history, nodes).join("; ");
        assert!(found.contains(word), "{word}: {found}");
    }
}

/// A process, so that it dies as processes do.
struct Scheduler(Child);

impl Drop for Scheduler {
    fn drop(&mut self) {
        // It may be dead already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(state: &Path) -> (Scheduler, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_serio-scheduler"))
        .args(["--insecure", "--listen", "127.0.0.1:0", "--state-dir"])
        .arg(state)
        .env("RUST_LOG", "warn")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let line = lines.by_ref().map(Result::unwrap).find(|line| line.contains("address=")).unwrap();
    let address = line.split("address=").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    // What it says later must not fill the pipe; it ends with the process.
    std::thread::spawn(move || lines.for_each(drop));
    (Scheduler(child), address)
}

type History = Arc<Mutex<BTreeMap<String, Entry>>>;

fn connect(address: &str) -> SchedulerServiceClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    SchedulerServiceClient::new(endpoint.timeout(Duration::from_secs(5)).connect_lazy())
}

/// One client: places, commits, releases, and forgets or dies in between.
async fn client(
    number: u64,
    address: watch::Receiver<String>,
    left: Arc<AtomicU64>,
    history: History,
    mut chance: Chance,
) {
    let mut count = 0_u64;
    while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
        count += 1;
        let id = format!("c{number}-{count}");
        let vcpus = u32::try_from(1 + chance.below(4)).unwrap();
        let note = |told| {
            history.lock().unwrap().insert(id.clone(), Entry { told, vcpus: u64::from(vcpus) });
        };
        note(Told::Unknown);
        let request = PlaceRequest {
            request_id: id.clone(),
            vdc: "v".into(),
            vcpus,
            memory_bytes: 1 << 20,
            ttl_ms: 2_000,
            ..PlaceRequest::default()
        };
        let mut scheduler = connect(&address.borrow().clone());
        let placed = scheduler.place(request).await;
        let Ok(placed) = placed else {
            tokio::time::sleep(chance.up_to(Duration::from_millis(50))).await;
            continue;
        };
        let name = placed.into_inner().name;
        if chance.one_in(8) {
            // It dies: nobody commits.
            continue;
        }
        if scheduler.commit_placement(CommitPlacementRequest { name: name.clone() }).await.is_err() {
            continue;
        }
        note(Told::Committed);
        if chance.one_in(10) {
            // It dies holding it: kept to the end.
            continue;
        }
        // From here on it may be over.
        note(Told::Unknown);
        let released = scheduler.release_placement(ReleasePlacementRequest { name }).await;
        if released.is_ok() {
            note(Told::Over);
        }
    }
}

fn held(nodes: &[Arc<Node>]) -> Vec<Held> {
    let one = |node: &Arc<Node>| {
        let (_, total) = node.filled();
        let keys = node.allocations(true).allocations.into_iter().map(|allocation| allocation.key).collect();
        Held { node: node.name.clone(), vcpus: total.vcpus, keys }
    };
    nodes.iter().map(one).collect()
}

/// What is still wrong after everybody had time to say what is over.
async fn settled(history: &History, nodes: &[Arc<Node>]) -> Vec<String> {
    let mut found = Vec::new();
    for _ in 0..300 {
        found = violations(&history.lock().unwrap(), &held(nodes));
        if found.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_whoever_dies() {
    let long = std::env::var_os("SERIO_TEST_LONG").is_some();
    let requests = if long { 100_000 } else { 500 };
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    let mut chance = Chance::new(seed);
    let state = tempfile::tempdir().unwrap();
    // Room for what stays to the end, and not for much more.
    let vcpus = if long { 2_000 } else { 40 };
    let size = Size { vcpus, memory: 1 << 40, storage: 1 << 40, overhead: 0 };
    let nodes = simulate::fleet(NODES, 5, size, &mut chance);
    let (mut scheduler, address) = start(state.path());
    let (to, at) = watch::channel(address);
    let timing = Timing {
        lease: Duration::from_millis(300),
        usage: Duration::from_millis(500),
        churn: Duration::from_secs(4),
        partition: Duration::from_secs(5),
    };
    let counters = Arc::new(Counters::default());
    let agents: Vec<JoinHandle<()>> = nodes
        .iter()
        .map(|node| {
            tokio::spawn(agent::run(
                Arc::clone(node),
                at.clone(),
                timing,
                Arc::clone(&counters),
                chance.fork(),
            ))
        })
        .collect();
    while counters.connected.load(Ordering::Relaxed) < NODES / 2 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let history = History::default();
    let left = Arc::new(AtomicU64::new(requests));
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..CLIENTS {
        clients.spawn(client(number, at.clone(), Arc::clone(&left), Arc::clone(&history), chance.fork()));
    }
    // The scheduler is killed now and then, and another one takes over its state, elsewhere.
    for part in (0..3).rev() {
        while left.load(Ordering::Relaxed) > requests / 4 * (part + 1) {
            let found: Vec<String> = violations(&history.lock().unwrap().clone(), &held(&nodes))
                .into_iter()
                .filter(|text| text.contains("over capacity"))
                .collect();
            assert!(found.is_empty(), "{found:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        drop(scheduler);
        let (next, address) = start(state.path());
        scheduler = next;
        to.send(address).unwrap();
    }
    while clients.join_next().await.is_some() {}
    let found = settled(&history, &nodes).await;
    assert!(found.is_empty(), "seed {seed}: {found:#?}");
    let told = |wanted| history.lock().unwrap().values().filter(|entry| entry.told == wanted).count();
    println!("{} kept, {} over, {} unknown", told(Told::Committed), told(Told::Over), told(Told::Unknown));
    assert!(told(Told::Over) > usize::try_from(requests).unwrap() / 10, "hardly anything was done");
    agents.iter().for_each(JoinHandle::abort);
    drop(scheduler);
}
