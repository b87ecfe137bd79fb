//! What a `Launch` says of a VM's devices beyond its disks' files, and devices that come and go later.

use crate::message::Disk;

/// The most queue pairs of a card: beyond, threads cost more than they bring.
pub const NIC_PAIRS_MAX: u32 = 4;

/// How many queue pairs a card gets in a VM with so many vcpus.
#[must_use]
pub fn nic_pairs(vcpus: u32) -> u32 {
    vcpus.clamp(1, NIC_PAIRS_MAX)
}

/// A NIC of a VM.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Nic {
    /// Six bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub mac: Vec<u8>,
    /// An open tap with `IFF_VNET_HDR`: the queue of the card's first pair.
    #[prost(uint32, tag = "2")]
    pub tap_fd: u32,
    /// Bytes.
    #[prost(uint32, tag = "3")]
    pub mtu: u32,
    /// What it may do, in each direction.
    #[prost(message, optional, tag = "4")]
    pub limits: Option<Limits>,
    /// Further queues of the same tap, in their order: one for each further queue pair. At most [`NIC_PAIRS_MAX`] with the first.
    #[prost(uint32, repeated, tag = "5")]
    pub more_tap_fds: Vec<u32>,
    /// Open `/dev/vhost-net`s, one for each queue pair: the kernel may move the card's packets. Empty: it may not, or cannot.
    #[prost(uint32, repeated, tag = "6")]
    pub vhost_fds: Vec<u32>,
}

/// Bounds of a device, each with what may pass at once after a rest. 0: no bound, or the usual burst.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Limits {
    /// Bytes.
    #[prost(uint64, tag = "1")]
    pub bytes_per_second: u64,
    /// Bytes.
    #[prost(uint64, tag = "2")]
    pub bytes_burst: u64,
    /// Requests of a disk, packets of a network card.
    #[prost(uint64, tag = "3")]
    pub operations_per_second: u64,
    /// As many.
    #[prost(uint64, tag = "4")]
    pub operations_burst: u64,
}

/// What disks and cards may do from now on. Those that are not named stay as they are; all are looked up before any changes.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct SetLimits {
    /// Of disks.
    #[prost(message, repeated, tag = "1")]
    pub disks: Vec<DiskLimits>,
    /// Of cards.
    #[prost(message, repeated, tag = "2")]
    pub nics: Vec<NicLimits>,
}

/// What a disk may do.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DiskLimits {
    /// As in `Disk::volume_id`.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// Absent: no bounds.
    #[prost(message, optional, tag = "2")]
    pub limits: Option<Limits>,
}

/// What a card may do.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct NicLimits {
    /// As in [`Nic::mac`].
    #[prost(bytes = "vec", tag = "1")]
    pub mac: Vec<u8>,
    /// Absent: no bounds.
    #[prost(message, optional, tag = "2")]
    pub limits: Option<Limits>,
}

/// Give the running guest one more disk or card; exactly one. Done when it is there and the guest was told; one of that name or
/// address that is there already is left as it is.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Plug {
    /// A disk.
    #[prost(message, optional, tag = "1")]
    pub disk: Option<Disk>,
    /// A card.
    #[prost(message, optional, tag = "2")]
    pub nic: Option<Nic>,
    /// Its place among the disks or the cards, as a launch would name them.
    #[prost(uint32, tag = "3")]
    pub position: u32,
}

/// Take a disk or a card away; exactly one. Done when the guest has let go of it and it is closed; also when there is none.
/// Refused when the guest does not let go in time: then it stays.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Unplug {
    /// As in [`Disk::volume_id`]; empty: a card.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// As in [`Nic::mac`]; empty: a disk.
    #[prost(bytes = "vec", tag = "2")]
    pub mac: Vec<u8>,
    /// How long the guest may take.
    #[prost(uint32, tag = "3")]
    pub wait_ms: u32,
}
