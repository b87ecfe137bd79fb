//! Volumes without a VM: exports, imports, copies.
//!
//! | module | what |
//! |---|---|
//! | [`cli`] | `serio-volumed create|import|export|snapshot|info|check|scrub|serve`, for people |
//! | [`change`] | `serio-volumed resize|clone|rollback|delete-snapshot|flatten|changes`, for people |
//! | [`check`] | the table that `serio-volumed check` and `scrub` print |
//! | [`integrity`] | checks and scrubs, in the words that people and `seriod` get |
//! | [`agent`] | `serio-volumed agent`: one job or export at the request of `seriod`, over `serio-control` |
//! | [`jobs`] | what each request does, on descriptors |
//! | [`key`] | `--key FILE`, for people |
//! | [`layers`] | the jobs that change which layers a volume has: growing, cloning, rolling back, merging |
//! | [`bootdisk`] | the job that finds what a volume boots with |
//! | [`copy`] | bytes into files: reflink, sparse copy, import of a stream |
//! | [`import`] | images into volumes and back, with progress, checksum, resume |
//! | [`export`] | a volume behind the NBD server's seam |
//!
//! Threads and io_uring, no async runtime. Owns: the bytes of volumes that no VM has open. Never: opens a path in
//! agent form; decides who may read what (the socket it is given decides).
#![forbid(unsafe_code)]

pub mod agent;
pub mod bootdisk;
pub mod change;
pub mod check;
pub mod cli;
pub mod copy;
pub mod export;
pub mod import;
pub mod integrity;
pub mod jobs;
pub mod key;
pub mod layers;
