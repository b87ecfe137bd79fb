//! What a failure says, and what the command exits with.
//!
//! Owns: the one mapping from gRPC status to exit code, and the one rendering of google.rpc details: what happened, which
//! field, why, and what to do.

use std::{error::Error, fmt::Write as _};

use tonic::{Code, Status};
use tonic_types::StatusExt;

/// Any source of an error.
pub type Source = Box<dyn Error + Send + Sync>;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// What was typed cannot be meant.
    #[error("{0}")]
    Usage(String),
    /// Nobody answers at the host.
    #[error("cannot reach {host}")]
    Unreachable {
        /// As the user names it.
        host: String,
        /// What went wrong.
        #[source]
        source: Source,
        /// What to check.
        hint: String,
    },
    /// The host answered with an error.
    #[error("cannot {doing}")]
    Api {
        /// "create vdc ardesio".
        doing: String,
        /// The answer.
        status: Box<Status>,
    },
    /// Something on this side.
    #[error("{what}")]
    Local {
        /// "cannot read tiny.raw".
        what: String,
        /// Why, when something else said so.
        #[source]
        source: Option<Source>,
    },
    /// Already said; only the exit code is left.
    #[error("")]
    Silent(u8),
}

impl Failure {
    /// A failure on this side with its cause.
    pub fn local(what: impl Into<String>, source: impl Into<Source>) -> Self {
        Self::Local { what: what.into(), source: Some(source.into()) }
    }

    /// A failure on this side that says all by itself.
    pub fn plain(what: impl Into<String>) -> Self {
        Self::Local { what: what.into(), source: None }
    }

    /// The exit code of the process.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Unreachable { .. } => 5,
            Self::Local { .. } => 1,
            Self::Silent(code) => *code,
            Self::Api { status, .. } => match status.code() {
                Code::InvalidArgument | Code::OutOfRange => 2,
                Code::NotFound => 3,
                Code::FailedPrecondition
                | Code::ResourceExhausted
                | Code::PermissionDenied
                | Code::Unauthenticated
                | Code::Aborted
                | Code::AlreadyExists => 4,
                Code::Unavailable => 5,
                _ => 1,
            },
        }
    }

    /// What stderr gets: the chain of causes on the first line, then one line a detail.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = match self {
            Self::Silent(_) => return String::new(),
            Self::Api { status, .. } => format!("error: {self}: {}", message_of(status)),
            _ => format!("error: {self}{}", chain(self.source())),
        };
        match self {
            Self::Api { status, .. } => {
                for line in details(status) {
                    let _ = write!(text, "\n  {line}");
                }
            }
            Self::Unreachable { hint, .. } => {
                let _ = write!(text, "\n  to do: {hint}");
            }
            _ => {}
        }
        text
    }
}

/// The message of a status; its code where a server sent none.
fn message_of(status: &Status) -> String {
    if status.message().is_empty() {
        return status.code().description().to_owned();
    }
    status.message().to_owned()
}

/// ": why: why of that", without saying anything twice.
pub fn chain(mut source: Option<&(dyn Error + 'static)>) -> String {
    let mut text = String::new();
    while let Some(error) = source {
        let message = error.to_string();
        if !message.is_empty() && !text.contains(&message) {
            let _ = write!(text, ": {message}");
        }
        source = error.source();
    }
    text
}

/// One line for each google.rpc detail (error_details.proto), the remedies last.
fn details(status: &Status) -> Vec<String> {
    let found = status.get_error_details();
    let mut lines = Vec::new();
    for violation in found.bad_request().map(|d| d.field_violations.as_slice()).unwrap_or_default() {
        lines.push(format!("field {}: {}", violation.field, violation.description));
    }
    for violation in found.quota_failure().map(|d| d.violations.as_slice()).unwrap_or_default() {
        lines.push(format!("quota of {}: {}", violation.subject, violation.description));
    }
    for violation in found.precondition_failure().map(|d| d.violations.as_slice()).unwrap_or_default() {
        lines.push(format!("{}: {}", violation.subject, violation.description));
    }
    if let Some(resource) = found.resource_info()
        && !resource.description.is_empty()
    {
        lines.push(format!("{}: {}", resource.resource_name, resource.description));
    }
    // A line that repeats the message helps nobody.
    lines.retain(|line| {
        !status.message().contains(line.split_once(": ").map_or(line.as_str(), |(_, why)| why))
    });
    let mut remedies: Vec<String> = Vec::new();
    for link in found.help().map(|d| d.links.as_slice()).unwrap_or_default() {
        remedies.push([link.description.as_str(), link.url.as_str()].join(" ").trim().to_owned());
    }
    if let Some(remedy) = found.error_info().and_then(|info| info.metadata.get("remedy")) {
        remedies.push(remedy.clone());
    }
    if let Some(message) = found.localized_message() {
        remedies.push(message.message.clone());
    }
    if remedies.is_empty() {
        remedies.extend(own_remedy(status.code()).map(str::to_owned));
    }
    remedies.dedup();
    lines.extend(remedies.into_iter().filter(|r| !r.is_empty()).map(|remedy| format!("to do: {remedy}")));
    lines
}

/// What helps where the server cannot know: that it is the wrong one, or that it is gone.
fn own_remedy(code: Code) -> Option<&'static str> {
    match code {
        Code::Unimplemented => Some(
            "the program at --host does not know this call: `node list`, `node show NAME` and `node delete` want a \
             scheduler, everything else an agent",
        ),
        Code::Unavailable => {
            Some("see whether the agent runs: `serio doctor`, or `journalctl -u seriod` on that host")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    fn api(status: Status) -> Failure {
        Failure::Api { doing: "create vm ardesio/web".to_owned(), status: Box::new(status) }
    }

    #[test]
    fn every_code_has_its_exit() {
        for (code, exit) in [
            (Code::InvalidArgument, 2),
            (Code::NotFound, 3),
            (Code::FailedPrecondition, 4),
            (Code::ResourceExhausted, 4),
            (Code::PermissionDenied, 4),
            (Code::Aborted, 4),
            (Code::AlreadyExists, 4),
            (Code::Unavailable, 5),
            (Code::Internal, 1),
            (Code::DeadlineExceeded, 1),
            (Code::Unimplemented, 1),
        ] {
            assert_eq!(api(Status::new(code, "x")).exit_code(), exit, "{code:?}");
        }
        assert_eq!(Failure::Usage("x".into()).exit_code(), 2);
        assert_eq!(Failure::plain("x").exit_code(), 1);
    }

    #[test]
    fn field_reason_and_remedy_are_said() {
        let mut details = ErrorDetails::new();
        details.add_bad_request_violation("spec.vcpus", "0 is not in 1 to 64");
        details.set_error_info(
            "BAD_VCPUS",
            "serio",
            HashMap::from([("remedy".to_owned(), "give 1 to 64".to_owned())]),
        );
        let status = Status::with_error_details(Code::InvalidArgument, "the VM's spec is wrong", details);
        assert_eq!(
            api(status).render(),
            "error: cannot create vm ardesio/web: the VM's spec is wrong\n  field spec.vcpus: 0 is not in 1 to 64\n  to do: give 1 to 64"
        );
    }

    #[test]
    fn causes_are_said_once() {
        let failure = Failure::Unreachable {
            host: "unix:/run/serio/seriod.sock".to_owned(),
            source: std::io::Error::from_raw_os_error(2).into(),
            hint: "start it".to_owned(),
        };
        let text = failure.render();
        assert!(text.starts_with("error: cannot reach unix:/run/serio/seriod.sock: No such file"), "{text}");
        assert!(text.ends_with("to do: start it"), "{text}");
    }
}
