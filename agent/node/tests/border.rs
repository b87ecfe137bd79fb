//! What the control plane may count on at the border of a real seriod: the audit log, pages, events by number, generations,
//! and requests that are asked twice.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{Seriod, import_image};
use serio_api::v1::{
    AuditEntry, CancelOperationRequest, CheckVolumeRequest, CreateSnapshotRequest, CreateVdcRequest,
    CreateVolumeRequest, DeleteVdcRequest, DeleteVolumeRequest, ListVdcsRequest, OperationState, Quota,
    UpdateVdcRequest, VerifyAuditRequest, WatchAuditRequest, WatchEventsRequest, WatchOperationRequest,
    node_service_client::NodeServiceClient, operation_service_client::OperationServiceClient,
    vdc_service_client::VdcServiceClient, volume_service_client::VolumeServiceClient,
};
use tonic::{Code, transport::Channel};

fn quota() -> Option<Quota> {
    Some(Quota { vcpus: 4, memory_bytes: 4 << 30, storage_bytes: 20 << 30, ..Default::default() })
}

async fn create_vdc(channel: &Channel, name: &str) {
    let request = CreateVdcRequest { vdc_id: name.to_owned(), quota: quota(), ..Default::default() };
    VdcServiceClient::new(channel.clone()).create_vdc(request).await.unwrap();
}

async fn audit(channel: &Channel, wanted: WatchAuditRequest) -> Vec<AuditEntry> {
    let mut lines = NodeServiceClient::new(channel.clone()).watch_audit(wanted).await.unwrap().into_inner();
    let mut kept = Vec::new();
    while let Some(line) = lines.message().await.unwrap() {
        kept.push(line);
    }
    kept
}

#[tokio::test]
async fn every_change_is_in_the_audit_log_before_and_after() {
    let mut seriod = Seriod::new("");
    seriod.start();
    let channel = seriod.connect().await.unwrap();
    create_vdc(&channel, "ardesio").await;
    let mut vdcs = VdcServiceClient::new(channel.clone());
    let nothing = DeleteVdcRequest { name: "vdcs/nothing".into(), ..Default::default() };
    assert_eq!(vdcs.delete_vdc(nothing).await.unwrap_err().code(), Code::NotFound);
    vdcs.list_vdcs(ListVdcsRequest::default()).await.unwrap();

    let lines = audit(&channel, WatchAuditRequest::default()).await;
    let shown: Vec<_> = lines
        .iter()
        .map(|l| (l.number, l.what.as_str(), l.resource.as_str(), l.of, l.result.split(':').next().unwrap()))
        .collect();
    assert_eq!(
        shown,
        [
            (1, "CreateVdc", "vdcs/ardesio", 0, ""),
            (2, "CreateVdc", "vdcs/ardesio", 1, "OK"),
            (3, "DeleteVdc", "vdcs/nothing", 0, ""),
            (4, "DeleteVdc", "vdcs/nothing", 3, "NOT_FOUND"),
        ]
    );
    assert!(lines.iter().all(|l| (l.who.as_str(), l.role.as_str()) == ("uid 0", "control-plane")));
    assert_eq!(lines[0].hash, lines[1].previous_hash);
    let only = WatchAuditRequest { failed_only: true, what: "DeleteVdc".into(), ..Default::default() };
    assert_eq!(audit(&channel, only).await.len(), 1);
    let other = WatchAuditRequest { resource_prefix: "vdcs/ardesio".into(), from: 2, ..Default::default() };
    assert_eq!(audit(&channel, other).await.len(), 1);

    // Followed, over a restart, verified; and a change is found.
    seriod.kill();
    seriod.start();
    let channel = seriod.connect().await.unwrap();
    let mut node = NodeServiceClient::new(channel.clone());
    let follow = WatchAuditRequest { from: 5, follow: true, ..Default::default() };
    let mut follow = node.watch_audit(follow).await.unwrap().into_inner();
    create_vdc(&channel, "b").await;
    let line = follow.message().await.unwrap().unwrap();
    assert_eq!((line.number, line.resource.as_str()), (5, "vdcs/b"));
    let verified = node.verify_audit(VerifyAuditRequest {}).await.unwrap().into_inner();
    assert_eq!((verified.lines, verified.last, verified.broken.as_str()), (6, 6, ""));
    let path = seriod.dir.path().join("state/audit.log");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replacen("vdcs/nothing", "vdcs/nothinG", 1)).unwrap();
    let verified = node.verify_audit(VerifyAuditRequest {}).await.unwrap().into_inner();
    assert!(verified.broken.contains("line 4"), "{verified:?}");
}

#[tokio::test]
async fn lists_come_in_pages() {
    let mut seriod = Seriod::new("");
    seriod.start();
    let channel = seriod.connect().await.unwrap();
    for name in ["c", "a", "e", "b", "d"] {
        create_vdc(&channel, name).await;
    }
    let mut vdcs = VdcServiceClient::new(channel);
    let mut seen = Vec::new();
    let mut token = String::new();
    loop {
        let page = ListVdcsRequest { page_size: 2, page_token: token };
        let page = vdcs.list_vdcs(page).await.unwrap().into_inner();
        seen.push(page.vdcs.into_iter().map(|v| v.name).collect::<Vec<_>>().join(" "));
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, ["vdcs/a vdcs/b", "vdcs/c vdcs/d", "vdcs/e"]);
}

