//! What is known of the nodes: pure, without clock, socket or file. [`Inventory::step`] takes one input at one moment and
//! says what is to be sent, saved and closed.
//!
//! ```text
//!                   lease runs out             30 s later
//!   FRESH ───────────────────────▶ SUSPECT ────────────────▶ LOST
//!     ▲ lease                         ▲ start of the scheduler
//!     └───────────────────────────────┴──────── a lease from any state makes FRESH
//! ```
//! Invariants: (1) a node has at most one session, the newest; inputs of others change nothing; (2) freshness comes from
//! leases and the receiver's own clock alone; (3) the kept allocations belong to the kept digest; (4) the number of nodes
//! and the length of each list are bounded; (5) a node is forgotten only when lost and asked for; (6) what a lost node has
//! promised stays its own until a fence is recorded, and a fenced node gets nothing new until it has ended what it had.

mod node;
mod nodes;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use pbjson_types::Timestamp;
use serio_api::v1::{
    Allocations, Hello, Inventory as NodeInventory, Lease, NodeFence, NodeFreshness, NodeRecord, Usage,
};
use serio_types::Name;

use crate::placement::{
    Candidate,
    view::{Need, NodeView},
    what_if::Member,
};
use node::{Node, change, check_hello};
use nodes::Nodes;

/// After its lease ran out a node is suspect for that long, then lost.
pub const SUSPECT: Duration = Duration::from_secs(30);
/// No lease lives longer, whatever a node asks for.
pub const LEASE_MAX: Duration = Duration::from_secs(60);
/// Nodes that are kept.
pub const NODES_MAX: usize = 4096;
/// Promises on one node.
pub const ALLOCATIONS_MAX: usize = 10_000;
/// Characters of any text in a Hello.
const TEXT_CHARS_MAX: usize = 256;

/// One connection of an agent; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// When something happens, by both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Since this process started; never goes back.
    pub since_start: Duration,
    /// For people only.
    pub wall: Timestamp,
}

/// What happens.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// An agent connected and said who it is.
    Hello(SessionId, Hello),
    /// It said what it has.
    Inventory(SessionId, NodeInventory),
    /// It said how it goes.
    Usage(SessionId, Usage),
    /// It lives.
    Lease(SessionId, Lease),
    /// It said what it has promised, or the digest of that.
    Allocations(SessionId, Allocations),
    /// Its connection ended.
    Gone(SessionId),
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Greet it, with what is known of it.
    Welcome {
        /// To whom.
        session: SessionId,
        /// Of the inventory that is kept.
        inventory_generation: u64,
        /// Of the allocations that are kept.
        allocations_digest: String,
    },
    /// Ask it for the whole list.
    AskAllocations(SessionId),
    /// End it.
    Close(SessionId, CloseReason),
    /// The durable part of this node changed: it must be on disk before anything that follows is sent.
    Save(Name),
    /// What it had is over: it must be told.
    Fence(SessionId, u64),
    /// For the log.
    Note(Name, Note),
}

/// Why a session is ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CloseReason {
    /// A newer connection of the same node.
    #[error("another connection calls itself node {0}: two agents with one node_name?")]
    Replaced(Name),
    /// Its Hello cannot be meant.
    #[error("hello.{field}: {problem}")]
    BadHello {
        /// The field.
        field: &'static str,
        /// What is wrong, what would be right.
        problem: String,
    },
    /// There are [`NODES_MAX`] already.
    #[error(
        "this scheduler keeps {NODES_MAX} nodes and has as many: delete the records of lost ones (serio node delete)"
    )]
    TooManyNodes,
    /// More than [`ALLOCATIONS_MAX`].
    #[error("{0} allocations, more than {ALLOCATIONS_MAX}")]
    TooManyAllocations(usize),
    /// Something before Hello.
    #[error("the first message must be Hello, and only the first")]
    NoHello,
}

