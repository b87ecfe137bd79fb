//! Why a request was not done, for the one who must act. One function maps it to a gRPC status ([`Error::status`]);
//! the log level follows from the same place ([`Error::is_ours`]).

use std::{error::Error as StdError, sync::Arc};

use serio_control::message::{Code as PeerCode, Failed};
use serio_store::StoreError;
use serio_vdc::{Refusal, ledger::Veto};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::supervise::{JobError, LaunchError};

/// The domain of [`ErrorDetails`] reasons.
const DOMAIN: &str = "serio";

/// A field of the request that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// As in the proto: `spec.vcpus`.
    pub field: String,
    /// What is wrong, and what would be right.
    pub problem: String,
}

impl FieldError {
    /// One.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }
}

/// Why a request was not done.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// Fields are wrong.
    #[error("{}", show_fields(.0))]
    Invalid(Vec<FieldError>),
    /// There is no such resource.
    #[error("{resource} does not exist{hint}")]
    NotFound {
        /// As the API names it.
        resource: String,
        /// What to do, beginning with `: `, or empty.
        hint: &'static str,
    },
    /// The name is taken.
    #[error("{resource} exists already: choose another name, or delete it first")]
    Exists {
        /// As the API names it.
        resource: String,
    },
    /// A quota or the node's capacity does not allow it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The node does not promise it.
    #[error(transparent)]
    Veto(#[from] Veto),
    /// The state of a resource does not allow it.
    #[error("{resource} {why}")]
    Precondition {
        /// As the API names it.
        resource: String,
        /// What is, and what to do.
        why: String,
    },
    /// Another operation on the resource is going on.
    #[error("{resource}: {operation} is in progress; try again when it is done")]
    Busy {
        /// As the API names it.
        resource: String,
        /// What is going on.
        operation: &'static str,
    },
    /// The resource changed meanwhile.
    #[error("{resource} is at generation {found}, not {expected}: read it again, then decide again")]
    Generation {
        /// As the API names it.
        resource: String,
        /// What the caller expected.
        expected: u64,
        /// What is.
        found: u64,
    },
    /// Events from that number on are not kept.
    #[error("events from {from} on are not there, {kept}: read the resources anew, then watch from 0")]
    Gone {
        /// The number that was wanted.
        from: u64,
        /// What is there.
        kept: String,
    },
    /// A client took nothing of what was sent to it.
    #[error("nothing was read for too long: watch again{how}")]
    Behind {
        /// " from 5 on", where there are numbers.
        how: String,
    },
    /// It took too long.
    #[error("{resource} {what}")]
    Deadline {
        /// As the API names it.
        resource: String,
        /// What did not happen, and what to do.
        what: String,
    },
    /// The caller may not.
    #[error("{0}")]
    Forbidden(String),
    /// The host has no room.
    #[error("{doing}: {why}")]
    Full {
        /// What was tried.
        doing: &'static str,
        /// Where, and what to do.
        why: String,
    },
    /// The store failed.
    #[error("the node's state cannot be kept")]
    Store(#[source] Arc<StoreError>),
    /// Something on the host failed.
    #[error("{doing} failed: {why}")]
    Failed {
        /// What was tried.
        doing: &'static str,
        /// The chain of reasons.
        why: String,
    },
    /// The daemon is ending.
    #[error("seriod is ending: try again in a moment")]
    Ending,
}

fn show_fields(fields: &[FieldError]) -> String {
    fields.iter().map(|f| format!("{}: {}", f.field, f.problem)).collect::<Vec<_>>().join("; ")
}

/// The texts of an error and its sources, joined by `: `.
#[must_use]
pub fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        source = inner.source();
    }
    text
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        Self::Store(Arc::new(error))
    }
}

/// Whether one of the sources is "no space left".
fn is_full(error: &(dyn StdError + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error
            .downcast_ref::<std::io::Error>()
            .is_some_and(|io| io.kind() == std::io::ErrorKind::StorageFull)
        {
            return true;
        }
        next = error.source();
    }
    false
}

