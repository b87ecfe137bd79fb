//! Placements over real connections, with simulated agents that keep real ledgers.
#![allow(clippy::unwrap_used, reason = "the helpers of a test may panic as the test does")]

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use serio_api::v1::{
    AllocationClass, CommitPlacementRequest, DeleteNodeRecordRequest, DeleteRecoveryPlanRequest,
    FenceNodeRecordRequest, GetPlacementRequest, GetRecoveryPlanRequest, ListNodesRequest,
    ListPlacementsRequest, ListRecoveryPlansRequest, NodeFreshness, PlaceRequest, Placement, PlacementState,
    PutRecoveryPlanRequest, ReleasePlacementRequest, WhatFitsRequest,
    scheduler_service_client::SchedulerServiceClient,
};
use serio_scheduler::{
    config::Security,
    owner, server,
    simulate::{
        self, Chance,
        agent::{self, Counters, Timing},
        node::{Node, Size},
    },
    store::sqlite::Sqlite,
};
use tokio::{net::TcpListener, sync::oneshot, sync::watch, task::JoinHandle};
use tonic::{
    Code,
    transport::{Channel, Endpoint},
};

type Client = SchedulerServiceClient<Channel>;

const GIB: u64 = 1 << 30;

struct Region {
    address: SocketAddr,
    end: oneshot::Sender<()>,
    served: JoinHandle<()>,
}

impl Region {
    async fn start(state: &Path) -> Self {
        let owner = owner::start(Sqlite::open(state).unwrap()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (end, ended) = oneshot::channel();
        let served = tokio::spawn(async move {
            let ended = async { drop(ended.await) };
            server::serve(listener, &Security::Insecure, owner, ended).await.unwrap();
        });
        Self { address, end, served }
    }

    async fn client(&self) -> Client {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.address)).unwrap();
        SchedulerServiceClient::new(endpoint.connect().await.unwrap())
    }

    async fn stop(self) {
        self.end.send(()).unwrap();
        tokio::time::timeout(Duration::from_secs(20), self.served).await.expect("it ends by itself").unwrap();
    }
}

fn timing() -> Timing {
    Timing {
        lease: Duration::from_millis(500),
        usage: Duration::from_millis(500),
        churn: Duration::ZERO,
        partition: Duration::ZERO,
    }
}

/// Agents of nodes; they end with it.
struct Fleet {
    nodes: Vec<Arc<Node>>,
    agents: Vec<JoinHandle<()>>,
    to: watch::Sender<Vec<String>>,
}

impl Fleet {
    /// Connected, and fresh.
    async fn join(count: usize, size: Size, region: &Region, client: &mut Client) -> Self {
        let mut chance = Chance::new(1);
        let nodes = simulate::fleet(count, 0, size, &mut chance);
        let (to, at) = watch::channel(vec![region.address.to_string()]);
        let counters = Arc::new(Counters::default());
        let agents = nodes.iter().map(|node| {
            let agent =
                agent::run(Arc::clone(node), at.clone(), timing(), Arc::clone(&counters), chance.fork());
            tokio::spawn(agent)
        });
        let fleet = Self { agents: agents.collect(), nodes, to };
        fleet.all_fresh(client).await;
        fleet
    }