/// What is worth a line in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// Never seen before.
    New,
    /// It is back.
    Connected,
    /// The host started anew.
    Rebooted,
    /// The name is the same, the node is not: reinstalled, or two of one name.
    OtherUid {
        /// Before.
        before: String,
        /// Now.
        now: String,
    },
    /// Its connection ended.
    Disconnected,
}

/// The part of a node that survives a restart.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Durable {
    /// Who it said it is.
    pub hello: Hello,
    /// What it has.
    pub inventory: Option<NodeInventory>,
    /// What it promised: complete, with its digest.
    pub allocations: Option<Allocations>,
    /// When it was last heard, seconds since 1970.
    pub last_seen: Timestamp,
    /// The last one.
    pub fence: Option<NodeFence>,
}

/// Why a record is not deleted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ForgetError {
    /// No such node.
    #[error("nodes/{0} was never seen here: `serio node list` shows who was")]
    Unknown(Name),
    /// It may be alive.
    #[error(
        "nodes/{0} is not lost yet: only a node whose lease ran out 30 s ago, and that is not connected, is forgotten"
    )]
    NotLost(Name),
    /// It still has something.
    #[error(
        "nodes/{0} has promised {1} things that may still run there: record why they do not (serio node fence {0} --proof …)"
    )]
    Unfenced(Name, usize),
}

/// Why a node is not fenced.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FenceError {
    /// No such node.
    #[error("nodes/{0} was never seen here: `serio node list` shows who was")]
    Unknown(Name),
    /// It is alive.
    #[error(
        "nodes/{0} is connected, or its lease runs: only a node that is not heard of is fenced; drain this one"
    )]
    Alive(Name),
}

/// The nodes.
#[derive(Debug, Default)]
pub struct Inventory {
    nodes: Nodes,
    /// The other way; exactly the nodes' sessions.
    sessions: BTreeMap<SessionId, Name>,
}

impl Inventory {
    /// As it was saved: nobody is connected, everybody is suspect.
    #[must_use]
    pub fn restore(nodes: impl IntoIterator<Item = (Name, Durable)>) -> Self {
        Self::restore_at(Duration::ZERO, nodes)
    }

    /// The same, later in the life of the process.
    #[must_use]
    pub fn restore_at(now: Duration, nodes: impl IntoIterator<Item = (Name, Durable)>) -> Self {
        let mut inventory = Self::default();
        for (name, durable) in nodes {
            inventory.nodes.insert(name, Node::restored(now, durable));
        }
        inventory
    }

    /// What another scheduler has of a node, or that it has forgotten it.
    pub fn copy(&mut self, now: Duration, name: Name, node: Option<Durable>) {
        match node {
            Some(durable) => self.nodes.insert(name, Node::restored(now, durable)),
            None => self.nodes.remove(&name),
        }
    }

    /// Takes one input; appends what is to be done, in order.
    pub fn step(&mut self, now: Moment, input: Input, out: &mut Vec<Output>) {
        match input {
            Input::Hello(session, hello) => self.hello(now, session, hello, out),
            Input::Gone(session) => self.gone(session, out),
            Input::Inventory(session, inventory) => {
                if let Some(name) = self.heard(session, now, out, |node| node.has(inventory)) {
                    out.push(Output::Save(name));
                }
            }
            Input::Usage(session, usage) => {
                self.heard(session, now, out, |node| node.usage = Some(usage));
            }
            Input::Lease(session, lease) => {
                self.heard(session, now, out, |node| node.lease(now, &lease));
            }
            Input::Allocations(session, allocations) => self.allocations(now, session, allocations, out),
        }
    }

