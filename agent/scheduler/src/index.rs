//! Who has to do with what: pairs of a key and a name, found by the key without a look at the rest.
//!
//! Owns: the pairs, compact (a region has hundreds of thousands). Never: what they mean, or when one is over; their owner says
//! each change, and a property test holds them against a look at everything.

use std::collections::BTreeSet;

use serio_types::Name;

/// See the head of this file. The name is there in every pair; without one a pair is where those of its key begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index<K>(BTreeSet<(K, Option<Name>)>);

impl<K> Default for Index<K> {
    fn default() -> Self {
        Self(BTreeSet::new())
    }
}

impl<K: Ord + Clone> Index<K> {
    /// From now on.
    pub fn insert(&mut self, key: K, name: Name) {
        self.0.insert((key, Some(name)));
    }

    /// Not any more.
    pub fn remove(&mut self, key: K, name: Name) {
        self.0.remove(&(key, Some(name)));
    }

    /// The names of a key, in order.
    pub fn names(&self, key: K) -> impl Iterator<Item = &Name> {
        self.0
            .range((key.clone(), None)..)
            .take_while(move |(found, _)| *found == key)
            .filter_map(|(_, name)| name.as_ref())
    }

    /// How many pairs there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
