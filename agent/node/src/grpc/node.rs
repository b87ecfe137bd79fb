//! NodeService.

use std::{fs, pin::Pin};

use pbjson_types::Timestamp;
use serio_api::v1::{
    AuditEntry, Capacity, DrainNodeRequest, DrainNodeResponse, Event, FenceNodeRequest, FenceNodeResponse,
    GetCapacityRequest, GetNodeRequest, Node, UndrainNodeRequest, UndrainNodeResponse, VerifyAuditRequest,
    VerifyAuditResponse, WatchAuditRequest, WatchEventsRequest, node_service_server::NodeService,
};
use serio_store::record::Millis;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::{
    Context, audit,
    convert::{self, request_of},
    follow::{Follower, follow},
    unexpected, usage,
};
use crate::net::VHOST_NET;
use crate::{
    error::Error,
    state::command::{Answer, Command, Order, Ordered, Query, Request as OrderId, VmState},
};

/// Events that are read at once, and lines that wait for their client: few, for many may watch.
const EVENTS: u32 = 16;
const WAITING_MAX: usize = 4;

/// The service.
#[derive(Debug, Clone)]
pub(super) struct NodeApi(pub(super) Context);

fn trimmed(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// "used", "off", or why the kernel cannot move packets by itself.
fn vhost_net(wanted: bool) -> String {
    if !wanted {
        return "off".to_owned();
    }
    let opened = fs::OpenOptions::new().read(true).write(true).open(VHOST_NET);
    opened.map_or_else(|error| format!("{}: {error}", VHOST_NET), |_| "used".to_owned())
}

/// What KVM is here, by what the kernel shows; nothing is opened for long.
fn kvm() -> String {
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return format!("cannot be used: /dev/kvm: {error}; `serio doctor` says more");
    }
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpus.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|f| f == flag);
    if has("svm") {
        "svm".to_owned()
    } else if has("vmx") {
        "vmx".to_owned()
    } else {
        "software (pvm)".to_owned()
    }
}

impl NodeApi {
    /// Carries out an order, in the audit log.
    async fn order(&self, on: String, order: Order, request: Option<OrderId>) -> Result<Ordered, Error> {
        let (state, id) = (self.0.state.clone(), request.as_ref().map(|request| request.id));
        let work = async move { state.ask(Command::Order(order, request)).await };
        let done = self.0.audited(on, id, work).await?;
        match done {
            Answer::Ordered(ordered) => Ok(ordered),
            other => Err(unexpected(&other)),
        }
    }

    fn resource(&self) -> String {
        format!("nodes/{}", self.0.node.name)
    }

    async fn events(&self, from: u64) -> Result<Vec<Event>, Error> {
        match self.0.query(Query::Events { from, limit: EVENTS }).await? {
            Answer::Events(events) => Ok(events.into_iter().map(convert::event).collect()),
            other => Err(unexpected(&other)),
        }
    }

    /// Sends events from a number on; with `follow` until the client goes. Numbers have no gaps: one that shows means that the
    /// oldest were dropped meanwhile.
    async fn send_events(self, wanted: WatchEventsRequest, client: Follower<Event>) {
        let WatchEventsRequest { mut from, follow, resource_prefix } = wanted;
        let mut newest = self.0.state.last_event();
        loop {
            let known = *newest.borrow_and_update();
            let events = match self.events(from).await {
                Ok(events) => events,
                Err(error) => return client.end(error),
            };
            let kept = match events.first() {
                Some(first) if from > 0 && first.number > from => format!("the oldest is {}", first.number),
                None if from > known.saturating_add(1) => format!("the newest is {known}"),
                _ => String::new(),
            };
            if !kept.is_empty() {
                return client.end(Error::Gone { from, kept });
            }
            let more = !events.is_empty();
            for event in events {
                let next = event.number;
                from = next.saturating_add(1);
                let wanted = event.resource.starts_with(&resource_prefix);
                if wanted && client.send(event, || Error::behind(next)).await.is_err() {
                    return;
                }
            }
            if more {
                continue;
            }
            if !follow {
                return;
            }
            tokio::select! {
                changed = newest.changed() => if changed.is_err() { return },
                () = client.closed() => return,
            }
        }
    }
}

