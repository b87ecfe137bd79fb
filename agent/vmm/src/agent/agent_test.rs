//! The agent as `seriod` uses it, and as nobody should: the whole of it behind a socket, with guests of a few bytes.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serio_control::ChannelError;
use serio_control::message::{
    Body, Disk, Empty, EndKind, Launch, LayerFds, OnReset, SnapshotVolume, VmState,
};

use super::bench::{Bench, EXIT, done, guest, status, wait_end};

#[test]
fn a_vm_runs_and_leaves_its_log_and_its_reason() {
    let Some(bench) = Bench::new() else { return };
    let mut channel = bench.launch(&[&guest::print("hello\n"), &guest::power_off()]);
    let end = wait_end(&mut channel).end.expect("ended");
    assert_eq!(end.kind, i32::from(EndKind::PowerOff));
    let (record, log) = bench.finish();
    assert_eq!((record, log.as_str()), (end, "hello\n"));
}

#[test]
fn clients_of_the_console_see_and_type() {
    let Some(bench) = Bench::new() else { return };
    let mut channel = bench.launch(&[&guest::echo(&guest::power_off())]);
    assert_eq!(status(&mut channel).state, i32::from(VmState::Running));
    let mut clients: Vec<UnixStream> =
        (0..3).map(|_| UnixStream::connect(bench.path("console")).expect("listens")).collect();
    for (at, letter) in [(0, b'a'), (1, b'b')] {
        clients[at].write_all(&[letter]).expect("typed");
        // Who connected first was surely accepted before its letter came back; it sees all letters.
        let mut seen = [0];
        clients[0].read_exact(&mut seen).expect("echoed");
        assert_eq!(seen, [letter]);
    }
    drop(clients.remove(1));
    clients[0].write_all(b"q").expect("typed");
    let mut rest = Vec::new();
    clients[0].read_to_end(&mut rest).expect("until the end");
    assert_eq!(rest, b"q");
    wait_end(&mut channel);
    assert_eq!(bench.finish().1, "abq");
}

#[test]
fn garbage_and_vanishing_peers_cost_only_their_connection() {
    let Some(bench) = Bench::new() else { return };
    // Before and after the launch alike.
    let abuse = |bench: &Bench| {
        let raw = || UnixStream::connect(bench.path("control")).expect("listens");
        raw().write_all(&[0xff; 4096]).expect("sent");
        raw().write_all(&[3, 0, 0, 0, 1, 2, 3]).expect("sent");
        raw().write_all(&[200, 0]).expect("half a frame, then gone");
        drop(raw());
        // There is a bound on connections, and those just closed count until their threads have noticed.
        let mut client = loop {
            let mut client = bench.connect();
            match client.call(Body::Export(Default::default()), &[]) {
                Err(ChannelError::Refused(_)) => break client,
                Err(ChannelError::Closed | ChannelError::Io { .. }) => std::thread::yield_now(),
                other => panic!("{other:?}"),
            }
        };
        status(&mut client);
    };
    abuse(&bench);
    let mut channel = bench.launch(&[&guest::print("up"), &guest::spin()]);
    for _ in 0..5 {
        abuse(&bench);
    }
    // A slow peer holds its own connection only.
    let mut slow = UnixStream::connect(bench.path("control")).expect("listens");
    slow.write_all(&[16]).expect("a byte of a frame");
    assert_eq!(status(&mut channel).state, i32::from(VmState::Running));
    done(&mut channel, Body::Stop(Empty {}));
    let end = wait_end(&mut channel).end.expect("ended");
    assert_eq!(end.kind, i32::from(EndKind::Stopped));
    bench.finish();
}

#[test]
fn a_client_may_go_and_another_come() {
    let Some(bench) = Bench::new() else { return };
    drop(bench.launch(&[&guest::spin()]));
    let mut channel = bench.connect();
    let now = status(&mut channel);
    assert_eq!((now.vm_id.as_str(), now.state), ("7d3c", i32::from(VmState::Running)));
    assert!(now.uptime_ns > 0);
    let again = channel.call(Body::Launch(Bench::request()), &[]);
    assert!(matches!(again, Err(ChannelError::Refused(_))), "a VM is launched once");
    done(&mut channel, Body::Stop(Empty {}));
    bench.finish();
}

