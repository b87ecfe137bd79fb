//! What survives, and where it is kept: records of three kinds, as protobuf messages under a key.
//!
//! ```text
//! nodes/NAME        serio.v1.NodeRecord, without usage and freshness: after a restart they would be lies
//! placements/ID     serio.v1.Placement
//! plans/VDC         serio.v1.RecoveryPlan
//! ```
//! Owns: the seam between the owner and its two backends, [`sqlite`] (one machine) and [`etcd`] (a region), and the
//! decoding of what they give back. Never: meaning.
//! Invariants: (1) a batch is durable, in order, when [`Backend::write`] returns; (2) one that is refused as
//! [`StoreError::Deposed`] has left nothing behind that the next leader would not see.

pub mod etcd;
pub mod sqlite;

use std::{fmt, io, path::PathBuf};

use prost::Message;
use serio_api::v1::{NodeRecord, Placement, RecoveryPlan};
use serio_types::Name;

use crate::inventory::Durable;

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A node's.
    Node,
    /// A placement's.
    Placement,
    /// A recovery plan's.
    Plan,
}

impl Kind {
    /// As it is written.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Node => "nodes",
            Self::Placement => "placements",
            Self::Plan => "plans",
        }
    }

    /// By its name.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Node, Self::Placement, Self::Plan].into_iter().find(|kind| kind.name() == text)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A record that is new, other, or gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// What it is.
    pub kind: Kind,
    /// Its name without the kind.
    pub key: String,
    /// The message; none: it is gone.
    pub value: Option<Vec<u8>>,
}

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder cannot be made.
    #[error("cannot make the state folder {path}")]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// SQLite says no.
    #[error("the database of the scheduler")]
    Database(#[from] rusqlite::Error),
    /// Made by a newer version.
    #[error("the state has format {found}, this version knows {known}: run the newer scheduler again")]
    Format {
        /// In the store.
        found: String,
        /// Here.
        known: &'static str,
    },
    /// A row that is no record.
    #[error("the record {kind}/{key} cannot be read: delete it from the store; a node will report again")]
    Row {
        /// Of what kind.
        kind: String,
        /// As in the row.
        key: String,
    },
    /// Another scheduler leads by now.
    #[error("another scheduler leads the region by now")]
    Deposed,
    /// It answers, and does not do it.
    #[error("etcd refuses: {0} (a record that is too large needs a larger --max-request-bytes of etcd)")]
    Refused(String),
    /// Its quota is used up.
    #[error(
        "etcd's space is full (alarm NOSPACE), so that nothing can be written: compact it and defragment each member, then          `etcdctl alarm disarm`; start its members with --auto-compaction-retention=1h, or a larger --quota-backend-bytes"
    )]
    Full,
    /// The store does not answer.
    #[error("the store cannot be reached: {0}")]
    Unreachable(String),
}

/// A place for records. Used by the owner's thread alone; it may block.
pub trait Backend: Send {
    /// Everything.
    ///
    /// # Errors
    /// When it cannot be read.
    fn load(&mut self) -> Result<Vec<Change>, StoreError>;

    /// Writes all of them, in order; durable when it returns. The same again does no harm.
    ///
    /// # Errors
    /// When that cannot be said; [`StoreError::Deposed`] when this scheduler must not write any more.
    fn write(&mut self, changes: &[Change]) -> Result<(), StoreError>;

    /// The id of this scheduler, or of its region.
    ///
    /// # Errors
    /// When it cannot be read.
    fn scheduler_id(&mut self) -> Result<String, StoreError>;
}

/// Records, decoded.
#[derive(Debug, Default)]
pub struct State {
    /// Of nodes.
    pub nodes: Vec<(Name, Durable)>,
    /// Of placements.
    pub placements: Vec<(Name, Placement)>,
    /// Of recovery plans.
    pub plans: Vec<(Name, RecoveryPlan)>,
}

impl State {
    /// Decodes them.
    ///
    /// # Errors
    /// [`StoreError::Row`] for the first that is none.
    pub fn decode(records: &[Change]) -> Result<Self, StoreError> {
        let mut state = Self::default();
        for record in records {
            let bad = || StoreError::Row { kind: record.kind.name().to_owned(), key: record.key.clone() };
            let name: Name = record.key.parse().map_err(|_| bad())?;
            let Some(bytes) = record.value.as_deref() else { continue };
            match record.kind {
                Kind::Node => {
                    let durable = NodeRecord::decode(bytes).map(durable_of).ok().flatten().ok_or_else(bad)?;
                    state.nodes.push((name, durable));
                }
                Kind::Placement => {
                    state.placements.push((name, Placement::decode(bytes).map_err(|_| bad())?));
                }
                Kind::Plan => state.plans.push((name, RecoveryPlan::decode(bytes).map_err(|_| bad())?)),
            }
        }
        Ok(state)
    }
}

/// As it is written.
#[must_use]
pub fn record_of(name: &Name, node: &Durable) -> NodeRecord {
    NodeRecord {
        name: format!("nodes/{name}"),
        hello: Some(node.hello.clone()),
        inventory: node.inventory.clone(),
        allocations: node.allocations.clone(),
        last_seen: Some(node.last_seen),
        fence: node.fence.clone(),
        ..NodeRecord::default()
    }
}

fn durable_of(record: NodeRecord) -> Option<Durable> {
    Some(Durable {
        hello: record.hello?,
        inventory: record.inventory,
        allocations: record.allocations,
        last_seen: record.last_seen.unwrap_or_default(),
        fence: record.fence,
    })
}
