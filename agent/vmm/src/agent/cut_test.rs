//! Cuts of volumes that are written meanwhile, with guests of every kind.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serio_control::message::{
    Body, Code, FinishSnapshot, HoldSnapshot, NewHead, PointClass, PrepareSnapshot, Prepared, PreparedVolume,
};
use serio_volume::{Access, Buffers, IoQueue, LayerFiles, Op, Volume, VolumeFiles, create_layer};
use tempfile::TempDir;

use super::cut::Cuts;
use crate::devices::{Devices, Disk};
use crate::guest_agent::GuestAgent;
use crate::guest_agent::fake::{FakeGuest, answer_well};

const SIZE: u64 = 1 << 20;

/// Two volumes, as the devices of a VM.
struct Bench {
    folder: TempDir,
    devices: Arc<Devices>,
    cuts: Arc<Cuts>,
}

fn file(folder: &TempDir, name: &str) -> File {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(folder.path().join(name))
        .expect("opened")
}

fn layer(folder: &TempDir, volume: &str, number: u32) -> LayerFiles {
    LayerFiles {
        data: file(folder, &format!("{volume}{number}.data")),
        map: file(folder, &format!("{volume}{number}.map")),
    }
}

impl Bench {
    fn new(guest: Option<&FakeGuest>) -> Bench {
        let folder = tempfile::tempdir().expect("a directory");
        let mut devices = Devices::new(1).expect("an eventfd");
        for name in ["a", "b"] {
            create_layer(&layer(&folder, name, 0), SIZE, [7; 16], false).expect("created");
            let files = VolumeFiles { layers: vec![layer(&folder, name, 0)] };
            let volume = Volume::open(files, Access::ReadWrite).expect("opened");
            devices.add_disk(Disk::new(name.to_owned(), volume));
        }
        if let Some(guest) = guest {
            devices.guest_agent = GuestAgent::new(guest.port.clone());
        }
        Bench { folder, devices: Arc::new(devices), cuts: Arc::default() }
    }

    fn volume(&self, name: &str) -> Volume {
        self.devices.disk(name).expect("is there").volume.clone()
    }

    fn request(&self, number: u32) -> (PrepareSnapshot, Vec<OwnedFd>) {
        let mut descriptors = Vec::new();
        let mut volumes = Vec::new();
        for (at, name) in (0u32..).zip(["a", "b"]) {
            let LayerFiles { data, map } = layer(&self.folder, name, number);
            descriptors.extend([OwnedFd::from(data), OwnedFd::from(map)]);
            let head = Some(NewHead { data_fd: 2 * at, map_fd: 2 * at + 1 });
            volumes.push(PreparedVolume { volume_id: name.to_owned(), head });
        }
        let snapshot = format!("s{number}");
        let request = PrepareSnapshot {
            snapshot_id: snapshot.clone(),
            snapshot,
            volumes,
            ..PrepareSnapshot::default()
        };
        (request, descriptors)
    }

    fn prepare(&self, number: u32, change: impl FnOnce(&mut PrepareSnapshot)) -> Body {
        let (mut request, descriptors) = self.request(number);
        change(&mut request);
        self.cuts.prepare(&self.devices, false, &request, descriptors)
    }

    fn prepared(&self, number: u32, change: impl FnOnce(&mut PrepareSnapshot)) -> Prepared {
        match self.prepare(number, change) {
            Body::Prepared(prepared) => prepared,
            other => panic!("{other:?}"),
        }
    }

    fn finish(&self, number: u32, commit: bool) -> Body {
        self.cuts.finish(&FinishSnapshot { snapshot_id: format!("s{number}"), commit })
    }

    fn snapshots(&self, name: &str) -> Vec<String> {
        self.volume(name).snapshots().into_iter().map(|s| s.name).collect()
    }
}

fn refused(body: Body) -> (Code, String) {
    match body {
        Body::Failed(failed) => (Code::try_from(failed.code).expect("known"), failed.message),
        other => panic!("{other:?}"),
    }
}

fn assert_done(body: &Body) {
    assert!(matches!(body, Body::Done(_)), "{body:?}");
}

/// Set when dropped, so that a test that fails ends its threads too.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One operation, waited for.
fn run(queue: &mut IoQueue, op: Op) -> Buffers {
    assert!(queue.submit(0, op).is_ok(), "room");
    queue.kick();
    let mut done = None;
    while done.is_none() {
        queue.reap(|_, outcome, buffers| {
            outcome.expect("worked");
            done = Some(buffers);
        });
        std::thread::yield_now();
    }
    done.expect("just now")
}

fn write(queue: &mut IoQueue, count: u64) {
    let mut buffers = Buffers::owned(4096);
    buffers.as_mut_slice().expect("ours").copy_from_slice(&count.to_le_bytes().repeat(512));
    run(queue, Op::Write { offset: 4096, buffers, fua: false });
}

