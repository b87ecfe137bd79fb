//! The verifier: clean volumes are clean, each kind of damage is named, and any bytes are answered.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::Path,
};

use proptest::prelude::*;
use tempfile::TempDir;

use crate::{
    Access, BLOCK_BYTES, Buffers, CheckReport, MAP_OFFSET, Op, Problem, Volume, VolumeDir,
    header::{Header, HeaderState},
};

const SIZE: u64 = 300 * BLOCK_BYTES + 99;

fn write(volume: &Volume, offset: u64, len: usize) {
    let mut buffers = Buffers::owned(len);
    buffers.as_mut_slice().expect("owned").fill(9);
    volume.queue(1).expect("queue").run(Op::Write { offset, buffers, fua: true }).0.expect("write");
}

/// Three layers: `a`, `b`, head.
fn volume(path: &Path) -> VolumeDir {
    let dir = VolumeDir::new(path);
    dir.create(SIZE).expect("create");
    let volume = dir.open(Access::ReadWrite).expect("open");
    write(&volume, 0, 20_000);
    dir.snapshot(&volume, "a").expect("snapshot");
    write(&volume, 8192, 4096);
    let zeroes = Op::WriteZeroes { offset: 16_384, len: 8192, unmap: true };
    volume.queue(1).expect("queue").run(zeroes).0.expect("zeroes");
    write(&volume, SIZE - 99, 99);
    dir.snapshot(&volume, "b").expect("snapshot");
    write(&volume, 100 * BLOCK_BYTES, 12_288);
    dir
}

fn check(dir: &VolumeDir) -> CheckReport {
    dir.files(Access::ReadOnly).expect("files").check().expect("descriptors")
}

fn patch(dir: &VolumeDir, name: &str, at: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(dir.path().join(name)).expect("open");
    file.write_all_at(bytes, at).expect("write");
}

fn cut(dir: &VolumeDir, name: &str, len: u64) {
    let file = File::options().write(true).open(dir.path().join(name)).expect("open");
    file.set_len(len).expect("cut");
}

#[test]
fn a_sound_volume_is_clean_and_counted() {
    let temp = TempDir::new().expect("tempdir");
    let dir = volume(temp.path());
    let report = check(&dir);
    assert_eq!(report.problems, []);
    assert!(report.leftovers.is_empty() && report.size_bytes() == SIZE);
    let layers: Vec<_> =
        report.layers.iter().map(|l| (l.data_bytes, l.zero_bytes, l.leaked_bytes, l.torn_header)).collect();
    // The file system counts the bottom's last, partly written block whole.
    assert_eq!(layers[1..], [(4096 + 99, 8192, 0, false), (12_288, 0, 0, false)]);
    assert!((20_000..=20_480).contains(&layers[0].0), "{layers:?}");

    // While somebody writes it, the head is not compared; nor is anybody disturbed.
    let writer = dir.open(Access::ReadWrite).expect("open");
    let open = File::open(temp.path().join("00000002.data")).expect("open");
    drop(open);
    let report = check(&dir);
    assert!(report.is_clean() && !report.layers[2].compared && report.layers[1].compared);
    drop(writer);
    assert!(check(&dir).layers[2].compared);
    dir.open(Access::ReadWrite).expect("the check gave its lock back");
}

#[test]
fn leaks_and_leftovers_are_no_damage() {
    let temp = TempDir::new().expect("tempdir");
    let dir = volume(temp.path());
    patch(&dir, "00000002.data", 200 * BLOCK_BYTES, &[1; 8192]);
    patch(&dir, "00000001.data", 16_384, &[1; 4096]);
    patch(&dir, "00000002.data", SIZE.next_multiple_of(BLOCK_BYTES), &[1; 4096]);
    fs::write(temp.path().join("00000003.data"), vec![1; 4096]).expect("write");
    fs::write(temp.path().join("00000003.map"), b"garbage").expect("write");
    let report = check(&dir);
    assert_eq!(report.problems, []);
    assert_eq!(report.leaked_bytes(), 8192 + 4096 + 4096);
    assert_eq!((&report.leftovers[..], report.leftover_bytes), (&[3][..], 4096));
}

