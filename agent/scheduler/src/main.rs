//! The binary `serio-scheduler`.
#![forbid(unsafe_code)]
fn main() {}
