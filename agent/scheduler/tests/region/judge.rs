//! The checker: whether what clients were told, and what nodes were seen to hold, can have come from a region that works.
//! It knows nothing of ledgers, schedulers or stores, only what they promise.
//!
//! ```text
//!            place                commit                release
//!   None ───────────▶ Reserved ───────────▶ Committed ───────────▶ Releasing ──▶ Released
//!                        └──── ttl, restart of the node, release ──────┘ ▲
//! ```
//! Linearizability: each call is taken to happen at one instant between its invocation and its return; one whose answer was
//! lost, at any instant after its invocation, or never. A request's calls must have an order of instants that the states
//! above allow (a search over all orders, Wing and Gong 1993). Requests meet only in a node's capacity. There each promise
//! is taken to be as short as it can have been: from the first instant at which it certainly was there to the last one.
//! If those do not fit together at some instant, no choice of instants does; if they do, that choice is the proof.
//!
//! Looks at a node (all it holds, at one instant between two times) narrow that down, and show what calls cannot: what is
//! held and was never asked for, is gone before it was given back, or stays after.

use std::{
    collections::{BTreeMap, HashSet},
    time::Duration,
};

/// Since the run began.
pub(crate) type At = Duration;

/// How far a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Life {
    None,
    Reserved,
    Committed,
    Releasing,
    Released,
}

use Life::{Committed, None as Nothing, Released, Releasing, Reserved};

/// What is asked of the region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Place,
    Commit,
    Release,
    /// Asks how far it is.
    Read,
}

/// A call and what was heard of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Op {
    pub(crate) call: Call,
    pub(crate) invoked: At,
    /// When, and how far the request was then. A commit that came too late was told [`Released`].
    pub(crate) answer: Option<(At, Life)>,
}

/// All calls for one request.
#[derive(Debug, Clone, Default)]
pub(crate) struct Request {
    pub(crate) vcpus: u64,
    pub(crate) ops: Vec<Op>,
    /// Nodes and tokens that clients were told.
    pub(crate) places: Vec<(String, String)>,
}

pub(crate) type History = BTreeMap<String, Request>;

/// What a node said that it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) key: String,
    pub(crate) token: String,
    pub(crate) vcpus: u64,
    pub(crate) committed: bool,
}

#[derive(Debug, Clone)]
struct Seen {
    key: String,
    vcpus: u64,
    /// The first and the last look that showed it, and the first that showed it committed.
    first: (At, At),
    last: (At, At),
    committed: Option<(At, At)>,
    /// The first look that did not show it any more.
    gone: Option<(At, At)>,
}

/// What was seen of one node.
#[derive(Debug)]
pub(crate) struct NodeLog {
    pub(crate) name: String,
    /// Vcpus that it really has.
    capacity: u64,
    tokens: BTreeMap<String, Seen>,
    /// Those of the last look.
    present: HashSet<String>,
    looks: Vec<(At, At)>,
    found: Vec<String>,
}

impl NodeLog {
    pub(crate) fn new(name: &str, capacity: u64) -> Self {
        let (tokens, looks, found) = (BTreeMap::new(), Vec::new(), Vec::new());
        Self { name: name.to_owned(), capacity, tokens, present: HashSet::new(), looks, found }
    }

    /// All that it holds, at some instant between those two.
    pub(crate) fn look(&mut self, look: (At, At), list: &[Held]) {
        let name = &self.name;
        self.looks.push(look);
        let sum: u64 = list.iter().map(|held| held.vcpus).sum();
        if sum > self.capacity {
            self.found.push(format!("{name} is over capacity: {sum} of {} at {:?}", self.capacity, look.0));
        }
        let mut keys = HashSet::new();
        for held in list {
            if !keys.insert(&held.key) {
                self.found.push(format!("{} is doubled: twice on {name} at {:?}", held.key, look.0));
            }
            let fresh = Seen {
                key: held.key.clone(),
                vcpus: held.vcpus,
                first: look,
                last: look,
                committed: None,
                gone: None,
            };
            let seen = self.tokens.entry(held.token.clone()).or_insert(fresh);
            if let Some(gone) = seen.gone {
                self.found.push(format!("{} was gone from {name} at {:?}, and came back", held.key, gone.0));
            }
            seen.last = look;
            seen.committed = seen.committed.or(held.committed.then_some(look));
        }
        let now: HashSet<String> = list.iter().map(|held| held.token.clone()).collect();
        for token in self.present.difference(&now) {
            self.tokens.entry(token.clone()).and_modify(|seen| seen.gone = Some(look));
        }
        self.present = now;
    }
}

