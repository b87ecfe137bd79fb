//! What the owner's thread holds, and what each command does to it. No I/O here: what is to be written is noted as dirty,
//! what is to be sent or answered waits in `effects` until that is durable.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use prost::Message;
use serio_api::v1::{
    Answer, Fence, PlacementState, RecoveryPlan, RefusedKind, SchedulerMessage, SendAllocations, Welcome,
    answer, scheduler_message::What,
};
use serio_types::Name;
use tokio::sync::oneshot;
use tonic::{Code, Status};

use crate::{
    book::{Book, Due},
    error::OrderError,
    inventory::{CloseReason, Input, Inventory, Moment, Note, Output, SessionId},
    store::{Change, Kind, State, StoreError, record_of},
};

/// Who this scheduler is in its region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// It plans, and agents talk to it.
    Leader,
    /// It answers questions from its copy; the other one listens there (empty: nobody at the moment).
    Follower(String),
}

/// What follows once everything before it is durable.
pub(super) enum Effect {
    /// Say it to an agent.
    Tell(SessionId, Box<SchedulerMessage>),
    /// End its session.
    Close(SessionId, Status),
    /// It has hung up: forget its session, after all that it was to be told.
    Gone(SessionId),
    /// Answer a caller: with what it asked, or that it could not be written.
    Answer(Box<dyn FnOnce(Result<(), Status>) + Send>),
}

/// For whom an agent's answer is.
enum Waiting {
    /// A caller.
    Caller(oneshot::Sender<answer::What>),
    /// Nobody waits: the placement is over when the node says so.
    Release(Name),
    /// Nobody waits: the node has ended what it had.
    Fence(Name),
}

struct Call {
    session: SessionId,
    waiting: Waiting,
}

/// See the head of this file.
pub struct Core {
    pub(super) scheduler_id: String,
    pub(super) role: Role,
    /// It has what the store has: before that it answers nothing.
    copied: bool,
    pub(crate) now: Moment,
    pub(crate) inventory: Inventory,
    pub(crate) book: Book,
    pub(crate) plans: BTreeMap<Name, RecoveryPlan>,
    /// Requests that are being placed, and for which resource.
    pub(crate) placing: HashMap<Name, String>,
    calls: HashMap<u64, Call>,
    next_call: u64,
    dirty: BTreeSet<(Kind, Name)>,
    pub(super) effects: Vec<Effect>,
}

impl Core {
    pub(super) fn new(scheduler_id: String, role: Role, now: Moment, state: State) -> Self {
        Self {
            scheduler_id,
            copied: role == Role::Leader,
            role,
            now,
            inventory: Inventory::restore(state.nodes),
            book: Book::restore(now.since_start, state.placements),
            plans: state.plans.into_iter().collect(),
            placing: HashMap::new(),
            calls: HashMap::new(),
            next_call: 0,
            dirty: BTreeSet::new(),
            effects: Vec::new(),
        }
    }

    /// Since the process started.
    #[must_use]
    pub fn since_start(&self) -> Duration {
        self.now.since_start
    }

    /// Refuses what only the leader may do.
    pub(crate) fn lead(&self) -> Result<(), OrderError> {
        match &self.role {
            Role::Leader => Ok(()),
            Role::Follower(leader) => Err(OrderError::NotLeader(leader.clone())),
        }
    }

    /// Refuses to answer from nothing.
    pub(super) fn has_copy(&self) -> Result<(), OrderError> {
        if self.copied { Ok(()) } else { Err(OrderError::NoCopy) }
    }

    /// Who it is.
    #[must_use]
    pub const fn role(&self) -> &Role {
        &self.role
    }

    pub(crate) fn dirty(&mut self, kind: Kind, name: Name) {
        self.dirty.insert((kind, name));
    }

    /// What is to be written, as it is now.
    pub(super) fn changes(&self) -> Vec<Change> {
        let value = |kind: Kind, name: &Name| match kind {
            Kind::Node => self.inventory.durable(name).map(|node| record_of(name, node).encode_to_vec()),
            Kind::Placement => self.book.get(name).map(Message::encode_to_vec),
            Kind::Plan => self.plans.get(name).map(Message::encode_to_vec),
        };
        self.dirty
            .iter()
            .map(|(kind, name)| Change { kind: *kind, key: name.to_string(), value: value(*kind, name) })
            .collect()
    }

