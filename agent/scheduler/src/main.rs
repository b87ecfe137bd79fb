//! The binary `serio-scheduler`: arguments, log, signals; the rest is the library.
#![forbid(unsafe_code)]

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Context;
use clap::{Parser, Subcommand};
use serio_scheduler::{
    config::{Config, File, Security},
    owner, server, simulate,
    store::sqlite::Sqlite,
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

/// What open connections get at the end.
const GRACE: Duration = Duration::from_secs(3);

/// Keeps what the nodes of a region report, and plans where VMs go.
#[derive(Debug, Parser)]
#[command(name = "serio-scheduler", version, max_term_width = 120)]
#[command(after_help = "Examples:
  serio-scheduler --config /etc/serio/scheduler.toml
  serio-scheduler --tls-dir ./pki/scheduler --state-dir ./state
  serio-scheduler --insecure --listen 127.0.0.1:7450 --state-dir ./state

The configuration has the keys listen, tls_dir, state_dir and insecure; flags go before it.")]
struct Args {
    /// The configuration
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where agents and clients connect [default: [::]:7450]
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// The folder of ca-cert.pem, server-cert.pem and server-key.pem
    #[arg(long, value_name = "DIR")]
    tls_dir: Option<PathBuf>,
    /// The folder of the database [default: /var/lib/serio-scheduler]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// No certificates; on loopback only
    #[arg(long)]
    insecure: bool,
    #[command(subcommand)]
    command: Option<Verb>,
}

/// Something else than to serve.
#[derive(Debug, Subcommand)]
enum Verb {
    /// Try a fleet of simulated agents against a scheduler
    Simulate(simulate::Options),
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    if let Some(Verb::Simulate(options)) = args.command {
        return runtime.block_on(simulate::run(options));
    }
    let file = args.config.as_deref().map(File::read).transpose()?.unwrap_or_default();
    let flags = File {
        listen: args.listen,
        tls_dir: args.tls_dir,
        state_dir: args.state_dir,
        insecure: args.insecure.then_some(true),
    };
    let config = Config::try_from(file.overridden_by(flags))?;
    runtime.block_on(run(config))
}

async fn run(config: Config) -> anyhow::Result<()> {
    let store = Sqlite::open(&config.state_dir).context("cannot open the state")?;
    let owner = owner::start(store).context("cannot read the state")?;
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {}", config.listen))?;
    let address = listener.local_addr().context("cannot ask for the address")?;
    match &config.security {
        Security::Tls(_) => tracing::info!(%address, "listening"),
        Security::Insecure => tracing::warn!(%address, "listening without certificates"),
    }
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (ending, begun) = oneshot::channel();
    let ended = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("ending");
        let _ = ending.send(());
    };
    let impatience = async move {
        if begun.await.is_ok() {
            tokio::time::sleep(GRACE).await;
        }
    };
    tokio::select! {
        served = server::serve(listener, &config.security, owner, ended) => Ok(served?),
        // A client that does not hang up keeps nobody from ending: everything is on disk.
        () = impatience => Ok(()),
    }
}