#[tokio::test]
async fn events_go_on_from_a_number_or_say_that_they_are_gone() {
    let mut seriod = Seriod::new("");
    seriod.start();
    let channel = seriod.connect().await.unwrap();
    create_vdc(&channel, "a").await;
    create_vdc(&channel, "b").await;
    seriod.kill();
    seriod.start();
    let mut node = NodeServiceClient::new(seriod.connect().await.unwrap());
    let second = WatchEventsRequest { from: 2, ..Default::default() };
    let mut events = node.watch_events(second).await.unwrap().into_inner();
    assert_eq!(events.message().await.unwrap().unwrap().resource, "vdcs/b");
    let next = WatchEventsRequest { from: 3, ..Default::default() };
    assert!(node.watch_events(next).await.unwrap().into_inner().message().await.unwrap().is_none());
    // Numbers of another life of this node.
    let beyond = WatchEventsRequest { from: 100, follow: true, ..Default::default() };
    let gone = node.watch_events(beyond).await.unwrap().into_inner().message().await.unwrap_err();
    assert_eq!(gone.code(), Code::OutOfRange);
    assert!(gone.message().contains("the newest is 2"), "{gone}");
    let one = WatchEventsRequest { resource_prefix: "vdcs/b".into(), ..Default::default() };
    let mut one = node.watch_events(one).await.unwrap().into_inner();
    assert_eq!(one.message().await.unwrap().unwrap().number, 2);
}

#[tokio::test]
async fn a_change_of_what_has_changed_is_refused() {
    let mut seriod = Seriod::new("");
    seriod.start();
    let channel = seriod.connect().await.unwrap();
    create_vdc(&channel, "a").await;
    let mut vdcs = VdcServiceClient::new(channel.clone());
    let mut update = UpdateVdcRequest { name: "vdcs/a".into(), quota: quota(), ..Default::default() };
    update.expected_generation = 1;
    assert_eq!(vdcs.update_vdc(update).await.unwrap().into_inner().generation, 2);
    let request_id = uuid::Uuid::new_v4().to_string();
    let mut delete = DeleteVdcRequest { request_id, name: "vdcs/a".into(), expected_generation: 1 };
    let refused = vdcs.delete_vdc(delete.clone()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Aborted);
    assert!(refused.message().contains("generation 2, not 1"), "{refused}");
    delete.expected_generation = 2;
    vdcs.delete_vdc(delete.clone()).await.unwrap();
    // Asked again, also after a restart: it was done.
    seriod.kill();
    seriod.start();
    let mut vdcs = VdcServiceClient::new(seriod.connect().await.unwrap());
    vdcs.delete_vdc(delete.clone()).await.unwrap();
    delete.name = "vdcs/b".into();
    assert_eq!(vdcs.delete_vdc(delete).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_running_operation_is_cancelled_and_a_repeated_request_finds_the_same() {
    let mut seriod = Seriod::new("");
    if let Err(why) = seriod.with_programs() {
        eprintln!("skipped: {why}");
        return;
    }
    seriod.start();
    let channel = seriod.connect().await.unwrap();
    create_vdc(&channel, "a").await;
    import_image(channel.clone(), "full", "", &[], &[7; 4 << 20]).await;
    let mut volumes = VolumeServiceClient::new(channel.clone());
    let create = CreateVolumeRequest {
        parent: "vdcs/a".into(),
        volume_id: "v".into(),
        source_image: "images/full".into(),
        ..Default::default()
    };
    let volume = volumes.create_volume(create).await.unwrap().into_inner().name;
    let point =
        CreateSnapshotRequest { volume: volume.clone(), snapshot_id: "p".into(), ..Default::default() };
    volumes.create_snapshot(point).await.unwrap();
    // Slow enough to be found at it.
    let request_id = uuid::Uuid::new_v4().to_string();
    let check = CheckVolumeRequest { name: volume, data: true, bytes_per_second: 64 << 10, request_id };
    let begun = volumes.check_volume(check.clone()).await.unwrap().into_inner();
    assert_eq!(begun.state(), OperationState::Running);
    assert_eq!(volumes.check_volume(check).await.unwrap().into_inner().name, begun.name, "not another one");
    let mut operations = OperationServiceClient::new(channel.clone());
    let cancel = CancelOperationRequest { name: begun.name.clone() };
    operations.cancel_operation(cancel).await.unwrap();
    let watch = WatchOperationRequest { name: begun.name };
    let mut watched = operations.watch_operation(watch).await.unwrap().into_inner();
    let mut last = None;
    while let Some(operation) = watched.message().await.unwrap() {
        last = Some(operation);
    }
    assert_eq!(last.unwrap().state(), OperationState::Cancelled);
}

#[tokio::test]
async fn volumes_have_generations_too() {
    let mut seriod = Seriod::new("");
    if let Err(why) = seriod.with_programs() {
        eprintln!("skipped: {why}");
        return;
    }
    seriod.start();
    let channel = seriod.connect().await.unwrap();
    create_vdc(&channel, "a").await;
    let mut volumes = VolumeServiceClient::new(channel);
    let create = CreateVolumeRequest {
        parent: "vdcs/a".into(),
        volume_id: "v".into(),
        size_bytes: 1 << 20,
        ..Default::default()
    };
    let made = volumes.create_volume(create).await.unwrap().into_inner();
    let delete = |expected_generation| DeleteVolumeRequest {
        name: made.name.clone(),
        expected_generation,
        ..Default::default()
    };
    let refused = volumes.delete_volume(delete(made.generation + 1)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Aborted);
    volumes.delete_volume(delete(made.generation)).await.unwrap();
}
