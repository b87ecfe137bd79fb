//! The daemon `seriod`: one a node. It owns what the node promises (vdcs, VMs, volumes, images), starts and watches
//! the processes that hold VMs and volumes, and answers the gRPC services of `serio.v1`.
//!
//! ```text
//!  serio, control plane ──gRPC──▶ grpc ──Command──▶ state ──────▶ store (SQLite)
//!                                                     │  ▲
//!                                    spawned work ────┘  └──── results, ends of VMs
//!                                          ▼
//!                                      supervise ──▶ serio-vmm, serio-volumed (processes that outlive seriod)
//! ```
//!
//! Owns: the wiring of these parts. Never: `/dev/kvm` ioctls, the files of volumes; bytes of volumes and of guests' memory only
//! pass through it, when a VM goes to another node.
//! Threads: one tokio runtime with few workers; the store is used by one task only.
#![deny(unsafe_code)]

pub mod audit;
pub mod capacity;
pub mod clock;
pub mod config;
pub mod copies;
pub mod daemon;
pub mod direct;
pub mod energy;
pub mod error;
pub mod grpc;
pub mod health;
pub mod keys;
pub mod meter;
pub mod metrics;
pub mod nbd;
pub mod net;
pub mod scrub;
pub mod seed;
pub mod shares;
pub mod state;
pub mod supervise;
#[allow(
    unsafe_code,
    reason = "the one home of unsafe code in this crate: system calls without a safe wrapper"
)]
pub mod sys;
