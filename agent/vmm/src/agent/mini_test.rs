//! Volumes of a VM that runs, with the mini guest on the machine's own `/dev/kvm`: what the guest sees of it, and what
//! is on the disks.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serio_control::message::{
    Body, Disk, DiskLimits, Empty, FinishSnapshot, Launch, LayerFds, Limits, MergeLayer, MergeQuery, NewHead,
    NicLimits, PointClass, PrepareSnapshot, Prepared, PreparedVolume, ResizeVolume, SetLimits, VdcKey,
};
use serio_control::{Channel, ChannelError};
use serio_volume::{
    Access, Buffers, LayerFiles, Op, VdcSecret, Volume, VolumeFiles, create_encrypted, create_layer,
};

use super::bench::{Bench, done, guest, wait_end};

const SIZE: u64 = 8 << 20;

fn layer(bench: &Bench, volume: &str, number: u64) -> LayerFiles {
    LayerFiles {
        data: bench.file(&format!("{volume}{number}.data")),
        map: bench.file(&format!("{volume}{number}.map")),
    }
}

/// New volumes of one layer each, as the launch wants them.
pub(super) fn with_volumes(bench: &Bench, names: &[&str]) -> (Vec<Disk>, Vec<File>) {
    let (mut disks, mut files) = (Vec::new(), Vec::new());
    for (at, name) in (0u32..).zip(names) {
        create_layer(&layer(bench, name, 0), SIZE, [7; 16], false).expect("created");
        let LayerFiles { data, map } = layer(bench, name, 0);
        files.extend([data, map]);
        let layers = vec![LayerFds { data_fd: 5 + 2 * at, map_fd: Some(6 + 2 * at) }];
        disks.push(Disk { volume_id: (*name).to_owned(), layers, ..Disk::default() });
    }
    (disks, files)
}

/// The lines that the guest prints from now on.
pub(super) struct Lines(BufReader<UnixStream>);

impl Lines {
    pub(super) fn of(bench: &Bench) -> Lines {
        let console = UnixStream::connect(bench.path("console")).expect("listens");
        console.set_read_timeout(Some(Duration::from_secs(60))).expect("set");
        Lines(BufReader::new(console))
    }

    pub(super) fn wait(&mut self, start: &str) -> String {
        loop {
            let mut line = String::new();
            assert!(self.0.read_line(&mut line).expect("in time") > 0, "the guest ended before {start:?}");
            if let Some(rest) = line.trim_end().strip_prefix(start) {
                return rest.to_owned();
            }
            assert!(!line.contains("failed"), "{line}");
        }
    }
}

/// Seals both volumes as layer `number` under the name `s{number}`.
fn cut(bench: &Bench, channel: &mut Channel, number: u64, freeze: bool) -> Prepared {
    let files: Vec<File> = ["a", "b"]
        .iter()
        .flat_map(|name| {
            let LayerFiles { data, map } = layer(bench, name, number);
            [data, map]
        })
        .collect();
    let fds: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
    let volumes = (0u32..)
        .zip(["a", "b"])
        .map(|(at, name)| PreparedVolume {
            volume_id: name.to_owned(),
            head: Some(NewHead { data_fd: 2 * at, map_fd: 2 * at + 1 }),
        })
        .collect();
    let snapshot = format!("s{number}");
    let request = PrepareSnapshot {
        snapshot_id: snapshot.clone(),
        snapshot: snapshot.clone(),
        volumes,
        freeze,
        ..PrepareSnapshot::default()
    };
    let prepared = match channel.call(Body::PrepareSnapshot(request), &fds).expect("prepared") {
        Body::Prepared(prepared) => prepared,
        other => panic!("{other:?}"),
    };
    // As seriod does: on another connection.
    done(&mut bench.connect(), Body::FinishSnapshot(FinishSnapshot { snapshot_id: snapshot, commit: true }));
    prepared
}

/// The counter of a volume at a snapshot.
fn counted(bench: &Bench, name: &str, layers: u64, snapshot: &str) -> u64 {
    let layers = (0..=layers).map(|number| layer(bench, name, number)).collect();
    let volume = Volume::open_snapshot(VolumeFiles { layers }, snapshot).expect("opened");
    let mut queue = volume.queue(1).expect("a queue");
    let op = Op::Read { offset: 4096, buffers: Buffers::owned(4096) };
    assert!(queue.submit(0, op).is_ok());
    queue.kick();
    let mut count = None;
    while count.is_none() {
        queue.reap(|_, outcome, buffers| {
            outcome.expect("read");
            let bytes = buffers.as_slice().expect("ours");
            let first = u64::from_le_bytes(bytes[..8].try_into().expect("eight"));
            assert!(bytes.chunks(8).all(|word| word == first.to_le_bytes()), "a block is written whole");
            count = Some(first);
        });
        std::thread::yield_now();
    }
    count.expect("just now")
}

