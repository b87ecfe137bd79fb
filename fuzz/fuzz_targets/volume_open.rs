//! Map files of a volume with a snapshot, damaged as the fuzzer likes, with checksums that are right all the same: looked
//! at, checked, opened, read. Nothing panics, and what the check calls clean opens.
#![no_main]

use std::{fs::File, os::unix::fs::FileExt, sync::LazyLock};

use libfuzzer_sys::fuzz_target;
use serio_volume::{
    Access, BLOCK_BYTES, Buffers, LayerFiles, Op, OpenError, Volume, VolumeFiles, create_layer,
};

const SIZE: u64 = 64 * BLOCK_BYTES;
const SLOT: usize = 4096;

fn empty() -> LayerFiles {
    let file = || tempfile::tempfile().expect("a file");
    LayerFiles { data: file(), map: file() }
}

fn read(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().expect("its length").len() as usize];
    file.read_exact_at(&mut bytes, 0).expect("its bytes");
    bytes
}

/// The map files of a volume with two layers that has some blocks in each.
static MAPS: LazyLock<[Vec<u8>; 2]> = LazyLock::new(|| {
    let (bottom, head) = (empty(), empty());
    create_layer(&bottom, SIZE, [7; 16], false).expect("a volume");
    let clone = |layer: &LayerFiles| LayerFiles {
        data: layer.data.try_clone().expect("a descriptor"),
        map: layer.map.try_clone().expect("a descriptor"),
    };
    let files = VolumeFiles { layers: vec![clone(&bottom)] };
    let volume = Volume::open(files, Access::ReadWrite).expect("it opens");
    let write = |offset| {
        let mut queue = volume.queue(1).expect("a queue");
        queue.run(Op::Write { offset, buffers: Buffers::owned(5000), fua: true }).0.expect("a write");
    };
    write(0);
    volume.snapshot(clone(&head), "monday").expect("a snapshot");
    write(9000);
    [read(&bottom.map), read(&head.map)]
});

fn file(bytes: &[u8], len: u64) -> File {
    let file = tempfile::tempfile().expect("a file");
    file.set_len(len).expect("a length");
    file.write_all_at(bytes, 0).expect("its bytes");
    file
}

/// Each edit is 4 bytes: which map and where (13 bits are enough for the fields and the first bits), and two bytes.
fn damage(data: &[u8]) -> [Vec<u8>; 2] {
    let mut maps = MAPS.clone();
    for edit in data.chunks_exact(4) {
        let at = usize::from(u16::from_le_bytes([edit[0], edit[1]]));
        let map = &mut maps[at & 1];
        // Fields lie at the start of each slot, bits behind the second.
        let places = [at >> 3 & 1023, SLOT + (at >> 3 & 1023), 2 * SLOT + (at >> 3 & 31)];
        for (place, byte) in (places[(at >> 1 & 3) % 3]..).zip(&edit[2..]) {
            map[place] = *byte;
        }
    }
    for map in &mut maps {
        for slot in map.chunks_exact_mut(SLOT).take(2) {
            let crc = crc32c::crc32c(&slot[..SLOT - 4]);
            slot[SLOT - 4..].copy_from_slice(&crc.to_le_bytes());
        }
    }
    maps
}

fuzz_target!(|data: &[u8]| {
    let maps = damage(data);
    let files = || {
        let layer =
            |map: &Vec<u8>| LayerFiles { data: file(&[1; 4096], SIZE), map: file(map, map.len() as u64) };
        VolumeFiles { layers: maps.iter().map(layer).collect() }
    };
    let _ = files().inspect();
    let clean = files().check().is_ok_and(|report| report.problems.is_empty());
    match Volume::open(files(), Access::ReadOnly) {
        Ok(volume) => {
            let mut queue = volume.queue(1).expect("a queue");
            let len = volume.size_bytes().min(SIZE);
            let (result, _) = queue.run(Op::Read { offset: 0, buffers: Buffers::owned(len as usize) });
            result.expect("an open volume reads");
        }
        // The check needs no key: one that is wrong, or of nobody, shows when the volume is opened.
        Err(OpenError::Key { .. }) => {}
        Err(e) => assert!(!clean, "called clean, and does not open: {e}"),
    }
});
