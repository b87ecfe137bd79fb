//! The one owner of what is known: a thread that takes commands from a bounded channel, one at a time.
//!
//! ```text
//!  commands ─▶ up to 256 at once ─▶ core (pure) ─▶ one batch to the store ─▶ effects: messages, ends, answers
//! ```
//! Order of effects: what is known changes, what must survive is durable, then agents and callers are answered. A batch
//! costs one sync, so that a thousand agents which connect at once wait for a few, not for a thousand.
//! A session's channel to its agent is bounded; an agent that does not read is ended.
//! When the store says that another scheduler leads by now, everything that waits is refused, and all sessions end.

mod core;
pub mod place;

use std::{
    collections::HashMap,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use pbjson_types::Timestamp;
use serio_api::v1::{Answer, SchedulerMessage};
use tokio::sync::{mpsc, oneshot, watch};
use tonic::Status;

use self::core::Effect;
pub use self::core::{Core, Role};
use crate::{
    error::OrderError,
    inventory::{Input, Moment, SessionId},
    store::{Backend, Change, State, StoreError},
};

/// Commands that wait; senders wait when there are more.
const COMMANDS_MAX: usize = 1024;
/// Commands of one batch.
const BATCH_MAX: usize = 256;
/// Messages that wait for one agent.
pub const MESSAGES_MAX: usize = 256;
/// Timers are looked at that often.
const TICK: Duration = Duration::from_millis(500);

/// The owner's end of a session. Dropping it ends both directions.
#[derive(Debug)]
pub struct ToAgent {
    /// What goes to the agent.
    pub messages: mpsc::Sender<Result<SchedulerMessage, Status>>,
    /// Never used: that it is gone wakes whoever listens to the agent.
    pub alive: oneshot::Sender<()>,
}

type Question = Box<dyn FnOnce(&mut Core) -> Effect + Send>;

/// What the owner does for others.
enum Command {
    /// An agent connected: its Hello comes next. Dropping the sender ends its stream.
    Open(SessionId, ToAgent),
    /// Something was said, or a connection ended.
    Input(Input),
    /// An agent answered an order.
    Answer(SessionId, Answer),
    /// Look at the core, change it, and answer when that is durable.
    Ask(Question),
    /// Time goes by.
    Tick,
    /// Another role, with what the store has and, for a leader, a way to write it.
    Become(Role, State, Option<Box<dyn Backend>>),
    /// What the leader wrote, and who that is; for a follower.
    Learn(String, Vec<Change>),
    /// Do not lead any more; a follower does not know who leads.
    StepDown,
    /// End all sessions: the process is ending.
    End,
}

/// A way to the owner; cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    commands: mpsc::Sender<Command>,
    deposed: watch::Receiver<u64>,
}

fn ending() -> Status {
    Status::unavailable("the scheduler is ending: try again")
}

impl Handle {
    async fn send(&self, command: Command) -> Result<(), Status> {
        self.commands.send(command).await.map_err(|_| ending())
    }

    /// A session begins.
    ///
    /// # Errors
    /// When the process is ending.
    pub async fn open(&self, session: SessionId, agent: ToAgent) -> Result<(), Status> {
        self.send(Command::Open(session, agent)).await
    }

    /// What an agent says.
    ///
    /// # Errors
    /// When the process is ending.
    pub async fn input(&self, input: Input) -> Result<(), Status> {
        self.send(Command::Input(input)).await
    }

    /// What an agent answers to an order.
    ///
    /// # Errors
    /// When the process is ending.
    pub async fn answer(&self, session: SessionId, answer: Answer) -> Result<(), Status> {
        self.send(Command::Answer(session, answer)).await
    }

