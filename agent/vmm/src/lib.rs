//! The virtual machine monitor: one process, one VM.
#![forbid(unsafe_code)]
