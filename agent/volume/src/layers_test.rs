//! Holding, growing, cloning, rolling back: what concerns whole layers, on real files.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tempfile::TempDir;

use crate::{
    Access, BLOCK_BYTES, Buffers, CloneError, LayerFiles, Op, OpenError, ResizeError, RollbackError,
    SnapshotError, Volume, VolumeDir, VolumeDirError,
};

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

fn link(from: &std::path::Path, to: &std::path::Path) -> std::io::Result<()> {
    std::fs::hard_link(from, to)
}

#[test]
fn a_clone_starts_as_the_point_and_goes_its_own_way() {
    let temp = TempDir::new().expect("tempdir");
    let source = VolumeDir::new(temp.path().join("source"));
    source.create(1 << 20).expect("create");
    let volume = source.open(Access::ReadWrite).expect("open");
    write(&volume, 0, &[1; 9000]);
    source.snapshot(&volume, "a").expect("snapshot");
    write(&volume, 5000, &[2; 9000]);
    source.snapshot(&volume, "b").expect("snapshot");
    write(&volume, 0, &[3; 20_000]);

    let dir = VolumeDir::new(temp.path().join("clone"));
    assert!(matches!(
        dir.clone_point(&source, "b", Some(5), &mut link),
        Err(VolumeDirError::Clone { source: CloneError::Size { .. }, .. })
    ));
    assert!(dir.clone_point(&source, "c", None, &mut link).is_err(), "no such snapshot");
    dir.clone_point(&source, "b", Some(2 << 20), &mut link).expect("clone");
    assert!(dir.clone_point(&source, "b", None, &mut link).is_err(), "it is there already");
    let names: Vec<_> =
        std::fs::read_dir(temp.path()).expect("list").map(|e| e.expect("entry").file_name()).collect();
    assert_eq!(names.len(), 2, "nothing else is left behind: {names:?}");

    let clone = dir.open(Access::ReadWrite).expect("open");
    assert_eq!((clone.size_bytes(), clone.snapshots()), (2 << 20, vec![]));
    let point = source.open_snapshot("b").expect("open");
    assert!(read(&clone, 0, 1 << 20) == read(&point, 0, 1 << 20));
    assert!(read(&clone, 1 << 20, 1 << 20).iter().all(|b| *b == 0));
    write(&clone, 100, &[9; 5000]);
    dir.snapshot(&clone, "b").expect("its own snapshots have its own names");
    assert!(read(&point, 0, 9000)[..5000] == [1; 5000]);
    assert!(read(&volume, 0, 20_000) == [3; 20_000]);
    assert_ne!(clone.head_header().expect("layered").volume, volume.head_header().expect("layered").volume);
    drop((clone, volume));
    for dir in [&dir, &source] {
        let report = dir.files(Access::ReadOnly).expect("files").check().expect("check");
        assert!(report.is_clean(), "{:?}", report.problems);
    }
    std::fs::remove_dir_all(source.path()).expect("remove");
    assert!(read(&dir.open(Access::ReadWrite).expect("open"), 100, 5000) == [9; 5000]);
}

#[test]
fn an_image_is_shared_and_never_written() {
    let temp = TempDir::new().expect("tempdir");
    let image = temp.path().join("disk.raw");
    std::fs::write(&image, [5; 10_000]).expect("write");
    let dirs = ["a", "b"].map(|name| VolumeDir::new(temp.path().join(name)));
    for dir in &dirs {
        dir.clone_image(&image, Some(1 << 40), &mut link).expect("clone");
    }
    let [a, b] = dirs.each_ref().map(|dir| dir.open(Access::ReadWrite).expect("open"));
    write(&a, 0, &[6; 4096]);
    write(&a, 9_999, &[6; 2]);
    assert!(read(&a, 0, 10_002) == [vec![6; 4096], vec![5; 5903], vec![6; 2], vec![0]].concat());
    assert!(read(&b, 0, 10_001) == [vec![5; 10_000], vec![0]].concat());
    assert!(std::fs::read(&image).expect("read") == [5; 10_000]);
}

