//! The arguments of the verbs of `volume` that work on layers: grow, clone, go back, merge, compare.

use clap::Args;
use serio_types::{ByteSize, Name, SnapshotName, VdcName};

use super::{
    operation::WaitArgs,
    parse::{in_vdc, snapshot_name},
};

/// `volume delete-snapshot`.
#[derive(Debug, Args)]
#[command(
    after_help = "What only this snapshot has is merged into what follows it, also while the VM runs: at the pace that seriod.toml sets
([volumes] merge_pace). ctrl-C ends the waiting, not the operation.

Examples:
  serio volume delete-snapshot ardesio/web-root@before
  serio volume delete-snapshot ardesio/web-root@before --async -o json"
)]
pub struct DeleteSnapshotArgs {
    /// VDC/NAME@SNAPSHOT
    #[arg(value_parser = snapshot_name)]
    pub snapshot: SnapshotName,
    /// Waiting.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// `volume resize`.
#[derive(Debug, Args)]
#[command(
    after_help = "Also while its VM runs: the guest sees the larger disk at once, and grows its partition and file system itself.

Examples:
  serio volume resize ardesio/data 20GiB"
)]
pub struct ResizeArgs {
    /// VDC/NAME
    #[arg(value_parser = in_vdc)]
    pub name: VdcName,
    /// Its new size: more than now
    pub size: ByteSize,
}

/// `volume clone`.
#[derive(Debug, Args)]
#[command(after_help = "At once, and without a copy: both share what was sealed, and each writes for itself.

Examples:
  serio volume clone ardesio/web-root@golden ardesio/web2-root
  serio volume clone ardesio/data@monday ardesio/test --size 50GiB")]
pub struct CloneArgs {
    /// VDC/NAME@SNAPSHOT
    #[arg(value_parser = snapshot_name)]
    pub source: SnapshotName,
    /// VDC/NAME of the new volume, in the same vdc
    #[arg(value_parser = in_vdc)]
    pub name: VdcName,
    /// Its size; the snapshot's if left out
    #[arg(long, value_name = "SIZE")]
    pub size: Option<ByteSize>,
}

/// `volume rollback`.
#[derive(Debug, Args)]
#[command(after_help = "The volume must not be in use. What was written since the snapshot is lost.

Examples:
  serio volume rollback ardesio/web-root@before
  serio volume rollback ardesio/web-root@before --discard-later")]
pub struct RollbackArgs {
    /// VDC/NAME@SNAPSHOT
    #[arg(value_parser = snapshot_name)]
    pub snapshot: SnapshotName,
    /// Throw later snapshots away; without this they are a reason to refuse
    #[arg(long)]
    pub discard_later: bool,
}

/// `volume flatten`.
#[derive(Debug, Args)]
#[command(
    after_help = "Copies what a clone, or a volume made from an image, still shares. ctrl-C ends the waiting, not the operation.

Examples:
  serio volume flatten ardesio/web2-root"
)]
pub struct FlattenArgs {
    /// VDC/NAME
    #[arg(value_parser = in_vdc)]
    pub name: VdcName,
    /// Waiting.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// `volume check`.
#[derive(Debug, Args)]
#[command(
    after_help = "Compares headers, maps and files; with --data also all sealed data with their checksums, which are computed where
they are missing. Works while the VM runs. Exit code 1 when something is wrong. ctrl-C ends the waiting, not the check.

Examples:
  serio volume check ardesio/web-root
  serio volume check ardesio/web-root --data --pace 50MiB"
)]
pub struct CheckArgs {
    /// VDC/NAME
    #[arg(value_parser = in_vdc)]
    pub name: VdcName,
    /// Read all sealed data and compare them with their checksums
    #[arg(long)]
    pub data: bool,
    /// Bytes read a second; as fast as it goes if left out
    #[arg(long, value_name = "SIZE", requires = "data")]
    pub pace: Option<ByteSize>,
    /// Waiting.
    #[command(flatten)]
    pub wait: WaitArgs,
}

/// `volume changes`.
#[derive(Debug, Args)]
#[command(
    after_help = "Ranges are whole blocks of 4 KiB. A block that was written with the bytes it had before is listed too.

Examples:
  serio volume changes ardesio/web-root --from monday --to tuesday
  serio volume changes ardesio/data --from monday -o json"
)]
pub struct ChangesArgs {
    /// VDC/NAME
    #[arg(value_parser = in_vdc)]
    pub name: VdcName,
    /// The earlier snapshot
    #[arg(long, value_name = "SNAPSHOT")]
    pub from: Name,
    /// The later snapshot; without one the volume as it is, which must not be in use then
    #[arg(long, value_name = "SNAPSHOT")]
    pub to: Option<Name>,
}