    pub(super) fn written(&mut self) {
        self.dirty.clear();
    }

    /// What an agent said, or that it is gone.
    pub(super) fn input(&mut self, input: Input) {
        if let Err(refused) = self.lead() {
            if let Input::Hello(session, _) = input {
                self.effects.push(Effect::Close(session, refused.status()));
            }
            return;
        }
        let (gone, listed) = match &input {
            Input::Gone(session) => (Some(*session), None),
            Input::Allocations(session, list) if list.complete => (None, Some(*session)),
            _ => (None, None),
        };
        let mut outputs = Vec::new();
        self.inventory.step(self.now, input, &mut outputs);
        for output in outputs {
            self.output(output);
        }
        if let Some(session) = gone {
            // Whoever waits for it learns that nobody will answer.
            self.calls.retain(|_, call| call.session != session);
        }
        if let Some(name) = listed.and_then(|session| self.inventory.speaker(session).cloned()) {
            self.listed(&name);
        }
    }

    fn listed(&mut self, node: &Name) {
        let Some(view) = self.inventory.view(node).cloned() else { return };
        for id in self.book.listed(self.now.since_start, node, &view.keys) {
            self.inventory.expect_no_more(node, id.as_str());
            self.dirty(Kind::Placement, id);
        }
    }

    fn output(&mut self, output: Output) {
        match output {
            Output::Welcome { session, inventory_generation, allocations_digest } => {
                let scheduler_id = self.scheduler_id.clone();
                let welcome = Welcome { scheduler_id, inventory_generation, allocations_digest };
                self.tell(session, What::Welcome(welcome));
                self.release_what_waits(session);
            }
            Output::AskAllocations(session) => self.tell(session, What::SendAllocations(SendAllocations {})),
            Output::Close(session, reason) => {
                tracing::warn!(session = session.0, %reason, "ended the connection of an agent");
                self.calls.retain(|_, call| call.session != session);
                self.effects.push(Effect::Close(session, Status::new(code(&reason), reason.to_string())));
            }
            Output::Save(name) => self.dirty(Kind::Node, name),
            Output::Fence(session, generation) => {
                if let Some(name) = self.inventory.speaker(session).cloned() {
                    let call = self.call(session, Waiting::Fence(name));
                    self.tell(session, What::Fence(Fence { call, allocation_id: String::new(), generation }));
                }
            }
            Output::Note(name, note) => log(&name, &note),
        }
    }

    pub(crate) fn tell(&mut self, session: SessionId, what: What) {
        self.effects.push(Effect::Tell(session, Box::new(SchedulerMessage { what: Some(what) })));
    }

    fn call(&mut self, session: SessionId, waiting: Waiting) -> u64 {
        self.next_call = self.next_call.wrapping_add(1);
        self.calls.insert(self.next_call, Call { session, waiting });
        self.next_call
    }

    /// Orders something of a node; its answer comes through the receiver, or none when it is gone before.
    pub(crate) fn order(
        &mut self,
        node: &Name,
        order: impl FnOnce(u64) -> What,
    ) -> Result<oneshot::Receiver<answer::What>, OrderError> {
        let session = self.inventory.session(node).ok_or_else(|| OrderError::Unreachable(node.clone()))?;
        let (sender, receiver) = oneshot::channel();
        let call = self.call(session, Waiting::Caller(sender));
        self.tell(session, order(call));
        Ok(receiver)
    }

    /// A node is there again: what it could not be told to release is asked for now. The timers alone could miss one whose
    /// connections are short, again and again.
    fn release_what_waits(&mut self, session: SessionId) {
        let Some(node) = self.inventory.speaker(session) else { return };
        for id in self.book.releasing(node) {
            self.order_release(&id);
        }
    }

    /// Tells the node to release what is RELEASING; when it cannot be told now, the timer asks again.
    pub(crate) fn order_release(&mut self, id: &Name) {
        let (Some(placement), Some(node)) = (self.book.get(id), self.book.node(id)) else { return };
        let token = placement.token.clone();
        let Some(session) = self.inventory.session(node) else { return };
        let call = self.call(session, Waiting::Release(id.clone()));
        self.tell(session, What::Release(serio_api::v1::Release { call, token }));
    }

