//! What still fits if a site is gone: its promises, the largest first, each onto the fullest node that still takes it.
//!
//! What other sites hold for recoveries is room for this. What the lost site itself held for recoveries is not looked for.
//! Pure; the answer is an estimate: a better packing may exist, and the nodes have the veto.

use std::{collections::BTreeMap, sync::Arc};

use serio_api::v1::{Fit, NodeFreshness, SiteCapacity, WhatFitsResponse};
use serio_types::Name;

use super::view::{Need, NodeView, Promise};

/// A node of the snapshot.
#[derive(Debug, Clone)]
pub struct Member {
    /// Its name.
    pub name: Name,
    /// What it has.
    pub view: Arc<NodeView>,
    /// How alive.
    pub freshness: NodeFreshness,
    /// It is known to be dead.
    pub fenced: bool,
}

impl Member {
    fn usable(&self) -> bool {
        self.freshness == NodeFreshness::Fresh && !self.fenced && !self.view.draining
    }
}

/// Answers it.
#[must_use]
pub fn without_site(site: &str, nodes: &[Member]) -> WhatFitsResponse {
    let mut lost: Vec<(&Name, &Promise)> = nodes
        .iter()
        .filter(|node| node.view.site == site)
        .flat_map(|node| node.view.promises.iter().map(move |promise| (&node.name, promise)))
        .filter(|(_, promise)| !promise.dr_held)
        .collect();
    lost.sort_by_key(|(name, promise)| {
        (std::cmp::Reverse((promise.need.memory, promise.need.vcpus)), &promise.resource, *name)
    });
    let mut bins: Vec<(&Name, Need)> = nodes
        .iter()
        .filter(|node| node.view.site != site && node.usable())
        .map(|node| {
            let promised = node.view.promised.minus(node.view.dr_held);
            (&node.name, node.view.allocatable.minus(promised))
        })
        .collect();
    let mut answer = WhatFitsResponse { sites: sites(site, nodes), ..WhatFitsResponse::default() };
    for (from, promise) in lost {
        let fit = fit(from, promise, &mut bins);
        let count = if fit.node.is_empty() { &mut answer.not_fitting } else { &mut answer.fitting };
        *count = count.saturating_add(1);
        answer.fits.push(fit);
    }
    answer
}

fn fit(from: &Name, promise: &Promise, bins: &mut [(&Name, Need)]) -> Fit {
    let best =
        bins.iter_mut().filter(|(_, room)| promise.need.within(*room)).min_by_key(|(_, room)| room.memory);
    let mut fit = Fit {
        resource: promise.resource.clone(),
        from_node: format!("nodes/{from}"),
        vcpus: u32::try_from(promise.need.vcpus).unwrap_or(u32::MAX),
        memory_bytes: promise.need.memory,
        ..Fit::default()
    };
    match best {
        Some((name, room)) => {
            *room = room.minus(promise.need);
            fit.node = format!("nodes/{name}");
        }
        None => fit.reason = why_nowhere(promise.need, bins),
    }
    fit
}

fn why_nowhere(need: Need, bins: &[(&Name, Need)]) -> String {
    let most = |of: fn(&Need) -> u64| bins.iter().map(|(_, room)| of(room)).max().unwrap_or(0);
    if bins.is_empty() {
        return "no node at another site can take anything".to_owned();
    }
    let short = [
        ("vcpus", need.vcpus, most(|room| room.vcpus)),
        ("bytes of memory", need.memory, most(|room| room.memory)),
        ("bytes of storage", need.storage, most(|room| room.storage)),
    ];
    let parts: Vec<String> = short
        .iter()
        .filter(|(_, wanted, most)| wanted > most)
        .map(|(what, wanted, most)| format!("{wanted} {what}, no node has more than {most} left"))
        .collect();
    if parts.is_empty() {
        "each amount fits somewhere, but no one node has room for all of it".to_owned()
    } else {
        parts.join("; ")
    }
}

fn sites(without: &str, nodes: &[Member]) -> Vec<SiteCapacity> {
    let mut sites: BTreeMap<&str, SiteCapacity> = BTreeMap::new();
    for node in nodes.iter().filter(|node| node.view.site != without && node.usable()) {
        let view = &node.view;
        let sum = sites.entry(&view.site).or_default();
        sum.site.clone_from(&view.site);
        sum.nodes = sum.nodes.saturating_add(1);
        let pairs = [
            (&mut sum.vcpus_allocatable, view.allocatable.vcpus),
            (&mut sum.vcpus_allocated, view.promised.vcpus),
            (&mut sum.memory_allocatable, view.allocatable.memory),
            (&mut sum.memory_allocated, view.promised.memory),
            (&mut sum.vcpus_dr_held, view.dr_held.vcpus),
            (&mut sum.memory_dr_held, view.dr_held.memory),
        ];
        for (total, part) in pairs {
            *total = total.saturating_add(part);
        }
    }
    sites.into_values().collect()
}

#[cfg(test)]
#[path = "what_if_test.rs"]
mod tests;