#[tonic::async_trait]
impl NodeService for NodeApi {
    async fn get_node(&self, _: Request<GetNodeRequest>) -> Result<Response<Node>, Status> {
        let vms = match self.0.query(Query::Vms(None)).await? {
            Answer::Vms(vms) => vms,
            other => return Err(unexpected(&other).into()),
        };
        let running = vms
            .iter()
            .filter(|v| matches!(v.state, VmState::Running | VmState::Paused | VmState::Stopping))
            .count();
        let (drain_reason, fence_generation) = self.0.reporter.orders();
        let node = &self.0.node;
        let started = node.start_time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let start_time: Timestamp =
            convert::timestamp(Millis(i64::try_from(started.as_millis()).unwrap_or(0)));
        Ok(Response::new(Node {
            name: format!("nodes/{}", node.name),
            uid: node.uid.clone(),
            boot_id: node.boot_id.clone(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            site: node.site.clone(),
            failure_domain: node.failure_domain.clone(),
            start_time: Some(start_time),
            kernel_version: trimmed("/proc/sys/kernel/osrelease"),
            kvm: kvm(),
            vms_running: u32::try_from(running).unwrap_or(u32::MAX),
            vms_total: u32::try_from(vms.len()).unwrap_or(u32::MAX),
            drain_reason,
            fence_generation,
            conditions: self.0.health.conditions().iter().map(usage::condition).collect(),
            energy: Some(usage::energy(&self.0.meter.energy())),
            direct_io: node.direct_io.as_str().to_owned(),
            direct_io_refused: node.direct_io.refused(&node.state_dir),
            vhost_net: vhost_net(node.vhost_net),
        }))
    }

    async fn get_capacity(&self, _: Request<GetCapacityRequest>) -> Result<Response<Capacity>, Status> {
        let report = self.0.reporter.current();
        Ok(Response::new(Capacity {
            inventory: Some(report.inventory),
            usage: Some(report.usage),
            allocations: Some(report.allocations),
            scheduler: Some(report.link),
        }))
    }

    type WatchEventsStream = Pin<Box<dyn Stream<Item = Result<Event, Status>> + Send>>;

    async fn watch_events(
        &self,
        request: Request<WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let (client, stream) = follow(WAITING_MAX);
        tokio::spawn(self.clone().send_events(request.into_inner(), client));
        Ok(Response::new(Box::pin(stream)))
    }

    type WatchAuditStream = Pin<Box<dyn Stream<Item = Result<AuditEntry, Status>> + Send>>;

    async fn watch_audit(
        &self,
        request: Request<WatchAuditRequest>,
    ) -> Result<Response<Self::WatchAuditStream>, Status> {
        let (client, stream) = follow(WAITING_MAX);
        tokio::spawn(audit::send(self.0.audit.clone(), request.into_inner(), client));
        Ok(Response::new(Box::pin(stream)))
    }

    async fn verify_audit(
        &self,
        _: Request<VerifyAuditRequest>,
    ) -> Result<Response<VerifyAuditResponse>, Status> {
        Ok(Response::new(audit::verify(&self.0.audit).await?))
    }

    async fn drain_node(
        &self,
        request: Request<DrainNodeRequest>,
    ) -> Result<Response<DrainNodeResponse>, Status> {
        let message = request.into_inner();
        let id = request_of!("DrainNode", &message)?;
        match self.order(self.resource(), Order::Drain(message.reason), id).await? {
            Ordered::Blocking(blocking) => Ok(Response::new(DrainNodeResponse { blocking })),
            other => Err(unexpected(&Answer::Ordered(other)).into()),
        }
    }

    async fn undrain_node(
        &self,
        request: Request<UndrainNodeRequest>,
    ) -> Result<Response<UndrainNodeResponse>, Status> {
        let id = request_of!("UndrainNode", &request.into_inner())?;
        self.order(self.resource(), Order::Undrain, id).await?;
        Ok(Response::new(UndrainNodeResponse {}))
    }

    async fn fence_node(
        &self,
        request: Request<FenceNodeRequest>,
    ) -> Result<Response<FenceNodeResponse>, Status> {
        let message = request.into_inner();
        let request = request_of!("FenceNode", &message)?;
        let FenceNodeRequest { allocation_id, generation, .. } = message;
        let (on, id) = match allocation_id.as_str() {
            "" => (self.resource(), None),
            id => (format!("allocations/{id}"), Some(id.to_owned())),
        };
        match self.order(on, Order::Fence { id, generation }, request).await? {
            Ordered::Ended(ended) => Ok(Response::new(FenceNodeResponse { ended })),
            other => Err(unexpected(&Answer::Ordered(other)).into()),
        }
    }
}
