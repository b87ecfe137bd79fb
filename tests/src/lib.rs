//! The harness of the tests that see Serio from outside, and the checks of the source tree itself.
#![forbid(unsafe_code)]

pub mod bed;
pub mod guest;
pub mod sizes;
pub mod storm;
#[cfg(test)]
mod storm_test;
pub mod volumes;
