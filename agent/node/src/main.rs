//! The binary `seriod`: arguments, logging, the runtime, and the daemon in it.
#![forbid(unsafe_code)]

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, ValueEnum};
use serio_node::{config::Config, daemon};
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
    // Few threads: an idle daemon stays small, and nothing here computes.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(16)
        .thread_stack_size(1 << 20)
        .enable_all()
        .build()?;
    let result = runtime.block_on(daemon::run(config));
    // Work on the host that is under way is left: the next start reconciles it.
    runtime.shutdown_background();
    result
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
