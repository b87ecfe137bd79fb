//! What is wanted of a VM and of a vdc. The parts are valid by type; how they fit together is checked where the state
//! is known. Stored as JSON, hence serde: a field may be added with a default, none may change its meaning.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{Cidr, Cmdline, MacAddr, MachineSpec, MemorySize, Name, VcpuCount, VolumeSize};

/// Counts the changes of a resource.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Generation(pub u64);

impl Generation {
    /// The first.
    pub const FIRST: Self = Self(1);

    /// The next.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// Amounts of the three resources: a quota, what is used, or what is asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quota {
    /// Virtual processors.
    pub vcpus: u64,
    /// Guest memory, bytes.
    pub memory_bytes: u64,
    /// Volumes as provisioned, bytes.
    pub storage_bytes: u64,
}

/// What is wanted of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// Virtual processors.
    pub vcpus: VcpuCount,
    /// Guest memory.
    pub memory: MemorySize,
    /// Gives the kernel, and the root volume its content.
    pub image: Name,
    /// The root volume's size; the image's when absent.
    pub root_disk: Option<VolumeSize>,
    /// More volumes of the same vdc, in the guest's order.
    pub volumes: Vec<Name>,
    /// Network cards, in the guest's order.
    pub nics: Vec<NicSpec>,
    /// Replaces the image's command line.
    pub cmdline: Option<Cmdline>,
    /// A seed disk is made when present.
    pub cloud_init: Option<CloudInit>,
    /// What to do when it ends by itself.
    pub restart_policy: RestartPolicy,
    /// Where the kernel comes from.
    #[serde(default)]
    pub boot: BootFrom,
    /// Its other devices, and their limits.
    #[serde(default)]
    pub machine: MachineSpec,
}

/// Where a VM's kernel comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootFrom {
    /// The image's kernel if it has one, else the root disk.
    #[default]
    Auto,
    /// The image's kernel.
    Image,
    /// The root disk: what its boot loader would boot is looked for at each start.
    Disk,
}

/// What a VM booted from its root disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootedKernel {
    /// The kernel, from its file system's root.
    pub path: String,
    /// Its version as far as it is known.
    pub version: String,
    /// The entry as a boot loader's menu shows it.
    pub title: String,
    /// The file that says so.
    pub source: String,
    /// The partition of that file; 0: the disk has none.
    pub partition: u32,
    /// The command line.
    pub cmdline: String,
}

/// A network card on the vdc's bridge.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicSpec {
    /// Chosen when absent; always there in a stored spec.
    pub mac: Option<MacAddr>,
    /// For the seed.
    pub address: Option<Cidr>,
    /// For the seed.
    pub gateway: Option<IpAddr>,
}

/// What the seed says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloudInit {
    /// The VM's name when absent.
    pub hostname: Option<String>,
    /// Lines of authorized_keys.
    pub ssh_keys: Vec<String>,
    /// As cloud-init takes it; made from the fields above when absent.
    pub user_data: Option<String>,
}

/// What to do when a VM ends by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Leave it.
    Never,
    /// Start it again when it broke.
    #[default]
    OnFailure,
    /// Start it again also after it powered off.
    Always,
}

/// Whether a VM should run. Kept in the store: it is what a restarted `seriod` works towards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Desired {
    /// It should.
    Running,
    /// It should not.
    Stopped,
}
