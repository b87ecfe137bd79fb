//! Why the node does not promise, with all its numbers.

use crate::Resource;

/// Why an order is not carried out. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Veto {
    /// The plan was made with another inventory.
    #[error("the plan was made with inventory {expected}, the node's is {current}: plan anew with that one")]
    Stale {
        /// The plan's.
        expected: u64,
        /// The node's.
        current: u64,
    },
    /// It does not fit.
    #[error("{}: {} asked, {} available: {} is {}, of which {} is promised; ask for less, or use another node", .0.resource.name(), .0.show(.0.asked), .0.show(.0.available()), .0.place(), .0.show(.0.limit), .0.show(.0.used))]
    Full(Shortage),
    /// There are as many reservations as a node keeps.
    #[error("the node keeps {limit} reservations already: commit or release some first")]
    TooMany {
        /// At most.
        limit: usize,
    },
    /// The node takes nothing new.
    #[error("the node is drained ({reason}): use another node, or end the drain with serio node undrain")]
    Drained {
        /// Who drained it said so.
        reason: String,
    },
    /// A higher fencing generation is in force.
    #[error(
        "the fencing generation {asked} is over: {in_force} is in force; who asks is no longer in charge"
    )]
    Fenced {
        /// Of who asks.
        asked: u64,
        /// Here.
        in_force: u64,
    },
    /// No such promise.
    #[error(
        "there is no reservation {token} here: it was released, or lost with a restart before its commit; reserve anew"
    )]
    UnknownToken {
        /// Asked for.
        token: String,
    },
    /// Its time ran out.
    #[error("the reservation {token} was not committed in its time: reserve anew")]
    Expired {
        /// Asked for.
        token: String,
    },
    /// The order makes no sense.
    #[error("{what}: {problem}")]
    Invalid {
        /// The field.
        what: &'static str,
        /// And what to give instead.
        problem: String,
    },
    /// A VM has taken it.
    #[error("the reservation {token} was taken by the VM {vm}: delete that VM, or reserve anew")]
    Taken {
        /// Asked for.
        token: String,
        /// The VM's uid.
        vm: String,
    },
}

/// What is short, and by how much.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shortage {
    /// What.
    pub resource: Resource,
    /// On which NUMA node; none: on the whole node.
    pub numa_node: Option<u32>,
    /// How much was asked, the VMM's overhead included.
    pub asked: u64,
    /// How much may be promised.
    pub limit: u64,
    /// Promised already.
    pub used: u64,
}

impl Shortage {
    /// What could still be had.
    #[must_use]
    pub const fn available(&self) -> u64 {
        self.limit.saturating_sub(self.used)
    }

    fn show(&self, amount: u64) -> String {
        self.resource.show(amount)
    }

    fn place(&self) -> String {
        self.numa_node.map_or_else(
            || "the capacity of this node".to_owned(),
            |id| format!("the capacity of NUMA node {id}"),
        )
    }
}
