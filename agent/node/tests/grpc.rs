//! The gRPC border of a real seriod, without VMs: transports, certificates, roles, bad input, garbage, the lock.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    time::Duration,
};

use common::{
    Seriod, import, import_image,
    tls::{authority, connect_tls},
};
use serio_api::v1::{
    CreateVdcRequest, CreateVmRequest, CreateVolumeRequest, GetNodeRequest, ImportImageRequest,
    ListVdcsRequest, NicSpec, Quota, VmSpec, WatchEventsRequest, image_service_client::ImageServiceClient,
    import_image_request::What, node_service_client::NodeServiceClient, vdc_service_client::VdcServiceClient,
    vm_service_client::VmServiceClient, volume_service_client::VolumeServiceClient,
};
use tonic::{Code, Status};
use tonic_types::StatusExt;

fn vdc(name: &str) -> CreateVdcRequest {
    let quota = Quota { vcpus: 4, memory_bytes: 4 << 30, storage_bytes: 20 << 30, ..Default::default() };
    CreateVdcRequest { vdc_id: name.to_owned(), quota: Some(quota), ..CreateVdcRequest::default() }
}

#[tokio::test]
async fn certificates_and_roles() {
    let (ours, theirs) = (authority(), authority());
    let mut seriod = Seriod::new("[grpc]\nlisten = \"127.0.0.1:0\"\ntls_dir = \"TLS\"\n");
    let tls_dir = seriod.dir.path().join("tls");
    ours.write_server(&tls_dir);
    let config = seriod.dir.path().join("seriod.toml");
    let text = fs::read_to_string(&config).unwrap().replace("TLS", tls_dir.to_str().unwrap());
    fs::write(&config, text).unwrap();
    seriod.start();

    let plane = connect_tls(&seriod, &ours, Some(ours.issue("control-plane"))).await.unwrap();
    VdcServiceClient::new(plane).create_vdc(vdc("ardesio")).await.unwrap();

    let auditor =
        VdcServiceClient::new(connect_tls(&seriod, &ours, Some(ours.issue("auditor"))).await.unwrap());
    assert_eq!(
        auditor.clone().list_vdcs(ListVdcsRequest::default()).await.unwrap().into_inner().vdcs.len(),
        1
    );
    let refused = auditor.clone().create_vdc(vdc("other")).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("control-plane"), "{refused}");

    let nobody = connect_tls(&seriod, &ours, Some(ours.issue("visitor"))).await.unwrap();
    let refused = VdcServiceClient::new(nobody).list_vdcs(ListVdcsRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);

    // A certificate of another authority, and none at all: with TLS 1.3 the client may learn it at its first call.
    for identity in [Some(theirs.issue("control-plane")), None] {
        if let Ok(channel) = connect_tls(&seriod, &ours, identity).await {
            assert!(VdcServiceClient::new(channel).list_vdcs(ListVdcsRequest::default()).await.is_err());
        }
    }
    // And a client refuses a server that it does not trust.
    assert!(connect_tls(&seriod, &theirs, Some(ours.issue("control-plane"))).await.is_err());
}

#[tokio::test]
async fn new_certificates_serve_at_the_next_handshake_and_bad_ones_never() {
    let (old, new) = (authority(), authority());
    let mut seriod = Seriod::new("[grpc]\nlisten = \"127.0.0.1:0\"\ntls_dir = \"TLS\"\n");
    let tls_dir = seriod.dir.path().join("tls");
    old.write_server(&tls_dir);
    let config = seriod.dir.path().join("seriod.toml");
    let text = fs::read_to_string(&config).unwrap().replace("TLS", tls_dir.to_str().unwrap());
    fs::write(&config, text).unwrap();
    seriod.start();
    let get = async |channel| NodeServiceClient::new(channel).get_node(GetNodeRequest {}).await;
    let before = connect_tls(&seriod, &old, Some(old.issue("auditor"))).await.unwrap();
    get(before.clone()).await.unwrap();

    // Nonsense, and a certificate whose key has not come yet: the old ones serve on.
    let certificate = fs::read(tls_dir.join("server-cert.pem")).unwrap();
    for bad in ["no certificate".to_owned(), old.issue("peer-agent").0] {
        fs::write(tls_dir.join("server-cert.pem"), bad).unwrap();
        get(connect_tls(&seriod, &old, Some(old.issue("auditor"))).await.unwrap()).await.unwrap();
    }
    fs::write(tls_dir.join("server-cert.pem"), certificate).unwrap();
    get(connect_tls(&seriod, &old, Some(old.issue("auditor"))).await.unwrap()).await.unwrap();

    new.write_server(&tls_dir);
    get(connect_tls(&seriod, &new, Some(new.issue("auditor"))).await.unwrap()).await.unwrap();
    assert!(connect_tls(&seriod, &old, Some(old.issue("auditor"))).await.is_err(), "not trusted any more");
    get(before).await.unwrap();
}

