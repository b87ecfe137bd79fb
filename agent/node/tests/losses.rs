//! What a host can do to VMs: kill one, run out of disk, lose a tap, run out of memory. Each time the reason is in the API soon
//! after, and the VM beside it counts on.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use common::{
    Seriod,
    disk::Disk,
    guest::{self, counts_beyond, furnish, rounds, run},
};
use serio_api::v1::{
    Event, GetVmRequest, NicSpec, RestartPolicy, StartVmRequest, StopVmRequest, Vm, VmSpec, VmState,
    VmTrouble, WatchEventsRequest, node_service_client::NodeServiceClient,
    vm_service_client::VmServiceClient,
};
use tonic::{Streaming, transport::Channel};

type Client = VmServiceClient<Channel>;

/// The promise is a second; a busy machine gets more. What it was is printed.
const SOON: Duration = Duration::from_secs(5);
const DEADLINE: Duration = Duration::from_secs(60);

/// A small one that stays as it ended.
fn spec() -> VmSpec {
    VmSpec { restart_policy: RestartPolicy::Never.into(), ..guest::spec() }
}

fn full(name: &str) -> String {
    format!("vdcs/ardesio/vms/{name}")
}

async fn get(client: &mut Client, name: &str) -> Vm {
    client.get_vm(GetVmRequest { name: full(name) }).await.unwrap().into_inner()
}

fn state(vm: &Vm) -> (VmState, u32) {
    let status = vm.status.as_ref().unwrap();
    (status.state(), status.pid)
}

fn told(what: &str, took: Duration) {
    eprintln!("{what}: in the API after {took:?}");
    assert!(took < SOON, "{what}: only after {took:?}");
}

