//! The arguments of `vm`.

use std::{path::PathBuf, str::FromStr};

use clap::{Args, Subcommand, ValueEnum};
use serio_types::{ByteSize, Name, VdcName};

use super::{
    DiskVerb, MachineArgs, NicVerb, RestoreArgs, VmSnapshotArgs, VmUpdateArgs, WaitArgs,
    parse::{image_name, in_vdc, vdc_name},
};

/// The verbs of `vm`.
#[derive(Debug, Subcommand)]
pub enum VmVerb {
    /// Create a VM and leave it stopped
    #[command(after_help = "Examples:
  serio vm create ardesio/db --image debian --vcpus 2 --memory 1GiB --disk-size 10GiB --volume ardesio/data")]
    Create(Box<VmArgs>),
    /// Create a VM and start it
    #[command(
        after_help = "The root disk becomes the volume VDC/NAME-root. A seed disk for cloud-init is made when --ssh-key, --user-data,
--hostname or a --nic with an address is given.

Examples:
  serio vm run ardesio/web --image tiny --vcpus 1 --memory 256MiB --disk-size 1GiB
  serio vm run ardesio/web --image tiny --disk-size 1GiB --cpu x86-64-v3 --disk-iops 1000 --disk-bandwidth 50MiB
  serio vm run ardesio/db --image debian --vcpus 2 --memory 1GiB --nic address=192.168.7.10/24,gateway=192.168.7.1 \\
      --ssh-key ~/.ssh/id_ed25519.pub --restart always"
    )]
    Run(Box<VmArgs>),
    /// List the VMs
    #[command(after_help = "Examples:\n  serio vm list\n  serio vm list ardesio -o json")]
    List {
        /// Only those of that virtual data center
        #[arg(value_parser = vdc_name)]
        vdc: Option<Name>,
    },
    /// Show one
    #[command(after_help = "Examples:\n  serio vm show ardesio/web -o json")]
    Show {
        /// VDC/NAME
        #[arg(value_parser = in_vdc)]
        name: VdcName,
    },
    /// Change what a VM has
    Update(Box<VmUpdateArgs>),
    /// Give a VM volumes, or take them away, also while it runs
    Disk {
        /// What to do.
        #[command(subcommand)]
        verb: DiskVerb,
    },
    /// Give a VM network cards, or take them away, also while it runs
    Nic {
        /// What to do.
        #[command(subcommand)]
        verb: NicVerb,
    },
    /// Start a stopped VM
    #[command(after_help = "Examples:\n  serio vm start ardesio/web")]
    Start {
        /// VDC/NAME
        #[arg(value_parser = in_vdc)]
        name: VdcName,
    },
    /// Press the power button and wait for the guest to shut down
    Stop(StopArgs),
    /// Reset the machine, at once
    #[command(after_help = "Examples:\n  serio vm reboot ardesio/web")]
    Reboot {
        /// VDC/NAME
        #[arg(value_parser = in_vdc)]
        name: VdcName,
    },
    /// Stop the guest where it is; it keeps its memory
    #[command(after_help = "Examples:\n  serio vm pause ardesio/web")]
    Pause {
        /// VDC/NAME
        #[arg(value_parser = in_vdc)]
        name: VdcName,
    },
    /// Let a paused guest go on
    #[command(after_help = "Examples:\n  serio vm resume ardesio/web")]
    Resume {
        /// VDC/NAME
        #[arg(value_parser = in_vdc)]
        name: VdcName,
    },
    /// Save a VM with its memory and its volumes at one instant
    Snapshot(VmSnapshotArgs),
    /// List the snapshots of a VM, oldest first
    #[command(after_help = "Examples:\n  serio vm snapshots ardesio/web")]
    Snapshots {
        /// VDC/NAME
        #[arg(value_parser = in_vdc)]
        name: VdcName,
    },
    /// Let a VM, or a new one, go on from a snapshot
    Restore(RestoreArgs),
    /// Delete a snapshot of a VM
    #[command(after_help = "ctrl-C ends the waiting, not the operation.

Examples:
  serio vm delete-snapshot ardesio/web before-upgrade")]
    DeleteSnapshot {
        /// VDC/NAME
        #[arg(value_parser = in_vdc)]
        name: VdcName,
        /// The snapshot's
        snapshot: Name,
        /// Waiting.
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// Attach to the serial console
    Console(ConsoleArgs),
    /// Print what the serial console printed, also when the VM is off
    Log(LogArgs),
    /// Delete a stopped VM and its root volume
    #[command(after_help = "Examples:
  serio vm delete ardesio/web
  serio vm delete ardesio/web --force --keep-root-volume")]
    Delete {
        /// VDC/NAME
        #[arg(value_parser = in_vdc)]
        name: VdcName,
        /// Leave the root volume
        #[arg(long)]
        keep_root_volume: bool,
        /// Stop it first, by force
        #[arg(long)]
        force: bool,
    },
}