    async fn all_fresh(&self, client: &mut Client) {
        let all = async {
            loop {
                let answer = client.list_nodes(ListNodesRequest::default()).await.unwrap().into_inner();
                let fresh = |n: &&serio_api::v1::NodeRecord| {
                    n.freshness() == NodeFreshness::Fresh && n.inventory.is_some()
                };
                if answer.nodes.iter().filter(fresh).count() == self.nodes.len() {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), all).await.expect("all nodes get fresh");
    }

    /// Its host is gone.
    fn kill(&self, number: usize) {
        self.agents[number].abort();
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.agents.iter().for_each(JoinHandle::abort);
    }
}

fn small() -> Size {
    Size { vcpus: 8, memory: 16 * GIB, storage: 100 * GIB, overhead: 0 }
}

fn wish(id: &str, vcpus: u32) -> PlaceRequest {
    PlaceRequest {
        request_id: id.into(),
        vdc: "ardesio".into(),
        resource: format!("vdcs/ardesio/vms/{id}"),
        vcpus,
        memory_bytes: GIB,
        ..PlaceRequest::default()
    }
}

async fn until(client: &mut Client, name: &str, wanted: PlacementState) -> Placement {
    let reached = async {
        loop {
            let request = GetPlacementRequest { name: name.into() };
            let found = client.get_placement(request).await.unwrap().into_inner();
            if found.state() == wanted {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), reached).await.expect("the placement gets there")
}

#[tokio::test(flavor = "multi_thread")]
async fn place_commit_release_and_the_same_again() {
    let state = tempfile::tempdir().unwrap();
    let region = Region::start(state.path()).await;
    let mut client = region.client().await;
    let fleet = Fleet::join(3, small(), &region, &mut client).await;

    let placed = client.place(wish("web", 4)).await.unwrap().into_inner();
    assert_eq!((placed.name.as_str(), placed.state()), ("placements/web", PlacementState::Reserved));
    assert!(!placed.token.is_empty());
    // Nobody said for which VM: for one of that name, since a node promises to VMs only.
    assert_eq!(
        placed.request.as_ref().map(|request| request.resource.as_str()),
        Some("vdcs/ardesio/vms/web")
    );
    assert_eq!(placed.filters.iter().map(|f| f.nodes).collect::<Vec<_>>(), [3; 10]);
    // The same again is the same; another under its name, or another for the same VM, is refused.
    assert_eq!(client.place(wish("web", 4)).await.unwrap().into_inner(), placed);
    assert_eq!(client.place(wish("web", 2)).await.unwrap_err().code(), Code::AlreadyExists);
    let twice = PlaceRequest { resource: "vdcs/ardesio/vms/web".into(), ..wish("other", 1) };
    let refused = client.place(twice).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains(&placed.node), "{refused}");

    let name = placed.name.clone();
    for _ in 0..2 {
        let committed = client.commit_placement(CommitPlacementRequest { name: name.clone() }).await.unwrap();
        assert_eq!(committed.into_inner().state(), PlacementState::Committed);
    }
    let held: Vec<String> = fleet.nodes.iter().flat_map(|node| node.committed()).collect();
    assert_eq!(held, ["web"]);

    // Packed: the second goes where the first is; the third does not fit there.
    let second = client.place(wish("db", 4)).await.unwrap().into_inner();
    assert_eq!(second.node, placed.node);
    let third = client.place(wish("mail", 4)).await.unwrap().into_inner();
    assert_ne!(third.node, placed.node);
    assert_eq!(third.filters.iter().find(|f| f.filter == "fit").unwrap().nodes, 2);
    let listed =
        client.list_placements(ListPlacementsRequest { page_size: 2, ..Default::default() }).await.unwrap();
    let listed = listed.into_inner();
    assert_eq!(listed.placements.len(), 2);
    let rest = ListPlacementsRequest { page_token: listed.next_page_token, ..Default::default() };
    assert_eq!(client.list_placements(rest).await.unwrap().into_inner().placements.len(), 1);

    // What fits nowhere says what each filter left.
    let refused = client.place(wish("huge", 9)).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("9 vcpus") && refused.message().contains("fit 0"), "{refused}");
    assert_eq!(
        client.place(PlaceRequest { vcpus: 0, ..wish("none", 1) }).await.unwrap_err().code(),
        Code::InvalidArgument
    );