    fn hello(&mut self, now: Moment, session: SessionId, hello: Hello, out: &mut Vec<Output>) {
        if self.sessions.contains_key(&session) {
            self.close(session, CloseReason::NoHello, out);
            return;
        }
        let name = match check_hello(&hello) {
            Ok(name) => name,
            Err(reason) => return out.push(Output::Close(session, reason)),
        };
        if !self.nodes.contains_key(&name) && self.nodes.len() >= NODES_MAX {
            return out.push(Output::Close(session, CloseReason::TooManyNodes));
        }
        if let Some(older) = self.nodes.get(&name).and_then(|node| node.session) {
            self.close(older, CloseReason::Replaced(name.clone()), out);
        }
        self.sessions.insert(session, name.clone());
        match self.nodes.get(&name) {
            Some(node) => {
                out.push(Output::Note(name.clone(), change(&node.durable.hello, &hello)));
                self.nodes.change(&name, |node| node.connect(session, hello, now));
            }
            None => {
                out.push(Output::Note(name.clone(), Note::New));
                self.nodes.insert(name.clone(), Node::new(session, hello, now));
            }
        }
        out.push(Output::Save(name.clone()));
        let Some(node) = self.nodes.get(&name) else { return };
        out.push(Output::Welcome {
            session,
            inventory_generation: node.durable.inventory.as_ref().map_or(0, |i| i.generation),
            allocations_digest: node
                .durable
                .allocations
                .as_ref()
                .map(|a| a.digest.clone())
                .unwrap_or_default(),
        });
        if let Some(generation) = node.fence_due() {
            out.push(Output::Fence(session, generation));
        }
    }

    fn gone(&mut self, session: SessionId, out: &mut Vec<Output>) {
        if let Some(name) = self.sessions.remove(&session) {
            self.nodes.change(&name, Node::disconnect);
            // When it was last heard is worth keeping, once.
            out.push(Output::Save(name.clone()));
            out.push(Output::Note(name, Note::Disconnected));
        }
    }

    fn allocations(
        &mut self,
        now: Moment,
        session: SessionId,
        allocations: Allocations,
        out: &mut Vec<Output>,
    ) {
        if allocations.allocations.len() > ALLOCATIONS_MAX {
            let reason = CloseReason::TooManyAllocations(allocations.allocations.len());
            return self.close(session, reason, out);
        }
        let complete = allocations.complete;
        let mut ask = false;
        let heard = self.heard(session, now, out, |node| ask = node.promises(allocations));
        match heard {
            Some(name) if complete => out.push(Output::Save(name)),
            Some(_) if ask => out.push(Output::AskAllocations(session)),
            _ => {}
        }
    }

    /// The node of a session was heard just now. A session that never said Hello, or was ended, is closed.
    fn heard(
        &mut self,
        session: SessionId,
        now: Moment,
        out: &mut Vec<Output>,
        said: impl FnOnce(&mut Node),
    ) -> Option<Name> {
        let Some(name) = self.sessions.get(&session).cloned() else {
            out.push(Output::Close(session, CloseReason::NoHello));
            return None;
        };
        self.nodes.change(&name, |node| {
            node.durable.last_seen = now.wall;
            said(node);
        })?;
        Some(name)
    }

    fn close(&mut self, session: SessionId, reason: CloseReason, out: &mut Vec<Output>) {
        self.gone(session, out);
        out.push(Output::Close(session, reason));
    }

    /// How alive a node is.
    #[must_use]
    pub fn freshness(&self, now: Duration, name: &Name) -> NodeFreshness {
        self.nodes.get(name).map_or(NodeFreshness::Unspecified, |node| node.freshness(now))
    }

    /// All nodes by name; those of one site when it is not empty.
    #[must_use]
    pub fn list(&self, now: Duration, site: &str) -> Vec<NodeRecord> {
        let wanted = |node: &&Node| site.is_empty() || node.durable.hello.site == site;
        self.nodes
            .iter()
            .filter(|(_, node)| wanted(node))
            .map(|(name, node)| node.record(now, name))
            .collect()
    }

    /// One node.
    #[must_use]
    pub fn get(&self, now: Duration, name: &Name) -> Option<NodeRecord> {
        self.nodes.get(name).map(|node| node.record(now, name))
    }

    /// The part that must survive.
    #[must_use]
    pub fn durable(&self, name: &Name) -> Option<&Durable> {
        self.nodes.get(name).map(|node| &node.durable)
    }

