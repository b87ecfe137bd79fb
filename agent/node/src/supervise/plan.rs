//! What the state asks of the supervisor, and what it hears back. Valid by construction: the state admitted it.

use std::path::PathBuf;

use serio_types::{IoLimits, MachineSpec, VdcName};
use uuid::Uuid;

use crate::direct::DirectIo;

/// Paths and settings of the supervisor.
#[derive(Debug, Clone)]
pub struct SupervisorSettings {
    /// `STATE`: volumes, images, serial logs, seeds.
    pub state_dir: PathBuf,
    /// `RUN`: a directory per running VM, the exports' sockets.
    pub run_dir: PathBuf,
    /// The binary `serio-vmm`.
    pub vmm_path: PathBuf,
    /// Processes become the user of this number plus their process number; 0: they stay root.
    pub first_uid: u32,
    /// The binary `serio-volumed`.
    pub volumed_path: PathBuf,
    /// How fast layers are merged in the background, bytes a second; 0: as fast as it goes.
    pub merge_bytes_per_s: u64,
    /// Which disks go past the page cache.
    pub direct_io: DirectIo,
    /// Whether the kernel may move the packets of cards by itself.
    pub vhost_net: bool,
    /// Where cgroup v2 is mounted; looked up at `/sys/fs/cgroup` when `None`.
    pub cgroup_root: Option<PathBuf>,
}

/// A VM to be started.
#[derive(Debug, Clone)]
pub struct LaunchPlan {
    /// The VM's id: names its run directory, its cgroup, its log.
    pub uid: Uuid,
    /// For messages and logs.
    pub name: VdcName,
    /// The VM's generation when it was started; kept with the process.
    pub generation: u64,
    /// 1 to 64.
    pub vcpus: u32,
    /// A multiple of 1 MiB.
    pub memory_bytes: u64,
    /// The kernel.
    pub boot: BootPlan,
    /// The kernel's command line; empty with [`BootPlan::Disk`]: the one found there.
    pub cmdline: String,
    /// In the order that the guest sees them: vda, vdb, …
    pub disks: Vec<DiskPlan>,
    /// In the order that the guest sees them.
    pub nics: Vec<NicPlan>,
    /// The other devices.
    pub machine: MachineSpec,
    /// What disks and cards may do.
    pub limits: DevicePlan,
    /// The directory where it was saved, if it is to go on from there, and those of the points that this one goes on from.
    pub restore: Vec<PathBuf>,
}

/// Where a kernel comes from.
#[derive(Debug, Clone)]
pub enum BootPlan {
    /// Files.
    Files {
        /// bzImage or vmlinux.
        kernel: PathBuf,
        /// The initrd.
        initrd: Option<PathBuf>,
    },
    /// What this volume boots with. A reset ends the VM's process, so that the next one looks again.
    Disk {
        /// The root volume.
        volume: Uuid,
    },
}

/// What the disks and cards of a VM may do; those that are not named have no bounds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DevicePlan {
    /// By volume.
    pub disks: Vec<(Uuid, IoLimits)>,
    /// By address.
    pub nics: Vec<([u8; 6], IoLimits)>,
}

impl DevicePlan {
    /// Whether nothing is bounded.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.disks
            .iter()
            .map(|(_, limits)| limits)
            .chain(self.nics.iter().map(|(_, limits)| limits))
            .all(IoLimits::is_none)
    }

    pub(super) fn disk(&self, volume: Uuid) -> Option<&IoLimits> {
        self.disks.iter().find(|(uid, _)| *uid == volume).map(|(_, limits)| limits)
    }

    pub(super) fn nic(&self, mac: [u8; 6]) -> Option<&IoLimits> {
        self.nics.iter().find(|(known, _)| *known == mac).map(|(_, limits)| limits)
    }
}

/// A disk of a VM.
#[derive(Debug, Clone)]
pub struct DiskPlan {
    /// Where its bytes are.
    pub source: DiskSource,
    /// The guest cannot write.
    pub read_only: bool,
}

