//! Families of volumes that share data, against plain arrays: clones of clones, merges and deletions in all of them, rollbacks
//! and flattening interleaved; and merges while other threads write.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tempfile::TempDir;

use crate::{
    Access, BLOCK_BYTES, Buffers, MergeError, Op, Volume, VolumeDir, crypto::test_secret, merge::Merge,
};

const BLOCKS: u64 = 24;

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Snapshot,
    /// Of the n-th snapshot.
    Clone(usize),
    /// The n-th sealed layer of the chain, named or not.
    Merge(usize),
    Rollback(usize),
    Flatten,
    Grow,
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<(usize, Step)>> {
    let range = || (0..BLOCKS * BLOCK_BYTES, 1..5 * BLOCK_BYTES);
    let step = prop_oneof![
        8 => (range(), 1..=255u8).prop_map(|((at, len), value)| Step::Write(at, len, value)),
        3 => range().prop_map(|(at, len)| Step::Zero(at, len)),
        4 => Just(Step::Snapshot),
        3 => (0..9usize).prop_map(Step::Clone),
        4 => (0..9usize).prop_map(Step::Merge),
        1 => (0..9usize).prop_map(Step::Rollback),
        1 => Just(Step::Flatten),
        1 => Just(Step::Grow),
        1 => Just(Step::Reopen),
    ];
    proptest::collection::vec((0..4usize, step), 1..40)
}

/// One of the family, and what it should hold.
struct Member {
    dir: VolumeDir,
    volume: Option<Volume>,
    bytes: Vec<u8>,
    snapshots: Vec<(String, Vec<u8>)>,
}

impl Member {
    fn volume(&self) -> &Volume {
        self.volume.as_ref().expect("open")
    }

    fn run(&self, op: Op) {
        self.volume().queue(2).expect("queue").run(op).0.expect("operation");
    }

    fn check(&self, context: &str) {
        assert!(read_all(self.volume()) == self.bytes, "{context}: {}", self.dir.path().display());
    }

    fn check_points(&self) {
        for (name, bytes) in &self.snapshots {
            let point = self.dir.open_snapshot(name).expect("open a snapshot");
            assert!(read_all(&point) == *bytes, "{name} of {}", self.dir.path().display());
        }
    }
}

fn read_all(volume: &Volume) -> Vec<u8> {
    let buffers = Buffers::owned(volume.size_bytes() as usize);
    let (result, buffers) = volume.queue(1).expect("queue").run(Op::Read { offset: 0, buffers });
    result.expect("read");
    buffers.as_slice().expect("owned").to_vec()
}

fn link(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::hard_link(from, to)
}

/// To its end, in small steps.
fn finish(dir: &VolumeDir, mut merge: Merge) {
    loop {
        let progress = merge.step(3 * BLOCK_BYTES).expect("step");
        if progress.done {
            dir.settle(merge.layer(), &progress).expect("settle");
            return;
        }
    }
}

