//! NBD as Serio speaks it: a pure codec, the handshake as a state machine, and a server over threads.
//!
//! The protocol is that of `doc/proto.md` of the NetworkBlockDevice project; its names and section titles are
//! used here, in quotes.
//!
//! | module | what | I/O |
//! |---|---|---|
//! | [`wire`] | constants, headers, replies of "Transmission phase" | none |
//! | [`handshake`] | options and their replies, the server's side of "Newstyle negotiation" | none |
//! | [`front`] | what stands between TLS and a Unix socket: forced STARTTLS, names as tokens | none |
//! | [`backend`] | the seam to whatever holds the bytes | none |
//! | [`client`] | the other side: pipelined, splits, reconnects and sends again what may be lost | sockets |
//! | [`server`] | accepts, bounds, one thread a connection | sockets |
//!
//! Owns: bytes on an NBD socket. Never: files, volumes, TLS itself. A client's bytes are hostile: each length is
//! bounded before anything is allocated, and an error ends that connection only.
#![forbid(unsafe_code)]

mod answer;
pub mod backend;
mod budget;
pub mod client;
mod connection;
pub mod front;
mod greet;
pub mod handshake;
mod inbox;
mod outbox;
mod places;
mod pool;
mod rules;
mod serve;
pub mod server;
pub mod wire;

pub use backend::{Backend, Command, ExportInfo, Payload, Queue, Run};
pub use front::{Front, FrontStep};
pub use greet::ConnectionError;
pub use handshake::{Handshake, HandshakeError, Negotiated};
pub use serve::End;
pub use server::{Event, Limits, Server, ServerError, Stop};
