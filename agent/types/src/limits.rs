//! Numbers and texts with limits: once made, they are within them.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::ByteSize;

/// The most vcpus of a VM.
pub const VCPUS_MAX: u32 = 64;
/// The least guest memory.
pub const MEMORY_BYTES_MIN: u64 = 16 << 20;
/// The most guest memory: below what the guest's physical addresses hold.
pub const MEMORY_BYTES_MAX: u64 = 1 << 40;
/// Guest memory is a multiple of this.
pub const MEMORY_GRAIN_BYTES: u64 = 1 << 20;
/// The least size of a volume.
pub const VOLUME_BYTES_MIN: u64 = 1 << 20;
/// The most size of a volume.
pub const VOLUME_BYTES_MAX: u64 = 64 << 40;
/// A volume's size is a multiple of this: the grain of its map.
pub const VOLUME_GRAIN_BYTES: u64 = 4096;
/// The longest kernel command line, bytes: x86 kernels take 2048 with the ending zero (`COMMAND_LINE_SIZE`).
pub const CMDLINE_BYTES_MAX: usize = 2047;

/// Why a value is out of its limits. The text names the value and what is allowed; the caller adds the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// Vcpus.
    #[error("{0} vcpus: a VM has 1 to {VCPUS_MAX}")]
    Vcpus(u32),
    /// Memory too small or large.
    #[error("{0} of memory: a VM has {min} to {max}", min = ByteSize::from_bytes(MEMORY_BYTES_MIN), max = ByteSize::from_bytes(MEMORY_BYTES_MAX))]
    MemoryRange(ByteSize),
    /// Memory not a multiple.
    #[error("{0} bytes of memory is not a multiple of 1MiB: use {down} or {up}", down = ByteSize::from_bytes(.0 - .0 % MEMORY_GRAIN_BYTES), up = ByteSize::from_bytes(.0 - .0 % MEMORY_GRAIN_BYTES + MEMORY_GRAIN_BYTES))]
    MemoryGrain(u64),
    /// Volume too small or large.
    #[error("a volume of {0}: its size is {min} to {max}", min = ByteSize::from_bytes(VOLUME_BYTES_MIN), max = ByteSize::from_bytes(VOLUME_BYTES_MAX))]
    VolumeRange(ByteSize),
    /// Volume size not a multiple.
    #[error("a volume of {0} bytes: its size must be a multiple of 4KiB")]
    VolumeGrain(u64),
    /// Command line too long.
    #[error("the kernel command line has {0} bytes: the kernel takes at most {CMDLINE_BYTES_MAX}")]
    CmdlineLength(usize),
    /// Command line with a character that is not printable.
    #[error("the kernel command line has the character {0:?}: use printable ASCII only")]
    CmdlineCharacter(char),
}

/// 1 to 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct VcpuCount(u32);

impl VcpuCount {
    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for VcpuCount {
    type Error = LimitError;
    fn try_from(vcpus: u32) -> Result<Self, LimitError> {
        if (1..=VCPUS_MAX).contains(&vcpus) { Ok(Self(vcpus)) } else { Err(LimitError::Vcpus(vcpus)) }
    }
}

impl From<VcpuCount> for u32 {
    fn from(vcpus: VcpuCount) -> Self {
        vcpus.0
    }
}

/// Guest memory: at least 16 MiB, a multiple of 1 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct MemorySize(u64);

impl MemorySize {
    /// In bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl TryFrom<u64> for MemorySize {
    type Error = LimitError;
    fn try_from(bytes: u64) -> Result<Self, LimitError> {
        if !(MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&bytes) {
            Err(LimitError::MemoryRange(ByteSize::from_bytes(bytes)))
        } else if !bytes.is_multiple_of(MEMORY_GRAIN_BYTES) {
            Err(LimitError::MemoryGrain(bytes))
        } else {
            Ok(Self(bytes))
        }
    }
}

impl From<MemorySize> for u64 {
    fn from(size: MemorySize) -> Self {
        size.0
    }
}

/// The size of a volume: 1 MiB to 64 TiB, a multiple of 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct VolumeSize(u64);

impl VolumeSize {
    /// In bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// The smallest volume that holds so many bytes.
    pub fn holding(bytes: u64) -> Result<Self, LimitError> {
        let rounded = bytes
            .max(VOLUME_BYTES_MIN)
            .checked_next_multiple_of(VOLUME_GRAIN_BYTES)
            .ok_or(LimitError::VolumeRange(ByteSize::from_bytes(bytes)))?;
        Self::try_from(rounded)
    }
}

impl TryFrom<u64> for VolumeSize {
    type Error = LimitError;
    fn try_from(bytes: u64) -> Result<Self, LimitError> {
        if !(VOLUME_BYTES_MIN..=VOLUME_BYTES_MAX).contains(&bytes) {
            Err(LimitError::VolumeRange(ByteSize::from_bytes(bytes)))
        } else if !bytes.is_multiple_of(VOLUME_GRAIN_BYTES) {
            Err(LimitError::VolumeGrain(bytes))
        } else {
            Ok(Self(bytes))
        }
    }
}

impl From<VolumeSize> for u64 {
    fn from(size: VolumeSize) -> Self {
        size.0
    }
}

/// A kernel command line: printable ASCII, at most 2047 bytes. May be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cmdline(String);

impl Cmdline {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Cmdline {
    type Error = LimitError;
    fn try_from(text: String) -> Result<Self, LimitError> {
        if text.len() > CMDLINE_BYTES_MAX {
            return Err(LimitError::CmdlineLength(text.len()));
        }
        match text.chars().find(|c| !(c.is_ascii_graphic() || *c == ' ')) {
            Some(bad) => Err(LimitError::CmdlineCharacter(bad)),
            None => Ok(Self(text)),
        }
    }
}

impl From<Cmdline> for String {
    fn from(cmdline: Cmdline) -> Self {
        cmdline.0
    }
}

impl fmt::Display for Cmdline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_hold_at_their_edges() {
        assert!(VcpuCount::try_from(0).is_err() && VcpuCount::try_from(1000).is_err());
        assert!(VcpuCount::try_from(1).is_ok() && VcpuCount::try_from(64).is_ok());
        assert!(MemorySize::try_from((16 << 20) - 1).is_err() && MemorySize::try_from(16 << 20).is_ok());
        let error = MemorySize::try_from((16 << 20) + 1).unwrap_err().to_string();
        assert_eq!(error, "16777217 bytes of memory is not a multiple of 1MiB: use 16MiB or 17MiB");
        assert!(MemorySize::try_from(u64::MAX).is_err());
        assert!(VolumeSize::try_from(4096).is_err() && VolumeSize::try_from(1 << 20).is_ok());
        assert!(VolumeSize::try_from((1 << 20) + 512).is_err());
        assert_eq!(VolumeSize::holding(5000).unwrap().bytes(), 1 << 20);
        assert!(VolumeSize::holding(u64::MAX).is_err());
        assert!(Cmdline::try_from("console=ttyS0 quiet".to_owned()).is_ok());
        assert!(Cmdline::try_from("a\nb".to_owned()).is_err());
        assert!(Cmdline::try_from("a".repeat(2048)).is_err());
    }
}
