//! `serio-volumed` for people who want a volume or a disk file served, as qemu-img and qemu-nbd are used.

use std::{
    fs::File,
    io::{self, IsTerminal},
    os::{fd::RawFd, unix::net::UnixListener},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use nix::sys::signal::{SigSet, Signal};
use serio_nbd::{Limits, Server, Stop};
use serio_types::ByteSize;
use serio_volume::{Access, Inspection, Volume, VolumeDir};

use crate::{
    agent::{self, Log},
    change::{self, ChangesArgs, CloneArgs, DeleteArgs, FlattenArgs, ResizeArgs, RollbackArgs},
    check::{self, CheckArgs, ScrubArgs},
    export::VolumeExport,
    import::verbs,
    key::Dirs,
};

/// Volumes without a VM: make them, fill them, snapshot them, serve them over NBD.
#[derive(Debug, Parser)]
#[command(
    version,
    about,
    after_help = "Examples:
  serio-volumed create vol --size 10GiB
  serio-volumed import vol disk.raw
  serio-volumed import vol disk.qcow2 --format qcow2
  serio-volumed export vol copy.qcow2 --format qcow2
  serio-volumed snapshot vol monday
  serio-volumed serve vol --socket /tmp/vol.sock --snapshot monday
  nbdcopy nbd+unix:///?socket=/tmp/vol.sock monday.raw"
)]
pub struct Cli {
    /// Key of an encrypted volume: a file with 32 random bytes, or 64 hex digits. What is created with it is encrypted.
    #[arg(long, value_name = "FILE", global = true)]
    key: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make an empty volume in a directory.
    #[command(
        after_help = "Examples:\n  serio-volumed create vol --size 10GiB\n  (umask 077; head -c 32 /dev/urandom > vol.key)\n  serio-volumed create vol --size 10GiB --key vol.key"
    )]
    Create(CreateArgs),
    /// Make a volume from an image: a file, a block device, an NBD export, or - for standard input.
    #[command(after_help = "Examples:
  serio-volumed import vol disk.raw
  serio-volumed import vol disk.qcow2 --format qcow2 --backing base.qcow2
  serio-volumed import vol 'nbd://server/export'
  zcat disk.raw.gz | serio-volumed import vol - --size 20GiB

