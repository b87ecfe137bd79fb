//! Nobody is promised what is not there, and nobody's promise is lost or doubled: fifty clients on twenty nodes, with
//! deaths of every party. Clients die in the middle of calls; agents restart and are cut off; the scheduler that leads is
//! killed, or stands still and wakes up believing that it leads; a member of etcd is killed and comes back.
//!
//! ```text
//!  clients ── calls and answers ──▶ history ┐
//!  parties ── looks, every 10 ms ─▶ logs ───┼─▶ judge
//!  the region's list at the end ──▶ reads ──┘
//! ```
//! The judge itself is tried with nodes that really are broken: they must be found guilty.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use serio_api::v1::{ListPlacementsRequest, Placement};
use serio_scheduler::simulate::{
    Chance,
    agent::{self, Counters, Peer, Timing},
};
use tokio::{
    sync::watch,
    task::{JoinHandle, JoinSet},
};

use crate::{
    clients::{Client, Scene, life},
    judge::{Call, Life, NodeLog, Op, violations},
    party::{Fault, Party},
    processes::{Cluster, Process, connect, leader, memory_folder, scheduler},
};

const CLIENTS: u64 = 50;
const NODES: usize = 20;
/// Of each node: little enough that clients wait for each other.
const VCPUS: u64 = 18;
/// Of all nodes together, to the end.
const KEPT: u64 = 120;

/// What is over is remembered for ten minutes by the region, in a long run for less than that.
const REMEMBERED: Duration = Duration::from_secs(590);

/// What happens to the region.
#[derive(Debug, Clone, Copy)]
enum Death {
    /// The scheduler that leads is killed; another one starts.
    Leader,
    /// It stands still for longer than its lease, and wakes up.
    Sleep,
    /// A member of etcd is killed, and starts again later.
    Member(usize),
}

/// A run.
#[derive(Clone, Copy)]
struct Plan {
    requests: u64,
    etcd: bool,
    deaths: usize,
    fault: Option<Fault>,
    /// What everything together may take.
    limit: Duration,
    /// What the region gets to come to rest at the end.
    rest: Duration,
}

struct Region {
    folder: tempfile::TempDir,
    cluster: Option<Cluster>,
    schedulers: Vec<(Process, String)>,
    addresses: watch::Sender<Vec<String>>,
}

impl Region {
    /// None: there is no etcd.
    async fn start(etcd: bool) -> Option<Self> {
        let folder = memory_folder();
        let cluster = if etcd { Some(Cluster::start(folder.path(), 3).await?.0) } else { None };
        let (addresses, _) = watch::channel(Vec::new());
        let mut region = Self { folder, cluster, schedulers: Vec::new(), addresses };
        for _ in 0..if etcd { 2 } else { 1 } {
            region.add();
        }
        Some(region)
    }

    fn add(&mut self) {
        let state = self.folder.path().display().to_string();
        let added = match &self.cluster {
            Some(cluster) => scheduler(&["--store", &cluster.store()]),
            None => scheduler(&["--state-dir", &state]),
        };
        self.schedulers.push(added);
        self.addresses.send_replace(self.names());
    }

    fn names(&self) -> Vec<String> {
        self.schedulers.iter().map(|(_, address)| address.clone()).collect()
    }

    async fn leading(&self) -> usize {
        let leader = leader(&self.names()).await;
        self.schedulers.iter().position(|(_, address)| *address == leader).unwrap()
    }

    async fn die(&mut self, death: Death) {
        match (death, &mut self.cluster) {
            (Death::Leader, _) | (_, None) => {
                let leading = self.leading().await;
                drop(self.schedulers.remove(leading));
                if !self.schedulers.is_empty() {
                    self.leading().await;
                }
                self.add();
            }
            (Death::Sleep, Some(_)) => {
                let leading = self.leading().await;
                let sleeper = self.schedulers.remove(leading);
                sleeper.0.signal("-STOP");
                self.leading().await;
                // While it sleeps the other one gets to work.
                tokio::time::sleep(Duration::from_millis(500)).await;
                sleeper.0.signal("-CONT");
                self.schedulers.push(sleeper);
            }
            (Death::Member(number), Some(cluster)) => {
                cluster.kill(number);
                tokio::time::sleep(Duration::from_millis(500)).await;
                cluster.restart(number);
            }
        }
    }

    /// All that the region knows of placements, and when it was asked.
    async fn placements(&self) -> Option<BTreeMap<String, Placement>> {
        let mut all = BTreeMap::new();
        let mut scheduler = connect(&leader(&self.names()).await);
        let mut page_token = String::new();
        loop {
            let request = ListPlacementsRequest { page_size: 1000, page_token, ..Default::default() };
            let page = scheduler.list_placements(request).await.ok()?.into_inner();
            let keyed = |placement: Placement| {
                (placement.name.strip_prefix("placements/").unwrap().to_owned(), placement)
            };
            all.extend(page.placements.into_iter().map(keyed));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Some(all);
            }
        }
    }
}

