//! Images of other programs, qcow2 and vmdk, sound ones damaged as the fuzzer likes or made by it from nothing: refused, or
//! read to their end.
#![no_main]

use std::{fs::File, io::Write};

use libfuzzer_sys::fuzz_target;
use serio_formats::{Format, NoBackings, open, source::Source};

const SIZE_MAX: u64 = 1 << 30;

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(bytes).expect("its bytes");
    file
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    let (format, magic) = if kind % 2 == 0 { (Format::Qcow2, *b"QFI\xfb") } else { (Format::Vmdk, *b"KDMV") };
    let bytes = [&magic[..], data].concat();
    let source = Source::new(file(&bytes)).expect("a regular file");
    let Ok(mut image) = open(source, format, SIZE_MAX, &mut NoBackings) else { return };
    let mut buffer = vec![0; 64 << 10];
    let mut at = 0;
    while at < image.size_bytes().min(16 << 20) {
        let len = (image.size_bytes() - at).min(buffer.len() as u64) as usize;
        if image.read(at, &mut buffer[..len]).is_err() {
            return;
        }
        at += len as u64;
    }
});
