//! The link against a scheduler in this process.

use std::{collections::VecDeque, pin::Pin};

use serio_api::v1::{
    self, AgentMessage, AllocationState, Answer, Commit, DeleteNodeRecordRequest, DeleteNodeRecordResponse,
    Drain, Fence, GetNodeRecordRequest, Lease, ListNodesRequest, ListNodesResponse, NodeRecord, Refused,
    RefusedKind, Release, Reserve, Reserved, SchedulerMessage, SendAllocations, Undrain, Welcome,
    agent_message::What,
    answer::What as Answered,
    scheduler_message::What as Said,
    scheduler_service_server::{SchedulerService, SchedulerServiceServer},
};
use tokio::{net::TcpListener, sync::mpsc, task::AbortHandle, time::timeout};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream, wrappers::TcpListenerStream};
use tonic::{Request, Response, Status, Streaming, transport::Server};

use super::{
    capacity_test::{allocation, recorded, settings},
    *,
};

/// Hands each connection's messages to the test, and says what the test tells it to.
struct FakeScheduler {
    connections: mpsc::Sender<Connection>,
}

struct Connection {
    from_agent: Streaming<AgentMessage>,
    /// What came while an answer was waited for: which of both comes first is open.
    kept: VecDeque<What>,
    to_agent: mpsc::Sender<Result<SchedulerMessage, Status>>,
}

type Out = Pin<Box<dyn Stream<Item = Result<SchedulerMessage, Status>> + Send>>;

#[tonic::async_trait]
impl SchedulerService for FakeScheduler {
    type ConnectStream = Out;

    async fn connect(&self, request: Request<Streaming<AgentMessage>>) -> Result<Response<Out>, Status> {
        let (to_agent, receiver) = mpsc::channel(8);
        let connection = Connection { from_agent: request.into_inner(), kept: VecDeque::new(), to_agent };
        self.connections.send(connection).await.map_err(|_| Status::unavailable("over"))?;
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn list_nodes(&self, _: Request<ListNodesRequest>) -> Result<Response<ListNodesResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn get_node_record(
        &self,
        _: Request<GetNodeRecordRequest>,
    ) -> Result<Response<NodeRecord>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn delete_node_record(
        &self,
        _: Request<DeleteNodeRecordRequest>,
    ) -> Result<Response<DeleteNodeRecordResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn fence_node_record(
        &self,
        _: Request<v1::FenceNodeRecordRequest>,
    ) -> Result<Response<v1::NodeRecord>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn place(&self, _: Request<v1::PlaceRequest>) -> Result<Response<v1::Placement>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn commit_placement(
        &self,
        _: Request<v1::CommitPlacementRequest>,
    ) -> Result<Response<v1::Placement>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn release_placement(
        &self,
        _: Request<v1::ReleasePlacementRequest>,
    ) -> Result<Response<v1::Placement>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn get_placement(
        &self,
        _: Request<v1::GetPlacementRequest>,
    ) -> Result<Response<v1::Placement>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list_placements(
        &self,
        _: Request<v1::ListPlacementsRequest>,
    ) -> Result<Response<v1::ListPlacementsResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn what_fits(
        &self,
        _: Request<v1::WhatFitsRequest>,
    ) -> Result<Response<v1::WhatFitsResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn put_recovery_plan(
        &self,
        _: Request<v1::PutRecoveryPlanRequest>,
    ) -> Result<Response<v1::RecoveryPlan>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn get_recovery_plan(
        &self,
        _: Request<v1::GetRecoveryPlanRequest>,
    ) -> Result<Response<v1::RecoveryPlan>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list_recovery_plans(
        &self,
        _: Request<v1::ListRecoveryPlansRequest>,
    ) -> Result<Response<v1::ListRecoveryPlansResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn delete_recovery_plan(
        &self,
        _: Request<v1::DeleteRecoveryPlanRequest>,
    ) -> Result<Response<v1::DeleteRecoveryPlanResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn get_leader(&self, _: Request<v1::GetLeaderRequest>) -> Result<Response<v1::Leader>, Status> {
        Err(Status::unimplemented(""))
    }
}

impl Connection {
    async fn next(&mut self) -> What {
        match self.kept.pop_front() {
            Some(kept) => kept,
            None => self.receive().await,
        }
    }

