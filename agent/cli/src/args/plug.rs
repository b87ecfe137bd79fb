//! The arguments of `vm disk` and `vm nic`.

use clap::Subcommand;
use serio_types::{MacAddr, VdcName};

use super::{NicArg, parse::in_vdc};

/// The verbs of `vm disk`.
#[derive(Debug, Subcommand)]
pub enum DiskVerb {
    /// Give a VM one more volume; a running guest sees it at once
    #[command(
        after_help = "The volume is there at each later start too, behind the others. A Linux guest shows it as the next free
/dev/vdX, and under /dev/disk/by-id.

Examples:
  serio volume create ardesio/data --size 10GiB
  serio vm disk add ardesio/web ardesio/data"
    )]
    Add {
        /// VDC/NAME of the VM
        #[arg(value_parser = in_vdc)]
        name: VdcName,
        /// VDC/NAME of a volume that no VM has
        #[arg(value_parser = in_vdc)]
        volume: VdcName,
    },
    /// Take a volume from a VM; a running guest is asked to let go of it
    #[command(
        after_help = "Unmount it in the guest first. A guest that does not let go within --timeout (15s if left out, at
most 120s) keeps it, and nothing has changed.

Examples:
  serio vm disk remove ardesio/web ardesio/data
  serio vm disk remove ardesio/web ardesio/data --timeout 60s"
    )]
    Remove {
        /// VDC/NAME of the VM
        #[arg(value_parser = in_vdc)]
        name: VdcName,
        /// VDC/NAME of the volume
        #[arg(value_parser = in_vdc)]
        volume: VdcName,
    },
}

/// The verbs of `vm nic`.
#[derive(Debug, Subcommand)]
pub enum NicVerb {
    /// Give a VM one more card on its vdc's network; a running guest sees it at once
    #[command(
        after_help = "The card is there at each later start too, behind the others. An address is for the seed of the next start: a guest
that runs is told by its own means.

Examples:
  serio vm nic add ardesio/web
  serio vm nic add ardesio/web address=192.168.8.10/24"
    )]
    Add {
        /// VDC/NAME of the VM
        #[arg(value_parser = in_vdc)]
        name: VdcName,
        /// As with `vm run --nic`: mac=…,address=…/…,gateway=…, or auto
        #[arg(default_value = "auto")]
        nic: NicArg,
    },
    /// Take a card from a VM; a running guest is asked to let go of it
    #[command(
        after_help = "`serio vm show` says the cards' addresses. A guest that does not let go within --timeout (15s if left out, at
most 120s) keeps it, and nothing has changed.

Examples:
  serio vm nic remove ardesio/web 52:54:00:12:34:56"
    )]
    Remove {
        /// VDC/NAME of the VM
        #[arg(value_parser = in_vdc)]
        name: VdcName,
        /// Address of the card
        mac: MacAddr,
    },
}
