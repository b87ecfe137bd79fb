//! What a VM that runs has counted, with the mini guest on the machine's own `/dev/kvm`.

use serio_control::Channel;
use serio_control::message::{Body, Empty, Launch, OpCounters, VmCounters};

use super::bench::{Bench, done};
use super::mini_test::{Lines, with_volumes};

fn counters(channel: &mut Channel) -> VmCounters {
    match channel.call(Body::CountersQuery(Empty {}), &[]).expect("answered") {
        Body::VmCounters(counters) => counters,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_a_guest_does_is_counted_and_only_grows() {
    let Some(bench) = Bench::mini() else { return };
    let (disks, files) = with_volumes(&bench, &["a", "b"]);
    let mut channel = bench.launch_mini("mini.test=pair", |launch: &mut Launch| launch.disks = disks, &files);
    let mut lines = Lines::of(&bench);
    lines.wait("pair: ");
    let before = counters(&mut channel);
    lines.wait("pair: ");
    let after = counters(&mut channel);
    assert_eq!((after.vcpus.len(), after.nics.len(), after.failed.len()), (1, 0, 0), "{after:?}");
    assert!(after.vcpus[0].port_writes > 0 && after.vcpus[0].memory_writes > 0, "{after:?}");
    assert_eq!(after.disks.iter().map(|disk| disk.volume_id.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    for (before, after) in before.disks.iter().zip(&after.disks) {
        let of = |op: &Option<OpCounters>| op.clone().expect("set");
        let (first, second) = (of(&before.writes), of(&after.writes));
        // A round writes each disk once; 200 rounds a line.
        assert!(
            second.done >= first.done + 100 && second.bytes == second.done * 4096,
            "{first:?} {second:?}"
        );
        assert_eq!(second.buckets.iter().sum::<u64>(), second.done, "each has its time");
        assert!(second.sum_us > 0 && second.errors == 0 && after.refused == 0, "{after:?}");
    }
    // Paused it can be asked too.
    done(&mut channel, Body::Pause(Empty {}));
    assert!(counters(&mut channel).vcpus[0].kicks > 0);
    done(&mut channel, Body::Stop(Empty {}));
    bench.agent_ended();
}
