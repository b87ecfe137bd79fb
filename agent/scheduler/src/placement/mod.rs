//! Where a VM goes: filters, then weighers, over one snapshot of the nodes. Pure: the same nodes, wish and seed give the
//! same plan.
//!
//! ```text
//!  nodes ─▶ connected ─▶ fresh ─▶ fenced ─▶ draining ─▶ site ─▶ baseline ─▶ image ─▶ fit ─▶ anti-affinity ─▶ not refused
//!           each filter counts what it left              weighers: pack · let hosts sleep · spread a group · jitter
//! ```
//! Owns: the choice. Never: a promise; the node has the veto, and the next candidates stand in the plan for that.
//! Invariant: what is planned passed every filter; the counts never rise from one filter to the next.

pub mod view;
pub mod what_if;

use serio_api::v1::{AllocationClass, FilterCount, NodeFreshness, PlaceRequest};
use serio_types::Name;

use view::{Need, NodeView, image_name};

/// Candidates that a plan names at most.
pub const CANDIDATES_MAX: usize = 8;

/// What is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wish {
    /// Without the VMM's overhead.
    pub need: Need,
    /// Only there; empty: anywhere.
    pub site: String,
    /// At least that; empty: any.
    pub baseline: String,
    /// Only where it is; empty: anywhere.
    pub image: String,
    /// Held for a recovery.
    pub dr_held: bool,
}

impl Wish {
    /// Of a request.
    #[must_use]
    pub fn of(request: &PlaceRequest) -> Self {
        Self {
            need: Need {
                vcpus: u64::from(request.vcpus),
                memory: request.memory_bytes,
                storage: request.storage_bytes,
            },
            site: request.site.clone(),
            baseline: request.cpu_baseline.clone(),
            image: image_name(&request.image).to_owned(),
            dr_held: request.class() == AllocationClass::DrHeld,
        }
    }
}

/// A node, as it is now.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Its name.
    pub name: &'a Name,
    /// What it has.
    pub view: &'a NodeView,
    /// What was asked of it and is not in its list yet.
    pub pending: Need,
    /// How alive.
    pub freshness: NodeFreshness,
    /// It can be asked.
    pub connected: bool,
    /// It was fenced, and has not said yet that it ended what it had.
    pub fenced: bool,
}

impl Candidate<'_> {
    fn room(&self) -> Need {
        self.view.allocatable.minus(self.view.promised.plus(self.pending))
    }

    fn needs(&self, wish: &Wish) -> Need {
        wish.need.plus(Need { memory: self.view.overhead, ..Need::default() })
    }

    fn asleep(&self) -> bool {
        self.view.promises.is_empty() && self.pending == Need::default()
    }
}

/// Where the other members of a group are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Members {
    /// Nodes that have one.
    pub nodes: Vec<Name>,
}

/// The question.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    /// What is wanted.
    pub wish: &'a Wish,
    /// Of the same group.
    pub members: &'a Members,
    /// Nodes that refused already.
    pub refused: &'a [Name],
    /// Of the jitter.
    pub seed: u64,
}

/// The answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Best first, at most [`CANDIDATES_MAX`].
    pub nodes: Vec<Name>,
    /// What each filter left.
    pub filters: Vec<FilterCount>,
}

impl Plan {
    /// For people: `20 nodes, connected 19, fresh 18, …`.
    #[must_use]
    pub fn counts(&self) -> String {
        let counts: Vec<String> =
            self.filters.iter().map(|count| format!("{} {}", count.filter, count.nodes)).collect();
        counts.join(", ")
    }
}

type Filter = fn(&Question<'_>, &Candidate<'_>) -> bool;

const FILTERS: [(&str, Filter); 10] = [
    ("connected", |_, node| node.connected),
    ("fresh", |_, node| node.freshness == NodeFreshness::Fresh),
    ("fenced", |_, node| !node.fenced),
    ("draining", |_, node| !node.view.draining),
    ("site", |question, node| question.wish.site.is_empty() || node.view.site == question.wish.site),
    ("baseline", |question, node| baseline_suffices(&node.view.baseline, &question.wish.baseline)),
    ("image", |question, node| {
        question.wish.image.is_empty() || node.view.images.contains(&question.wish.image)
    }),
    ("fit", |question, node| node.needs(question.wish).within(node.room())),
    ("anti-affinity", |question, node| !question.members.nodes.contains(node.name)),
    ("refused", |question, node| !question.refused.contains(node.name)),
];

/// A fuller node is better, by at most that.
const PACK: f64 = 1.0;
/// A node that has nothing may sleep on.
const AWAKE: f64 = 0.5;
/// Another failure domain than the group's others goes before everything else.
const APART: f64 = 4.0;
/// Two that are alike to within that are chosen between by chance, so that many askers do not meet on one node.
const JITTER: f64 = 0.1;

/// See the head of this file.
pub fn plan<'a>(question: &Question<'_>, nodes: impl Iterator<Item = Candidate<'a>> + Clone) -> Plan {
    let mut left = [0_u32; FILTERS.len()];
    let domains: Vec<&str> = nodes
        .clone()
        .filter(|node| !question.members.nodes.is_empty() && question.members.nodes.contains(node.name))
        .map(|node| node.view.failure_domain.as_str())
        .collect();
    let mut scored: Vec<(f64, &Name)> = Vec::new();
    for (number, node) in (0_u64..).zip(nodes) {
        let passed = FILTERS.iter().zip(&mut left).all(|((_, filter), left)| {
            let passes = filter(question, &node);
            *left = left.saturating_add(u32::from(passes));
            passes
        });
        if passed {
            scored.push((score(question, &node, &domains) + JITTER * unit(question.seed, number), node.name));
        }
    }
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(b.1)));
    Plan {
        nodes: scored.into_iter().take(CANDIDATES_MAX).map(|(_, name)| name.clone()).collect(),
        filters: FILTERS
            .iter()
            .zip(left)
            .map(|((filter, _), nodes)| FilterCount { filter: (*filter).to_owned(), nodes })
            .collect(),
    }
}

fn score(question: &Question<'_>, node: &Candidate<'_>, domains: &[&str]) -> f64 {
    let after = node.view.promised.plus(node.pending).plus(node.needs(question.wish));
    let full = share(after.vcpus, node.view.allocatable.vcpus)
        .max(share(after.memory, node.view.allocatable.memory));
    let awake = if node.asleep() { 0.0 } else { AWAKE };
    let together = domains.contains(&node.view.failure_domain.as_str());
    let apart = if domains.is_empty() || together { 0.0 } else { APART };
    PACK * full + awake + apart
}

#[allow(clippy::cast_precision_loss, reason = "a weight, not a sum")]
fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// 0 to 1, by chance that is the same for the same numbers (splitmix64).
#[allow(clippy::cast_precision_loss, reason = "53 bits fit")]
fn unit(seed: u64, number: u64) -> f64 {
    let mut z = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

/// Levels of the x86-64 psABI contain the lower ones; other names only themselves.
fn baseline_suffices(has: &str, wanted: &str) -> bool {
    let level = |text: &str| text.strip_prefix("x86-64-v").and_then(|number| number.parse::<u8>().ok());
    match (level(has), level(wanted)) {
        (Some(has), Some(wanted)) => has >= wanted,
        _ => wanted.is_empty() || has == wanted,
    }
}

#[cfg(test)]
#[path = "placement_test.rs"]
mod tests;
