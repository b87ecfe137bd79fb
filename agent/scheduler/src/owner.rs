//! The one owner of inventory and store: a thread that takes commands from a bounded channel, one at a time.
//!
//! Order of effects: the inventory changes, what must survive is written and synced, then agents and callers are answered.
//! A session's channel to its agent is bounded; an agent that does not read is ended.

use std::{
    collections::HashMap,
    thread,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use pbjson_types::Timestamp;
use serio_api::v1::{NodeRecord, SchedulerMessage, SendAllocations, Welcome, scheduler_message::What};
use serio_types::Name;
use tokio::sync::{mpsc, oneshot};
use tonic::{Code, Status};

use crate::{
    inventory::{CloseReason, ForgetError, Input, Inventory, Moment, Note, Output, SessionId},
    store::{Store, StoreError},
};

/// Commands that wait; senders wait when there are more.
const COMMANDS_MAX: usize = 1024;
/// Messages that wait for one agent.
pub const MESSAGES_MAX: usize = 16;

/// The owner's end of a session. Dropping it ends both directions.
#[derive(Debug)]
pub struct ToAgent {
    /// What goes to the agent.
    pub messages: mpsc::Sender<Result<SchedulerMessage, Status>>,
    /// Never used: that it is gone wakes whoever listens to the agent.
    pub alive: oneshot::Sender<()>,
}

/// What the owner does for others.
#[derive(Debug)]
pub enum Command {
    /// An agent connected: its Hello comes next. Dropping the sender ends its stream.
    Open(SessionId, ToAgent),
    /// Something was said, or a connection ended.
    Input(Input),
    /// All nodes, or those of a site.
    List(String, oneshot::Sender<Vec<NodeRecord>>),
    /// One node.
    Get(Name, oneshot::Sender<Option<NodeRecord>>),
    /// Forget a lost node.
    Forget(Name, oneshot::Sender<Result<(), ForgetFailure>>),
    /// End all sessions: the process is ending.
    End,
}

/// Why a node was not forgotten.
#[derive(Debug, thiserror::Error)]
pub enum ForgetFailure {
    /// It may not be.
    #[error(transparent)]
    Refused(#[from] ForgetError),
    /// It could not be written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A way to the owner; cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
}

impl Handle {
    /// Waits for room, then hands the command over.
    pub async fn send(&self, command: Command) -> Result<(), Status> {
        self.commands
            .send(command)
            .await
            .map_err(|_| Status::unavailable("the scheduler is ending: try again"))
    }

    /// Sends a command and waits for its answer.
    pub async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Status> {
        let (sender, receiver) = oneshot::channel();
        self.send(command(sender)).await?;
        receiver.await.map_err(|_| Status::unavailable("the scheduler is ending: try again"))
    }
}

/// Reads the store and starts the owner's thread. It ends when all handles are gone.
pub fn start(store: Store) -> Result<Handle, StoreError> {
    let inventory = Inventory::restore(store.load()?);
    let scheduler_id = store.scheduler_id()?;
    let (commands, mut receiver) = mpsc::channel(COMMANDS_MAX);
    let mut owner = Owner { inventory, store, scheduler_id, sessions: HashMap::new(), start: Instant::now() };
    thread::Builder::new()
        .name("owner".to_owned())
        .spawn(move || {
            while let Some(command) = receiver.blocking_recv() {
                owner.apply(command);
            }
        })
        .expect("a thread can be made at the start of the process");
    Ok(Handle { commands })
}

struct Owner {
    inventory: Inventory,
    store: Store,
    scheduler_id: String,
    sessions: HashMap<SessionId, ToAgent>,
    start: Instant,
}

impl Owner {
    fn apply(&mut self, command: Command) {
        let now = self.start.elapsed();
        match command {
            Command::Open(session, sender) => {
                self.sessions.insert(session, sender);
            }
            Command::Input(input) => self.input(input),
            // Whoever asked may be gone: then nobody misses the answer.
            Command::List(site, answer) => drop(answer.send(self.inventory.list(now, &site))),
            Command::Get(name, answer) => drop(answer.send(self.inventory.get(now, &name))),
            Command::Forget(name, answer) => drop(answer.send(self.forget(&name))),
            Command::End => self.sessions.clear(),
        }
    }

    fn input(&mut self, input: Input) {
        let gone = match &input {
            Input::Gone(session) => Some(*session),
            _ => None,
        };
        let now = Moment { since_start: self.start.elapsed(), wall: wall() };
        let mut outputs = Vec::new();
        self.inventory.step(now, input, &mut outputs);
        for output in outputs {
            self.output(output);
        }
        if let Some(session) = gone {
            self.sessions.remove(&session);
        }
    }

    fn output(&mut self, output: Output) {
        match output {
            Output::Welcome { session, inventory_generation, allocations_digest } => {
                let scheduler_id = self.scheduler_id.clone();
                self.tell(
                    session,
                    What::Welcome(Welcome { scheduler_id, inventory_generation, allocations_digest }),
                );
            }
            Output::AskAllocations(session) => self.tell(session, What::SendAllocations(SendAllocations {})),
            Output::Close(session, reason) => {
                if let Some(agent) = self.sessions.remove(&session) {
                    tracing::warn!(session = session.0, reason = %reason, "ended the connection of an agent");
                    // When its channel is full it learns the reason from nobody, but it is ended.
                    drop(agent.messages.try_send(Err(Status::new(code(&reason), reason.to_string()))));
                }
            }
            Output::Save(name) => {
                let saved = self.inventory.durable(&name).map(|node| self.store.save(&name, node));
                if let Some(Err(error)) = saved {
                    // The node says it all again after the next connection; until then memory knows.
                    let why = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                    tracing::error!(node = %name, %error, why, "cannot keep the record of a node");
                }
            }
            Output::Note(name, note) => log(&name, &note),
        }
    }

    fn tell(&mut self, session: SessionId, what: What) {
        let message = SchedulerMessage { what: Some(what) };
        let full =
            self.sessions.get(&session).is_some_and(|agent| agent.messages.try_send(Ok(message)).is_err());
        if full {
            tracing::warn!(
                session = session.0,
                "an agent does not read what it is told: ended its connection"
            );
            self.sessions.remove(&session);
            self.input(Input::Gone(session));
        }
    }

    /// From the disk first: what is forgotten must not come back.
    fn forget(&mut self, name: &Name) -> Result<(), ForgetFailure> {
        let now = self.start.elapsed();
        self.inventory.may_forget(now, name)?;
        self.store.remove(name)?;
        self.inventory.forget(now, name)?;
        tracing::info!(node = %name, "forgot a lost node");
        Ok(())
    }
}

fn code(reason: &CloseReason) -> Code {
    match reason {
        CloseReason::Replaced(_) => Code::Aborted,
        CloseReason::BadHello { .. } | CloseReason::NoHello => Code::InvalidArgument,
        CloseReason::TooManyNodes | CloseReason::TooManyAllocations(_) => Code::ResourceExhausted,
    }
}

fn log(name: &Name, note: &Note) {
    match note {
        Note::New => tracing::info!(node = %name, "a new node"),
        Note::Connected => tracing::info!(node = %name, "connected"),
        Note::Rebooted => tracing::info!(node = %name, "connected, after a reboot"),
        Note::OtherUid { before, now } => {
            tracing::warn!(node = %name, before, now, "another node under the same name: reinstalled, or two of one name");
        }
        Note::Disconnected => tracing::info!(node = %name, "disconnected"),
    }
}

fn wall() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
    }
}