/// What a call may make of a request, and what its caller is told then.
fn outcomes(life: Life, call: Call) -> &'static [Life] {
    match (call, life) {
        (Call::Place, Nothing) => &[Reserved],
        // Repeated: what came of it.
        (Call::Place | Call::Read, Reserved) => &[Reserved],
        (Call::Place | Call::Read, Committed) => &[Committed],
        (Call::Place | Call::Read, Releasing) => &[Releasing],
        (Call::Place | Call::Read, Released) => &[Released],
        (Call::Read, Nothing) => &[Nothing],
        // The node may have forgotten it.
        (Call::Commit, Reserved) => &[Committed, Released],
        (Call::Commit, Committed) => &[Committed],
        (Call::Release, Reserved | Committed | Releasing) => &[Releasing, Released],
        (Call::Commit | Call::Release, Released) => &[Released],
        (Call::Commit, Releasing) => &[Releasing],
        (Call::Commit | Call::Release, Nothing) => &[],
    }
}

/// What happens by itself.
fn by_itself(life: Life) -> &'static [Life] {
    match life {
        Reserved => &[Releasing, Released],
        Releasing => &[Released],
        Nothing | Committed | Released => &[],
    }
}

/// Whether the answer fits what the call made of it. A commit is told only that it is over.
fn told(call: Call, after: Life, answer: Life) -> bool {
    after == answer || (call == Call::Commit && after == Releasing && answer == Released)
}

/// Whether there is an order of instants that explains all answers.
fn explained(ops: &[Op]) -> bool {
    let mut seen = HashSet::new();
    let mut open = vec![(0_u64, Nothing)];
    let answered = ops.iter().enumerate().filter(|(_, op)| op.answer.is_some());
    let wanted: u64 = answered.map(|(number, _)| 1 << number).sum();
    while let Some((done, life)) = open.pop() {
        if !seen.insert((done, life)) {
            continue;
        }
        if done & wanted == wanted {
            return true;
        }
        open.extend(by_itself(life).iter().map(|next| (done, *next)));
        let left = |number: usize| done & (1 << number) == 0;
        // Nothing that is left returned before it was invoked.
        let earliest = ops.iter().enumerate().filter(|(number, _)| left(*number));
        let earliest = earliest.filter_map(|(_, op)| op.answer).map(|(at, _)| at).min().unwrap_or(At::MAX);
        for (number, op) in
            ops.iter().enumerate().filter(|(number, op)| left(*number) && op.invoked <= earliest)
        {
            for after in outcomes(life, op.call) {
                if op.answer.is_none_or(|(_, answer)| told(op.call, *after, answer)) {
                    open.push((done | 1 << number, *after));
                }
            }
        }
    }
    false
}

impl Request {
    fn first(&self, call: Call) -> Option<At> {
        self.ops.iter().filter(|op| op.call == call).map(|op| op.invoked).min()
    }

    /// When the first caller was told that.
    fn heard(&self, call: Call, life: Life) -> Option<At> {
        let answers = self.ops.iter().filter(|op| op.call == call).filter_map(|op| op.answer);
        answers.filter(|(_, answer)| *answer == life).map(|(at, _)| at).min()
    }

    /// From when to when it certainly was promised, if it ever was: one that was committed was there from its placement on.
    fn certain(&self) -> Option<(At, At)> {
        let committed = self.heard(Call::Commit, Committed)?;
        let from = self.heard(Call::Place, Reserved).map_or(committed, |placed| placed.min(committed));
        let to = self.first(Call::Release).unwrap_or(At::MAX);
        (from < to).then_some((from, to))
    }

    fn judge(&self, key: &str, found: &mut Vec<String>) {
        assert!(self.ops.len() <= 64, "{key} has too many calls to be judged");
        if !explained(&self.ops) {
            found.push(format!("no order of calls explains what was told of {key}: {:?}", self.ops));
        }
        if let Some(other) = self.places.iter().find(|place| Some(*place) != self.places.first()) {
            found.push(format!("{key} was told to be at {:?} and at {other:?}", self.places.first()));
        }
    }
}

