//! Packets of a guest, with clients of the host in between: all that is kept is bounded.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| serio_devices::hostile::vsock(data));
