//! What a VM's machine has beyond processors, memory, disks and cards. Stored as JSON in the VM's spec: a field may be added
//! with a default, none may change its meaning.

use serde::{Deserialize, Serialize};

use crate::{ByteSize, MemorySize, Name};

/// The smallest and largest frame of a card, bytes: what IPv4 asks of every link (RFC 791), and what bridges carry.
pub const MTU_MIN: u32 = 576;
/// See [`MTU_MIN`].
pub const MTU_MAX: u32 = 9000;
/// What every network takes.
pub const MTU: u32 = 1500;

/// Why a machine cannot be like that. The text says what would be right; the caller adds the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MachineError {
    /// No such page.
    #[error("{0} is no size of the host's pages: 4KiB, 2MiB or 1GiB")]
    Pages(ByteSize),
    /// The memory is not made of such pages.
    #[error("memory of {memory} is not a multiple of the page size {page}")]
    Grain {
        /// The VM's.
        memory: ByteSize,
        /// The page's.
        page: ByteSize,
    },
    /// No such processor.
    #[error("`{0}` is no CPU baseline: host, x86-64-v2 or x86-64-v3")]
    Cpu(String),
    /// The balloon would take too much.
    #[error("a balloon of {target} leaves {left} of memory, less than {floor}")]
    Balloon {
        /// What it shall have.
        target: ByteSize,
        /// What the guest keeps then.
        left: ByteSize,
        /// What it must keep.
        floor: ByteSize,
    },
    /// No such frame.
    #[error("an MTU of {0} bytes: give {MTU_MIN} to {MTU_MAX}, or 0 for {MTU}")]
    Mtu(u32),
    /// A burst of nothing.
    #[error("a burst without the limit that it is a burst of")]
    Burst,
}

/// The machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MachineSpec {
    /// Connections between the guest and Unix sockets of the host.
    pub vsock: bool,
    /// What happens to a guest that does not pet its watchdog.
    pub watchdog: Watchdog,
    /// The host's pages behind the memory.
    pub pages: PageSize,
    /// What the guest sees of the processor.
    pub cpu: CpuBaseline,
    /// Memory that the guest is asked to give back.
    pub balloon: Balloon,
    /// What each disk may do.
    pub disk_limits: IoLimits,
    /// What each card may do, in each direction.
    pub nic_limits: IoLimits,
    /// The cards' largest frame, bytes; 0: [`MTU`].
    pub mtu: u32,
    /// Single disks and cards with limits of their own; sorted, each once.
    pub device_limits: Vec<DeviceLimits>,
}

impl MachineSpec {
    /// Bytes of a card's frame.
    #[must_use]
    pub const fn mtu(&self) -> u32 {
        if self.mtu == 0 { MTU } else { self.mtu }
    }

    /// What is wrong with it, by field, on a VM with that memory.
    #[must_use]
    pub fn problems(&self, memory: MemorySize) -> Vec<(&'static str, MachineError)> {
        let mut wrong = Vec::new();
        let (bytes, page) = (memory.bytes(), self.pages.bytes());
        if !bytes.is_multiple_of(page) {
            let (memory, page) = (ByteSize::from_bytes(bytes), ByteSize::from_bytes(page));
            wrong.push(("page_bytes", MachineError::Grain { memory, page }));
        }
        let left = bytes.saturating_sub(self.balloon.target_bytes);
        let floor = self.balloon.floor_bytes.max(crate::limits::MEMORY_BYTES_MIN);
        if self.balloon.target_bytes > 0 && left < floor {
            let target = ByteSize::from_bytes(self.balloon.target_bytes);
            let (left, floor) = (ByteSize::from_bytes(left), ByteSize::from_bytes(floor));
            wrong.push(("balloon.target_bytes", MachineError::Balloon { target, left, floor }));
        }
        if self.mtu != 0 && !(MTU_MIN..=MTU_MAX).contains(&self.mtu) {
            wrong.push(("mtu", MachineError::Mtu(self.mtu)));
        }
        let single = self.device_limits.iter().map(|one| ("device_limits", &one.limits));
        let all = [("disk_limits", &self.disk_limits), ("nic_limits", &self.nic_limits)];
        for (field, limits) in all.into_iter().chain(single) {
            if limits.is_lone_burst() {
                wrong.push((field, MachineError::Burst));
            }
        }
        wrong
    }

    /// What this disk or card may do.
    #[must_use]
    pub fn limits_of(&self, device: &LimitedDevice) -> &IoLimits {
        let own = self.device_limits.iter().find(|one| one.device == *device).map(|one| &one.limits);
        own.unwrap_or(match device {
            LimitedDevice::Root | LimitedDevice::Volume(_) => &self.disk_limits,
            LimitedDevice::Nic(_) => &self.nic_limits,
        })
    }

    /// Gives a device limits of its own, or takes them away.
    pub fn set_limits_of(&mut self, device: LimitedDevice, limits: Option<IoLimits>) {
        self.device_limits.retain(|one| one.device != device);
        self.device_limits.extend(limits.map(|limits| DeviceLimits { device, limits }));
        self.device_limits.sort_by(|a, b| a.device.cmp(&b.device));
    }

    /// The card at that place has gone: those behind it move up, with their limits.
    pub fn forget_nic(&mut self, gone: u32) {
        self.device_limits.retain(|one| one.device != LimitedDevice::Nic(gone));
        for one in &mut self.device_limits {
            match &mut one.device {
                LimitedDevice::Nic(index) if *index > gone => *index = index.saturating_sub(1),
                _ => {}
            }
        }
    }
}

/// What happens to a guest that started its watchdog and does not pet it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Watchdog {
    /// It is reset.
    #[default]
    Reset,
    /// The VM ends by failure, and its restart policy decides.
    End,
}

