//! Messages about a VM's smaller devices: vsock, balloon, counters. Tags are never reused.

/// Stream connections between the guest and Unix sockets of the host.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Vsock {
    /// The guest's address: 3 or more. Need not be unique on a host.
    #[prost(uint32, tag = "1")]
    pub guest_cid: u32,
    /// A listening Unix stream socket: a client writes `CONNECT PORT\n` and reads `OK HOSTPORT\n`.
    #[prost(uint32, tag = "2")]
    pub listener_fd: u32,
    /// A connected `SOCK_SEQPACKET` socket: asked for a socket when the guest connects to a port of the host (`id: u32,
    /// port: u32`, answered by `id: u32, errno: u32` with a descriptor when it is 0). Without one all are refused.
    #[prost(uint32, optional, tag = "3")]
    pub broker_fd: Option<u32>,
}

/// Ask the guest to have so much in its balloon.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct SetBalloon {
    /// Bytes, rounded down to pages of 4 KiB; at most the VM's memory. The guest follows in its own time.
    #[prost(uint64, tag = "1")]
    pub target_bytes: u64,
}

/// How the balloon stands.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct BalloonStats {
    /// What was asked for.
    #[prost(uint64, tag = "1")]
    pub target_bytes: u64,
    /// What the guest says that it has given up.
    #[prost(uint64, tag = "2")]
    pub actual_bytes: u64,
    /// Given back to the host since the VM was launched, reports of free pages included.
    #[prost(uint64, tag = "3")]
    pub released_bytes: u64,
    /// The guest's statistics: by tag, as virtio 1.2 §5.5.6.3 has them.
    #[prost(btree_map = "uint32, uint64", tag = "4")]
    pub guest: std::collections::BTreeMap<u32, u64>,
    /// How old they are; 0 and an empty map: none came yet.
    #[prost(uint64, tag = "5")]
    pub age_ms: u64,
}

/// What the host keeps a device from doing, as long as it does.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Trouble {
    /// Of what kind.
    #[prost(enumeration = "TroubleKind", tag = "1")]
    pub kind: i32,
    /// As in `Disk::volume_id`, or a card's address, `52:54:00:12:34:56`.
    #[prost(string, tag = "2")]
    pub device: String,
    /// For the person.
    #[prost(string, tag = "3")]
    pub reason: String,
}

/// What a trouble is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum TroubleKind {
    /// Newer than the reader.
    Unknown = 0,
    /// A disk's requests wait for room on the host's disk.
    DiskHeld = 1,
    /// A card's tap is gone.
    Unplugged = 2,
}

/// What happens to a guest that started its watchdog and does not pet it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum OnWatchdog {
    /// As if the guest had reset itself.
    Reset = 0,
    /// The VM ends as by a guest's error, with that reason.
    End = 1,
}
