//! The placements: pure. Which node holds what for which request, and when something is due.
//!
//! ```text
//!  insert ─▶ RESERVED ── commit ──▶ COMMITTED ── gone from the node's list ──▶ RELEASED ── 10 min ──▶ forgotten
//!               │ ttl, release          │ release                                  ▲
//!               └──────────────▶ RELEASING ── the node says so, or is fenced ──────┘
//! ```
//! Invariants: (1) a request has at most one placement, for as long as it is remembered; (2) what is over at the caller is
//! RELEASING until the node has said so: nothing leaks there; (3) an entry has at most one timer, by this process's clock;
//! (4) their number is bounded; (5) the indexes say of what is not over what a look at everything would.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serio_api::v1::{Placement, PlacementState};
use serio_types::Name;

use crate::index::Index;

/// Placements that are kept, over or not.
pub const PLACEMENTS_MAX: usize = 200_000;
/// A placement that is over answers repetitions of its request for that long.
const REMEMBERED: Duration = Duration::from_secs(600);
/// An order to release is repeated after that.
const RELEASE_AGAIN: Duration = Duration::from_secs(5);
/// A node's clock may be slower than ours by that when a ttl runs.
const TTL_SLACK: Duration = Duration::from_secs(2);
/// Timers that one tick takes.
const DUE_MAX: usize = 512;

#[derive(Debug)]
struct Entry {
    placement: Placement,
    node: Name,
    timer: Option<Duration>,
}

/// What a timer asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Due {
    /// The node is to be told to release it.
    Release(Name),
    /// It is forgotten: its record goes.
    Forgotten(Name),
}

/// See the head of this file.
#[derive(Debug, Default)]
pub struct Book {
    entries: BTreeMap<Name, Entry>,
    /// Those that are not over, by their node: the few that its lists are compared with, however many are remembered.
    by_node: Index<Name>,
    /// Those that are not over, by what they are for.
    by_resource: Index<String>,
    /// Those that are not over and belong together, by vdc and group.
    by_group: Index<(String, String)>,
    timers: BTreeSet<(Duration, Name)>,
}

impl Book {
    /// As it was saved. What was reserved has its whole ttl again by this clock: the node ends it by its own.
    #[must_use]
    pub fn restore(now: Duration, placements: Vec<(Name, Placement)>) -> Self {
        let mut book = Self::default();
        for (id, placement) in placements {
            book.insert(now, id, placement);
        }
        book
    }

    /// One.
    #[must_use]
    pub fn get(&self, id: &Name) -> Option<&Placement> {
        self.entries.get(id).map(|entry| &entry.placement)
    }

    /// The node of one.
    #[must_use]
    pub fn node(&self, id: &Name) -> Option<&Name> {
        self.entries.get(id).map(|entry| &entry.node)
    }

