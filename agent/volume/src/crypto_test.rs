//! Encrypted volumes as their users meet them: what the files hold, which key opens, sectors written in part beside
//! others, more under way than the driver has memory for.

use std::fs;

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::{
    Access, BLOCK_BYTES, Buffers, CreateError, KeyError, Op, OpenError, ResizeError, VdcSecret, Volume,
    VolumeDir, VolumeDirError, crypto::test_secret,
};

const PATTERN: &[u8; 16] = b"what nobody sees";

fn pattern(len: usize) -> Buffers {
    let mut buffers = Buffers::owned(len);
    let bytes = buffers.as_mut_slice().expect("owned");
    bytes.iter_mut().zip(PATTERN.iter().cycle()).for_each(|(byte, pattern)| *byte = *pattern);
    buffers
}

pub(crate) fn write(volume: &Volume, offset: u64, buffers: Buffers) {
    volume.queue(1).expect("queue").run(Op::Write { offset, buffers, fua: true }).0.expect("write");
}

pub(crate) fn read(volume: &Volume, offset: u64, len: usize) -> Vec<u8> {
    let buffers = Buffers::owned(len);
    let (result, buffers) = volume.queue(1).expect("queue").run(Op::Read { offset, buffers });
    result.expect("read");
    buffers.as_slice().expect("owned").to_vec()
}

fn encrypted(temp: &TempDir, size: u64) -> (VolumeDir, Volume) {
    let dir = VolumeDir::new(temp.path()).with_key(test_secret());
    dir.create(size).expect("create");
    let volume = dir.open(Access::ReadWrite).expect("open");
    (dir, volume)
}

/// Whether some file of the directory has the bytes.
fn found(temp: &TempDir, bytes: &[u8]) -> bool {
    let files = fs::read_dir(temp.path()).expect("list").map(|entry| entry.expect("entry").path());
    files.into_iter().any(|path| fs::read(path).expect("read").windows(bytes.len()).any(|part| part == bytes))
}

#[test]
fn the_files_never_hold_what_was_written() {
    let temp = TempDir::new().expect("tempdir");
    let (dir, volume) = encrypted(&temp, 1 << 20);
    let half = &PATTERN[..8];
    write(&volume, 4096, pattern(300_000));
    write(&volume, 700_001, pattern(33));
    dir.snapshot(&volume, "a").expect("snapshot");
    write(&volume, 5000, pattern(1000));
    assert_eq!(read(&volume, 700_001, 32), PATTERN.repeat(2));
    assert!(!found(&temp, half));
    drop(volume);
    dir.delete_snapshot("a").expect("delete");
    assert!(!found(&temp, half), "a merge writes ciphertext");
    let volume = dir.open(Access::ReadWrite).expect("open");
    assert_eq!(read(&volume, 700_001, 32), PATTERN.repeat(2));
    assert_eq!(read(&volume, 5000, 1000)[..16], *PATTERN);
    assert_eq!(read(&volume, 300_000, 3)[..], PATTERN[(300_000 - 4096) % 16..][..3]);

    // The plain one beside it shows that the search finds.
    let temp = TempDir::new().expect("tempdir");
    let dir = VolumeDir::new(temp.path());
    dir.create(1 << 20).expect("create");
    write(&dir.open(Access::ReadWrite).expect("open"), 4096, pattern(300_000));
    assert!(found(&temp, half));
}

#[test]
fn the_same_bytes_look_different_in_each_sector_and_layer() {
    let temp = TempDir::new().expect("tempdir");
    let (dir, volume) = encrypted(&temp, 1 << 20);
    write(&volume, 0, pattern(8192));
    dir.snapshot(&volume, "a").expect("snapshot");
    write(&volume, 0, pattern(8192));
    let sectors =
        |layer| fs::read(temp.path().join(format!("{layer:08}.data"))).expect("read")[..8192].to_vec();
    let mut all: Vec<_> = [sectors(1), sectors(2)].concat().chunks(512).map(<[u8]>::to_vec).collect();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 32);
}

