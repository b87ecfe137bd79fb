//! The scrub: sums are computed once, any rot of sealed data or their map is found and told with the points that read it.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
    sync::atomic::AtomicBool,
};

use proptest::prelude::*;
use tempfile::TempDir;

use crate::{
    Access, BLOCK_BYTES, Buffers, MAP_OFFSET, Op, Rot, RotKind, ScrubOptions, ScrubPlace, ScrubReport,
    Volume, VolumeDir,
};

const SIZE: u64 = 900 * BLOCK_BYTES + 99;

fn write(volume: &Volume, offset: u64, len: usize, byte: u8) {
    let mut buffers = Buffers::owned(len);
    buffers.as_mut_slice().expect("owned").fill(byte);
    volume.queue(1).expect("queue").run(Op::Write { offset, buffers, fua: true }).0.expect("write");
}

/// Layers: `a` (0: blocks 0 to 9, 200), `b` (1: blocks 5 to 6, 300; 200 zero), head (2: block 0).
fn volume(path: &Path) -> VolumeDir {
    let dir = VolumeDir::new(path);
    dir.create(SIZE).expect("create");
    let volume = dir.open(Access::ReadWrite).expect("open");
    write(&volume, 0, 10 * 4096, 1);
    write(&volume, 200 * BLOCK_BYTES, 4096, 2);
    dir.snapshot(&volume, "a").expect("snapshot");
    write(&volume, 5 * BLOCK_BYTES, 2 * 4096, 3);
    write(&volume, 300 * BLOCK_BYTES, 4096, 4);
    write(&volume, SIZE - 99, 99, 5);
    let zeroes = Op::WriteZeroes { offset: 200 * BLOCK_BYTES, len: 4096, unmap: true };
    volume.queue(1).expect("queue").run(zeroes).0.expect("zeroes");
    dir.snapshot(&volume, "b").expect("snapshot");
    write(&volume, 0, 4096, 6);
    dir
}

fn scrub_with(dir: &VolumeDir, compare: bool, add_sums: bool) -> ScrubReport {
    let access = if add_sums { Access::ReadWrite } else { Access::ReadOnly };
    let cancel = AtomicBool::new(false);
    let options = ScrubOptions { compare, add_sums, from: None, bytes_per_s: 0, cancel: &cancel };
    dir.files(access).expect("files").scrub(&options, |_| {}).expect("scrub")
}

fn scrub(dir: &VolumeDir) -> ScrubReport {
    scrub_with(dir, true, true)
}

fn flip(dir: &VolumeDir, name: &str, at: u64, bits: u8) {
    let file = File::options().read(true).write(true).open(dir.path().join(name)).expect("open");
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).expect("read");
    file.write_all_at(&[byte[0] ^ bits], at).expect("write");
    file.sync_all().expect("sync");
}

#[test]
fn sums_are_added_once_and_compared_ever_after() {
    let temp = TempDir::new().expect("tempdir");
    let dir = volume(temp.path());
    let before = scrub_with(&dir, true, false);
    assert_eq!((before.compared_bytes, before.added_bytes), (0, 0));
    assert!(before.missing_bytes >= 11 * BLOCK_BYTES, "{before:?}");
    let first = scrub(&dir);
    assert_eq!((first.compared_bytes, first.rot_count, first.missing_bytes), (0, 0, 0));
    // The bottom's chunks are read whole, those above only where there are data.
    assert_eq!(first.added_bytes, 2 * crate::sums::CHUNK_BYTES + 3 * BLOCK_BYTES + 99);
    let second = scrub(&dir);
    assert_eq!(second, ScrubReport { compared_bytes: first.added_bytes, ..ScrubReport::default() });
    let only_missing = scrub_with(&dir, false, true);
    assert_eq!(only_missing, ScrubReport::default(), "there is nothing to do");

    // A new snapshot adds its layer's sums, and reads nothing else.
    let volume = dir.open(Access::ReadWrite).expect("open");
    dir.snapshot(&volume, "c").expect("snapshot");
    drop(volume);
    assert_eq!(scrub_with(&dir, false, true).added_bytes, BLOCK_BYTES);
}

#[test]
fn a_clone_has_the_sums_of_what_it_shares() {
    let temp = TempDir::new().expect("tempdir");
    let source = volume(&temp.path().join("source"));
    let sums = scrub(&source);
    assert!(sums.added_bytes > 0);
    let clone = VolumeDir::new(temp.path().join("clone"));
    clone.clone_point(&source, "b", None, &mut |from, to| fs::hard_link(from, to)).expect("clone");
    let found = scrub(&clone);
    assert_eq!((found.added_bytes, found.rot_count, found.damaged_sums), (0, 0, 0), "{found:?}");
    assert_eq!(found.compared_bytes, sums.added_bytes, "all of it is compared");
    // They are of this clone: rot is told, and a merge in the source does not change what the clone's sums say.
    source.delete_snapshot("a").expect("merged");
    assert_eq!(scrub(&clone), found);
    flip(&clone, "00000001.data", 5 * BLOCK_BYTES + 9, 1);
    assert_eq!(scrub(&clone).rot_count, 1);
}

