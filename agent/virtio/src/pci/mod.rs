//! PCI: configuration space, the bus, the host bridge, and virtio's registers on top of it.

pub(crate) mod bus;
pub(crate) mod common;
pub(crate) mod config;
pub(crate) mod host_bridge;
pub(crate) mod transport;