/// Where a disk's bytes are.
#[derive(Debug, Clone)]
pub enum DiskSource {
    /// `STATE/volumes/<uuid>/`.
    Volume(Uuid),
    /// A plain raw file, such as the seed.
    File {
        /// The disk's serial in the guest (at most 20 bytes), for example `seed`.
        name: String,
        /// The file.
        path: PathBuf,
    },
}

/// A network card of a VM.
#[derive(Debug, Clone)]
pub struct NicPlan {
    /// Its address.
    pub mac: [u8; 6],
    /// The bridge, made when it is not there: see [`crate::net::bridge_name`].
    pub bridge: String,
    /// The tap, made for this run: see [`crate::net::tap_name`].
    pub tap: String,
    /// Its queues, one for each queue pair of the card: see [`serio_control::message::nic_pairs`].
    pub pairs: u32,
    /// Bytes, for example 1500.
    pub mtu: u32,
}

/// A volume to be served over NBD.
#[derive(Debug, Clone)]
pub struct ExportPlan {
    /// Names the socket: letters, digits and `-`.
    pub id: String,
    /// The volume.
    pub volume: Uuid,
    /// The name that clients ask for.
    pub export_name: String,
    /// The point, or `None` for the head of a stopped volume.
    pub snapshot: Option<String>,
    /// Clients may write (the head of a stopped volume only).
    pub writable: bool,
    /// It ends when its first user has gone.
    pub once: bool,
    /// TRIM gives back what only the point holds.
    pub release: bool,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndRecord {
    /// The kind.
    pub kind: EndKind,
    /// For the person: what happened, and what to look at.
    pub reason: String,
}

/// The kinds of end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EndKind {
    /// The guest powered off.
    PowerOff,
    /// The guest reset, and a reset ends this VM.
    Reset,
    /// It was asked to.
    Stopped,
    /// The guest broke: triple fault, an exit that cannot be handled.
    GuestError,
    /// KVM or the host failed.
    HostError,
    /// It never started.
    LaunchFailed,
    /// The process died without a word.
    Died,
}

impl EndKind {
    /// The word that the API shows.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PowerOff => "power-off",
            Self::Reset => "reset",
            Self::Stopped => "stopped",
            Self::GuestError => "guest-error",
            Self::HostError => "host-error",
            Self::LaunchFailed => "launch-failed",
            Self::Died => "died",
        }
    }
}

/// What a VMM says of its VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmReport {
    /// Its vcpus are stopped.
    pub paused: bool,
    /// Times that the guest was reset.
    pub resets: u64,
    /// Since the first vcpu ran.
    pub uptime: std::time::Duration,
    /// The VMM's version.
    pub version: String,
    /// What its guest has; empty if it does not say.
    pub volumes: Vec<Uuid>,
    /// Its cards.
    pub nics: Vec<serio_types::MacAddr>,
}

/// An image that was read in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportedImage {
    /// The disk's size as a guest sees it.
    pub size_bytes: u64,
    /// Of the disk's content, lower-case hex.
    pub blake3: String,
}

/// What a volume's headers say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeInfo {
    /// The size that a guest sees.
    pub size_bytes: u64,
    /// Sealed points, oldest first.
    pub snapshots: Vec<PointInfo>,
    /// Numbers of the layers in its chain, oldest first. There may be gaps.
    pub chain: Vec<u64>,
}

impl VolumeInfo {
    /// The number for a new head. Files of that name are leftovers.
    #[must_use]
    pub fn next_number(&self) -> u64 {
        self.chain.last().map_or(0, |top| top.saturating_add(1))
    }
}

/// A sealed point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PointInfo {
    /// Its name.
    pub name: String,
    /// The number of its top layer.
    pub layer: u64,
    /// Seconds since the epoch.
    pub create_time: u64,
}

/// What an export says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportReport {
    /// Connected clients.
    pub clients: u32,
}
