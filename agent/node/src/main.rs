//! The binary `seriod`.
#![forbid(unsafe_code)]
fn main() {}
