//! The arguments as typed. Meaning is given to them in `commands/`; here only the shape, the help and the examples.
//!
//! One file per large noun. Every verb carries an example: `--help` is the manual that people read.

mod audit;
mod layers;
mod machine;
mod operation;
mod parse;
mod place;
mod plug;
mod transfer;
mod vdc;
mod vm;
mod vm_snapshot;
mod volume;

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use serio_types::Name;

pub use audit::{AuditArgs, AuditVerb, EventsArgs, VerifyArgs};
pub use layers::{
    ChangesArgs, CheckArgs, CloneArgs, DeleteSnapshotArgs, FlattenArgs, ResizeArgs, RollbackArgs,
};
pub use machine::{LimitArg, MachineArgs, OnWatchdog, Switch, VmUpdateArgs};
pub use operation::{OperationVerb, WaitArgs};
pub use parse::{Seconds, image_name, in_vdc, snapshot_name, vdc_name};
pub use place::{CapacityArgs, CapacityVerb, PlaceArgs, PlaceVerb};
pub use plug::{DiskVerb, NicVerb};
pub use transfer::{DownloadArgs, UploadArgs};
pub use vdc::{
    ConsistencyArg, GranularityArg, LimitArgs, QuotaArgs, UpdateArgs, UsageArgs, VdcSnapshotArgs, VdcVerb,
};
pub use vm::{Boot, ConsoleArgs, LogArgs, NicArg, Restart, StopArgs, VmArgs, VmVerb};
pub use vm_snapshot::{ExportSnapshotArgs, ImportSnapshotArgs, RestoreArgs, VmSnapshotArgs, VmSnapshotVerb};
pub use volume::{ExportArgs, VolumeVerb};

const CONNECTION: &str = "Connection";

/// Run virtual machines on the hosts of a Serio cloud, and look after them.
///
/// Names inside a virtual data center are written VDC/NAME, sizes 256MiB or 4GiB.
#[derive(Debug, Parser)]
#[command(
    name = "serio",
    version,
    propagate_version = true,
    disable_help_subcommand = true,
    max_term_width = 120
)]
#[command(after_help = "Examples:
  serio doctor
  serio vdc create ardesio --vcpus 4 --memory 4GiB --storage 20GiB
  serio vm run ardesio/web --image tiny --vcpus 1 --memory 256MiB --disk-size 1GiB
  serio --host https://node-a:7440 vm list -o json

Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 refused (quota, precondition, permission), 5 unreachable.")]
pub struct Cli {
    /// What every command takes.
    #[command(flatten)]
    pub global: Global,
    /// The noun.
    #[command(subcommand)]
    pub noun: Noun,
}

/// What every command takes.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// The agent or scheduler to talk to: unix:PATH, https://HOST:PORT (port 7440 if left out); of a region's schedulers one,
    /// or several with commas: the call goes to the one that leads
    #[arg(long, global = true, env = "SERIO_HOST", value_name = "URL", help_heading = CONNECTION)]
    #[arg(default_value = "unix:/run/serio/seriod.sock", hide_env_values = true)]
    pub host: String,
    /// The certificate of the authority that signed the host's (PEM)
    #[arg(long, global = true, env = "SERIO_CA", value_name = "FILE", help_heading = CONNECTION, hide_env_values = true)]
    pub ca: Option<PathBuf>,
    /// Your certificate (PEM)
    #[arg(long, global = true, env = "SERIO_CERT", value_name = "FILE", help_heading = CONNECTION, hide_env_values = true)]
    pub cert: Option<PathBuf>,
    /// Your private key (PEM)
    #[arg(long, global = true, env = "SERIO_KEY", value_name = "FILE", help_heading = CONNECTION, hide_env_values = true)]
    pub key: Option<PathBuf>,
    /// Give up after that long (500ms, 30s, 5m); what it bounds, the verb says
    #[arg(long, global = true, value_name = "TIME", help_heading = CONNECTION)]
    pub timeout: Option<Seconds>,
    /// How to print: a table, or the API's own JSON (or the same as YAML)
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    pub output: Format,
}

impl Global {
    /// The time that was asked for.
    #[must_use]
    pub fn timeout(&self) -> Option<Duration> {
        self.timeout.map(|seconds| seconds.0)
    }
}

/// How to print.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// The protobuf JSON mapping; lists are arrays.
    Json,
    /// The same as YAML.
    Yaml,
}

