//! The reference control plane of a region: it keeps what nodes report, and plans where VMs go.
//!
//! ```text
//!  agents ──Connect──▶ service ──commands──▶ owner thread ── step ──▶ inventory · book · placement (pure)
//!  clients ──Place ───▶ (tonic)  ◀─answers──   (one)      ── batch ─▶ store (SQLite | etcd)
//! ```
//! Owns: the inventory of nodes, the placements and recovery plans, their durable part, the sessions of agents.
//! Never: promises on behalf of a node. The node has the veto; here is only what it said, and how long ago.
//!
//! Threads: tokio for connections; one thread of its own for inventory and store, so that one thing happens at a time and
//! a slow disk stalls no network.
#![forbid(unsafe_code)]

pub mod auth;
pub mod book;
pub mod config;
pub mod error;
pub mod index;
pub mod inventory;
pub mod owner;
pub mod placement;
pub mod region;
pub mod server;
pub mod service;
pub mod simulate;
pub mod store;
