//! The devices a guest sees: blk, net, rng, console, serial, power.
#![forbid(unsafe_code)]
