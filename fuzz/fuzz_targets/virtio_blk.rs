//! Requests to a disk: what is let through lies on it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| serio_devices::hostile::blk(data));