#[test]
fn only_its_key_opens_a_volume() {
    let temp = TempDir::new().expect("tempdir");
    let (dir, volume) = encrypted(&temp, 1 << 20);
    write(&volume, 0, pattern(4096));
    dir.snapshot(&volume, "a").expect("snapshot");
    drop(volume);
    let refused = |result: Result<Volume, VolumeDirError>| match result {
        Err(VolumeDirError::Open { source: OpenError::Key { layer, source }, .. }) => (layer, source),
        other => panic!("{other:?}"),
    };
    let keyless = VolumeDir::new(temp.path());
    let id = test_secret().id();
    assert_eq!(refused(keyless.open(Access::ReadWrite)), (1, KeyError::Missing { id }));
    assert_eq!(refused(keyless.open_snapshot("a")), (1, KeyError::Missing { id }));
    assert!(keyless.delete_snapshot("a").is_err());
    let other = VdcSecret::generate().expect("random");
    let error = KeyError::Other { needed: id, given: other.id() };
    assert_eq!(refused(keyless.clone().with_key(other).open(Access::ReadOnly)), (1, error));
    let same_id = VdcSecret::new(id, [1; 32]);
    let error = KeyError::Refused { id };
    assert_eq!(refused(keyless.clone().with_key(same_id).open(Access::ReadOnly)), (1, error));
    // A check needs no key: it looks at no bytes.
    let report = keyless.files(Access::ReadOnly).expect("files").check().expect("check");
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(read(&dir.open_snapshot("a").expect("its key"), 16, 16), PATTERN);
    // What was refused took no lock.
    dir.open(Access::ReadWrite).expect("its key");
}

#[test]
fn a_plain_volume_needs_no_key_and_takes_any() {
    let temp = TempDir::new().expect("tempdir");
    let dir = VolumeDir::new(temp.path());
    dir.create(5000).expect("create");
    write(&dir.open(Access::ReadWrite).expect("open"), 0, pattern(5000));
    let dir = dir.with_key(test_secret());
    assert_eq!(read(&dir.open(Access::ReadOnly).expect("open"), 0, 16), PATTERN);
}

#[test]
fn encrypted_volumes_have_whole_blocks() {
    let temp = TempDir::new().expect("tempdir");
    let dir = VolumeDir::new(temp.path()).with_key(test_secret());
    match dir.create(4096 * 3 + 512) {
        Err(VolumeDirError::Create { source: CreateError::Unaligned(12_800), .. }) => {}
        other => panic!("{other:?}"),
    }
    fs::remove_dir_all(temp.path()).expect("remove");
    dir.create(4096 * 3).expect("create");
    let volume = dir.open(Access::ReadWrite).expect("open");
    assert!(matches!(volume.resize(4096 * 4 - 1), Err(ResizeError::Unaligned(16_383))));
    volume.resize(4096 * 4).expect("grow");
    assert_eq!(read(&volume, 0, 4096 * 4), [0; 4096 * 4]);
}

#[test]
fn writers_of_parts_of_a_sector_do_not_lose_each_others_bytes() {
    let temp = TempDir::new().expect("tempdir");
    let (_dir, volume) = encrypted(&temp, 64 << 10);
    parts_of_sectors_side_by_side(&volume);
}

