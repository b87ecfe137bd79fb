//! `kill -9` of seriod at random moments, while three VMs with the mini guest start, stop, write their disks, are deleted
//! and made again, on the machine's own KVM; now and then a VMM is killed too. After each death the next seriod must find
//! state and processes in agreement: no orphan, no lost VM, no double start. Each guest says what it has flushed and what
//! it finds when it starts: nothing flushed may be lost, and nobody else may write the same disk. `SERIO_KILLS` sets how
//! often (100), `SERIO_SEED` repeats a run.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use common::{
    Seriod, import_image, mini_guest,
    writer::{Logs, Shown, examine},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serio_api::v1::{
    CreateVdcRequest, CreateVmRequest, DeleteVmRequest, ListVmsRequest, ListVolumesRequest, Quota,
    RestartPolicy, StartVmRequest, StopVmRequest, Vm, VmSpec, VmState, vdc_service_client::VdcServiceClient,
    vm_service_client::VmServiceClient, volume_service_client::VolumeServiceClient,
};
use tonic::{Code, Status, transport::Channel};

/// A VMM without a VM ends after 10 s.
const STRAY: Duration = Duration::from_secs(15);

const NAMES: [&str; 3] = ["one", "two", "three"];

/// One in so many deaths of seriod takes a VMM along: its VM is started again after a second.
const VMM_DIES: u32 = 10;

/// What a client knows of a VM from the answers it got. An operation without an answer leaves it open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    Exists,
    Absent,
    Open,
}

type Knowledge = Arc<Mutex<BTreeMap<&'static str, Known>>>;

fn full(name: &str) -> String {
    format!("vdcs/ardesio/vms/{name}")
}

fn create(name: &str) -> CreateVmRequest {
    CreateVmRequest {
        request_id: String::new(),
        parent: "vdcs/ardesio".to_owned(),
        vm_id: name.to_owned(),
        spec: Some(VmSpec {
            vcpus: 1,
            memory_bytes: 32 << 20,
            image: "images/mini".to_owned(),
            root_disk_bytes: 1 << 20,
            restart_policy: RestartPolicy::OnFailure.into(),
            ..VmSpec::default()
        }),
        start: true,
        ..Default::default()
    }
}

/// One random operation; says what is known afterwards.
async fn operate(
    client: &mut VmServiceClient<Channel>,
    name: &'static str,
    choice: u32,
) -> Result<Known, Status> {
    let request_id = String::new();
    match choice {
        0..=2 => client.create_vm(create(name)).await.map(|_| Known::Exists),
        3..=5 => client
            .start_vm(StartVmRequest { request_id, name: full(name), ..Default::default() })
            .await
            .map(|_| Known::Exists),
        6..=8 => {
            let stop = StopVmRequest {
                request_id,
                name: full(name),
                force: true,
                timeout: None,
                ..Default::default()
            };
            client.stop_vm(stop).await.map(|_| Known::Exists)
        }
        _ => {
            let delete = DeleteVmRequest {
                request_id,
                name: full(name),
                keep_root_volume: false,
                force: true,
                ..Default::default()
            };
            client.delete_vm(delete).await.map(|_| Known::Absent)
        }
    }
}

/// Works on one VM until seriod is gone.
async fn work(channel: Channel, name: &'static str, mut rng: StdRng, knowledge: Knowledge) {
    let mut client = VmServiceClient::new(channel);
    loop {
        let before = knowledge.lock().unwrap().insert(name, Known::Open).unwrap();
        let result = operate(&mut client, name, rng.random_range(0..10)).await;
        let known = match result {
            Ok(known) => known,
            Err(status) => match status.code() {
                Code::NotFound => Known::Absent,
                Code::AlreadyExists => Known::Exists,
                // Refused: nothing has changed.
                Code::FailedPrecondition | Code::Aborted => before,
                Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal if gone(&status) => {
                    return;
                }
                _ => panic!("{name}: {status:?}"),
            },
        };
        knowledge.lock().unwrap().insert(name, known);
        // Not a wait for something: guests shall write between the operations.
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..60))).await;
    }
}

/// Whether the connection broke, rather than seriod refusing.
fn gone(status: &Status) -> bool {
    tonic_types::StatusExt::get_error_details(status).error_info().is_none()
}

async fn list(channel: &Channel) -> Vec<Vm> {
    let answer = VmServiceClient::new(channel.clone()).list_vms(ListVmsRequest::default()).await;
    answer.unwrap().into_inner().vms
}

