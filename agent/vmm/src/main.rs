//! The binary `serio-vmm`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use serio_vmm::cli::{Cli, Command};

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run(args) => serio_vmm::run::main(args),
        Command::Agent(args) => serio_vmm::agent::main(&args),
    }
}
