//! The arguments of `vm snapshot`, with those that take one elsewhere, and `vm restore`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serio_types::{Name, SnapshotName, VdcName};

use super::parse::{image_name, in_vdc, snapshot_name, vdc_name};

/// `vm snapshot`.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "The VM's memory goes into files of the node, its volumes are sealed under the same name at the same instant; it stands still
meanwhile.

Examples:
  serio vm snapshot ardesio/web --name before-upgrade
  serio vm restore ardesio/web before-upgrade --as web-test
  serio vm snapshot export ardesio/web@before-upgrade web.vm"
)]
pub struct VmSnapshotArgs {
    /// With a snapshot that is there.
    #[command(subcommand)]
    pub verb: Option<VmSnapshotVerb>,
    /// VDC/NAME
    #[arg(value_parser = in_vdc, required = true)]
    pub vm: Option<VdcName>,
    /// The snapshot's name; made of the time if left out
    #[arg(long)]
    pub name: Option<Name>,
}

/// The verbs of `vm snapshot`.
#[derive(Debug, Subcommand)]
pub enum VmSnapshotVerb {
    /// Write a snapshot, with the VM's memory and its disks, into one file for another node
    Export(ExportSnapshotArgs),
    /// Make a stopped VM, with its volumes and its snapshot, of such a file
    Import(ImportSnapshotArgs),
}

/// `vm snapshot export`.
#[derive(Debug, Args)]
#[command(
    after_help = "THE FILE IS NOT ENCRYPTED, also when the volumes are: it holds all that the guest knew, passwords and keys too. It is made so
that only you can read it; whoever has it has the VM. Where it goes through a pipe, see to the other end.
The VM may run on meanwhile; its snapshot cannot be deleted until that is done. ctrl-C leaves nothing behind.

Examples:
  serio vm snapshot export ardesio/web@before-upgrade web.vm
  serio vm snapshot export ardesio/web@before-upgrade - | zstd | age -r RECIPIENT > web.vm.zst.age
  serio --host https://a:7440 vm snapshot export ardesio/web@friday - | serio --host https://b:7440 vm snapshot import -"
)]
pub struct ExportSnapshotArgs {
    /// VDC/NAME@SNAPSHOT
    #[arg(value_name = "VDC/NAME@SNAPSHOT", value_parser = snapshot_name)]
    pub snapshot: SnapshotName,
    /// The file, which must not exist yet, or - for standard output
    pub file: PathBuf,
}

/// `vm snapshot import`.
#[derive(Debug, Args)]
#[command(
    after_help = "The VM must fit the virtual data center's quota, and its image must be there (`serio image import`). All of it is made or
nothing: a file that is cut or damaged, and ctrl-C, leave nothing behind. `serio vm restore` lets the VM go on: with its
addresses, on a processor that has what its guest was shown (see --cpu of `serio vm create`).

Examples:
  serio vm snapshot import web.vm && serio vm restore ardesio/web before-upgrade
  serio vm snapshot import web.vm --vdc town-hall --name web2 --new-macs
  age -d web.vm.zst.age | zstd -d | serio vm snapshot import -"
)]
pub struct ImportSnapshotArgs {
    /// The file, or - for standard input
    pub file: PathBuf,
    /// The virtual data center; one of the same name if left out
    #[arg(long, value_parser = vdc_name)]
    pub vdc: Option<Name>,
    /// The VM's name, after which its volumes are named too; all as it was if left out
    #[arg(long)]
    pub name: Option<Name>,
    /// The image that it boots from later, if not one of the same name with the same disk
    #[arg(long, value_parser = image_name)]
    pub image: Option<Name>,
    /// Give its cards addresses of their own: the VM is here already, or goes on in both places
    #[arg(long)]
    pub new_macs: bool,
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
