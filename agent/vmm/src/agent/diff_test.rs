//! A VM that is saved again holds only what changed: by the guest, and by us for it. The mini guest on `/dev/kvm`.
//!
//! The reference is a whole snapshot of the same instant: saved while the VM still stands, without a base. Both must have the same
//! memory, page for page.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use serio_control::Channel;
use serio_control::message::{BaseFds, Body, Disk, Empty, Launch, LayerFds, RestoreFrom, SaveVm, SavedVm};
use serio_hv::vm_memory::{Bytes, GuestAddress};
use serio_volume::{LayerFiles, create_layer};

use super::bench::{Bench, done};
use super::save_test::{Lines, beside};
use crate::snapshot::{self, chain};

const DISK_BYTES: u64 = 8 << 20;
const MEMORY_BYTES: u64 = 64 << 20;

/// Saves into the files `NAME.state` and `NAME.memory`. The id is made of the number.
fn save(bench: &Bench, channel: &mut Channel, (name, id): (&str, u8), bases: &[u8], stay: bool) -> SavedVm {
    let files = [bench.file(&format!("{name}.state")), bench.file(&format!("{name}.memory"))];
    let fds: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
    let request = SaveVm {
        state_fd: 0,
        memory_fd: 1,
        stay_paused: stay,
        snapshot: name.to_owned(),
        id: if id == 0 { Vec::new() } else { vec![id; 16] },
        bases: bases.iter().map(|id| vec![*id; 16]).collect(),
        ..SaveVm::default()
    };
    match channel.call(Body::SaveVm(request), &fds).expect("saved") {
        Body::SavedVm(saved) => saved,
        other => panic!("{other:?}"),
    }
}

/// The memory of snapshots that go on from each other, the newest first.
fn memory(bench: &Bench, names: &[&str]) -> Vec<u8> {
    let layers: Vec<chain::Layer> = names
        .iter()
        .map(|name| {
            let state = snapshot::read(&bench.file(&format!("{name}.state"))).expect("whole");
            (state, bench.file(&format!("{name}.memory")))
        })
        .collect();
    let memory = chain::open(&layers).expect("they belong together");
    let mut bytes = vec![0; MEMORY_BYTES as usize];
    memory.read_slice(&mut bytes, GuestAddress(0)).expect("RAM");
    bytes
}

fn assert_same(chain: &[u8], whole: &[u8]) {
    let pages = chain.chunks(4096).zip(whole.chunks(4096)).enumerate();
    let other: Vec<usize> = pages.filter(|(_, (a, b))| a != b).map(|(page, _)| page).collect();
    assert!(other.is_empty(), "pages {other:?} are not in the diff");
}

/// A diff, and the whole of the same instant; the VM runs on.
fn both(bench: &Bench, channel: &mut Channel, (name, id): (&str, u8), bases: &[u8]) -> SavedVm {
    let saved = save(bench, channel, (name, id), bases, true);
    save(bench, channel, ("whole", 0), &[], true);
    done(channel, Body::Resume(Empty {}));
    saved
}

fn disk(bench: &Bench) -> [File; 2] {
    [bench.file("disk.data"), bench.file("disk.map")]
}

/// The disk's blocks differ, so that each read changes the buffer.
fn churning() -> Option<(Bench, Channel, Lines)> {
    let bench = Bench::mini()?;
    let [data, map] = disk(&bench);
    create_layer(&LayerFiles { data, map }, DISK_BYTES, [7; 16], false).expect("created");
    let mut channel = bench.launch_mini("mini.test=churn", |launch| launch.disks = disks(), &disk(&bench));
    let lines = Lines::of(&bench);
    done(&mut channel, Body::Pause(Empty {}));
    done(&mut channel, Body::Resume(Empty {}));
    Some((bench, channel, lines))
}

fn disks() -> Vec<Disk> {
    let layers = vec![LayerFds { data_fd: 5, map_fd: Some(6) }];
    vec![Disk { volume_id: "disk".to_owned(), layers, ..Disk::default() }]
}

fn restore(bench: &Bench, source: &Bench, names: &[&str]) -> Result<Channel, String> {
    restore_with(bench, source, names, disks(), Vec::from(disk(source)))
}