An image is validated as a whole before anything is written. An import of a file or an NBD export that is interrupted
goes on where it was when it is given again.")]
    Import(verbs::ImportArgs),
    /// Copy a volume, or a point of it, into an image: a file, a block device, an NBD export, or - for standard output.
    #[command(after_help = "Examples:
  serio-volumed export vol disk.qcow2 --format qcow2
  serio-volumed export vol@monday monday.raw
  serio-volumed export vol@monday - | zstd > monday.raw.zst
  serio-volumed export vol@monday 'nbd+unix:///?socket=/tmp/other.sock' --resume")]
    Export(verbs::ExportArgs),
    /// Seal the volume as it is now under a name; it goes on in a new layer.
    #[command(after_help = "Example:\n  serio-volumed snapshot vol monday")]
    Snapshot {
        /// The volume's directory.
        volume: PathBuf,
        /// Name of the snapshot.
        name: String,
    },
    /// Delete a snapshot: what only it has goes to the next newer point. Interrupted, give the command again.
    #[command(after_help = "Example:\n  serio-volumed delete-snapshot vol@monday --pace 100MiB")]
    DeleteSnapshot(DeleteArgs),
    /// Put a volume back to a snapshot. What was written since is lost.
    #[command(
        after_help = "Examples:\n  serio-volumed rollback vol@monday\n  serio-volumed rollback vol@monday --discard-later"
    )]
    Rollback(RollbackArgs),
    /// Make a volume that starts as a snapshot of another one, or as a raw image, and shares its data: immediate, no copy.
    #[command(
        after_help = "Examples:\n  serio-volumed clone vol@monday vol2\n  serio-volumed clone debian.raw vol3 --size 20GiB"
    )]
    Clone(CloneArgs),
    /// Copy what a clone shares with its source into files of its own.
    #[command(after_help = "Example:\n  serio-volumed flatten vol2 --pace 100MiB")]
    Flatten(FlattenArgs),
    /// Make a volume larger.
    #[command(after_help = "Example:\n  serio-volumed resize vol 20GiB")]
    Resize(ResizeArgs),
    /// List what has changed between a snapshot and a later one, or the volume as it is.
    #[command(
        after_help = "Examples:\n  serio-volumed changes vol --from monday --to tuesday\n  serio-volumed changes vol --from monday --json"
    )]
    Changes(ChangesArgs),
    /// Show what a volume is. It may be in use.
    #[command(after_help = "Example:\n  serio-volumed info vol --json")]
    Info {
        /// The volume's directory.
        volume: PathBuf,
        /// For programs.
        #[arg(long)]
        json: bool,
    },
    /// Verify headers, chain, sizes and maps; with --data also the bytes of sealed layers against their checksums.
    /// Exit code 0: clean, 1: problems. It may be in use.
    #[command(
        after_help = "Examples:\n  serio-volumed check vol\n  serio-volumed check vol --data --pace 50MiB"
    )]
    Check(CheckArgs),
    /// Read all sealed data, compare them with their checksums, and compute those that are missing: check --data --add-sums.
    /// It may be in use.
    #[command(after_help = "Example:\n  serio-volumed scrub vol --pace 50MiB")]
    Scrub(ScrubArgs),
    /// Serve a volume, a point of it, or a raw file over NBD until SIGINT or SIGTERM.
    #[command(after_help = "Examples:
  serio-volumed serve vol --socket /tmp/vol.sock
  serio-volumed serve disk.raw --socket /tmp/disk.sock --read-only
  serio-volumed serve vol --socket /tmp/vol.sock --snapshot monday --export-name monday
  nbdinfo nbd+unix:///monday?socket=/tmp/vol.sock
  serio-volumed serve vol --socket /tmp/vol.sock --snapshot monday --release
  serio-volumed serve vol --socket /tmp/vol.sock --key vol.key
  nbdinfo --map=qemu:dirty-bitmap:monday nbd+unix:///?socket=/tmp/vol.sock   # what has changed since monday")]
    Serve(ServeArgs),
    /// One job for seriod (not for people).
    #[command(hide = true)]
    Agent {
        /// Descriptor of the listening control socket.
        #[arg(long)]
        control_fd: RawFd,
        /// It becomes the user and group of this number plus its process number; 0: it does not.
        #[arg(long, default_value_t = 0)]
        first_uid: u32,
    },
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// The volume's directory; made if it is not there.
    volume: PathBuf,
    /// Size, such as 10GiB.
    #[arg(long)]
    size: ByteSize,
}

#[derive(Debug, Args)]
struct ServeArgs {
    /// A volume's directory, or a raw disk file or device.
    source: PathBuf,
    /// Unix socket to listen on; it must not exist yet.
    #[arg(long)]
    socket: PathBuf,
    /// Refuse writes.
    #[arg(long)]
    read_only: bool,
    /// Serve the volume as it was at this snapshot (read-only).
    #[arg(long)]
    snapshot: Option<String>,
    /// Let TRIM give back what only this snapshot holds: it reads as zeros there, and its space is freed.
    #[arg(long, requires = "snapshot")]
    release: bool,
    /// Name of the export.
    #[arg(long, default_value = "")]
    export_name: String,
    /// End when a client has said goodbye and no other is left.
    #[arg(long)]
    once: bool,
    /// Clients at once; when all places are taken, the longest idle client makes room.
    #[arg(long, default_value_t = Limits::default().clients_max)]
    max_clients: usize,
}

impl Cli {
    /// Does what was asked.
    pub fn run(self) -> anyhow::Result<()> {
        let dirs = Dirs::with_key(self.key.as_deref())?;
        match self.command {
            Command::Create(args) => Ok(dirs.at(args.volume).create(args.size.bytes())?),
            Command::Import(args) => verbs::import(&args, &dirs),
            Command::Export(args) => verbs::export(&args, &dirs),
            Command::Snapshot { volume, name } => snapshot(&dirs.at(volume), &name),
            Command::DeleteSnapshot(args) => change::delete_snapshot(&args, &dirs),
            Command::Rollback(args) => change::rollback(&args, &dirs),
            Command::Clone(args) => change::clone(&args, &dirs),
            Command::Flatten(args) => change::flatten(&args, &dirs),
            Command::Resize(args) => change::resize(&args, &dirs),
            Command::Changes(args) => change::changes(&args),
            Command::Info { volume, json } => info(&volume, json),
            Command::Check(args) => check::run(&args),
            Command::Scrub(args) => check::run(&args.into()),
            Command::Serve(args) => serve(&args, &dirs),
            Command::Agent { control_fd, first_uid } => agent::main(control_fd, first_uid),
        }
    }
}