fn apply(family: &mut Vec<Member>, who: usize, step: Step, i: usize, temp: &Path, encrypted: bool) {
    let (index, count) = (who % family.len(), family.len());
    let member = &mut family[index];
    let size = member.bytes.len() as u64;
    let cut = |at: u64, len: u64| (at, len.min(size - at));
    match step {
        Step::Write(at, len, value) => {
            let (offset, len) = cut(at, len);
            let mut buffers = Buffers::owned(len as usize);
            buffers.as_mut_slice().expect("owned").fill(value);
            member.run(Op::Write { offset, buffers, fua: false });
            member.bytes[offset as usize..(offset + len) as usize].fill(value);
        }
        Step::Zero(at, len) => {
            let (offset, len) = cut(at, len);
            member.run(Op::WriteZeroes { offset, len, unmap: len % 2 == 0 });
            member.bytes[offset as usize..(offset + len) as usize].fill(0);
        }
        Step::Snapshot => {
            let name = format!("s{i}");
            member.dir.snapshot(member.volume(), &name).expect("snapshot");
            member.snapshots.push((name, member.bytes.clone()));
        }
        Step::Clone(n) if !member.snapshots.is_empty() && count < 5 => {
            let member = &family[index];
            let (name, bytes) = &member.snapshots[n % member.snapshots.len()];
            let mut dir = VolumeDir::new(temp.join(format!("clone{i}")));
            if encrypted {
                dir = dir.with_key(test_secret());
            }
            dir.clone_point(&member.dir, name, None, &mut link).expect("clone");
            let volume = Some(dir.open(Access::ReadWrite).expect("open"));
            let bytes = bytes.clone();
            family.push(Member { dir, volume, bytes, snapshots: Vec::new() });
        }
        Step::Merge(n) => {
            let sealed: Vec<_> = member.volume().stack().layers.iter().filter_map(|l| l.header()).collect();
            let Some((_, sealed)) = sealed.split_last().filter(|(_, sealed)| !sealed.is_empty()) else {
                return;
            };
            let gone = &sealed[n % sealed.len()];
            finish(&member.dir, member.volume().merge_by(gone.layer, 5 * BLOCK_BYTES, 8192).expect("merge"));
            member.snapshots.retain(|s| s.0 != gone.snapshot);
        }
        Step::Rollback(n) if !member.snapshots.is_empty() => {
            let at = n % member.snapshots.len();
            member.volume = None;
            member.dir.rollback(&member.snapshots[at].0, true).expect("rollback");
            member.snapshots.truncate(at + 1);
            member.bytes = member.snapshots[at].1.clone();
            member.volume = Some(member.dir.open(Access::ReadWrite).expect("open"));
        }
        Step::Flatten => {
            for layer in member.dir.inherited(member.volume()).expect("inherited") {
                finish(&member.dir, member.volume().merge(layer).expect("merge"));
            }
            assert_eq!(member.dir.inherited(member.volume()).expect("inherited"), [0; 0]);
        }
        Step::Grow => {
            member.bytes.resize(member.bytes.len() + BLOCK_BYTES as usize, 0);
            member.volume().resize(member.bytes.len() as u64).expect("grow");
        }
        Step::Reopen => {
            member.volume = None;
            member.volume = Some(member.dir.open(Access::ReadWrite).expect("open"));
        }
        Step::Clone(_) | Step::Rollback(_) => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn a_family_behaves_as_arrays(steps in steps(), encrypted: bool, image: bool) {
        let temp = TempDir::new().expect("tempdir");
        let size = BLOCKS * BLOCK_BYTES + if encrypted { 0 } else { 1234 };
        let mut dir = VolumeDir::new(temp.path().join("first"));
        if encrypted {
            dir = dir.with_key(test_secret());
        }
        let mut bytes = vec![0; size as usize];
        let disk = temp.path().join("disk.raw");
        // Data, a hole, data; shorter than the volume.
        bytes[..9000].fill(77);
        bytes[50_000..70_000].fill(78);
        std::fs::write(&disk, &bytes[..70_000]).expect("write");
        if image {
            dir.clone_image(&disk, Some(size), &mut link).expect("clone an image");
        } else {
            bytes.fill(0);
            dir.create(size).expect("create");
        }
        let volume = Some(dir.open(Access::ReadWrite).expect("open"));
        let mut family = vec![Member { dir, volume, bytes, snapshots: Vec::new() }];
        for (i, (who, step)) in steps.into_iter().enumerate() {
            let context = format!("step {i}, {step:?}");
            apply(&mut family, who, step, i, temp.path(), encrypted);
            family.iter().for_each(|member| member.check(&context));
        }
        for member in &mut family {
            member.check_points();
            member.volume = None;
            let report = member.dir.files(Access::ReadOnly).expect("files").check().expect("check");
            prop_assert!(report.is_clean() && report.leftovers.is_empty(), "{:?}", report);
            member.volume = Some(member.dir.open(Access::ReadWrite).expect("open"));
            member.check("reopened");
            member.check_points();
        }
        let image = std::fs::read(&disk).expect("read");
        prop_assert!(image[..9000] == [77; 9000] && image[9000..50_000].iter().all(|b| *b == 0));
    }
}

/// Writes, zeroes and reads back its own stripes of a volume, which share blocks with another's, until it is told to stop.
fn worker(volume: &Volume, me: usize, stop: &AtomicBool) -> Vec<(usize, Vec<u8>)> {
    const STRIPE: usize = 3000;
    let mut rng = StdRng::seed_from_u64(me as u64);
    let count = volume.size_bytes() as usize / STRIPE / 2;
    let mut stripes: Vec<(usize, Vec<u8>)> =
        (0..count).map(|i| ((2 * i + me) * STRIPE, vec![0; STRIPE])).collect();
    let mut queue = volume.queue(1).expect("queue");
    while !stop.load(Ordering::SeqCst) {
        let (base, bytes) = &mut stripes[rng.random_range(0..count)];
        let at = rng.random_range(0..STRIPE);
        let len = rng.random_range(1..=STRIPE - at);
        let offset = (*base + at) as u64;
        match rng.random_range(0..8) {
            0..4 => {
                bytes[at..at + len].fill(rng.random_range(1..=255));
                let mut buffers = Buffers::owned(len);
                buffers.as_mut_slice().expect("owned").copy_from_slice(&bytes[at..at + len]);
                queue.run(Op::Write { offset, buffers, fua: false }).0.expect("write");
            }
            4 => {
                bytes[at..at + len].fill(0);
                let len = len as u64;
                queue.run(Op::WriteZeroes { offset, len, unmap: rng.random() }).0.expect("zeroes");
            }
            _ => {
                let (result, buffers) = queue.run(Op::Read { offset, buffers: Buffers::owned(len) });
                result.expect("read");
                assert!(buffers.as_slice() == Some(&bytes[at..at + len]), "a read at {offset} of {len}");
            }
        }
    }
    stripes
}

fn merges_while_others_write(key: bool) {
    let temp = TempDir::new().expect("tempdir");
    let mut dir = VolumeDir::new(temp.path());
    if key {
        dir = dir.with_key(test_secret());
    }
    dir.create(1 << 20).expect("create");
    let volume = dir.open(Access::ReadWrite).expect("open");
    let stop = Arc::new(AtomicBool::new(false));
    let workers = [0, 1].map(|me| {
        let (volume, stop) = (volume.clone(), Arc::clone(&stop));
        std::thread::spawn(move || worker(&volume, me, &stop))
    });
    let mut rng = StdRng::seed_from_u64(7);
    let mut points: Vec<(String, u64, Vec<u8>)> = Vec::new();
    for i in 0..12 {
        let name = format!("s{i}");
        let layer = dir.snapshot(&volume, &name).expect("snapshot").layer;
        let bytes = read_all(&dir.open_snapshot(&name).expect("open"));
        points.push((name, layer, bytes));
        if i % 4 == 3 {
            volume.resize(volume.size_bytes() + BLOCK_BYTES).expect("grow");
        }
        if i % 3 > 0 {
            // Now and then the one below the live head.
            let at = if rng.random() { points.len() - 1 } else { rng.random_range(0..points.len()) };
            let (_, layer, _) = points.remove(at);
            finish(&dir, volume.merge_by(layer, 64 << 10, 8192).expect("merge"));
        }
        for (name, _, bytes) in &points {
            assert!(read_all(&dir.open_snapshot(name).expect("open")) == *bytes, "{name}, round {i}");
        }
    }
    stop.store(true, Ordering::SeqCst);
    let stripes = workers.map(|worker| worker.join().expect("worker"));
    let check = |volume: &Volume| {
        let now = read_all(volume);
        for (base, bytes) in stripes.iter().flatten() {
            assert!(now[*base..*base + bytes.len()] == *bytes, "the stripe at {base}");
        }
    };
    check(&volume);
    for (_, layer, _) in &points {
        finish(&dir, volume.merge(*layer).expect("merge"));
    }
    check(&volume);
    drop(volume);
    check(&dir.open(Access::ReadWrite).expect("reopen"));
    let report = dir.files(Access::ReadOnly).expect("files").check().expect("check");
    assert!(report.is_clean() && report.layers.len() == 1 + usize::from(key), "{report:?}");
}

#[test]
fn merges_while_others_write_a_plain_volume() {
    merges_while_others_write(false);
}

#[test]
fn merges_while_others_write_an_encrypted_volume() {
    merges_while_others_write(true);
}

#[test]
fn what_cannot_be_merged_and_what_is_merged_already() {
    let temp = TempDir::new().expect("tempdir");
    let dir = VolumeDir::new(temp.path());
    dir.create(1 << 20).expect("create");
    let volume = dir.open(Access::ReadWrite).expect("open");
    dir.snapshot(&volume, "a").expect("snapshot");
    dir.snapshot(&volume, "b").expect("snapshot");
    assert!(matches!(volume.merge(2), Err(MergeError::NotSealed(2))), "the head");
    assert!(matches!(volume.merge(9), Err(MergeError::NotSealed(9))));
    let merge = volume.merge(0).expect("merge");
    assert!(matches!(volume.merge(1), Err(MergeError::Busy)));
    drop(merge);
    let mut merge = volume.merge(1).expect("the other one was let go");
    assert!(!dir.open_snapshot("b").expect("nothing has happened").is_poisoned());
    assert!(merge.step(1).expect("step").done);
    drop(merge);
    assert!(volume.merge(1).expect("again").step(1).expect("step").done);
    assert_eq!(volume.snapshots().len(), 1);
    drop(volume);
    let reader = dir.open(Access::ReadOnly).expect("open");
    assert!(matches!(reader.merge(0), Err(MergeError::ReadOnly)));
}