fn restore_with(
    bench: &Bench,
    source: &Bench,
    names: &[&str],
    disks: Vec<Disk>,
    mut files: Vec<File>,
) -> Result<Channel, String> {
    let mut pairs = Vec::new();
    for name in names {
        let at = u32::try_from(files.len()).expect("few") + 5;
        files.extend([source.file(&format!("{name}.state")), source.file(&format!("{name}.memory"))]);
        pairs.push(BaseFds { state_fd: at, memory_fd: at + 1 });
    }
    let first = pairs.remove(0);
    let (state_fd, memory_fd) = (first.state_fd, first.memory_fd);
    let from = RestoreFrom { state_fd, memory_fd, bases: pairs, ..RestoreFrom::default() };
    let set = |launch: &mut Launch| {
        (launch.vcpus, launch.memory_bytes, launch.restore) = (1, MEMORY_BYTES, Some(from));
        launch.disks = disks;
    };
    bench.launch_as_is(set, &files)
}

/// Blocks are read and memory is written all the time between the snapshots; a VM goes on from the last, and is saved as a diff of that.
#[test]
fn a_chain_of_diffs_is_the_memory_of_the_vm() {
    let Some((bench, mut channel, mut lines)) = churning() else { return };
    lines.number("churn: ");
    let first = both(&bench, &mut channel, ("a", 1), &[]);
    assert!(first.base.is_empty());
    assert_same(&memory(&bench, &["a"]), &memory(&bench, &["whole"]));
    let mut names = vec!["a"];
    for (name, id) in [("b", 2), ("c", 3), ("d", 4)] {
        lines.number("churn: ");
        lines.number("churn: ");
        let saved = both(&bench, &mut channel, (name, id), &[id - 1, 99]);
        assert_eq!(saved.base, [id - 1; 16]);
        assert!(saved.memory_bytes < first.memory_bytes, "{saved:?} of {first:?}");
        names.insert(0, name);
        assert_same(&memory(&bench, &names), &memory(&bench, &["whole"]));
        println!("{name}: {} of {} bytes", saved.memory_bytes, first.memory_bytes);
    }
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();

    let said = restore(&beside(&bench), &bench, &["d", "c"]).expect_err("two are missing");
    assert!(said.contains("02020202") && said.contains("missing"), "{said}");
    let next = beside(&bench);
    let mut channel = restore(&next, &bench, &names).expect("restored");
    let mut lines = Lines::of(&next);
    lines.number("churn: ");
    for file in ["a", "b", "c", "d"].iter().flat_map(|n| [format!("{n}.state"), format!("{n}.memory")]) {
        std::fs::copy(bench.path(&file), next.path(&file)).expect("copied");
    }
    let saved = both(&next, &mut channel, ("e", 5), &[4]);
    assert_eq!(saved.base, [4; 16], "it goes on from what it was restored from");
    names.insert(0, "e");
    assert_same(&memory(&next, &names), &memory(&next, &["whole"]));
    done(&mut channel, Body::Stop(Empty {}));
    next.agent_ended();
}

/// Two diffs over a whole one, under fifty VMs that all write: each has its own memory, and the snapshots are what they were.
#[test]
fn many_vms_go_on_from_one_diff_side_by_side() {
    let Some(bench) = Bench::mini() else { return };
    let memory_of = |launch: &mut Launch| launch.memory_bytes = MEMORY_BYTES;
    let mut channel = bench.launch_mini("mini.test=heartbeat", memory_of, &[]);
    let mut lines = Lines::of(&bench);
    lines.number("heartbeat ");
    save(&bench, &mut channel, ("a", 1), &[], false);
    for (name, id) in [("b", 2), ("c", 3)] {
        lines.number("heartbeat ");
        assert_eq!(save(&bench, &mut channel, (name, id), &[id - 1], false).base, [id - 1; 16]);
    }
    let at = lines.number("heartbeat ");
    let before = memory(&bench, &["c", "b", "a"]);
    let mut clones: Vec<_> = (0..50)
        .map(|_| {
            let clone = beside(&bench);
            let channel = restore_with(&clone, &bench, &["c", "b", "a"], Vec::new(), Vec::new());
            let lines = Lines::of(&clone);
            (clone, channel.expect("restored"), lines)
        })
        .collect();
    for (_, _, lines) in &mut clones {
        let first = lines.number("heartbeat ");
        assert!(first + 1 >= at && first < at + 600, "{at}, then {first}");
        assert_eq!(lines.number("heartbeat "), first + 1, "its timer goes on");
    }
    for (clone, mut channel, _) in clones {
        done(&mut channel, Body::Stop(Empty {}));
        clone.agent_ended();
    }
    assert_same(&memory(&bench, &["c", "b", "a"]), &before);
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();
}