#[test]
fn two_disks_of_a_guest_are_cut_at_one_instant_and_frozen_between_two_rounds() {
    let Some(bench) = Bench::mini() else { return };
    let (disks, files) = with_volumes(&bench, &["a", "b"]);
    let mut channel = bench.launch_mini("mini.test=pair", |launch: &mut Launch| launch.disks = disks, &files);
    let mut lines = Lines::of(&bench);
    lines.wait("pair: ");
    const CUTS: u64 = 12;
    let mut frozen_at = Vec::new();
    for number in 1..=CUTS {
        let freeze = number % 3 == 0;
        let prepared = cut(&bench, &mut channel, number, freeze);
        let class = if freeze { PointClass::App } else { PointClass::Crash };
        assert_eq!((prepared.class, prepared.reason.as_str()), (class.into(), ""));
        if freeze {
            assert_eq!(prepared.frozen, 2);
            let count = lines.wait("pair: frozen at ");
            assert_eq!(lines.wait("pair: thawed at "), count);
            frozen_at.push((number, count.parse::<u64>().expect("a number")));
        }
        // It goes on.
        lines.wait("pair: ");
    }
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();
    let mut last = 0;
    for number in 1..=CUTS {
        let snapshot = format!("s{number}");
        let [a, b] = ["a", "b"].map(|name| counted(&bench, name, CUTS, &snapshot));
        assert!(b <= a && a <= b + 1 && last < a, "{snapshot}: a has {a}, b has {b}, before it was {last}");
        if let Some((_, count)) = frozen_at.iter().find(|(at, _)| *at == number) {
            assert_eq!((a, b), (*count, *count), "{snapshot} was frozen");
        }
        last = a;
    }
}

/// Merges a layer and waits for it.
fn merge(channel: &mut Channel, volume: &str, layer: u64, bytes_per_s: u64) {
    let ask = MergeLayer { volume_id: volume.to_owned(), layer, bytes_per_s, key: None };
    let mut answer = channel.call(Body::MergeLayer(ask), &[]).expect("begun");
    loop {
        let Body::MergeState(state) = answer else { panic!("{answer:?}") };
        assert!(state.layer == layer && state.error.is_empty(), "{state:?}");
        if state.done {
            assert!(!state.running && state.done_bytes == state.total_bytes, "{state:?}");
            return;
        }
        let ask = MergeQuery { volume_id: volume.to_owned(), cancel: false };
        answer = channel.call(Body::MergeQuery(ask), &[]).expect("answered");
    }
}

#[test]
fn layers_are_merged_while_the_guest_writes() {
    let Some(bench) = Bench::mini() else { return };
    let (disks, files) = with_volumes(&bench, &["a", "b"]);
    let mut channel = bench.launch_mini("mini.test=pair", |launch: &mut Launch| launch.disks = disks, &files);
    let mut lines = Lines::of(&bench);
    const CUTS: u64 = 4;
    let mut counts = Vec::new();
    for number in 1..=CUTS {
        lines.wait("pair: ");
        cut(&bench, &mut channel, number, false);
        counts.push(["a", "b"].map(|name| counted(&bench, name, number, &format!("s{number}"))));
    }
    // Layer n has the snapshot s{n + 1}: in the middle, at the bottom, and the one below the live head.
    for layer in [1, 0, 3] {
        for name in ["a", "b"] {
            merge(&mut channel, name, layer, if layer == 1 { 64 << 20 } else { 0 });
        }
        lines.wait("pair: ");
    }
    // It has left the chain: asked again it is done at once.
    merge(&mut channel, "a", 3, 0);
    let never = MergeLayer { volume_id: "a".to_owned(), layer: CUTS, ..MergeLayer::default() };
    match channel.call(Body::MergeLayer(never), &[]) {
        Err(ChannelError::Refused(failed)) => assert_eq!(failed.field, "layer", "{failed:?}"),
        other => panic!("{other:?}"),
    }
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();
    for (at, name) in ["a", "b"].into_iter().enumerate() {
        // Only the third is left; without the files of the others.
        let layers = [2, 4].map(|number| layer(&bench, name, number));
        let volume = Volume::open(VolumeFiles { layers: layers.into() }, Access::ReadOnly).expect("opened");
        let names: Vec<_> = volume.snapshots().into_iter().map(|snapshot| snapshot.name).collect();
        assert_eq!(names, ["s3"]);
        assert_eq!(counted(&bench, name, CUTS, "s3"), counts[2][at]);
    }
}

