//! The phases of a VM in this process, and the operations that wait for their end.
//!
//! ```text
//!              create                    start                 power button, force
//!   (no row) ────────▶ Creating ──▶ Launching ──▶ Running ──────────▶ Stopping
//!                          │ failed     │ failed      │ ended              │ ended
//!                          ▼            ▼             ▼                    ▼
//!                       Deleting ◀── Cleaning ◀───────┴────────────────────┘
//!                                       │  ├─▶ Off        (then a client may start or delete it)
//!                                       │  └─▶ Pausing ──▶ Launching      (its policy starts it again)
//!   Adopting (only after a start of seriod) ──▶ Running | Stopping | Cleaning
//! ```

use std::collections::BTreeSet;

use serio_types::Name;
use uuid::Uuid;

use super::command::{Answer, Reply, Request};
use crate::error::Error;

/// A client's operation that is not answered yet. More replies join when the same request comes again.
#[derive(Debug, Default)]
pub(super) struct Op {
    /// All get the same answer. Empty for work that no client waits for.
    pub(super) replies: Vec<Reply>,
    /// The id under which it is remembered.
    pub(super) request: Option<Request>,
}

impl Op {
    /// Answers all.
    pub(super) fn finish(self, result: Result<Answer, Error>) {
        for reply in self.replies {
            let _ = reply.send(result.clone());
        }
    }
}

/// What a start was for: decides what its failure does.
#[derive(Debug)]
pub(super) enum Cause {
    /// Part of `CreateVm`: a failure undoes the whole creation.
    Create(Op),
    /// `StartVm`: a failure leaves it off.
    Start(Op),
    /// The policy, or a start that an earlier seriod did not finish: a failure is tried again.
    Again,
}

/// What follows the end of the process.
#[derive(Debug)]
pub(super) enum After {
    /// It rests.
    Rest(Op),
    /// It is started again after a pause.
    Again { pause_ms: u64 },
    /// It is started at once.
    Launch,
    /// It is deleted.
    Delete { keep_root: bool, op: Op },
}

/// Where a VM is.
#[derive(Debug)]
pub(super) enum Phase {
    /// No process, no run files, no operation.
    Off,
    /// Its root volume is being made.
    Creating { start: bool, op: Op },
    /// Its process is being started.
    Launching { cause: Cause },
    /// Its guest runs.
    Running { pid: u32 },
    /// Its process is to end.
    Stopping { pid: u32, force: bool, ticket: u64, after: After },
    /// Its process is gone; its run files are being removed.
    Cleaning { after: After },
    /// The pause before it is started again.
    Pausing { ticket: u64 },
    /// Its files are being removed. `undone`: why its creation did not succeed.
    Deleting { op: Op, undone: Option<Error> },
    /// A process of an earlier seriod is being looked for; it did not answer so many times.
    Adopting { silent: u32 },
}

impl Phase {
    /// What is going on, when another operation has to wait for it.
    pub(super) fn operation(&self) -> Option<&'static str> {
        match self {
            Self::Off | Self::Running { .. } | Self::Pausing { .. } => None,
            Self::Creating { .. } => Some("its creation"),
            Self::Launching { .. } => Some("its start"),
            Self::Stopping { .. } | Self::Cleaning { .. } => Some("its stop"),
            Self::Deleting { .. } => Some("its deletion"),
            Self::Adopting { .. } => Some("its takeover after the start of seriod"),
        }
    }

    /// Whether it ends with the VM's deletion.
    pub(super) const fn is_deletion(&self) -> bool {
        matches!(
            self,
            Self::Deleting { .. }
                | Self::Stopping { after: After::Delete { .. }, .. }
                | Self::Cleaning { after: After::Delete { .. } }
        )
    }

    /// Where a repeated request can join.
    pub(super) fn op_mut(&mut self) -> Option<&mut Op> {
        match self {
            Self::Creating { op, .. } | Self::Deleting { op, .. } => Some(op),
            Self::Launching { cause: Cause::Create(op) | Cause::Start(op) } => Some(op),
            Self::Stopping { after, .. } | Self::Cleaning { after } => match after {
                After::Rest(op) | After::Delete { op, .. } => Some(op),
                After::Again { .. } | After::Launch => None,
            },
            Self::Launching { cause: Cause::Again }
            | Self::Off
            | Self::Running { .. }
            | Self::Pausing { .. }
            | Self::Adopting { .. } => None,
        }
    }
}

/// An operation on a volume.
#[derive(Debug)]
pub(super) enum VolumeOp {
    /// Its files are being made.
    Create(Op),
    /// Its files are being removed. `undone`: why its creation did not succeed.
    Delete { op: Op, undone: Option<Error> },
    /// A point is being sealed.
    Snapshot { name: Name, op: Op },
    /// It grows.
    Resize(Op),
    /// It goes back to a snapshot.
    Rollback { point: Name, op: Op },
    /// A point of the whole vdc is being sealed.
    VdcSnapshot,
    /// Clones are being made from one of its snapshots.
    Lend { clones: BTreeSet<Uuid> },
    /// A running VM gets it, or gives it back; the VM's order knows who waits for it.
    Plug,
    /// After a start, or after work that `failed`: what do its headers say?
    Inspect { failed: Option<(Op, Error)> },
}

impl VolumeOp {
    pub(super) const fn operation(&self) -> &'static str {
        match self {
            Self::Create(_) => "its creation",
            Self::Delete { .. } => "its deletion",
            Self::Snapshot { .. } => "a snapshot",
            Self::Resize(_) => "a resize",
            Self::Rollback { .. } => "a rollback",
            Self::VdcSnapshot => "a snapshot of its vdc or VM",
            Self::Lend { .. } => "a clone of it",
            Self::Plug => "its coming to a VM or leaving one",
            Self::Inspect { .. } => "its check after a failure or the start of seriod",
        }
    }

    pub(super) fn op_mut(&mut self) -> Option<&mut Op> {
        match self {
            Self::Create(op)
            | Self::Delete { op, .. }
            | Self::Snapshot { op, .. }
            | Self::Resize(op)
            | Self::Rollback { op, .. }
            | Self::Inspect { failed: Some((op, _)) } => Some(op),
            Self::VdcSnapshot | Self::Plug | Self::Lend { .. } | Self::Inspect { failed: None } => None,
        }
    }
}
