//! Drain, fence and reservations over gRPC, with a real `seriod`: kept over `kill -9`, in the audit log, and said everywhere.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{Seriod, import_image};
use serio_api::v1::{
    CreateVdcRequest, CreateVmRequest, DrainNodeRequest, FenceNodeRequest, GetCapacityRequest,
    GetNodeRequest, Quota, UndrainNodeRequest, VmSpec, WatchAuditRequest,
    node_service_client::NodeServiceClient, vdc_service_client::VdcServiceClient,
    vm_service_client::VmServiceClient,
};
use tokio_stream::StreamExt;
use tonic::{Code, transport::Channel};

fn vm(reservation: &str) -> CreateVmRequest {
    let spec = VmSpec {
        vcpus: 1,
        memory_bytes: 32 << 20,
        image: "images/tiny".to_owned(),
        root_disk_bytes: 1 << 20,
        ..VmSpec::default()
    };
    CreateVmRequest {
        parent: "vdcs/ardesio".to_owned(),
        vm_id: "web".to_owned(),
        spec: Some(spec),
        reservation: reservation.to_owned(),
        ..Default::default()
    }
}

async fn furnish(channel: Channel) {
    let quota = Quota { vcpus: 4, memory_bytes: 1 << 30, storage_bytes: 1 << 30, ..Default::default() };
    let vdc = CreateVdcRequest { vdc_id: "ardesio".to_owned(), quota: Some(quota), ..Default::default() };
    VdcServiceClient::new(channel.clone()).create_vdc(vdc).await.unwrap();
    let kernel = b"\x7fELF\x02\x01\x01 a kernel for those who do not look further";
    import_image(channel, "tiny", "quiet", kernel, &[]).await;
}

#[tokio::test]
async fn a_drain_and_a_fence_hold_over_a_death() {
    let mut seriod = Seriod::new("");
    seriod.start();
    let channel = seriod.connect().await.unwrap();
    furnish(channel.clone()).await;
    let mut node = NodeServiceClient::new(channel.clone());
    let nameless = node.drain_node(DrainNodeRequest::default()).await.unwrap_err();
    assert_eq!(nameless.code(), Code::InvalidArgument, "{nameless}");
    let drained = node
        .drain_node(DrainNodeRequest { reason: "new disks".to_owned(), ..Default::default() })
        .await
        .unwrap();
    assert!(drained.into_inner().blocking.is_empty());
    node.fence_node(FenceNodeRequest { generation: 5, ..Default::default() }).await.unwrap();

    seriod.kill();
    seriod.start();
    let channel = seriod.connect().await.unwrap();
    let mut node = NodeServiceClient::new(channel.clone());
    let shown = node.get_node(GetNodeRequest {}).await.unwrap().into_inner();
    assert_eq!((shown.drain_reason.as_str(), shown.fence_generation), ("new disks", 5));
    let inventory = node.get_capacity(GetCapacityRequest {}).await.unwrap().into_inner().inventory.unwrap();
    assert!(inventory.draining && inventory.drain_reason == "new disks" && inventory.fence_generation == 5);
    let refused = VmServiceClient::new(channel.clone()).create_vm(vm("")).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().starts_with("the node is drained (new disks)"), "{refused}");
    let older = node.fence_node(FenceNodeRequest { generation: 4, ..Default::default() }).await.unwrap_err();
    assert_eq!(older.code(), Code::FailedPrecondition, "{older}");

    node.undrain_node(UndrainNodeRequest::default()).await.unwrap();
    assert_eq!(node.get_node(GetNodeRequest {}).await.unwrap().into_inner().drain_reason, "");
    let unknown = VmServiceClient::new(channel).create_vm(vm("no-such-token")).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    assert!(unknown.message().contains("there is no reservation no-such-token here"), "{unknown}");
    let mut lines = node.watch_audit(WatchAuditRequest::default()).await.unwrap().into_inner();
    let mut said = Vec::new();
    while let Some(line) = lines.next().await {
        let line = line.unwrap();
        if line.what.ends_with("Node") && line.result.is_empty() {
            said.push(format!("{} {}", line.what, line.resource));
        }
    }
    for what in ["DrainNode nodes/t", "FenceNode nodes/t", "UndrainNode nodes/t"] {
        assert!(said.iter().any(|line| line == what), "{what}: {said:?}");
    }
}

/// A client that heard no answer asks again, perhaps late: what was ordered meanwhile stands, over a death of seriod too.
#[tokio::test]
async fn an_order_that_is_repeated_is_carried_out_once() {
    let mut seriod = Seriod::new("");
    seriod.start();
    let mut node = NodeServiceClient::new(seriod.connect().await.unwrap());
    let id = |number: u8| format!("00000000-0000-4000-8000-0000000000{number:02}");
    let drain = |reason: &str| DrainNodeRequest { reason: reason.to_owned(), request_id: id(1) };
    node.drain_node(drain("new disks")).await.unwrap();
    let undrain = UndrainNodeRequest { request_id: id(2) };
    node.undrain_node(undrain.clone()).await.unwrap();
    let fence = FenceNodeRequest { generation: 5, request_id: id(3), ..Default::default() };
    node.fence_node(fence.clone()).await.unwrap();
    node.fence_node(FenceNodeRequest { generation: 6, ..Default::default() }).await.unwrap();

    seriod.kill();
    seriod.start();
    let mut node = NodeServiceClient::new(seriod.connect().await.unwrap());
    node.drain_node(drain("new disks")).await.unwrap();
    assert_eq!(
        node.get_node(GetNodeRequest {}).await.unwrap().into_inner().drain_reason,
        "",
        "drained again"
    );
    let other = node.drain_node(drain("new processors")).await.unwrap_err();
    assert_eq!(other.code(), Code::InvalidArgument, "{other}");
    assert!(other.message().contains("was used for another request"), "{other}");
    // Below the fence that is in force: as a new one it would be refused.
    node.fence_node(fence).await.unwrap();
    node.drain_node(DrainNodeRequest { reason: "again".to_owned(), request_id: id(4) }).await.unwrap();
    node.undrain_node(undrain).await.unwrap();
    assert_eq!(
        node.get_node(GetNodeRequest {}).await.unwrap().into_inner().drain_reason,
        "again",
        "undrained again"
    );
}
