//! An archive of a VM from anybody: read or refused, never a panic, and no record lies outside of its part or over another. Its
//! head is made right first, so that what lies behind it is reached.
#![no_main]

use libfuzzer_sys::fuzz_target;
use serio_archive::{RECORD_BYTES_MAX, Reader, Writer};

fuzz_target!(|bytes: &[u8]| {
    read(bytes);
    let (manifest, rest) = bytes.split_at(bytes.len().min(3));
    let Ok(mut archive) = Writer::new(Vec::new(), manifest).and_then(Writer::finish) else { return };
    archive.extend(rest);
    read(&archive);
});

fn read(bytes: &[u8]) {
    let Ok((mut reader, manifest)) = Reader::new(bytes) else { return };
    let mut data = Vec::new();
    for size in [0, 100, 1 << 30, u64::MAX].into_iter().skip(manifest.len() % 4) {
        reader.begin_part(size);
        let mut before = 0;
        loop {
            match reader.next(&mut data) {
                Ok(Some(offset)) => {
                    let end = offset.checked_add(data.len() as u64).expect("within the part");
                    assert!(offset >= before && end <= size && data.len() <= RECORD_BYTES_MAX);
                    before = end;
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
    let _ = reader.finish();
}
