//! What the machine can do, asked of a real seriod and done by real VMMs with the mini guest: pause and resume,
//! devices and limits, snapshots that VMs go on from.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::time::{Duration, Instant};

use common::{
    Seriod,
    guest::{all_rounds, counts_beyond, guest_node, rounds, run, spec},
};
use serio_api::v1::{
    Balloon, CreateVmRequest, DeleteVmSnapshotRequest, GetVmRequest, IoLimits, ListVmSnapshotsRequest,
    PauseVmRequest, RestoreVmRequest, ResumeVmRequest, SnapshotVmRequest, StopVmRequest, UpdateVmRequest, Vm,
    VmSpec, VmState, WatchdogAction, vm_service_client::VmServiceClient,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::{Code, transport::Channel};

type Client = VmServiceClient<Channel>;

const WEB: &str = "vdcs/ardesio/vms/web";

/// A node with a guest's image, and its VMs.
async fn node() -> Result<(Seriod, Client), String> {
    let (seriod, channel) = guest_node("[metrics]\nlisten = \"127.0.0.1:0\"\n").await?;
    Ok((seriod, VmServiceClient::new(channel)))
}

async fn get(client: &mut Client, name: &str) -> Vm {
    client.get_vm(GetVmRequest { name: name.to_owned() }).await.unwrap().into_inner()
}

fn state(vm: &Vm) -> VmState {
    vm.status.as_ref().unwrap().state()
}

#[tokio::test]
async fn a_paused_guest_does_nothing_and_outlives_seriod() {
    let (mut seriod, mut client) = match node().await {
        Ok(node) => node,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let vm = run(&mut client, "web", spec()).await;
    counts_beyond(&seriod, &vm.uid, 0).await;
    let pause = PauseVmRequest { name: WEB.to_owned(), ..Default::default() };
    let paused = client.pause_vm(pause.clone()).await.unwrap().into_inner();
    assert_eq!(state(&paused), VmState::Paused);
    let pid = paused.status.as_ref().unwrap().pid;
    let again = client.pause_vm(pause).await.unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition, "{again:?}");
    // What it had printed is in the log by the time that another seriod has taken it over.
    seriod.kill();
    seriod.start();
    let stood = rounds(&seriod, &vm.uid);
    client = VmServiceClient::new(seriod.connect().await.unwrap());
    let found = get(&mut client, WEB).await;
    assert_eq!((state(&found), found.status.as_ref().unwrap().pid), (VmState::Paused, pid));
    let stop = StopVmRequest { name: WEB.to_owned(), ..Default::default() };
    let deaf = client.stop_vm(stop.clone()).await.unwrap_err();
    assert!(deaf.message().contains("is paused"), "{deaf:?}");
    assert_eq!(rounds(&seriod, &vm.uid), stood, "it went on");
    let resume = ResumeVmRequest { name: WEB.to_owned(), ..Default::default() };
    let resumed = client.resume_vm(resume).await.unwrap().into_inner();
    assert_eq!((state(&resumed), resumed.status.as_ref().unwrap().pid), (VmState::Running, pid));
    counts_beyond(&seriod, &vm.uid, stood).await;
    client.stop_vm(StopVmRequest { force: true, ..stop }).await.unwrap();
}

#[tokio::test]
async fn what_a_vm_counts_is_on_the_page_for_prometheus() {
    let (seriod, mut client) = match node().await {
        Ok(node) => node,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let vm = run(&mut client, "web", spec()).await;
    counts_beyond(&seriod, &vm.uid, 3).await;
    let mut page = String::new();
    let mut stream = TcpStream::connect(seriod.metrics.unwrap()).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    stream.read_to_string(&mut page).await.unwrap();
    let sample = |family: &str, label: &str| -> f64 {
        let mut lines = page.lines().filter(|line| line.starts_with(family) && line.contains(label));
        let line = lines.find(|line| line.contains("vdc=\"ardesio\",vm=\"web\""));
        line.and_then(|line| line.rsplit_once(' ')?.1.parse().ok())
            .unwrap_or_else(|| panic!("no {family} {label}:\n{page}"))
    };
    assert!(sample("serio_vm_disk_request_seconds_count", "op=\"write\"") >= 3.0, "{page}");
    assert!(sample("serio_vm_disk_request_seconds_count", "op=\"flush\"") >= 3.0, "{page}");
    assert!(sample("serio_vm_exits_total", "kind=\"port_write\"") >= 1.0, "{page}");
    assert!(sample("serio_vm_vcpu_run_seconds_total", "") > 0.0, "{page}");
}

#[tokio::test]
async fn what_a_spec_says_of_the_machine_reaches_it() {
    let (mut seriod, mut client) = match node().await {
        Ok(node) => node,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let limits = IoLimits { operations_per_second: 200, ..IoLimits::default() };
    let spec = VmSpec {
        vsock: true,
        watchdog: WatchdogAction::End.into(),
        balloon: Some(Balloon { target_bytes: 0, floor_bytes: 20 << 20 }),
        disk_limits: Some(limits),
        ..spec()
    };
    let wrong = VmSpec { mtu: 1, page_bytes: 5, ..spec.clone() };
    let request = CreateVmRequest {
        parent: "vdcs/ardesio".to_owned(),
        vm_id: "wrong".to_owned(),
        spec: Some(wrong),
        ..CreateVmRequest::default()
    };
    let refused = client.create_vm(request).await.unwrap_err();
    assert!(
        refused.message().contains("spec.mtu") && refused.message().contains("spec.page_bytes"),
        "{refused:?}"
    );
    let vm = run(&mut client, "web", spec.clone()).await;
    assert_eq!(
        (vm.spec.clone().unwrap().disk_limits, vm.spec.clone().unwrap().balloon),
        (Some(limits), spec.balloon)
    );
    counts_beyond(&seriod, &vm.uid, 0).await;
    let shown = get(&mut client, WEB).await.status.unwrap();
    assert!(shown.vsock_path.ends_with("vsock.sock") && std::fs::exists(&shown.vsock_path).unwrap());
    assert_eq!(shown.memory.unwrap().target_bytes, 0);
    let update = |fields: &[&str], spec: VmSpec| UpdateVmRequest {
        name: WEB.to_owned(),
        fields: fields.iter().map(|field| (*field).to_owned()).collect(),
        spec: Some(spec),
        ..UpdateVmRequest::default()
    };
    let target = |target_bytes| VmSpec {
        balloon: Some(Balloon { target_bytes, floor_bytes: 0 }),
        ..VmSpec::default()
    };
    let greedy = client.update_vm(update(&["balloon.target_bytes"], target(16 << 20))).await.unwrap_err();
    assert!(greedy.message().contains("less than 20MiB"), "{greedy:?}");
    let running =
        client.update_vm(update(&["vcpus"], VmSpec { vcpus: 2, ..VmSpec::default() })).await.unwrap_err();
    assert_eq!(running.code(), Code::FailedPrecondition);
    client.update_vm(update(&["balloon.target_bytes"], target(8 << 20))).await.unwrap();
    // Another seriod says it again, whether or not the first one had come to it.
    seriod.kill();
    seriod.start();
    client = VmServiceClient::new(seriod.connect().await.unwrap());
    let deadline = Instant::now() + Duration::from_secs(30);
    while get(&mut client, WEB)
        .await
        .status
        .unwrap()
        .memory
        .is_none_or(|memory| memory.target_bytes != 8 << 20)
    {
        assert!(Instant::now() < deadline, "the VMM does not hear of its balloon");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_vm_goes_on_from_its_snapshot_and_so_do_five_clones() {
    let (seriod, mut client) = match node().await {
        Ok(node) => node,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let vm = run(&mut client, "web", spec()).await;
    counts_beyond(&seriod, &vm.uid, 3).await;
    let request =
        SnapshotVmRequest { vm: WEB.to_owned(), snapshot_id: "before".to_owned(), ..Default::default() };
    let made = client.snapshot_vm(request).await.unwrap().into_inner();
    assert!(made.memory_bytes > 0 && made.memory_bytes < 32 << 20, "{made:?}");
    assert_eq!(made.volume_snapshots, ["vdcs/ardesio/volumes/web-root/snapshots/before"]);
    let at = counts_beyond(&seriod, &vm.uid, rounds(&seriod, &vm.uid)).await;
    // Side by side, and beside the VM that was saved.
    let mut clones = Vec::new();
    for number in 0..5 {
        let as_new = format!("copy{number}");
        let request = RestoreVmRequest { name: made.name.clone(), as_new, ..Default::default() };
        clones.push(client.restore_vm(request).await.unwrap().into_inner());
    }
    for clone in &clones {
        assert_eq!(state(clone), VmState::Running, "{clone:?}");
        let first = counts_beyond(&seriod, &clone.uid, 0).await;
        counts_beyond(&seriod, &clone.uid, first).await;
        let counted = all_rounds(&seriod, &clone.uid);
        assert!(counted[0] > 3 && counted[0] <= at + 1, "{at}: {counted:?}");
        assert!(counted.windows(2).all(|two| two[1] == two[0] + 1), "{counted:?}");
    }
    // In its place: what it has counted since is gone.
    let since = counts_beyond(&seriod, &vm.uid, at + 20).await;
    client.stop_vm(StopVmRequest { name: WEB.to_owned(), force: true, ..Default::default() }).await.unwrap();
    let ended = all_rounds(&seriod, &vm.uid).len();
    let request = RestoreVmRequest { name: made.name.clone(), ..Default::default() };
    let restored = client.restore_vm(request).await.unwrap().into_inner();
    assert_eq!((state(&restored), &restored.uid), (VmState::Running, &vm.uid));
    let deadline = Instant::now() + Duration::from_secs(60);
    while all_rounds(&seriod, &vm.uid).len() < ended + 3 {
        assert!(Instant::now() < deadline, "it does not go on");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let again = all_rounds(&seriod, &vm.uid)[ended];
    assert!(again <= at + 1 && again < since, "{again} after {at}, {since}");
    let request = ListVmSnapshotsRequest { vm: WEB.to_owned(), ..Default::default() };
    assert_eq!(client.list_vm_snapshots(request.clone()).await.unwrap().into_inner().snapshots.len(), 1);
    let delete = DeleteVmSnapshotRequest { name: made.name, ..Default::default() };
    client.delete_vm_snapshot(delete).await.unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !client.list_vm_snapshots(request.clone()).await.unwrap().into_inner().snapshots.is_empty() {
        assert!(Instant::now() < deadline, "it is not deleted");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let saved = seriod.dir.path().join("state/vms").join(&vm.uid).join("saved");
    assert_eq!(std::fs::read_dir(saved).unwrap().count(), 0);
}
