//! The virtual machine monitor: one process, one VM.
#![forbid(unsafe_code)]

pub mod acpi;
pub mod boot;
pub mod layout;
