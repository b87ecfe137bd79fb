//! Heads past the page cache: whatever place and memory an operation has, the bytes are right; and only heads are so.
//! `stack_test.rs` has every second of its volumes so, too.

use std::sync::Arc;

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::{
    Access, Buffers, FileRun, NotDirect, Op, Volume, VolumeDir,
    crypto::test_secret,
    crypto_test::{parts_of_sectors_side_by_side, read, write},
};

const SIZE: u64 = 1 << 20;

/// A volume with a layer below its head; none where the file system has no O_DIRECT.
fn direct(temp: &TempDir, encrypted: bool) -> Option<(VolumeDir, Volume)> {
    let dir = VolumeDir::new(temp.path().join("vol")).with_direct(true);
    let dir = if encrypted { dir.with_key(test_secret()) } else { dir };
    dir.create(SIZE).expect("create");
    let volume = dir.open(Access::ReadWrite).expect("open");
    dir.snapshot(&volume, "below").expect("snapshot");
    if !volume.stack().head().is_direct() {
        println!("skipped: no O_DIRECT in {}", temp.path().display());
        return None;
    }
    Some((dir, volume))
}

#[test]
fn only_heads_above_others_are_direct() {
    let temp = TempDir::new().expect("tempdir");
    let Some((dir, volume)) = direct(&temp, false) else { return };
    let flags = |volume: &Volume| -> Vec<bool> {
        let stack = volume.stack();
        // What the engine believes, and what the descriptor says.
        for layer in &stack.layers {
            assert_eq!(layer.is_direct(), layer.data.is_direct());
        }
        stack.layers.iter().map(|layer| layer.is_direct()).collect()
    };
    assert_eq!(flags(&volume), [false, true]);
    dir.snapshot(&volume, "s").expect("snapshot");
    assert_eq!(flags(&volume), [false, false, true]);
    volume.resize(SIZE + 4096).expect("grow");
    assert_eq!(flags(&volume), [false, false, true]);
    drop(volume);
    assert_eq!(flags(&dir.open(Access::ReadWrite).expect("open")), [false, false, true]);
    let buffered = dir.clone().with_direct(false).open(Access::ReadWrite).expect("open");
    assert_eq!(flags(&buffered), [false, false, false]);
    drop(buffered);
    let volume = dir.open(Access::ReadWrite).expect("open");
    volume.resize(SIZE + 5000).expect("grow");
    assert_eq!(flags(&volume), [false, false, false], "the last block is cut");
    write(&volume, SIZE + 4990, Buffers::owned(10));
    drop(volume);
    // Without what is below, the head answers for every block: it is the bottom.
    dir.delete_snapshot("below").expect("delete");
    dir.delete_snapshot("s").expect("delete");
    assert_eq!(flags(&dir.open(Access::ReadWrite).expect("open")), [false]);
}

#[test]
fn a_volume_says_why_it_stays_in_the_page_cache() {
    let temp = TempDir::new().expect("tempdir");
    let Some((dir, volume)) = direct(&temp, false) else { return };
    assert_eq!(volume.go_direct(), Ok(()));
    volume.resize(SIZE + 5000).expect("grow");
    assert_eq!(volume.go_direct(), Err(NotDirect::Size));
    drop(volume);
    let reader = dir.open(Access::ReadOnly).expect("open");
    assert_eq!(reader.go_direct(), Err(NotDirect::ReadOnly));
    drop(reader);
    let alone = VolumeDir::new(temp.path().join("alone"));
    alone.create(SIZE).expect("create");
    assert_eq!(alone.open(Access::ReadWrite).expect("open").go_direct(), Err(NotDirect::Bottom));
}

#[test]
fn guests_may_have_their_bytes_anywhere() {
    for encrypted in [false, true] {
        let temp = TempDir::new().expect("tempdir");
        let Some((_, volume)) = direct(&temp, encrypted) else { return };
        let memory =
            Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory"));
        let bytes: Vec<u8> = (0..300_000u32).map(|i| ((i * 7) >> 3) as u8).collect();
        memory.write_slice(&bytes, GuestAddress(0)).expect("write");
        let mut queue = volume.queue(4).expect("queue");
        // Longer than one piece, at an odd address, in odd segments; and as a guest mostly has it.
        for (at, segments) in [
            (0, vec![(3, 1000), (5001, 3096), (9001, 200_000 - 4096)]),
            (204_800, vec![(4096, 4096), (512, 512)]),
            (300_032, vec![(1, 512)]),
            (400_001, vec![(4096, 9000)]),
        ] {
            let parts = || segments.iter().map(|(at, len)| (GuestAddress(*at), *len));
            let len: usize = parts().map(|(_, len)| len).sum();
            let buffers = Buffers::guest(&memory, parts()).expect("inside");
            assert!(queue.run(Op::Write { offset: at, buffers, fua: false }).0.is_ok());
            let want: Vec<u8> =
                parts().flat_map(|(at, len)| &bytes[at.0 as usize..at.0 as usize + len]).copied().collect();
            assert!(read(&volume, at, len) == want);
            let back = [(GuestAddress(500_001), len - 100), (GuestAddress(900_000), 100)];
            let buffers = Buffers::guest(&memory, back).expect("inside");
            assert!(queue.run(Op::Read { offset: at, buffers }).0.is_ok());
            let mut got = vec![0; len];
            memory.read_slice(&mut got[..len - 100], GuestAddress(500_001)).expect("read");
            memory.read_slice(&mut got[len - 100..], GuestAddress(900_000)).expect("read");
            assert!(got == want, "{at}");
        }
        let mut runs: Vec<FileRun> = Vec::new();
        assert!(!queue.runs(0, 4096, 9, &mut runs), "a head past the page cache is sent from nowhere");
    }
}

#[test]
fn writers_of_parts_of_a_sector_do_not_lose_each_others_bytes() {
    for encrypted in [false, true] {
        let temp = TempDir::new().expect("tempdir");
        let Some((_, volume)) = direct(&temp, encrypted) else { return };
        parts_of_sectors_side_by_side(&volume);
    }
}