#[test]
fn rot_is_told_with_its_place_and_the_points_that_read_it() {
    let named = |name: &str, at: u64| {
        let temp = TempDir::new().expect("tempdir");
        let dir = volume(temp.path());
        assert_eq!(scrub(&dir).rot, []);
        flip(&dir, name, at, 0x10);
        let report = scrub(&dir);
        assert_eq!(report.rot_count, 1, "{report:?}");
        assert_eq!(scrub(&dir).rot, report.rot, "it does not bless what it has found");
        report.rot[0].clone()
    };
    let rot = |layer, offset, len, points: &[&str]| Rot {
        layer,
        offset,
        len,
        kind: RotKind::Data,
        points: points.iter().map(|p| (*p).to_owned()).collect(),
    };
    // Nobody but "a" reads block 200 of the bottom, but others do read other blocks of its chunk.
    assert_eq!(named("00000000.data", 200 * BLOCK_BYTES), rot(0, 128 * 4096, 128 * 4096, &["a", "b", ""]));
    assert_eq!(named("00000000.data", 3), rot(0, 0, 128 * 4096, &["a", "b", ""]));
    assert_eq!(named("00000001.data", 6 * BLOCK_BYTES), rot(1, 5 * 4096, 2 * 4096, &["b", ""]));
    assert_eq!(named("00000001.data", SIZE - 1), rot(1, SIZE - 99, 99, &["b", ""]));
    // What was a hole.
    assert_eq!(named("00000000.data", 700 * BLOCK_BYTES), rot(0, 640 * 4096, 128 * 4096, &["a", "b", ""]));
    // The map: block 300 no longer data; block 310 suddenly zero.
    let map = |at: u64, bits| {
        let temp = TempDir::new().expect("tempdir");
        let dir = volume(temp.path());
        scrub(&dir);
        flip(&dir, "00000001.map", MAP_OFFSET + at, bits);
        let checked = dir.files(Access::ReadOnly).expect("files").check().expect("check");
        assert!(!checked.is_clean(), "the quick check sees the map's own sum");
        scrub(&dir).rot
    };
    for rot in [map(75, 0b01), map(77, 0b10_00_00), map(150, 0b10)] {
        assert_eq!((rot.len(), rot[0].layer, rot[0].kind), (1, 1, RotKind::Map), "{rot:?}");
        assert_eq!(rot[0].points, ["b", ""]);
    }
}

#[test]
fn a_point_that_has_its_own_bytes_is_not_named() {
    let temp = TempDir::new().expect("tempdir");
    let dir = volume(temp.path());
    let volume = dir.open(Access::ReadWrite).expect("open");
    write(&volume, 5 * BLOCK_BYTES, 2 * 4096, 7);
    drop(volume);
    scrub(&dir);
    flip(&dir, "00000001.data", 5 * BLOCK_BYTES, 1);
    let rot = scrub(&dir).rot;
    assert_eq!((rot[0].offset, rot[0].len, &rot[0].points[..]), (5 * 4096, 8192, &["b".to_owned()][..]));
}

#[test]
fn a_deleted_snapshot_leaves_no_false_alarm() {
    let temp = TempDir::new().expect("tempdir");
    let dir = volume(temp.path());
    let volume = dir.open(Access::ReadWrite).expect("open");
    dir.snapshot(&volume, "c").expect("snapshot");
    write(&volume, 300 * BLOCK_BYTES, 4096, 9);
    drop(volume);
    assert_eq!(scrub(&dir).rot_count, 0);
    // Into a sealed layer, then of the bottom.
    for name in ["b", "a"] {
        dir.delete_snapshot(name).expect("delete");
        let report = scrub(&dir);
        assert_eq!((report.rot_count, report.damaged_sums), (0, 0), "{report:?}");
        assert!(report.added_bytes > 0, "what has changed got new sums");
        let again = scrub(&dir);
        assert_eq!((again.rot_count, again.added_bytes, again.missing_bytes), (0, 0, 0));
    }
}

#[test]
fn a_lost_or_torn_sums_page_is_computed_again() {
    let temp = TempDir::new().expect("tempdir");
    let dir = volume(temp.path());
    scrub(&dir);
    // One page of bits, the region's header, the sums page.
    flip(&dir, "00000001.map", MAP_OFFSET + 8192 + 2000, 1);
    let report = scrub(&dir);
    assert_eq!((report.rot_count, report.damaged_sums), (0, 1));
    assert_eq!(scrub(&dir).damaged_sums, 0);
    flip(&dir, "00000001.map", MAP_OFFSET + 4096 + 30, 1);
    let report = scrub(&dir);
    assert_eq!((report.rot_count, report.missing_bytes), (0, 0));
}

