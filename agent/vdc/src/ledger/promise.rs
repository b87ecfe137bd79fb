//! What is asked, and what is promised: the words of the ledger, and which of them make sense.

use serio_types::Quota;

use super::Veto;

/// The longest life of a promise that is not committed, milliseconds.
pub const TTL_MS_MAX: u64 = 600_000;
/// The longest name of what a promise is for, and the longest reason, bytes.
pub const TEXT_MAX: usize = 256;
/// The longest key, bytes.
const KEY_MAX: usize = 128;

/// For what capacity is held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// For use.
    #[default]
    Normal,
    /// For a recovery.
    DrHeld,
}

/// Where a promise is to lie.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Wish {
    /// Wherever there is room.
    #[default]
    Any,
    /// On one NUMA node, whichever.
    OneNode,
    /// On this NUMA node.
    Node(u32),
}

/// What is asked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Want {
    /// Which it is, over repetitions.
    pub key: String,
    /// "vdcs/ardesio/vms/web".
    pub resource: String,
    /// Of the guest, without overhead.
    pub amount: Quota,
    /// For what.
    pub class: Class,
    /// Where.
    pub wish: Wish,
    /// Of who asks.
    pub fence: u64,
}

/// How far a promise is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// Ends by itself.
    Pending {
        /// At this time of the caller's clock, milliseconds.
        until: u64,
    },
    /// Stays until released or taken.
    Committed,
    /// Is this VM's, by its uid.
    Taken(String),
}

/// A promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promise {
    /// Its name.
    pub token: String,
    /// What was asked.
    pub want: Want,
    /// The NUMA node that has it.
    pub numa_node: Option<u32>,
    /// How far it is.
    pub stage: Stage,
}

impl Promise {
    /// What is left of its ttl, milliseconds; 0 when it has none.
    #[must_use]
    pub const fn left(&self, now: u64) -> u64 {
        match self.stage {
            Stage::Pending { until } => until.saturating_sub(now),
            Stage::Committed | Stage::Taken(_) => 0,
        }
    }

    pub(super) const fn is_open(&self) -> bool {
        !matches!(self.stage, Stage::Taken(_))
    }

    pub(super) fn dead(&self, now: u64) -> bool {
        matches!(self.stage, Stage::Pending { until } if until <= now)
    }
}

/// Asks for a promise: see [`Ledger::reserve`].
#[derive(Debug, Clone)]
pub struct Ask {
    /// What.
    pub want: Want,
    /// How long it holds uncommitted, milliseconds.
    pub ttl_ms: u64,
    /// Of the inventory that the plan was made with; 0: any. The node's capacity must be the same since.
    pub expected_generation: u64,
    /// The promise's name if it is a new one; never used before.
    pub token: String,
}

/// What a fence has ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ended {
    /// Reservations that are dropped.
    pub tokens: Vec<String>,
    /// VMs that have taken one of a lower generation: the caller stops them.
    pub vms: Vec<String>,
}

pub(super) fn text(what: &'static str, given: &str, max: usize) -> Result<(), Veto> {
    if given.is_empty() || given.len() > max || given.chars().any(char::is_control) {
        let problem = format!("give 1 to {max} printable characters");
        return Err(Veto::Invalid { what, problem });
    }
    Ok(())
}

pub(super) fn valid(ask: &Ask) -> Result<(), Veto> {
    text("key", &ask.want.key, KEY_MAX)?;
    text("resource", &ask.want.resource, TEXT_MAX)?;
    text("token", &ask.token, TEXT_MAX)?;
    if ask.want.amount == Quota::default() {
        let problem = "give vcpus, memory_bytes or storage_bytes".to_owned();
        return Err(Veto::Invalid { what: "amounts", problem });
    }
    if !(1..=TTL_MS_MAX).contains(&ask.ttl_ms) {
        let problem = format!("give 1 to {TTL_MS_MAX} milliseconds");
        return Err(Veto::Invalid { what: "ttl_ms", problem });
    }
    Ok(())
}
