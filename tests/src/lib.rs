//! The harness of the tests that see Serio from outside, and the checks of the source tree itself.
#![forbid(unsafe_code)]

pub mod bed;
pub mod sizes;