impl Error {
    /// A client took nothing of what is numbered, and this was next.
    #[must_use]
    pub fn behind(next: u64) -> Self {
        Self::Behind { how: format!(" from {next} on") }
    }

    /// One wrong field.
    pub fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid(vec![FieldError::new(field, problem)])
    }

    /// Nothing of that name.
    pub fn not_found(resource: impl Into<String>) -> Self {
        Self::NotFound { resource: resource.into(), hint: "" }
    }

    /// The state does not allow it.
    pub fn precondition(resource: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Precondition { resource: resource.into(), why: why.into() }
    }

    fn from_peer(doing: &'static str, failed: Option<&Failed>, error: &(dyn StdError + 'static)) -> Self {
        let why = chain(error);
        match failed.map(Failed::code) {
            Some(PeerCode::Invalid) => {
                let (field, message) =
                    failed.map_or(("", why.as_str()), |f| (f.field.as_str(), f.message.as_str()));
                Self::invalid(if field.is_empty() { "spec" } else { field }, message)
            }
            Some(PeerCode::Exhausted) => Self::Full { doing, why },
            Some(PeerCode::InUse | PeerCode::Precondition) => Self::precondition(
                doing,
                format!("was refused: {}", failed.map_or(why, |f| f.message.clone())),
            ),
            _ if is_full(error) => {
                Self::Full { doing, why: format!("{why}; free some space on the disk of state_dir") }
            }
            _ => Self::Failed { doing, why },
        }
    }

    /// A VM did not start.
    #[must_use]
    pub fn from_launch(error: &LaunchError) -> Self {
        match error {
            LaunchError::Key(_) => Self::precondition("starting the VM", format!("failed: {}", chain(error))),
            _ => Self::from_peer("starting the VM", error.refusal(), error),
        }
    }

    /// A key is not to be had, or not to be changed.
    #[must_use]
    pub fn from_keys(vdc: &str, error: &crate::keys::KeysError) -> Self {
        Self::precondition(vdc, format!("was refused: {}", chain(error)))
    }

    /// Work on a volume or image was not done.
    #[must_use]
    pub fn from_job(doing: &'static str, error: &JobError) -> Self {
        match error {
            JobError::BrokenOff { .. } | JobError::Order { .. } => Self::invalid("chunk", chain(error)),
            JobError::Late { .. } => {
                Self::Deadline { resource: doing.to_owned(), what: format!("failed: {error}") }
            }
            JobError::Key(_) => Self::precondition(doing, format!("failed: {}", chain(error))),
            JobError::NotApp { .. } | JobError::VmEnded { .. } | JobError::TooManyLayers { .. } => {
                Self::precondition(doing, format!("failed: {error}"))
            }
            _ => Self::from_peer(doing, error.refusal(), error),
        }
    }

    /// Whether the host or the daemon is to blame, not the request: these are logged as errors.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        matches!(self, Self::Store(_) | Self::Failed { .. } | Self::Full { .. })
    }

    fn code(&self) -> Code {
        match self {
            Self::Invalid(_) => Code::InvalidArgument,
            Self::NotFound { .. } => Code::NotFound,
            Self::Exists { .. } => Code::AlreadyExists,
            Self::Refused(_) | Self::Full { .. } | Self::Veto(Veto::Full(_) | Veto::TooMany { .. }) => {
                Code::ResourceExhausted
            }
            Self::Veto(Veto::Invalid { .. }) => Code::InvalidArgument,
            Self::Veto(Veto::UnknownToken { .. } | Veto::Expired { .. }) => Code::NotFound,
            Self::Veto(Veto::Stale { .. }) => Code::Aborted,
            Self::Veto(Veto::Drained { .. } | Veto::Fenced { .. } | Veto::Taken { .. }) => {
                Code::FailedPrecondition
            }
            Self::Precondition { .. } => Code::FailedPrecondition,
            Self::Busy { .. } | Self::Generation { .. } | Self::Behind { .. } => Code::Aborted,
            Self::Gone { .. } => Code::OutOfRange,
            Self::Deadline { .. } => Code::DeadlineExceeded,
            Self::Forbidden(_) => Code::PermissionDenied,
            Self::Store(error) if error.is_full() => Code::ResourceExhausted,
            Self::Store(_) | Self::Failed { .. } => Code::Internal,
            Self::Ending => Code::Unavailable,
        }
    }

    /// For programs: a word that stays.
    /// The name of its gRPC code, as the standard writes it: `NOT_FOUND`.
    #[must_use]
    pub fn word(&self) -> String {
        let camel = format!("{:?}", self.code());
        let mut word = String::new();
        for (at, letter) in camel.chars().enumerate() {
            if letter.is_ascii_uppercase() && at > 0 {
                word.push('_');
            }
            word.push(letter.to_ascii_uppercase());
        }
        word
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "INVALID",
            Self::NotFound { .. } => "NOT_FOUND",
            Self::Exists { .. } => "EXISTS",
            Self::Refused(_) | Self::Veto(Veto::Full(_) | Veto::TooMany { .. }) => "DOES_NOT_FIT",
            Self::Veto(veto) => veto_reason(veto),
            Self::Precondition { .. } => "STATE",
            Self::Busy { .. } => "OPERATION_IN_PROGRESS",
            Self::Gone { .. } => "EVENTS_GONE",
            Self::Behind { .. } => "NOT_READ",
            Self::Generation { .. } => "GENERATION",
            Self::Deadline { .. } => "TOOK_TOO_LONG",
            Self::Forbidden(_) => "FORBIDDEN",
            Self::Full { .. } => "HOST_FULL",
            Self::Store(error) if error.is_full() => "HOST_FULL",
            Self::Store(_) => "STORE",
            Self::Failed { .. } => "HOST",
            Self::Ending => "ENDING",
        }
    }

    /// The gRPC status: code, text, and `google.rpc` details.
    #[must_use]
    pub fn status(&self) -> Status {
        let mut details = ErrorDetails::new();
        details.set_error_info(self.reason(), DOMAIN, std::collections::HashMap::new());
        match self {
            Self::Invalid(fields) => {
                for field in fields {
                    details.add_bad_request_violation(&field.field, &field.problem);
                }
            }
            Self::Refused(refusal) => {
                details.add_quota_failure_violation(refusal.resource.name(), refusal.to_string());
            }
            Self::Precondition { resource, why } => {
                details.add_precondition_failure_violation(self.reason(), resource, why);
            }
            Self::NotFound { resource, .. } | Self::Exists { resource } => {
                details.set_resource_info("", resource, "", self.to_string());
            }
            _ => {}
        }
        Status::with_error_details(self.code(), chain(self), details)
    }
}

fn veto_reason(veto: &Veto) -> &'static str {
    match veto {
        Veto::Full(_) | Veto::TooMany { .. } => "DOES_NOT_FIT",
        Veto::Stale { .. } => "STALE",
        Veto::Drained { .. } => "DRAINED",
        Veto::Fenced { .. } => "FENCED",
        Veto::UnknownToken { .. } => "UNKNOWN_RESERVATION",
        Veto::Expired { .. } => "RESERVATION_EXPIRED",
        Veto::Invalid { .. } => "INVALID",
        Veto::Taken { .. } => "RESERVATION_TAKEN",
    }
}

impl From<Error> for Status {
    /// Also logs it: a fault of the host as an error, one of the request for whoever debugs.
    fn from(error: Error) -> Self {
        if error.is_ours() {
            tracing::error!(reason = error.reason(), "{}", chain(&error));
        } else {
            tracing::debug!(reason = error.reason(), "{}", chain(&error));
        }
        error.status()
    }
}