    /// How many are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// A page of them, those of one vdc when it is named.
    pub fn list<'a>(
        &'a self,
        vdc: &'a str,
        after: Option<&Name>,
    ) -> impl Iterator<Item = (&'a Name, &'a Placement)> {
        use std::ops::Bound;
        let from = after.map_or(Bound::Unbounded, |name| Bound::Excluded(name.clone()));
        self.entries
            .range((from, Bound::Unbounded))
            .map(|(id, entry)| (id, &entry.placement))
            .filter(move |(_, placement)| vdc.is_empty() || vdc_of(placement) == vdc)
    }

    /// Nodes that have a member of that group.
    #[must_use]
    pub fn group(&self, vdc: &str, group: &str) -> Vec<Name> {
        let members = self.by_group.names((vdc.to_owned(), group.to_owned()));
        let nodes: BTreeSet<&Name> = members.filter_map(|id| self.node(id)).collect();
        nodes.into_iter().cloned().collect()
    }

    /// The node that holds something for it, or may.
    #[must_use]
    pub fn holder(&self, resource: &str) -> Option<&Name> {
        self.by_resource.names(resource.to_owned()).next().and_then(|id| self.node(id))
    }

    /// A new one, or one that was saved.
    pub fn insert(&mut self, now: Duration, id: Name, placement: Placement) {
        self.forget(&id);
        let node: Name = placement
            .node
            .strip_prefix("nodes/")
            .and_then(|name| name.parse().ok())
            .unwrap_or_else(|| id.clone());
        self.entries.insert(id.clone(), Entry { placement, node, timer: None });
        self.index(&id);
        self.set_timer(now, &id);
    }

    /// Has it found by what it is for, unless it is over.
    fn index(&mut self, id: &Name) {
        let open = self.get(id).is_some_and(|placement| placement.state() != PlacementState::Released);
        self.index_as(id, open);
    }

    fn index_as(&mut self, id: &Name, open: bool) {
        let Some(entry) = self.entries.get(id) else { return };
        if open {
            self.by_node.insert(entry.node.clone(), id.clone());
        } else {
            self.by_node.remove(entry.node.clone(), id.clone());
        }
        let Some(request) = entry.placement.request.as_ref() else { return };
        let (resource, group) =
            (request.resource.clone(), (request.vdc.clone(), request.anti_affinity_group.clone()));
        // Most belong to no group, and nobody asks for that one.
        let grouped = !group.1.is_empty();
        if open {
            self.by_resource.insert(resource, id.clone());
        } else {
            self.by_resource.remove(resource, id.clone());
        }
        if grouped && open {
            self.by_group.insert(group, id.clone());
        } else if grouped {
            self.by_group.remove(group, id.clone());
        }
    }

    /// What another scheduler has of it, or that it has forgotten it.
    pub fn copy(&mut self, now: Duration, id: Name, placement: Option<Placement>) {
        self.forget(&id);
        if let Some(placement) = placement {
            self.insert(now, id, placement);
        }
    }

    /// Changes the state; whether it was another.
    pub fn set(&mut self, now: Duration, id: &Name, state: PlacementState, reason: &str) -> bool {
        let Some(entry) = self.entries.get_mut(id) else { return false };
        if entry.placement.state() == state {
            return false;
        }
        entry.placement.set_state(state);
        entry.placement.reason = reason.to_owned();
        self.index(id);
        self.set_timer(now, id);
        true
    }

    /// What a node is to give back and has not.
    #[must_use]
    pub fn releasing(&self, node: &Name) -> Vec<Name> {
        let of_node = self.of_node(node).into_iter();
        of_node.filter(|(_, state)| *state == PlacementState::Releasing).map(|(id, _)| id).collect()
    }

    /// The node sent its list: what of ours is over is answered.
    pub fn listed(&mut self, now: Duration, node: &Name, keys: &BTreeSet<String>) -> Vec<Name> {
        let over = |(id, state): &(Name, PlacementState)| {
            matches!(state, PlacementState::Committed | PlacementState::Releasing)
                && !keys.contains(id.as_str())
        };
        let over: Vec<(Name, PlacementState)> = self.of_node(node).into_iter().filter(over).collect();
        for (id, state) in &over {
            let why =
                if *state == PlacementState::Committed { "the node does not have it any more" } else { "" };
            self.end(now, id, why);
        }
        over.into_iter().map(|(id, _)| id).collect()
    }

    /// The node is known to be dead: what it held is over.
    pub fn fenced(&mut self, now: Duration, node: &Name) -> Vec<Name> {
        let open: Vec<Name> = self.of_node(node).into_iter().map(|(id, _)| id).collect();
        for id in &open {
            self.set(now, id, PlacementState::Released, "its node was fenced");
        }
        open
    }

    /// What is due by now, at most a few hundred.
    pub fn due(&mut self, now: Duration) -> Vec<Due> {
        let ids: Vec<Name> = self
            .timers
            .iter()
            .take_while(|(at, _)| *at <= now)
            .take(DUE_MAX)
            .map(|(_, id)| id.clone())
            .collect();
        ids.into_iter().filter_map(|id| self.fire(now, id)).collect()
    }

    fn fire(&mut self, now: Duration, id: Name) -> Option<Due> {
        match self.get(&id)?.state() {
            PlacementState::Reserved => {
                self.set(now, &id, PlacementState::Releasing, "it was not committed within its ttl");
                Some(Due::Release(id))
            }
            PlacementState::Releasing => {
                self.set_timer(now, &id);
                Some(Due::Release(id))
            }
            PlacementState::Released => {
                self.forget(&id);
                Some(Due::Forgotten(id))
            }
            PlacementState::Committed | PlacementState::Unspecified => {
                self.set_timer(now, &id);
                None
            }
        }
    }

    /// It is over, at the node too; the reason that it had stays when there is no better one.
    pub fn end(&mut self, now: Duration, id: &Name, why: &str) -> bool {
        let reason = match self.get(id) {
            Some(placement) if why.is_empty() => placement.reason.clone(),
            _ => why.to_owned(),
        };
        self.set(now, id, PlacementState::Released, &reason)
    }

    fn forget(&mut self, id: &Name) {
        self.index_as(id, false);
        let Some(entry) = self.entries.remove(id) else { return };
        if let Some(at) = entry.timer {
            self.timers.remove(&(at, id.clone()));
        }
    }

    /// What is not over at a node.
    fn of_node(&self, node: &Name) -> Vec<(Name, PlacementState)> {
        let state = |id: &Name| self.get(id).map(|placement| (id.clone(), placement.state()));
        self.by_node.names(node.clone()).filter_map(state).collect()
    }

    fn set_timer(&mut self, now: Duration, id: &Name) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        if let Some(old) = entry.timer.take() {
            self.timers.remove(&(old, id.clone()));
        }
        let wait = match entry.placement.state() {
            PlacementState::Reserved => {
                let ttl_ms = entry.placement.request.as_ref().map_or(0, |request| request.ttl_ms);
                Duration::from_millis(u64::from(ttl_ms)).saturating_add(TTL_SLACK)
            }
            PlacementState::Releasing => RELEASE_AGAIN,
            PlacementState::Released => REMEMBERED,
            PlacementState::Committed | PlacementState::Unspecified => return,
        };
        let at = now.saturating_add(wait);
        entry.timer = Some(at);
        self.timers.insert((at, id.clone()));
    }
}

fn vdc_of(placement: &Placement) -> &str {
    placement.request.as_ref().map_or("", |request| &request.vdc)
}

#[cfg(test)]
#[path = "book_test.rs"]
mod tests;
