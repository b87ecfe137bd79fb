//! The arguments of `operation`, and what all verbs take that begin one.

use clap::{Args, Subcommand};
use serio_types::VdcName;

use super::parse::in_vdc;

/// What verbs take that begin long work.
#[derive(Debug, Clone, Copy, Args)]
pub struct WaitArgs {
    /// Print the operation and return at once; `serio operation watch` follows it
    #[arg(long = "async", id = "async")]
    pub no_wait: bool,
}

/// The verbs of `operation`.
#[derive(Debug, Subcommand)]
pub enum OperationVerb {
    /// List the operations, newest first; those that ended are kept for a week
    #[command(after_help = "Examples:
  serio operation list
  serio operation list --running
  serio operation list --volume ardesio/web-root -o json")]
    List {
        /// Only those that go on
        #[arg(long)]
        running: bool,
        /// Only those about that volume or its snapshots
        #[arg(long, value_name = "VDC/NAME", value_parser = in_vdc)]
        volume: Option<VdcName>,
    },
    /// Show one
    #[command(after_help = "Examples:\n  serio operation show 01976a3e-5c1b-7000-8000-0123456789ab -o json")]
    Show {
        /// Its id or name (operations/ID)
        id: String,
    },
    /// Follow one until it ends
    #[command(
        after_help = "Exits 1 when the operation failed or was cancelled. ctrl-C ends the watching only.

Examples:
  serio operation watch 01976a3e-5c1b-7000-8000-0123456789ab"
    )]
    Watch {
        /// Its id or name (operations/ID)
        id: String,
    },
    /// Ask one to end; what it has done so far is kept if it is begun again
    #[command(after_help = "Examples:\n  serio operation cancel 01976a3e-5c1b-7000-8000-0123456789ab")]
    Cancel {
        /// Its id or name (operations/ID)
        id: String,
    },
}
