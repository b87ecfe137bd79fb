//! Volumes on a disk that loses power (`sim_disk.rs`), and must survive it: at a chosen step the power goes, the volume
//! is opened from what is left and compared with a model that knows what was flushed.

use std::sync::{Arc, atomic::AtomicBool};

use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{
    crypto::{create_encrypted_media, test_secret},
    header::BLOCK_BYTES,
    media::Media,
    merge::Merge,
    op::Op,
    queue::IoQueue,
    scrub::{ScrubOptions, ScrubReport},
    sim_disk::{Power, SimFile, crash},
    uring::Buffers,
    volume::{Access, Volume, create_media},
};

/// Bytes of a merge's window and of a piece.
pub(crate) const BY: (u64, u64) = (3 * BLOCK_BYTES, BLOCK_BYTES);
pub(crate) const SIZE: usize = 9 * BLOCK_BYTES as usize + 777;

/// What is known about the volume's bytes.
pub(crate) struct Model {
    /// The newest state, and all states since the last flush, oldest (the flushed one) first.
    states: Vec<Vec<u8>>,
    pub(crate) snapshots: Vec<(String, Vec<u8>)>,
    /// A snapshot that was under way when the power went.
    maybe: Option<(String, Vec<u8>)>,
    /// One whose deletion was.
    pub(crate) maybe_gone: Option<String>,
    /// Snapshots that a rollback to the last of them would leave, and the bytes there.
    maybe_back: Option<(usize, Vec<u8>)>,
    /// A size to which the volume was growing.
    maybe_size: Option<usize>,
}

impl Model {
    pub(crate) fn new(bytes: Vec<u8>) -> Model {
        Model {
            states: vec![bytes],
            snapshots: Vec::new(),
            maybe: None,
            maybe_gone: None,
            maybe_back: None,
            maybe_size: None,
        }
    }

    pub(crate) fn now(&self) -> &Vec<u8> {
        self.states.last().expect("never empty")
    }

    fn size(&self) -> usize {
        self.now().len()
    }

    fn go_back(&mut self) {
        if let Some((left, bytes)) = self.maybe_back.take() {
            self.snapshots.truncate(left);
            self.states = vec![bytes];
        }
    }

    fn grow(&mut self, size: usize) {
        for state in &mut self.states {
            state.resize(size, 0);
        }
        self.maybe_size = None;
    }
}

struct World {
    files: Vec<(Media, Media)>,
    power: Arc<Power>,
    /// What sizes are multiples of: encrypted volumes have whole blocks.
    grain: usize,
}

impl World {
    /// Runs seeded operations until the power goes or they are done; true when all were done.
    fn run(&mut self, volume: &Volume, model: &mut Model, rng: &mut StdRng, ops: u32) -> bool {
        let mut queue = volume.queue(4).expect("queue");
        let mut merge = None;
        for _ in 0..ops {
            if !merging(volume, &mut merge, model, rng) {
                return false;
            }
            let size = model.size();
            let offset = rng.random_range(0..size);
            let len = rng.random_range(1..=(size - offset).min(2 * BLOCK_BYTES as usize + 100));
            let ok = match rng.random_range(0..17) {
                0..=8 => {
                    let fua = rng.random_range(0..8) == 0;
                    write(&mut queue, model, offset, &vec![rng.random_range(1..=255); len], fua)
                }
                9..=10 => zeroes(&mut queue, model, offset, len, rng.random()),
                11..=13 => flush(&mut queue, model),
                14 => grow(volume, model, rng.random_range(1..6000), self.grain),
                _ => self.snapshot(volume, model),
            };
            if !ok {
                return false;
            }
        }
        // A merge that is let go half-way has changed nothing that can be seen.
        model.maybe_gone = None;
        true
    }

