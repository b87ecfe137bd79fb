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
//!
//! Lives and ends, so that a killed `seriod` leaves nothing half-made:
//! - A `serio-vmm` or `serio-volumed` that got no `Launch`, `Export` or job within [`LAUNCH_WAIT`] of its birth
//!   ends by itself. Once it has one, it goes on without any client, whatever happens to `seriod`.
//! - A *job* of `serio-volumed` (all but `Export`) belongs to the connection that asked for it: the process ends
//!   when that connection closes. `Status` may be asked on other connections meanwhile.
#![forbid(unsafe_code)]

mod bootdisk;
pub mod channel;
mod counters;
mod device;
mod devices;
pub mod frame;
mod machine;
pub mod message;
mod volumes;

/// How long a process waits for its first `Launch`, `Export` or job before it ends by itself.
pub const LAUNCH_WAIT: std::time::Duration = std::time::Duration::from_secs(10);

pub use channel::{Channel, ChannelError};
pub use frame::{FrameError, decode, encode};
