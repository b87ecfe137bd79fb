//! SchedulerService over the owner: the streams of agents, the questions of clients.

mod check;
mod listener;
mod orders;

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use serio_api::v1::{
    AgentMessage, CommitPlacementRequest, DeleteNodeRecordRequest, DeleteNodeRecordResponse,
    DeleteRecoveryPlanRequest, DeleteRecoveryPlanResponse, FenceNodeRecordRequest, GetLeaderRequest,
    GetNodeRecordRequest, GetPlacementRequest, GetRecoveryPlanRequest, Leader, ListNodesRequest,
    ListNodesResponse, ListPlacementsRequest, ListPlacementsResponse, ListRecoveryPlansRequest,
    ListRecoveryPlansResponse, NodeRecord, PlaceRequest, Placement, PutRecoveryPlanRequest, RecoveryPlan,
    ReleasePlacementRequest, SchedulerMessage, WhatFitsRequest, WhatFitsResponse,
    scheduler_service_server::SchedulerService,
};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    auth::{self, AGENTS, EVERYONE, Policy, READERS, WRITERS},
    inventory::{NODES_MAX, SessionId},
    owner::{Handle, MESSAGES_MAX, Role, ToAgent},
    placement::what_if,
};
use listener::Listener;

/// The service.
#[derive(Debug)]
pub struct Service {
    owner: Handle,
    policy: Policy,
    /// Where others reach this scheduler.
    advertised: String,
    next_session: AtomicU64,
    /// Of the next placement's jitter.
    seed: AtomicU64,
    /// One for each stream; a node that reconnects may hold two for a moment.
    streams: Arc<Semaphore>,
}

impl Service {
    /// Over that owner.
    #[must_use]
    pub fn new(owner: Handle, policy: Policy, advertised: String) -> Self {
        Self {
            owner,
            policy,
            advertised,
            next_session: AtomicU64::new(0),
            // Two schedulers do not choose alike.
            seed: AtomicU64::new(uuid::Uuid::new_v4().as_u64_pair().0),
            streams: Arc::new(Semaphore::new(NODES_MAX * 2)),
        }
    }
}

#[tonic::async_trait]
impl SchedulerService for Service {
    type ConnectStream = Pin<Box<dyn Stream<Item = Result<SchedulerMessage, Status>> + Send>>;