    /// Deletes a snapshot of the closed volume; the files of its layer stay as leftovers.
    fn delete(&mut self, model: &mut Model, rng: &mut StdRng) -> bool {
        if model.snapshots.is_empty() {
            return true;
        }
        let at = rng.random_range(0..model.snapshots.len());
        let name = model.snapshots[at].0.clone();
        model.maybe_gone = Some(name.clone());
        if crate::merge::delete(self.files.clone(), &name, Some(&test_secret()), BY).is_err() {
            return false;
        }
        model.maybe_gone = None;
        model.snapshots.remove(at);
        true
    }

    fn add_sums(&self) -> bool {
        scrub(&self.files, true).is_some()
    }

    /// Goes back to a snapshot of the closed volume.
    fn rollback(&mut self, model: &mut Model, rng: &mut StdRng) -> bool {
        if model.snapshots.is_empty() {
            return true;
        }
        let at = rng.random_range(0..model.snapshots.len());
        let (name, bytes) = model.snapshots[at].clone();
        model.maybe_back = Some((at + 1, bytes));
        let stopped = crate::rollback::Stopped::lock(self.files.clone()).expect("nobody else");
        let number = stopped.next().expect("few") as usize;
        self.files.truncate(number);
        let new = (SimFile::media(&self.power), SimFile::media(&self.power));
        self.files.push(new.clone());
        if stopped.rollback(&name, new, true, Some(&test_secret())).is_err() {
            return false;
        }
        model.go_back();
        true
    }

    fn snapshot(&mut self, volume: &Volume, model: &mut Model) -> bool {
        let number = volume.head_header().expect("layered").layer as usize + 1;
        self.files.truncate(number);
        let new = (SimFile::media(&self.power), SimFile::media(&self.power));
        self.files.push(new.clone());
        let snapshot = (format!("s{number}"), model.now().clone());
        model.maybe = Some(snapshot.clone());
        if volume.snapshot_media(new, &snapshot.0).is_err() {
            return false;
        }
        model.snapshots.push(snapshot);
        model.maybe = None;
        model.states = vec![model.now().clone()];
        true
    }
}

/// Begins to merge a snapshot away while the volume is used, or goes on with it, or neither.
fn merging(volume: &Volume, merge: &mut Option<Merge>, model: &mut Model, rng: &mut StdRng) -> bool {
    match merge {
        None if rng.random_range(0..4) == 0 && !model.snapshots.is_empty() => {
            let at = rng.random_range(0..model.snapshots.len());
            let name = model.snapshots[at].0.clone();
            let layer = volume.snapshots().into_iter().find(|s| s.name == name).expect("there").layer;
            *merge = Some(volume.merge_by(layer, BY.0, BY.1).expect("merge"));
            model.maybe_gone = Some(name);
        }
        Some(under_way) if rng.random_range(0..3) > 0 => {
            let Ok(progress) = under_way.step(rng.random_range(1..4) * BLOCK_BYTES) else { return false };
            if progress.done {
                let gone = model.maybe_gone.take();
                model.snapshots.retain(|s| Some(&s.0) != gone.as_ref());
                *merge = None;
            }
        }
        _ => {}
    }
    true
}

pub(crate) fn write(queue: &mut IoQueue, model: &mut Model, offset: usize, bytes: &[u8], fua: bool) -> bool {
    let mut new = model.now().clone();
    new[offset..offset + bytes.len()].copy_from_slice(bytes);
    model.states.push(new);
    let mut buffers = Buffers::owned(bytes.len());
    buffers.as_mut_slice().expect("owned").copy_from_slice(bytes);
    // FUA covers this write only, so the model learns nothing more from it than from any write.
    queue.run(Op::Write { offset: offset as u64, buffers, fua }).0.is_ok()
}

pub(crate) fn zeroes(queue: &mut IoQueue, model: &mut Model, offset: usize, len: usize, unmap: bool) -> bool {
    let mut new = model.now().clone();
    new[offset..offset + len].fill(0);
    model.states.push(new);
    queue.run(Op::WriteZeroes { offset: offset as u64, len: len as u64, unmap }).0.is_ok()
}