/// Every violation, in words.
pub(crate) fn violations(history: &History, nodes: &[NodeLog]) -> Vec<String> {
    let mut found: Vec<String> = nodes.iter().flat_map(|node| node.found.clone()).collect();
    let mut kept_at: BTreeMap<&str, (&str, &str)> = BTreeMap::new();
    for (key, request) in history {
        request.judge(key, &mut found);
    }
    for node in nodes {
        for (token, seen) in &node.tokens {
            judge_token(node, (token, seen), history.get(&seen.key), &mut found);
            let place = (node.name.as_str(), token.as_str());
            if seen.committed.is_some()
                && let Some(other) = kept_at.insert(&seen.key, place)
            {
                found.push(format!("{} is doubled: at {other:?} and at {place:?}", seen.key));
            }
        }
        missing(node, history, &mut found);
        overlap(node, history, &mut found);
    }
    found
}

/// What was seen of one promise, against what was asked for.
fn judge_token(
    node: &NodeLog,
    (token, seen): (&str, &Seen),
    request: Option<&Request>,
    found: &mut Vec<String>,
) {
    let (name, key) = (&node.name, &seen.key);
    let Some(request) = request else {
        return found.push(format!("{name} holds {key}, which nobody asked for"));
    };
    if seen.vcpus != request.vcpus {
        found.push(format!("{name} holds {} vcpus for {key}, not {}", seen.vcpus, request.vcpus));
    }
    if request.first(Call::Place).is_none_or(|asked| seen.first.1 < asked) {
        found.push(format!("{name} held {key} before anybody asked for it"));
    }
    let Some(kept) = seen.committed else { return };
    if request.first(Call::Commit).is_none_or(|asked| kept.1 < asked) {
        found.push(format!("{name} keeps {key}, and nobody had committed it"));
    }
    if !request.places.iter().any(|(node, told)| node == name && told == token) {
        found.push(format!("{name} keeps {key} as {token}, and its client was told {:?}", request.places));
    }
    if let Some(over) = request.heard(Call::Release, Released).filter(|over| seen.last.0 > *over) {
        found.push(format!(
            "{key} was given back at {over:?} and is still held by {name} at {:?}",
            seen.last.0
        ));
    }
}

/// Looks that must have shown a promise, and did not.
fn missing(node: &NodeLog, history: &History, found: &mut Vec<String>) {
    for (key, request) in history {
        let Some((from, to)) = request.certain() else { continue };
        let Some((_, token)) = request.places.iter().find(|(at, _)| *at == node.name) else { continue };
        let seen = node.tokens.get(token);
        let inside = |look: &(At, At)| look.0 > from && look.1 < to;
        // The first look after it was promised: either it shows it, or it is late, or the promise is not there.
        let first = node.looks.get(node.looks.partition_point(|look| look.0 <= from));
        let never = first.filter(|look| inside(look) && seen.is_none_or(|seen| seen.first.0 > look.0));
        if let Some(look) = never.or_else(|| seen?.gone.as_ref().filter(|look| inside(look))) {
            found.push(format!(
                "{key} was promised from {from:?} on and is lost on {} at {:?}",
                node.name, look.0
            ));
        }
    }
}

/// Whether all that certainly was promised at one instant fits.
fn overlap(node: &NodeLog, history: &History, found: &mut Vec<String>) {
    let mut spans: BTreeMap<&str, (At, At, u64)> = BTreeMap::new();
    for (token, seen) in &node.tokens {
        // Seen at an instant before the end of the first look and after the begin of the last.
        if seen.first.1 <= seen.last.0 {
            spans.insert(token, (seen.first.1, seen.last.0, seen.vcpus));
        }
    }
    for request in history.values() {
        let Some((from, to)) = request.certain() else { continue };
        for (_, token) in request.places.iter().filter(|(at, _)| *at == node.name) {
            let span = spans.entry(token).or_insert((from, to, request.vcpus));
            *span = (span.0.min(from), span.1.max(to), span.2);
        }
    }
    // What ends at an instant makes room for what begins there.
    let mut edges: Vec<(At, bool, u64)> = Vec::new();
    for (from, to, vcpus) in spans.into_values() {
        edges.extend([(from, true, vcpus), (to, false, vcpus)]);
    }
    edges.sort_unstable();
    let mut sum = 0;
    for (at, begins, vcpus) in edges {
        sum = if begins { sum + vcpus } else { sum - vcpus };
        if sum > node.capacity {
            found.push(format!("{} promised {sum} of {} at {at:?}", node.name, node.capacity));
            return;
        }
    }
}
