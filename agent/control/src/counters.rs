//! What a VMM counts: exits of vcpus, requests of disks, packets of network cards, devices that gave up. Tags are never reused.
//!
//! Numbers only grow, but for those of vcpus and devices, which begin anew when the guest boots again.

/// Everything that a VMM counts.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct VmCounters {
    /// By their numbers.
    #[prost(message, repeated, tag = "1")]
    pub vcpus: Vec<VcpuCounters>,
    /// In the guest's order.
    #[prost(message, repeated, tag = "2")]
    pub disks: Vec<DiskCounters>,
    /// In the guest's order.
    #[prost(message, repeated, tag = "3")]
    pub nics: Vec<NicCounters>,
    /// Those that do not work: the guest has to reset them.
    #[prost(message, repeated, tag = "4")]
    pub failed: Vec<FailedDevice>,
}

/// Why a vcpu left the guest, how often. What the kernel handles by itself is not in here.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct VcpuCounters {
    /// Reads of ports.
    #[prost(uint64, tag = "1")]
    pub port_reads: u64,
    /// Writes of ports.
    #[prost(uint64, tag = "2")]
    pub port_writes: u64,
    /// Reads of registers in memory.
    #[prost(uint64, tag = "3")]
    pub memory_reads: u64,
    /// Writes of registers in memory.
    #[prost(uint64, tag = "4")]
    pub memory_writes: u64,
    /// It was called out of the guest: a pause, the end.
    #[prost(uint64, tag = "5")]
    pub kicks: u64,
}

/// One disk.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DiskCounters {
    /// As in `Disk::volume_id`.
    #[prost(string, tag = "1")]
    pub volume_id: String,
    /// Reads.
    #[prost(message, optional, tag = "2")]
    pub reads: Option<OpCounters>,
    /// Writes.
    #[prost(message, optional, tag = "3")]
    pub writes: Option<OpCounters>,
    /// Flushes.
    #[prost(message, optional, tag = "4")]
    pub flushes: Option<OpCounters>,
    /// Discards and zeroes.
    #[prost(message, optional, tag = "5")]
    pub discards: Option<OpCounters>,
    /// Requests that made no sense to the device: beyond the end, of an unknown kind, writes to what is read-only.
    #[prost(uint64, tag = "6")]
    pub refused: u64,
}

/// One kind of request.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct OpCounters {
    /// Requests that were done.
    #[prost(uint64, tag = "1")]
    pub done: u64,
    /// Their bytes.
    #[prost(uint64, tag = "2")]
    pub bytes: u64,
    /// Requests that the guest got an error for, because the host had one.
    #[prost(uint64, tag = "3")]
    pub errors: u64,
    /// From the ring to the answer, by buckets (not cumulative): up to 16 µs, 32 µs, and so on doubling; the last has no
    /// bound. A reader that finds more or fewer of them goes on doubling.
    #[prost(uint64, repeated, tag = "4")]
    pub buckets: Vec<u64>,
    /// All those times together.
    #[prost(uint64, tag = "5")]
    pub sum_us: u64,
}

/// One network card, seen by the guest.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct NicCounters {
    /// Its address, `52:54:00:12:34:56`.
    #[prost(string, tag = "1")]
    pub mac: String,
    /// To the guest.
    #[prost(message, optional, tag = "2")]
    pub received: Option<PacketCounters>,
    /// From the guest.
    #[prost(message, optional, tag = "3")]
    pub sent: Option<PacketCounters>,
    /// The tap's interface, as it was called when it was opened.
    #[prost(string, tag = "4")]
    pub tap: String,
    /// Queue pairs whose packets the kernel moves by itself (vhost-net). It counts them at the tap, and nobody here.
    #[prost(uint32, tag = "5")]
    pub pairs_in_kernel: u32,
}

/// One direction of a card.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct PacketCounters {
    /// Packets that got through.
    #[prost(uint64, tag = "1")]
    pub packets: u64,
    /// Their bytes.
    #[prost(uint64, tag = "2")]
    pub bytes: u64,
    /// Packets that were lost in the card. Those that the tap's own queue lost are counted by its interface alone.
    #[prost(uint64, tag = "3")]
    pub drops: u64,
}

/// A device that does not work: it could not start, or its driver broke a ring.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct FailedDevice {
    /// Its number on the PCI bus.
    #[prost(uint32, tag = "1")]
    pub slot: u32,
    /// What it is (virtio 1.2 §5): 1 net, 2 block, 3 console, 4 entropy, 5 balloon, 19 vsock.
    #[prost(uint32, tag = "2")]
    pub device_id: u32,
    /// Why.
    #[prost(string, tag = "3")]
    pub reason: String,
}
