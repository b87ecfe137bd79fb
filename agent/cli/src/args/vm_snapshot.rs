//! The arguments of `vm snapshot` and `vm restore`.

use clap::Args;
use serio_types::{Name, VdcName};

use super::parse::in_vdc;

/// `vm snapshot`.
#[derive(Debug, Args)]
#[command(
    after_help = "The VM's memory goes into files of the node, its volumes are sealed under the same name at the same instant; it stands still
meanwhile.

Examples:
  serio vm snapshot ardesio/web --name before-upgrade
  serio vm restore ardesio/web before-upgrade --as web-test"
)]
pub struct VmSnapshotArgs {
    /// VDC/NAME
    #[arg(value_parser = in_vdc)]
    pub vm: VdcName,
    /// The snapshot's name; made of the time if left out
    #[arg(long)]
    pub name: Option<Name>,
}

/// `vm restore`.
#[derive(Debug, Args)]
#[command(
    after_help = "Without --as the VM itself goes on from there: it must be stopped, and what it has written since is lost.
With --as a new VM does, with clones of the volumes and network addresses of its own.

Examples:
  serio vm restore ardesio/web before-upgrade
  serio vm restore ardesio/web before-upgrade --as web-test"
)]
pub struct RestoreArgs {
    /// VDC/NAME
    #[arg(value_parser = in_vdc)]
    pub vm: VdcName,
    /// The snapshot's name
    pub snapshot: Name,
    /// Go on as a new VM of that name
    #[arg(long = "as", value_name = "NAME")]
    pub as_new: Option<Name>,
    /// Lose the later snapshots of the VM and its volumes
    #[arg(long, conflicts_with = "as_new")]
    pub discard_later: bool,
}
