//! Processes of a region: members of etcd, and schedulers. They end with their values.

use std::{
    future::Future,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use serio_api::v1::{GetLeaderRequest, scheduler_service_client::SchedulerServiceClient};
use serio_scheduler::{simulate::Chance, store::etcd::Client as Etcd};
use tonic::transport::{Channel, Endpoint};

const ETCD: &str = "/usr/bin/etcd";
/// What anything gets that takes a moment.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// A call's time: longer than a scheduler waits for a node.
const CALL_WAIT: Duration = Duration::from_secs(4);

/// Waits for that, and says so when it does not come.
pub(crate) async fn within<T>(what: &str, limit: Duration, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(limit, future).await {
        Ok(value) => value,
        Err(_) => panic!("waited {} s for this, in vain: {what}", limit.as_secs()),
    }
}

/// A folder in memory where there is such a file system.
pub(crate) fn memory_folder() -> tempfile::TempDir {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let memory = mounts.lines().any(|line| line.split(' ').skip(1).take(2).eq(["/dev/shm", "tmpfs"]));
    if memory { tempfile::tempdir_in("/dev/shm") } else { tempfile::tempdir() }.unwrap()
}

/// A process of ours; it ends with the value.
pub(crate) struct Process(pub(crate) Child);

impl Process {
    pub(crate) fn signal(&self, name: &str) {
        let pid = self.0.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be dead already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Below those that outgoing connections get, so that a member that was killed finds its own free again.
fn free_ports(count: usize) -> Vec<u16> {
    let mut chance = Chance::new(uuid::Uuid::new_v4().as_u64_pair().0);
    let mut sockets = Vec::new();
    while sockets.len() < count {
        let port = u16::try_from(15_000 + chance.below(17_000)).unwrap();
        sockets.extend(std::net::TcpListener::bind(("127.0.0.1", port)));
    }
    sockets.iter().map(|socket| socket.local_addr().unwrap().port()).collect()
}

/// Members of etcd, on loopback.
pub(crate) struct Cluster {
    folder: PathBuf,
    clients: Vec<u16>,
    peers: Vec<u16>,
    more: Vec<String>,
    pub(crate) members: Vec<Process>,
}

impl Cluster {
    /// As soon as they answer; none where there is no etcd.
    pub(crate) async fn start(folder: &Path, count: usize) -> Option<(Self, Etcd)> {
        let cluster = Self::start_with(folder, count, &[])?;
        let etcd = Etcd::new(&cluster.addresses()).unwrap();
        let ready = async { while etcd.region_id().await.is_err() {} };
        within("etcd gets ready", PATIENCE, ready).await;
        Some((cluster, etcd))
    }

    /// With more arguments, and without a wait.
    pub(crate) fn start_with(folder: &Path, count: usize, more: &[&str]) -> Option<Self> {
        if !Path::new(ETCD).exists() {
            println!("skipped: there is no {ETCD} (Debian's etcd-server)");
            return None;
        }
        let ports = free_ports(count * 2);
        let (clients, peers) = ports.split_at(count);
        let mut cluster = Self {
            folder: folder.to_owned(),
            clients: clients.to_vec(),
            peers: peers.to_vec(),
            more: more.iter().map(|text| (*text).to_owned()).collect(),
            members: Vec::new(),
        };
        cluster.members = (0..count).map(|number| cluster.member(number)).collect();
        Some(cluster)
    }

    fn member(&self, number: usize) -> Process {
        let scheme = if self.more.iter().any(|text| text == "--cert-file") { "https" } else { "http" };
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let all: Vec<String> =
            self.peers.iter().enumerate().map(|(number, port)| format!("m{number}={}", url(*port))).collect();
        let (client, peer) =
            (format!("{scheme}://127.0.0.1:{}", self.clients[number]), url(self.peers[number]));
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.join(format!("m{number}.log")))
            .unwrap();
        let child = Command::new(ETCD)
            .env_clear()
            .args(["--name", &format!("m{number}"), "--initial-cluster", &all.join(",")])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .arg("--data-dir")
            .arg(self.folder.join(format!("m{number}")))
            .args(&self.more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Process(child)
    }

    /// A member dies.
    pub(crate) fn kill(&mut self, number: usize) {
        let _ = self.members[number].0.kill();
        let _ = self.members[number].0.wait();
    }

    /// It starts again, with what it had.
    pub(crate) fn restart(&mut self, number: usize) {
        self.members[number] = self.member(number);
    }

    pub(crate) fn addresses(&self) -> Vec<String> {
        self.clients.iter().map(|port| format!("127.0.0.1:{port}")).collect()
    }

    pub(crate) fn store(&self) -> String {
        format!("etcd://{}", self.addresses().join(","))
    }
}

/// A scheduler with those arguments, as soon as it listens, and its address.
pub(crate) fn scheduler(arguments: &[&str]) -> (Process, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_serio-scheduler"))
        .args(["--insecure", "--listen", "127.0.0.1:0"])
        .args(arguments)
        .env("RUST_LOG", "warn,serio_scheduler::region=info,serio_scheduler=info,serio_scheduler::owner=warn,serio_scheduler::service=warn")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let line = lines.by_ref().find(|line| line.contains("listening")).expect("the scheduler listens");
    let address = line.split("address=").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    let name = address.clone();
    std::thread::spawn(move || lines.for_each(|line| println!("{name}: {line}")));
    (Process(child), address)
}

pub(crate) fn connect(address: &str) -> SchedulerServiceClient<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    SchedulerServiceClient::new(endpoint.timeout(CALL_WAIT).tcp_nodelay(true).connect_lazy())
}

pub(crate) async fn leads(address: &str) -> bool {
    let asked = tokio::time::timeout(Duration::from_secs(1), async {
        connect(address).get_leader(GetLeaderRequest {}).await
    });
    matches!(asked.await, Ok(Ok(leader)) if leader.get_ref().is_self)
}

/// Which of them leads, as soon as one does.
pub(crate) async fn leader(addresses: &[String]) -> String {
    let found = async {
        loop {
            for address in addresses {
                if leads(address).await {
                    return address.clone();
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(&format!("one of {addresses:?} leads"), PATIENCE, found).await
}
