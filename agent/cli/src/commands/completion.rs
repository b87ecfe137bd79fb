//! `completion`: the script that a shell sources.

use std::str::FromStr;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::{args::Cli, error::Failure, output};

pub(super) fn run(shell: &str) -> Result<(), Failure> {
    let shell = Shell::from_str(shell).map_err(Failure::Usage)?;
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "serio", &mut script);
    output::bytes(&script)
}
