//! Putting the parts together: lock, store, recovery, owner, services; and taking them apart on SIGTERM.
//!
//! Order at start: the lock (no second seriod on this state), the store, what is on the host, the recovery; only when
//! that is done (or ten seconds passed: a hanging VMM must not keep the node unreachable) are the sockets opened.
//! At the end the processes of VMs are left as they are: the next seriod finds them.

use std::{
    fs::{self, File},
    io,
    os::unix::{fs::DirBuilderExt, net::UnixDatagram},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::Context as _;
use nix::{
    fcntl::{Flock, FlockArg},
    sys::resource::{Resource, getrlimit, setrlimit},
};
use serio_store::{Change, Store, StoreError, record::Encryption};
use serio_types::Quota;
use tokio::{net::TcpListener, sync::mpsc, sync::watch};
use uuid::Uuid;

use crate::{
    audit::{Caller, Trail},
    capacity::{Reporter, ReporterSettings},
    clock::{Clock, Reading},
    config::Config,
    copies::{self, CopySettings},
    error::chain,
    grpc::{self, Context, NodeInfo, certificates::Certificates, server},
    health::{Health, HealthSettings},
    keys::Keys,
    meter::{Meter, MeterSettings},
    metrics, nbd,
    scrub::{Checks, ScrubSettings},
    shares::Shares,
    state::{
        Executor, Handles, State,
        model::Model,
        owner::{self, Client, INPUTS_MAX, Watches},
        recover::Found,
    },
    supervise::{Supervisor, SupervisorSettings},
};

/// How long the sockets wait for the recovery.
const RECOVERY: Duration = Duration::from_secs(10);
/// How long the lock is waited for, and how often it is tried.
const LOCK_WAIT: Duration = Duration::from_secs(2);
const LOCK_AGAIN: Duration = Duration::from_millis(20);
/// How long open calls have at the end.
const GRACE: Duration = Duration::from_secs(1);

/// Why the state directory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Somebody has it.
    #[error("another seriod uses {dir}: stop it first, or give this one its own state_dir and run_dir")]
    Taken {
        /// The state directory.
        dir: PathBuf,
    },
    /// It cannot be made or opened.
    #[error("cannot use {path}: check that it is on a writable disk, and that seriod runs as root")]
    Access {
        /// The file or directory.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

/// Holds the state directory: the lock goes with the process, however it ends.
pub fn lock(dir: &Path) -> Result<Flock<File>, LockError> {
    let at = |path: &Path| {
        let path = path.to_owned();
        move |source| LockError::Access { path, source }
    };
    // Volumes are below it: nobody else's business.
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(at(dir))?;
    let path = dir.join("seriod.lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(at(&path))?;
    let deadline = Instant::now() + LOCK_WAIT;
    let mut file = file;
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            // A killed seriod's lock may live on for a moment, in a child that it was just about to start.
            Err((file, nix::errno::Errno::EWOULDBLOCK)) if Instant::now() < deadline => file,
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => return Err(LockError::Taken { dir: dir.to_owned() }),
            Err((_, errno)) => return Err(at(&path)(errno.into())),
        };
        std::thread::sleep(LOCK_AGAIN);
    }
}

/// What the node may promise in all.
fn capacity(config: &Config) -> anyhow::Result<Quota> {
    let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")).unwrap_or_default();
    let total_kib: u64 =
        total.trim().trim_end_matches(" kB").parse().context("/proc/meminfo has no MemTotal")?;
    let disk = nix::sys::statvfs::statvfs(&config.state_dir)
        .context("cannot ask for the size of state_dir's disk")?;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a saturating cast of a small positive number"
    )]
    let vcpus = (cpus as f64 * config.capacity.overcommit_vcpu) as u64;
    Ok(Quota {
        vcpus,
        memory_bytes: (total_kib << 10).saturating_sub(config.capacity.reserve_memory.bytes()),
        storage_bytes: disk.blocks().saturating_mul(disk.fragment_size()),
    })
}

fn open_store(path: &Path) -> Result<(Store, Model, Clock), StoreError> {
    let (mut store, mut contents) = Store::open(path)?;
    if contents.node.is_none() {
        let uid = Uuid::new_v4();
        store.commit(&[Change::Node(uid)])?;
        contents.node = Some(uid);
    }
    let (clock, kept) = Clock::go_on(contents.clock.as_ref(), &Reading::now());
    if let Err(error) = store.commit(&[Change::Clock(kept)]) {
        // A full disk keeps no node from starting; the next start goes on from an earlier one.
        tracing::warn!("the steady clock was not written: {}", chain(&error));
    }
    Ok((store, Model::new(contents), clock))
}

