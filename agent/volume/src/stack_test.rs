//! The engine against a plain array, on real files: snapshots interleaved, several operations under way at once in
//! two queues, lengths that align with nothing; locks, hostile headers, leftovers.

use std::{fs::File, sync::Arc, time::Duration};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::{
    Access, BLOCK_BYTES, Buffers, IoError, IoQueue, LayerFiles, Op, OpenError, Volume, VolumeDir,
    VolumeDirError, VolumeFiles, crypto::test_secret,
};

const SIZE: u64 = 40 * BLOCK_BYTES + 1234;

#[derive(Debug, Clone)]
enum Step {
    /// Operations with disjoint ranges, under way together.
    Batch(Vec<(u64, u64, u8)>),
    /// The same, each beginning where the one before ends, from an offset on: lengths and kinds.
    Row(u64, Vec<(u64, u8)>),
    Snapshot,
    /// Held for a moment, then let go.
    Hold,
    /// By so many bytes.
    Grow(u64),
    Reopen,
    /// Delete a snapshot: the n-th, counted round.
    Delete(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let op = (0..SIZE, 1..6 * BLOCK_BYTES, 0..8u8);
    let len = prop_oneof![1..2 * BLOCK_BYTES, Just(512), Just(BLOCK_BYTES)];
    let row = proptest::collection::vec((len, 0..8u8), 2..16);
    let step = prop_oneof![
        6 => proptest::collection::vec(op, 1..10).prop_map(Step::Batch),
        4 => (0..SIZE, row).prop_map(|(offset, row)| Step::Row(offset, row)),
        2 => Just(Step::Snapshot),
        1 => Just(Step::Hold),
        1 => prop_oneof![0..3 * BLOCK_BYTES, Just(BLOCK_BYTES)].prop_map(Step::Grow),
        1 => Just(Step::Reopen),
        1 => (0..8usize).prop_map(Step::Delete),
    ];
    proptest::collection::vec(step, 1..14)
}

/// A row's operations, as far as they begin inside the smallest volume.
fn laid(mut at: u64, row: &[(u64, u8)]) -> Vec<(u64, u64, u8)> {
    let lay = |&(len, what): &(u64, u8)| {
        at += len;
        (at - len, len, what)
    };
    row.iter().map(lay).take_while(|(offset, ..)| *offset < SIZE).collect()
}

/// Drops what overlaps an earlier one, so that the outcome does not depend on the order.
fn disjoint(ops: &[(u64, u64, u8)], size: u64) -> Vec<(u64, u64, u8)> {
    let mut taken: Vec<(u64, u64, u8)> = Vec::new();
    for &(offset, len, what) in ops {
        let len = len.min(size - offset);
        if taken.iter().all(|&(o, l, _)| offset + len <= o || o + l <= offset) {
            taken.push((offset, len, what));
        }
    }
    taken
}

fn batch(volume: &Volume, model: &mut [u8], ops: &[(u64, u64, u8)], fill: u8) {
    let mut queues = [volume.queue(3).expect("queue"), volume.queue(16).expect("queue")];
    let mut discarded = Vec::new();
    for (i, (offset, len, what)) in disjoint(ops, model.len() as u64).into_iter().enumerate() {
        let range = offset as usize..(offset + len) as usize;
        let op = match what {
            0..=4 => {
                let value = fill.wrapping_add(i as u8).max(1);
                model[range].fill(value);
                let mut buffers = Buffers::owned(len as usize);
                buffers.as_mut_slice().expect("owned").fill(value);
                Op::Write { offset, buffers, fua: what == 0 }
            }
            5 => {
                discarded.push(range);
                Op::Discard { offset, len }
            }
            6 => Op::Flush,
            _ => {
                model[range].fill(0);
                Op::WriteZeroes { offset, len, unmap: fill.is_multiple_of(2) }
            }
        };
        let mut op = Some(op);
        while let Some(again) = op.take() {
            // Neighbours meet in one queue, and ends of a row in two.
            let queue = &mut queues[i / 4 % 2];
            if let Err(full) = queue.submit(i as u64, again) {
                op = Some(full.0);
                go_on(&mut queues);
            }
        }
    }
    while queues.iter().any(|q| q.in_use() > 0) {
        go_on(&mut queues);
    }
    let now = read_all(volume);
    for range in discarded {
        for i in range {
            assert!(now[i] == 0 || now[i] == model[i], "byte {i} after a discard");
            model[i] = now[i];
        }
    }
    assert!(now == model, "first difference at {:?}", now.iter().zip(model.iter()).position(|(a, b)| a != b));
}

/// Waits for what is under way, in both: all of one may wait for blocks that the other has claimed.
fn go_on(queues: &mut [IoQueue; 2]) {
    queues.iter_mut().for_each(IoQueue::kick);
    let mut fds = queues.each_ref().map(|queue| PollFd::new(queue.event_fd(), PollFlags::POLLIN));
    let woken = poll(&mut fds, PollTimeout::from(60_000u16)).expect("poll");
    assert!(woken > 0, "neither queue is woken");
    for queue in queues {
        queue.reap(|_, result, _| result.expect("operation"));
    }
}

fn read_all(volume: &Volume) -> Vec<u8> {
    let buffers = Buffers::owned(volume.size_bytes() as usize);
    let (result, buffers) = volume.queue(1).expect("queue").run(Op::Read { offset: 0, buffers });
    result.expect("read");
    buffers.as_slice().expect("owned").to_vec()
}

/// Deletes a snapshot of a volume that nobody has open for writing.
fn delete(dir: &VolumeDir, name: &str, snapshots: &[(String, Vec<u8>)]) {
    // Who reads a point goes on, whatever is merged above or below it.
    let points: Vec<_> = snapshots.iter().map(|s| dir.open_snapshot(&s.0).expect("open")).collect();
    dir.delete_snapshot(name).expect("delete");
    for (point, (_, bytes)) in points.iter().zip(snapshots) {
        assert!(read_all(point) == *bytes);
    }
    let report = dir.files(Access::ReadOnly).expect("files").check().expect("check");
    assert!(report.is_clean() && report.leftovers.is_empty(), "{:?}", report);
    assert!(dir.delete_snapshot(name).is_err(), "it is gone");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    #[test]
    fn behaves_as_an_array(encrypted: bool, direct: bool, steps in steps()) {
        let temp = TempDir::new().expect("tempdir");
        let dir = VolumeDir::new(temp.path());
        // An encrypted volume has whole blocks.
        let (dir, grain) = if encrypted { (dir.with_key(test_secret()), BLOCK_BYTES) } else { (dir, 1) };
        let dir = dir.with_direct(direct);
        // A direct one too; but it may grow to what has not, and then is so no longer.
        let size = SIZE.next_multiple_of(if direct { BLOCK_BYTES } else { grain });
        dir.create(size).expect("create");
        let mut volume = dir.open(Access::ReadWrite).expect("open");
        let mut model = vec![0; size as usize];
        let mut snapshots = Vec::new();
        for (i, step) in steps.into_iter().enumerate() {
            match step {
                Step::Batch(ops) => batch(&volume, &mut model, &ops, (i * 16) as u8),
                Step::Row(at, row) => batch(&volume, &mut model, &laid(at, &row), (i * 16) as u8),
                Step::Snapshot => {
                    let name = format!("s{i}");
                    dir.snapshot(&volume, &name).expect("snapshot");
                    snapshots.push((name, model.clone()));
                }
                Step::Hold => drop(volume.hold(Duration::from_secs(9)).expect("hold")),
                Step::Grow(bytes) => {
                    let size = (volume.size_bytes() + bytes).next_multiple_of(grain);
                    volume.resize(size).expect("grow");
                    model.resize(size as usize, 0);
                    prop_assert!(volume.size_bytes() == size && read_all(&volume) == model);
                }
                Step::Reopen => {
                    prop_assert!(volume.queue(1).expect("queue").run(Op::Flush).0.is_ok());
                    drop(volume);
                    volume = dir.open(Access::ReadWrite).expect("reopen");
                    prop_assert!(read_all(&volume) == model);
                }
                Step::Delete(n) if !snapshots.is_empty() => {
                    let (name, _) = snapshots.remove(n % snapshots.len());
                    prop_assert!(dir.delete_snapshot(&name).is_err(), "it is in use");
                    drop(volume);
                    delete(&dir, &name, &snapshots);
                    volume = dir.open(Access::ReadWrite).expect("reopen");
                    prop_assert!(read_all(&volume) == model);
                }
                Step::Delete(_) => {}
            }
        }
        // Points are readable while the head is open for writing.
        for (name, bytes) in &snapshots {
            let point = dir.open_snapshot(name).expect("open a snapshot");
            prop_assert!(read_all(&point) == *bytes, "snapshot {}", name);
            holes_are_zeros(&point, bytes);
        }
        for (i, (since, before)) in snapshots.iter().enumerate() {
            changed_ranges_cover(&volume, since, before, &model);
            prop_assert!(volume.knows_changes_since(since));
            for (later, after) in &snapshots[i..] {
                let point = dir.open_snapshot(later).expect("open a snapshot");
                changed_ranges_cover(&point, since, before, after);
                if since == later {
                    prop_assert!(!point.changed_extents(since, 0, u64::MAX, 9).expect("known")[0].dirty);
                } else {
                    let early = dir.open_snapshot(since).expect("open a snapshot");
                    prop_assert!(early.changed_extents(later, 0, 1, 1).is_err(), "it is not below");
                }
            }
        }
    }
}

/// What is told to be a hole is zeros, and all of the volume is told of.
fn holes_are_zeros(point: &Volume, bytes: &[u8]) {
    let mut at = 0;
    point.extents(0, u64::MAX, |extent| {
        let end = at + extent.len as usize;
        assert!(!extent.hole || bytes[at..end].iter().all(|&b| b == 0));
        at = end;
        true
    });
    assert_eq!(at, bytes.len());
}

/// Every byte that differs lies in a changed range, in one answer as in many small ones from odd offsets.
fn changed_ranges_cover(volume: &Volume, since: &str, before: &[u8], after: &[u8]) {
    let size = after.len() as u64;
    let mut before = before.to_vec();
    before.resize(after.len(), 0);
    for (start, extents_max) in [(0, usize::MAX), (1001, 1), (3 * BLOCK_BYTES, 2)] {
        let mut at = start;
        while at < size {
            let extents = volume.changed_extents(since, at, u64::MAX, extents_max).expect("known");
            assert!(!extents.is_empty() && extents.len() <= extents_max);
            assert!(extents.windows(2).all(|pair| pair[0].dirty != pair[1].dirty));
            for extent in extents {
                assert_eq!(extent.offset, at, "no gaps");
                at += extent.len;
                let range = extent.offset as usize..at as usize;
                assert!(extent.dirty || before[range.clone()] == after[range], "{extent:?} since {since}");
            }
        }
        assert_eq!(at, size);
    }
    assert_eq!(volume.changed_extents(since, size, 1, 9), Ok(vec![]));
}

#[test]
fn changes_are_exact_to_a_block() {
    let temp = TempDir::new().expect("tempdir");
    let dir = VolumeDir::new(temp.path());
    dir.create(1 << 30).expect("create");
    let volume = dir.open(Access::ReadWrite).expect("open");
    let mut queue = volume.queue(1).expect("queue");
    let mut write = |offset, len| {
        queue.run(Op::Write { offset, buffers: Buffers::owned(len), fua: false }).0.expect("write");
    };
    write(0, 100_000);
    dir.snapshot(&volume, "a").expect("snapshot");
    write(8191, 2);
    dir.snapshot(&volume, "b").expect("snapshot");
    write(500 << 20, 1);
    let dirty = |since| -> Vec<(u64, u64)> {
        let extents = volume.changed_extents(since, 0, 1 << 30, 100).expect("known");
        extents.iter().filter(|e| e.dirty).map(|e| (e.offset, e.len)).collect()
    };
    assert_eq!(dirty("a"), [(4096, 8192), (500 << 20, 4096)]);
    assert_eq!(dirty("b"), [(500 << 20, 4096)]);
    assert_eq!(volume.changed_extents("c", 0, 1, 1), Err(crate::ChangesError::NoSuchSnapshot("c".into())));
    let raw = temp.path().join("raw");
    std::fs::write(&raw, b"x").expect("write");
    let raw = Volume::open_raw(File::open(raw).expect("open"), Access::ReadOnly).expect("raw");
    assert!(raw.changed_extents("a", 0, 1, 1).is_err());
}

#[test]
fn a_queue_goes_on_over_a_snapshot_taken_by_another_thread() {
    let temp = TempDir::new().expect("tempdir");
    let dir = VolumeDir::new(temp.path());
    dir.create(64 << 20).expect("create");
    let volume = dir.open(Access::ReadWrite).expect("open");
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let writer = std::thread::spawn({
        let (volume, stop) = (volume.clone(), Arc::clone(&stop));
        move || {
            let mut queue = volume.queue(32).expect("queue");
            let mut value: u64 = 0;
            let mut written = 0;
            while !stop.load(std::sync::atomic::Ordering::SeqCst) || queue.in_use() > 0 {
                while queue.in_use() < 32 && !stop.load(std::sync::atomic::Ordering::SeqCst) {
                    value += 1;
                    let mut buffers = Buffers::owned(512);
                    buffers.as_mut_slice().expect("owned")[..8].copy_from_slice(&value.to_le_bytes());
                    let offset = value % 1000 * 1536;
                    queue.submit(value, Op::Write { offset, buffers, fua: false }).expect("room");
                }
                queue.kick();
                queue.wait();
                queue.reap(|_, result, _| {
                    result.expect("write");
                    written += 1;
                });
            }
            written
        }
    });
    for i in 0..8 {
        dir.snapshot(&volume, &format!("s{i}")).expect("snapshot");
    }
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    assert!(writer.join().expect("writer") > 0);
    assert_eq!(volume.layer_count(), 9);
    let before = read_all(&volume);
    volume.queue(1).expect("queue").run(Op::Flush).0.expect("flush");
    drop(volume);
    assert!(read_all(&dir.open(Access::ReadWrite).expect("reopen")) == before);
}

#[test]
fn guest_memory_is_read_and_written_in_place() {
    let temp = TempDir::new().expect("tempdir");
    let dir = VolumeDir::new(temp.path());
    dir.create(1 << 20).expect("create");
    let volume = dir.open(Access::ReadWrite).expect("open");
    let memory = Arc::new(GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory"));
    memory.write_slice(b"hello, ", GuestAddress(100)).expect("write");
    memory.write_slice(b"guest", GuestAddress(5000)).expect("write");
    let mut queue = volume.queue(4).expect("queue");
    let out = [(GuestAddress(100), 7), (GuestAddress(5000), 5)];
    let buffers = Buffers::guest(&memory, out).expect("inside");
    let (result, mut buffers) = queue.run(Op::Write { offset: 4090, buffers, fua: true });
    result.expect("write");
    buffers.refill_guest(&memory, [(GuestAddress(9000), 3), (GuestAddress(20000), 9)]).expect("inside");
    queue.run(Op::Read { offset: 4090, buffers }).0.expect("read");
    let mut got = [0; 12];
    memory.read_slice(&mut got[..3], GuestAddress(9000)).expect("read");
    memory.read_slice(&mut got[3..], GuestAddress(20000)).expect("read");
    assert_eq!(&got, b"hello, guest");
}

#[test]
fn nothing_written_changes_nothing() {
    let temp = TempDir::new().expect("tempdir");
    let dir = VolumeDir::new(temp.path());
    dir.create(20_000).expect("create");
    let volume = dir.open(Access::ReadWrite).expect("open");
    let mut queue = volume.queue(1).expect("queue");
    let mut buffers = Buffers::owned(20_000);
    buffers.as_mut_slice().expect("owned").fill(7);
    queue.run(Op::Write { offset: 0, buffers, fua: false }).0.expect("write");
    dir.snapshot(&volume, "a").expect("snapshot");
    for offset in [0, 100, 20_000] {
        queue.run(Op::Write { offset, buffers: Buffers::owned(0), fua: true }).0.expect("write");
        queue.run(Op::WriteZeroes { offset, len: 0, unmap: true }).0.expect("zeroes");
        queue.run(Op::Discard { offset, len: 0 }).0.expect("discard");
    }
    assert!(read_all(&volume) == [7; 20_000]);
}

#[test]
fn ranges_and_access_are_checked() {
    let temp = TempDir::new().expect("tempdir");
    let dir = VolumeDir::new(temp.path());
    dir.create(10_000).expect("create");
    let writer = dir.open(Access::ReadWrite).expect("open");
    let mut queue = writer.queue(2).expect("queue");
    for (offset, len) in [(10_000, 1), (9_999, 2), (u64::MAX, 2)] {
        let read = Op::Read { offset, buffers: Buffers::owned(len) };
        let size = 10_000;
        assert_eq!(queue.run(read).0, Err(IoError::OutOfRange { offset, len: len as u64, size }));
    }
    let in_use = |r: Result<Volume, VolumeDirError>| match r {
        Err(VolumeDirError::Open { source: OpenError::InUse { layer: 0 }, .. }) => {}
        other => panic!("{other:?}"),
    };
    in_use(dir.open(Access::ReadWrite));
    in_use(dir.open(Access::ReadOnly));
    drop((writer, queue));
    let reader = dir.open(Access::ReadOnly).expect("open");
    let _second = dir.open(Access::ReadOnly).expect("readers share");
    in_use(dir.open(Access::ReadWrite));
    let mut queue = reader.queue(1).expect("queue");
    assert_eq!(queue.run(Op::Discard { offset: 0, len: 1 }).0, Err(IoError::ReadOnly));
    assert_eq!(queue.run(Op::Flush).0, Ok(()));
}

#[test]
fn leftovers_and_damage_are_told_apart() {
    let temp = TempDir::new().expect("tempdir");
    let dir = VolumeDir::new(temp.path());
    dir.create(1 << 20).expect("create");
    // A snapshot that did not commit leaves files that nobody names.
    std::fs::write(temp.path().join("00000001.data"), b"x").expect("write");
    std::fs::write(temp.path().join("00000001.map"), b"garbage").expect("write");
    let volume = dir.open(Access::ReadWrite).expect("leftovers are ignored");
    dir.snapshot(&volume, "a").expect("and used again");
    assert!(dir.snapshot(&volume, "a").is_err(), "a taken name");
    drop(volume);

    // The successor is named now: damage to it must not go unseen.
    let map = temp.path().join("00000001.map");
    let good = std::fs::read(&map).expect("read");
    std::fs::write(&map, &good[..4000]).expect("write");
    assert!(dir.open(Access::ReadWrite).is_err());
    let mut damaged = good.clone();
    damaged[8192] = 0xff;
    std::fs::write(&map, &damaged).expect("write");
    match dir.open(Access::ReadWrite) {
        Err(VolumeDirError::Open { source: OpenError::DamagedMap { layer: 1, at: 8192 }, .. }) => {}
        other => panic!("{other:?}"),
    }
    dir.open_snapshot("a").expect("the point below is whole");
    std::fs::write(&map, &good).expect("write");
    File::options()
        .write(true)
        .open(temp.path().join("00000001.data"))
        .and_then(|f| f.set_len(5))
        .expect("cut");
    assert!(dir.open(Access::ReadWrite).is_err(), "a data file that is too short");
    assert!(dir.open_snapshot("b").is_err());
}

#[test]
fn raw_files_and_what_is_none() {
    let temp = TempDir::new().expect("tempdir");
    let path = temp.path().join("raw");
    std::fs::write(&path, vec![3; 5000]).expect("write");
    let open = || File::options().read(true).write(true).open(&path).expect("open");
    let volume = Volume::open_raw(open(), Access::ReadWrite).expect("raw");
    assert_eq!(volume.size_bytes(), 5000);
    assert!(matches!(Volume::open_raw(open(), Access::ReadWrite), Err(OpenError::InUse { .. })));
    let mut queue = volume.queue(8).expect("queue");
    queue.run(Op::WriteZeroes { offset: 10, len: 100, unmap: false }).0.expect("zeroes");
    let mut expected = vec![3; 5000];
    expected[10..110].fill(0);
    assert!(read_all(&volume) == expected);
    let files = LayerFiles { data: open(), map: open() };
    assert!(matches!(volume.snapshot(files, "x"), Err(crate::SnapshotError::Raw)));
    let dir = File::open(temp.path()).expect("open");
    assert!(matches!(Volume::open_raw(dir, Access::ReadOnly), Err(OpenError::NotADisk(_))));
    let files = VolumeFiles { layers: vec![LayerFiles { data: open(), map: open() }] };
    assert!(matches!(Volume::open(files, Access::ReadOnly), Err(OpenError::Header { index: 0, .. })));
    assert!(matches!(Volume::open(VolumeFiles { layers: vec![] }, Access::ReadOnly), Err(OpenError::Empty)));
}
