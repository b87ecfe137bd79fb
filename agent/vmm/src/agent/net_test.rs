//! Cards of several queue pairs, with the mini guest on the machine's own `/dev/kvm` and a peer behind a tap.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use serio_control::Channel;
use serio_control::message::{Body, Empty, Launch, Nic, NicCounters, Plug, RestoreFrom, SaveVm};
use serio_hv::Tap;

use super::bench::echo::Echo;
use super::bench::{Bench, done};
use super::mini_test::Lines;
use super::save_test::beside;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

/// A tap that is up, as the files of its queues; it is gone with the last of them.
fn tap(queues: u16) -> Option<(String, Vec<File>)> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let name = format!("snt{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    let made = Tap::open(&name, queues).map(|taps| {
        let copies = taps.iter().map(|tap| tap.as_fd().try_clone_to_owned().map(File::from));
        copies.collect::<Result<Vec<_>, _>>().expect("descriptors")
    });
    let files = match made {
        Ok(files) => files,
        Err(error) => {
            println!("skipped: no tap can be made here ({error})");
            return None;
        }
    };
    let up = Command::new("ip").args(["link", "set", &name, "up"]).status();
    if !up.is_ok_and(|status| status.success()) {
        println!("skipped: `ip link` does not work here");
        return None;
    }
    Some((name, files))
}

/// A card on queues that are passed from the place `at` on.
fn nic(at: u32, queues: u32) -> Nic {
    Nic { mac: MAC.to_vec(), tap_fd: at, more_tap_fds: (at + 1..at + queues).collect(), ..Nic::default() }
}

/// Two vcpus and a card, whose queues come behind what every launch has.
fn with_card(launch: &mut Launch, queues: u32) {
    (launch.vcpus, launch.nics) = (2, vec![nic(5, queues)]);
}

fn counters(channel: &mut Channel) -> NicCounters {
    match channel.call(Body::CountersQuery(Empty {}), &[]).expect("answered") {
        Body::VmCounters(counters) => counters.nics.into_iter().next().expect("one card"),
        other => panic!("{other:?}"),
    }
}

fn save(bench: &Bench, channel: &mut Channel) {
    let (state, memory) = (bench.file("state"), bench.file("memory"));
    let request = SaveVm { state_fd: 0, memory_fd: 1, stay_paused: true, ..SaveVm::default() };
    let saved = channel.call(Body::SaveVm(request), &[state.as_fd(), memory.as_fd()]);
    assert!(matches!(saved, Ok(Body::SavedVm(_))), "{saved:?}");
}

/// Goes on where `source` was saved, with a card on these queues.
fn restore(bench: &Bench, source: &Bench, taps: &[File]) -> Result<Channel, String> {
    let queues = taps.len() as u32;
    let mut files: Vec<File> = taps.iter().map(|file| file.try_clone().expect("a descriptor")).collect();
    files.extend([source.file("state"), source.file("memory")]);
    let from = RestoreFrom { state_fd: 5 + queues, memory_fd: 6 + queues, ..RestoreFrom::default() };
    let set = |launch: &mut Launch| {
        (launch.memory_bytes, launch.restore) = (64 << 20, Some(from));
        with_card(launch, queues);
    };
    bench.launch_as_is(set, &files)
}

/// The queues of a tap that packets go to.
fn in_use(name: &str) -> usize {
    let queues = std::fs::read_dir(format!("/sys/class/net/{name}/queues")).expect("there");
    queues
        .filter(|entry| entry.as_ref().is_ok_and(|e| e.file_name().to_string_lossy().starts_with("rx-")))
        .count()
}