fn count_in(bench: &Bench, name: &str, layers: u32, snapshot: &str) -> u64 {
    let layers = (0..=layers).map(|number| layer(&bench.folder, name, number)).collect();
    let volume = Volume::open_snapshot(VolumeFiles { layers }, snapshot).expect("opened");
    let mut queue = volume.queue(1).expect("a queue");
    let buffers = run(&mut queue, Op::Read { offset: 4096, buffers: Buffers::owned(4096) });
    let bytes = buffers.as_slice().expect("ours");
    let first = u64::from_le_bytes(bytes[..8].try_into().expect("eight"));
    assert!(bytes.chunks(8).all(|word| word == first.to_le_bytes()), "a block is written whole");
    first
}

#[test]
fn the_second_of_two_volumes_is_never_ahead_of_the_first() {
    let bench = Bench::new(None);
    let stop = AtomicBool::new(false);
    const CUTS: u32 = 25;
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let [mut a, mut b] = ["a", "b"].map(|name| bench.volume(name).queue(1).expect("a queue"));
            let mut count = 0u64;
            while !stop.load(Ordering::Relaxed) {
                count += 1;
                write(&mut a, count);
                write(&mut b, count);
            }
            count
        });
        let stopper = StopOnDrop(&stop);
        for number in 1..=CUTS {
            let prepared = bench.prepared(number, |_| {});
            assert_eq!((prepared.class, prepared.frozen), (PointClass::Crash.into(), 0));
            assert_done(&bench.finish(number, true));
        }
        drop(stopper);
        assert!(writer.join().expect("no panic") > 0);
    });
    let mut last = 0;
    for number in 1..=CUTS {
        let snapshot = format!("s{number}");
        let [a, b] = ["a", "b"].map(|name| count_in(&bench, name, CUTS, &snapshot));
        assert!(b <= a && a <= b + 1 && last <= b, "{snapshot}: a has {a}, b has {b}, before it was {last}");
        last = b;
    }
}

#[test]
fn what_is_not_finished_is_as_if_nothing_had_been_asked() {
    let bench = Bench::new(None);
    bench.prepared(1, |_| {});
    assert_done(&bench.finish(1, false));
    assert_eq!(refused(bench.finish(1, true)).0, Code::Precondition, "once");
    // Nobody finishes: the write waits, and goes on.
    bench.prepared(1, |request| request.hold_ms = 30);
    write(&mut bench.volume("b").queue(1).expect("a queue"), 1);
    let (code, why) = refused(bench.finish(1, true));
    assert_eq!(code, Code::Precondition);
    assert!(why.contains("s1") && why.contains("let go"), "{why}");
    assert!(bench.snapshots("a").is_empty() && bench.snapshots("b").is_empty());
    bench.prepared(1, |_| {});
    assert_done(&bench.finish(1, true));
    assert_eq!((bench.snapshots("a"), bench.snapshots("b")), (vec!["s1".to_owned()], vec!["s1".to_owned()]));
}

#[test]
fn wrong_requests_hold_nothing() {
    type Change = fn(&mut PrepareSnapshot);
    let bench = Bench::new(None);
    bench.prepared(1, |_| {});
    let (code, why) = refused(bench.prepare(2, |_| {}));
    assert!(code == Code::Precondition && why.contains("s1 is being taken"), "{why}");
    assert_done(&bench.finish(1, true));
    let wrong: [(Code, &str, Change); 7] = [
        (Code::Invalid, "name at least one", |r| r.volumes.clear()),
        (Code::Invalid, "`other` is not of this VM", |r| r.volumes[1].volume_id = "other".into()),
        (Code::Invalid, "`a` is named twice", |r| r.volumes[1].volume_id = "a".into()),
        (Code::Invalid, "`b` has no new head", |r| r.volumes[1].head = None),
        (Code::Invalid, "descriptor 77", |r| r.volumes[1].head = Some(NewHead { data_fd: 77, map_fd: 0 })),
        (Code::Invalid, "volume a", |r| r.snapshot.clear()),
        (Code::Invalid, "has it already", |r| r.snapshot = "s1".into()),
    ];
    for (code, words, change) in wrong {
        let (said, why) = refused(bench.prepare(2, change));
        assert!(said == code && why.contains(words), "{words}: {said:?} {why}");
    }
    assert_eq!(refused(bench.finish(2, true)).0, Code::Precondition);
    write(&mut bench.volume("a").queue(1).expect("a queue"), 1);
}

#[test]
fn a_volume_that_cannot_be_sealed_is_named_with_those_that_were() {
    let bench = Bench::new(None);
    bench.prepared(1, |_| {});
    assert_done(&bench.finish(1, true));
    // The second volume's new head is the file of its live one: refused, since somebody has it open.
    let (mut request, mut descriptors) = bench.request(2);
    descriptors[2] = OwnedFd::from(file(&bench.folder, "b1.data"));
    request.hold_ms = 0;
    let body = bench.cuts.prepare(&bench.devices, false, &request, descriptors);
    assert!(matches!(body, Body::Prepared(_)));
    let (_, why) = refused(bench.finish(2, true));
    assert!(why.starts_with("volume b: ") && why.ends_with("; sealed before it: a"), "{why}");
    assert_eq!(bench.snapshots("a").len(), 2);
    write(&mut bench.volume("b").queue(1).expect("a queue"), 1);
}

