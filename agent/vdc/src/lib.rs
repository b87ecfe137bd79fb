//! Quota, admission and network plan of a virtual data center: pure functions.
#![forbid(unsafe_code)]