    async fn connect(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        auth::check(self.policy, &request, AGENTS)?;
        let speaker = auth::speaker(self.policy, &request);
        let permit = Arc::clone(&self.streams)
            .try_acquire_owned()
            .map_err(|_| Status::resource_exhausted("too many agents are connected: try again later"))?;
        let session = SessionId(self.next_session.fetch_add(1, Ordering::Relaxed));
        let (messages, receiver) = mpsc::channel(MESSAGES_MAX);
        let (alive, ended) = oneshot::channel();
        self.owner.open(session, ToAgent { messages: messages.clone(), alive }).await?;
        // The listener's own sender is weak: when the owner drops its one, the stream ends.
        let listener = Listener {
            owner: self.owner.clone(),
            session,
            speaker,
            to_agent: messages.downgrade(),
            _permit: permit,
        };
        tokio::spawn(listener.run(request.into_inner(), ended));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn list_nodes(
        &self,
        request: Request<ListNodesRequest>,
    ) -> Result<Response<ListNodesResponse>, Status> {
        auth::check(self.policy, &request, READERS)?;
        let site = request.into_inner().site;
        let nodes = self.owner.read(move |core| core.node_records(&site)).await?;
        Ok(Response::new(ListNodesResponse { nodes }))
    }

    async fn get_node_record(
        &self,
        request: Request<GetNodeRecordRequest>,
    ) -> Result<Response<NodeRecord>, Status> {
        auth::check(self.policy, &request, READERS)?;
        let name = check::name("nodes", &request.into_inner().name)?;
        Ok(Response::new(self.owner.read(move |core| core.node_record(&name)).await??))
    }

    async fn delete_node_record(
        &self,
        request: Request<DeleteNodeRecordRequest>,
    ) -> Result<Response<DeleteNodeRecordResponse>, Status> {
        auth::check(self.policy, &request, WRITERS)?;
        let name = check::name("nodes", &request.into_inner().name)?;
        self.owner.ask(move |core| core.forget_node(&name)).await??;
        Ok(Response::new(DeleteNodeRecordResponse {}))
    }

    async fn fence_node_record(
        &self,
        request: Request<FenceNodeRecordRequest>,
    ) -> Result<Response<NodeRecord>, Status> {
        auth::check(self.policy, &request, WRITERS)?;
        let (name, proof) = check::fence(request.into_inner())?;
        Ok(Response::new(self.owner.ask(move |core| core.fence_node(&name, &proof)).await??))
    }

    async fn place(&self, request: Request<PlaceRequest>) -> Result<Response<Placement>, Status> {
        auth::check(self.policy, &request, WRITERS)?;
        let (id, request) = check::place(request.into_inner())?;
        let seed = self.seed.fetch_add(1, Ordering::Relaxed);
        let owner = self.owner.clone();
        // A caller that hangs up must not leave it half done.
        finished(tokio::spawn(async move { orders::place(&owner, id, request, seed).await })).await
    }

    async fn commit_placement(
        &self,
        request: Request<CommitPlacementRequest>,
    ) -> Result<Response<Placement>, Status> {
        auth::check(self.policy, &request, WRITERS)?;
        let id = check::name("placements", &request.into_inner().name)?;
        let owner = self.owner.clone();
        finished(tokio::spawn(async move { orders::commit(&owner, id).await })).await
    }

    async fn release_placement(
        &self,
        request: Request<ReleasePlacementRequest>,
    ) -> Result<Response<Placement>, Status> {
        auth::check(self.policy, &request, WRITERS)?;
        let id = check::name("placements", &request.into_inner().name)?;
        let owner = self.owner.clone();
        finished(tokio::spawn(async move { orders::release(&owner, id).await })).await
    }

    async fn get_placement(
        &self,
        request: Request<GetPlacementRequest>,
    ) -> Result<Response<Placement>, Status> {
        auth::check(self.policy, &request, READERS)?;
        let id = check::name("placements", &request.into_inner().name)?;
        Ok(Response::new(self.owner.read(move |core| core.placement(&id)).await??))
    }

    async fn list_placements(
        &self,
        request: Request<ListPlacementsRequest>,
    ) -> Result<Response<ListPlacementsResponse>, Status> {
        auth::check(self.policy, &request, READERS)?;
        let page = check::page(request.into_inner())?;
        let answer = self.owner.read(move |core| {
            let mut found =
                core.book.list(&page.vdc, page.after.as_ref()).map(|(_, placement)| placement.clone());
            let placements: Vec<Placement> = found.by_ref().take(page.size).collect();
            let last = placements.last().filter(|_| found.next().is_some());
            let next_page_token = last.map(|placement| placement.name.clone()).unwrap_or_default();
            ListPlacementsResponse { placements, next_page_token }
        });
        Ok(Response::new(answer.await?))
    }

    async fn what_fits(
        &self,
        request: Request<WhatFitsRequest>,
    ) -> Result<Response<WhatFitsResponse>, Status> {
        auth::check(self.policy, &request, READERS)?;
        let site = request.into_inner().without_site;
        let nodes =
            self.owner.ask(|core| core.lead().map(|()| core.inventory.members(core.since_start()))).await??;
        check::site(&site, &nodes)?;
        // A packing of thousands takes a while: not in the owner's thread, and not in one of the network's.
        let answer = tokio::task::spawn_blocking(move || what_if::without_site(&site, &nodes));
        answer
            .await
            .map(Response::new)
            .map_err(|_| Status::internal("the packing failed: see the scheduler's log"))
    }

    async fn put_recovery_plan(
        &self,
        request: Request<PutRecoveryPlanRequest>,
    ) -> Result<Response<RecoveryPlan>, Status> {
        auth::check(self.policy, &request, WRITERS)?;
        let (vdc, document, expected) = check::plan(request.into_inner())?;
        Ok(Response::new(self.owner.ask(move |core| core.put_plan(&vdc, document, expected)).await??))
    }

    async fn get_recovery_plan(
        &self,
        request: Request<GetRecoveryPlanRequest>,
    ) -> Result<Response<RecoveryPlan>, Status> {
        auth::check(self.policy, &request, READERS)?;
        let vdc = check::name("plans", &request.into_inner().name)?;
        let (found, name) = self.owner.read(move |core| (core.plans.get(&vdc).cloned(), vdc)).await?;
        found.map(Response::new).ok_or_else(|| Status::not_found(format!("plans/{name} is not known here")))
    }

    async fn list_recovery_plans(
        &self,
        request: Request<ListRecoveryPlansRequest>,
    ) -> Result<Response<ListRecoveryPlansResponse>, Status> {
        auth::check(self.policy, &request, READERS)?;
        let bare = |plan: &RecoveryPlan| RecoveryPlan { document: Vec::new(), ..plan.clone() };
        let plans = self.owner.read(move |core| core.plans.values().map(bare).collect()).await?;
        Ok(Response::new(ListRecoveryPlansResponse { plans }))
    }

    async fn delete_recovery_plan(
        &self,
        request: Request<DeleteRecoveryPlanRequest>,
    ) -> Result<Response<DeleteRecoveryPlanResponse>, Status> {
        auth::check(self.policy, &request, WRITERS)?;
        let request = request.into_inner();
        let vdc = check::name("plans", &request.name)?;
        self.owner.ask(move |core| core.delete_plan(&vdc, request.expected_version)).await??;
        Ok(Response::new(DeleteRecoveryPlanResponse {}))
    }

    async fn get_leader(&self, request: Request<GetLeaderRequest>) -> Result<Response<Leader>, Status> {
        auth::check(self.policy, &request, EVERYONE)?;
        let leader = match self.owner.ask(|core| core.role().clone()).await? {
            Role::Leader => Leader { address: self.advertised.clone(), is_self: true },
            Role::Follower(address) => Leader { address, is_self: false },
        };
        Ok(Response::new(leader))
    }
}

async fn finished(
    task: tokio::task::JoinHandle<Result<Placement, Status>>,
) -> Result<Response<Placement>, Status> {
    let ended = task.await.map_err(|_| Status::internal("the call failed: see the scheduler's log"))?;
    ended.map(Response::new)
}
