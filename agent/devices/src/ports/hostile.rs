//! Control messages from bytes: what is said in answer is bounded, whatever is heard.

use super::control::{Control, MESSAGE_BYTES};

/// Hears each message, and lets the device answer now and then.
pub fn messages(data: &[u8]) {
    let mut control = Control::default();
    for (at, message) in data.chunks_exact(MESSAGE_BYTES).enumerate() {
        if let Ok(message) = <[u8; MESSAGE_BYTES]>::try_from(message) {
            control.hear(message);
        }
        if at % 7 == 0 {
            let mut said = 0;
            while let Some(answer) = control.next("a.name") {
                assert!(answer.len() <= MESSAGE_BYTES + 7, "{} bytes", answer.len());
                said += 1;
            }
            assert!(said <= 3, "{said} answers at once");
            assert!(!control.has_some());
        }
    }
}