fn snapshot(dir: &VolumeDir, name: &str) -> anyhow::Result<()> {
    let volume = dir.open(Access::ReadWrite)?;
    dir.snapshot(&volume, name)?;
    Ok(())
}

fn info(path: &Path, json: bool) -> anyhow::Result<()> {
    let Inspection { size_bytes, layers, snapshots, .. } = VolumeDir::new(path)
        .files(Access::ReadOnly)?
        .inspect()
        .with_context(|| format!("cannot read the volume in {}", path.display()))?;
    if json {
        let snapshots: Vec<_> = snapshots
            .iter()
            .map(|s| serde_json::json!({"name": s.name, "layer": s.layer, "create_time": s.time_s}))
            .collect();
        let all = serde_json::json!({"size_bytes": size_bytes, "layers": layers, "snapshots": snapshots});
        println!("{all:#}");
        return Ok(());
    }
    println!("size       {} ({size_bytes} bytes)", ByteSize::from_bytes(size_bytes));
    println!("layers     {layers}");
    for snapshot in snapshots {
        println!("snapshot   {} (layer {})", snapshot.name, snapshot.layer);
    }
    Ok(())
}

fn open(args: &ServeArgs, dirs: &Dirs) -> anyhow::Result<Volume> {
    let access = if args.read_only { Access::ReadOnly } else { Access::ReadWrite };
    if args.source.is_dir() {
        let dir = dirs.at(&args.source);
        return Ok(match &args.snapshot {
            Some(name) => dir.open_snapshot(name)?,
            None => dir.open(access)?,
        });
    }
    if args.snapshot.is_some() {
        bail!("{} is not a volume directory, so it has no snapshots", args.source.display());
    }
    let name = args.source.display();
    let file = File::options()
        .read(true)
        .write(!args.read_only)
        .open(&args.source)
        .with_context(|| format!("cannot open {name}"))?;
    Volume::open_raw(file, access).with_context(|| format!("cannot serve {name}"))
}

fn serve(args: &ServeArgs, dirs: &Dirs) -> anyhow::Result<()> {
    // Before any thread starts, so that all inherit it and only the waiter below gets them.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.thread_block().context("cannot block signals")?;
    let volume = open(args, dirs)?;
    let socket = args.socket.display();
    // Only its owner may connect.
    let before = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(&args.socket);
    nix::sys::stat::umask(before);
    let listener = listener
        .with_context(|| format!("cannot listen on {socket}: if nothing uses it, remove it first"))?;
    let stop = Stop::new().context("cannot make an eventfd")?;
    let stopping = stop.clone();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            // Any answer means that it is time to go.
            let _ = signals.wait();
            stopping.stop();
        })
        .context("cannot start a thread")?;
    if io::stderr().is_terminal() {
        eprintln!("serving nbd+unix:///{}?socket={socket}", args.export_name);
    }
    let description = args.source.display().to_string();
    let mut export = VolumeExport::new(volume, &args.export_name, &description);
    if let (true, Some(snapshot)) = (args.release, &args.snapshot) {
        let files = VolumeDir::new(&args.source).files(Access::ReadWrite)?;
        export = export.releasing(files.release(snapshot).context("cannot release from the snapshot")?);
    }
    let limits =
        Limits { clients_max: args.max_clients.clamp(1, 1024), once: args.once, ..Limits::default() };
    let log = Log::default();
    let result = Server::new(vec![export], limits).run(&listener, &stop, &|event| log.event(&event));
    // Another may have taken the name meanwhile, but then the bind had failed: it is ours.
    let _ = std::fs::remove_file(&args.socket);
    Ok(result?)
}
