//! One node: what it said, how alive it is, and what placement sees of it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serio_api::v1::{
    Allocations, Hello, Inventory as NodeInventory, Lease, NodeFence, NodeFreshness, NodeRecord, Usage,
};
use serio_types::Name;

use super::{CloseReason, Durable, LEASE_MAX, Moment, Note, SUSPECT, SessionId, TEXT_CHARS_MAX};
use crate::placement::{
    Candidate,
    view::{Need, NodeView},
};

#[derive(Debug)]
pub(super) struct Node {
    pub(super) durable: Durable,
    /// Of `durable`; made anew with each change of it.
    pub(super) view: Arc<NodeView>,
    /// Asked for, not in the list yet; by key.
    pending: BTreeMap<String, Need>,
    /// Their sum.
    pending_sum: Need,
    pub(super) usage: Option<Usage>,
    /// The lease's end; the scheduler's start for a node that was not heard since.
    lease_until: Duration,
    pub(super) session: Option<SessionId>,
    /// Of this session.
    lease_sequence: u64,
    /// The list was asked for in this session and has not come yet.
    asked: bool,
}

impl Node {
    pub(super) fn restored(now: Duration, durable: Durable) -> Self {
        let mut node = Self {
            durable,
            view: Arc::default(),
            pending: BTreeMap::new(),
            pending_sum: Need::default(),
            usage: None,
            // Not heard yet: suspect from now on.
            lease_until: now,
            session: None,
            lease_sequence: 0,
            asked: false,
        };
        node.look_again();
        node
    }

    pub(super) fn new(session: SessionId, hello: Hello, now: Moment) -> Self {
        let mut node = Self::restored(now.since_start, Durable::default());
        node.connect(session, hello, now);
        node
    }

    pub(super) fn connect(&mut self, session: SessionId, hello: Hello, now: Moment) {
        self.durable.hello = hello;
        self.durable.last_seen = now.wall;
        self.session = Some(session);
        self.lease_sequence = 0;
        self.asked = false;
        self.look_again();
    }

    pub(super) fn disconnect(&mut self) {
        self.session = None;
        // What it was asked for and has done stands in the list that it sends when it is back.
        self.pending.clear();
        self.pending_sum = Need::default();
    }

    /// It said what it has.
    pub(super) fn has(&mut self, inventory: NodeInventory) {
        self.durable.inventory = Some(inventory);
        self.look_again();
    }

    /// It said what it has promised, or the digest of that: whether the list is to be asked for.
    pub(super) fn promises(&mut self, allocations: Allocations) -> bool {
        if allocations.complete {
            self.durable.allocations = Some(allocations);
            self.asked = false;
            self.look_again();
            return false;
        }
        let known = self.durable.allocations.as_ref().is_some_and(|kept| kept.digest == allocations.digest);
        !known && !std::mem::replace(&mut self.asked, true)
    }

    /// After a change of what it said.
    fn look_again(&mut self) {
        let durable = &self.durable;
        let promises = durable.allocations.as_ref().map(|a| a.allocations.as_slice()).unwrap_or_default();
        let view = NodeView::of(&durable.hello, durable.inventory.as_ref(), promises);
        self.pending.retain(|key, _| !view.keys.contains(key));
        self.sum_pending();
        self.view = Arc::new(view);
    }

    pub(super) fn expect(&mut self, key: &str, need: Need) {
        if !self.view.keys.contains(key) {
            let overhead = Need { memory: self.view.overhead, ..Need::default() };
            self.pending.insert(key.to_owned(), need.plus(overhead));
            self.sum_pending();
        }
    }

    pub(super) fn expect_no_more(&mut self, key: &str) {
        self.pending.remove(key);
        self.sum_pending();
    }

    fn sum_pending(&mut self) {
        self.pending_sum = self.pending.values().fold(Need::default(), |sum, need| sum.plus(*need));
    }

    pub(super) fn candidate<'a>(&'a self, now: Duration, name: &'a Name) -> Candidate<'a> {
        Candidate {
            name,
            view: &self.view,
            pending: self.pending_sum,
            freshness: self.freshness(now),
            connected: self.session.is_some(),
            fenced: self.fence_due().is_some(),
        }
    }

    /// The fence that it has not applied yet.
    pub(super) fn fence_due(&self) -> Option<u64> {
        let fence = self.durable.fence.as_ref()?;
        (!fence.applied && self.view.fence_generation < fence.generation).then_some(fence.generation)
    }

    pub(super) fn fence_generation(&self) -> u64 {
        let ours = self.durable.fence.as_ref().map_or(0, |fence| fence.generation);
        ours.max(self.view.fence_generation)
    }

    pub(super) fn fence(&mut self, now: Moment, proof: &str) -> u64 {
        // The same fence again, before the node returned, is a newer proof of the same.
        let generation = self.fence_due().unwrap_or_else(|| self.fence_generation().saturating_add(1));
        self.durable.fence =
            Some(NodeFence { proof: proof.to_owned(), time: Some(now.wall), generation, applied: false });
        self.durable.allocations = None;
        self.look_again();
        generation
    }

    pub(super) fn fence_applied(&mut self) -> bool {
        self.durable.fence.as_mut().is_some_and(|fence| !std::mem::replace(&mut fence.applied, true))
    }

    pub(super) fn lease(&mut self, now: Moment, lease: &Lease) {
        // An older one that arrives late says nothing about now.
        if lease.sequence <= self.lease_sequence {
            return;
        }
        self.lease_sequence = lease.sequence;
        let ttl = Duration::from_millis(u64::from(lease.ttl_ms)).min(LEASE_MAX);
        self.lease_until = self.lease_until.max(now.since_start.saturating_add(ttl));
    }

    pub(super) fn freshness(&self, now: Duration) -> NodeFreshness {
        if now < self.lease_until {
            NodeFreshness::Fresh
        } else if now < self.lease_until.saturating_add(SUSPECT) {
            NodeFreshness::Suspect
        } else {
            NodeFreshness::Lost
        }
    }

    pub(super) fn record(&self, now: Duration, name: &Name) -> NodeRecord {
        NodeRecord {
            name: format!("nodes/{name}"),
            hello: Some(self.durable.hello.clone()),
            inventory: self.durable.inventory.clone(),
            usage: self.usage,
            allocations: self.durable.allocations.clone(),
            freshness: self.freshness(now).into(),
            last_seen: Some(self.durable.last_seen),
            fence: self.durable.fence.clone(),
        }
    }
}

/// The node's name, if the Hello can be meant.
pub(super) fn check_hello(hello: &Hello) -> Result<Name, CloseReason> {
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

pub(super) fn change(before: &Hello, now: &Hello) -> Note {
    if before.node_uid != now.node_uid {
        return Note::OtherUid { before: before.node_uid.clone(), now: now.node_uid.clone() };
    }
    if before.boot_id != now.boot_id { Note::Rebooted } else { Note::Connected }
}
