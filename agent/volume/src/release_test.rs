//! Releases: the point reads zeros there, everybody else reads what they did, also who has the layer open; space comes back.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use proptest::prelude::*;
use tempfile::TempDir;

use crate::{Access, BLOCK_BYTES, Buffers, IoError, Op, Release, Volume, VolumeDir};

const BLOCKS: u64 = 40;
const SIZE: u64 = BLOCKS * BLOCK_BYTES + 700;

fn write(volume: &Volume, offset: u64, len: u64, byte: u8) {
    let mut buffers = Buffers::owned(len as usize);
    buffers.as_mut_slice().expect("owned").fill(byte);
    volume.queue(1).expect("queue").run(Op::Write { offset, buffers, fua: false }).0.expect("write");
}

fn zero(volume: &Volume, offset: u64, len: u64) {
    volume.queue(1).expect("queue").run(Op::WriteZeroes { offset, len, unmap: true }).0.expect("zeroes");
}

fn flush(volume: &Volume) {
    volume.queue(1).expect("queue").run(Op::Flush).0.expect("flush");
}

fn read(volume: &Volume) -> Vec<u8> {
    let buffers = Buffers::owned(volume.size_bytes() as usize);
    let (result, buffers) = volume.queue(1).expect("queue").run(Op::Read { offset: 0, buffers });
    result.expect("read");
    buffers.as_slice().expect("owned").to_vec()
}

fn blocks(bytes: &[u8]) -> Vec<u8> {
    bytes.chunks(BLOCK_BYTES as usize).map(|block| block[0]).collect()
}

fn point(dir: &VolumeDir, name: &str) -> (Volume, Release) {
    let release = dir.files(Access::ReadWrite).expect("files").release(name).expect("release");
    (dir.open_snapshot(name).expect("open"), release)
}

fn used(path: &Path, name: &str) -> u64 {
    fs::metadata(path.join(name)).expect("there").blocks() * 512
}

fn sound(dir: &VolumeDir) {
    let cancel = std::sync::atomic::AtomicBool::new(false);
    let options =
        crate::ScrubOptions { compare: true, add_sums: true, from: None, bytes_per_s: 0, cancel: &cancel };
    let files = dir.files(Access::ReadWrite).expect("files");
    let checked = files.check().expect("check");
    assert!(checked.is_clean() && checked.leaked_bytes() == 0, "{checked:?}");
    let scrubbed = files.scrub(&options, |_| {}).expect("scrub");
    assert_eq!(scrubbed.rot_count, 0, "{scrubbed:?}");
}

/// `a` (bottom: blocks 0 to 9 are 1), `b` (blocks 2 to 5 are 2), head (3 and 4 are 3; 7 is zero).
fn volume(path: &Path) -> (VolumeDir, Volume) {
    let dir = VolumeDir::new(path);
    dir.create(SIZE).expect("create");
    let volume = dir.open(Access::ReadWrite).expect("open");
    write(&volume, 0, 10 * BLOCK_BYTES, 1);
    dir.snapshot(&volume, "a").expect("snapshot");
    write(&volume, 2 * BLOCK_BYTES, 4 * BLOCK_BYTES, 2);
    dir.snapshot(&volume, "b").expect("snapshot");
    write(&volume, 3 * BLOCK_BYTES, 2 * BLOCK_BYTES, 3);
    zero(&volume, 7 * BLOCK_BYTES, BLOCK_BYTES);
    flush(&volume);
    (dir, volume)
}

#[test]
fn a_point_gives_back_what_the_layer_above_has_and_nothing_else() {
    let temp = TempDir::new().expect("tempdir");
    let (dir, head) = volume(temp.path());
    sound(&dir);
    let before = blocks(&read(&head))[..10].to_vec();
    let (view, release) = point(&dir, "b");
    // Parts of blocks stay: of 3 and 4 only 4 is whole.
    release.release(&view, 3 * BLOCK_BYTES + 1, 2 * BLOCK_BYTES).expect("release");
    assert_eq!(blocks(&read(&view))[..10], [1, 1, 2, 2, 0, 2, 1, 1, 1, 1]);
    release.release(&view, 0, SIZE).expect("release");
    // Nobody else needs "b"'s 3 and 4, and "b" need not read 7 any more; "a" still does.
    let released = [1, 1, 2, 0, 0, 2, 1, 0, 1, 1];
    assert_eq!(blocks(&read(&view))[..10], released, "as it was opened");
    assert_eq!(blocks(&read(&dir.open_snapshot("b").expect("open")))[..10], released, "and anew");
    assert_eq!(blocks(&read(&dir.open_snapshot("a").expect("open")))[..10], [1; 10]);
    assert_eq!(blocks(&read(&head))[..10], before);
    assert_eq!(used(temp.path(), "00000001.data"), 2 * BLOCK_BYTES);

    // The bottom: "b" has 2 and 5, and says zero for 3, 4 and 7.
    let (view, release) = point(&dir, "a");
    release.release(&view, 0, SIZE).expect("release");
    assert_eq!(blocks(&read(&view))[..10], [1, 1, 0, 0, 0, 0, 1, 0, 1, 1]);
    assert_eq!(used(temp.path(), "00000000.data"), 5 * BLOCK_BYTES);
    assert_eq!(blocks(&read(&head))[..10], before);
    let out = release.release(&view, SIZE - 1, 2);
    assert_eq!(out, Err(IoError::OutOfRange { offset: SIZE - 1, len: 2, size: SIZE }));
    sound(&dir);
}