/// What a new VM is.
#[derive(Debug, Args)]
pub struct VmArgs {
    /// VDC/NAME
    #[arg(value_parser = in_vdc)]
    pub name: VdcName,
    /// The image that gives the root disk its content, and the kernel if it has one
    #[arg(long, value_parser = image_name)]
    pub image: Name,
    /// Virtual processors, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub vcpus: u32,
    /// Memory
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    pub memory: ByteSize,
    /// The root disk's size; the image's if left out
    #[arg(long, value_name = "SIZE")]
    pub disk_size: Option<ByteSize>,
    /// A volume that no VM has as the root, instead of a new one: a clone, an imported disk
    #[arg(long, value_name = "VDC/NAME", value_parser = in_vdc, conflicts_with = "disk_size")]
    pub root_volume: Option<VdcName>,
    /// The token of a reservation that was made for it on this node: the VM takes its place
    #[arg(long, value_name = "TOKEN")]
    pub reservation: Option<String>,
    /// One more volume, VDC/NAME; may be repeated
    #[arg(long = "volume", value_name = "VDC/NAME", value_parser = in_vdc)]
    pub volumes: Vec<VdcName>,
    /// A network card: `auto`, or mac=..,address=192.168.7.10/24,gateway=..; may be repeated. It has a queue pair for each vcpu,
    /// up to four
    #[arg(long = "nic", value_name = "KEY=VALUE,…")]
    pub nics: Vec<NicArg>,
    /// A public key, or a file of them, for the guest's first user; may be repeated
    #[arg(long = "ssh-key", value_name = "FILE|KEY")]
    pub ssh_keys: Vec<String>,
    /// cloud-init user data
    #[arg(long, value_name = "FILE")]
    pub user_data: Option<PathBuf>,
    /// The guest's host name; the VM's name if left out
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// The kernel's command line, instead of the image's or the disk's
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// When to start it again after it ended by itself
    #[arg(long, value_enum, default_value_t = Restart::OnFailure)]
    pub restart: Restart,
    /// Where the kernel comes from, at each start and reboot
    #[arg(long, value_enum, default_value_t = Boot::Auto)]
    pub boot: Boot,
    /// The machine.
    #[command(flatten)]
    pub machine: MachineArgs,
}

/// Where the kernel comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Boot {
    /// The image's kernel if it has one, else the root disk.
    Auto,
    /// The image's kernel.
    Image,
    /// The root disk: its boot loader entries or grub.cfg.
    Disk,
}

/// The restart policies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Restart {
    /// Leave it.
    Never,
    /// When the VMM died or the guest broke.
    OnFailure,
    /// Also after the guest powered off.
    Always,
}

/// A network card as typed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NicArg {
    /// Empty: the node chooses.
    pub mac: String,
    /// With the prefix length; may be empty.
    pub address: String,
    /// May be empty.
    pub gateway: String,
}

impl FromStr for NicArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut nic = Self::default();
        if text == "auto" {
            return Ok(nic);
        }
        for part in text.split(',') {
            let field = match part.split_once('=') {
                Some(("mac", value)) => (&mut nic.mac, value),
                Some(("address", value)) => (&mut nic.address, value),
                Some(("gateway", value)) => (&mut nic.gateway, value),
                _ => return Err(format!("`{part}` is not mac=, address= or gateway= (or write auto)")),
            };
            if !field.0.is_empty() || field.1.is_empty() {
                return Err(format!("`{part}` is empty or there twice"));
            }
            *field.0 = field.1.to_owned();
        }
        Ok(nic)
    }
}

/// `vm stop`.
#[derive(Debug, Args)]
#[command(
    after_help = "--timeout is how long the guest may take after the power button (60s if left out). Past it the command fails
and the guest still runs.

Examples:
  serio vm stop ardesio/web
  serio vm stop ardesio/web --timeout 5m
  serio vm stop ardesio/web --force"
)]
pub struct StopArgs {
    /// VDC/NAME
    #[arg(value_parser = in_vdc)]
    pub name: VdcName,
    /// Pull the plug: do not ask the guest
    #[arg(long)]
    pub force: bool,
}

/// `vm console`.
#[derive(Debug, Args)]
#[command(after_help = "On a terminal: raw, what was printed before comes first, ctrl-] detaches.
From a pipe: what is read is typed; after its end the output goes on until the VM ends or --timeout.
With --send and --until, in the order given: each --send types a text, each --until waits for the output to match; then
the command ends. --timeout bounds all of it (60s if left out); a match that does not come exits 1. The first --until
also looks at what was printed before; a --send makes the next one look only at what comes after it.
Texts of --send know \\n \\r \\t \\e \\\\ \\xHH. --until is a regular expression, ^ and $ are the ends of lines.

Examples:
  serio vm console ardesio/web
  serio vm console ardesio/web --until 'login:' --send 'root\\n' --until '# $' --timeout 30s
  serio vm console ardesio/web --send 'sha256sum /data/file\\n' --until '^[0-9a-f]{64} '
  echo 'poweroff' | serio vm console ardesio/web --timeout 20s")]
pub struct ConsoleArgs {
    /// VDC/NAME
    #[arg(value_parser = in_vdc)]
    pub name: VdcName,
    /// Type that text; may be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub send: Vec<String>,
    /// Wait until the output matches; may be repeated
    #[arg(long, value_name = "REGEX", allow_hyphen_values = true)]
    pub until: Vec<String>,
    /// How much of what was printed before to show first
    #[arg(long, value_name = "SIZE", default_value = "16KiB")]
    pub history: ByteSize,
}

/// `vm log`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  serio vm log ardesio/web
  serio vm log ardesio/web --tail 20 --follow")]
pub struct LogArgs {
    /// VDC/NAME
    #[arg(value_parser = in_vdc)]
    pub name: VdcName,
    /// Go on with what is printed; ctrl-C ends
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last lines
    #[arg(short = 'n', long, value_name = "LINES")]
    pub tail: Option<usize>,
}
