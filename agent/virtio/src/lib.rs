//! Virtqueues, the virtio-pci transport with MSI-X, the PCI bus, and the traits of devices.
//!
//! ```text
//!  vcpu thread ── ECAM, BAR access ──► PciBus ──► VirtioPci ── activate/reset ──► a VirtioDevice
//!                                                    │                               │ (its threads)
//!                                   MSI-X table ◄────┤ Shared: vectors, status   ◄───┘ QueueInterrupt,
//!                                   irqfd, ioeventfd ┘ (Platform: KVM or a fake)       DeviceFailure
//! ```
//!
//! - The transport is written once; a device holds only its own logic and sees [`VirtQueue`]s.
//! - [`VirtQueue::pop`] is the only way to walk a ring: each descriptor is copied once into a [`Chain`],
//!   whose length is bounded. What the guest changes afterwards changes nothing here.
//! - Guest-driven registers never fail the process: what makes no sense is ignored or sets
//!   `DEVICE_NEEDS_RESET`.
//! - The kernel is reached only through [`Platform`], so all of this is tested without KVM.
//! - A device can be suspended and resumed, in this process or in another one: [`VirtioDevice::suspend`],
//!   [`PciBus::save`]. Nothing that the driver asked for is lost or done twice by it.
//! - INTx is not offered: a driver must use MSI-X, or poll the ISR register.
#![forbid(unsafe_code)]

mod device;
#[cfg(any(test, feature = "testing"))]
pub mod hostile;
mod interrupt;
mod msix;
mod pci;
mod platform;
mod queue;
mod state;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use device::{ActivateError, Activation, ActiveQueue, VirtioDevice};
pub use interrupt::{ConfigInterrupt, DeviceFailure, LentLine, QueueInterrupt};
pub use pci::bus::{BusError, Failure, PciBus, PciFunction};
pub use pci::host_bridge::HostBridge;
pub use pci::transport::{VirtioPci, VirtioPciError};
pub use platform::{MsiMessage, MsiRoute, Platform};
pub use queue::{Chain, QueueError, SEGMENTS_MAX, Segment, VirtQueue};
pub use state::{
    BusRestoreError, BusSuspendError, DeviceState, FunctionState, QueueState, RestoreError, SuspendError,
    VirtioState,
};
