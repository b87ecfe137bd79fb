//! A real `seriod` in a region of two real schedulers over a real etcd: it goes to the one that leads, whichever it asks
//! first, and to the next one when that dies. So does the CLI.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use common::Seriod;
use serio_api::v1::{
    AuditEntry, FenceNodeRecordRequest, GetCapacityRequest, GetLeaderRequest, SchedulerLink,
    WatchAuditRequest, node_service_client::NodeServiceClient,
    scheduler_service_client::SchedulerServiceClient,
};
use tokio_stream::StreamExt;
use tonic::transport::{Channel, Endpoint};

const ETCD: &str = "/usr/bin/etcd";
const PATIENCE: Duration = Duration::from_secs(30);
/// From the moment at which another scheduler leads.
const FOLLOWS_MAX: Duration = Duration::from_secs(3);

/// A process that ends with the value.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may be dead already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The scheduler and the CLI, or what is not there.
fn programs() -> Result<[PathBuf; 2], String> {
    let beside = Path::new(env!("CARGO_BIN_EXE_seriod")).parent().unwrap();
    let programs = ["serio-scheduler", "serio"].map(|name| beside.join(name));
    for needed in programs.iter().map(PathBuf::as_path).chain([Path::new(ETCD)]) {
        if !needed.exists() {
            return Err(format!("{} is not there", needed.display()));
        }
    }
    Ok(programs)
}

/// Room for a VM, always for the same one; asked of those hosts.
async fn place(cli: &Path, hosts: String) -> String {
    let cli = cli.to_owned();
    let run = move || {
        let place = [
            "place",
            "ardesio",
            "--vm",
            "web",
            "--vcpus",
            "1",
            "--memory",
            "64MiB",
            "--commit",
            "--request-id",
            "web",
        ];
        Command::new(cli).args(["--host", &hosts, "-o", "json"]).args(place).output().unwrap()
    };
    let done = tokio::task::spawn_blocking(run).await.unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let placement: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(
        (&placement["node"], &placement["state"]),
        (&"nodes/t".into(), &"PLACEMENT_STATE_COMMITTED".into())
    );
    placement["token"].to_string()
}

/// One member, and its address. Processes die here, no disk: its state need not be on one.
fn etcd(folder: &Path) -> (Process, String) {
    let sockets = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let [client, peer] = sockets.map(|socket| format!("http://{}", socket.local_addr().unwrap()));
    let child = Command::new(ETCD)
        .env_clear()
        .args(["--name", "m", "--initial-cluster", &format!("m={peer}")])
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .arg("--data-dir")
        .arg(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    (Process(child), client.trim_start_matches("http://").to_owned())
}

/// A scheduler as soon as it listens, and its URL. Etcd may not be there yet: then it is started again.
fn scheduler(program: &Path, store: &str) -> (Process, String) {
    let begin = Instant::now();
    while begin.elapsed() < PATIENCE {
        let mut child = Command::new(program)
            .args(["--insecure", "--listen", "127.0.0.1:0", "--store", &format!("etcd://{store}")])
            .env("RUST_LOG", "info")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let line = lines.by_ref().find(|line| line.contains("listening"));
        let process = Process(child);
        if let Some(line) = line {
            let address = line.split("address=").nth(1).unwrap().split_whitespace().next().unwrap();
            // What it says later must not fill the pipe.
            std::thread::spawn(move || lines.for_each(drop));
            return (process, format!("http://{address}"));
        }
    }
    panic!("no scheduler with the store {store} listens");
}

async fn leads(url: &str) -> bool {
    let endpoint = Endpoint::from_shared(url.to_owned()).unwrap().timeout(Duration::from_secs(1));
    let mut scheduler = SchedulerServiceClient::new(endpoint.connect_lazy());
    matches!(scheduler.get_leader(GetLeaderRequest {}).await, Ok(leader) if leader.get_ref().is_self)
}

/// As soon as that is so.
async fn until(what: &str, mut so: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !so().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, wait).await.is_ok(), "waited in vain: {what}");
}

async fn link(node: &mut NodeServiceClient<Channel>) -> SchedulerLink {
    node.get_capacity(GetCapacityRequest {}).await.unwrap().into_inner().scheduler.unwrap()
}

/// A node that was recorded as dead returns: what the scheduler then orders is noted as its order.
async fn a_fence_is_in_the_audit_log(seriod: &mut Seriod, url: &str) {
    seriod.kill();
    let endpoint = Endpoint::from_shared(url.to_owned()).unwrap();
    let scheduler = SchedulerServiceClient::new(endpoint.connect_lazy());
    let request = FenceNodeRecordRequest { name: "nodes/t".to_owned(), proof: "it was killed".to_owned() };
    until("its lease is over, and it is fenced", async || {
        scheduler.clone().fence_node_record(request.clone()).await.is_ok()
    })
    .await;
    seriod.start();
    let node = NodeServiceClient::new(seriod.connect().await.unwrap());
    until("the fence is in the audit log", async || {
        let lines = node.clone().watch_audit(WatchAuditRequest::default()).await.unwrap().into_inner();
        let lines: Vec<_> = lines.map(Result::unwrap).collect().await;
        let by_scheduler = |line: &AuditEntry| line.role == "scheduler" && line.who.ends_with(url);
        lines.iter().any(|line| {
            by_scheduler(line)
                && (line.what.as_str(), line.resource.as_str(), line.result.as_str())
                    == ("FenceNode", "nodes/t", "OK")
        })
    })
    .await;
}

#[tokio::test]
async fn the_node_is_with_the_scheduler_that_leads() {
    let [program, cli] = match programs() {
        Ok(programs) => programs,
        Err(why) => return println!("skipped: {why}"),
    };
    let memory = Path::new("/dev/shm");
    let folder = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let (_etcd, store) = etcd(folder.path());
    let (first, first_url) = scheduler(&program, &store);
    until("the first one leads", async || leads(&first_url).await).await;
    let (_second, second_url) = scheduler(&program, &store);

    // It asks one that follows first, and knows of nobody else.
    let mut seriod = Seriod::new(&format!(
        "[scheduler]\nurls = [\"{second_url}\"]\n[capacity]\nlease_interval_ms = 200\n"
    ));
    seriod.start();
    let mut node = NodeServiceClient::new(seriod.connect().await.unwrap());
    until("the node is with the leader", async || {
        let link = link(&mut node).await;
        link.connected && link.url == first_url
    })
    .await;

    // So does the CLI.
    let token = place(&cli, second_url.clone()).await;
    let killed = Instant::now();
    drop(first);
    // It waits for the next leader; of several it takes those that are there.
    let hosts = [second_url.clone(), format!("{first_url},{second_url}")];
    let [waits, several] = hosts.map(|hosts| {
        let cli = cli.clone();
        tokio::spawn(async move { place(&cli, hosts).await })
    });
    until("the other one leads", async || leads(&second_url).await).await;
    let led = Instant::now();
    until("the node is with the next leader", async || {
        let link = link(&mut node).await;
        link.connected && link.url == second_url
    })
    .await;
    let (all, follows) = (killed.elapsed(), led.elapsed());
    println!(
        "with the next leader {} ms after the death of the first, {} ms after that one leads",
        all.as_millis(),
        follows.as_millis()
    );
    assert!(follows < FOLLOWS_MAX, "{follows:?}");
    assert_eq!([waits.await.unwrap(), several.await.unwrap()], [token.clone(), token]);
    a_fence_is_in_the_audit_log(&mut seriod, &second_url).await;
}
