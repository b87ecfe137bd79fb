//! The arguments of `events` and `audit`: what happened, and who asked for it.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Seconds;

/// `events`.
#[derive(Debug, Args)]
#[command(after_help = "With --follow, -o json prints one object a line.

Examples:
  serio events
  serio events --follow
  serio events --from 120 -o json")]
pub struct EventsArgs {
    /// Go on with what happens; ctrl-C ends
    #[arg(short, long)]
    pub follow: bool,
    /// The first number wanted; all that are kept if left out
    #[arg(long, value_name = "NUMBER", default_value_t = 0, hide_default_value = true)]
    pub from: u64,
}

/// `audit`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
#[command(
    after_help = "Each change is a line when it is asked and another, naming the first, when it has ended.

Examples:
  serio audit
  serio audit --on vdcs/ardesio --what DeleteVm
  serio audit --last 1h --failed
  serio audit --follow -o json
  serio audit verify"
)]
pub struct AuditArgs {
    /// Checks instead of showing.
    #[command(subcommand)]
    pub verb: Option<AuditVerb>,
    /// Go on with what is asked; ctrl-C ends
    #[arg(short, long)]
    pub follow: bool,
    /// The first number wanted; all that are kept if left out
    #[arg(long, value_name = "NUMBER", default_value_t = 0, hide_default_value = true)]
    pub from: u64,
    /// Only what this one asked for; a part of the name is enough
    #[arg(long, value_name = "NAME")]
    pub who: Option<String>,
    /// Only this call, as the API names it
    #[arg(long, value_name = "CALL")]
    pub what: Option<String>,
    /// Only of resources whose full name begins so
    #[arg(long, value_name = "RESOURCE")]
    pub on: Option<String>,
    /// Only of the last 30s, 5m or 1h
    #[arg(long, value_name = "TIME")]
    pub last: Option<Seconds>,
    /// Only what was refused or failed
    #[arg(long)]
    pub failed: bool,
}

/// The verbs of `audit`.
#[derive(Debug, Subcommand)]
pub enum AuditVerb {
    /// Check that no line of the audit log was changed, moved or taken out
    Verify(VerifyArgs),
}

/// `audit verify`.
#[derive(Debug, Args)]
#[command(
    after_help = "Without files the node checks its own log. With files, or the folder that has them, they are checked
here, and no node is asked: copies from a backup too. Lines that are missing at the end show only by a receipt: a number and
a hash that an earlier `audit verify`, `vdc erase` or `vdc rotate-key` has printed. Exits 1 when the log is not as it was written.

Examples:
  serio audit verify
  serio audit verify /var/lib/serio
  serio audit verify audit-00000000000000000001.log audit.log --receipt 17:5f3c…"
)]
pub struct VerifyArgs {
    /// Files, oldest first, or one folder
    #[arg(value_name = "FILE")]
    pub paths: Vec<PathBuf>,
    /// A line that must be there with that hash
    #[arg(long, value_name = "NUMBER:HASH", requires = "paths")]
    pub receipt: Vec<String>,
}