#[test]
fn a_guest_with_two_pairs_is_counted_and_goes_on_elsewhere_with_both() {
    let Some(bench) = Bench::mini() else { return };
    let Some((name, files)) = tap(2) else { return };
    let echo = Echo::on(&name);
    let mut channel = bench.launch_mini("mini.test=multiqueue", |launch| with_card(launch, 2), &files);
    let mut lines = Lines::of(&bench);
    lines.wait("multiqueue: 200 rounds of 2 pairs");
    let counted = counters(&mut channel);
    let (sent, received) = (counted.sent.expect("set"), counted.received.expect("set"));
    // Of one pair alone it would be half of that; the header does not count.
    assert!(sent.packets >= 400 && sent.bytes == 200 * sent.packets, "{sent:?}");
    assert!(received.packets >= 400, "{received:?}");
    // Paused and resumed it still has both.
    for _ in 0..10 {
        done(&mut channel, Body::Pause(Empty {}));
        done(&mut channel, Body::Resume(Empty {}));
    }
    lines.wait("multiqueue: ");
    save(&bench, &mut channel);
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();
    drop((echo, files));

    for (queues, words) in [(1, "saved with 2 queue pairs, and has 1 now"), (3, "and has 3 now")] {
        let Some((_, files)) = tap(queues) else { return };
        let next = beside(&bench);
        let said = restore(&next, &bench, &files).expect_err("refused");
        assert!(said.starts_with("nics: ") && said.contains("the card 02:00:00:00:00:07 was"), "{said}");
        assert!(said.contains(words), "{said}");
        next.agent_ended();
    }
    let Some((name, files)) = tap(2) else { return };
    let echo = Echo::on(&name);
    let next = beside(&bench);
    let mut channel = restore(&next, &bench, &files).expect("restored");
    let mut lines = Lines::of(&next);
    for _ in 0..3 {
        assert!(lines.wait("multiqueue: ").ends_with(" of 2 pairs"));
    }
    assert_eq!(in_use(&name), 2);
    done(&mut channel, Body::Stop(Empty {}));
    next.agent_ended();
    drop(echo);
}

/// Programs that knew of one pair only saved cards of one, whatever the vcpus.
#[test]
fn a_card_that_was_saved_with_one_pair_keeps_one() {
    let Some(bench) = Bench::mini() else { return };
    let Some((_, files)) = tap(1) else { return };
    let mut channel = bench.launch_mini("mini.test=heartbeat", |launch| with_card(launch, 1), &files);
    Lines::of(&bench).wait("heartbeat ");
    save(&bench, &mut channel);
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();
    let Some((name, files)) = tap(2) else { return };
    assert_eq!(in_use(&name), 2);
    let next = beside(&bench);
    let mut channel = restore(&next, &bench, &files).expect("restored");
    drop(files);
    Lines::of(&next).wait("heartbeat ");
    assert_eq!(in_use(&name), 1, "the host steers to none that nobody reads");
    done(&mut channel, Body::Stop(Empty {}));
    next.agent_ended();
}

#[test]
fn what_is_no_vhost_net_is_refused_and_so_are_too_few() {
    let cases = [(1, "1 of vhost-net for 2 queue pairs"), (2, "no vhost-net was passed")];
    for (vhosts, words) in cases {
        let Some(bench) = Bench::mini() else { return };
        let Some((_, mut files)) = tap(2) else { return };
        files.extend((0..vhosts).map(|_| File::open("/dev/null").expect("there")));
        let set = |launch: &mut Launch| {
            with_card(launch, 2);
            launch.nics[0].vhost_fds = (7..7 + vhosts).collect();
        };
        let said = bench.launch_with(&[&super::bench::guest::spin()], set, &files);
        let said = said.err().unwrap_or_default();
        assert!(said.starts_with("nics: ") && said.contains(words), "{said}");
        bench.agent_ended();
    }
}

#[test]
fn a_card_comes_with_its_pairs_and_has_not_too_many() {
    let Some(bench) = Bench::mini() else { return };
    let Some((_, files)) = tap(5) else { return };
    let said = bench.launch_with(&[&super::bench::guest::spin()], |launch| with_card(launch, 5), &files);
    let said = said.err().unwrap_or_default();
    assert!(said.starts_with("nics: ") && said.ends_with("a card has at most 4 queue pairs"), "{said}");
    bench.agent_ended();

    let Some(bench) = Bench::mini() else { return };
    let mut channel = bench.launch_mini("mini.test=plug", |launch| launch.vcpus = 2, &[]);
    let mut lines = Lines::of(&bench);
    lines.wait("plug: ready");
    let Some((name, files)) = tap(2) else { return };
    let request = Body::Plug(Plug { disk: None, nic: Some(nic(0, 2)), position: 0 });
    let fds: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
    assert!(matches!(channel.call(request, &fds), Ok(Body::Done(_))));
    drop(files);
    lines.wait("plug: device of type 1 came");
    assert_eq!(in_use(&name), 2);
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();
}