fn grow(volume: &Volume, model: &mut Model, bytes: usize, grain: usize) -> bool {
    let size = (model.size() + bytes).next_multiple_of(grain);
    model.maybe_size = Some(size);
    let ok = volume.resize(size as u64).is_ok();
    if ok {
        model.grow(size);
    }
    ok
}

pub(crate) fn flush(queue: &mut IoQueue, model: &mut Model) -> bool {
    let ok = queue.run(Op::Flush).0.is_ok();
    if ok {
        model.states = vec![model.now().clone()];
    }
    ok
}

pub(crate) fn read_all(volume: &Volume) -> Vec<u8> {
    let buffers = Buffers::owned(volume.size_bytes() as usize);
    let (result, buffers) = volume.queue(1).expect("queue").run(Op::Read { offset: 0, buffers });
    result.expect("read");
    buffers.as_slice().expect("owned").to_vec()
}

/// Compares the checksums that there are, and adds those that are not. None: the power went.
fn scrub(files: &[(Media, Media)], add_sums: bool) -> Option<ScrubReport> {
    let cancel = AtomicBool::new(false);
    let options = ScrubOptions { compare: true, add_sums, from: None, bytes_per_s: 0, cancel: &cancel };
    crate::scrub::scrub_media(files, &options, |_| {}).ok()
}

pub(crate) fn check(files: &[(Media, Media)], model: &mut Model, context: &str) {
    let report = crate::check::check_media(files);
    assert_eq!(report.problems, [], "{context}: the verifier");
    let scrubbed = scrub(files, false).expect("there is power");
    assert_eq!((scrubbed.rot, scrubbed.damaged_sums), (vec![], 0), "{context}: the checksums");
    let volume = Volume::open_media(files.to_vec(), Access::ReadWrite, None)
        .unwrap_or_else(|e| panic!("{context}: does not open: {e:?}"));
    // Its new head has a number that no earlier one had.
    if volume.head_header().expect("layered").layer as usize + 1 == files.len() {
        model.go_back();
    }
    model.maybe_back = None;
    if let Some(size) = model.maybe_size.take()
        && volume.size_bytes() == size as u64
    {
        model.grow(size);
    }
    assert_eq!(volume.size_bytes(), model.size() as u64, "{context}: size");
    for (i, byte) in read_all(&volume).iter().enumerate() {
        assert!(
            model.states.iter().any(|state| state[i] == *byte),
            "{context}: byte {i} is {byte}, neither old nor new"
        );
    }
    let found: Vec<_> = volume.snapshots().into_iter().map(|s| s.name).collect();
    let mut expected: Vec<_> = model.snapshots.iter().map(|s| s.0.clone()).collect();
    if found.len() > expected.len() {
        expected.extend(model.maybe.iter().map(|s| s.0.clone()));
    }
    if found.len() < expected.len() {
        expected.retain(|name| model.maybe_gone.as_ref() != Some(name));
    }
    assert_eq!(found, expected, "{context}: snapshots");
    drop(volume);
    for (name, bytes) in model.snapshots.iter().chain(&model.maybe) {
        if found.contains(name) {
            let at =
                Volume::open_media(files.to_vec(), Access::ReadOnly, Some(name)).expect("open a snapshot");
            assert!(read_all(&at) == *bytes, "{context}: snapshot {name} differs");
        }
    }
}

