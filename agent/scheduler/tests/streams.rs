//! The scheduler over real connections: streams of agents, questions of clients, certificates, restarts.
#![allow(clippy::unwrap_used, reason = "the helpers of a test may panic as the test does")]

use std::{net::SocketAddr, path::Path, time::Duration};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serio_api::v1::{
    AgentMessage, Allocation, Allocations, CommitPlacementRequest, DeleteNodeRecordRequest,
    GetNodeRecordRequest, Hello, Inventory, Lease, ListNodesRequest, NodeFreshness, NodeRecord, PlaceRequest,
    PlacementState, ReleasePlacementRequest, SchedulerMessage, agent_message::What, scheduler_message,
    scheduler_service_client::SchedulerServiceClient,
};
use serio_scheduler::{
    config::Security,
    owner, server,
    simulate::{
        self, Chance,
        agent::Peer,
        node::{Node, Size},
    },
    store::sqlite::Sqlite,
};
use tokio::{net::TcpListener, sync::mpsc, sync::oneshot, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Streaming,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

/// A scheduler in this process, on a free port.
struct Running {
    address: SocketAddr,
    end: oneshot::Sender<()>,
    served: JoinHandle<()>,
}

async fn start(state: &Path, security: Security) -> Running {
    let owner = owner::start(Sqlite::open(state).unwrap()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (end, ended) = oneshot::channel();
    let served = tokio::spawn(async move {
        let ended = async { drop(ended.await) };
        server::serve(listener, &security, owner, ended).await.unwrap();
    });
    Running { address, end, served }
}

impl Running {
    async fn client(&self) -> SchedulerServiceClient<Channel> {
        // The service has a call named Connect, so the client has no constructor of that name.
        SchedulerServiceClient::new(
            Endpoint::from_shared(format!("http://{}", self.address)).unwrap().connect().await.unwrap(),
        )
    }

    async fn stop(self) {
        self.end.send(()).unwrap();
        tokio::time::timeout(Duration::from_secs(20), self.served).await.expect("it ends by itself").unwrap();
    }
}

/// An agent's stream.
struct Agent {
    say: mpsc::Sender<AgentMessage>,
    hear: Streaming<SchedulerMessage>,
}

impl Agent {
    async fn connect(mut client: SchedulerServiceClient<Channel>, node: &str) -> Result<Self, tonic::Status> {
        let (say, receiver) = mpsc::channel(8);
        let hello = Hello {
            node_id: node.into(),
            node_uid: format!("uid-{node}"),
            site: "milano".into(),
            ..Hello::default()
        };
        say.try_send(AgentMessage { what: Some(What::Hello(hello)) }).unwrap();
        let hear = client.connect(ReceiverStream::new(receiver)).await?.into_inner();
        Ok(Self { say, hear })
    }

    async fn say(&self, what: What) {
        self.say.send(AgentMessage { what: Some(what) }).await.unwrap();
    }

    async fn hear(&mut self) -> Result<Option<scheduler_message::What>, tonic::Status> {
        let message = tokio::time::timeout(Duration::from_secs(10), self.hear.message())
            .await
            .expect("an answer in time");
        message.map(|m| m.and_then(|m| m.what))
    }
}

/// Asks until the record is as wanted.
async fn until(
    client: &mut SchedulerServiceClient<Channel>,
    wanted: impl Fn(&NodeRecord) -> bool,
) -> NodeRecord {
    for _ in 0..2000 {
        let nodes = client.list_nodes(ListNodesRequest::default()).await.unwrap().into_inner().nodes;
        if let Some(found) = nodes.into_iter().find(|node| wanted(node)) {
            return found;
        }
        tokio::task::yield_now().await;
    }
    panic!("the record never was as wanted");
}

#[tokio::test]
async fn a_node_reports_and_clients_see_it() {
    let state = tempfile::tempdir().unwrap();
    let running = start(state.path(), Security::Insecure).await;
    let mut client = running.client().await;
    let mut agent = Agent::connect(client.clone(), "a").await.unwrap();
    let Some(scheduler_message::What::Welcome(welcome)) = agent.hear().await.unwrap() else {
        panic!("no welcome")
    };
    assert_eq!((welcome.inventory_generation, welcome.allocations_digest.as_str()), (0, ""));
    assert!(!welcome.scheduler_id.is_empty());

    agent.say(What::Lease(Lease { sequence: 1, ttl_ms: 60_000 })).await;
    agent.say(What::Inventory(Inventory { generation: 3, ..Inventory::default() })).await;
    agent.say(What::Allocations(Allocations { digest: "x".into(), ..Allocations::default() })).await;
    assert!(matches!(agent.hear().await.unwrap(), Some(scheduler_message::What::SendAllocations(_))));
    let list = vec![Allocation { id: "v".into(), vcpus: 2, ..Allocation::default() }];
    agent
        .say(What::Allocations(Allocations { digest: "x".into(), allocations: list.clone(), complete: true }))
        .await;
    let record = until(&mut client, |n| n.allocations.is_some()).await;
    assert_eq!(record.name, "nodes/a");
    assert_eq!(record.freshness(), NodeFreshness::Fresh);
    assert_eq!(record.inventory.unwrap().generation, 3);
    assert_eq!(record.allocations.unwrap().allocations, list);

    // A fresh node is not forgotten; a stranger is not known; a name that is none is said so.
    let delete = |name: &str| DeleteNodeRecordRequest { name: name.into() };
    assert_eq!(
        client.delete_node_record(delete("nodes/a")).await.unwrap_err().code(),
        Code::FailedPrecondition
    );
    assert_eq!(client.delete_node_record(delete("nodes/b")).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(client.delete_node_record(delete("a")).await.unwrap_err().code(), Code::InvalidArgument);
    let one =
        client.get_node_record(GetNodeRecordRequest { name: "nodes/a".into() }).await.unwrap().into_inner();
    assert_eq!(one.hello.unwrap().site, "milano");

    // After a restart it knows everything but that the node lives.
    drop(client);
    running.stop().await;
    assert!(agent.hear().await.is_err() || agent.hear().await.is_ok_and(|m| m.is_none()));
    let running = start(state.path(), Security::Insecure).await;
    let mut client = running.client().await;
    let record = until(&mut client, |_| true).await;
    assert_eq!(record.freshness(), NodeFreshness::Suspect);
    assert_eq!(record.allocations.unwrap().digest, "x");
    let mut agent = Agent::connect(client.clone(), "a").await.unwrap();
    let Some(scheduler_message::What::Welcome(again)) = agent.hear().await.unwrap() else {
        panic!("no welcome")
    };
    assert_eq!(again.scheduler_id, welcome.scheduler_id);
    assert_eq!((again.inventory_generation, again.allocations_digest.as_str()), (3, "x"));
    agent.say(What::Lease(Lease { sequence: 1, ttl_ms: 60_000 })).await;
    until(&mut client, |n| n.freshness() == NodeFreshness::Fresh).await;
}

#[tokio::test]
async fn the_newer_connection_wins_and_nonsense_is_refused() {
    let state = tempfile::tempdir().unwrap();
    let running = start(state.path(), Security::Insecure).await;
    let mut older = Agent::connect(running.client().await, "a").await.unwrap();
    older.hear().await.unwrap();
    let mut newer = Agent::connect(running.client().await, "a").await.unwrap();
    newer.hear().await.unwrap();
    let status = older.hear().await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted, "{status}");
    assert!(status.message().contains("node_name"), "{status}");

    let mut wrong = Agent::connect(running.client().await, "Not A Name").await.unwrap();
    assert_eq!(wrong.hear().await.unwrap_err().code(), Code::InvalidArgument);
    newer.say(What::Hello(Hello { node_id: "b".into(), ..Hello::default() })).await;
    assert_eq!(newer.hear().await.unwrap_err().code(), Code::InvalidArgument);
}

/// An authority, and certificates by role, as `serio pki` makes them.
struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let certificate = params.self_signed(&key).unwrap().pem();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    fn issue(&self, role: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, role);
        params.distinguished_name.push(DnType::OrganizationalUnitName, role);
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    async fn client(
        &self,
        address: SocketAddr,
        role: Option<&str>,
    ) -> Result<SchedulerServiceClient<Channel>, tonic::transport::Error> {
        let mut tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&self.certificate))
            .domain_name("localhost");
        if let Some(role) = role {
            let (certificate, key) = self.issue(role);
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        let endpoint = Endpoint::from_shared(format!("https://{address}")).unwrap().tls_config(tls).unwrap();
        endpoint.connect().await.map(SchedulerServiceClient::new)
    }
}

