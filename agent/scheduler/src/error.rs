//! Why an order of a client is not done, and what of that goes over the wire.

use serio_api::v1::{PlacementState, Refused};
use serio_types::Name;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::inventory::{FenceError, ForgetError};

/// The domain of `google.rpc.ErrorInfo`.
const DOMAIN: &str = "scheduler.serio";
const NOT_LEADER: &str = "NOT_LEADER";
/// The key of the leader's HOST:PORT, in the metadata.
const LEADER: &str = "leader";

/// Why not.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum OrderError {
    /// A field that cannot be meant.
    #[error("{field}: {problem}")]
    Invalid {
        /// Which.
        field: &'static str,
        /// What is wrong, what would be right.
        problem: String,
    },
    /// Another scheduler plans for the region; empty: nobody at the moment.
    #[error("this scheduler does not lead the region: {}", leader_text(.0))]
    NotLeader(String),
    /// It has just started, or lost the lead.
    #[error("this scheduler has no copy of what the region knows yet: try again, or ask another one")]
    NoCopy,
    /// No such thing.
    #[error("{0} is not known here")]
    Unknown(String),
    /// The same id means something else.
    #[error("request {0} was another one before: choose a new request_id")]
    OtherRequest(Name),
    /// It is being worked on.
    #[error("request {0} is being placed: try again in a moment")]
    UnderWay(Name),
    /// It is there already.
    #[error(
        "{resource} is promised on nodes/{node}: release it, or, if that node is dead, record why (serio node fence {node} --proof …)"
    )]
    Held {
        /// For whom.
        resource: String,
        /// Where.
        node: Name,
    },
    /// Nothing is left.
    #[error("no node of {nodes} takes {wish}: {counts}{vetoes}")]
    NoNode {
        /// How many there are.
        nodes: u32,
        /// What was wanted.
        wish: String,
        /// What each filter left.
        counts: String,
        /// Who refused.
        vetoes: String,
    },
    /// Too many.
    #[error("{0}: the limit is reached; release some, or try again later")]
    TooMany(&'static str),
    /// It is over, or not that far.
    #[error("placements/{id} is {}{}", state_text(*.state), because(.reason))]
    State {
        /// Which.
        id: Name,
        /// How far.
        state: PlacementState,
        /// Why.
        reason: String,
    },
    /// The node cannot be asked now.
    #[error("nodes/{0} is not connected: try again")]
    Unreachable(Name),
    /// It was asked, and what it did is not known.
    #[error("nodes/{0} did not answer: whether it was done is not known; repeat the call")]
    Silent(Name),
    /// It says no.
    #[error("nodes/{node} refuses: {}", .refused.message)]
    Refused {
        /// Which.
        node: Name,
        /// Why.
        refused: Refused,
    },
    /// Somebody else changed it.
    #[error("{name} has version {found}, not {expected}: read it again")]
    Version {
        /// What.
        name: String,
        /// Now.
        found: u64,
        /// Meant.
        expected: u64,
    },
    /// A node that is not fenced.
    #[error(transparent)]
    Fence(#[from] FenceError),
    /// A node that is not forgotten.
    #[error(transparent)]
    Forget(#[from] ForgetError),
}

fn leader_text(leader: &str) -> String {
    if leader.is_empty() {
        "nobody does at the moment, try again".to_owned()
    } else {
        format!("{leader} does")
    }
}

fn state_text(state: PlacementState) -> String {
    state.as_str_name().trim_start_matches("PLACEMENT_STATE_").to_lowercase()
}

fn because(reason: &str) -> String {
    if reason.is_empty() { String::new() } else { format!(": {reason}") }
}

impl OrderError {
    fn code(&self) -> Code {
        match self {
            Self::Invalid { .. } => Code::InvalidArgument,
            Self::NotLeader(_) | Self::NoCopy | Self::Unreachable(_) | Self::Silent(_) => Code::Unavailable,
            Self::Unknown(_)
            | Self::Fence(FenceError::Unknown(_))
            | Self::Forget(ForgetError::Unknown(_)) => Code::NotFound,
            Self::OtherRequest(_) => Code::AlreadyExists,
            Self::UnderWay(_) | Self::Version { .. } => Code::Aborted,
            Self::NoNode { .. } | Self::TooMany(_) => Code::ResourceExhausted,
            Self::Held { .. }
            | Self::State { .. }
            | Self::Refused { .. }
            | Self::Fence(FenceError::Alive(_))
            | Self::Forget(ForgetError::NotLost(_) | ForgetError::Unfenced(..)) => Code::FailedPrecondition,
        }
    }

    /// What goes over the wire.
    #[must_use]
    pub fn status(&self) -> Status {
        let text = self.to_string();
        let details = match self {
            Self::Invalid { field, problem } => {
                ErrorDetails::with_bad_request_violation(*field, problem.clone())
            }
            Self::NotLeader(leader) => {
                let metadata = [(LEADER.to_owned(), leader.clone())];
                ErrorDetails::with_error_info(NOT_LEADER, DOMAIN, metadata)
            }
            _ => return Status::new(self.code(), text),
        };
        Status::with_error_details(self.code(), text, details)
    }
}

/// HOST:PORT of the scheduler that leads, as one that does not has answered (empty: it knows of none); none for another
/// answer.
#[must_use]
pub fn leader_of(status: &Status) -> Option<String> {
    let info = status.get_details_error_info().filter(|info| info.reason == NOT_LEADER)?;
    Some(info.metadata.get(LEADER).cloned().unwrap_or_default())
}

impl From<OrderError> for Status {
    fn from(error: OrderError) -> Self {
        error.status()
    }
}