/// The parts that work without sockets.
struct Core {
    watches: Watches,
    client: Client,
    handles: Handles,
    supervisor: Supervisor,
    node_uid: Uuid,
    clock: Clock,
    keys: Keys,
    audit: Trail,
    /// Vdcs whose key is to be destroyed, if it is still there.
    erased: Vec<Uuid>,
}

fn start_core(config: &Config) -> anyhow::Result<Core> {
    let (store, model, clock) = open_store(&config.state_dir.join(copies::DATABASE))?;
    let node_uid = model.node;
    let keys = Keys::new(&config.state_dir, &config.keys.source, &config.keys.previous)
        .context("the section [keys] of the configuration cannot be used")?;
    let audit = Trail::open(&config.state_dir)?;
    let mut erased = keys.half_erased()?;
    let marked = model.vdcs.values().filter(|vdc| vdc.encryption == Encryption::Erased);
    erased.extend(marked.map(|vdc| vdc.uid));
    let supervisor = Supervisor::new(SupervisorSettings {
        state_dir: config.state_dir.clone(),
        run_dir: config.run_dir.clone(),
        vmm_path: config.vmm_path.clone(),
        first_uid: config.first_uid,
        volumed_path: config.volumed_path.clone(),
        merge_bytes_per_s: config.volumes.merge_pace.bytes(),
        direct_io: config.volumes.direct_io,
        vhost_net: config.network.vhost_net,
        cgroup_root: None,
    })?
    .with_keys(keys.clone());
    let found = Found { vms: supervisor.found()?, exports: supervisor.found_exports()? };
    for volume in supervisor.found_volumes()?.iter().filter(|uid| !model.volumes.contains_key(uid)) {
        // Rows come before files, so this is no half-made volume of ours: perhaps the database is an older copy.
        tracing::warn!(%volume, "its files are in state_dir, but the database does not know it: they are left alone");
    }
    let mut state = State::new(store, model, capacity(config)?);
    let effects = state.recover(clock.now(), &found);
    let (inputs, receiver) = mpsc::channel(INPUTS_MAX);
    let handles = Handles::default();
    let executor =
        Executor::new(supervisor.clone(), handles.clone(), config.state_dir.clone(), inputs.clone());
    let watches = owner::spawn(state, (clock, effects), receiver, move |effect| executor.begin(effect))?;
    let client = Client::new(inputs, &watches);
    Ok(Core { watches, client, handles, supervisor, node_uid, clock, keys, audit, erased })
}

/// Destroys the keys of vdcs whose erasure was interrupted.
async fn finish_erasures(core: &Core) -> anyhow::Result<()> {
    for vdc in &core.erased {
        let Some(destroyed) = core.keys.destroy(*vdc).await? else { continue };
        let detail = vec![
            ("uid", vdc.to_string()),
            ("key_id", destroyed.key_id),
            ("destroyed_blake3", destroyed.blake3),
        ];
        let caller = Caller::own("VdcErased");
        core.audit.note(&caller, &format!("vdc {vdc}"), detail).await?;
    }
    Ok(())
}

fn reporter(config: &Config, core: &Core, node_name: &str) -> Reporter {
    let optional = |dir: &PathBuf| (!dir.as_os_str().is_empty()).then(|| dir.clone());
    let settings = ReporterSettings {
        node_name: node_name.to_owned(),
        node_uid: core.node_uid.to_string(),
        site: config.site.clone(),
        failure_domain: config.failure_domain.clone(),
        state_dir: config.state_dir.clone(),
        scheduler_urls: config.scheduler.all(),
        tls_dir: optional(&config.scheduler.tls_dir).or_else(|| optional(&config.grpc.tls_dir)),
        usage_interval: Duration::from_millis(config.capacity.usage_interval_ms),
        lease_interval: Duration::from_millis(config.capacity.lease_interval_ms),
        reserve_memory: config.capacity.reserve_memory.bytes(),
        overcommit_vcpu: config.capacity.overcommit_vcpu,
        first_generation: u64::try_from(core.clock.now().steady.0 / 1000).unwrap_or_default(),
    };
    Reporter::new(settings, core.watches.snapshot.clone())
        .with_state(core.client.clone(), Some(core.audit.clone()))
}