/// One life: work, power cut at `steps`, recovery, more work, orderly end. False when the power never went.
fn life(seed: u64, steps: i64) -> bool {
    let mut rng = StdRng::seed_from_u64(seed);
    let power = Power::endless();
    let file = || (SimFile::media(&power), SimFile::media(&power));
    let mut files = vec![file()];
    let encrypted = seed % 2 == 1;
    let (size, grain) = if encrypted {
        (SIZE.next_multiple_of(BLOCK_BYTES as usize), BLOCK_BYTES as usize)
    } else {
        (SIZE, 1)
    };
    if encrypted {
        files.push(file());
        create_encrypted_media(&files[0], &files[1], size as u64, [7; 16], &test_secret()).expect("create");
    } else {
        create_media(&files[0].0, &files[0].1, size as u64, [7; 16], false).expect("create");
    }
    let mut world = World { files, power: Arc::clone(&power), grain };
    let mut model = Model::new(vec![0; size]);
    power.set(steps);
    let mut survived = true;
    for _ in 0..3 {
        let volume = Volume::open_media(world.files.clone(), Access::ReadWrite, None).expect("open");
        survived = survived && world.run(&volume, &mut model, &mut rng, 14);
        drop(volume);
        // The checksums that a merge then has to forget.
        survived = survived && (rng.random() || world.add_sums());
        survived = survived && world.delete(&mut model, &mut rng);
        survived = survived && (rng.random() || world.add_sums());
        if rng.random_range(0..3) == 0 {
            survived = survived && world.rollback(&mut model, &mut rng);
        }
    }

    let context = format!("seed {seed}, power cut at step {steps}");
    let power = Power::endless();
    let mut luck = StdRng::seed_from_u64(seed ^ (steps as u64) << 32);
    let mut after = |m: &Media| crash(m, &mut luck, &power);
    world.files = world.files.iter().map(|(d, m)| (after(d), after(m))).collect();
    world.power = Arc::clone(&power);
    check(&world.files, &mut model, &context);

    // What the disk has now is the truth; life goes on from there.
    let volume = Volume::open_media(world.files.clone(), Access::ReadWrite, None).expect("open again");
    model.states = vec![read_all(&volume)];
    if let Some(maybe) = model.maybe.take()
        && volume.snapshots().iter().any(|s| s.name == maybe.0)
    {
        model.snapshots.push(maybe);
    }
    if let Some(gone) = model.maybe_gone.take()
        && !volume.snapshots().iter().any(|s| s.name == gone)
    {
        model.snapshots.retain(|s| s.0 != gone);
    }
    assert!(world.run(&volume, &mut model, &mut luck, 15), "{context}: works after recovery");
    drop(volume);
    model.states = vec![model.now().clone()];
    check(&world.files, &mut model, &format!("{context}, then an orderly end"));
    assert!(luck.random() || world.add_sums(), "{context}: checksums after recovery");
    assert!(world.delete(&mut model, &mut luck), "{context}: a deletion after recovery");
    check(&world.files, &mut model, &format!("{context}, then a deletion"));
    !survived
}

#[test]
fn a_power_cut_at_any_step_leaves_old_or_new_bytes() {
    let seeds = std::env::var("SERIO_CRASH_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(20);
    let mut cuts = 0;
    for seed in 0..seeds {
        let mut steps = 1;
        while life(seed, steps) {
            cuts += 1;
            steps += 1 + (seed % 3) as i64;
        }
    }
    println!("{cuts} power cuts in {seeds} lives");
}

#[test]
fn a_failed_sync_poisons() {
    let power = Power::endless();
    let files = vec![(SimFile::media(&power), SimFile::media(&power))];
    create_media(&files[0].0, &files[0].1, SIZE as u64, [7; 16], false).expect("create");
    let volume = Volume::open_media(files, Access::ReadWrite, None).expect("open");
    let mut queue = volume.queue(1).expect("queue");
    power.set(0);
    assert!(queue.run(Op::Flush).0.is_err());
    power.set(i64::MAX);
    assert!(volume.is_poisoned());
    assert_eq!(queue.run(Op::Flush).0, Err(crate::IoError::Poisoned));
    let write = Op::Write { offset: 0, buffers: Buffers::owned(1), fua: false };
    assert_eq!(queue.run(write).0, Err(crate::IoError::Poisoned));
    assert!(queue.run(Op::Read { offset: 0, buffers: Buffers::owned(1) }).0.is_ok());
}