/// Whoever has not the last snapshot any more, or asks for a guest that has booted again, gets a whole one.
#[test]
fn without_its_base_a_snapshot_is_whole() {
    let Some((bench, mut channel, mut lines)) = churning() else { return };
    lines.number("churn: ");
    save(&bench, &mut channel, ("a", 1), &[], false);
    assert!(save(&bench, &mut channel, ("b", 2), &[7], false).base.is_empty());
    assert_eq!(save(&bench, &mut channel, ("c", 3), &[1, 2], false).base, [2; 16]);
    // One that nobody shall go on from changes nothing.
    assert!(save(&bench, &mut channel, ("x", 0), &[3], false).base.is_empty());
    let saved = both(&bench, &mut channel, ("d", 4), &[3]);
    assert_eq!(saved.base, [3; 16]);
    assert_same(&memory(&bench, &["d", "c", "b"]), &memory(&bench, &["whole"]));
    done(&mut channel, Body::Reset(Empty {}));
    let mut lines = Lines::of(&bench);
    lines.number("churn: ");
    assert!(save(&bench, &mut channel, ("e", 5), &[4], false).base.is_empty());
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();
}

/// The figure of an idle guest of 1 GiB whose memory is in use: what its second snapshot takes against the first.
#[test]
fn an_idle_guest_is_saved_again_in_little() {
    const BYTES: u64 = 1 << 30;
    let Some(bench) = Bench::mini() else { return };
    let large = |launch: &mut Launch| launch.memory_bytes = BYTES;
    let mut channel = bench.launch_mini("mini.test=heartbeat", large, &[]);
    Lines::of(&bench).number("heartbeat ");
    save(&bench, &mut channel, ("z", 9), &[], true);
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();
    // Filled as a guest would have.
    let file = bench.file("z.memory");
    let piece: Vec<u8> = (0..1u32 << 20).map(|at| (at * 31 % 251) as u8 | 1).collect();
    for mib in 128..BYTES >> 20 {
        file.write_all_at(&piece, mib << 20).expect("written");
    }
    let saved = snapshot::read(&bench.file("z.state")).expect("whole");
    let machine = saved.machine.clone();
    let ram = chain::open(&[(saved, bench.file("z.memory"))]).expect("mapped");
    let files = (bench.file("y.state"), bench.file("y.memory"));
    snapshot::write(&ram, machine, snapshot::Point::default(), (&files.0, &files.1)).expect("written");
    let next = beside(&bench);
    let from = RestoreFrom { state_fd: 5, memory_fd: 6, ..RestoreFrom::default() };
    let set = |launch: &mut Launch| {
        (launch.vcpus, launch.memory_bytes, launch.restore) = (1, BYTES, Some(from));
    };
    let mut channel = next.launch_as_is(set, &[files.0, files.1]).expect("restored");
    Lines::of(&next).number("heartbeat ");
    let first = save(&next, &mut channel, ("a", 1), &[], false);
    let mut lines = Lines::of(&next);
    lines.number("heartbeat ");
    lines.number("heartbeat ");
    let second = save(&next, &mut channel, ("b", 2), &[1], false);
    assert_eq!(second.base, [1; 16]);
    assert!(second.memory_bytes < first.memory_bytes / 100, "{second:?} of {first:?}");
    let held = next.file("b.memory").metadata().expect("known").blocks() * 512;
    println!(
        "1 GiB, first: {} bytes, stood still {} ms; second: {} bytes ({held} on the disk), {} us",
        first.memory_bytes,
        first.paused_ns / 1_000_000,
        second.memory_bytes,
        second.paused_ns / 1000
    );
    lines.number("heartbeat ");
    done(&mut channel, Body::Stop(Empty {}));
    next.agent_ended();
}
