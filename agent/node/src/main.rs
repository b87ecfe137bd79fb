//! The binary `seriod`: arguments, logging, and the daemon.
#![forbid(unsafe_code)]
fn main() {}
