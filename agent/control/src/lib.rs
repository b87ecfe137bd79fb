//! The protocol between seriod and serio-vmm or serio-volumed.
#![forbid(unsafe_code)]