/// Waits until a VM is as wanted, and says how long that took.
async fn until(client: &mut Client, name: &str, wanted: impl Fn(&Vm) -> bool) -> (Vm, Duration) {
    let began = Instant::now();
    loop {
        let vm = get(client, name).await;
        if wanted(&vm) {
            return (vm, began.elapsed());
        }
        assert!(began.elapsed() < DEADLINE, "{vm:#?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn troubles(vm: &Vm) -> &[VmTrouble] {
    &vm.status.as_ref().unwrap().troubles
}

/// All events of a VM from now on.
async fn events(channel: &Channel, name: &str) -> Streaming<Event> {
    let mut client = NodeServiceClient::new(channel.clone());
    let request = WatchEventsRequest { from: 0, follow: true, resource_prefix: full(name) };
    client.watch_events(request).await.unwrap().into_inner()
}

async fn event(events: &mut Streaming<Event>, kind: &str) -> Event {
    let next = async {
        loop {
            let event = events.message().await.unwrap().expect("it follows");
            if event.kind == kind {
                return event;
            }
        }
    };
    tokio::time::timeout(DEADLINE, next).await.unwrap_or_else(|_| panic!("no event {kind}"))
}

/// A node whose guest counts, and beside it nothing yet.
async fn beside() -> Result<(Seriod, Channel, Vm), String> {
    let mut seriod = Seriod::new("");
    let channel = furnish(&mut seriod).await?;
    let vm = run(&mut Client::new(channel.clone()), "beside", spec()).await;
    counts_beyond(&seriod, &vm.uid, 0).await;
    Ok((seriod, channel, vm))
}

/// It is in the same process and counts.
async fn is_untouched(seriod: &Seriod, client: &mut Client, before: &Vm) {
    let now = get(client, "beside").await;
    assert_eq!((state(&now), troubles(&now)), (state(before), &[][..]));
    counts_beyond(seriod, &now.uid, rounds(seriod, &now.uid)).await;
}

#[tokio::test]
async fn a_vmm_is_killed() {
    let (seriod, channel, beside) = match beside().await {
        Ok(node) => node,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let mut client = Client::new(channel.clone());
    let vm = run(&mut client, "web", spec()).await;
    let mut events = events(&channel, "web").await;
    let killed = Instant::now();
    seriod.kill_vmm(state(&vm).1);
    let event = event(&mut events, "failed").await;
    told("kill -9", killed.elapsed());
    assert!(event.message.contains("SIGKILL"), "{}", event.message);
    let (vm, _) = until(&mut client, "web", |vm| state(vm).0 == VmState::Failed).await;
    let end = vm.status.unwrap().last_end.unwrap();
    assert_eq!(end.kind, "died");
    assert!(end.reason.contains("SIGKILL"), "{}", end.reason);
    is_untouched(&seriod, &mut client, &beside).await;
}

/// A guest whose every round needs a new block of its disk.
fn hungry() -> VmSpec {
    let cmdline = "mini.test=writer mini.places=4000 mini.wait_ms=100000000".to_owned();
    VmSpec { cmdline, root_disk_bytes: 32 << 20, ..spec() }
}

fn is_held(vm: &Vm) -> bool {
    troubles(vm).iter().any(|trouble| trouble.kind == "disk-held")
}

#[tokio::test]
async fn the_hosts_disk_is_full() {
    let mut seriod = Seriod::new("[health]\ndisk_floor = \"0\"\n");
    let disk = match Disk::mount(&seriod.dir.path().join("state"), 48) {
        Ok(disk) => disk,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let channel = match furnish(&mut seriod).await {
        Ok(channel) => channel,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let mut client = Client::new(channel.clone());
    // All of its blocks are there after some rounds.
    let beside = run(&mut client, "beside", spec()).await;
    counts_beyond(&seriod, &beside.uid, 10).await;
    let web = run(&mut client, "web", hungry()).await;
    counts_beyond(&seriod, &web.uid, 3).await;
    let fill = disk.fill();
    let (vm, took) = until(&mut client, "web", is_held).await;
    told("a full disk", took);
    let trouble = &troubles(&vm)[0];
    assert_eq!(trouble.device, "vdcs/ardesio/volumes/web-root");
    assert!(trouble.reason.contains("disk is full"), "{}", trouble.reason);
    assert_eq!(state(&vm), state(&web), "it is held, not ended");

    // A seriod that starts then learns it too.
    seriod.kill();
    seriod.start();
    let channel = seriod.connect().await.unwrap();
    let mut client = Client::new(channel.clone());
    let (vm, _) = until(&mut client, "web", is_held).await;
    assert_eq!(state(&vm), state(&web));

    let before = rounds(&seriod, &web.uid);
    fs::remove_file(fill).unwrap();
    let (vm, took) = until(&mut client, "web", |vm| troubles(vm).is_empty()).await;
    told("room again", took);
    assert_eq!(state(&vm), state(&web));
    let counted = counts_beyond(&seriod, &web.uid, before).await;
    assert!(get(&mut client, "web").await.status.unwrap().last_end.is_none());
    is_untouched(&seriod, &mut client, &beside).await;
    // What it was told to be written is there.
    let stop = StopVmRequest { name: full("web"), force: true, ..Default::default() };
    client.stop_vm(stop).await.unwrap();
    let start = StartVmRequest { name: full("web"), ..Default::default() };
    client.start_vm(start).await.unwrap();
    counts_beyond(&seriod, &web.uid, counted).await;
}

/// In the network namespace of a process.
fn ip_of(pid: i32, arguments: &str) -> Result<String, String> {
    let mut nsenter = Command::new("nsenter");
    nsenter.args(["-t", &pid.to_string(), "-n", "ip"]).args(arguments.split(' '));
    let output = nsenter.output().map_err(|e| format!("nsenter: {e}"))?;
    if !output.status.success() {
        return Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[tokio::test]
async fn a_tap_is_unplugged() {
    let mut seriod = Seriod::new("");
    seriod.own_network = true;
    if !Command::new("unshare").args(["-n", "ip", "link"]).output().is_ok_and(|done| done.status.success()) {
        return eprintln!("skipped: no network namespace can be made");
    }
    let channel = match furnish(&mut seriod).await {
        Ok(channel) => channel,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let mut client = Client::new(channel.clone());
    let nics = vec![NicSpec::default()];
    let web = VmSpec { cmdline: "mini.test=cable".to_owned(), nics: nics.clone(), ..spec() };
    let beside = run(&mut client, "beside", VmSpec { nics, ..spec() }).await;
    counts_beyond(&seriod, &beside.uid, 0).await;
    let web = run(&mut client, "web", web).await;
    let log = seriod.dir.path().join("state/vms").join(&web.uid).join("serial.log");
    says(&log, "cable: up").await;
    let links = match ip_of(seriod.pid(), "-o link") {
        Ok(links) => links,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let short = &web.uid[web.uid.len() - 8..];
    let tap = links.split_whitespace().find(|word| word.starts_with(&format!("srt{short}"))).unwrap();
    let mut events = events(&channel, "web").await;
    let pulled = Instant::now();
    ip_of(seriod.pid(), &format!("link del {}", tap.trim_end_matches(':'))).unwrap();
    let event = event(&mut events, "unplugged").await;
    told("ip link del", pulled.elapsed());
    assert!(event.message.contains("its tap is gone"), "{}", event.message);
    says(&log, "cable: down").await;
    let vm = get(&mut client, "web").await;
    assert_eq!(state(&vm), state(&web), "it goes on");
    let (trouble, nic) = (&troubles(&vm)[0], &vm.status.as_ref().unwrap().nics[0]);
    assert_eq!((trouble.kind.as_str(), &trouble.device), ("unplugged", &nic.mac));
    is_untouched(&seriod, &mut client, &beside).await;
}

/// Waits until a log has it.
async fn says(log: &Path, what: &str) {
    let began = Instant::now();
    while !fs::read_to_string(log).unwrap_or_default().contains(what) {
        assert!(began.elapsed() < DEADLINE, "{}", fs::read_to_string(log).unwrap_or_default());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A group of version 1 with little memory; gone when dropped.
struct SmallGroup(std::path::PathBuf);

impl SmallGroup {
    fn new(bytes: u64) -> Result<Self, String> {
        let path = Path::new("/sys/fs/cgroup/memory").join(format!("serio-test-{}", std::process::id()));
        fs::create_dir(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let group = Self(path);
        let write = |file: &str, text: String| {
            fs::write(group.0.join(file), text).map_err(|e| format!("{}/{file}: {e}", group.0.display()))
        };
        write("memory.limit_in_bytes", bytes.to_string())?;
        // Where there is swap.
        let _ = write("memory.swappiness", "0".to_owned());
        Ok(group)
    }
}

impl Drop for SmallGroup {
    fn drop(&mut self) {
        // Its process may not be reaped yet.
        for _ in 0..1000 {
            match fs::remove_dir(&self.0) {
                Err(e) if e.raw_os_error() == Some(16) => std::thread::yield_now(),
                _ => return,
            }
        }
    }
}

/// Lets a process have little more memory than now: in its own group where cgroup v2 is in use, else in one of version 1.
fn squeeze(pid: u32) -> Result<Option<SmallGroup>, String> {
    const MORE: u64 = 8 << 20;
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).map_err(|e| e.to_string())?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::"));
    let own = own.map(|path| Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/')));
    if let Some(own) = own.filter(|own| own.join("memory.max").exists()) {
        let current = fs::read_to_string(own.join("memory.current")).map_err(|e| e.to_string())?;
        let current: u64 = current.trim().parse().map_err(|e| format!("{e}"))?;
        fs::write(own.join("memory.max"), (current + MORE).to_string()).map_err(|e| e.to_string())?;
        return Ok(None);
    }
    let group = SmallGroup::new(MORE)?;
    fs::write(group.0.join("cgroup.procs"), pid.to_string()).map_err(|e| e.to_string())?;
    Ok(Some(group))
}

#[tokio::test]
async fn memory_runs_out() {
    let (seriod, channel, beside) = match beside().await {
        Ok(node) => node,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let mut client = Client::new(channel.clone());
    let web = VmSpec { cmdline: "mini.test=memory".to_owned(), memory_bytes: 512 << 20, ..spec() };
    let vm = run(&mut client, "web", web).await;
    let log = seriod.dir.path().join("state/vms").join(&vm.uid).join("serial.log");
    says(&log, "memory: 1 MiB").await;
    let mut events = events(&channel, "web").await;
    let _group = match squeeze(state(&vm).1) {
        Ok(group) => group,
        Err(why) => return eprintln!("skipped: no group with little memory: {why}"),
    };
    let pid = state(&vm).1;
    let began = Instant::now();
    while seriod.vmms().contains(&pid) {
        if fs::read_to_string(&log).unwrap_or_default().contains("memory: all") {
            return eprintln!("skipped: this host's groups do not bound memory");
        }
        assert!(began.elapsed() < DEADLINE, "it is not killed");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let killed = Instant::now();
    let event = event(&mut events, "failed").await;
    told("out of memory", killed.elapsed());
    assert!(event.message.contains("memory ran out"), "{}", event.message);
    let (vm, _) = until(&mut client, "web", |vm| state(vm).0 == VmState::Failed).await;
    let end = vm.status.unwrap().last_end.unwrap();
    assert_eq!(end.kind, "died");
    assert!(end.reason.contains("memory ran out"), "{}", end.reason);
    is_untouched(&seriod, &mut client, &beside).await;
}
