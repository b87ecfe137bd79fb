//! The binary `serio-volumed`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match serio_volumed::cli::Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("serio-volumed: {error:#}");
            ExitCode::FAILURE
        }
    }
}
