//! One operation of a queue under way: what it is, how far it is, which primitives it still has.

use crate::{error::IoError, plan::Range, shared::Claim, uring::Io};

/// What is done, without its memory (which lies in the driver).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write { fua: bool },
    Flush,
    Discard,
    WriteZeroes { unmap: bool },
}

impl Kind {
    pub(crate) fn changes(self) -> bool {
        !matches!(self, Kind::Read)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    Idle,
    Parked,
    CopyUp,
    Transfer,
    Sync,
    Commit,
    Done,
}

pub(crate) struct Slot {
    pub(crate) tag: u64,
    pub(crate) kind: Kind,
    pub(crate) range: Range,
    pub(crate) stage: Stage,
    /// Primitives of this stage, and those of the next one while this is CopyUp.
    pub(crate) ios: Vec<Io>,
    pub(crate) then: Vec<Io>,
    pub(crate) next: usize,
    pub(crate) in_flight: u32,
    pub(crate) error: Option<IoError>,
    pub(crate) claim: Option<Claim>,
    pub(crate) entered: bool,
}

impl Slot {
    /// One that nothing is under way in.
    pub(crate) fn idle() -> Slot {
        Slot {
            tag: 0,
            kind: Kind::Flush,
            range: Range { offset: 0, len: 0 },
            stage: Stage::Idle,
            ios: Vec::new(),
            then: Vec::new(),
            next: 0,
            in_flight: 0,
            error: None,
            claim: None,
            entered: false,
        }
    }
}
