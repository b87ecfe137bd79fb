//! Control messages of a device with ports.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| serio_devices::hostile::ports(data));
