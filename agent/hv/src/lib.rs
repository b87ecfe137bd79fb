//! KVM: the VM, its vcpus, guest memory, interrupts and doorbells.
//!
//! This crate is the only one under the VMM that speaks to the kernel's virtualization interface, and the home
//! of its `unsafe`. Above it nobody sees a KVM structure, an ioctl or a pointer into guest memory.
//!
//! ```text
//!   Kvm ──(limits, cpuid)──► Vm ──► Vcpu      one per processor, owned by its thread
//!                            │  ──► MsiLine   one interrupt of a PCI function: eventfd → irqfd → MSI route
//!                            │  ──► IrqLine   one pin of the IO-APIC: eventfd → irqfd
//!                            └──► ioeventfd   a doorbell: guest write → eventfd, without leaving the kernel
//!   VhostNet     the kernel's own card: a tap's queue and a guest's rings, without a thread of ours
//!   GuestMemory  memfd, mapped once, shared by KVM and all device threads
//! ```
//!
//! Invariants:
//! - Memory slots are registered before the interrupt chip exists: the other order costs milliseconds, because
//!   each later slot then waits for a grace period of the kernel.
//! - Guest memory outlives the VM: [`Vm`] holds it.
//! - Guest memory is never lent as a Rust reference; `vm-memory`'s volatile accesses are the only way in.
//! - All writes to guest memory can be logged ([`changes`], [`writes`]); none is, until somebody asks.
//! - Everything but [`Vcpu`] is `Sync`; a [`Vcpu`] moves to its thread and stays there. Others reach it through
//!   its [`VcpuKick`].

mod baseline;
mod changes;
mod cpuid;
mod features;
mod irq;
mod kvm;
mod memory;
mod overlay;
mod packet;
mod registers;
mod release;
mod state;
mod tap;
mod vcpu;
mod vhost;
mod vm;
mod writes;

pub use baseline::{Baseline, MissingFeatures, UnknownBaseline};
pub use irq::{IrqLine, MsiLine, MsiMessage};
pub use kvm::{Kvm, OpenError};
pub use memory::{
    GuestMemory, HIGH_RAM_START, LOW_RAM_END, MemoryError, PAGE_SIZE, PageKind, create_memory,
    create_memory_of, memory_from_fd, open_private_memory, ram_ranges,
};
pub use overlay::lay_over;
pub use packet::{PACKET_SEGMENTS_MAX, receive_packet, send_packet};
pub use registers::{BootMode, BootRegisters, GDT};
pub use release::release_memory;
pub use state::{VcpuState, VmState};
pub use tap::{Tap, TapError, TapOffloads, VNET_HEADER_BYTES};
pub use vcpu::{ExitReason, IoHandler, RunError, Vcpu, VcpuKick};
pub use vhost::{VHOST_NET, VhostNet, VhostRing};
pub use vm::{IoAddr, Vm, VmError};
pub use writes::{GuestRam, WriteLog, is_logged, mark_written};

pub use vm_memory;
pub use vmm_sys_util::eventfd::EventFd;

#[cfg(test)]
mod vm_test;