    async fn receive(&mut self) -> What {
        timeout(Duration::from_secs(20), self.from_agent.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap()
            .what
            .unwrap()
    }

    /// The next message that the test looks for; others are passed over. Leases come without end, so it has one.
    async fn next_where<T>(&mut self, pick: impl Fn(What) -> Option<T>) -> T {
        let search = async {
            loop {
                if let Some(found) = pick(self.next().await) {
                    return found;
                }
            }
        };
        timeout(Duration::from_secs(60), search).await.expect("it never comes")
    }

    async fn complete_list(&mut self) -> Allocations {
        self.next_where(|what| match what {
            What::Allocations(list) if list.complete => Some(list),
            _ => None,
        })
        .await
    }

    /// Orders, and waits for the answer to just this call.
    async fn order(&mut self, call: u64, what: Said) -> Answered {
        self.say(what).await;
        loop {
            match self.receive().await {
                What::Answer(Answer { call: of, what }) if of == call => return what.unwrap(),
                other => self.kept.push_back(other),
            }
        }
    }

    async fn say(&self, what: Said) {
        self.to_agent.send(Ok(SchedulerMessage { what: Some(what) })).await.unwrap();
    }
}

/// Its address, those who connect, and the server, to be ended.
async fn scheduler() -> (String, mpsc::Receiver<Connection>, AbortHandle) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (connections, accepted) = mpsc::channel(4);
    let service = SchedulerServiceServer::new(FakeScheduler { connections });
    let server = Server::builder().add_service(service).serve_with_incoming(TcpListenerStream::new(listener));
    (url, accepted, tokio::spawn(server).abort_handle())
}

#[tokio::test]
async fn the_scheduler_hears_everything_and_may_come_and_go() {
    let root = recorded();
    let (url, mut accepted, server) = scheduler().await;
    let (state, receiver) = watch::channel(Snapshot::default());
    let reporter =
        Reporter::with_host(settings(root.path(), Some(url.clone())), receiver, Host::new(root.path()));
    let running = tokio::spawn(reporter.clone().run());

    let mut first = accepted.recv().await.unwrap();
    let What::Hello(hello) = first.next().await else { panic!("Hello comes first") };
    assert_eq!((hello.node_id.as_str(), hello.boot_id.as_str(), hello.site.as_str()), ("a", "b00t", "s"));
    first.say(Said::Welcome(Welcome::default())).await;
    let What::Lease(lease) = first.next().await else { panic!("a lease at once") };
    assert_eq!((lease.sequence, lease.ttl_ms), (1, 30));
    let inventory = first.next_where(|what| if let What::Inventory(i) = what { Some(i) } else { None }).await;
    assert_eq!(inventory.cpu_model, "Good CPU");
    assert_eq!(first.complete_list().await.allocations, []);
    first.next_where(|what| matches!(what, What::Usage(_)).then_some(())).await;
    first.next_where(|what| matches!(what, What::Lease(Lease { sequence: 4.., .. })).then_some(())).await;
    let link = reporter.current().link;
    assert!(link.connected && link.url == url && link.since.is_some());

    // A change is told with the list; the digest alone comes each interval; asked, the list comes again.
    state.send_replace(Snapshot { allocations: vec![allocation("x")], ..Snapshot::default() });
    assert_eq!(first.complete_list().await.digest, digest(&[allocation("x")]));
    let short = first.next_where(|what| match what {
        What::Allocations(list) if !list.complete => Some(list),
        _ => None,
    });
    assert_eq!(short.await.digest, digest(&[allocation("x")]));
    first.say(Said::SendAllocations(SendAllocations {})).await;
    assert_eq!(first.complete_list().await.allocations, [allocation("x")]);

    // It goes; the node comes back, and sends only what the scheduler does not have.
    drop(first);
    let mut second = accepted.recv().await.unwrap();
    let What::Hello(_) = second.next().await else { panic!("Hello comes first") };
    let Report { inventory, allocations, .. } = reporter.current();
    let known = Welcome {
        inventory_generation: inventory.generation,
        allocations_digest: allocations.digest,
        ..Default::default()
    };
    second.say(Said::Welcome(known)).await;
    for _ in 0..8 {
        match second.next().await {
            What::Inventory(_) => panic!("the scheduler has this inventory"),
            What::Allocations(list) => assert!(!list.complete, "the scheduler has this list"),
            _ => {}
        }
    }
    assert!(!reporter.current().link.last_error.is_empty());
    running.abort();
    server.abort();
}

#[tokio::test]
async fn without_a_scheduler_the_node_goes_on() {
    let root = recorded();
    let (state, receiver) = watch::channel(Snapshot::default());
    // A port that nobody listens on.
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let url = Some(format!("http://127.0.0.1:{port}"));
    let reporter = Reporter::with_host(settings(root.path(), url), receiver, Host::new(root.path()));
    let running = tokio::spawn(reporter.clone().run());
    state.send_replace(Snapshot { provisioned_bytes: 9, ..Snapshot::default() });
    let fine = async {
        loop {
            let report = reporter.current();
            if report.link.last_error.contains("cannot connect")
                && report.inventory.storage_pools[0].provisioned_bytes == 9
            {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(20), fine).await.unwrap();
    assert!(!reporter.current().link.connected);
    running.abort();
}

fn reserve(call: u64, key: &str, vcpus: u32) -> Reserve {
    let resource = format!("vdcs/a/vms/{key}");
    Reserve {
        call,
        key: key.into(),
        ttl_ms: 60_000,
        resource,
        vcpus,
        memory_bytes: 32 << 20,
        ..Default::default()
    }
}

fn kind(answer: Answered) -> (RefusedKind, Refused) {
    match answer {
        Answered::Refused(refused) => (refused.kind(), refused),
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn the_scheduler_orders_and_the_node_has_the_veto() {
    let root = recorded();
    let (url, mut accepted, server) = scheduler().await;
    // 12 vcpus in all.
    let (state, watches) = crate::state::orders_test::start(&root.path().join("state.db"));
    let settings = settings(root.path(), Some(url));
    let reporter = Reporter::with_host(settings, watches.snapshot.clone(), Host::new(root.path()))
        .with_state(state, None);
    let running = tokio::spawn(reporter.run());
    let mut node = accepted.recv().await.unwrap();
    let What::Hello(_) = node.next().await else { panic!("Hello comes first") };
    node.say(Said::Welcome(Welcome::default())).await;

    let Answered::Reserved(Reserved { token, ttl_ms, .. }) =
        node.order(1, Said::Reserve(reserve(1, "web", 8))).await
    else {
        panic!("it fits")
    };
    assert!(ttl_ms > 0 && ttl_ms <= 60_000);
    let list = |what| match what {
        What::Allocations(list) => list.allocations.first().cloned(),
        _ => None,
    };
    let pending = node.next_where(list).await;
    assert_eq!((pending.state(), pending.key.as_str()), (AllocationState::Pending, "web"));
    let (full, refused) = kind(node.order(2, Said::Reserve(reserve(2, "db", 5))).await);
    assert_eq!((full, refused.resource.as_str()), (RefusedKind::Full, "vcpus"));
    assert_eq!((refused.asked, refused.limit, refused.used), (5, 12, 8));
    assert!(matches!(
        node.order(3, Said::Commit(Commit { call: 3, token: token.clone() })).await,
        Answered::Done(_)
    ));
    assert!(matches!(
        node.order(4, Said::Commit(Commit { call: 4, token: token.clone() })).await,
        Answered::Done(_)
    ));
    let Answered::Reserved(again) = node.order(5, Said::Reserve(reserve(5, "web", 8))).await else {
        panic!("known")
    };
    assert_eq!((again.token, again.ttl_ms), (token.clone(), 0), "the same promise, committed");

    assert!(matches!(
        node.order(6, Said::Drain(Drain { call: 6, reason: "r".into() })).await,
        Answered::Done(_)
    ));
    let drained = node.next_where(|what| match what {
        What::Inventory(inventory) => inventory.draining.then_some(inventory.drain_reason),
        _ => None,
    });
    assert_eq!(drained.await, "r");
    assert_eq!(kind(node.order(7, Said::Reserve(reserve(7, "x", 1))).await).0, RefusedKind::Drained);
    assert!(matches!(node.order(8, Said::Undrain(Undrain { call: 8 })).await, Answered::Done(_)));
    let stale = Reserve { expected_generation: 1, ..reserve(9, "x", 1) };
    assert_eq!(kind(node.order(9, Said::Reserve(stale)).await).0, RefusedKind::Stale);
    let on_one = Reserve { numa_node: Some(1), ..reserve(11, "x", 1) };
    let Answered::Reserved(on_one) = node.order(11, Said::Reserve(on_one)).await else {
        panic!("it fits there")
    };
    assert_eq!(on_one.numa_node, Some(1));

    let fence = Fence { call: 12, generation: 3, allocation_id: String::new() };
    let Answered::Done(done) = node.order(12, Said::Fence(fence)).await else { panic!("fenced") };
    assert_eq!(done.ended.len(), 2);
    let release = Release { call: 13, token };
    assert_eq!(kind(node.order(13, Said::Release(release)).await).0, RefusedKind::UnknownToken);
    assert_eq!(kind(node.order(14, Said::Reserve(reserve(14, "x", 1))).await).0, RefusedKind::Fenced);
    running.abort();
    server.abort();
}