#[test]
fn each_kind_of_damage_is_named() {
    let named = |damage: &dyn Fn(&VolumeDir), found: &dyn Fn(&Problem) -> bool| {
        let temp = TempDir::new().expect("tempdir");
        let dir = volume(temp.path());
        damage(&dir);
        let report = check(&dir);
        assert!(report.problems.iter().any(found), "{:#?}", report.problems);
    };
    named(&|d| patch(d, "00000000.map", 0, &[1; 8192]), &|p| matches!(p, Problem::Header { index: 0, .. }));
    named(&|d| patch(d, "00000001.map", 0, &[1; 8192]), &|p| {
        matches!(p, Problem::Successor { layer: 0, successor: 1, .. })
    });
    named(&|d| patch(d, "00000001.map", 0, &[1; 8192]), &|p| matches!(p, Problem::Header { index: 1, .. }));
    named(&|d| cut(d, "00000001.data", 50), &|p| {
        matches!(p, Problem::Cut { layer: 1, file: "data", len: 50, expected: SIZE })
    });
    named(&|d| cut(d, "00000001.data", 50), &|p| matches!(p, Problem::MissingData { layer: 1, bytes: 4195 }));
    named(&|d| cut(d, "00000001.map", 8195), &|p| matches!(p, Problem::Cut { layer: 1, file: "map", .. }));
    named(&|d| patch(d, "00000002.map", MAP_OFFSET + 9, &[0xf0]), &|p| {
        matches!(p, Problem::Map { layer: 2, blocks: 2, .. })
    });
    named(&|d| patch(d, "00000002.map", MAP_OFFSET + 90, &[1]), &|p| {
        matches!(p, Problem::MapBeyond { layer: 2, .. })
    });
    let rewrite = |d: &VolumeDir, change: &dyn Fn(&mut Header)| {
        let name = d.path().join("00000001.map");
        let mut header = Header::decode(&fs::read(name).expect("read")).expect("header");
        change(&mut header);
        patch(d, "00000001.map", 0, &[0; 8192]);
        patch(d, "00000001.map", header.slot_offset(), &header.encode());
    };
    let wrong = |p: &Problem, words| matches!(p, Problem::Successor { layer: 0, why, .. } if *why == words);
    named(&|d| rewrite(d, &|h| h.volume = [0; 16]), &|p| wrong(p, "belongs to another volume"));
    let stray = |d: &VolumeDir| {
        let bytes = fs::read(d.path().join("00000002.map")).expect("read");
        let header = Header { parent: Some(0), ..Header::decode(&bytes).expect("header") };
        patch(d, "00000002.map", header.slot_offset(), &header.encode());
    };
    named(
        &stray,
        &|p| matches!(p, Problem::Successor { layer: 1, why, .. } if *why == "stands on another layer"),
    );
    named(&|d| rewrite(d, &|h| h.layer = 5), &|p| wrong(p, "is missing"));
    named(&|d| rewrite(d, &|h| h.snapshot = "a".into()), &|p| {
        matches!(p, Problem::SnapshotTwice { first: 0, second: 1, .. })
    });
    named(&|d| rewrite(d, &|h| h.state = HeaderState::Sealed { successor: 9 }), &|p| {
        matches!(p, Problem::Successor { layer: 1, successor: 9, .. })
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    /// Nothing makes the verifier panic, and what it calls clean opens.
    #[test]
    fn any_corruption_is_answered(
        damage in proptest::collection::vec((0usize..6, 0u64..12_300, any::<u8>(), 1usize..200, 0u8..8), 1..6)
    ) {
        let temp = TempDir::new().expect("tempdir");
        let dir = volume(temp.path());
        for (file, at, byte, len, what) in damage {
            let name = format!("{:08}.{}", file / 2, ["map", "data"][file % 2]);
            match what {
                0 => cut(&dir, &name, at),
                1 => reseal(&dir, &name, at, byte),
                _ => patch(&dir, &name, at, &vec![byte; len]),
            }
        }
        let report = check(&dir);
        if report.is_clean() {
            prop_assert!(dir.open(Access::ReadOnly).is_ok(), "clean, and does not open: {:?}", report);
        }
    }
}

/// Damage behind a right checksum.
fn reseal(dir: &VolumeDir, name: &str, at: u64, byte: u8) {
    let file = File::options().read(true).write(true).open(dir.path().join(name)).expect("open");
    let mut slot = [0; 4096];
    let offset = at / 8192 * 4096;
    if !name.ends_with("map") || file.read_exact_at(&mut slot, offset).is_err() {
        return;
    }
    slot[12 + at as usize % 80] = byte;
    let crc = crc32c::crc32c(&slot[..4092]).to_le_bytes();
    slot[4092..].copy_from_slice(&crc);
    file.write_all_at(&slot, offset).expect("write");
}
