//! The arguments of `volume`.

use clap::{Args, Subcommand};
use serio_types::{ByteSize, Name, VdcName};

use super::layers::{
    ChangesArgs, CheckArgs, CloneArgs, DeleteSnapshotArgs, FlattenArgs, ResizeArgs, RollbackArgs,
};
use super::parse::{Seconds, image_name, in_vdc, vdc_name};
use super::transfer::{DownloadArgs, UploadArgs};

/// The verbs of `volume`.
#[derive(Debug, Subcommand)]
pub enum VolumeVerb {
    /// Create a volume, empty or from an image
    #[command(after_help = "Examples:
  serio volume create ardesio/data --size 10GiB
  serio volume create ardesio/copy --image tiny")]
    Create {
        /// VDC/NAME
        #[arg(value_parser = in_vdc)]
        name: VdcName,
        /// Its size; the image's if left out
        #[arg(long, value_name = "SIZE", required_unless_present = "image")]
        size: Option<ByteSize>,
        /// The image that gives it its content
        #[arg(long, value_parser = image_name)]
        image: Option<Name>,
    },
    /// Make a volume from an image that you have
    Import(UploadArgs),
    /// Copy a volume, or a point of it, into a file
    Download(DownloadArgs),
    /// List the volumes
    #[command(after_help = "Examples:\n  serio volume list\n  serio volume list ardesio -o json")]
    List {
        /// Only those of that virtual data center
        #[arg(value_parser = vdc_name)]
        vdc: Option<Name>,
    },
    /// Show one
    #[command(after_help = "Examples:\n  serio volume show ardesio/web-root -o yaml")]
    Show {
        /// VDC/NAME
        #[arg(value_parser = in_vdc)]
        name: VdcName,
    },
    /// Seal a point of a volume, also while its VM runs
    #[command(after_help = "Examples:\n  serio volume snapshot ardesio/web-root --name before")]
    Snapshot {
        /// VDC/NAME
        #[arg(value_parser = in_vdc)]
        volume: VdcName,
        /// The point's name
        #[arg(long = "name", id = "point", value_name = "NAME")]
        name: Name,
    },
    /// List a volume's points, oldest first
    #[command(after_help = "Examples:\n  serio volume snapshots ardesio/web-root")]
    Snapshots {
        /// VDC/NAME
        #[arg(value_parser = in_vdc)]
        volume: VdcName,
    },
    /// Delete a point; what only it has is merged into what follows it
    DeleteSnapshot(DeleteSnapshotArgs),
    /// Make a volume larger, also while its VM runs
    Resize(ResizeArgs),
    /// Make a volume from a point of another one, at once
    Clone(CloneArgs),
    /// Take a volume back to a point
    Rollback(RollbackArgs),
    /// Copy what a volume shares with others or its image, so that it stands alone
    Flatten(FlattenArgs),
    /// Check a volume, and scrub its data, also while its VM runs
    Check(CheckArgs),
    /// List what has changed between two points, or since one
    Changes(ChangesArgs),
    /// Offer a point, or a stopped volume, over NBD, and print the URI
    Export(ExportArgs),
    /// List the exports of the node
    #[command(after_help = "Examples:\n  serio volume exports")]
    Exports,
    /// End an export; its clients are disconnected
    #[command(after_help = "Examples:\n  serio volume unexport 5f0c2b1e")]
    Unexport {
        /// The export's id or name (exports/ID), as `volume exports` shows it
        id: String,
    },
    /// Delete a volume that no VM has and that is not exported
    #[command(after_help = "Examples:\n  serio volume delete ardesio/data")]
    Delete {
        /// VDC/NAME
        #[arg(value_parser = in_vdc)]
        name: VdcName,
    },
}

/// `volume export`.
#[derive(Debug, Args)]
#[command(
    after_help = "Prints one line, the NBD URI: by Unix socket when talking to the agent of this host, else by TLS with the folder
of your certificate (SERIO_CERT; the names ca-cert.pem, client-cert.pem and client-key.pem are expected in it).

Examples:
  serio volume export ardesio/web-root --snapshot before
  nbdcopy \"$(serio volume export ardesio/web-root --snapshot before --once)\" before.raw
  serio volume export ardesio/data --writable --ttl 10m -o json
  serio volume export ardesio/web-root --snapshot before --release-on-trim"
)]
pub struct ExportArgs {
    /// VDC/NAME
    #[arg(value_parser = in_vdc)]
    pub volume: VdcName,
    /// The point; without one the volume must not be in use
    #[arg(long, value_name = "NAME")]
    pub snapshot: Option<Name>,
    /// Let clients write (a volume that is not in use only)
    #[arg(long, conflicts_with = "snapshot")]
    pub writable: bool,
    /// End it when its first user has gone: with the last of its connections that says goodbye
    #[arg(long)]
    pub once: bool,
    /// Let clients give back by TRIM what only this snapshot holds: it reads as zeros there, and its space is freed
    #[arg(long, requires = "snapshot")]
    pub release_on_trim: bool,
    /// When it ends by itself; one hour if left out
    #[arg(long, value_name = "TIME")]
    pub ttl: Option<Seconds>,
}
