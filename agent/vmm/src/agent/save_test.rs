//! A VM that is saved and goes on elsewhere, with the mini guest on the machine's own `/dev/kvm`.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serio_control::message::{
    Body, Disk, Empty, EndKind, Failed, Launch, LayerFds, NewHead, PreparedVolume, RestoreFrom, SaveVm,
    SavedVm, VmState,
};
use serio_control::{Channel, ChannelError};
use serio_volume::{LayerFiles, create_layer};

use crate::snapshot;

use super::bench::{Bench, done, status, wait_end};

const DISK_BYTES: u64 = 8 << 20;

pub(super) struct Lines(BufReader<UnixStream>);

impl Lines {
    pub(super) fn of(bench: &Bench) -> Lines {
        let console = UnixStream::connect(bench.path("console")).expect("listens");
        console.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
        Lines(BufReader::new(console))
    }

    /// The number in the next line that begins so.
    pub(super) fn number(&mut self, start: &str) -> u64 {
        loop {
            let mut line = String::new();
            assert!(self.0.read_line(&mut line).expect("in time") > 0, "the guest ended before {start:?}");
            assert!(!line.contains("failed") && !line.contains("fault"), "{line}");
            let digits = line.strip_prefix(start).and_then(|rest| rest.split_whitespace().next());
            if let Some(number) = digits.and_then(|digits| digits.parse().ok()) {
                return number;
            }
        }
    }
}

/// Another process' worth of agent, with the same guest at hand.
pub(super) fn beside(bench: &Bench) -> Bench {
    let next = Bench::new().expect("as before");
    std::fs::copy(bench.path("kernel"), next.path("kernel")).expect("copied");
    next
}

fn layer(bench: &Bench, volume: &str, number: u64) -> LayerFiles {
    LayerFiles {
        data: bench.file(&format!("{volume}{number}.data")),
        map: bench.file(&format!("{volume}{number}.map")),
    }
}

/// Asks for a save into the files `state` and `memory`, with new heads of these volumes.
fn save(
    bench: &Bench,
    channel: &mut Channel,
    stay_paused: bool,
    volumes: &[&str],
) -> Result<SavedVm, Failed> {
    let mut files = vec![bench.file("state"), bench.file("memory")];
    let mut prepared = Vec::new();
    for (at, name) in (1u32..).zip(volumes) {
        let LayerFiles { data, map } = layer(bench, name, 1);
        files.extend([data, map]);
        let head = Some(NewHead { data_fd: 2 * at, map_fd: 2 * at + 1 });
        prepared.push(PreparedVolume { volume_id: (*name).to_owned(), head });
    }
    let fds: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
    let snapshot = "s1".to_owned();
    let request =
        SaveVm { state_fd: 0, memory_fd: 1, stay_paused, snapshot, volumes: prepared, ..SaveVm::default() };
    match channel.call(Body::SaveVm(request), &fds) {
        Ok(Body::SavedVm(saved)) => Ok(saved),
        Err(ChannelError::Refused(failed)) => Err(failed),
        other => panic!("{other:?}"),
    }
}

/// Launches the mini guest of `bench` where the one of `source` was saved.
fn restore(
    bench: &Bench,
    source: &Bench,
    change: impl FnOnce(&mut Launch),
    disks: Vec<File>,
) -> Result<Channel, String> {
    let mut files = disks;
    let at = u32::try_from(files.len()).expect("few") + 5;
    files.extend([source.file("state"), source.file("memory")]);
    let from = RestoreFrom { state_fd: at, memory_fd: at + 1, ..RestoreFrom::default() };
    let set = |launch: &mut Launch| {
        (launch.vcpus, launch.memory_bytes, launch.restore) = (1, 64 << 20, Some(from));
        change(launch);
    };
    bench.launch_as_is(set, &files)
}

fn disks(names: &[&str], layers: u32) -> Vec<Disk> {
    let disk = |(at, name): (u32, &&str)| Disk {
        volume_id: (*name).to_owned(),
        layers: (0..layers)
            .map(|layer| 5 + 2 * (at * layers + layer))
            .map(|fd| LayerFds { data_fd: fd, map_fd: Some(fd + 1) })
            .collect(),
        ..Disk::default()
    };
    (0u32..).zip(names).map(disk).collect()
}