    /// Whether [`Self::forget`] would do it.
    pub fn may_forget(&self, now: Duration, name: &Name) -> Result<(), ForgetError> {
        let node = self.nodes.get(name).ok_or_else(|| ForgetError::Unknown(name.clone()))?;
        if node.freshness(now) != NodeFreshness::Lost || node.session.is_some() {
            return Err(ForgetError::NotLost(name.clone()));
        }
        let held = node.view.promises.len();
        if held > 0 {
            return Err(ForgetError::Unfenced(name.clone(), held));
        }
        Ok(())
    }

    /// Forgets a lost node.
    pub fn forget(&mut self, now: Duration, name: &Name) -> Result<(), ForgetError> {
        self.may_forget(now, name)?;
        self.nodes.remove(name);
        Ok(())
    }
}

/// What placement asks.
impl Inventory {
    /// All nodes, as they are now.
    pub fn candidates(&self, now: Duration) -> impl Iterator<Item = Candidate<'_>> + Clone {
        self.nodes.iter().map(move |(name, node)| node.candidate(now, name))
    }

    /// The same to take away: cheap copies.
    #[must_use]
    pub fn members(&self, now: Duration) -> Vec<Member> {
        let member = |(name, node): (&Name, &Node)| Member {
            name: name.clone(),
            view: Arc::clone(&node.view),
            freshness: node.freshness(now),
            fenced: node.fence_due().is_some(),
        };
        self.nodes.iter().map(member).collect()
    }

    /// How many nodes are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// All sessions.
    pub fn sessions(&self) -> impl Iterator<Item = SessionId> + '_ {
        self.sessions.keys().copied()
    }

    /// The session of a node that is connected.
    #[must_use]
    pub fn session(&self, name: &Name) -> Option<SessionId> {
        self.nodes.get(name).and_then(|node| node.session)
    }

    /// The node of a session.
    #[must_use]
    pub fn speaker(&self, session: SessionId) -> Option<&Name> {
        self.sessions.get(&session)
    }

    /// What placement sees of a node.
    #[must_use]
    pub fn view(&self, name: &Name) -> Option<&Arc<NodeView>> {
        self.nodes.get(name).map(|node| &node.view)
    }

    /// Under which fencing generation a node is asked.
    #[must_use]
    pub fn fence_generation(&self, name: &Name) -> u64 {
        self.nodes.get(name).map_or(0, Node::fence_generation)
    }

    /// Another node than those fenced that has promised something to it, by another reservation than `key`.
    #[must_use]
    pub fn holder(&self, resource: &str, key: &str) -> Option<&Name> {
        let by_another = |node: &Node| node.view.resources.get(resource).is_some_and(|found| found != key);
        let holds = |node: &Node| node.fence_due().is_none() && by_another(node);
        self.nodes.promisers(resource).find(|name| self.nodes.get(name).is_some_and(holds))
    }

    /// It was asked for that much, and its list does not have it yet.
    pub fn expect(&mut self, name: &Name, key: &str, need: Need) {
        self.nodes.change(name, |node| node.expect(key, need));
    }

    /// It will not have it.
    pub fn expect_no_more(&mut self, name: &Name, key: &str) {
        self.nodes.change(name, |node| node.expect_no_more(key));
    }

    /// Records that it is dead: what it promised is free from now on. Answers the generation below which all is over.
    pub fn fence(&mut self, now: Moment, name: &Name, proof: &str) -> Result<u64, FenceError> {
        let unknown = || FenceError::Unknown(name.clone());
        let node = self.nodes.get(name).ok_or_else(unknown)?;
        if node.session.is_some() || node.freshness(now.since_start) == NodeFreshness::Fresh {
            return Err(FenceError::Alive(name.clone()));
        }
        self.nodes.change(name, |node| node.fence(now, proof)).ok_or_else(unknown)
    }

    /// It has ended what it had. Whether that is news.
    pub fn fence_applied(&mut self, name: &Name) -> bool {
        self.nodes.change(name, Node::fence_applied).unwrap_or_default()
    }
}

#[cfg(test)]
#[path = "inventory_test.rs"]
mod tests;
