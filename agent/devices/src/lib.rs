//! The devices a guest sees: blk, net, rng, console and named ports over virtio, and the serial port.
//!
//! - A virtio device here is its configuration space plus threads that own its queues while it is active.
//!   The transport (registers, PCI, interrupts' delivery) is `serio-virtio`'s.
//! - Threads sleep in `epoll_wait` and nowhere else: an idle device costs no processor time.
//! - Guest-driven bytes are hostile. A request that makes no sense is answered with an error, a ring that makes
//!   no sense sets DEVICE_NEEDS_RESET; neither ends the process.
//! - In steady state no I/O allocates: chains, buffers and slots are reused.
//! - A reset returns when no thread of the device is left and no I/O into guest memory is under way.
#![forbid(unsafe_code)]

pub mod balloon;
pub mod blk;
pub mod console;
pub mod count;
#[cfg(any(test, feature = "testing"))]
pub mod hostile;
pub mod limit;
pub mod net;
mod notice;
mod patience;
pub mod ports;
pub mod rng;
pub mod rtc;
pub mod serial;
mod trouble;
pub mod vsock;
mod worker;

pub use notice::Notices;
pub use trouble::Trouble;

#[cfg(test)]
mod small_test;
