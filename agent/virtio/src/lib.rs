//! Virtqueues, the PCI transport with MSI-X, and the traits of devices.
#![forbid(unsafe_code)]
