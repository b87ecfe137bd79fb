//! The cases, a file for each subject.

mod acpi;
mod blk;
mod clock;
mod cpu;
pub mod hostile;
mod irq;
mod memory;
pub mod net;
mod pci;
mod port;
mod rng;
mod serial;
mod virtio;
mod vsock;

use crate::suite::Case;

/// Every case, in the order in which they run.
pub fn all() -> impl Iterator<Item = &'static Case> {
    [
        serial::CASES,
        acpi::CASES,
        memory::CASES,
        cpu::CASES,
        pci::CASES,
        virtio::CASES,
        irq::CASES,
        rng::CASES,
        blk::CASES,
        net::CASES,
        port::CASES,
        vsock::CASES,
        clock::CASES,
    ]
    .into_iter()
    .flatten()
}
