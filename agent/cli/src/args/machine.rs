//! The arguments of `vm` that say what its machine has; of a new VM or as changes of one.

use std::str::FromStr;

use clap::{Args, ValueEnum};
use serio_api::v1::IoLimits;
use serio_types::{ByteSize, VdcName};

use super::{Restart, parse::in_vdc};
use crate::names;

/// What a machine has. Left out: as it is, or the default.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Machine")]
pub struct MachineArgs {
    /// Connections between the guest and Unix sockets of the host; `vm show` says where
    #[arg(long, value_name = "on|off", num_args = 0..=1, require_equals = true, default_missing_value = "on", value_enum)]
    pub vsock: Option<Switch>,
    /// What happens to a guest that started its watchdog and does not pet it
    #[arg(long, value_enum)]
    pub watchdog: Option<OnWatchdog>,
    /// Memory from the host's huge pages: 2MiB or 1GiB (4KiB: ordinary ones)
    #[arg(long, value_name = "SIZE")]
    pub hugepages: Option<ByteSize>,
    /// What the guest sees of the processor: host, x86-64-v2 or x86-64-v3
    #[arg(long, value_name = "BASELINE")]
    pub cpu: Option<String>,
    /// Memory that the guest is asked to give back
    #[arg(long, value_name = "SIZE")]
    pub balloon: Option<ByteSize>,
    /// What a balloon leaves it at least
    #[arg(long, value_name = "SIZE")]
    pub balloon_floor: Option<ByteSize>,
    /// Bytes a second of each disk; 0: no bound
    #[arg(long, value_name = "SIZE")]
    pub disk_bandwidth: Option<ByteSize>,
    /// Bytes that a disk may move at once after a rest
    #[arg(long, value_name = "SIZE")]
    pub disk_burst: Option<ByteSize>,
    /// Requests a second of each disk; 0: no bound
    #[arg(long, value_name = "N")]
    pub disk_iops: Option<u64>,
    /// Requests that a disk may do at once after a rest
    #[arg(long, value_name = "N")]
    pub disk_iops_burst: Option<u64>,
    /// Bytes a second of each network card, in each direction; 0: no bound
    #[arg(long, value_name = "SIZE")]
    pub nic_bandwidth: Option<ByteSize>,
    /// Bytes that a card may move at once after a rest
    #[arg(long, value_name = "SIZE")]
    pub nic_burst: Option<ByteSize>,
    /// Packets a second of each network card, in each direction; 0: no bound
    #[arg(long, value_name = "N")]
    pub nic_packets: Option<u64>,
    /// Packets that a card may move at once after a rest
    #[arg(long, value_name = "N")]
    pub nic_packets_burst: Option<u64>,
    /// Limits of one disk or card instead: root, VDC/VOLUME or nics/N, then iops=, bandwidth=, burst=, iops-burst=, packets=,
    /// packets-burst=, or nothing for no bound (vm update: `,default` to be like the others again); may be repeated
    #[arg(long = "limit", value_name = "DEVICE,KEY=VALUE,…")]
    pub limits: Vec<LimitArg>,
    /// The network cards' largest frame, 576 to 9000 bytes; 0: 1500
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u32>,
}

/// Limits of a device as typed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LimitArg {
    /// As the API names it.
    pub device: String,
    /// None: like the others.
    pub limits: Option<IoLimits>,
}

impl FromStr for LimitArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        let device = match name.split_once('/') {
            Some(("nics", _)) => name.to_owned(),
            None if name == "root" => name.to_owned(),
            _ => names::volume(&in_vdc(name).map_err(|e| format!("{e} (or write root, or nics/0)"))?),
        };
        let mut limits = IoLimits::default();
        let mut like_others = false;
        for part in parts {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let number = || value.parse::<u64>().map_err(|_| format!("`{part}`: give a number"));
            let size =
                || value.parse::<ByteSize>().map(|size| size.bytes()).map_err(|e| format!("`{part}`: {e}"));
            match key {
                "iops" | "packets" => limits.operations_per_second = number()?,
                "iops-burst" | "packets-burst" => limits.operations_burst = number()?,
                "bandwidth" => limits.bytes_per_second = size()?,
                "burst" => limits.bytes_burst = size()?,
                "default" if part == key => like_others = true,
                _ => {
                    return Err(format!(
                        "`{part}` is not iops=, packets=, bandwidth=, burst=, iops-burst=, packets-burst= or default"
                    ));
                }
            }
        }
        if like_others && limits != IoLimits::default() {
            return Err("`default` takes its own limits away: leave the rest out".to_owned());
        }
        Ok(Self { device, limits: (!like_others).then_some(limits) })
    }
}

/// A switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// It has it.
    On,
    /// It has not.
    Off,
}

/// What happens to a guest that does not pet its watchdog.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnWatchdog {
    /// It is reset.
    Reset,
    /// The VM ends by failure, and its restart policy decides.
    End,
}

/// `vm update`.
#[derive(Debug, Args)]
#[command(
    after_help = "The restart policy, the balloon and limits count at once; the rest can only be changed while the VM is stopped.

Examples:
  serio vm update ardesio/web --restart always --balloon 128MiB
  serio vm update ardesio/db --disk-iops 2000 --disk-bandwidth 100MiB
  serio vm update ardesio/db --limit ardesio/data,iops=5000 --limit nics/0,bandwidth=50MiB --limit root,default
  serio vm update ardesio/db --vcpus 4 --memory 2GiB"
)]
pub struct VmUpdateArgs {
    /// VDC/NAME
    #[arg(value_parser = in_vdc)]
    pub name: VdcName,
    /// Virtual processors, 1 to 64
    #[arg(long, value_name = "N")]
    pub vcpus: Option<u32>,
    /// Memory
    #[arg(long, value_name = "SIZE")]
    pub memory: Option<ByteSize>,
    /// The kernel's command line; empty: the image's or the disk's
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// When to start it again after it ended by itself
    #[arg(long, value_enum)]
    pub restart: Option<Restart>,
    /// The machine.
    #[command(flatten)]
    pub machine: MachineArgs,
}