fn state(vm: &Vm) -> VmState {
    vm.status.as_ref().unwrap().state()
}

/// Compares what seriod says, what the clients know, and what runs. Returns the VMs' processes.
async fn check(
    seriod: &Seriod,
    channel: &Channel,
    knowledge: &Knowledge,
    strays: &mut BTreeMap<u32, Instant>,
) -> Vec<u32> {
    let deadline = Instant::now() + Duration::from_secs(30);
    let vms = loop {
        let vms = list(channel).await;
        let settled =
            vms.iter().all(|vm| matches!(state(vm), VmState::Running | VmState::Stopped | VmState::Failed));
        if settled {
            break vms;
        }
        assert!(Instant::now() < deadline, "the VMs do not settle: {vms:#?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let mut said: Vec<u32> =
        vms.iter().map(|vm| vm.status.as_ref().unwrap().pid).filter(|pid| *pid != 0).collect();
    said.sort_unstable();
    let there = seriod.vmms();
    assert!(said.iter().all(|pid| there.contains(pid)), "{said:?} should run, {there:?} do: {vms:#?}");
    // A VMM that got no VM before seriod died runs no guest, and ends by itself within its time.
    strays.retain(|pid, _| there.contains(pid));
    for pid in there.iter().filter(|pid| !said.contains(pid)) {
        let since = strays.entry(*pid).or_insert_with(Instant::now);
        assert!(since.elapsed() < STRAY, "process {pid} belongs to no VM: {vms:#?}");
    }
    for vm in &vms {
        assert_ne!(state(vm), VmState::Failed, "{vm:#?}");
        // The writer never ends by itself. A VMM beside another one would be refused: the volume is in use.
        let end = vm.status.as_ref().unwrap().last_end.as_ref();
        assert!(end.is_none_or(|end| ["stopped", "died"].contains(&end.kind.as_str())), "{vm:#?}");
    }
    settle_knowledge(&vms, &mut knowledge.lock().unwrap());
    let volumes = VolumeServiceClient::new(channel.clone()).list_volumes(ListVolumesRequest::default()).await;
    let volumes = volumes.unwrap().into_inner().volumes;
    let on_disk = std::fs::read_dir(seriod.dir.path().join("state/volumes")).unwrap().count();
    assert_eq!((volumes.len(), on_disk), (vms.len(), vms.len()), "volumes: {volumes:#?}");
    said
}

/// What the clients know is what is there; and what was open is known now.
fn settle_knowledge(vms: &[Vm], knowledge: &mut BTreeMap<&'static str, Known>) {
    for name in NAMES {
        let exists = vms.iter().any(|vm| vm.name == full(name));
        match knowledge[name] {
            Known::Exists => assert!(exists, "{name} is lost"),
            Known::Absent => assert!(!exists, "{name} is back"),
            Known::Open => {}
        }
        knowledge.insert(name, if exists { Known::Exists } else { Known::Absent });
    }
}

async fn furnish(channel: Channel, kernel: &[u8]) {
    import_image(channel.clone(), "mini", "mini.test=writer", kernel, &[]).await;
    let quota = Quota { vcpus: 8, memory_bytes: 256 << 20, storage_bytes: 64 << 20, ..Default::default() };
    let vdc =
        CreateVdcRequest { vdc_id: "ardesio".to_owned(), quota: Some(quota), ..CreateVdcRequest::default() };
    VdcServiceClient::new(channel).create_vdc(vdc).await.unwrap();
}

/// Sometimes a VMM dies along with seriod. Returns whether one did.
fn kill_a_vmm(seriod: &Seriod, rng: &mut StdRng) -> bool {
    let vmms = seriod.vmms();
    if vmms.is_empty() || !rng.random_ratio(1, VMM_DIES) {
        return false;
    }
    seriod.kill_vmm(vmms[rng.random_range(0..vmms.len())]);
    true
}

/// At the end all can be deleted, and nothing is left.
async fn clear(seriod: &Seriod, channel: &Channel) {
    for vm in list(channel).await {
        let delete = DeleteVmRequest { name: vm.name, force: true, ..DeleteVmRequest::default() };
        VmServiceClient::new(channel.clone()).delete_vm(delete).await.unwrap();
    }
    let deadline = Instant::now() + STRAY;
    while !seriod.vmms().is_empty() {
        assert!(Instant::now() < deadline, "orphans: {:?}", seriod.vmms());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for folder in ["run/vms", "state/vms", "state/volumes"] {
        assert_eq!(std::fs::read_dir(seriod.dir.path().join(folder)).unwrap().count(), 0, "{folder}");
    }
}

fn number(variable: &str, absent: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(absent)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn seriod_is_killed_a_hundred_times() {
    let mut seriod = Seriod::new("");
    let kernel = match seriod.with_programs().and_then(|()| mini_guest()) {
        Ok(kernel) => kernel,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let (kills, seed) = (number("SERIO_KILLS", 100), number("SERIO_SEED", rand::random()));
    eprintln!("SERIO_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    seriod.start();
    furnish(seriod.connect().await.unwrap(), &kernel).await;
    let knowledge: Knowledge = Arc::new(Mutex::new(NAMES.map(|name| (name, Known::Absent)).into()));
    let (mut adopted, mut vmms_killed, mut strays) = (0, 0, BTreeMap::new());
    let (mut logs, vms) = (Logs::default(), seriod.dir.path().join("state/vms"));
    for _ in 0..kills {
        let channel = seriod.connect().await.unwrap();
        let workers: Vec<_> = NAMES
            .map(|name| {
                let rng = StdRng::seed_from_u64(rng.random());
                tokio::spawn(work(channel.clone(), name, rng, Arc::clone(&knowledge)))
            })
            .into();
        // Not a wait for something: the random moment itself.
        tokio::time::sleep(Duration::from_micros(rng.random_range(0..250_000))).await;
        seriod.kill();
        for worker in workers {
            worker.await.unwrap();
        }
        vmms_killed += u32::from(kill_a_vmm(&seriod, &mut rng));
        logs.look(&vms);
        let before = seriod.vmms();
        seriod.start();
        let channel = seriod.connect().await.unwrap();
        let running = check(&seriod, &channel, &knowledge, &mut strays).await;
        adopted += running.iter().filter(|pid| before.contains(pid)).count();
        logs.look(&vms);
    }
    let (rounds, (runs, continued)) = (logs.rounds(), logs.runs());
    eprintln!(
        "{kills} kills of seriod, {vmms_killed} of a VMM; {adopted} times a VM went on in the same process; \
         {runs} runs wrote {rounds} rounds, {continued} of them on what an earlier run had written"
    );
    assert!(kills < 20 || (adopted > 0 && continued > 0), "VMs survive, and so do their disks");
    clear(&seriod, &seriod.connect().await.unwrap()).await;
}

#[test]
fn a_log_shows_what_is_lost_and_who_else_writes() {
    let start = "\nmini: started by Pvh\n";
    let first = format!("{start}writer: found 0\nwriter: 1\nwriter: 2\n");
    assert_eq!(examine(&first), Ok(Shown { safe: 2, runs: 1, continued: 0 }));
    for good in ["writer: found 2\nwriter: 3\nwri", "writer: found 3\nwriter: 4"] {
        let shown = examine(&format!("{first}{start}{good}")).unwrap();
        assert_eq!(shown, Shown { safe: 3, runs: 2, continued: 1 }, "{good}");
    }
    // Cut off by a kill, twice: neither number counts.
    let cut = format!("{first}writer: 1{start}writer: found 2\nwriter: 3\nwriter: found{start}");
    assert_eq!(examine(&cut).unwrap().safe, 3);
    // So soon after a kill that the next start is not whole.
    for begun in ["", "mini: st", "mini: started by Pvh"] {
        let cut = format!("{first}{start}writer: \n{begun}");
        assert_eq!(examine(&cut).unwrap(), Shown { safe: 2, runs: 1, continued: 0 }, "{begun}");
    }
    for (bad, why) in [
        ("writer: found 1\n", "flushed rounds are lost"),
        ("writer: found 99\n", "somebody else has written"),
        ("writer: found 2\nwriter: 3\nwriter: 3\n", "out of order"),
        ("writer: found 2\nwriter: found 2\n", "two runs in one"),
        ("writer: 3\n", "a run without a start"),
        ("writer: found 2\nwriter: damaged block 0: checksum of round 2\n", "not as it was written"),
    ] {
        let error = examine(&format!("{first}{start}{bad}writer")).unwrap_err();
        assert!(error.contains(why), "{bad}: {error}");
    }
}
