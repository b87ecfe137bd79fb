//! A guest that accesses a device's configuration space, registers, MSI-X table and doorbells in any way, and its rings.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| serio_virtio::hostile::drive_transport(data));
