//! Disks that come and go, with the mini guest on the machine's own `/dev/kvm`: what the guest sees, resets, saved states, and
//! guests that do not let go.

use std::fs::File;
use std::os::fd::AsFd;

use serio_control::message::{
    Body, Code, Disk, Empty, Failed, Launch, LayerFds, Plug, RestoreFrom, SaveVm, Unplug,
};
use serio_control::{Channel, ChannelError};
use serio_volume::{Access, LayerFiles, Volume, VolumeFiles, create_layer};

use super::bench::{Bench, done, status};
use super::mini_test::{Lines, with_volumes};

const SIZE: u64 = 8 << 20;

fn files(bench: &Bench, name: &str) -> LayerFiles {
    LayerFiles { data: bench.file(&format!("{name}0.data")), map: bench.file(&format!("{name}0.map")) }
}

fn make(bench: &Bench, name: &str) {
    create_layer(&files(bench, name), SIZE, [7; 16], false).expect("created");
}

fn plug(bench: &Bench, channel: &mut Channel, name: &str, position: u32) -> Result<(), Failed> {
    let LayerFiles { data, map } = files(bench, name);
    let layers = vec![LayerFds { data_fd: 0, map_fd: Some(1) }];
    let disk = Some(Disk { volume_id: name.to_owned(), layers, ..Disk::default() });
    answer(channel.call(Body::Plug(Plug { disk, nic: None, position }), &[data.as_fd(), map.as_fd()]))
}

fn unplug(channel: &mut Channel, name: &str, wait_ms: u32) -> Result<(), Failed> {
    let request = Unplug { volume_id: name.to_owned(), mac: Vec::new(), wait_ms };
    answer(channel.call(Body::Unplug(request), &[]))
}

fn answer(answer: Result<Body, ChannelError>) -> Result<(), Failed> {
    match answer {
        Ok(Body::Done(_)) => Ok(()),
        Err(ChannelError::Refused(failed)) => Err(failed),
        other => panic!("{other:?}"),
    }
}

/// Whether nobody has it open.
fn is_free(bench: &Bench, name: &str) -> bool {
    Volume::open(VolumeFiles { layers: vec![files(bench, name)] }, Access::ReadWrite).is_ok()
}

fn begin(bench: &Bench, cmdline: &str) -> (Channel, Lines) {
    let (disks, files) = with_volumes(bench, &["a", "seed"]);
    let channel = bench.launch_mini(cmdline, |launch: &mut Launch| launch.disks = disks, &files);
    let mut lines = Lines::of(bench);
    assert!(lines.wait("plug: ready with ").starts_with("2 disks"));
    (channel, lines)
}

#[test]
fn a_disk_comes_works_over_a_reset_and_goes() {
    let Some(bench) = Bench::mini() else { return };
    let (mut channel, mut lines) = begin(&bench, "mini.test=plug");
    make(&bench, "b");
    plug(&bench, &mut channel, "b", 1).expect("plugged");
    let came = lines.wait("plug: disk of ");
    let slot = came.strip_prefix("16384 sectors came to ").expect(&came).to_owned();
    assert_eq!(status(&mut channel).disks, ["a", "b", "seed"]);
    assert!(!is_free(&bench, "b"), "its lock is the guest's");
    plug(&bench, &mut channel, "b", 1).expect("twice is once");

    done(&mut channel, Body::Reset(Empty {}));
    assert!(lines.wait("plug: ready with ").starts_with("3 disks"), "a reset keeps it");
    assert_eq!(status(&mut channel).disks, ["a", "b", "seed"]);

    unplug(&mut channel, "b", 30_000).expect("unplugged");
    // At the place where it was before the reset.
    lines.wait(&format!("plug: {slot} shall go"));
    lines.wait(&format!("plug: {slot} is gone"));
    assert_eq!(status(&mut channel).disks, ["a", "seed"]);
    assert!(is_free(&bench, "b"), "closed, and its lock is free");
    unplug(&mut channel, "b", 30_000).expect("twice is once");
    lines.wait("plug: 2 disks work");

    // The place and the name can be had again.
    plug(&bench, &mut channel, "b", 1).expect("plugged again");
    assert!(lines.wait("plug: disk of ").ends_with(&format!(" came to {slot}")));
    lines.wait("plug: 3 disks work");
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();
}