    /// Does that in the owner's thread, and answers once it is durable.
    ///
    /// # Errors
    /// When it could not be written, or the process is ending.
    pub async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut Core) -> T + Send + 'static,
    ) -> Result<T, Status> {
        let (sender, receiver) = oneshot::channel();
        let question: Question = Box::new(move |core| {
            let value = question(core);
            // Whoever asked may be gone: then nobody misses the answer.
            Effect::Answer(Box::new(move |stored| drop(sender.send(stored.map(|()| value)))))
        });
        self.send(Command::Ask(question)).await?;
        receiver.await.map_err(|_| ending())?
    }

    /// Takes another role, with what the store has.
    ///
    /// # Errors
    /// When the process is ending.
    pub async fn take_role(
        &self,
        role: Role,
        state: State,
        backend: Option<Box<dyn Backend>>,
    ) -> Result<(), Status> {
        self.send(Command::Become(role, state, backend)).await
    }

    /// A follower's copy changes; a leader does not listen.
    ///
    /// # Errors
    /// When the process is ending.
    pub async fn learn(&self, leader: String, changes: Vec<Change>) -> Result<(), Status> {
        self.send(Command::Learn(leader, changes)).await
    }

    /// Leads no more, or does not know any more who does.
    ///
    /// # Errors
    /// When the process is ending.
    pub async fn step_down(&self) -> Result<(), Status> {
        self.send(Command::StepDown).await
    }

    /// Looks at the core.
    ///
    /// # Errors
    /// When there is nothing to look at yet, or the process is ending.
    pub async fn read<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Core) -> T + Send + 'static,
    ) -> Result<T, Status> {
        Ok(self.ask(move |core| core.has_copy().map(|()| question(core))).await??)
    }

    /// Ends all sessions.
    pub async fn end(&self) {
        // An owner that is gone has none.
        let _ = self.send(Command::End).await;
    }

    /// Changes whenever the store says that another scheduler leads.
    #[must_use]
    pub fn deposed(&self) -> watch::Receiver<u64> {
        self.deposed.clone()
    }
}

/// Reads the store and starts the owner's thread as the only scheduler. It ends when all handles are gone.
///
/// # Errors
/// When the store cannot be read.
///
/// # Panics
/// Outside of a runtime: its clock ticks there.
pub fn start(mut store: impl Backend + 'static) -> Result<Handle, StoreError> {
    let state = State::decode(&store.load()?)?;
    let scheduler_id = store.scheduler_id()?;
    Ok(spawn(scheduler_id, Role::Leader, state, Some(Box::new(store))))
}

/// Starts the owner's thread as one of several: it leads nothing yet.
///
/// # Panics
/// Outside of a runtime.
#[must_use]
pub fn start_following(scheduler_id: String) -> Handle {
    spawn(scheduler_id, Role::Follower(String::new()), State::default(), None)
}

fn spawn(scheduler_id: String, role: Role, state: State, store: Option<Box<dyn Backend>>) -> Handle {
    let (commands, mut receiver) = mpsc::channel(COMMANDS_MAX);
    let (depose, deposed) = watch::channel(0);
    let start = Instant::now();
    let core = Core::new(scheduler_id, role, moment(start), state);
    let mut owner = Owner { core, store, sessions: HashMap::new(), start, depose };
    thread::Builder::new()
        .name("owner".to_owned())
        .spawn(move || {
            while let Some(command) = receiver.blocking_recv() {
                owner.apply(command);
                for _ in 1..BATCH_MAX {
                    let Ok(command) = receiver.try_recv() else { break };
                    owner.apply(command);
                }
                owner.flush();
            }
        })
        .expect("a thread can be made at the start of the process");
    let ticks = commands.downgrade();
    tokio::spawn(async move {
        let mut interval = tokio::time::interval(TICK);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            let Some(commands) = ticks.upgrade() else { break };
            if commands.send(Command::Tick).await.is_err() {
                break;
            }
        }
    });
    Handle { commands, deposed }
}

struct Owner {
    core: Core,
    /// A follower has none.
    store: Option<Box<dyn Backend>>,
    sessions: HashMap<SessionId, ToAgent>,
    start: Instant,
    depose: watch::Sender<u64>,
}