#[tokio::test]
async fn roles_decide_who_may_what() {
    let authority = Authority::new();
    let folder = tempfile::tempdir().unwrap();
    let (certificate, key) = authority.issue("control-plane");
    std::fs::write(folder.path().join("ca-cert.pem"), &authority.certificate).unwrap();
    std::fs::write(folder.path().join("server-cert.pem"), certificate).unwrap();
    std::fs::write(folder.path().join("server-key.pem"), key).unwrap();
    let running = start(&folder.path().join("state"), Security::Tls(folder.path().to_owned())).await;

    for role in ["node", "peer-agent"] {
        let client = authority.client(running.address, Some(role)).await.unwrap();
        let mut agent = Agent::connect(client.clone(), role).await.unwrap();
        assert!(matches!(agent.hear().await.unwrap(), Some(scheduler_message::What::Welcome(_))));
        // It may not speak for another node.
        let mut impostor = Agent::connect(client.clone(), "other").await.unwrap();
        let refused = impostor.hear().await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
        assert!(refused.message().contains("node_name"), "{refused}");
        let refused = client.clone().list_nodes(ListNodesRequest::default()).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
        assert!(refused.message().contains("control-plane"), "{refused}");
    }
    for role in ["control-plane", "auditor"] {
        let mut client = authority.client(running.address, Some(role)).await.unwrap();
        assert_eq!(client.list_nodes(ListNodesRequest::default()).await.unwrap().into_inner().nodes.len(), 2);
        let agent = Agent::connect(client.clone(), "x").await;
        assert_eq!(agent.err().map(|status| status.code()), Some(Code::PermissionDenied));
        let delete = client
            .delete_node_record(DeleteNodeRecordRequest { name: "nodes/node".into() })
            .await
            .unwrap_err();
        assert_eq!(
            delete.code(),
            if role == "auditor" { Code::PermissionDenied } else { Code::FailedPrecondition }
        );
    }
    let mut nobody = authority.client(running.address, Some("guest")).await.unwrap();
    assert_eq!(
        nobody.list_nodes(ListNodesRequest::default()).await.unwrap_err().code(),
        Code::PermissionDenied
    );

    // Without a certificate, or with one of another authority, TLS itself refuses: at the latest with the first call.
    let strangers = [
        authority.client(running.address, None).await,
        Authority::new().client(running.address, Some("node")).await,
    ];
    for mut client in strangers.into_iter().flatten() {
        assert!(client.list_nodes(ListNodesRequest::default()).await.is_err());
    }
}