/// A writer to two disks is saved at full speed, with its volumes; it goes on in another process from there.
#[test]
fn a_vm_saved_while_it_writes_goes_on_elsewhere_with_its_disks() {
    let Some(bench) = Bench::mini() else { return };
    let names = ["a", "b"];
    for name in names {
        create_layer(&layer(&bench, name, 0), DISK_BYTES, [7; 16], false).expect("created");
    }
    let files_of = |bench: &Bench, layers: u64| {
        let numbers = |name| (0..layers).map(move |number| layer(bench, name, number));
        names.into_iter().flat_map(numbers).flat_map(|files| [files.data, files.map]).collect::<Vec<_>>()
    };
    let set = |launch: &mut Launch| launch.disks = disks(&names, 1);
    let mut channel = bench.launch_mini("mini.test=pair", set, &files_of(&bench, 1));
    let mut lines = Lines::of(&bench);
    lines.number("pair: ");
    // Pauses and goes on many times: nothing is lost.
    for _ in 0..30 {
        done(&mut channel, Body::Pause(Empty {}));
        assert_eq!(status(&mut channel).state, i32::from(VmState::Paused));
        done(&mut channel, Body::Resume(Empty {}));
    }
    let before = lines.number("pair: ");
    let saved = save(&bench, &mut channel, true, &names).expect("saved");
    assert!(saved.memory_bytes > 0 && saved.memory_bytes < 16 << 20, "{saved:?}");
    assert_eq!(status(&mut channel).state, i32::from(VmState::Paused));
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();

    let next = beside(&bench);
    let set = |launch: &mut Launch| {
        launch.disks = disks(&names, 2);
        launch.restore.as_mut().expect("set").check_beside = true;
    };
    let mut channel = restore(&next, &bench, set, files_of(&bench, 2)).expect("restored");
    let mut lines = Lines::of(&next);
    let first = lines.number("pair: ");
    assert!(first > before && first.is_multiple_of(200), "{before}, then {first}");
    assert_eq!(lines.number("pair: "), first + 200, "no round is lost");
    // Saved again, from private memory, without its disks; and it goes on.
    save(&next, &mut channel, false, &[]).expect("saved");
    assert_eq!(lines.number("pair: "), first + 400);
    done(&mut channel, Body::Stop(Empty {}));
    next.agent_ended();
}

#[test]
fn many_vms_go_on_from_one_snapshot_side_by_side() {
    let Some(bench) = Bench::mini() else { return };
    let mut channel = bench.launch_mini("mini.test=heartbeat", |_| {}, &[]);
    let mut lines = Lines::of(&bench);
    lines.number("heartbeat ");
    let saved = save(&bench, &mut channel, false, &[]).expect("saved");
    let at = lines.number("heartbeat ");
    println!("saved: {saved:?}");
    let mut times = Vec::new();
    let mut clones: Vec<_> = (0..50)
        .map(|_| {
            let clone = beside(&bench);
            let began = Instant::now();
            let hold = |launch: &mut Launch| launch.restore.as_mut().expect("set").stay_paused = true;
            let channel = restore(&clone, &bench, hold, Vec::new()).expect("restored");
            times.push(began.elapsed());
            let lines = Lines::of(&clone);
            (clone, channel, lines)
        })
        .collect();
    for (_, channel, _) in &mut clones {
        assert_eq!(status(channel).state, i32::from(VmState::Paused));
        done(channel, Body::Resume(Empty {}));
    }
    for (clone, mut channel, mut lines) in clones {
        let first = lines.number("heartbeat ");
        assert!(first + 1 >= at && first < at + 600, "{at}, then {first}");
        assert_eq!(lines.number("heartbeat "), first + 1, "its timer goes on");
        done(&mut channel, Body::Stop(Empty {}));
        clone.agent_ended();
    }
    times.sort_unstable();
    println!("asked to ready, median: {:?}", times.get(25));
    lines.number("heartbeat ");
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();
}

#[test]
fn what_does_not_fit_is_refused_and_says_why() {
    let Some(bench) = Bench::mini() else { return };
    let mut channel = bench.launch_mini("mini.test=heartbeat", |_| {}, &[]);
    Lines::of(&bench).number("heartbeat ");
    let failed = save(&bench, &mut channel, false, &["a"]).expect_err("refused");
    assert_eq!((failed.field.as_str(), failed.message.as_str()), ("volumes", "volume `a` is not of this VM"));
    save(&bench, &mut channel, true, &[]).expect("saved");
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();
    let refused = |change: &dyn Fn(&mut Launch), disks: Vec<File>| {
        let next = beside(&bench);
        restore(&next, &bench, change, disks).expect_err("refused")
    };
    let said = refused(&|launch| launch.vcpus = 2, Vec::new());
    assert!(said.starts_with("restore: ") && said.contains("saved with 1 vcpus, not 2"), "{said}");
    let said = refused(&|launch| launch.memory_bytes = 32 << 20, Vec::new());
    assert!(said.contains("67108864 bytes of memory, not 33554432"), "{said}");
    let disk = bench.file("disk");
    disk.set_len(DISK_BYTES).expect("set");
    let raw = |launch: &mut Launch| {
        let layers = vec![LayerFds { data_fd: 5, map_fd: None }];
        launch.disks = vec![Disk { volume_id: "disk".to_owned(), layers, ..Disk::default() }];
    };
    let said = refused(&raw, vec![disk]);
    assert!(said.starts_with("restore: ") && said.contains("PCI functions"), "{said}");
    let state = bench.file("state");
    let mut byte = [0];
    state.read_exact_at(&mut byte, 500).expect("long enough");
    state.write_all_at(&[byte[0] ^ 1], 500).expect("written");
    let said = refused(&|_| {}, Vec::new());
    assert!(said.contains("checksum of vcpu 0 at byte"), "{said}");
    state.set_len(0).expect("set");
    let said = refused(&|_| {}, Vec::new());
    assert!(said.contains("no saved state"), "{said}");
}

