//! Volumes that come to a running VM and leave it, asked of a real seriod and done by a real VMM with the mini guest, which
//! listens to the hot-plug registers.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::time::{Duration, Instant};

use common::{
    Seriod,
    guest::{guest_node, run, spec},
};
use serio_api::v1::{
    AttachNicRequest, AttachVolumeRequest, CreateVolumeRequest, DeleteVolumeRequest, DetachNicRequest,
    DetachVolumeRequest, GetVmRequest, RebootVmRequest, RestoreVmRequest, SnapshotVmRequest, StopVmRequest,
    VmSpec, vm_service_client::VmServiceClient, volume_service_client::VolumeServiceClient,
};
use tonic::Code;

const WEB: &str = "vdcs/ardesio/vms/web";
const DATA: &str = "vdcs/ardesio/volumes/data";

/// Waits until the guest has said that so often; fails when it says that something is wrong.
async fn says(seriod: &Seriod, uid: &str, what: &str, times: usize) {
    let path = seriod.dir.path().join("state/vms").join(uid).join("serial.log");
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let log = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(!log.contains("failed"), "{log}");
        if log.matches(what).count() >= times {
            return;
        }
        assert!(Instant::now() < deadline, "no {what:?}:\n{log}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_volume_comes_to_a_running_guest_stays_and_leaves() {
    let (mut seriod, channel) = match guest_node("").await {
        Ok(node) => node,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let (mut vms, mut volumes) = (VmServiceClient::new(channel.clone()), VolumeServiceClient::new(channel));
    let listening = VmSpec { cmdline: "mini.test=plug".to_owned(), ..spec() };
    let uid = run(&mut vms, "web", listening).await.uid;
    says(&seriod, &uid, "plug: ready with 1 disks", 1).await;
    volumes.create_volume(data()).await.unwrap();
    let attach = AttachVolumeRequest { name: WEB.to_owned(), volume: DATA.to_owned(), ..Default::default() };
    let vm = vms.attach_volume(attach.clone()).await.unwrap().into_inner();
    assert_eq!(vm.spec.unwrap().volumes, [DATA]);
    says(&seriod, &uid, "plug: disk of 8192 sectors came to", 1).await;
    let again = vms.attach_volume(attach).await.unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition, "{again:?}");

    // Neither another seriod nor a reset takes it away.
    seriod.kill();
    seriod.start();
    let channel = seriod.connect().await.unwrap();
    (vms, volumes) = (VmServiceClient::new(channel.clone()), VolumeServiceClient::new(channel));
    vms.reboot_vm(RebootVmRequest { name: WEB.to_owned(), ..Default::default() }).await.unwrap();
    says(&seriod, &uid, "plug: ready with 2 disks", 1).await;

    // A clone of the VM at this moment finds its disks where they were.
    let snapshot =
        SnapshotVmRequest { vm: WEB.to_owned(), snapshot_id: "s".to_owned(), ..Default::default() };
    let saved = vms.snapshot_vm(snapshot).await.unwrap().into_inner();
    assert_eq!(saved.volume_snapshots.len(), 2, "{saved:?}");
    let restore = RestoreVmRequest { name: saved.name, as_new: "copy".to_owned(), ..Default::default() };
    let copy = vms.restore_vm(restore).await.unwrap().into_inner();
    says(&seriod, &copy.uid, "plug: 2 disks work", 1).await;
    let stop = StopVmRequest { name: copy.name, force: true, ..Default::default() };
    vms.stop_vm(stop).await.unwrap();

    let detach = DetachVolumeRequest { name: WEB.to_owned(), volume: DATA.to_owned(), ..Default::default() };
    let vm = vms.detach_volume(detach.clone()).await.unwrap().into_inner();
    assert!(vm.spec.unwrap().volumes.is_empty());
    says(&seriod, &uid, " is gone", 1).await;
    let again = vms.detach_volume(detach).await.unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition, "{again:?}");
    let root = DetachVolumeRequest {
        name: WEB.to_owned(),
        volume: "vdcs/ardesio/volumes/web-root".to_owned(),
        ..Default::default()
    };
    assert!(vms.detach_volume(root).await.unwrap_err().message().contains("is the root"));
    // It is closed: a clone of the VM has its snapshot, and it can be opened elsewhere.
    let attach = AttachVolumeRequest {
        name: "vdcs/ardesio/vms/copy".to_owned(),
        volume: DATA.to_owned(),
        ..Default::default()
    };
    vms.attach_volume(attach).await.unwrap();
    let copy = GetVmRequest { name: "vdcs/ardesio/vms/copy".to_owned() };
    assert_eq!(vms.get_vm(copy).await.unwrap().into_inner().spec.unwrap().volumes.len(), 2);
    let busy = DeleteVolumeRequest { name: DATA.to_owned(), ..Default::default() };
    assert!(volumes.delete_volume(busy).await.is_err(), "a VM has it");
    vms.stop_vm(StopVmRequest { name: WEB.to_owned(), force: true, ..Default::default() }).await.unwrap();
}