/// Listens for NBD clients; what is written into URIs.
async fn start_nbd(config: &Config, handles: &Handles) -> anyhow::Result<Option<String>> {
    let Some(address) = config.nbd.listen.0 else { return Ok(None) };
    let tls = nbd::tls_config(&config.grpc.tls_dir)?;
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address} (nbd.listen)"))?;
    let bound = listener.local_addr().context("the NBD listener has no address")?;
    let handles = handles.clone();
    let lookup: nbd::Lookup = Arc::new(move |token: &str, fingerprint: &str| {
        let Some(export) = token.parse().ok().and_then(|id| handles.export(&id)) else {
            return nbd::Admission::Unknown;
        };
        match export.admit(fingerprint) {
            Ok(true) => nbd::Admission::Export(export.socket().to_owned()),
            Ok(false) => nbd::Admission::Taken,
            Err(error) => {
                tracing::warn!(%error, "whose an export is cannot be kept, so nobody gets it");
                nbd::Admission::Unknown
            }
        }
    });
    tokio::spawn(nbd::serve(listener, tls, lookup));
    let advertise = &config.nbd.advertise;
    Ok(Some(match advertise.as_str() {
        "" => bound.to_string(),
        host if host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) => host.to_owned(),
        host => format!("{host}:{}", bound.port()),
    }))
}

/// What looks at the node beside the state.
struct Watchers {
    health: Health,
    meter: Meter,
}

/// Starts the meter and the watch over the node's health, and has the usage report tell of them.
fn watch_node(config: &Config, core: &Core, reporter: &Reporter, node_name: &str) -> Watchers {
    let settings = MeterSettings {
        path: config.state_dir.join("meter.db"),
        interval: Duration::from_secs(config.meter.interval_s),
        energy: config.energy.clone(),
    };
    let meter = Meter::open(settings, core.supervisor.clone(), core.watches.holdings.clone());
    tokio::spawn(meter.clone().run());
    let mut certificates = Vec::new();
    if config.grpc.listen.0.is_some() || config.nbd.listen.0.is_some() {
        certificates.push(config.grpc.tls_dir.join("server-cert.pem"));
    }
    let health = Health::new(HealthSettings {
        root: PathBuf::from("/"),
        resource: format!("nodes/{node_name}"),
        state_dir: config.state_dir.clone(),
        floor_bytes: config.health.disk_floor.bytes(),
        certificates,
        interval: Duration::from_secs(config.health.interval_s),
    });
    tokio::spawn(health.clone().run(core.client.clone()));
    let (watched, metered) = (health.clone(), meter.clone());
    reporter.add_to_usage(move |usage| {
        let conditions = watched.conditions();
        let worst = conditions.iter().map(|condition| condition.finding.severity).max();
        usage.health = worst.map_or(0, |severity| grpc::usage::severity(severity).into());
        usage.conditions = u32::try_from(conditions.len()).unwrap_or(u32::MAX);
        let energy = metered.energy();
        usage.energy_joules = energy.method.map(|_| energy.total_uj as f64 / 1e6);
        usage.power_watts = energy.watts;
        usage.carbon_grams_per_kwh = energy.carbon_grams_per_kwh;
    });
    Watchers { health, meter }
}

/// Serves /metrics, if that is wanted.
async fn start_metrics(
    config: &Config,
    core: &Core,
    (reporter, watchers): (&Reporter, &Watchers),
    node: &str,
) -> anyhow::Result<()> {
    let Some(address) = config.metrics.listen.0 else { return Ok(()) };
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen on {address} (metrics.listen)"))?;
    tracing::info!("serving /metrics on {}", listener.local_addr()?);
    let sources = metrics::Sources {
        node: node.to_owned(),
        reporter: reporter.clone(),
        health: watchers.health.clone(),
        meter: watchers.meter.clone(),
        holdings: core.watches.holdings.clone(),
        handles: core.handles.clone(),
    };
    tokio::spawn(metrics::serve(listener, sources));
    Ok(())
}

/// Says to systemd, if it started us, that the sockets are open.
fn notify_ready() {
    if let (Some(path), Ok(socket)) = (std::env::var_os("NOTIFY_SOCKET"), UnixDatagram::unbound()) {
        // Abstract sockets (`@…`) are not used by systemd for services; others are plain paths.
        if let Err(error) = socket.send_to(b"READY=1", Path::new(&path)) {
            tracing::warn!("systemd could not be told that seriod is ready: {error}");
        }
    }
}

async fn signalled() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