/// The field that a refusal names.
fn field(status: &Status) -> String {
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let details = status.get_error_details();
    details
        .bad_request()
        .and_then(|b| b.field_violations.first())
        .map(|v| v.field.clone())
        .unwrap_or_default()
}

fn vm(change: impl FnOnce(&mut CreateVmRequest)) -> CreateVmRequest {
    let spec =
        VmSpec { vcpus: 1, memory_bytes: 64 << 20, image: "images/tiny".to_owned(), ..VmSpec::default() };
    let mut request = CreateVmRequest {
        request_id: String::new(),
        parent: "vdcs/ardesio".to_owned(),
        vm_id: "web".to_owned(),
        spec: Some(spec),
        start: true,
        ..Default::default()
    };
    change(&mut request);
    request
}

fn spec(change: impl FnOnce(&mut VmSpec)) -> CreateVmRequest {
    vm(|request| change(request.spec.as_mut().unwrap()))
}

#[tokio::test]
async fn bad_input_names_the_field_and_leaves_nothing() {
    let mut seriod = Seriod::new("");
    seriod.start();
    let channel = seriod.connect().await.unwrap();
    VdcServiceClient::new(channel.clone()).create_vdc(vdc("ardesio")).await.unwrap();
    let kernel = b"\x7fELF\x02\x01\x01 a kernel for those who do not look further";
    import_image(channel.clone(), "tiny", "quiet", kernel, &[]).await;
    let mut vms = VmServiceClient::new(channel.clone());
    for (request, named) in [
        (spec(|s| s.vcpus = 0), "spec.vcpus"),
        (spec(|s| s.vcpus = 1000), "spec.vcpus"),
        (spec(|s| s.memory_bytes = (64 << 20) + 1), "spec.memory_bytes"),
        (spec(|s| s.memory_bytes = 1), "spec.memory_bytes"),
        (spec(|s| s.image = "tiny".to_owned()), "spec.image"),
        (spec(|s| s.volumes.push("vdcs/other/volumes/x".to_owned())), "spec.volumes[0]"),
        (
            spec(|s| s.nics.push(NicSpec { mac: "nonsense".to_owned(), ..NicSpec::default() })),
            "spec.nics[0].mac",
        ),
        (
            spec(|s| s.nics.push(NicSpec { address: "10.0.0.1".to_owned(), ..NicSpec::default() })),
            "spec.nics[0].address",
        ),
        (spec(|s| s.cmdline = "a\nb".to_owned()), "spec.cmdline"),
        (spec(|_| ()), "spec.root_disk_bytes"),
        (vm(|r| r.vm_id = "Not A Name".to_owned()), "vm_id"),
        (vm(|r| r.vm_id = "x".repeat(63)), "vm_id"),
        (vm(|r| r.parent = "ardesio".to_owned()), "parent"),
        (vm(|r| r.spec = None), "spec"),
        (vm(|r| r.request_id = "nonsense".to_owned()), "request_id"),
    ] {
        let status = vms.create_vm(request).await.unwrap_err();
        assert_eq!(field(&status), named, "{status}");
    }
    // All wrong fields at once.
    let status = vms.create_vm(spec(|s| (s.vcpus, s.memory_bytes) = (0, 0))).await.unwrap_err();
    assert_eq!(status.get_error_details().bad_request().unwrap().field_violations.len(), 2);
    // More than the quota, with what is available.
    let big = spec(|s| (s.memory_bytes, s.root_disk_bytes) = (8 << 30, 1 << 20));
    let status = vms.create_vm(big).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("memory: 8GiB asked, 4GiB available"), "{status}");
    assert_eq!(status.get_error_details().quota_failure().unwrap().violations[0].subject, "memory");
    let missing = spec(|s| s.image = "images/none".to_owned());
    assert_eq!(vms.create_vm(missing).await.unwrap_err().code(), Code::NotFound);
    // The programs are not installed here: what was begun is undone.
    let status = vms.create_vm(spec(|s| s.root_disk_bytes = 1 << 20)).await.unwrap_err();
    assert!(status.message().contains("is it installed"), "{status}");
    let volume = CreateVolumeRequest {
        parent: "vdcs/ardesio".to_owned(),
        volume_id: "data".to_owned(),
        size_bytes: 1 << 20,
        ..CreateVolumeRequest::default()
    };
    assert!(VolumeServiceClient::new(channel.clone()).create_volume(volume).await.is_err());
    let vdcs =
        VdcServiceClient::new(channel).list_vdcs(ListVdcsRequest::default()).await.unwrap().into_inner().vdcs;
    assert_eq!(vdcs[0].used, Some(Quota::default()), "nothing half-made is left");
}

