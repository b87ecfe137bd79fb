//! What suspended devices leave behind, and why they cannot be suspended or restored.
//!
//! The state of one PCI function is a [`FunctionState`]: its registers, its MSI-X vectors, the registers and positions of
//! its queues, and what the device itself remembers. It is a protobuf message: fields are added and their numbers never
//! used again, so an older state restores, with what it does not say at its value after power-on. A state comes from a file,
//! hence is not trusted: whatever the guest could not have written into a register is not taken from there either.

use std::io;

/// What a device remembers beyond its registers and queues: bytes in a layout that its version names.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct DeviceState {
    /// The layout of `bytes`; 0 where there is nothing to remember.
    #[prost(uint32, tag = "1")]
    pub version: u32,
    /// The device's own.
    #[prost(bytes = "vec", tag = "2")]
    pub bytes: Vec<u8>,
}

impl DeviceState {
    /// A state of this layout.
    #[must_use]
    pub fn new(version: u32, bytes: impl Into<Vec<u8>>) -> Self {
        Self { version, bytes: bytes.into() }
    }

    /// For a device that remembers nothing.
    pub fn refuse_unless_empty(&self) -> Result<(), RestoreError> {
        if self.version == 0 && self.bytes.is_empty() {
            return Ok(());
        }
        Err(RestoreError::Version { found: self.version, known: 0 })
    }

    /// The bytes, exactly so many, if they have this version's layout. An empty state is `None`: all at its start.
    pub fn fixed<const N: usize>(&self, version: u32) -> Result<Option<[u8; N]>, RestoreError> {
        if self.version == 0 && self.bytes.is_empty() {
            return Ok(None);
        }
        if self.version != version {
            return Err(RestoreError::Version { found: self.version, known: version });
        }
        let wrong = || RestoreError::Malformed { what: format!("{} bytes, not {N}", self.bytes.len()) };
        <[u8; N]>::try_from(self.bytes.as_slice()).map(Some).map_err(|_| wrong())
    }
}

/// A device cannot be suspended. It is stopped then, and only a reset of the guest's driver brings it back.
#[derive(Debug, thiserror::Error)]
pub enum SuspendError {
    /// A thread of the device ended by itself, and its queue with it: a mistake of ours.
    #[error("a thread of the device has ended before")]
    ThreadLost,
    /// The host did not let it finish what it was doing.
    #[error("cannot {what}")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// A saved state does not fit the device that shall have it.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state is laid out in a way that this program does not know.
    #[error(
        "its state has version {found}, up to {known} is known here: use the newer serio-vmm that saved it"
    )]
    Version {
        /// The state's.
        found: u32,
        /// This program's.
        known: u32,
    },
    /// Another kind of device, or one with other queues or features.
    #[error(
        "it was saved with {what} {saved}, and is made with {made}: give the VM the devices it was saved with"
    )]
    Differs {
        /// What.
        what: &'static str,
        /// As saved.
        saved: String,
        /// As the device is.
        made: String,
    },
    /// The state makes no sense.
    #[error("its state is damaged: {what}")]
    Malformed {
        /// What is wrong.
        what: String,
    },
    /// KVM refused an interrupt or a doorbell of it.
    #[error("cannot {what}")]
    Io {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// A device on the bus could not be suspended.
#[derive(Debug, thiserror::Error)]
#[error("the device at 00:{slot:02x}.0 cannot be suspended")]
pub struct BusSuspendError {
    /// Its device number.
    pub slot: usize,
    /// Why.
    #[source]
    pub source: SuspendError,
}

/// The bus does not fit its saved state.
#[derive(Debug, thiserror::Error)]
pub enum BusRestoreError {
    /// Another number of devices.
    #[error(
        "the VM was saved with {saved} PCI functions, and has {made} now: give it the devices it was saved with"
    )]
    Count {
        /// As saved.
        saved: usize,
        /// As there are.
        made: usize,
    },
    /// One of them does not fit.
    #[error("the device at 00:{slot:02x}.0 cannot be restored")]
    Function {
        /// Its device number.
        slot: usize,
        /// Why.
        #[source]
        source: RestoreError,
    },
}

/// One PCI function.
#[derive(Clone, PartialEq, prost::Message)]
pub struct FunctionState {
    /// The first 256 bytes of its configuration space. Only what the guest can write is taken back from them.
    #[prost(bytes = "vec", tag = "1")]
    pub config: Vec<u8>,
    /// The virtio part; absent for the host bridge.
    #[prost(message, optional, tag = "2")]
    pub virtio: Option<VirtioState>,
}

/// The virtio registers of a function, virtio 1.2 §4.1.4.3 in names and meanings.
#[derive(Clone, PartialEq, prost::Message)]
pub struct VirtioState {
    /// The device type.
    #[prost(uint32, tag = "1")]
    pub device_id: u32,
    /// What was agreed.
    #[prost(uint64, tag = "2")]
    pub driver_features: u64,
    /// `device_feature_select`.
    #[prost(uint32, tag = "3")]
    pub device_feature_select: u32,
    /// `driver_feature_select`.
    #[prost(uint32, tag = "4")]
    pub driver_feature_select: u32,
    /// `queue_select`.
    #[prost(uint32, tag = "5")]
    pub queue_select: u32,
    /// `device_status`.
    #[prost(uint32, tag = "6")]
    pub status: u32,
    /// `config_generation`.
    #[prost(uint32, tag = "7")]
    pub generation: u32,
    /// `config_msix_vector`.
    #[prost(uint32, tag = "8")]
    pub config_vector: u32,
    /// ISR status bits not yet read.
    #[prost(uint32, tag = "9")]
    pub isr: u32,
    /// All queues of the device.
    #[prost(message, repeated, tag = "10")]
    pub queues: Vec<QueueState>,
    /// All vectors of the MSI-X table. Enable and function mask stand in the configuration space.
    #[prost(message, repeated, tag = "11")]
    pub vectors: Vec<VectorState>,
    /// What the device itself remembers.
    #[prost(message, optional, tag = "12")]
    pub device: Option<DeviceState>,
}

/// One queue.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct QueueState {
    /// The largest size that the device offers.
    #[prost(uint32, tag = "1")]
    pub max: u32,
    /// `queue_size`.
    #[prost(uint32, tag = "2")]
    pub size: u32,
    /// `queue_enable`.
    #[prost(bool, tag = "3")]
    pub enabled: bool,
    /// `queue_desc`.
    #[prost(uint64, tag = "4")]
    pub descriptors: u64,
    /// `queue_driver`.
    #[prost(uint64, tag = "5")]
    pub driver: u64,
    /// `queue_device`.
    #[prost(uint64, tag = "6")]
    pub device: u64,
    /// `queue_msix_vector`.
    #[prost(uint32, tag = "7")]
    pub vector: u32,
    /// The device had it and goes on with it at these indexes.
    #[prost(message, optional, tag = "8")]
    pub position: Option<Position>,
}

/// How far the device has come in a queue.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Position {
    /// Next index in the available ring.
    #[prost(uint32, tag = "1")]
    pub next_avail: u32,
    /// Next index in the used ring.
    #[prost(uint32, tag = "2")]
    pub next_used: u32,
}

/// One entry of an MSI-X table, and its pending bit.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct VectorState {
    /// Message address.
    #[prost(uint64, tag = "1")]
    pub address: u64,
    /// Message data.
    #[prost(uint32, tag = "2")]
    pub data: u32,
    /// Vector control, bit 0.
    #[prost(bool, tag = "3")]
    pub masked: bool,
    /// Its interrupt waits.
    #[prost(bool, tag = "4")]
    pub pending: bool,
}