    for _ in 0..2 {
        let released =
            client.release_placement(ReleasePlacementRequest { name: name.clone() }).await.unwrap();
        assert_eq!(released.into_inner().state(), PlacementState::Released);
    }
    assert!(fleet.nodes.iter().all(|node| node.committed().is_empty()));
    let refused = client.commit_placement(CommitPlacementRequest { name }).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_committed_ends_and_what_is_committed_survives_a_restart() {
    let state = tempfile::tempdir().unwrap();
    let region = Region::start(state.path()).await;
    let mut client = region.client().await;
    let fleet = Fleet::join(2, small(), &region, &mut client).await;
    let brief = PlaceRequest { ttl_ms: 100, ..wish("brief", 8) };
    let kept = client.place(wish("kept", 8)).await.unwrap().into_inner();
    client.commit_placement(CommitPlacementRequest { name: kept.name.clone() }).await.unwrap();
    client.place(brief).await.unwrap();
    let ended = until(&mut client, "placements/brief", PlacementState::Released).await;
    assert!(ended.reason.contains("ttl"), "{}", ended.reason);

    drop(client);
    region.stop().await;
    let region = Region::start(state.path()).await;
    fleet.to.send(vec![region.address.to_string()]).unwrap();
    let mut client = region.client().await;
    fleet.all_fresh(&mut client).await;
    let found = client.get_placement(GetPlacementRequest { name: kept.name }).await.unwrap().into_inner();
    assert_eq!((found.state(), found.node), (PlacementState::Committed, kept.node));
    // The room of the one that ended is there again, that of the other is not.
    client.place(wish("next", 8)).await.unwrap();
    assert_eq!(client.place(wish("last", 1)).await.unwrap_err().code(), Code::ResourceExhausted);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_nodes_promises_need_a_fence() {
    let state = tempfile::tempdir().unwrap();
    let region = Region::start(state.path()).await;
    let mut client = region.client().await;
    let fleet = Fleet::join(2, small(), &region, &mut client).await;
    let placed = client.place(wish("web", 4)).await.unwrap().into_inner();
    client.commit_placement(CommitPlacementRequest { name: placed.name.clone() }).await.unwrap();
    let fence = |proof: &str| FenceNodeRecordRequest { name: placed.node.clone(), proof: proof.into() };
    assert_eq!(client.fence_node_record(fence("")).await.unwrap_err().code(), Code::InvalidArgument);
    let alive = client.fence_node_record(fence("I think it is dead")).await.unwrap_err();
    assert_eq!(alive.code(), Code::FailedPrecondition);

    let number = fleet.nodes.iter().position(|node| placed.node == format!("nodes/{}", node.name)).unwrap();
    fleet.kill(number);
    // Not heard of: its promise is its own still.
    let again = PlaceRequest { resource: "vdcs/ardesio/vms/web".into(), ..wish("web-2", 4) };
    assert_eq!(client.place(again.clone()).await.unwrap_err().code(), Code::FailedPrecondition);
    let fenced = async {
        loop {
            match client.fence_node_record(fence("power off by PDU 7, port 3")).await {
                Ok(record) => break record.into_inner(),
                Err(status) => assert_eq!(status.code(), Code::FailedPrecondition),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let record = tokio::time::timeout(Duration::from_secs(20), fenced).await.expect("its lease runs out");
    let fence = record.fence.unwrap();
    assert_eq!(
        (fence.proof.as_str(), fence.generation, fence.applied),
        ("power off by PDU 7, port 3", 1, false)
    );
    let moved = client.place(again).await.unwrap().into_inner();
    assert_ne!(moved.node, placed.node);
    let name = placed.name.clone();
    let over = client.get_placement(GetPlacementRequest { name }).await.unwrap().into_inner();
    assert_eq!((over.state(), over.reason.as_str()), (PlacementState::Released, "its node was fenced"));
    let delete = DeleteNodeRecordRequest { name: placed.node.clone() };
    assert_eq!(client.delete_node_record(delete).await.unwrap_err().code(), Code::FailedPrecondition);

    // It returns: it must end what it had before it gets anything new.
    assert_eq!(fleet.nodes[number].committed(), ["web"]);
    let (_to, at) = watch::channel(vec![region.address.to_string()]);
    let back = tokio::spawn(agent::run(
        Arc::clone(&fleet.nodes[number]),
        at,
        timing(),
        Arc::new(Counters::default()),
        Chance::new(2),
    ));
    fleet.all_fresh(&mut client).await;
    let applied = async {
        loop {
            let nodes = client.list_nodes(ListNodesRequest::default()).await.unwrap().into_inner().nodes;
            if nodes.iter().any(|node| node.fence.as_ref().is_some_and(|fence| fence.applied)) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), applied).await.expect("the fence is applied");
    assert!(fleet.nodes[number].committed().is_empty());
    client.place(wish("big", 8)).await.unwrap();
    back.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fits_without_a_site_and_groups_apart() {
    let state = tempfile::tempdir().unwrap();
    let region = Region::start(state.path()).await;
    let mut client = region.client().await;
    // One node at each of three sites.
    let _fleet = Fleet::join(3, small(), &region, &mut client).await;
    let at = |id: &str, site: &str, vcpus| PlaceRequest { site: site.into(), ..wish(id, vcpus) };
    for request in [at("a", "milano", 6), at("b", "milano", 2), at("c", "roma", 4), at("d", "torino", 7)] {
        let placed = client.place(request).await.unwrap().into_inner();
        client.commit_placement(CommitPlacementRequest { name: placed.name }).await.unwrap();
    }
    let held = PlaceRequest { class: AllocationClass::DrHeld.into(), ..at("held", "roma", 2) };
    client.place(held).await.unwrap();
    let fits = async {
        loop {
            let request = WhatFitsRequest { without_site: "milano".into() };
            let answer = client.what_fits(request).await.unwrap().into_inner();
            if answer.sites.iter().any(|site| site.vcpus_dr_held == 2) && answer.fits.len() == 2 {
                break answer;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let answer = tokio::time::timeout(Duration::from_secs(20), fits).await.expect("the lists come in");
    assert_eq!((answer.fitting, answer.not_fitting), (1, 1), "{answer:?}");
    let nowhere = answer.fits.iter().find(|fit| fit.node.is_empty()).unwrap();
    assert_eq!(nowhere.vcpus, 6);
    assert!(nowhere.reason.contains("no node has more than 4"), "{}", nowhere.reason);
    let unknown = client.what_fits(WhatFitsRequest { without_site: "atlantis".into() }).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);

    let grouped = |id: &str| PlaceRequest { anti_affinity_group: "g".into(), vcpus: 1, ..wish(id, 1) };
    let first = client.place(grouped("g1")).await.unwrap().into_inner().node;
    let second = client.place(grouped("g2")).await.unwrap().into_inner().node;
    assert_ne!(first, second);
    let third = client.place(grouped("g3")).await.unwrap_err();
    assert!(third.message().contains("anti-affinity 0"), "{third}");
}

#[tokio::test]
async fn recovery_plans_are_kept_by_version() {
    let state = tempfile::tempdir().unwrap();
    let region = Region::start(state.path()).await;
    let mut client = region.client().await;
    let put = |document: &str, expected_version| PutRecoveryPlanRequest {
        name: "plans/ardesio".into(),
        document: document.as_bytes().to_vec(),
        expected_version,
    };
    assert_eq!(client.put_recovery_plan(put("one", 0)).await.unwrap().into_inner().version, 1);
    assert_eq!(client.put_recovery_plan(put("again", 0)).await.unwrap_err().code(), Code::Aborted);
    assert_eq!(client.put_recovery_plan(put("two", 1)).await.unwrap().into_inner().version, 2);
    drop(client);
    region.stop().await;
    let region = Region::start(state.path()).await;
    let mut client = region.client().await;
    let get = GetRecoveryPlanRequest { name: "plans/ardesio".into() };
    let found = client.get_recovery_plan(get.clone()).await.unwrap().into_inner();
    assert_eq!((found.version, &found.document[..]), (2, &b"two"[..]));
    let listed = client.list_recovery_plans(ListRecoveryPlansRequest {}).await.unwrap().into_inner().plans;
    assert!(listed.len() == 1 && listed[0].document.is_empty());
    let delete = |expected_version| DeleteRecoveryPlanRequest { name: get.name.clone(), expected_version };
    assert_eq!(client.delete_recovery_plan(delete(1)).await.unwrap_err().code(), Code::Aborted);
    client.delete_recovery_plan(delete(2)).await.unwrap();
    assert_eq!(client.get_recovery_plan(get).await.unwrap_err().code(), Code::NotFound);
}
