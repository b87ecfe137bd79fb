//! The messages about what a volume boots with. Part of [`crate::message`]; the same rule holds: tags are never reused.

use crate::message::VdcKey;

/// Find what a volume boots with, and copy it out. Descriptors: where the kernel goes, where the initrds go (files that
/// are empty), then data, map of each layer, oldest first. Answered by [`FoundKernel`]. The volume is a tenant's: the
/// process may die of it, and the asker bounds its time.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct FindKernel {
    /// The volume's id.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// Of an encrypted volume.
    #[prost(message, optional, tag = "2")]
    pub key: Option<VdcKey>,
    /// A larger kernel is refused.
    #[prost(uint64, tag = "3")]
    pub kernel_bytes_max: u64,
    /// More in all initrds is refused.
    #[prost(uint64, tag = "4")]
    pub initrd_bytes_max: u64,
    /// The user and group that the process becomes, or 0.
    #[prost(uint32, tag = "5")]
    pub uid: u32,
}

/// What was found, and copied.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct FoundKernel {
    /// The kernel, from its file system's root.
    #[prost(string, tag = "1")]
    pub kernel_path: String,
    /// Its version as far as it is known.
    #[prost(string, tag = "2")]
    pub version: String,
    /// The entry as a boot loader's menu shows it.
    #[prost(string, tag = "3")]
    pub title: String,
    /// The file that says so.
    #[prost(string, tag = "4")]
    pub source: String,
    /// The partition of that file; 0: the disk has none.
    #[prost(uint32, tag = "5")]
    pub partition: u32,
    /// The command line, with a console if it named none.
    #[prost(string, tag = "6")]
    pub cmdline: String,
    /// Of the kernel.
    #[prost(uint64, tag = "7")]
    pub kernel_bytes: u64,
    /// Of all initrds; 0: there is none.
    #[prost(uint64, tag = "8")]
    pub initrd_bytes: u64,
    /// Where they came from.
    #[prost(string, repeated, tag = "9")]
    pub initrd_paths: Vec<String>,
}