/// The nouns.
#[derive(Debug, Subcommand)]
pub enum Noun {
    /// Check whether this machine can be a node, and whether its agent answers
    Doctor(DoctorArgs),
    /// The hosts
    #[command(subcommand)]
    Node(NodeVerb),
    /// Virtual data centers: the quota of a tenant
    #[command(subcommand)]
    Vdc(VdcVerb),
    /// Images: read-only disks that volumes start from
    #[command(subcommand)]
    Image(ImageVerb),
    /// Volumes: virtual disks, their snapshots and exports
    #[command(subcommand)]
    Volume(VolumeVerb),
    /// Virtual machines
    #[command(subcommand)]
    Vm(VmVerb),
    /// Long work that goes on in the background
    #[command(subcommand)]
    Operation(OperationVerb),
    /// What the node has, what is promised, and how it reports that to the scheduler
    Capacity(CapacityArgs),
    /// Find a node for a VM and reserve there; --host is a scheduler
    Place(Box<PlaceArgs>),
    /// What happened on the node
    Events(EventsArgs),
    /// Who asked for which change on the node, and how it ended
    Audit(AuditArgs),
    /// A small certificate authority, for those who have none
    #[command(subcommand)]
    Pki(PkiVerb),
    /// Print the completion script of a shell
    #[command(after_help = "Examples:
  serio completion bash > /etc/bash_completion.d/serio
  serio completion zsh > ~/.zfunc/_serio
  serio completion fish > ~/.config/fish/completions/serio.fish")]
    Completion {
        /// bash, zsh or fish
        #[arg(value_parser = clap::builder::PossibleValuesParser::new(["bash", "zsh", "fish"]))]
        shell: String,
    },
    /// Write the manual pages, one for each command
    #[command(after_help = "Examples:
  serio man /usr/local/share/man/man1
  serio man . && man ./serio-vm-run.1")]
    Man {
        /// A folder that is there
        dir: PathBuf,
    },
}

/// `doctor`.
#[derive(Debug, Args)]
#[command(after_help = "Each line is ok, warn or fail, with what to do. Exits 1 when a line says fail.
With a remote --host only what can be seen from here is checked.

Examples:
  serio doctor
  serio doctor --state-dir /srv/serio -o json")]
pub struct DoctorArgs {
    /// Where the agent keeps its state
    #[arg(long, value_name = "DIR", default_value = "/var/lib/serio")]
    pub state_dir: PathBuf,
}

/// The verbs of `node`.
#[derive(Debug, Subcommand)]
pub enum NodeVerb {
    /// Show the node that answers; with a name, what the scheduler knows of it
    #[command(after_help = "Examples:
  serio node show
  serio --host https://scheduler:7450 node show a")]
    Show {
        /// A node's name (then --host is a scheduler)
        name: Option<Name>,
    },
    /// List the nodes of the region; --host is a scheduler
    #[command(after_help = "Examples:
  serio --host https://scheduler:7450 node list
  serio --host https://scheduler:7450 node list --site milano -o json")]
    List {
        /// Only the nodes of that site
        #[arg(long)]
        site: Option<String>,
    },
    /// Let the node that answers take no new VMs and starts until undrain, also over restarts; what runs goes on
    #[command(after_help = "Examples:\n  serio node drain --reason 'new disks on Friday'")]
    Drain {
        /// Why, for whoever is refused
        #[arg(long, value_name = "TEXT")]
        reason: String,
    },
    /// Let the node that answers take new VMs and starts again
    #[command(after_help = "Examples:\n  serio node undrain\n  serio --host https://a:7440 node undrain")]
    Undrain,
    /// Record that a lost node is dead, so that what it had may be placed anew; --host is a scheduler
    #[command(after_help = "Examples:
  serio --host https://scheduler:7450 node fence a --proof \"power off by PDU 7, port 3, ticket 4711\"")]
    Fence {
        /// The node's name
        name: Name,
        /// What shows that it cannot write any more; it is recorded
        #[arg(long, value_name = "TEXT")]
        proof: String,
    },
    /// Make the scheduler forget a node that is lost for good; --host is a scheduler
    #[command(after_help = "Examples:\n  serio --host https://scheduler:7450 node delete a")]
    Delete {
        /// The node's name
        name: Name,
    },
}

