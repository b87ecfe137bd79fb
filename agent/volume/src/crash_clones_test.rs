//! A volume and its clone, which share data files, on a disk that loses power while both write, and both merge what they
//! share: README.md, "Sharing", says that nothing of one harms the other.

use std::sync::Arc;

use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{
    clones::{NewMedia, clone_point},
    crash_test::{BY, Model, SIZE, check, flush, read_all, write, zeroes},
    crypto::{create_encrypted_media, test_secret},
    header::BLOCK_BYTES,
    media::Media,
    merge::Merge,
    sim_disk::{Power, SimFile, crash},
    volume::{Access, Volume, create_media},
};

type Files = Vec<(Media, Media)>;

fn layer(power: &Arc<Power>) -> (Media, Media) {
    (SimFile::media(power), SimFile::media(power))
}

/// A volume with two or three snapshots, and what they hold.
fn source(power: &Arc<Power>, rng: &mut StdRng, encrypted: bool) -> (Files, Model) {
    let size = SIZE.next_multiple_of(BLOCK_BYTES as usize);
    let mut files = vec![layer(power)];
    if encrypted {
        files.push(layer(power));
        create_encrypted_media(&files[0], &files[1], size as u64, [7; 16], &test_secret()).expect("create");
    } else {
        create_media(&files[0].0, &files[0].1, size as u64, [7; 16], false).expect("create");
    }
    let mut model = Model::new(vec![0; size]);
    let volume = Volume::open_media(files.clone(), Access::ReadWrite, None).expect("open");
    for name in ["s1", "s2", "s3"].iter().take(rng.random_range(2..4)) {
        changes(&volume, &mut model, rng, 6);
        let new = layer(power);
        files.push(new.clone());
        volume.snapshot_media(new, name).expect("snapshot");
        model.snapshots.push(((*name).to_owned(), model.now().clone()));
    }
    (files, model)
}

/// Seeded operations; false when the power went.
fn changes(volume: &Volume, model: &mut Model, rng: &mut StdRng, count: u32) -> bool {
    let mut queue = volume.queue(2).expect("queue");
    (0..count).all(|_| {
        let size = model.now().len();
        let offset = rng.random_range(0..size);
        let len = rng.random_range(1..=(size - offset).min(2 * BLOCK_BYTES as usize));
        match rng.random_range(0..6) {
            0 => flush(&mut queue, model),
            1 => zeroes(&mut queue, model, offset, len, rng.random()),
            _ => write(&mut queue, model, offset, &vec![rng.random_range(1..=255); len], false),
        }
    })
}

/// Begins to merge some sealed layer, or goes on; false when the power went.
fn merging(volume: &Volume, merge: &mut Option<Merge>, model: &mut Model, rng: &mut StdRng) -> bool {
    let Some(under_way) = merge else {
        let sealed: Vec<_> = volume.stack().layers.iter().filter_map(|l| l.header()).collect();
        if let Some((_, sealed @ [_, ..])) = sealed.split_last() {
            let gone = &sealed[rng.random_range(0..sealed.len())];
            *merge = Some(volume.merge_by(gone.layer, BY.0, BY.1).expect("merge"));
            model.maybe_gone = Some(gone.snapshot.clone()).filter(|name| !name.is_empty());
        }
        return true;
    };
    let Ok(progress) = under_way.step(rng.random_range(1..4) * BLOCK_BYTES) else { return false };
    if progress.done {
        let gone = model.maybe_gone.take();
        model.snapshots.retain(|s| Some(&s.0) != gone.as_ref());
        *merge = None;
    }
    true
}

/// One life of both. False when the power never went.
fn life(seed: u64, steps: i64) -> bool {
    let mut rng = StdRng::seed_from_u64(seed);
    let power = Power::endless();
    let encrypted = seed % 2 == 1;
    let (first, first_model) = source(&power, &mut rng, encrypted);
    let at = rng.random_range(0..first_model.snapshots.len());
    let (name, bytes) = first_model.snapshots[at].clone();
    // Up to the point's layer; an encrypted volume has its bottom below the first.
    let shared = at + 1 + usize::from(encrypted);
    let maps: Vec<Media> = (0..shared).map(|_| SimFile::media(&power)).collect();
    let head = layer(&power);
    let size_bytes = bytes.len() as u64;
    let key = encrypted.then(test_secret);
    let plan = NewMedia { volume: [8; 16], size_bytes, maps: maps.clone(), head: head.clone(), key };
    clone_point(&first[..shared], &name, &plan).expect("clone");
    let mut second: Files = first.iter().map(|(data, _)| data.clone()).zip(maps).collect();
    second.push(head);

    power.set(steps);
    let mut families = [(first, first_model), (second, Model::new(bytes))];
    let mut survived = true;
    {
        let volumes = [0, 1].map(|i| {
            let files: Files = families[i].0.clone();
            Volume::open_media(files, Access::ReadWrite, None).expect("open")
        });
        let mut merges = [None, None];
        for _ in 0..30 {
            let i = rng.random_range(0..2_usize);
            let model = &mut families[i].1;
            survived = survived
                && match rng.random_range(0..3) {
                    0 => changes(&volumes[i], model, &mut rng, 1),
                    _ => merging(&volumes[i], &mut merges[i], model, &mut rng),
                };
        }
    }

    let context = format!("seed {seed}, power cut at step {steps}");
    let power = Power::endless();
    let mut luck = StdRng::seed_from_u64(seed ^ (steps as u64) << 32);
    let mut after = |m: &Media| crash(m, &mut luck, &power);
    let data: Vec<Media> = families[0].0.iter().map(|(data, _)| after(data)).collect();
    for (i, (files, _)) in families.iter_mut().enumerate() {
        for (k, (old, map)) in files.iter_mut().enumerate() {
            // What is shared had one fate.
            *old = if i == 0 || k < shared { data[k].clone() } else { after(old) };
            *map = after(map);
        }
    }
    for (files, model) in &mut families {
        check(files, model, &context);
    }
    // To the end in one, then in the other, with what either has left.
    for (files, model) in &mut families {
        let volume = Volume::open_media(files.clone(), Access::ReadWrite, None).expect("open again");
        let now = read_all(&volume);
        let sealed: Vec<_> = volume.stack().layers.iter().filter_map(|l| l.header()).collect();
        for layer in &sealed[..sealed.len() - 1] {
            let mut merge = volume.merge_by(layer.layer, BY.0, BY.1).expect("merge");
            while !merge.step(u64::MAX).expect("step").done {}
        }
        assert!(read_all(&volume) == now, "{context}: after all merges");
        model.snapshots.clear();
    }
    !survived
}

#[test]
fn a_power_cut_harms_no_volume_that_shares_data() {
    let seeds = std::env::var("SERIO_CRASH_SEEDS").ok().and_then(|s| s.parse().ok()).unwrap_or(10);
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