/// As many open files as the system allows: each VM, each export and each client takes some.
fn allow_files() {
    let allowed = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = allowed {
        tracing::warn!("the limit of open files cannot be raised: {error}");
    }
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// What keeps the daemon from serving.
pub fn run(config: Config) -> anyhow::Result<()> {
    allow_files();
    // Few threads: an idle daemon stays small, and nothing here computes.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(16)
        .thread_stack_size(1 << 20)
        .enable_all()
        .build()?;
    let result = runtime.block_on(run_async(config));
    // Work on the host that is under way is left: the next start reconciles it.
    runtime.shutdown_background();
    result
}

async fn run_async(config: Config) -> anyhow::Result<()> {
    let start_time = SystemTime::now();
    let node_name = config.node_name()?;
    let _lock = lock(&config.state_dir)?;
    fs::create_dir_all(&config.run_dir)
        .with_context(|| format!("cannot make run_dir {}", config.run_dir.display()))?;
    // Before the VMs are touched: a configuration that cannot serve fails early.
    let tls = config.grpc.listen.0.map(|_| Certificates::load(&config.grpc.tls_dir)).transpose()?;
    let core = start_core(&config)?;
    finish_erasures(&core).await.context("the key of an erased vdc could not be destroyed")?;
    let reporter = reporter(&config, &core, node_name.as_str());
    tokio::spawn(reporter.clone().run());
    let watchers = watch_node(&config, &core, &reporter, node_name.as_str());
    start_metrics(&config, &core, (&reporter, &watchers), node_name.as_str()).await?;
    let copied = CopySettings {
        database: config.state_dir.join(copies::DATABASE),
        every: Duration::from_secs(config.copy_interval_s),
        resource: format!("nodes/{node_name}"),
    };
    tokio::spawn(copies::run(copied, core.client.clone()));
    let shares = Shares { supervisor: core.supervisor.clone(), state: core.client.clone() };
    tokio::spawn(shares.run(core.watches.holdings.clone()));
    let mut recovered = core.watches.recovered.clone();
    if tokio::time::timeout(RECOVERY, recovered.wait_for(|done| *done)).await.is_err() {
        tracing::warn!("some VMs of an earlier seriod do not answer yet; they are asked again");
    }
    let checks = Checks {
        state: core.client.clone(),
        handles: core.handles.clone(),
        supervisor: core.supervisor.clone(),
    };
    tokio::spawn(checks.scrub_now_and_then(ScrubSettings {
        every: config.volumes.scrub_interval.0,
        bytes_per_s: config.volumes.scrub_pace.bytes(),
    }));
    let nbd = start_nbd(&config, &core.handles).await?;
    let node = Arc::new(NodeInfo {
        name: node_name,
        uid: core.node_uid.to_string(),
        boot_id: fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned(),
        site: config.site.clone(),
        failure_domain: config.failure_domain.clone(),
        start_time,
        started: Instant::now(),
        state_dir: config.state_dir.clone(),
        direct_io: config.volumes.direct_io,
        vhost_net: config.network.vhost_net,
        nbd,
    });
    let Core { client, handles, supervisor, keys, audit, .. } = core;
    let trail = audit.clone();
    let Watchers { health, meter } = watchers;
    let moves = crate::grpc::Moves::default();
    let context =
        Context { state: client, handles, supervisor, reporter, node, keys, audit, health, meter, moves };
    let routes = grpc::routes(&context).await?;
    Box::pin(serve(&config, tls, routes, trail)).await
}

async fn serve(
    config: &Config,
    tls: Option<Certificates>,
    routes: tonic::service::Routes,
    trail: Trail,
) -> anyhow::Result<()> {
    let (stop, stopped) = watch::channel(false);
    let wait = |mut stopped: watch::Receiver<bool>| async move { drop(stopped.wait_for(|stop| *stop).await) };
    let socket = config.socket();
    let unix =
        server::serve_unix(server::bind_unix(&socket)?, routes.clone(), trail.clone(), wait(stopped.clone()));
    let tcp = match (config.grpc.listen.0, tls) {
        (Some(address), Some(tls)) => {
            let listener = TcpListener::bind(address)
                .await
                .with_context(|| format!("cannot listen on {address} (grpc.listen)"))?;
            tracing::info!("serving gRPC on {} with mutual TLS", listener.local_addr()?);
            Some(server::serve_tcp(listener, tls, routes, trail, wait(stopped)))
        }
        _ => None,
    };
    tracing::info!("serving gRPC on {}", socket.display());
    notify_ready();
    let serving = async {
        match tcp {
            Some(tcp) => tokio::try_join!(unix, tcp).map(drop),
            None => unix.await,
        }
    };
    tokio::pin!(serving);
    tokio::select! {
        ended = &mut serving => return Ok(ended?),
        () = signalled() => {}
    }
    tracing::info!("ending; the VMs run on");
    stop.send_replace(true);
    // Streams that follow something would never end by themselves.
    let _ = tokio::time::timeout(GRACE, serving).await;
    let _ = fs::remove_file(&socket);
    Ok(())
}
