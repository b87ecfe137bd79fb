//! The binary `seriod`: arguments, logging, and the daemon.
#![forbid(unsafe_code)]

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, ValueEnum};
use serio_node::{config::Config, copies, daemon};
use tracing_subscriber::EnvFilter;

/// The node's daemon of Serio: serves gRPC, holds the node's state, and supervises the processes of VMs.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    /// The configuration file
    #[arg(long, default_value = "/etc/serio/seriod.toml", env = "SERIOD_CONFIG")]
    config: PathBuf,
    /// How log lines look, on the standard error
    #[arg(long, value_enum, default_value = "text")]
    log_format: LogFormat,
    /// What is logged: error, warn, info, debug, or as the tracing crate filters
    #[arg(long, default_value = "info", env = "SERIOD_LOG")]
    log: String,
    /// Check the configuration, and end
    #[arg(long)]
    check: bool,
    /// Put the newest good copy of the state's database in its place, keep the damaged one beside it, and end
    #[arg(long, conflicts_with = "check")]
    restore_state: bool,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    /// For people.
    Text,
    /// For collectors.
    Json,
}

fn log_to_stderr(arguments: &Arguments) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&arguments.log)?;
    let logger = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match arguments.log_format {
        LogFormat::Text => logger.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init(),
        LogFormat::Json => logger.json().init(),
    }
    Ok(())
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    log_to_stderr(arguments)?;
    let config = Config::load(&arguments.config)?;
    if arguments.check {
        return Ok(());
    }
    if arguments.restore_state {
        println!("{}", copies::restore_state(&config)?);
        return Ok(());
    }
    daemon::run(config)
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("seriod: {error:#}");
            ExitCode::FAILURE
        }
    }
}
