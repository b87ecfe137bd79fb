//! The binary `serio-volumed`.
#![forbid(unsafe_code)]
fn main() {}
