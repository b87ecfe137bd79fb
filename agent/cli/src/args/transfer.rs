//! The arguments of `volume import` and `volume download`.

use std::path::PathBuf;

use clap::Args;
use serio_types::{ByteSize, VdcName};

use super::parse::in_vdc;

/// `volume import`.
#[derive(Debug, Args)]
#[command(
    after_help = "The image is validated as a whole before the volume is made. An import that breaks off, however it does, goes on when
the same command is given with --resume: what is there already is compared and not sent again. An agent that is restarted
meanwhile is waited for. Until it is whole the volume counts against the quota; `serio volume delete` gives up.

Examples:
  serio volume import ardesio/data disk.raw
  serio volume import ardesio/data disk.qcow2 --format qcow2 --size 40GiB
  serio volume import ardesio/data top.qcow2 --format qcow2 --backing base.qcow2
  serio volume import ardesio/data nbd://10.0.0.7/export
  serio volume import ardesio/data disk.raw --resume
  serio volume import ardesio/data disk.vmdk --format vmdk --backing disk-s001.vmdk --backing disk-s002.vmdk
  zstdcat disk.raw.zst | serio volume import ardesio/data -"
)]
pub struct UploadArgs {
    /// VDC/NAME of the new volume
    #[arg(value_parser = in_vdc)]
    pub name: VdcName,
    /// The image: a file, a block device, an NBD URI, or - for standard input
    pub source: String,
    /// The image's format: raw, qcow2 or vmdk. It is never guessed
    #[arg(long, value_name = "FORMAT", default_value = "raw")]
    pub format: String,
    /// A file that the image may lean on or have parts in, by the name that stands in the image; may be given several times
    #[arg(long, value_name = "NAME")]
    pub backing: Vec<String>,
    /// Size of the volume, if larger than the image's disk
    #[arg(long, value_name = "SIZE")]
    pub size: Option<ByteSize>,
    /// Go on with an import that broke off
    #[arg(long)]
    pub resume: bool,
}

/// `volume download`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  serio volume download ardesio/web-root@before before.qcow2 --format qcow2
  serio volume download ardesio/data data.raw
  serio volume download ardesio/web-root@before - | zstd > before.raw.zst")]
pub struct DownloadArgs {
    /// VDC/NAME of a volume that is not in use, or VDC/NAME@POINT
    #[arg(value_name = "VDC/NAME[@POINT]")]
    pub volume: String,
    /// The file, which must not exist yet, or - for standard output
    pub file: PathBuf,
    /// The file's format: raw, qcow2 or vmdk
    #[arg(long, value_name = "FORMAT", default_value = "raw")]
    pub format: String,
}
