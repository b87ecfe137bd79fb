//! The command line `serio <noun> <verb>`: what a person types becomes gRPC calls, the answers become tables or JSON.
//!
//! Owns: the arguments as typed ([`args`]), the connection ([`client`]), one file per noun ([`commands`]), the one
//! table printer ([`output`]), and what a failure says and exits with ([`error`]). `doctor` and `pki` work without a node.
//! Never: node state, any other way to the node than gRPC, but for NBD (`nbd.rs`) to the exports that it asked for.
//!
//! Threads: one tokio runtime on the calling thread; reading an image file has a blocking thread of its own.
#![forbid(unsafe_code)]

pub mod args;
pub mod client;
pub mod commands;
pub mod error;
pub mod names;
mod nbd;
pub mod output;
pub mod terminal;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};

use crate::{args::Cli, error::Failure};

/// Parses the process's arguments, does what they say, prints, and returns the exit code: 0 done, 1 failed, 2 usage,
/// 3 not found, 4 refused, 5 unreachable.
#[must_use]
pub fn run() -> ExitCode {
    // Ends the process with help (0) or a usage error (2) by itself.
    let matches = Cli::command().get_matches();
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            return report(&Failure::local("cannot start the event loop", error));
        }
    };
    let result = runtime.block_on(commands::run(cli, &matches));
    // A blocked read of the terminal must not keep the process.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(&failure),
    }
}

/// Prints a failure to stderr; its exit code.
fn report(failure: &Failure) -> ExitCode {
    let text = failure.render();
    if !text.is_empty() {
        eprintln!("{text}");
    }
    ExitCode::from(failure.exit_code())
}