#[test]
fn pausing_stops_the_vcpus() {
    let Some(bench) = Bench::new() else { return };
    let mut channel = bench.launch(&[&guest::echo(&guest::power_off())]);
    done(&mut channel, Body::Pause(Empty {}));
    assert_eq!(status(&mut channel).state, i32::from(VmState::Paused));
    let mut console = UnixStream::connect(bench.path("console")).expect("listens");
    console.write_all(b"x").expect("typed");
    console.set_read_timeout(Some(Duration::from_millis(100))).expect("set");
    assert!(console.read(&mut [0]).is_err(), "nothing comes back from a paused VM");
    done(&mut channel, Body::Resume(Empty {}));
    console.set_read_timeout(Some(Duration::from_secs(30))).expect("set");
    console.read_exact(&mut [0]).expect("now it does");
    done(&mut channel, Body::Pause(Empty {}));
    done(&mut channel, Body::Stop(Empty {}));
    assert_eq!(bench.finish().0.kind, i32::from(EndKind::Stopped));
}

#[test]
fn resets_boot_again_or_end_as_the_policy_says() {
    let Some(bench) = Bench::new() else { return };
    let code = [&guest::echo(&guest::reset())[..]];
    let mut channel = bench.launch(&code);
    let mut console = UnixStream::connect(bench.path("console")).expect("listens");
    let mut echo = |letters: &[u8]| {
        console.write_all(letters).expect("typed");
        console.read_exact(&mut vec![0; letters.len()]).expect("echoed");
    };
    echo(b"q");
    while status(&mut channel).resets < 1 {
        channel.receive().expect("told of the change");
    }
    echo(b"still");
    done(&mut channel, Body::Reset(Empty {}));
    while status(&mut channel).resets < 2 {
        channel.receive().expect("told of the change");
    }
    echo(b"here");
    done(&mut channel, Body::Stop(Empty {}));
    bench.finish();

    let Some(bench) = Bench::new() else { return };
    let code = [&guest::print("once\n")[..], &guest::reset()];
    let mut channel = bench.launch_with(&code, |l| l.on_reset = OnReset::End.into(), &[]).expect("launched");
    wait_end(&mut channel);
    let (record, log) = bench.finish();
    assert_eq!((record.kind, log.as_str()), (i32::from(EndKind::Reset), "once\n"));
}

#[test]
fn what_cannot_be_launched_says_why_and_leaves_a_record() {
    type Change = fn(&mut Launch);
    let wrong: [(&str, Change); 8] = [
        ("vcpus", |l| l.vcpus = 0),
        ("vcpus", |l| l.vcpus = 1000),
        ("memory", |l| l.memory_bytes = 1 << 50),
        ("memory", |l| l.memory_bytes = (16 << 20) + 1),
        ("cmdline", |l| l.cmdline = "x".repeat(5000)),
        ("kernel", |l| l.kernel_fd = 99),
        ("disks", |l| {
            l.disks = vec![Disk { layers: vec![LayerFds { data_fd: EXIT, map_fd: None }], ..Disk::default() }]
        }),
        ("on_reset", |l| l.on_reset = 9),
    ];
    for (field, change) in wrong {
        let Some(bench) = Bench::new() else { return };
        let said = bench.launch_with(&[&guest::power_off()], change, &[]).expect_err("refused");
        assert!(said.starts_with(field), "{field}: {said}");
        let (record, _) = bench.finish();
        assert_eq!(record.kind, i32::from(EndKind::LaunchFailed), "{field}: {}", record.reason);
    }
}

#[test]
fn a_disk_in_use_is_refused_and_one_of_its_own_is_snapshotted_by_name() {
    let Some(bench) = Bench::new() else { return };
    let disk = bench.file("disk.raw");
    disk.set_len(1 << 20).expect("sized");
    let add = |launch: &mut Launch| {
        let layers = vec![LayerFds { data_fd: 5, map_fd: None }];
        launch.disks = vec![Disk { volume_id: "root".into(), layers, ..Disk::default() }];
    };
    let mut channel = bench.launch_with(&[&guest::spin()], add, &[bench.file("disk.raw")]).expect("launched");

    let Some(second) = Bench::new() else { return };
    let said = second.launch_with(&[&guest::spin()], add, &[bench.file("disk.raw")]).expect_err("in use");
    assert!(said.starts_with("disks") && said.contains("in use"), "{said}");
    second.finish();

    let (data, map) = (bench.file("1.data"), bench.file("1.map"));
    for (volume_id, words) in [("root", "raw file"), ("other", "no volume")] {
        let snapshot =
            SnapshotVolume { volume_id: volume_id.into(), snapshot: "s".into(), data_fd: 0, map_fd: 1 };
        match channel.call(Body::SnapshotVolume(snapshot), &[data.as_fd(), map.as_fd()]) {
            Err(ChannelError::Refused(failed)) => {
                assert!(failed.message.contains(words), "{}", failed.message)
            }
            other => panic!("{other:?}"),
        }
    }
    done(&mut channel, Body::Stop(Empty {}));
    bench.finish();
}
