//! What a disk boots with, found in its bytes: kernel, initrd, command line. Nothing is mounted, nothing is written.
//!
//! ```text
//!   ReadAt ──▶ partition   GPT (either copy), MBR with extended partitions, or none
//!                  ▼
//!              fs          ext4 (also 2 and 3) with its journal laid over, FAT; others are named and refused
//!                  ▼
//!              bls         loader/entries/*.conf    (Boot Loader Specification, type 1)   else
//!              grub        grub.cfg, run far enough to know its default entry
//!                  ▼
//!              Entry       title, version, kernel and initrds to be copied out, command line
//! ```
//!
//! | module | what |
//! |---|---|
//! | [`disk`] | the seam [`ReadAt`], windows of it, the budget of one search |
//! | `partition` | where file systems may be |
//! | [`fs`], `ext4`, `journal`, `fat` | files and directories out of blocks |
//! | `bls`, `version` | loader entries and their order |
//! | `grub` | the script language of grub.cfg, as much of it as decides what is booted |
//! | [`search`] | which of all that counts |
//! | [`error`] | why a disk cannot be booted |
//! | [`kernel`] | what kind of kernel a file is |
//!
//! The bytes are a stranger's: every count is bounded, sums are checked, reads are paid from a budget; what cannot be
//! read is an error that says where it is. Time is not bounded in here: whoever calls does so in a process of its own
//! that it may kill. Never: I/O of its own, threads, clocks.
#![forbid(unsafe_code)]

mod bls;
pub mod disk;
pub mod error;
mod ext4;
mod fat;
pub mod fs;
mod grub;
mod journal;
pub mod kernel;
mod partition;
pub mod search;
mod version;

#[cfg(test)]
mod bls_test;
#[cfg(test)]
mod grub_test;
#[cfg(test)]
mod hostile_test;
#[cfg(test)]
mod image_test;

pub use disk::{Memory, ReadAt};
pub use error::FindError;
pub use kernel::KernelKind;
pub use search::{Entry, Found, find, find_with_budget};