#[test]
fn what_a_clone_shares_is_not_taken_from_it() {
    let temp = TempDir::new().expect("tempdir");
    let (dir, _head) = volume(&temp.path().join("v"));
    let file = |n| dir.path().join(format!("{n:08}.data"));
    let shared: Vec<_> = [0, 1].map(|n| (file(n), temp.path().join(format!("link{n}")))).into();
    for (data, link) in &shared {
        fs::hard_link(data, link).expect("link");
    }
    let before: Vec<_> = shared.iter().map(|(data, _)| fs::read(data).expect("read")).collect();
    for name in ["a", "b"] {
        let (view, release) = point(&dir, name);
        release.release(&view, 0, SIZE).expect("release");
    }
    let after: Vec<_> = shared.iter().map(|(data, _)| fs::read(data).expect("read")).collect();
    assert!(before == after, "the files are others' too");
    let b = dir.open_snapshot("b").expect("open");
    assert_eq!(blocks(&read(&b))[..10], [1, 1, 2, 0, 0, 2, 1, 0, 1, 1], "its own map says zero");
    sound(&dir);
}

#[test]
fn a_layer_that_was_replaced_is_no_longer_believed() {
    let temp = TempDir::new().expect("tempdir");
    let (dir, head) = volume(temp.path());
    let (view, release) = point(&dir, "b");
    drop(head);
    let open = |suffix: &str| {
        let path = temp.path().join(format!("00000003.{suffix}"));
        fs::File::options().read(true).write(true).create(true).truncate(true).open(path).expect("open")
    };
    let new = crate::LayerFiles { data: open("data"), map: open("map") };
    dir.files(Access::ReadWrite).expect("files").rollback("b", new, false, None).expect("rollback");
    assert!(release.release(&view, 0, SIZE).is_err(), "the new head was not among the files");
    assert_eq!(
        blocks(&read(&dir.open(Access::ReadOnly).expect("open")))[..10],
        [1, 1, 2, 2, 2, 2, 1, 1, 1, 1]
    );
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Snapshot,
    Release(usize, u64, u64),
    Delete(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let range = (0..SIZE, 1..20 * BLOCK_BYTES).prop_map(|(at, len)| (at, len.min(SIZE - at)));
    prop_oneof![
        4 => (range.clone(), 1u8..).prop_map(|((at, len), byte)| Step::Write(at, len, byte)),
        1 => range.clone().prop_map(|(at, len)| Step::Zero(at, len)),
        2 => Just(Step::Snapshot),
        4 => (any::<usize>(), range).prop_map(|(i, (at, len))| Step::Release(i, at, len)),
        1 => any::<usize>().prop_map(Step::Delete),
    ]
}

/// What a point reads: its bytes, and where it may read zeros instead.
struct Point {
    name: String,
    bytes: Vec<u8>,
    released: Vec<bool>,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Releases of any points between writes, snapshots and deletions: the head, open all the time, and every other point read
    /// what they did; views that were opened long before too.
    #[test]
    fn nobody_else_notices(steps in proptest::collection::vec(step(), 4..30)) {
        let temp = TempDir::new().expect("tempdir");
        let dir = VolumeDir::new(temp.path());
        dir.create(SIZE).expect("create");
        let mut head = dir.open(Access::ReadWrite).expect("open");
        let (mut bytes, mut points) = (vec![0; SIZE as usize], Vec::<Point>::new());
        let mut views: Vec<(String, Volume)> = Vec::new();
        for (i, step) in steps.into_iter().enumerate() {
            match step {
                Step::Write(at, len, byte) => {
                    write(&head, at, len, byte);
                    bytes[at as usize..(at + len) as usize].fill(byte);
                }
                Step::Zero(at, len) => {
                    zero(&head, at, len);
                    bytes[at as usize..(at + len) as usize].fill(0);
                }
                Step::Snapshot => {
                    let name = format!("s{i}");
                    dir.snapshot(&head, &name).expect("snapshot");
                    views.push((name.clone(), dir.open_snapshot(&name).expect("open")));
                    points.push(Point { name, bytes: bytes.clone(), released: vec![false; SIZE as usize] });
                }
                Step::Release(i, at, len) if !points.is_empty() => {
                    let count = points.len();
                    let point = &mut points[i % count];
                    let (view, release) = self::point(&dir, &point.name);
                    release.release(&view, at, len).expect("release");
                    point.released[at as usize..(at + len) as usize].fill(true);
                }
                Step::Delete(i) if !points.is_empty() => {
                    let gone = points.remove(i % points.len());
                    drop(head);
                    dir.delete_snapshot(&gone.name).expect("delete");
                    head = dir.open(Access::ReadWrite).expect("open");
                }
                _ => {}
            }
            prop_assert!(read(&head) == bytes, "the head");
            for point in &points {
                let anew = dir.open_snapshot(&point.name).expect("open");
                let old = views.iter().find(|(name, _)| *name == point.name).map(|(_, view)| view);
                for view in std::iter::once(&anew).chain(old) {
                    let now = read(view);
                    let wrong = (0..SIZE as usize)
                        .find(|&i| now[i] != point.bytes[i] && !(point.released[i] && now[i] == 0));
                    prop_assert_eq!(wrong, None, "{}", point.name);
                }
            }
        }
        flush(&head);
        sound(&dir);
    }
}