#[test]
fn an_encrypted_disk_opens_with_its_key_only() {
    let Some(_) = Bench::mini() else { return };
    let key = VdcSecret::new([1; 16], [2; 32]);
    let given = |id: u8, secret: u8| Some(VdcKey { id: vec![id; 16], secret: vec![secret; 32] });
    let short = Some(VdcKey { id: vec![1; 16], secret: vec![2; 31] });
    for (key_given, words) in [
        (given(1, 2), ""),
        (None, "no key was given"),
        (given(3, 2), "under the vdc key"),
        (given(1, 3), "does not open"),
        (short, "secret of 32"),
    ] {
        let bench = Bench::mini().expect("as before");
        let (bottom, head) = (layer(&bench, "a", 0), layer(&bench, "a", 1));
        create_encrypted(&bottom, &head, SIZE, [7; 16], &key).expect("created");
        let files = [bottom.data, bottom.map, head.data, head.map];
        let layers = [5, 7].map(|at| LayerFds { data_fd: at, map_fd: Some(at + 1) });
        let disk = Disk {
            volume_id: "a".to_owned(),
            layers: layers.into(),
            key: key_given,
            direct: true,
            ..Disk::default()
        };
        let change = |launch: &mut Launch| launch.disks = vec![disk];
        if words.is_empty() {
            let mut channel = bench.launch_mini("mini.test=blk", change, &files);
            drop(files);
            wait_end(&mut channel);
            let (_, log) = bench.finish();
            assert!(log.contains("ok blk.mark") && !log.contains("not ok"), "{log}");
        } else {
            let said = bench.launch_with(&[&guest::spin()], change, &files).expect_err("refused");
            assert!(said.starts_with("disks: ") && said.contains(words), "{words}: {said}");
            bench.finish();
        }
    }
}

#[test]
fn a_guest_sees_its_disk_grow() {
    let Some(bench) = Bench::mini() else { return };
    let (disks, files) = with_volumes(&bench, &["a"]);
    let mut channel = bench.launch_mini("mini.test=grow", |launch: &mut Launch| launch.disks = disks, &files);
    let mut lines = Lines::of(&bench);
    let resize =
        |size_bytes| Body::ResizeVolume(ResizeVolume { volume_id: "a".to_owned(), size_bytes, key: None });
    let mut seen = |mib: u64| while lines.wait("grow: ") != format!("{} sectors", mib << 11) {};
    seen(SIZE >> 20);
    for mib in [9, 64, 1 << 20] {
        done(&mut channel, resize(mib << 20));
        seen(mib);
    }
    match channel.call(resize(1 << 20), &[]) {
        Err(ChannelError::Refused(failed)) => {
            assert!(failed.field == "size_bytes" && failed.message.contains("cannot shrink"), "{failed:?}")
        }
        other => panic!("{other:?}"),
    }
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();
    let files = VolumeFiles { layers: vec![layer(&bench, "a", 0)] };
    assert_eq!(Volume::open(files, Access::ReadOnly).expect("opened").size_bytes(), 1 << 40);
}

/// A disk that may do little is let go while its guest waits: it goes on at once, and at its own pace.
#[test]
fn limits_change_while_the_guest_writes() {
    let Some(bench) = Bench::mini() else { return };
    let (mut disks, files) = with_volumes(&bench, &["a"]);
    disks[0].limits = Some(Limits { operations_per_second: 10, operations_burst: 10, ..Limits::default() });
    let mut channel =
        bench.launch_mini("mini.test=writer", |launch: &mut Launch| launch.disks = disks, &files);
    let mut lines = Lines::of(&bench);
    let rounds = |lines: &mut Lines, count: u32| {
        let began = Instant::now();
        (0..count).for_each(|_| drop(lines.wait("writer: ")));
        began.elapsed()
    };
    rounds(&mut lines, 2);
    // Five requests each.
    let limited = rounds(&mut lines, 4);
    assert!(limited > Duration::from_millis(1500), "{limited:?}");
    let request = |volume_id: &str, mac: &[u8]| {
        let disks = vec![DiskLimits { volume_id: volume_id.to_owned(), limits: None }];
        let nics = mac.chunks(6).map(|mac| NicLimits { mac: mac.to_vec(), limits: None }).collect();
        Body::SetLimits(SetLimits { disks, nics })
    };
    for (wrong, field) in [(request("b", &[]), "volume_id"), (request("a", &[2, 0, 0, 0, 0, 1]), "nics")] {
        match channel.call(wrong, &[]) {
            Err(ChannelError::Refused(failed)) => assert_eq!(failed.field, field, "{failed:?}"),
            other => panic!("{other:?}"),
        }
    }
    done(&mut channel, request("a", &[]));
    let free = rounds(&mut lines, 40);
    assert!(free < Duration::from_secs(10), "{free:?}, which the limit would make 20 s");
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();
}
