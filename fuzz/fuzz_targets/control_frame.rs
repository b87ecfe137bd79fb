//! Frames of the control protocol: whatever decodes must encode to the same meaning.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| {
    if let Ok(frame) = serio_control::decode(body)
        && let Ok(bytes) = serio_control::encode(&frame)
    {
        let again = serio_control::decode(&bytes[4..]).expect("what was encoded decodes");
        assert_eq!(again, frame);
    }
});
