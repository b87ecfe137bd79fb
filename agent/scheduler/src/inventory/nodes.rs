//! The nodes by name, and who of them has promised something to whom.
//!
//! Owns: the one way to change a node, so that what its view promises is found by the resource too. Invariant: `by_resource` has
//! exactly the resources of all views.

use std::{
    collections::{BTreeMap, btree_map::Iter},
    sync::Arc,
};

use serio_types::Name;

use super::node::Node;
use crate::{index::Index, placement::view::NodeView};

/// See the head of this file.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    map: BTreeMap<Name, Node>,
    by_resource: Index<String>,
}

impl Nodes {
    pub(super) fn get(&self, name: &Name) -> Option<&Node> {
        self.map.get(name)
    }

    pub(super) fn contains_key(&self, name: &Name) -> bool {
        self.map.contains_key(name)
    }

    pub(super) fn len(&self) -> usize {
        self.map.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    pub(super) fn iter(&self) -> Iter<'_, Name, Node> {
        self.map.iter()
    }

    /// Nodes that have promised something to it, by name; one that was fenced too, until what it had is forgotten.
    pub(super) fn promisers(&self, resource: &str) -> impl Iterator<Item = &Name> {
        self.by_resource.names(resource.to_owned())
    }

    pub(super) fn insert(&mut self, name: Name, node: Node) {
        let view = Arc::clone(&node.view);
        let before = self.map.insert(name.clone(), node).map(|node| node.view);
        self.reindex(&name, before.as_deref(), Some(&view));
    }

    pub(super) fn remove(&mut self, name: &Name) {
        let before = self.map.remove(name).map(|node| node.view);
        self.reindex(name, before.as_deref(), None);
    }

    /// Does something to a node; none when there is no such node.
    pub(super) fn change<T>(&mut self, name: &Name, change: impl FnOnce(&mut Node) -> T) -> Option<T> {
        let node = self.map.get_mut(name)?;
        let before = Arc::clone(&node.view);
        let done = change(node);
        let now = Arc::clone(&node.view);
        // A view is made anew or stays: most inputs leave it.
        if !Arc::ptr_eq(&before, &now) {
            self.reindex(name, Some(&before), Some(&now));
        }
        Some(done)
    }

    fn reindex(&mut self, name: &Name, before: Option<&NodeView>, now: Option<&NodeView>) {
        let (before, now) = (before.map(|view| &view.resources), now.map(|view| &view.resources));
        let is_in = |of: Option<&BTreeMap<String, String>>, resource: &String| {
            of.is_some_and(|resources| resources.contains_key(resource))
        };
        for resource in before.into_iter().flat_map(BTreeMap::keys).filter(|r| !is_in(now, r)) {
            self.by_resource.remove(resource.clone(), name.clone());
        }
        for resource in now.into_iter().flat_map(BTreeMap::keys).filter(|r| !is_in(before, r)) {
            self.by_resource.insert(resource.clone(), name.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Nodes {
        /// What a look at everything says of the index.
        pub(in crate::inventory) fn check(&self) {
            let mut all = Index::default();
            for (name, node) in &self.map {
                node.view.resources.keys().for_each(|r| all.insert(r.clone(), name.clone()));
            }
            assert_eq!(self.by_resource, all);
        }
    }
}
