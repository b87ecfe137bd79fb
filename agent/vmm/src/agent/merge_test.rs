//! Merges by their rules: one a volume, a pace that can change, cancelling, going on, the end of the VM.

use std::fs::OpenOptions;
use std::time::{Duration, Instant};

use serio_control::message::{Body, Code, MergeLayer, MergeQuery, MergeState};
use serio_volume::{Access, Buffers, LayerFiles, Op, Volume, VolumeFiles, create_layer};
use tempfile::TempDir;

use super::merge::Merges;
use crate::devices::{Devices, Disk};

const SIZE: u64 = 8 << 20;

/// A volume of three layers, the lower two full of data.
struct Bench {
    _folder: TempDir,
    devices: Devices,
    merges: Merges,
}

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().expect("a directory");
        let file = |name: String| {
            let mut options = OpenOptions::new();
            let options = options.read(true).write(true).create(true).truncate(false);
            options.open(folder.path().join(name)).expect("opened")
        };
        let layer = |k: u32| LayerFiles { data: file(format!("{k}.data")), map: file(format!("{k}.map")) };
        create_layer(&layer(0), SIZE, [7; 16], false).expect("created");
        let volume = Volume::open(VolumeFiles { layers: vec![layer(0)] }, Access::ReadWrite).expect("opened");
        for k in 1..=2 {
            fill(&volume);
            volume.snapshot(layer(k), &format!("s{k}")).expect("sealed");
        }
        let mut devices = Devices::new(1).expect("an eventfd");
        devices.add_disk(Disk::new("a".to_owned(), volume));
        Bench { _folder: folder, devices, merges: Merges::default() }
    }

    fn begin(&self, layer: u64, bytes_per_s: u64) -> Body {
        let ask = MergeLayer { volume_id: "a".to_owned(), layer, bytes_per_s, key: None };
        self.merges.begin(&self.devices, &ask)
    }

    fn query(&self, cancel: bool) -> MergeState {
        match self.merges.query(&self.devices, &MergeQuery { volume_id: "a".to_owned(), cancel }) {
            Body::MergeState(state) => state,
            other => panic!("{other:?}"),
        }
    }

    fn wait(&self, until: impl Fn(&MergeState) -> bool) -> MergeState {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let state = self.query(false);
            if until(&state) {
                return state;
            }
            assert!(Instant::now() < deadline, "{state:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn fill(volume: &Volume) {
    let mut queue = volume.queue(1).expect("a queue");
    let mut buffers = Buffers::owned(SIZE as usize);
    buffers.as_mut_slice().expect("ours").fill(0x5a);
    assert!(queue.submit(0, Op::Write { offset: 0, buffers, fua: false }).is_ok());
    queue.kick();
    let mut done = false;
    while !done {
        queue.reap(|_, outcome, _| {
            outcome.expect("written");
            done = true;
        });
        std::thread::yield_now();
    }
}

fn refused(body: Body) -> (Code, String) {
    match body {
        Body::Failed(failed) => (Code::try_from(failed.code).expect("known"), failed.message),
        other => panic!("{other:?}"),
    }
}

fn begun(body: Body) {
    assert!(matches!(body, Body::MergeState(ref state) if state.running), "{body:?}");
}

#[test]
fn a_merge_is_asked_for_and_asked_about() {
    let bench = Bench::new();
    assert_eq!(bench.query(true), MergeState::default(), "none yet");
    begun(bench.begin(1, 0));
    let state = bench.wait(|state| !state.running);
    let whole = MergeState { layer: 1, done: true, done_bytes: SIZE, total_bytes: SIZE, ..state.clone() };
    assert_eq!(state, whole);
    assert_eq!(bench.devices.disk("a").expect("there").volume.layer_count(), 2);
    assert_eq!(refused(bench.begin(7, 0)).0, Code::Invalid);
    let other = MergeQuery { volume_id: "b".to_owned(), cancel: false };
    assert_eq!(refused(bench.merges.query(&bench.devices, &other)).0, Code::Invalid);
}

#[test]
fn a_slow_merge_can_be_hurried_cancelled_and_begun_again() {
    let bench = Bench::new();
    // A block a second or so: it does not end by itself.
    begun(bench.begin(1, 4096));
    let (code, why) = refused(bench.begin(0, 0));
    assert!(code == Code::Precondition && why.contains("layer 1 is being merged"), "{why}");
    bench.query(true);
    let stopped = bench.wait(|state| !state.running);
    assert!(!stopped.done && stopped.error.is_empty(), "{stopped:?}");
    begun(bench.begin(1, 4096));
    bench.query(true);
    // While it stops, another one waits for it.
    begun(bench.begin(1, 64 << 20));
    begun(bench.begin(1, 0));
    assert!(bench.wait(|state| !state.running).done);
}

#[test]
fn the_end_of_the_vm_ends_merges() {
    let bench = Bench::new();
    begun(bench.begin(1, 4096));
    bench.merges.abandon();
    let state = bench.query(false);
    assert!(!state.running && !state.done, "{state:?}");
}