    /// An agent's answer to an order. One that nobody waits for any more is nothing: what it promised expires there.
    pub(super) fn answer(&mut self, session: SessionId, answer: Answer) {
        let Some(call) = self.calls.get(&answer.call) else { return };
        let Some(what) = answer.what else { return };
        if call.session != session {
            return;
        }
        match self.calls.remove(&answer.call).map(|call| call.waiting) {
            // Whoever asked may be gone.
            Some(Waiting::Caller(sender)) => drop(sender.send(what)),
            Some(Waiting::Release(id)) => self.released(&id, &what),
            Some(Waiting::Fence(name)) => self.fence_answered(&name, &what),
            None => {}
        }
    }

    /// The node's word on a release. Without the lead it is nothing: who leads asks for itself.
    pub(crate) fn released(&mut self, id: &Name, what: &answer::What) {
        if self.lead().is_err() {
            return;
        }
        let now = self.now.since_start;
        let changed = match what {
            answer::What::Refused(refused) if refused.kind() == RefusedKind::Taken => {
                self.book.set(now, id, PlacementState::Committed, "a VM has taken it: delete the VM")
            }
            answer::What::Refused(refused) if refused.kind() == RefusedKind::Invalid => {
                tracing::warn!(placement = %id, why = refused.message, "the node does not understand a release");
                false
            }
            // Unknown, expired or fenced there: over as well.
            _ => self.book.end(now, id, ""),
        };
        if changed {
            if let Some(node) = self.book.node(id).cloned() {
                self.inventory.expect_no_more(&node, id.as_str());
            }
            self.dirty(Kind::Placement, id.clone());
        }
    }

    fn fence_answered(&mut self, name: &Name, what: &answer::What) {
        match what {
            answer::What::Done(done) => {
                tracing::info!(node = %name, ended = done.ended.len(), "a fenced node returned, and ended what it had");
                if self.inventory.fence_applied(name) {
                    self.dirty(Kind::Node, name.clone());
                }
            }
            answer::What::Refused(refused) => {
                tracing::warn!(node = %name, why = refused.message, "a fenced node refuses the fence: it gets nothing new");
            }
            answer::What::Reserved(_) => {}
        }
    }

    /// Time went by.
    pub(super) fn tick(&mut self) {
        if self.role != Role::Leader {
            return;
        }
        for due in self.book.due(self.now.since_start) {
            let id = match due {
                Due::Release(id) => {
                    self.order_release(&id);
                    id
                }
                Due::Forgotten(id) => id,
            };
            self.dirty(Kind::Placement, id);
        }
    }

    /// It follows from now on, and has no copy yet: what it knows may not be what was written.
    pub(super) fn lose_copy(&mut self) {
        self.become_role(Role::Follower(String::new()), State::default());
        self.copied = false;
    }

    /// What the leader wrote.
    pub(super) fn learn(&mut self, leader: String, changes: &[Change]) -> Result<(), StoreError> {
        if self.role == Role::Leader || !self.copied {
            return Ok(());
        }
        self.role = Role::Follower(leader);
        let now = self.now.since_start;
        for change in changes.iter().filter(|change| change.value.is_none()) {
            let Ok(name) = change.key.parse::<Name>() else { continue };
            match change.kind {
                Kind::Node => self.inventory.copy(now, name, None),
                Kind::Placement => self.book.copy(now, name, None),
                Kind::Plan => drop(self.plans.remove(&name)),
            }
        }
        let state = State::decode(changes)?;
        for (name, node) in state.nodes {
            self.inventory.copy(now, name, Some(node));
        }
        for (name, placement) in state.placements {
            self.book.copy(now, name, Some(placement));
        }
        self.plans.extend(state.plans);
        Ok(())
    }

    /// Another role, with what is kept.
    pub(super) fn become_role(&mut self, role: Role, state: State) {
        let sessions: Vec<SessionId> = self.inventory.sessions().collect();
        let gone = OrderError::NotLeader(match &role {
            Role::Leader => String::new(),
            Role::Follower(leader) => leader.clone(),
        });
        for session in sessions {
            self.effects.push(Effect::Close(session, gone.status()));
        }
        self.role = role;
        self.copied = true;
        self.inventory = Inventory::restore_at(self.now.since_start, state.nodes);
        self.book = Book::restore(self.now.since_start, state.placements);
        self.plans = state.plans.into_iter().collect();
        self.placing.clear();
        self.calls.clear();
        self.dirty.clear();
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
