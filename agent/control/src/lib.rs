//! The protocol between `seriod` and the processes that hold volumes: `serio-vmm` and `serio-volumed`.
//!
//! Owns: the messages ([`message`]), their framing ([`frame`]), and a blocking connection that passes
//! descriptors ([`channel`]). `seriod` is the client: it connects to the listening socket that it gave the
//! process at birth, so that after a restart it can connect again.
//! Never: meaning. What a `Launch` does is the VMM's business; this crate only carries it.
//!
//! ```text
//!  seriod                                        serio-vmm | serio-volumed
//!    │  Request{id, body} + descriptors  ────────▶ │
//!    │ ◀────────  Reply{id, ok | error}            │   exactly one reply for each request
//!    │ ◀────────  Event{..}                        │   any time, to every connected client
//! ```
//!
//! On the wire a frame is `u32` little-endian length of the body, then the body, a prost [`message::Frame`].
//! Descriptors travel with the first byte of their frame (`SCM_RIGHTS`), and the frame says how many there are.
//! Invariants: a body is at most [`frame::BODY_BYTES_MAX`]; a frame carries at most [`frame::DESCRIPTORS_MAX`]
//! descriptors; a peer that breaks either is disconnected, never waited for.
#![forbid(unsafe_code)]

pub mod channel;
pub mod frame;
pub mod message;

pub use channel::{Channel, ChannelError};
pub use frame::{FrameError, decode, encode};
