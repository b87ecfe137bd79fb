//! Buffers for a network card to receive into, and commands to it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    serio_devices::hostile::net(data);
    serio_devices::hostile::net_control(data);
});
