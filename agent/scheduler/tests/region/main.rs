//! A region with real processes: schedulers over etcd or alone, what is left when any of them dies, and a checker that says
//! whether anything was lost or doubled.
//!
//! ```text
//!  processes   etcd members, schedulers: started, killed, stopped
//!  failover    the next leader, and how soon; transactions of etcd
//!  clients ──▶ history ──▶ judge ──▶ verdict        checker: fifty clients, twenty nodes, everybody dies
//!  nodes ────▶ looks ───────▲
//! ```
//! What must survive is the death of processes: that needs no disk, so all state lies in memory where there is such a file
//! system. Each wait has a bound, and says what it waited for.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "the helpers of a test may panic as the test does")]

mod access;
mod checker;
mod clients;
mod failover;
mod judge;
mod judge_test;
mod party;
mod processes;