/// Many threads write parts of sectors, and whole ones between them, again and again; all must be there at the end.
pub(crate) fn parts_of_sectors_side_by_side(volume: &Volume) {
    write(volume, 0, Buffers::owned(64 << 10));
    let lanes = 8;
    let threads: Vec<_> = (0..lanes)
        .map(|lane| {
            let volume = volume.clone();
            std::thread::spawn(move || {
                let mut queue = volume.queue(4).expect("queue");
                for round in 0..60u8 {
                    // Each lane has 64 bytes of every second sector, and the last one writes the sectors between whole.
                    for sector in 0..4u64 {
                        let whole = lane == lanes - 1;
                        let offset = sector * 1024 + if whole { 512 } else { lane * 64 };
                        let mut buffers = Buffers::owned(if whole { 512 } else { 64 });
                        buffers.as_mut_slice().expect("owned").fill(round + 1);
                        while queue.in_use() == 4 {
                            queue.kick();
                            queue.wait();
                            queue.reap(|_, result, _| result.expect("write"));
                        }
                        queue.submit(0, Op::Write { offset, buffers, fua: false }).expect("room");
                    }
                    while queue.in_use() > 0 {
                        queue.kick();
                        queue.reap(|_, result, _| result.expect("write"));
                        if queue.in_use() > 0 {
                            queue.wait();
                        }
                    }
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().expect("writer"));
    for sector in 0..4 {
        assert_eq!(read(volume, sector * 1024, 448), [60; 448]);
        assert_eq!(read(volume, sector * 1024 + 512, 512), [60; 512]);
    }
}

#[test]
fn more_may_be_under_way_than_there_is_memory_for() {
    let temp = TempDir::new().expect("tempdir");
    let (_dir, volume) = encrypted(&temp, 64 << 20);
    let mut queue = volume.queue(40).expect("queue");
    let len = 1 << 20;
    for i in 0..40 {
        let mut buffers = Buffers::owned(len);
        buffers.as_mut_slice().expect("owned").fill(i as u8 + 1);
        queue.submit(i, Op::Write { offset: i * len as u64 + 100, buffers, fua: false }).expect("room");
    }
    let mut answers = 0;
    let mut reap = |queue: &mut crate::IoQueue, check: &dyn Fn(u64, &Buffers)| {
        queue.kick();
        while queue.in_use() > 0 {
            queue.wait();
            queue.reap(|tag, result, buffers| {
                result.expect("operation");
                check(tag, &buffers);
                answers += 1;
            });
        }
    };
    reap(&mut queue, &|_, _| {});
    for i in 0..40 {
        let op = Op::Read { offset: i * len as u64 + 100, buffers: Buffers::owned(len) };
        queue.submit(i, op).expect("room");
    }
    reap(&mut queue, &|tag, buffers| {
        assert!(buffers.as_slice().expect("owned").iter().all(|b| *b == tag as u8 + 1))
    });
    assert_eq!(answers, 80);
}

#[test]
fn guest_memory_is_not_changed_by_a_write() {
    let temp = TempDir::new().expect("tempdir");
    let (_dir, volume) = encrypted(&temp, 1 << 20);
    let memory = std::sync::Arc::new(
        GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory"),
    );
    memory.write_slice(&PATTERN.repeat(64), GuestAddress(3)).expect("write");
    let buffers =
        Buffers::guest(&memory, [(GuestAddress(3), 500), (GuestAddress(503), 524)]).expect("inside");
    write(&volume, 3 * BLOCK_BYTES - 512, buffers);
    let mut after = vec![0; 1024];
    memory.read_slice(&mut after, GuestAddress(3)).expect("read");
    assert_eq!(after, PATTERN.repeat(64));
    let buffers =
        Buffers::guest(&memory, [(GuestAddress(9000), 1), (GuestAddress(90_000), 40)]).expect("inside");
    let read = Op::Read { offset: 3 * BLOCK_BYTES - 511, buffers };
    volume.queue(1).expect("queue").run(read).0.expect("read");
    memory.read_slice(&mut after[..1], GuestAddress(9000)).expect("read");
    memory.read_slice(&mut after[1..41], GuestAddress(90_000)).expect("read");
    assert_eq!(after[..41], PATTERN.repeat(3)[1..42]);
    memory.read_slice(&mut after[..9], GuestAddress(90_040)).expect("read");
    assert_eq!(after[..9], [0; 9], "nothing beyond what was asked");
}

#[test]
fn whole_sectors_are_read_into_any_guest_memory_and_nowhere_else() {
    let temp = TempDir::new().expect("tempdir");
    let (dir, volume) = encrypted(&temp, 1 << 20);
    let len = 3 * (32 << 10) + 512;
    write(&volume, 512, pattern(len));
    dir.snapshot(&volume, "a").expect("snapshot");
    // A part of it lies in another layer, under another key, and a part of it was never written.
    write(&volume, 64 << 10, pattern(8192));
    let expected = read(&volume, 0, 1 << 20);
    assert_eq!(expected[512..528], *PATTERN);
    // Segments that end within sectors and within groups of them; and such that end with them, at odd places.
    segments_hold(&volume, &expected, [1, 511, 33_000, 7, 90_001, 32 << 10, 40_000]);
    segments_hold(&volume, &expected, [512, 1024, 33_280, 3584, 90_112, 32 << 10, 39_936]);
}

/// Reads from byte 512 on into segments of these lengths, and writes from them to 400 KiB.
fn segments_hold(volume: &Volume, expected: &[u8], lens: [usize; 7]) {
    let memory = std::sync::Arc::new(
        GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory"),
    );
    memory.write_slice(&vec![0xee; 1 << 20], GuestAddress(0)).expect("write");
    let places = lens.iter().scan(5_u64, |at, len| {
        let place = *at;
        *at += *len as u64 + 3;
        Some((GuestAddress(place), *len))
    });
    let places: Vec<_> = places.collect();
    let buffers = Buffers::guest(&memory, places.iter().copied()).expect("inside");
    let sectors = buffers.len() / 512 * 512;
    assert!(buffers.len() - sectors < 512 && sectors > 128 << 10);
    for len in [buffers.len(), sectors] {
        let cut = places.iter().copied().scan(len as usize, |left, (place, len)| {
            let take = len.min(*left);
            *left -= take;
            Some((place, take))
        });
        let buffers = Buffers::guest(&memory, cut).expect("inside");
        assert_eq!(buffers.len(), len);
        let mut queue = volume.queue(1).expect("queue");
        let (result, buffers) = queue.run(Op::Read { offset: 512, buffers });
        result.expect("read");
        let mut at = 512;
        for (place, len) in &places {
            let mut got = vec![0; *len];
            memory.read_slice(&mut got, *place).expect("read");
            assert!(got == expected[at..at + len], "{len} bytes at {place:?}");
            at += len;
            let mut between = [0; 3];
            memory.read_slice(&mut between, GuestAddress(place.0 + *len as u64)).expect("read");
            assert_eq!(between, [0xee; 3], "behind {place:?}");
        }
        queue.run(Op::Write { offset: 400 << 10, buffers, fua: false }).0.expect("write");
        assert!(
            read(volume, 400 << 10, len as usize) == expected[512..512 + len as usize],
            "{len} bytes written"
        );
    }
}

#[test]
fn what_is_decrypted_is_given_back_before_the_rest_is() {
    // In memory all is answered at once, so what comes when is no chance.
    let Ok(temp) = TempDir::new_in("/dev/shm") else {
        return println!("skipped: there is no /dev/shm");
    };
    let (_dir, volume) = encrypted(&temp, 8 << 20);
    write(&volume, 0, pattern(8 << 20));
    let mut queue = volume.queue(16).expect("queue");
    if queue.uses_io_uring() {
        return println!("skipped: /dev/shm is not in memory");
    }
    let len = 128 << 10;
    for i in 0..16 {
        let op = Op::Read { offset: i * len, buffers: Buffers::owned(len as usize) };
        queue.submit(i, op).expect("room");
    }
    queue.kick();
    let (mut turns, mut most) = (0, 0);
    while queue.in_use() > 0 {
        queue.wait();
        let mut now = 0;
        queue.reap(|_, result, buffers| {
            result.expect("read");
            assert_eq!(buffers.as_slice().expect("owned")[..16], *PATTERN);
            now += 1;
        });
        turns += 1;
        most = most.max(now);
    }
    assert!(turns > 8 && most <= 2, "{turns} turns, {most} at once");
}
