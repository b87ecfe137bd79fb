//! The binary `serio-scheduler`: arguments, log, signals; the rest is the library.
#![forbid(unsafe_code)]

use std::{mem::ManuallyDrop, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Context;
use clap::{Parser, Subcommand};
use serio_scheduler::{
    config::{Config, File, Security, Store},
    owner, region, server, simulate,
    store::{etcd, sqlite::Sqlite},
};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::oneshot,
    task::JoinHandle,
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
  serio-scheduler --tls-dir ./pki/scheduler --advertise s1:7450 --store etcd://s1:2379,s2:2379,s3:2379

The configuration has the keys listen, tls_dir, state_dir, insecure, store, advertise, etcd_ca, etcd_cert, etcd_key, etcd_user
and etcd_password_file; flags go before it.")]
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
    /// Keep everything in etcd: of several schedulers with the same one leads [default: a database in --state-dir]
    #[arg(long, value_name = "etcd://HOST:PORT,…")]
    store: Option<String>,
    /// Where agents and clients reach this scheduler [default: as --listen]
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Option<String>,
    /// The authority of etcd's certificates (PEM): reach its members by TLS
    #[arg(long, value_name = "FILE")]
    etcd_ca: Option<PathBuf>,
    /// This scheduler's certificate for etcd (PEM)
    #[arg(long, value_name = "FILE")]
    etcd_cert: Option<PathBuf>,
    /// Its key (PEM)
    #[arg(long, value_name = "FILE")]
    etcd_key: Option<PathBuf>,
    /// The user of etcd, where its authentication is on
    #[arg(long, value_name = "NAME")]
    etcd_user: Option<String>,
    /// A file with that user's password
    #[arg(long, value_name = "FILE")]
    etcd_password_file: Option<PathBuf>,
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
        store: args.store,
        advertise: args.advertise,
        etcd_ca: args.etcd_ca,
        etcd_cert: args.etcd_cert,
        etcd_key: args.etcd_key,
        etcd_user: args.etcd_user,
        etcd_password_file: args.etcd_password_file,
    };
    let config = Config::try_from(file.overridden_by(flags))?;
    // It ends with the process, not before: the owner's thread may be writing to etcd through it.
    ManuallyDrop::new(runtime).block_on(run(config))
}

/// The owner, and what leads or follows until the sender is gone.
async fn start(
    config: &Config,
    advertised: String,
) -> anyhow::Result<(owner::Handle, Option<(JoinHandle<()>, oneshot::Sender<()>)>)> {
    let (members, access) = match &config.store {
        Store::Embedded => {
            let store = Sqlite::open(&config.state_dir).context("cannot open the state")?;
            return Ok((owner::start(store).context("cannot read the state")?, None));
        }
        Store::Etcd(members, access) => (members, access),
    };
    let client = etcd::Client::with(members, access).context("cannot use etcd")?;
    let id = client.region_id().await.context("cannot read the state")?;
    let owner = owner::start_following(id);
    let (end, ended) = oneshot::channel();
    let ended = async { drop(ended.await) };
    let region = tokio::spawn(region::run(client, owner.clone(), advertised, ended));
    Ok((owner, Some((region, end))))
}

async fn run(config: Config) -> anyhow::Result<()> {
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("cannot listen on {}", config.listen))?;
    let address = listener.local_addr().context("cannot ask for the address")?;
    let advertised = config.advertise.clone().unwrap_or_else(|| address.to_string());
    let (owner, region) = start(&config, advertised.clone()).await?;
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
    let served = tokio::select! {
        served = server::serve_as(listener, advertised, &config.security, owner, ended) => served,
        // A client that does not hang up keeps nobody from ending: everything is on disk.
        () = impatience => Ok(()),
    };
    if let Some((region, end)) = region {
        drop(end);
        // The next leader need not wait for the lease to run out.
        let _ = tokio::time::timeout(GRACE, region).await;
    }
    Ok(served?)
}
