//! SchedulerService over the owner: the streams of agents, the questions of clients.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use serio_api::v1::{
    AgentMessage, DeleteNodeRecordRequest, DeleteNodeRecordResponse, GetNodeRecordRequest, ListNodesRequest,
    ListNodesResponse, NodeRecord, SchedulerMessage, agent_message::What,
    scheduler_service_server::SchedulerService,
};
use serio_types::Name;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt};

use crate::{
    auth::{self, AGENTS, Policy, READERS, Speaker, WRITERS},
    inventory::{ForgetError, Input, NODES_MAX, SessionId},
    owner::{Command, ForgetFailure, Handle, MESSAGES_MAX, ToAgent},
};

/// An agent says Hello at once.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// An agent that says nothing for that long, not even a lease, is ended.
const SILENCE_MAX: Duration = Duration::from_secs(120);

/// The service.
#[derive(Debug)]
pub struct Service {
    owner: Handle,
    policy: Policy,
    next_session: AtomicU64,
    /// One for each stream; a node that reconnects may hold two for a moment.
    streams: Arc<Semaphore>,
}

impl Service {
    /// Over that owner.
    #[must_use]
    pub fn new(owner: Handle, policy: Policy) -> Self {
        Self {
            owner,
            policy,
            next_session: AtomicU64::new(0),
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
        self.owner.send(Command::Open(session, ToAgent { messages: messages.clone(), alive })).await?;
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
        let nodes = self.owner.ask(|answer| Command::List(site, answer)).await?;
        Ok(Response::new(ListNodesResponse { nodes }))
    }

    async fn get_node_record(
        &self,
        request: Request<GetNodeRecordRequest>,
    ) -> Result<Response<NodeRecord>, Status> {
        auth::check(self.policy, &request, READERS)?;
        let name = node_name(&request.into_inner().name)?;
        let found = self.owner.ask(|answer| Command::Get(name.clone(), answer)).await?;
        found.map(Response::new).ok_or_else(|| Status::not_found(ForgetError::Unknown(name).to_string()))
    }

    async fn delete_node_record(
        &self,
        request: Request<DeleteNodeRecordRequest>,
    ) -> Result<Response<DeleteNodeRecordResponse>, Status> {
        auth::check(self.policy, &request, WRITERS)?;
        let name = node_name(&request.into_inner().name)?;
        match self.owner.ask(|answer| Command::Forget(name, answer)).await? {
            Ok(()) => Ok(Response::new(DeleteNodeRecordResponse {})),
            Err(ForgetFailure::Refused(error @ ForgetError::Unknown(_))) => {
                Err(Status::not_found(error.to_string()))
            }
            Err(ForgetFailure::Refused(error @ ForgetError::NotLost(_))) => {
                Err(Status::failed_precondition(error.to_string()))
            }
            Err(ForgetFailure::Store(error)) => {
                tracing::error!(%error, "cannot forget a node");
                Err(Status::internal(format!(
                    "{error} cannot be written: see the scheduler's log, and its disk"
                )))
            }
        }
    }
}

/// Hands on what one agent says.
struct Listener {
    owner: Handle,
    session: SessionId,
    speaker: Speaker,
    to_agent: mpsc::WeakSender<Result<SchedulerMessage, Status>>,
    _permit: OwnedSemaphorePermit,
}

impl Listener {
    /// Until the agent hangs up or is silent for too long, or the owner ends the session.
    async fn run(self, mut inbound: Streaming<AgentMessage>, mut ended: oneshot::Receiver<()>) {
        let mut patience = HELLO_TIMEOUT;
        loop {
            let heard = tokio::select! {
                heard = tokio::time::timeout(patience, inbound.message()) => heard,
                _ = &mut ended => break,
            };
            let message = match heard {
                Ok(Ok(Some(message))) => message,
                Ok(Ok(None)) => break,
                Ok(Err(status)) => {
                    tracing::debug!(session = self.session.0, %status, "an agent's stream broke");
                    break;
                }
                Err(_) => {
                    self.tell_silent(patience);
                    break;
                }
            };
            patience = SILENCE_MAX;
            // What a newer agent says may be unknown here.
            let Some(what) = message.what else { continue };
            if let What::Hello(hello) = &what
                && let Err(refused) = self.speaker.speaks_for(&hello.node_id)
            {
                tracing::warn!(session = self.session.0, %refused, "an agent was refused");
                self.tell(refused);
                break;
            }
            let Some(input) = input(self.session, what) else { continue };
            if self.owner.send(Command::Input(input)).await.is_err() {
                break;
            }
        }
        // When the owner is gone, so is the session.
        let _ = self.owner.send(Command::Input(Input::Gone(self.session))).await;
    }

    fn tell_silent(&self, patience: Duration) {
        self.tell(Status::deadline_exceeded(format!("nothing was said for {} s", patience.as_secs())));
    }

    /// The last word to this agent. One that does not read learns nothing.
    fn tell(&self, status: Status) {
        let _ = self.to_agent.upgrade().map(|sender| sender.try_send(Err(status)));
    }
}

/// What the owner is told; `None` for an answer, since nothing was ordered.
fn input(session: SessionId, what: What) -> Option<Input> {
    Some(match what {
        What::Hello(hello) => Input::Hello(session, hello),
        What::Inventory(inventory) => Input::Inventory(session, inventory),
        What::Usage(usage) => Input::Usage(session, usage),
        What::Lease(lease) => Input::Lease(session, lease),
        What::Allocations(allocations) => Input::Allocations(session, allocations),
        What::Answer(_) => return None,
    })
}

/// `nodes/a`, or why not.
fn node_name(text: &str) -> Result<Name, Status> {
    let parsed = text.strip_prefix("nodes/").map(str::parse::<Name>);
    let problem = match parsed {
        Some(Ok(name)) => return Ok(name),
        Some(Err(error)) => error.to_string(),
        None => format!("`{text}` is not of the form nodes/NAME"),
    };
    let details = ErrorDetails::with_bad_request_violation("name", problem.clone());
    Err(Status::with_error_details(tonic::Code::InvalidArgument, format!("name: {problem}"), details))
}
