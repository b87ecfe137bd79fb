//! Rings of the entropy device and of the console.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| serio_devices::hostile::small(data));
