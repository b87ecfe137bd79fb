//! `vdc`: quotas, shares, snapshots of the whole, usage.

use clap::{Args, Subcommand, ValueEnum};
use serio_types::{ByteSize, Name};

use super::{WaitArgs, vdc_name};

/// The quota as typed.
#[derive(Debug, Args)]
pub struct QuotaArgs {
    /// Virtual processors
    #[arg(long, value_name = "N")]
    pub vcpus: u32,
    /// Guest memory
    #[arg(long, value_name = "SIZE")]
    pub memory: ByteSize,
    /// Volumes, as provisioned
    #[arg(long, value_name = "SIZE")]
    pub storage: ByteSize,
}

/// Shares and caps as typed; 0 takes one away.
#[derive(Debug, Default, Args)]
pub struct LimitArgs {
    /// Reads a second, and as many writes, of all its VMs together; 0: no limit
    #[arg(long, value_name = "N")]
    pub iops: Option<u64>,
    /// Bytes a second read, and as many written, of all its VMs together; 0: no limit
    #[arg(long, value_name = "SIZE")]
    pub bandwidth: Option<ByteSize>,
    /// Snapshots that its volumes may have in all; 0: no limit
    #[arg(long, value_name = "N")]
    pub snapshots: Option<u32>,
    /// Its share when all are busy, against the other vdcs' weights, 1 to 10000; 0: 100 for each vcpu of its quota
    #[arg(long, value_name = "N")]
    pub weight: Option<u32>,
    /// The most processor time that it may take, in percent of one processor; 0: as much as is free
    #[arg(long, value_name = "PERCENT")]
    pub burst: Option<u32>,
}

/// What `vdc update` changes.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub struct UpdateArgs {
    /// Virtual processors
    #[arg(long, value_name = "N")]
    pub vcpus: Option<u32>,
    /// Guest memory
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<ByteSize>,
    /// Volumes, as provisioned
    #[arg(long, value_name = "SIZE")]
    pub storage: Option<ByteSize>,
    /// Reads a second, and as many writes, of all its VMs together; 0: no limit
    #[arg(long, value_name = "N")]
    pub iops: Option<u64>,
    /// Bytes a second read, and as many written, of all its VMs together; 0: no limit
    #[arg(long, value_name = "SIZE")]
    pub bandwidth: Option<ByteSize>,
    /// Snapshots that its volumes may have in all; 0: no limit
    #[arg(long, value_name = "N")]
    pub snapshots: Option<u32>,
    /// Its share when all are busy, against the other vdcs' weights, 1 to 10000; 0: 100 for each vcpu of its quota
    #[arg(long, value_name = "N")]
    pub weight: Option<u32>,
    /// The most processor time that it may take, in percent of one processor; 0: as much as is free
    #[arg(long, value_name = "PERCENT")]
    pub burst: Option<u32>,
}

/// `vdc usage`.
#[derive(Debug, Args)]
#[command(after_help = "Counted for invoicing: the numbers never go back, and are kept for 13 months.
-o csv prints a line a span with all numbers; times are UTC.

Examples:
  serio vdc usage ardesio
  serio vdc usage ardesio --from 2026-03-01 --to 2026-04-01 --by day
  serio vdc usage ardesio --from 2026-01-01 --by month --csv")]
pub struct UsageArgs {
    /// Its name
    #[arg(value_parser = vdc_name)]
    pub name: Name,
    /// Not before: 2026-03-01 or 2026-03-01T08:00:00Z; a day ago when left out
    #[arg(long, value_name = "TIME")]
    pub from: Option<String>,
    /// Before: likewise; now when left out
    #[arg(long, value_name = "TIME")]
    pub to: Option<String>,
    /// A line for each of
    #[arg(long, value_enum, default_value_t = GranularityArg::Hour)]
    pub by: GranularityArg,
    /// Comma-separated values instead of a table
    #[arg(long)]
    pub csv: bool,
}

/// The spans of `vdc usage`, in UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GranularityArg {
    /// Full hours.
    Hour,
    /// Days.
    Day,
    /// Months.
    Month,
}

