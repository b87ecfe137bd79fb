//! The end-to-end cases: they see Serio from outside, through the CLI, as a control plane and an operator do.
#![forbid(unsafe_code)]

#[path = "e2e/bad_input.rs"]
mod bad_input;
#[path = "e2e/debian.rs"]
mod debian;
#[path = "e2e/durability.rs"]
mod durability;
#[path = "e2e/export.rs"]
mod export;
#[path = "e2e/formats.rs"]
mod formats;
#[path = "e2e/life.rs"]
mod life;
#[path = "e2e/network.rs"]
mod network;
#[path = "e2e/own_kernel.rs"]
mod own_kernel;
#[path = "e2e/plug.rs"]
mod plug;
#[path = "e2e/region.rs"]
mod region;
#[path = "e2e/saved.rs"]
mod saved;
#[path = "e2e/secrets.rs"]
mod secrets;
#[path = "e2e/shares.rs"]
mod shares;
#[path = "e2e/survival.rs"]
mod survival;
#[path = "e2e/volumes.rs"]
mod volumes;
#[path = "e2e/work.rs"]
mod work;
