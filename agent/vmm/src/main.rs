//! The binary `serio-vmm`.
#![forbid(unsafe_code)]
fn main() {}
