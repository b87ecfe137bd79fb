//! Page numbers, ranges and statistics of a balloon.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| serio_devices::hostile::balloon(data));
