//! For fuzzers and property tests: what a hostile driver says, as bytes, to each parser of requests.
//!
//! Built with the feature `testing`. Each panics when something holds no longer that always must.

pub use crate::balloon::hostile::requests as balloon;
pub use crate::blk::hostile::requests as blk;
pub use crate::net::hostile::{buffers as net, commands as net_control};
pub use crate::ports::hostile::messages as ports;
pub use crate::vsock::hostile::packets as vsock;

/// The entropy device and the console, each with rings made of these bytes.
pub fn small(data: &[u8]) {
    crate::rng::requests(data);
    crate::console::requests(data);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_request_to_a_disk_does_harm(data in prop::collection::vec(any::<u8>(), 0..300)) {
            super::blk(&data);
        }

        #[test]
        fn no_receive_buffer_does_harm(data in prop::collection::vec(any::<u8>(), 0..300)) {
            super::net(&data);
        }

        #[test]
        fn no_command_to_a_card_does_harm(data in prop::collection::vec(any::<u8>(), 0..300)) {
            super::net_control(&data);
        }

        #[test]
        fn no_page_number_does_harm(data in prop::collection::vec(any::<u8>(), 0..600)) {
            super::balloon(&data);
        }

        #[test]
        fn no_buffer_of_a_small_device_does_harm(data in prop::collection::vec(any::<u8>(), 0..600)) {
            super::small(&data);
        }

        #[test]
        fn no_packet_does_harm(data in prop::collection::vec(any::<u8>(), 0..2000)) {
            super::vsock(&data);
        }

        #[test]
        fn no_control_message_does_harm(data in prop::collection::vec(any::<u8>(), 0..300)) {
            super::ports(&data);
        }
    }
}