impl Owner {
    fn apply(&mut self, command: Command) {
        self.core.now = moment(self.start);
        match command {
            Command::Open(session, agent) => {
                self.sessions.insert(session, agent);
            }
            Command::Input(input) => self.input(input),
            Command::Answer(session, answer) => self.core.answer(session, answer),
            Command::Ask(question) => {
                let answer = question(&mut self.core);
                self.core.effects.push(answer);
            }
            Command::Tick => self.core.tick(),
            Command::Become(role, state, store) => {
                // What the old role still had to say goes first, or is refused.
                self.flush();
                self.core.become_role(role, state);
                self.store = store;
            }
            Command::Learn(leader, changes) => {
                if let Err(error) = self.core.learn(leader, &changes) {
                    tracing::error!(%error, "cannot read what the leader wrote");
                }
            }
            Command::StepDown => {
                self.flush();
                if *self.core.role() == Role::Leader {
                    self.store = None;
                    self.core.lose_copy();
                    self.flush();
                } else {
                    self.core.role = Role::Follower(String::new());
                }
            }
            Command::End => self.sessions.clear(),
        }
    }

    fn input(&mut self, input: Input) {
        let gone = if let Input::Gone(session) = &input { Some(*session) } else { None };
        self.core.input(input);
        // One that hangs up right after its Hello still hears why it was refused.
        self.core.effects.extend(gone.map(Effect::Gone));
    }

    /// Writes what changed, then lets everything out that waited for it.
    fn flush(&mut self) {
        // What is sent may end a session, and that is a change again.
        loop {
            let changes = self.core.changes();
            let effects = std::mem::take(&mut self.core.effects);
            if changes.is_empty() && effects.is_empty() {
                return;
            }
            let written = match &mut self.store {
                _ if changes.is_empty() => Ok(()),
                Some(store) => store.write(&changes),
                None => Err(StoreError::Deposed),
            };
            match written {
                Ok(()) => {
                    self.core.written();
                    effects.into_iter().for_each(|effect| self.effect(effect));
                }
                Err(error) => return self.unwritten(&error, effects),
            }
        }
    }

    /// Nothing was promised that is not durable: who asked is told so, agents end and connect again.
    fn unwritten(&mut self, error: &StoreError, effects: Vec<Effect>) {
        let why = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
        tracing::error!(%error, why, "cannot write what changed");
        let leading = !matches!(error, StoreError::Deposed | StoreError::Unreachable(_));
        if leading {
            // Kept as dirty, and written with the next batch. Agents hear what does not depend on it.
            for effect in effects {
                match effect {
                    Effect::Answer(answer) => answer(Err(Status::unavailable(format!(
                        "{error} cannot be written: see the scheduler's log, and its disk; then try again"
                    )))),
                    other => self.effect(other),
                }
            }
            return;
        }
        self.store = None;
        self.core.lose_copy();
        let gone = OrderError::NotLeader(String::new()).status();
        for effect in effects.into_iter().chain(std::mem::take(&mut self.core.effects)) {
            match effect {
                Effect::Answer(answer) => answer(Err(gone.clone())),
                Effect::Close(..) | Effect::Gone(_) => self.effect(effect),
                // An order that stands on what was not written is never given.
                Effect::Tell(..) => {}
            }
        }
        self.depose.send_modify(|times| *times = times.wrapping_add(1));
    }

    fn effect(&mut self, effect: Effect) {
        match effect {
            Effect::Tell(session, message) => {
                let sent = self.sessions.get(&session).map(|agent| agent.messages.try_send(Ok(*message)));
                let Some(Err(refused)) = sent else { return };
                // One that has hung up says so itself in a moment.
                if matches!(refused, mpsc::error::TrySendError::Full(_)) {
                    tracing::warn!(
                        session = session.0,
                        "an agent does not read what it is told: ended its connection"
                    );
                }
                self.sessions.remove(&session);
                self.input(Input::Gone(session));
            }
            Effect::Gone(session) => drop(self.sessions.remove(&session)),
            Effect::Close(session, status) => {
                if let Some(agent) = self.sessions.remove(&session) {
                    // When its channel is full it learns the reason from nobody, but it is ended.
                    drop(agent.messages.try_send(Err(status)));
                }
            }
            Effect::Answer(answer) => answer(Ok(())),
        }
    }
}

fn moment(start: Instant) -> Moment {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let wall = Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
    };
    Moment { since_start: start.elapsed(), wall }
}