/// The verbs of `vdc`.
#[derive(Debug, Subcommand)]
pub enum VdcVerb {
    /// Create a virtual data center
    #[command(after_help = "Examples:
  serio vdc create ardesio --vcpus 4 --memory 4GiB --storage 20GiB
  serio vdc create town-hall --vcpus 4 --memory 4GiB --storage 20GiB --encrypted
  serio vdc create ardesio --vcpus 4 --memory 4GiB --storage 20GiB --weight 800 --burst 200 --iops 2000 --snapshots 20")]
    Create {
        /// Its name
        #[arg(value_parser = vdc_name)]
        name: Name,
        /// What it may use.
        #[command(flatten)]
        quota: QuotaArgs,
        /// Its share and caps.
        #[command(flatten)]
        limits: LimitArgs,
        /// Encrypt its volumes at rest; needs [keys] in seriod.toml, and cannot be changed later
        #[arg(long)]
        encrypted: bool,
    },
    /// List the virtual data centers with what they use
    #[command(after_help = "Examples:\n  serio vdc list")]
    List,
    /// Show one
    #[command(after_help = "Examples:\n  serio vdc show ardesio -o yaml")]
    Show {
        /// Its name
        #[arg(value_parser = vdc_name)]
        name: Name,
    },
    /// Change the quota, the share or the caps; what is not named stays
    #[command(after_help = "Examples:
  serio vdc update ardesio --memory 8GiB
  serio vdc update ardesio --bandwidth 100MiB --burst 0")]
    Update {
        /// Its name
        #[arg(value_parser = vdc_name)]
        name: Name,
        /// What changes.
        #[command(flatten)]
        change: UpdateArgs,
    },
    /// Wrap the key of an encrypted virtual data center under the node's key encryption key of today
    #[command(
        name = "rotate-key",
        after_help = "At once, and VMs run on: no volume is touched. To change the key encryption key, name the new one as
`source` in the section [keys] of seriod.toml and the old one in `previous`, restart seriod, rotate each vdc, and take the
old one out again.

Examples:\n  serio vdc rotate-key town-hall"
    )]
    RotateKey {
        /// Its name
        #[arg(value_parser = vdc_name)]
        name: Name,
    },
    /// Destroy the key of an encrypted virtual data center: its volumes are unreadable for ever
    #[command(
        after_help = "Its VMs must be stopped and its exports ended. Copies of the volumes elsewhere become unreadable
too; copies of STATE/keys would not, so destroy those as well. Prints a receipt, which is also in the audit log. What remains
are volumes that can only be deleted.

Examples:\n  serio vdc erase town-hall --yes"
    )]
    Erase {
        /// Its name
        #[arg(value_parser = vdc_name)]
        name: Name,
        /// Do not ask: there is no way back
        #[arg(long, required = true)]
        yes: bool,
    },
    /// Seal all volumes of a virtual data center at one instant: all or none
    Snapshot(VdcSnapshotArgs),
    /// List the snapshots of a virtual data center, oldest first
    #[command(after_help = "Examples:\n  serio vdc snapshots ardesio\n  serio vdc snapshots ardesio -o json")]
    Snapshots {
        /// Its name
        #[arg(value_parser = vdc_name)]
        name: Name,
    },
    /// Delete a snapshot of a virtual data center with all its parts
    #[command(after_help = "ctrl-C ends the waiting, not the operation.

Examples:
  serio vdc delete-snapshot ardesio monday")]
    DeleteSnapshot {
        /// The vdc's name
        #[arg(value_parser = vdc_name)]
        name: Name,
        /// The snapshot's
        snapshot: Name,
        /// Waiting.
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// What a virtual data center has used, by hour, day or month
    Usage(UsageArgs),
    /// Delete an empty virtual data center
    #[command(after_help = "Examples:\n  serio vdc delete ardesio")]
    Delete {
        /// Its name
        #[arg(value_parser = vdc_name)]
        name: Name,
    },
}

/// `vdc snapshot`.
#[derive(Debug, Args)]
#[command(after_help = "Guests wait while the instant is made: a few milliseconds, three seconds at most.
With --consistency app the guests' agents (qemu-guest-agent) freeze their file systems first; a guest without one is
taken as after a power cut, and the snapshot says why.

Examples:
  serio vdc snapshot ardesio --name monday
  serio vdc snapshot ardesio --name monday --consistency app
  serio vdc snapshot ardesio --name monday --consistency app --require-app")]
pub struct VdcSnapshotArgs {
    /// The vdc's name
    #[arg(value_parser = vdc_name)]
    pub vdc: Name,
    /// The snapshot's name, in each volume too
    #[arg(long = "name", id = "point", value_name = "NAME")]
    pub name: Name,
    /// What it shall be good for
    #[arg(long, value_enum, default_value_t = ConsistencyArg::Crash)]
    pub consistency: ConsistencyArg,
    /// Rather none than one without a frozen guest
    #[arg(long, requires = "consistency")]
    pub require_app: bool,
}

/// What a point is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ConsistencyArg {
    /// As after a power cut.
    Crash,
    /// File systems frozen by the guests' agents.
    App,
}