/// Everybody, and what is seen of them.
struct Run {
    plan: Plan,
    scene: Arc<Scene>,
    parties: Vec<Arc<Party>>,
    agents: Vec<JoinHandle<()>>,
    counters: Arc<Counters>,
    chance: Chance,
    /// What it is doing, for the one who waits in vain.
    doing: Arc<Mutex<String>>,
}

impl Run {
    fn start(plan: Plan, region: &Region, mut chance: Chance, doing: Arc<Mutex<String>>) -> Self {
        let addresses = region.addresses.subscribe();
        let scene = Arc::new(Scene::new(addresses.clone(), plan.requests, KEPT));
        let parties: Vec<Arc<Party>> = (0..NODES)
            .map(|number| {
                // One in four is broken; where the others have room nobody needs one that overbooks: then all.
                let fault = plan.fault.filter(|fault| number % 4 == 0 || *fault == Fault::Overbooks);
                Arc::new(Party::new(number, VCPUS, fault, &mut chance))
            })
            .collect();
        let timing = Timing {
            lease: Duration::from_millis(300),
            usage: Duration::from_millis(500),
            churn: Duration::from_secs(4),
            partition: Duration::from_secs(25),
        };
        let counters = Arc::new(Counters::default());
        let run = |party: &Arc<Party>| {
            let (party, counters) = (Arc::clone(party), Arc::clone(&counters));
            tokio::spawn(agent::run(party, addresses.clone(), timing, counters, chance.fork()))
        };
        let agents = parties.iter().map(run).collect();
        Self { plan, scene, parties, agents, counters, chance, doing }
    }

    fn doing(&self, what: impl Into<String>) {
        *self.doing.lock().unwrap() = what.into();
    }

    fn connected(&self) -> usize {
        self.counters.connected.load(Ordering::Relaxed)
    }

    fn left(&self) -> u64 {
        self.scene.left.load(Ordering::Relaxed)
    }

