//! The virtual machine monitor: one process, one VM.
//!
//! ```text
//!   run (terminal) ─┐                       ┌─ boot   kernel, initrd, command line in RAM
//!                   ├─► devices ─► machine ─┼─ acpi   what the machine is
//!   agent (seriod) ─┘   volumes,   VM,      └─ layout where everything lies
//!                       taps       vcpus
//! ```
//!
//! Threads: one a vcpu, those of the devices once the guest activates them, and the main thread, which waits for
//! output, input, requests and the end. A VM that ends always leaves a reason ([`end::End`]).
#![forbid(unsafe_code)]

pub mod acpi;
pub mod agent;
pub mod boot;
pub mod cli;
pub mod console;
pub mod devices;
pub mod end;
pub mod guest_agent;
pub mod layout;
pub mod machine;
pub mod run;
pub mod snapshot;
pub mod terminal;
