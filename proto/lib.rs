//! The gRPC interface of Serio, package `serio.v1`, generated from the `.proto` files beside this one.
//!
//! Owns: the wire types, their clients and servers, and their JSON form (the protobuf JSON mapping).
//! Never: meaning. Inside the agent these types stop at the border: `TryFrom` into `serio-types`.
#![forbid(unsafe_code)]
#![allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    reason = "generated code; the documentation stands in proto/"
)]

/// Messages and services of package `serio.v1`.
pub mod v1 {
    include!(concat!(env!("OUT_DIR"), "/serio.v1.rs"));
    include!(concat!(env!("OUT_DIR"), "/serio.v1.serde.rs"));
}

/// The encoded file descriptor set, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/serio.v1.bin"));