#[test]
fn a_clone_of_a_large_volume_is_immediate() {
    let temp = TempDir::new().expect("tempdir");
    let source = VolumeDir::new(temp.path().join("source"));
    source.create(1 << 40).expect("create");
    let volume = source.open(Access::ReadWrite).expect("open");
    source.snapshot(&volume, "a").expect("snapshot");
    for i in 0..64 {
        write(&volume, i << 34, &[1; 9000]);
    }
    source.snapshot(&volume, "b").expect("snapshot");
    let start = std::time::Instant::now();
    let dir = VolumeDir::new(temp.path().join("clone"));
    dir.clone_point(&source, "b", None, &mut link).expect("clone");
    println!("a clone of 1 TiB took {:?}", start.elapsed());
    assert!(read(&dir.open(Access::ReadOnly).expect("open"), 63 << 34, 9000) == [1; 9000]);
}

#[test]
fn zeros_that_keep_their_space_have_it() {
    use std::os::unix::fs::MetadataExt;
    let temp = TempDir::new().expect("tempdir");
    for key in [None, Some(crate::crypto::test_secret())] {
        let path = temp.path().join(if key.is_some() { "encrypted" } else { "plain" });
        let mut dir = VolumeDir::new(&path);
        if let Some(key) = key {
            dir = dir.with_key(key);
        }
        dir.create(4 << 20).expect("create");
        let volume = dir.open(Access::ReadWrite).expect("open");
        write(&volume, 0, &[1; 3 << 20]);
        let head = dir.snapshot(&volume, "a").expect("snapshot").layer + 1;
        let space = || path.join(format!("{head:08}.data")).metadata().expect("metadata").blocks() * 512;
        let zeroes = |offset, len, unmap| {
            let op = Op::WriteZeroes { offset, len, unmap };
            volume.queue(1).expect("queue").run(op).0.expect("zeroes");
        };
        zeroes(1000, 2 << 20, true);
        assert!(space() < 64 << 10, "{} bytes for nothing", space());
        zeroes(1000, 2 << 20, false);
        volume.queue(1).expect("queue").run(Op::Flush).0.expect("flush");
        assert!(space() >= 2 << 20, "{} bytes", space());
        volume.extents(4096, 1 << 20, |extent| {
            assert!(!extent.hole);
            true
        });
        drop(volume);
        let volume = dir.open(Access::ReadWrite).expect("reopen");
        let expected = [vec![1; 1000], vec![0; 2 << 20], vec![1; 1000]].concat();
        assert!(read(&volume, 0, expected.len()) == expected);
    }
}

#[test]
fn rolling_back() {
    let temp = TempDir::new().expect("tempdir");
    let dir = VolumeDir::new(temp.path());
    dir.create(1 << 20).expect("create");
    let volume = dir.open(Access::ReadWrite).expect("open");
    for (i, name) in ["a", "b", "c"].iter().enumerate() {
        write(&volume, 1000 * i as u64, &[i as u8 + 1; 5000]);
        dir.snapshot(&volume, name).expect("snapshot");
        volume.resize((1 << 20) + 1000 * (i as u64 + 1)).expect("grow");
    }
    write(&volume, 0, &[9; 10_000]);
    let at_b = read(&dir.open_snapshot("b").expect("open"), 0, 20_000);
    match dir.rollback("b", false) {
        Err(VolumeDirError::Rollback {
            source: RollbackError::Open(OpenError::InUse { layer: 3 }), ..
        }) => {}
        other => panic!("{other:?}"),
    }
    drop(volume);
    match dir.rollback("b", false) {
        Err(VolumeDirError::Rollback { source: RollbackError::Later(names), .. }) => assert_eq!(names, ["c"]),
        other => panic!("{other:?}"),
    }
    assert!(dir.rollback("x", true).is_err());
    let went = dir.rollback("b", true).expect("rollback");
    assert_eq!((went.head, went.left, went.size_bytes), (4, vec![2, 3], (1 << 20) + 1000));
    let volume = dir.open(Access::ReadWrite).expect("open");
    assert_eq!(volume.size_bytes(), (1 << 20) + 1000);
    assert!(read(&volume, 0, 20_000) == at_b);
    assert_eq!(volume.snapshots().iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    write(&volume, 0, &[7; 10]);
    dir.snapshot(&volume, "c").expect("the name is free again");
    drop(volume);
    let report = dir.files(Access::ReadOnly).expect("files").check().expect("check");
    assert!(report.is_clean() && report.leftovers.is_empty(), "{report:?}");
}
