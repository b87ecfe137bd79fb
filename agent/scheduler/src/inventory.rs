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
//! and the length of each list are bounded; (5) a node is forgotten only when lost and asked for.

use std::{collections::BTreeMap, time::Duration};

use pbjson_types::Timestamp;
use serio_api::v1::{
    Allocations, Hello, Inventory as NodeInventory, Lease, NodeFreshness, NodeRecord, Usage,
};
use serio_types::Name;

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
}

#[derive(Debug)]
struct Node {
    durable: Durable,
    usage: Option<Usage>,
    /// The lease's end; the scheduler's start for a node that was not heard since.
    lease_until: Duration,
    session: Option<SessionId>,
    /// Of this session.
    lease_sequence: u64,
    /// The list was asked for in this session and has not come yet.
    asked: bool,
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
}

/// The nodes.
#[derive(Debug, Default)]
pub struct Inventory {
    nodes: BTreeMap<Name, Node>,
    /// The other way; exactly the nodes' sessions.
    sessions: BTreeMap<SessionId, Name>,
}

impl Inventory {
    /// As it was saved: nobody is connected, everybody is suspect.
    #[must_use]
    pub fn restore(nodes: impl IntoIterator<Item = (Name, Durable)>) -> Self {
        let node = |durable| Node {
            durable,
            usage: None,
            lease_until: Duration::ZERO,
            session: None,
            lease_sequence: 0,
            asked: false,
        };
        Self {
            nodes: nodes.into_iter().map(|(name, durable)| (name, node(durable))).collect(),
            sessions: BTreeMap::new(),
        }
    }

    /// Takes one input; appends what is to be done, in order.
    pub fn step(&mut self, now: Moment, input: Input, out: &mut Vec<Output>) {
        match input {
            Input::Hello(session, hello) => self.hello(now, session, hello, out),
            Input::Gone(session) => self.gone(session, out),
            Input::Inventory(session, inventory) => {
                if let Some((name, node)) = self.heard(session, now, out) {
                    node.durable.inventory = Some(inventory);
                    out.push(Output::Save(name));
                }
            }
            Input::Usage(session, usage) => {
                if let Some((_, node)) = self.heard(session, now, out) {
                    node.usage = Some(usage);
                }
            }
            Input::Lease(session, lease) => {
                if let Some((_, node)) = self.heard(session, now, out) {
                    node.lease(now, &lease);
                }
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
        match self.nodes.get_mut(&name) {
            Some(node) => {
                out.push(Output::Note(name.clone(), change(&node.durable.hello, &hello)));
                node.durable.hello = hello;
                node.durable.last_seen = now.wall;
                node.session = Some(session);
                node.lease_sequence = 0;
                node.asked = false;
            }
            None => {
                out.push(Output::Note(name.clone(), Note::New));
                let node = Node {
                    durable: Durable { hello, last_seen: now.wall, ..Durable::default() },
                    usage: None,
                    // No lease yet: suspect from now on.
                    lease_until: now.since_start,
                    session: Some(session),
                    lease_sequence: 0,
                    asked: false,
                };
                self.nodes.insert(name.clone(), node);
            }
        }
        out.push(Output::Save(name.clone()));
        let durable = self.nodes.get(&name).map(|node| &node.durable);
        out.push(Output::Welcome {
            session,
            inventory_generation: durable.and_then(|d| d.inventory.as_ref()).map_or(0, |i| i.generation),
            allocations_digest: durable
                .and_then(|d| d.allocations.as_ref())
                .map(|a| a.digest.clone())
                .unwrap_or_default(),
        });
    }

    fn gone(&mut self, session: SessionId, out: &mut Vec<Output>) {
        if let Some(name) = self.sessions.remove(&session) {
            if let Some(node) = self.nodes.get_mut(&name) {
                node.session = None;
            }
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
        let Some((name, node)) = self.heard(session, now, out) else { return };
        if allocations.complete {
            node.durable.allocations = Some(allocations);
            node.asked = false;
            out.push(Output::Save(name));
        } else if node.durable.allocations.as_ref().is_none_or(|kept| kept.digest != allocations.digest)
            && !node.asked
        {
            node.asked = true;
            out.push(Output::AskAllocations(session));
        }
    }

    /// The node of a session, which was heard just now. A session that never said Hello, or was ended, is closed.
    fn heard(&mut self, session: SessionId, now: Moment, out: &mut Vec<Output>) -> Option<(Name, &mut Node)> {
        let Some(name) = self.sessions.get(&session).cloned() else {
            out.push(Output::Close(session, CloseReason::NoHello));
            return None;
        };
        let node = self.nodes.get_mut(&name)?;
        node.durable.last_seen = now.wall;
        Some((name, node))
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
        Ok(())
    }

    /// Forgets a lost node.
    pub fn forget(&mut self, now: Duration, name: &Name) -> Result<(), ForgetError> {
        self.may_forget(now, name)?;
        self.nodes.remove(name);
        Ok(())
    }
}

impl Node {
    fn lease(&mut self, now: Moment, lease: &Lease) {
        // An older one that arrives late says nothing about now.
        if lease.sequence <= self.lease_sequence {
            return;
        }
        self.lease_sequence = lease.sequence;
        let ttl = Duration::from_millis(u64::from(lease.ttl_ms)).min(LEASE_MAX);
        self.lease_until = self.lease_until.max(now.since_start.saturating_add(ttl));
    }

    fn freshness(&self, now: Duration) -> NodeFreshness {
        if now < self.lease_until {
            NodeFreshness::Fresh
        } else if now < self.lease_until.saturating_add(SUSPECT) {
            NodeFreshness::Suspect
        } else {
            NodeFreshness::Lost
        }
    }

    fn record(&self, now: Duration, name: &Name) -> NodeRecord {
        NodeRecord {
            name: format!("nodes/{name}"),
            hello: Some(self.durable.hello.clone()),
            inventory: self.durable.inventory.clone(),
            usage: self.usage,
            allocations: self.durable.allocations.clone(),
            freshness: self.freshness(now).into(),
            last_seen: Some(self.durable.last_seen),
        }
    }
}

/// The node's name, if the Hello can be meant.
fn check_hello(hello: &Hello) -> Result<Name, CloseReason> {
    let texts = [
        ("node_uid", &hello.node_uid),
        ("boot_id", &hello.boot_id),
        ("agent_version", &hello.agent_version),
        ("site", &hello.site),
        ("failure_domain", &hello.failure_domain),
    ];
    for (field, text) in texts {
        if text.chars().count() > TEXT_CHARS_MAX {
            return Err(CloseReason::BadHello {
                field,
                problem: format!("more than {TEXT_CHARS_MAX} characters"),
            });
        }
    }
    hello.node_id.parse().map_err(|error: serio_types::NameError| CloseReason::BadHello {
        field: "node_id",
        problem: error.to_string(),
    })
}

fn change(before: &Hello, now: &Hello) -> Note {
    if before.node_uid != now.node_uid {
        return Note::OtherUid { before: before.node_uid.clone(), now: now.node_uid.clone() };
    }
    if before.boot_id != now.boot_id { Note::Rebooted } else { Note::Connected }
}

#[cfg(test)]
#[path = "inventory_test.rs"]
mod tests;