/// The host's pages behind a VM's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PageSize {
    /// 4 KiB.
    #[default]
    Small,
    /// 2 MiB, of those that the host has set aside.
    Huge,
    /// 1 GiB, of those that the host has set aside.
    Giant,
}

impl PageSize {
    /// Its size.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        match self {
            Self::Small => 4 << 10,
            Self::Huge => 2 << 20,
            Self::Giant => 1 << 30,
        }
    }
}

impl TryFrom<u64> for PageSize {
    type Error = MachineError;

    /// 0 is the ordinary one.
    fn try_from(bytes: u64) -> Result<Self, MachineError> {
        let all = [Self::Small, Self::Huge, Self::Giant];
        let found = all.into_iter().find(|page| bytes == page.bytes() || bytes == 0);
        found.ok_or(MachineError::Pages(ByteSize::from_bytes(bytes)))
    }
}

/// What a guest sees of the processor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CpuBaseline {
    /// All that the host has.
    #[default]
    Host,
    /// The x86-64 psABI's second level.
    X86_64V2,
    /// Its third.
    X86_64V3,
}

impl CpuBaseline {
    /// As users and VMMs write it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::X86_64V2 => "x86-64-v2",
            Self::X86_64V3 => "x86-64-v3",
        }
    }
}

impl std::str::FromStr for CpuBaseline {
    type Err = MachineError;

    fn from_str(text: &str) -> Result<Self, MachineError> {
        let all = [Self::Host, Self::X86_64V2, Self::X86_64V3];
        let found = all.into_iter().find(|cpu| cpu.as_str() == text || text.is_empty());
        found.ok_or_else(|| MachineError::Cpu(text.to_owned()))
    }
}

/// Memory that a guest is asked to give back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Balloon {
    /// So much, bytes.
    pub target_bytes: u64,
    /// But never so much that it keeps less, bytes; 0: the least that a VM has.
    pub floor_bytes: u64,
}

/// Bounds of a device, each with what may pass at once after a rest. 0: no bound, or the usual burst.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IoLimits {
    /// Bytes.
    pub bytes_per_second: u64,
    /// Bytes.
    pub bytes_burst: u64,
    /// Requests of a disk, packets of a card.
    pub operations_per_second: u64,
    /// As many.
    pub operations_burst: u64,
}

/// A device that may have limits of its own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LimitedDevice {
    /// The root disk.
    Root,
    /// Another volume, of the VM's vdc.
    Volume(Name),
    /// The card with this place in the spec, from 0.
    Nic(u32),
}

/// What one disk or card may do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceLimits {
    /// Which.
    pub device: LimitedDevice,
    /// Its own.
    pub limits: IoLimits,
}

impl IoLimits {
    /// Whether nothing is bounded.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    const fn is_lone_burst(&self) -> bool {
        (self.bytes_burst > 0 && self.bytes_per_second == 0)
            || (self.operations_burst > 0 && self.operations_per_second == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_named_by_field() {
        let memory = MemorySize::try_from(64 << 20).unwrap();
        assert_eq!(MachineSpec::default().problems(memory), []);
        let spec = MachineSpec {
            pages: PageSize::Giant,
            balloon: Balloon { target_bytes: 40 << 20, floor_bytes: 32 << 20 },
            mtu: 100,
            nic_limits: IoLimits { bytes_burst: 1, ..IoLimits::default() },
            ..MachineSpec::default()
        };
        let fields: Vec<&str> = spec.problems(memory).iter().map(|(field, _)| *field).collect();
        assert_eq!(fields, ["page_bytes", "balloon.target_bytes", "mtu", "nic_limits"]);
        let fits = MachineSpec { pages: PageSize::Huge, mtu: 9000, ..MachineSpec::default() };
        assert_eq!(fits.problems(memory), []);
        assert_eq!(fits.mtu(), 9000);
    }

    #[test]
    fn a_device_with_limits_of_its_own_has_those_and_no_others() {
        let limits = |n| IoLimits { operations_per_second: n, ..IoLimits::default() };
        let mut spec =
            MachineSpec { disk_limits: limits(1), nic_limits: limits(2), ..MachineSpec::default() };
        let data = LimitedDevice::Volume("data".parse().unwrap());
        spec.set_limits_of(data.clone(), Some(limits(3)));
        spec.set_limits_of(LimitedDevice::Nic(1), Some(limits(4)));
        spec.set_limits_of(data.clone(), Some(limits(5)));
        let found = |spec: &MachineSpec| {
            [LimitedDevice::Root, data.clone(), LimitedDevice::Nic(0), LimitedDevice::Nic(1)]
                .map(|device| spec.limits_of(&device).operations_per_second)
        };
        assert_eq!(found(&spec), [1, 5, 2, 4]);
        spec.set_limits_of(data.clone(), None);
        assert_eq!(found(&spec), [1, 1, 2, 4]);
        spec.forget_nic(0);
        assert_eq!(found(&spec), [1, 1, 4, 2], "the second card is the first now");
        spec.forget_nic(0);
        assert_eq!(found(&spec), [1, 1, 2, 2]);
    }

    #[test]
    fn names_and_sizes() {
        assert_eq!("x86-64-v3".parse(), Ok(CpuBaseline::X86_64V3));
        assert_eq!("".parse(), Ok(CpuBaseline::Host));
        assert!("x86-64-v4".parse::<CpuBaseline>().is_err());
        assert_eq!(PageSize::try_from(0), Ok(PageSize::Small));
        assert_eq!(PageSize::try_from(2 << 20), Ok(PageSize::Huge));
        assert!(PageSize::try_from(3).is_err());
    }
}