fn data() -> CreateVolumeRequest {
    CreateVolumeRequest {
        parent: "vdcs/ardesio".to_owned(),
        volume_id: "data".to_owned(),
        size_bytes: 4 << 20,
        ..Default::default()
    }
}

/// The taps of a VM, by their names on the host.
fn taps(uid: &str) -> Vec<String> {
    let short: String = uid.chars().filter(|c| *c != '-').skip(24).collect();
    let links = std::fs::read_dir("/sys/class/net").unwrap();
    let names = links.filter_map(|link| link.unwrap().file_name().into_string().ok());
    names.filter(|name| name.starts_with(&format!("srt{short}-"))).collect()
}

#[tokio::test]
async fn a_card_comes_to_a_running_guest_stays_and_leaves() {
    let (mut seriod, channel) = match guest_node("").await {
        Ok(node) => node,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    if !std::path::Path::new("/dev/net/tun").exists() {
        return eprintln!("skipped: there is no /dev/net/tun");
    }
    let mut vms = VmServiceClient::new(channel);
    let listening = VmSpec { cmdline: "mini.test=plug".to_owned(), vcpus: 2, ..spec() };
    let cards = listening.nics.len();
    let uid = run(&mut vms, "web", listening).await.uid;
    says(&seriod, &uid, "plug: ready with 1 disks", 1).await;
    let attach = AttachNicRequest { name: WEB.to_owned(), ..Default::default() };
    let vm = vms.attach_nic(attach.clone()).await.unwrap().into_inner();
    says(&seriod, &uid, "plug: device of type 1 came to", 1).await;
    assert_eq!(taps(&uid).len(), cards + 1);
    let queues = std::fs::read_dir(format!("/sys/class/net/{}/queues", taps(&uid)[cards])).unwrap();
    let names = queues.map(|queue| queue.unwrap().file_name().into_string().unwrap());
    assert_eq!(names.filter(|name| name.starts_with("rx-")).count(), 2, "one for each vcpu");
    let mac = vm.spec.unwrap().nics.last().unwrap().mac.clone();

    seriod.kill();
    seriod.start();
    vms = VmServiceClient::new(seriod.connect().await.unwrap());
    let detach = DetachNicRequest { name: WEB.to_owned(), mac: mac.clone(), ..Default::default() };
    let vm = vms.detach_nic(detach.clone()).await.unwrap().into_inner();
    says(&seriod, &uid, " is gone", 1).await;
    assert_eq!((vm.spec.unwrap().nics.len(), taps(&uid).len()), (cards, cards));
    let again = vms.detach_nic(detach).await.unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition, "{again:?}");
    assert!(again.message().contains("has no card"), "{again:?}");
    // The same address comes again; it goes with its VM.
    let nic = serio_api::v1::NicSpec { mac, ..Default::default() };
    vms.attach_nic(AttachNicRequest { nic: Some(nic), ..attach }).await.unwrap();
    assert_eq!(taps(&uid).len(), cards + 1);
    vms.stop_vm(StopVmRequest { name: WEB.to_owned(), force: true, ..Default::default() }).await.unwrap();
    assert_eq!(taps(&uid), Vec::<String>::new());
}

#[tokio::test]
async fn a_guest_that_does_not_let_go_keeps_its_volume() {
    let (seriod, channel) = match guest_node("").await {
        Ok(node) => node,
        Err(why) => return eprintln!("skipped: {why}"),
    };
    let (mut vms, mut volumes) = (VmServiceClient::new(channel.clone()), VolumeServiceClient::new(channel));
    volumes.create_volume(data()).await.unwrap();
    let cmdline = "mini.test=plug mini.plug=keep".to_owned();
    let stubborn = VmSpec { cmdline, volumes: vec![DATA.to_owned()], ..spec() };
    let uid = run(&mut vms, "web", stubborn).await.uid;
    says(&seriod, &uid, "plug: ready with 2 disks", 1).await;
    let timeout = Some(pbjson_types::Duration { seconds: 0, nanos: 300_000_000 });
    let detach =
        DetachVolumeRequest { name: WEB.to_owned(), volume: DATA.to_owned(), timeout, ..Default::default() };
    let refused = vms.detach_volume(detach).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert!(refused.message().contains("did not let go"), "{refused:?}");
    says(&seriod, &uid, "plug: 2 disks work", 2).await;
    let vm = vms.get_vm(GetVmRequest { name: WEB.to_owned() }).await.unwrap().into_inner();
    assert_eq!(vm.spec.unwrap().volumes, [DATA]);
    vms.stop_vm(StopVmRequest { name: WEB.to_owned(), force: true, ..Default::default() }).await.unwrap();
}