#[tokio::test]
async fn health_is_served_and_garbage_harms_nobody() {
    use tokio::io::AsyncWriteExt;
    let state = tempfile::tempdir().unwrap();
    let running = start(state.path(), Security::Insecure).await;
    for garbage in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\nnonsense nonsense"]
    {
        let mut stream = tokio::net::TcpStream::connect(running.address).await.unwrap();
        stream.write_all(garbage).await.unwrap();
    }
    let channel =
        Endpoint::from_shared(format!("http://{}", running.address)).unwrap().connect().await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    let request = tonic_health::pb::HealthCheckRequest { service: "serio.v1.SchedulerService".into() };
    assert_eq!(health.check(request).await.unwrap().into_inner().status, 1);
}

/// What it does with the next order, and what that was.
async fn obeys(agent: &mut Agent, node: &Node) -> scheduler_message::What {
    loop {
        let what = agent.hear().await.unwrap().expect("an order");
        if let Some(answer) = node.order(SchedulerMessage { what: Some(what.clone()) }) {
            agent.say(What::Answer(answer)).await;
            return what;
        }
    }
}

#[tokio::test]
async fn a_node_that_is_back_is_told_at_once_what_it_is_to_release() {
    let state = tempfile::tempdir().unwrap();
    let running = start(state.path(), Security::Insecure).await;
    let mut client = running.client().await;
    let size = Size { vcpus: 8, memory: 1 << 34, storage: 1 << 37, overhead: 0 };
    let node = simulate::fleet(1, 0, size, &mut Chance::new(1)).remove(0);
    let mut agent = Agent::connect(client.clone(), "a").await.unwrap();
    agent.hear().await.unwrap();
    agent.say(What::Lease(Lease { sequence: 1, ttl_ms: 60_000 })).await;
    agent.say(What::Inventory(node.inventory())).await;
    agent.say(What::Allocations(node.allocations(true))).await;
    until(&mut client, |n| n.inventory.is_some() && n.freshness() == NodeFreshness::Fresh).await;
    let wish = PlaceRequest {
        request_id: "web".into(),
        vdc: "ardesio".into(),
        vcpus: 1,
        memory_bytes: 1 << 20,
        ttl_ms: 60_000,
        ..PlaceRequest::default()
    };
    let (placed, _) = tokio::join!(client.place(wish), obeys(&mut agent, &node));
    let name = placed.unwrap().into_inner().name;
    let mut caller = running.client().await;
    let commit = caller.commit_placement(CommitPlacementRequest { name: name.clone() });
    let (committed, _) = tokio::join!(commit, obeys(&mut agent, &node));
    committed.unwrap();

    // It goes, and is to give back meanwhile.
    drop(agent);
    let released = caller.release_placement(ReleasePlacementRequest { name: name.clone() }).await;
    assert!(released.is_err() || released.is_ok_and(|p| p.into_inner().state() == PlacementState::Releasing));
    let mut agent = Agent::connect(running.client().await, "a").await.unwrap();
    // Whatever it says is answered later than that.
    agent.say(What::Allocations(Allocations { digest: "another".into(), ..Allocations::default() })).await;
    assert!(matches!(agent.hear().await.unwrap(), Some(scheduler_message::What::Welcome(_))));
    let first = agent.hear().await.unwrap();
    assert!(matches!(first, Some(scheduler_message::What::Release(_))), "{first:?}");
}