#[test]
fn a_guest_that_freezes_gives_an_application_consistent_cut() {
    let guest = FakeGuest::good();
    let bench = Bench::new(Some(&guest));
    for number in 1..=3 {
        let prepared = bench.prepared(number, |request| request.freeze = true);
        let want = Prepared { class: PointClass::App.into(), frozen: 2, ..Prepared::default() };
        assert_eq!(prepared, want);
        assert_done(&bench.finish(number, number != 2));
    }
    // The next freeze thaws before it freezes; the last one is thawed by its cut's thread.
    let mut asked = Vec::new();
    while asked.last().is_none_or(|last| last != "guest-fsfreeze-thaw") {
        asked.extend(guest.asked());
        std::thread::yield_now();
    }
    assert_eq!(asked.iter().filter(|command| *command == "guest-fsfreeze-freeze").count(), 3);
    assert!(asked.iter().filter(|command| *command == "guest-fsfreeze-thaw").count() >= 3);
    assert_eq!(asked.last().expect("some"), "guest-fsfreeze-thaw");
    assert_eq!(bench.snapshots("a"), ["s1", "s3"]);
}

#[test]
fn a_guest_that_does_not_freeze_is_cut_all_the_same() {
    let check = |guest: Option<FakeGuest>, words: &str| {
        let bench = Bench::new(guest.as_ref());
        let prepared = bench.prepared(1, |request| {
            request.freeze = true;
            request.freeze_timeout_ms = if words.contains("time") { 50 } else { 0 };
        });
        assert_eq!(prepared.class, i32::from(PointClass::Crash), "{words}");
        assert!(prepared.reason.contains(words), "{words}: {}", prepared.reason);
        assert_done(&bench.finish(1, true));
        assert_eq!(bench.snapshots("b"), ["s1"]);
        bench.cuts.abandon(&bench.devices);
    };
    check(None, "no program in the guest has the port open");
    check(Some(FakeGuest::new(|_| Vec::new())), "did not answer in time");
    check(Some(FakeGuest::new(|_| vec![b'x'; 2 << 20])), "more than an answer can be");
    // It thaws by itself before the volumes are held.
    let mut frozen = false;
    let mut seen = 0;
    let hasty = FakeGuest::new(move |request| {
        if request["execute"] == "guest-fsfreeze-status" {
            seen += 1;
            frozen = seen == 1;
        }
        answer_well(request, &mut frozen)
    });
    check(Some(hasty), "did not stay frozen");
}

#[test]
fn the_end_of_the_vm_lets_go() {
    let guest = FakeGuest::good();
    let bench = Bench::new(Some(&guest));
    bench.prepared(1, |request| (request.freeze, request.hold_ms) = (true, 60_000));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write(&mut bench.volume("a").queue(1).expect("a queue"), 1));
        bench.cuts.abandon(&bench.devices);
        writer.join().expect("it went on");
    });
    assert_eq!(refused(bench.finish(1, true)).0, Code::Precondition);
    assert!(bench.snapshots("a").is_empty());

    // While the agent still thinks about it, too.
    let silent = FakeGuest::new(|_| Vec::new());
    let bench = Bench::new(Some(&silent));
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| bench.prepare(1, |request| request.freeze = true));
        while !bench.cuts.is_busy() {
            std::thread::sleep(Duration::from_millis(1));
        }
        bench.cuts.abandon(&bench.devices);
        asked.join().expect("answered");
    });
    assert!(!bench.cuts.is_busy());
}

#[test]
fn frozen_first_nothing_is_held_until_the_word_comes() {
    let guest = FakeGuest::good();
    let bench = Bench::new(Some(&guest));
    let frozen_first = |request: &mut PrepareSnapshot| {
        (request.freeze, request.freeze_first, request.hold_ms) = (true, true, 60_000);
    };
    let hold = |number: u32| bench.cuts.hold(&HoldSnapshot { snapshot_id: format!("s{number}") });
    let prepared = bench.prepared(1, frozen_first);
    assert!(prepared.waits && prepared.class() == PointClass::App, "{prepared:?}");
    // Not held: a write is answered. Nor can it be sealed.
    write(&mut bench.volume("a").queue(1).expect("a queue"), 1);
    assert_eq!(refused(bench.finish(1, true)).0, Code::Precondition);
    assert_eq!(refused(hold(1)).0, Code::Precondition, "that ended it");

    bench.prepared(2, frozen_first);
    match hold(2) {
        Body::Prepared(held) => assert!(!held.waits && held.class() == PointClass::App, "{held:?}"),
        other => panic!("{other:?}"),
    }
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| write(&mut bench.volume("a").queue(1).expect("a queue"), 2));
        assert!(!writer.is_finished());
        assert_done(&bench.finish(2, true));
        writer.join().expect("it went on");
    });
    assert_eq!((bench.snapshots("a"), bench.snapshots("b")), (vec!["s2".to_owned()], vec!["s2".to_owned()]));

    // Let go before it is held.
    bench.prepared(3, frozen_first);
    assert_done(&bench.finish(3, false));
    assert_eq!(refused(hold(3)).0, Code::Precondition);
}
