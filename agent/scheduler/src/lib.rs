//! The reference control plane of a region, as far as it goes today: it keeps what nodes report and says what it knows.
//!
//! ```text
//!  agents ──Connect──▶ service ──Command──▶ owner thread ── step ──▶ inventory (pure)
//!  clients ─ListNodes─▶ (tonic)  ◀─answer──  (one)       ── save ──▶ store (SQLite)
//! ```
//! Owns: the inventory of nodes, its durable part, the sessions of agents.
//! Never: promises on behalf of a node. The node has the veto; here is only what it said, and how long ago.
//!
//! Threads: tokio for connections; one thread of its own for inventory and store, so that one thing happens at a time and
//! a slow disk stalls no network.
#![forbid(unsafe_code)]

pub mod auth;
pub mod config;
pub mod inventory;
pub mod owner;
pub mod server;
pub mod service;
pub mod store;