#[test]
fn a_pace_is_kept_and_a_cancel_heard() {
    let temp = TempDir::new().expect("tempdir");
    let dir = volume(temp.path());
    let (start, cancel) = (std::time::Instant::now(), AtomicBool::new(false));
    let options =
        ScrubOptions { compare: true, add_sums: true, from: None, bytes_per_s: 4 << 20, cancel: &cancel };
    let files = dir.files(Access::ReadWrite).expect("files");
    let mut last = (0, 0);
    let report = files.scrub(&options, |now| last = (now.done, now.total)).expect("scrub");
    assert!(start.elapsed().as_millis() >= 240, "a MiB at 4 MiB a second: {:?}", start.elapsed());
    assert!(last.1 > 0 && last.0 == last.1 && !report.cancelled, "{last:?}");
    let stop = |_| cancel.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(files.scrub(&options, stop).expect("scrub").cancelled);
}

#[test]
fn a_scrub_that_was_interrupted_goes_on_and_misses_nothing() {
    let temp = TempDir::new().expect("tempdir");
    // Two pages of the map, so that there is a place inside a layer.
    let dir = VolumeDir::new(temp.path());
    dir.create(130 << 20).expect("create");
    let volume = dir.open(Access::ReadWrite).expect("open");
    let places = [0, 1 << 20, 65 << 20, 129 << 20];
    places.iter().for_each(|at| write(&volume, *at, 4096, 1));
    dir.snapshot(&volume, "a").expect("snapshot");
    places.iter().for_each(|at| write(&volume, *at, 4096, 2));
    dir.snapshot(&volume, "b").expect("snapshot");
    drop(volume);
    let whole = scrub(&dir);
    let files = dir.files(Access::ReadWrite).expect("files");
    let never = AtomicBool::new(false);
    let from = |from| ScrubOptions { compare: true, add_sums: true, from, bytes_per_s: 0, cancel: &never };
    let place = |layer, page| ScrubPlace { layer, page };
    let mut seen = Vec::new();
    let first = files.scrub(&from(None), |now| seen.push(now.sound)).expect("scrub");
    assert_eq!(first.compared_bytes, whole.added_bytes);
    seen.dedup();
    assert_eq!(seen, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)].map(|(l, p)| place(l, p)));
    // From the middle on: only what follows is compared.
    for (at, compared) in [(place(1, 1), 8192), (place(1, 2), 4096), (place(2, 0), 0)] {
        assert_eq!(files.scrub(&from(Some(at)), |_| ()).expect("scrub").compared_bytes, compared, "{at:?}");
    }
    // What rots before the first rot was found is told by the one that goes on, since it begins there.
    flip(&dir, "00000000.data", 65 << 20, 1);
    flip(&dir, "00000001.data", 65 << 20, 1);
    let mut sound = ScrubPlace::default();
    let told = files.scrub(&from(None), |now| sound = now.sound).expect("scrub");
    assert_eq!((told.rot_count, sound), (2, place(0, 1)));
    let again = files.scrub(&from(Some(sound)), |now| sound = now.sound).expect("scrub");
    assert_eq!((again.rot, sound), (told.rot, place(0, 1)));
    // And sums that got lost before that place are made again, too.
    File::options()
        .write(true)
        .open(dir.path().join("00000000.map"))
        .expect("open")
        .set_len(MAP_OFFSET + 3 * 4096)
        .expect("cut");
    assert!(files.scrub(&from(Some(place(1, 0))), |_| ()).expect("scrub").added_bytes > 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, ..ProptestConfig::default() })]

    /// Any single change of sealed data that somebody may read, or of sealed map bits, is found.
    #[test]
    fn any_single_corruption_is_found(file in 0usize..3, at in any::<u64>(), bits in 1u8..) {
        let temp = TempDir::new().expect("tempdir");
        let dir = volume(temp.path());
        scrub(&dir);
        let (name, at) = match file {
            0 => ("00000000.data", at % SIZE),
            // Where layer 1 has data.
            1 => ("00000001.data", [5 * 4096 + at % 8192, 300 * 4096 + at % 4096, SIZE - 99 + at % 99][(at % 3) as usize]),
            _ => ("00000001.map", MAP_OFFSET + at % 4096),
        };
        flip(&dir, name, at, bits);
        let report = scrub_with(&dir, true, false);
        let checked = dir.files(Access::ReadOnly).expect("files").check().expect("check");
        prop_assert!(report.rot_count > 0 || !checked.is_clean(), "{name} at {at}");
        prop_assert!(report.rot_count > 0 || at >= MAP_OFFSET + SIZE.div_ceil(BLOCK_BYTES).div_ceil(4), "only bits past the end");
    }

    /// No bytes behind the bits make a scrub panic or cry wolf about data that it has no sums of.
    #[test]
    fn any_sums_are_answered(damage in proptest::collection::vec((0u64..16_384, any::<u8>(), 1usize..600), 1..8)) {
        let temp = TempDir::new().expect("tempdir");
        let dir = volume(temp.path());
        scrub(&dir);
        let file = File::options().write(true).open(temp.path().join("00000001.map")).expect("open");
        for (at, byte, len) in damage {
            file.write_all_at(&vec![byte; len], MAP_OFFSET + 4096 + at).expect("write");
        }
        let report = scrub(&dir);
        prop_assert_eq!(report.rot_count, 0, "{:?}", report);
        prop_assert_eq!(scrub(&dir).rot_count, 0);
        let _ = fs::metadata(temp.path()).expect("there");
    }
}
