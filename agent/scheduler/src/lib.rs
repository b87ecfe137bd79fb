//! The reference control plane: inventories, reservations, placement.
#![forbid(unsafe_code)]