    /// Waits for that. Who waits too long is told by the limit of the whole run.
    async fn until(&self, what: &str, done: impl Fn(&Self) -> bool) {
        while !done(self) {
            self.doing(format!(
                "{what}; {} of {NODES} agents are connected, {} requests left",
                self.connected(),
                self.left()
            ));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Clients at work, and deaths in between, each when its share of the requests is done.
    async fn work(&mut self, region: &mut Region) {
        self.until("waits for the first agents", |run| run.connected() > NODES / 2).await;
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS {
            clients.spawn(Client::new(Arc::clone(&self.scene), self.chance.fork()).run());
        }
        let shares = u64::try_from(self.plan.deaths).unwrap() + 1;
        for share in 1..shares {
            let wanted = self.plan.requests - self.plan.requests * share / shares;
            self.until(&format!("waits until {wanted} requests are left"), |run| run.left() <= wanted).await;
            let death = match share % 3 {
                1 => Death::Leader,
                2 => Death::Member(usize::try_from(self.chance.below(3)).unwrap()),
                _ => Death::Sleep,
            };
            self.doing(format!("waits for the region after {death:?}"));
            region.die(death).await;
            self.until(&format!("waits for agents after {death:?}"), |run| run.connected() > NODES / 2).await;
        }
        self.doing("waits for the clients");
        while let Some(ended) = clients.join_next().await {
            ended.unwrap();
        }
    }

    /// What is still not as it is to be, after everybody had time to say what is over.
    async fn rest(&self, region: &Region) -> Vec<String> {
        // Nothing that is kept is lost by a restart.
        self.parties.iter().for_each(|party| party.restart());
        let begin = Instant::now();
        loop {
            self.doing("waits for the region to come to rest");
            let invoked = self.scene.now();
            let found = match region.placements().await {
                Some(known) => {
                    let found = self.unsettled(&known);
                    if found.is_empty() || begin.elapsed() > self.plan.rest {
                        self.read(invoked, &known);
                    }
                    found
                }
                None => vec!["the region does not answer".to_owned()],
            };
            if found.is_empty() || begin.elapsed() > self.plan.rest {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// The last word of the region on each request is part of the history.
    fn read(&self, invoked: Duration, known: &BTreeMap<String, Placement>) {
        let returned = self.scene.now();
        for (key, request) in self.scene.history.lock().unwrap().iter_mut() {
            let last = request.ops.iter().map(|op| op.answer.map_or(op.invoked, |(at, _)| at)).max();
            if !known.contains_key(key) && last.is_some_and(|last| last + REMEMBERED < returned) {
                continue;
            }
            let answer = Some((returned, known.get(key).map_or(Life::None, life)));
            request.ops.push(Op { call: Call::Read, invoked, answer });
        }
    }

    /// The region and its nodes know the same.
    fn unsettled(&self, known: &BTreeMap<String, Placement>) -> Vec<String> {
        let mut found = Vec::new();
        let mut held: BTreeMap<String, String> = BTreeMap::new();
        for party in &self.parties {
            for promise in party.held() {
                let kept = known.get(&promise.key).is_some_and(|placement| {
                    life(placement) == Life::Committed && placement.token == promise.token
                });
                if !kept {
                    found.push(format!("{} is still held by {}", promise.key, party.name()));
                }
                held.insert(promise.key, promise.token);
            }
        }
        for (key, placement) in known {
            match life(placement) {
                Life::Committed if held.get(key) != Some(&placement.token) => {
                    found.push(format!("{key} is promised, and lost on {}", placement.node));
                }
                Life::Committed | Life::Released => {}
                other => found.push(format!("{key} is still {other:?}")),
            }
        }
        found
    }

    fn report(&self, took: Duration) {
        let mut last: BTreeMap<String, usize> = BTreeMap::new();
        for request in self.scene.history.lock().unwrap().values() {
            let life = request.ops.last().and_then(|op| op.answer).map(|(_, life)| format!("{life:?}"));
            *last.entry(life.unwrap_or_default()).or_default() += 1;
        }
        let count = |number: &std::sync::atomic::AtomicU64| number.load(Ordering::Relaxed);
        println!(
            "{} requests in {:.1} s: {last:?}; {} calls were repeated, {} clients died, agents restarted {} times and connected {} times",
            self.plan.requests,
            took.as_secs_f64(),
            count(&self.scene.repeated),
            count(&self.scene.died),
            count(&self.counters.restarts),
            count(&self.counters.welcomes),
        );
    }
}

/// Looks at all nodes until told to stop.
fn look(scene: Arc<Scene>, parties: Vec<Arc<Party>>, stop: Arc<AtomicBool>) -> JoinHandle<Vec<NodeLog>> {
    tokio::spawn(async move {
        let mut logs: Vec<NodeLog> =
            parties.iter().map(|party| NodeLog::new(party.name(), party.vcpus)).collect();
        loop {
            let last = stop.load(Ordering::Relaxed);
            for (party, log) in parties.iter().zip(&mut logs) {
                let begin = scene.now();
                let list = party.held();
                log.look((begin, scene.now()), &list);
            }
            if last {
                return logs;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
}

/// Every violation; none where there is no etcd.
async fn tried(plan: Plan, seed: u64, doing: Arc<Mutex<String>>) -> Option<Vec<String>> {
    let begin = Instant::now();
    let mut region = Region::start(plan.etcd).await?;
    let mut run = Run::start(plan, &region, Chance::new(seed), doing);
    let stop = Arc::new(AtomicBool::new(false));
    let looks = look(Arc::clone(&run.scene), run.parties.clone(), Arc::clone(&stop));
    run.work(&mut region).await;
    let took = begin.elapsed();
    let unsettled = run.rest(&region).await;
    stop.store(true, Ordering::Relaxed);
    let logs = looks.await.unwrap();
    run.agents.iter().for_each(JoinHandle::abort);
    run.report(took);
    run.doing("judges");
    let mut found = violations(&run.scene.history.lock().unwrap(), &logs);
    found.extend(unsettled);
    found.append(&mut run.scene.strange.lock().unwrap());
    println!("judged after {:.1} s in all", begin.elapsed().as_secs_f64());
    Some(found)
}

async fn verdict(plan: Plan) -> Option<Vec<String>> {
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    let doing = Arc::new(Mutex::new(String::from("starts the region")));
    match tokio::time::timeout(plan.limit, tried(plan, seed, Arc::clone(&doing))).await {
        Ok(found) => found,
        Err(_) => {
            panic!("seed {seed}: not done after {} s: it {}", plan.limit.as_secs(), doing.lock().unwrap())
        }
    }
}

const PLAN: Plan = Plan {
    requests: 600,
    etcd: false,
    deaths: 2,
    fault: None,
    limit: Duration::from_secs(100),
    rest: Duration::from_secs(25),
};

/// scripts/test sets it always, and to nothing for the plain run.
fn long() -> bool {
    std::env::var_os("SERIO_TEST_LONG").is_some_and(|value| !value.is_empty())
}

async fn innocent(plan: Plan) {
    let Some(found) = verdict(plan).await else { return };
    assert!(found.is_empty(), "{} violations:\n{}", found.len(), found[..found.len().min(20)].join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_scheduler_that_dies_loses_and_doubles_nothing() {
    innocent(PLAN).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_region_loses_and_doubles_nothing_whoever_dies() {
    let plan = Plan { requests: 2_000, etcd: true, deaths: 3, ..PLAN };
    let longer = Plan { requests: 100_000, deaths: 45, limit: Duration::from_secs(7_200), ..plan };
    innocent(if long() { longer } else { plan }).await;
}

async fn guilty(fault: Fault, words: &[&str]) {
    let plan = Plan { requests: 300, deaths: 0, fault: Some(fault), rest: Duration::from_secs(2), ..PLAN };
    let found = verdict(plan).await.expect("this needs no etcd");
    for word in words {
        assert!(found.iter().any(|text| text.contains(word)), "{fault:?} is not found {word}: {found:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_book_twice_are_found_guilty() {
    guilty(Fault::BooksTwice, &["is doubled"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_forget_at_a_restart_are_found_guilty() {
    guilty(Fault::Forgets, &["is lost on", "no order of calls"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_that_promise_more_than_they_have_are_found_guilty() {
    guilty(Fault::Overbooks, &["is over capacity", "promised"]).await;
}
