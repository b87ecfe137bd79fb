//! Holding, growing: what concerns whole layers, on real files.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tempfile::TempDir;

use crate::{Access, BLOCK_BYTES, Buffers, LayerFiles, Op, ResizeError, SnapshotError, Volume, VolumeDir};

fn write(volume: &Volume, offset: u64, bytes: &[u8]) {
    let mut buffers = Buffers::owned(bytes.len());
    buffers.as_mut_slice().expect("owned").copy_from_slice(bytes);
    volume.queue(1).expect("queue").run(Op::Write { offset, buffers, fua: false }).0.expect("write");
}

fn read(volume: &Volume, offset: u64, len: usize) -> Vec<u8> {
    let buffers = Buffers::owned(len);
    let (result, buffers) = volume.queue(1).expect("queue").run(Op::Read { offset, buffers });
    result.expect("read");
    buffers.as_slice().expect("owned").to_vec()
}

/// The files that the next head of a volume in this directory may have.
fn new_head(dir: &VolumeDir, volume: &Volume) -> LayerFiles {
    let number = volume.head_header().expect("layered").layer + 1;
    let open = |suffix| {
        let path = dir.path().join(format!("{number:08}.{suffix}"));
        std::fs::File::options().read(true).write(true).create(true).truncate(true).open(path).expect("open")
    };
    LayerFiles { data: open("data"), map: open("map") }
}

#[test]
fn volumes_that_are_held_together_are_cut_at_one_instant() {
    let temp = TempDir::new().expect("tempdir");
    let dirs = ["a", "b"].map(|name| VolumeDir::new(temp.path().join(name)));
    let volumes = dirs.each_ref().map(|dir| {
        dir.create(1 << 20).expect("create");
        dir.open(Access::ReadWrite).expect("open")
    });
    let stop = Arc::new(AtomicBool::new(false));
    let writer = std::thread::spawn({
        let (volumes, stop) = (volumes.clone(), Arc::clone(&stop));
        move || {
            let mut counter: u64 = 0;
            // First to one volume, and when that is answered, to the other: b never has a number that a has not.
            while !stop.load(Ordering::SeqCst) {
                counter += 1;
                volumes.iter().for_each(|volume| write(volume, 0, &counter.to_le_bytes()));
            }
            counter
        }
    });
    for i in 0..20 {
        let name = format!("s{i}");
        let held = volumes.each_ref().map(|volume| volume.hold(Duration::from_secs(9)).expect("hold"));
        for ((held, dir), volume) in held.into_iter().zip(&dirs).zip(&volumes) {
            held.seal(new_head(dir, volume), &name).expect("seal");
        }
        let [a, b] = dirs.each_ref().map(|dir| {
            let point = dir.open_snapshot(&name).expect("open");
            u64::from_le_bytes(read(&point, 0, 8).try_into().expect("8 bytes"))
        });
        assert!(a == b || a == b + 1, "a has {a}, b has {b}");
    }
    stop.store(true, Ordering::SeqCst);
    assert!(writer.join().expect("writer") > 0);
}

#[test]
fn a_hold_waits_for_what_is_under_way_and_for_its_turn() {
    let temp = TempDir::new().expect("tempdir");
    let dir = VolumeDir::new(temp.path());
    dir.create(1 << 20).expect("create");
    let volume = dir.open(Access::ReadWrite).expect("open");
    let held = volume.hold(Duration::from_secs(9)).expect("hold");
    let mut queue = volume.queue(1).expect("queue");
    queue.submit(7, Op::Read { offset: 0, buffers: Buffers::owned(1) }).expect("room");
    queue.kick();
    queue.reap(|_, _, _| panic!("it has to wait"));
    assert!(matches!(volume.hold(Duration::from_millis(1)), Err(SnapshotError::NotDrained(1))));
    assert!(matches!(held.seal(new_head(&dir, &volume), ""), Err(SnapshotError::Name { .. })));
    let mut answered = 0;
    while answered == 0 {
        queue.wait();
        queue.reap(|_, result, _| {
            result.expect("read");
            answered += 1;
        });
    }
    assert_eq!(volume.snapshots(), []);
}

#[test]
fn growing() {
    let temp = TempDir::new().expect("tempdir");
    let dir = VolumeDir::new(temp.path());
    dir.create(10_000).expect("create");
    let volume = dir.open(Access::ReadWrite).expect("open");
    write(&volume, 0, &[7; 10_000]);
    let mut queue = volume.queue(1).expect("queue");
    assert!(queue.run(Op::Read { offset: 10_000, buffers: Buffers::owned(1) }).0.is_err());
    volume.resize(10_000).expect("nothing to do");
    match volume.resize(9_999) {
        Err(ResizeError::Shrink { from: 10_000, to: 9_999 }) => {}
        other => panic!("{other:?}"),
    }
    assert!(matches!(volume.resize(u64::MAX), Err(ResizeError::TooLarge(_))));
    volume.resize(1 << 40).expect("grow");
    assert_eq!(read(&volume, 9_999, 5000)[..2], [7, 0]);
    queue.run(Op::Read { offset: (1 << 40) - 1, buffers: Buffers::owned(1) }).0.expect("a queue made before");
    dir.snapshot(&volume, "a").expect("snapshot");
    volume.resize((1 << 40) + BLOCK_BYTES).expect("grow");
    write(&volume, 1 << 40, &[9]);
    drop((queue, volume));
    let volume = dir.open(Access::ReadWrite).expect("reopen");
    assert_eq!(volume.size_bytes(), (1 << 40) + BLOCK_BYTES);
    assert_eq!(read(&volume, 1 << 40, 2), [9, 0]);
    assert_eq!(dir.open_snapshot("a").expect("open").size_bytes(), 1 << 40);
    drop(volume);
    let reader = dir.open(Access::ReadOnly).expect("open");
    assert!(matches!(reader.resize(1 << 41), Err(ResizeError::ReadOnly)));
}
