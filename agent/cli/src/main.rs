//! The binary `serio`.
#![forbid(unsafe_code)]
fn main() {}