#[tokio::test]
async fn a_broken_import_leaves_nothing() {
    let mut seriod = Seriod::new("");
    seriod.start();
    let channel = seriod.connect().await.unwrap();
    let mut images = ImageServiceClient::new(channel.clone());
    let no_kernel = import("bad", "", b"#!/bin/sh", &[]);
    assert_eq!(field(&images.import_image(tokio_stream::iter(no_kernel)).await.unwrap_err()), "kernel");
    let short: Vec<_> = import("bad", "", &[0; 300 << 10], &[]).into_iter().take(2).collect();
    assert_eq!(field(&images.import_image(tokio_stream::iter(short)).await.unwrap_err()), "kernel");
    let mut format = import("bad", "", b"\x7fELF\x02\x01", &[]);
    let Some(ImportImageRequest { what: Some(What::Header(header)) }) = format.first_mut() else { panic!() };
    header.format = "vhdx".to_owned();
    assert_eq!(field(&images.import_image(tokio_stream::iter(format)).await.unwrap_err()), "format");
    let headless: Vec<_> = import("bad", "", b"x", &[]).into_iter().skip(1).collect();
    assert_eq!(field(&images.import_image(tokio_stream::iter(headless)).await.unwrap_err()), "header");
    // A client that goes in the middle: the image is soon forgotten.
    let (sender, receiver) = tokio::sync::mpsc::channel(8);
    for message in import("bad", "", &[0; 600 << 10], &[]).into_iter().take(2) {
        sender.send(message).await.unwrap();
    }
    let call = tokio::spawn(async move {
        images.import_image(tokio_stream::wrappers::ReceiverStream::new(receiver)).await
    });
    let dir = seriod.dir.path().join("state/images");
    wait_for(|| fs::read_dir(&dir).unwrap().count() == 1).await;
    call.abort();
    wait_for(|| fs::read_dir(&dir).unwrap().count() == 0).await;
    import_image(channel, "bad", "", b"\x7fELF\x02\x01", &[]).await;
}

async fn wait_for(done: impl Fn() -> bool) {
    for _ in 0..2000 {
        if done() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("it did not come to pass in 10 s");
}

#[tokio::test]
async fn the_socket_events_and_a_quick_end() {
    let mut seriod = Seriod::new("");
    seriod.start();
    let socket = seriod.dir.path().join("run/seriod.sock");
    assert_eq!(fs::metadata(&socket).unwrap().permissions().mode() & 0o777, 0o660);
    let channel = seriod.connect().await.unwrap();
    let mut node = NodeServiceClient::new(channel.clone());
    assert_eq!(node.get_node(GetNodeRequest {}).await.unwrap().into_inner().name, "nodes/t");
    // A second seriod on the same state is refused.
    let second = seriod.command().output().unwrap();
    assert!(!second.status.success());
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(said.contains("another seriod uses"), "{said}");
    // Garbage costs its sender only.
    let mut garbage = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    garbage.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    garbage.write_all(&[0xff; 4096]).unwrap();
    let _ = garbage.read_to_end(&mut Vec::new());
    // Events are kept, and follow.
    let watch = WatchEventsRequest { from: 0, follow: true, ..Default::default() };
    let mut events = node.watch_events(watch).await.unwrap().into_inner();
    VdcServiceClient::new(channel).create_vdc(vdc("ardesio")).await.unwrap();
    let event = events.message().await.unwrap().unwrap();
    assert_eq!((event.number, event.kind.as_str(), event.resource.as_str()), (1, "created", "vdcs/ardesio"));
    // A stream that follows does not hold up the end.
    let started = std::time::Instant::now();
    assert!(seriod.terminate().success());
    assert!(started.elapsed() < Duration::from_secs(5));
    assert!(!socket.exists());
    seriod.start();
    let vdcs = VdcServiceClient::new(seriod.connect().await.unwrap())
        .list_vdcs(ListVdcsRequest::default())
        .await
        .unwrap();
    assert_eq!(vdcs.into_inner().vdcs.len(), 1, "it was kept");
}

#[test]
fn a_wrong_configuration_says_what_is_wrong() {
    let seriod = Seriod::new("[grpc]\nlisten = \"127.0.0.1:0\"\ntls_dir = \"/nowhere\"\n");
    let output = seriod.command().output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("/nowhere/ca-cert.pem"), "{said}");
    let seriod = Seriod::new("nod_name = \"x\"\n");
    let output = seriod.command().output().unwrap();
    assert!(String::from_utf8(output.stderr).unwrap().contains("nod_name"));
}