/// The verbs of `image`.
#[derive(Debug, Subcommand)]
pub enum ImageVerb {
    /// Bring an image to the node
    Import(ImportArgs),
    /// List the images
    #[command(after_help = "Examples:\n  serio image list")]
    List,
    /// Show one
    #[command(after_help = "Examples:\n  serio image show tiny -o json")]
    Show {
        /// Its name
        #[arg(value_parser = image_name)]
        name: Name,
    },
    /// Delete an image; volumes made from it stay
    #[command(after_help = "Examples:\n  serio image delete tiny")]
    Delete {
        /// Its name
        #[arg(value_parser = image_name)]
        name: Name,
    },
}

/// `image import`.
#[derive(Debug, Args)]
#[command(
    after_help = "Holes of a sparse file, and stretches of zeros, are not sent. When the line breaks, the upload of a file goes on by itself where
it was; if it gives up, or was ended, the same command goes on within ten minutes. Standard input and NBD URIs begin anew.

Examples:
  serio image import tiny --disk tiny.raw --format raw --kernel vmlinuz --initrd initrd.img --cmdline \"console=ttyS0\"
  serio image import debian --disk debian.raw --format raw
  serio image import debian debian.qcow2 --format qcow2
  serio image import debian nbd://10.0.0.7/debian --format raw
  zstdcat debian.raw.zst | serio image import debian - --format raw"
)]
pub struct ImportArgs {
    /// The image's name
    #[arg(value_parser = image_name)]
    pub name: Name,
    /// The disk: a file, an NBD URI, or - for standard input
    #[arg(value_name = "DISK", required_unless_present = "disk", conflicts_with = "disk")]
    pub source: Option<String>,
    /// The same by a flag
    #[arg(long, value_name = "DISK")]
    pub disk: Option<String>,
    /// Refuse a disk whose blake3 is another
    #[arg(long, value_name = "HEX", default_value = "", hide_default_value = true)]
    pub blake3: String,
    /// The disk file's format: raw, qcow2 or vmdk. It is never guessed
    #[arg(long, value_name = "FORMAT")]
    pub format: String,
    /// A kernel to boot (bzImage or vmlinux); without one, the one on the disk
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Its initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    pub cmdline: String,
}

/// The verbs of `pki`.
#[derive(Debug, Subcommand)]
pub enum PkiVerb {
    /// Make a certificate authority in a folder
    #[command(
        after_help = "Writes DIR/ca-cert.pem and DIR/ca-key.pem. Whoever reads ca-key.pem can be anyone: keep it off the nodes.

Examples:
  serio pki init ./pki --name \"Regione CA\""
    )]
    Init {
        /// The folder
        dir: PathBuf,
        /// The authority's common name
        #[arg(long, value_name = "CN", default_value = "Serio CA")]
        name: String,
    },
    /// Issue a certificate, for servers and clients alike
    Issue(IssueArgs),
}

/// `pki issue`.
#[derive(Debug, Args)]
#[command(
    after_help = "Writes DIR/NAME/{ca-cert,server-cert,server-key,client-cert,client-key}.pem, the names that NBD clients expect.

Examples:
  serio pki issue ./pki node-a --role node --host node-a.example.net --host 10.0.0.5
  serio pki issue ./pki operator --role control-plane"
)]
pub struct IssueArgs {
    /// The authority's folder
    pub dir: PathBuf,
    /// Whose certificate: its common name, and the folder under DIR
    pub name: Name,
    /// What it may do
    #[arg(long, value_enum)]
    pub role: Role,
    /// A DNS name or address under which it is reached; may be repeated
    // The id of the global flag, which this one shadows; see `commands::pki` for what that means.
    #[arg(long = "host", id = "host", value_name = "NAME_OR_ADDRESS")]
    pub hosts: Vec<String>,
    /// For how long
    #[arg(long, value_name = "DAYS", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub days: u32,
}

/// What a certificate may do: the OU of its subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// Drives nodes: everything.
    ControlPlane,
    /// Another node's agent.
    PeerAgent,
    /// Reads only.
    Auditor,
    /// A node, towards the scheduler.
    Node,
}

impl Role {
    /// As it stands in the subject's OU.
    #[must_use]
    pub const fn organizational_unit(self) -> &'static str {
        match self {
            Self::ControlPlane => "control-plane",
            Self::PeerAgent => "peer-agent",
            Self::Auditor => "auditor",
            Self::Node => "node",
        }
    }
}

#[cfg(test)]
#[path = "args_test.rs"]
mod tests;