/// A flipped byte of the memory is noticed before the guest runs; beside it, it ends the guest.
#[test]
fn damaged_memory_is_refused_or_ends_the_vm() {
    let Some(bench) = Bench::mini() else { return };
    let mut channel = bench.launch_mini("mini.test=heartbeat", |_| {}, &[]);
    Lines::of(&bench).number("heartbeat ");
    save(&bench, &mut channel, true, &[]).expect("saved");
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();
    // Where nothing was: the guest does not stumble over it by itself.
    let memory = bench.file("memory");
    memory.write_all_at(&[1], 61 << 20).expect("written");
    let next = beside(&bench);
    let said = restore(&next, &bench, |_| {}, Vec::new()).expect_err("refused");
    assert!(said.starts_with("restore: ") && said.contains("2097152 bytes at 62914560"), "{said}");
    let next = beside(&bench);
    let check = |launch: &mut Launch| launch.restore.as_mut().expect("set").check_beside = true;
    match restore(&next, &bench, check, Vec::new()) {
        Ok(mut channel) => drop(wait_end(&mut channel)),
        Err(said) => panic!("{said}"),
    }
    let (record, _) = next.finish();
    assert_eq!(record.kind, i32::from(EndKind::HostError));
    assert!(record.reason.contains("the saved memory is damaged"), "{record:?}");
    memory.write_all_at(&[0], 61 << 20).expect("written");
    let next = beside(&bench);
    let mut channel = restore(&next, &bench, |_| {}, Vec::new()).expect("as saved");
    Lines::of(&next).number("heartbeat ");
    done(&mut channel, Body::Stop(Empty {}));
    next.agent_ended();
}

/// Saves what the files `state` and `memory` have, with the sums of what is there now.
fn save_again(bench: &Bench) {
    let saved = snapshot::read(&bench.file("state")).expect("whole");
    let machine = saved.machine.clone();
    let memory = snapshot::chain::open(&[(saved, bench.file("memory"))]).expect("mapped");
    let files = (bench.file("state2"), bench.file("memory2"));
    let point = snapshot::Point::default();
    snapshot::write(&memory, machine, point, (&files.0, &files.1)).expect("written");
    for name in ["state", "memory"] {
        std::fs::rename(bench.path(&format!("{name}2")), bench.path(name)).expect("renamed");
    }
}

/// Resident pages of this process, in bytes.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").expect("readable");
    text.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).expect("a number") * 4096
}

#[test]
fn a_gigabyte_runs_before_it_is_read() {
    const BYTES: u64 = 1 << 30;
    let Some(bench) = Bench::mini() else { return };
    let large = |launch: &mut Launch| launch.memory_bytes = BYTES;
    let mut channel = bench.launch_mini("mini.test=heartbeat", large, &[]);
    Lines::of(&bench).number("heartbeat ");
    let saved = save(&bench, &mut channel, true, &[]).expect("saved");
    println!(
        "1 GiB, of which {} bytes are in use: stood still for {} us",
        saved.memory_bytes,
        saved.paused_ns / 1000
    );
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();
    // What a guest would have filled it with.
    let memory = bench.file("memory");
    let piece: Vec<u8> = (0..1u32 << 20).map(|at| (at * 31 % 251) as u8 | 1).collect();
    for mib in 128..BYTES >> 20 {
        memory.write_all_at(&piece, mib << 20).expect("written");
    }
    save_again(&bench);
    let mut times = Vec::new();
    for round in 0..6 {
        let next = beside(&bench);
        let before = resident();
        let set = |launch: &mut Launch| {
            large(launch);
            launch.restore.as_mut().expect("set").check_beside = round > 0;
        };
        let began = Instant::now();
        let mut channel = restore(&next, &bench, set, Vec::new()).expect("restored");
        match round {
            0 => println!("1 GiB, checked first, asked to running: {:?}", began.elapsed()),
            _ => times.push(began.elapsed()),
        }
        let mut lines = Lines::of(&next);
        let at = lines.number("heartbeat ");
        assert_eq!(lines.number("heartbeat "), at + 1);
        let grown = resident().saturating_sub(before);
        assert!(grown < 64 << 20, "{grown} bytes were read");
        if times.len() == 5 {
            let saved = save(&next, &mut channel, true, &[]).expect("saved");
            assert!(saved.memory_bytes > 890 << 20, "{saved:?}");
            println!("1 GiB, full: stood still for {} ms", saved.paused_ns / 1_000_000);
        }
        done(&mut channel, Body::Stop(Empty {}));
        next.agent_ended();
    }
    times.sort_unstable();
    println!("1 GiB, asked to running: {times:?}");
}