#[test]
fn a_guest_that_does_not_let_go_keeps_its_disk() {
    let Some(bench) = Bench::mini() else { return };
    let (mut channel, mut lines) = begin(&bench, "mini.test=plug mini.plug=keep");
    make(&bench, "b");
    plug(&bench, &mut channel, "b", 2).expect("plugged");
    lines.wait("plug: disk of ");
    let refused = unplug(&mut channel, "b", 300).expect_err("kept");
    assert_eq!(refused.code, i32::from(Code::Precondition));
    assert!(refused.message.contains("did not let go"), "{}", refused.message);
    lines.wait("plug: 3 disks work");
    assert_eq!(status(&mut channel).disks, ["a", "seed", "b"]);

    // What cannot be opened, or not now, changes nothing.
    std::fs::write(bench.path("c0.map"), b"damaged").expect("written");
    assert!(plug(&bench, &mut channel, "c", 2).is_err());
    done(&mut channel, Body::Pause(Empty {}));
    make(&bench, "d");
    assert!(plug(&bench, &mut channel, "d", 2).expect_err("refused").message.contains("paused"));
    assert!(unplug(&mut channel, "b", 300).expect_err("refused").message.contains("paused"));
    done(&mut channel, Body::Resume(Empty {}));
    lines.wait("plug: 3 disks work");
    assert_eq!(status(&mut channel).disks, ["a", "seed", "b"]);
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();
}

#[test]
fn the_bus_fills_up_and_says_so() {
    let Some(bench) = Bench::mini() else { return };
    let (mut channel, mut lines) = begin(&bench, "mini.test=plug");
    let mut refused = None;
    for number in 0..32 {
        let name = format!("v{number}");
        make(&bench, &name);
        if let Err(failed) = plug(&bench, &mut channel, &name, 1) {
            assert!(is_free(&bench, &name), "what was refused is closed");
            refused = Some((number, failed));
            break;
        }
        lines.wait("plug: disk of ");
    }
    let (number, failed) = refused.expect("31 devices at most");
    assert_eq!(failed.code, i32::from(Code::Exhausted), "{failed:?}");
    // Two disks, rng, ports and balloon were there.
    assert_eq!(number, 26);
    unplug(&mut channel, "v3", 30_000).expect("unplugged");
    plug(&bench, &mut channel, &format!("v{number}"), 1).expect("there is room again");
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();
}

#[test]
fn a_vm_saved_with_a_disk_that_came_goes_on_with_it() {
    let Some(bench) = Bench::mini() else { return };
    let (mut channel, mut lines) = begin(&bench, "mini.test=plug");
    for name in ["b", "c"] {
        make(&bench, name);
        plug(&bench, &mut channel, name, 1).expect("plugged");
        lines.wait("plug: disk of ");
    }
    // A gap before the disk that stays.
    unplug(&mut channel, "b", 30_000).expect("unplugged");
    lines.wait("plug: 3 disks work");
    let (state, memory) = (bench.file("state"), bench.file("memory"));
    let request = SaveVm { state_fd: 0, memory_fd: 1, stay_paused: true, ..SaveVm::default() };
    let saved = channel.call(Body::SaveVm(request), &[state.as_fd(), memory.as_fd()]);
    assert!(matches!(saved, Ok(Body::SavedVm(_))), "{saved:?}");
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();

    let next = Bench::new().expect("as before");
    std::fs::copy(bench.path("kernel"), next.path("kernel")).expect("copied");
    let mut passed: Vec<File> = Vec::new();
    let mut disks = Vec::new();
    for (at, name) in (0u32..).zip(["a", "c", "seed"]) {
        let LayerFiles { data, map } = files(&bench, name);
        passed.extend([data, map]);
        let layers = vec![LayerFds { data_fd: 5 + 2 * at, map_fd: Some(6 + 2 * at) }];
        disks.push(Disk { volume_id: name.to_owned(), layers, ..Disk::default() });
    }
    passed.extend([bench.file("state"), bench.file("memory")]);
    let from = RestoreFrom { state_fd: 11, memory_fd: 12, ..RestoreFrom::default() };
    let set = |launch: &mut Launch| {
        (launch.vcpus, launch.memory_bytes, launch.restore) = (1, 64 << 20, Some(from));
        launch.disks = disks;
    };
    let mut channel = next.launch_as_is(set, &passed).expect("restored");
    let mut lines = Lines::of(&next);
    lines.wait("plug: 3 disks work");
    unplug(&mut channel, "c", 30_000).expect("unplugged");
    lines.wait("plug: 2 disks work");
    done(&mut channel, Body::Stop(Empty {}));
    next.agent_ended();
}
