//! What encryption costs: the same work on a plain and on an encrypted volume, in turn, through the engine's own queue.
//!
//! `cargo run --release -p serio-volume --example encryption -- DIR [ROUNDS [direct]]`
//! DIR is on the disk to be measured; `direct`: past the page cache. Prints rows `case<TAB>subject<TAB>MB/s<TAB>ns of processor a
//! KiB`, the median of the rounds, and `case<TAB>pairs<TAB>ratio<TAB>ratio`: what encryption costs in time and processor, the
//! median of the ratios of neighbours.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    fcntl::{PosixFadviseAdvice, posix_fadvise},
    sys::resource::{UsageWho, getrusage},
};
use serio_volume::{Access, Buffers, IoQueue, Op, VdcSecret, Volume, VolumeDir};

const SIZE: u64 = 512 << 20;
/// What a case moves; a random one an eighth of it.
const WORK: u64 = SIZE;

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    block: u64,
    depth: u16,
    write: bool,
    random: bool,
    /// Read from the disk, not from memory.
    cold: bool,
}

const CASES: [Case; 5] = [
    Case {
        name: "write 256 KiB, depth 8, then flush",
        block: 256 << 10,
        depth: 8,
        write: true,
        random: false,
        cold: false,
    },
    Case {
        name: "read 256 KiB, depth 8, from disk",
        block: 256 << 10,
        depth: 8,
        write: false,
        random: false,
        cold: true,
    },
    Case {
        name: "read 256 KiB, depth 8, from memory",
        block: 256 << 10,
        depth: 8,
        write: false,
        random: false,
        cold: false,
    },
    Case {
        name: "write 4 KiB, depth 32, random, then flush",
        block: 4 << 10,
        depth: 32,
        write: true,
        random: true,
        cold: false,
    },
    Case {
        name: "read 4 KiB, depth 32, random, from disk",
        block: 4 << 10,
        depth: 32,
        write: false,
        random: true,
        cold: true,
    },
];

fn work(case: Case) -> u64 {
    if case.random { WORK / 8 } else { WORK }
}

fn processor() -> Duration {
    let used = getrusage(UsageWho::RUSAGE_SELF).expect("getrusage");
    [used.user_time(), used.system_time()]
        .iter()
        .map(|t| Duration::new(t.tv_sec().unsigned_abs(), t.tv_usec().unsigned_abs() as u32 * 1000))
        .sum()
}

fn reap(queue: &mut IoQueue, idle: &mut Vec<Buffers>) {
    queue.kick();
    queue.wait();
    queue.reap(|_, result, buffers| {
        result.expect("operation");
        idle.push(buffers);
    });
}

fn run(volume: &Volume, case: Case) -> (f64, f64) {
    let mut queue = volume.queue(case.depth).expect("queue");
    let filled = || {
        let mut buffers = Buffers::owned(case.block as usize);
        buffers.as_mut_slice().expect("owned").fill(0x5e);
        buffers
    };
    let mut idle: Vec<_> = (0..case.depth).map(|_| filled()).collect();
    let (count, slots) = (work(case) / case.block, SIZE / case.block);
    let (start, before) = (Instant::now(), processor());
    for i in 0..count {
        while idle.is_empty() {
            reap(&mut queue, &mut idle);
        }
        let buffers = idle.pop().expect("there is one now");
        // A full period over all slots, without a table.
        let slot = if case.random { i.wrapping_mul(2_654_435_761) % slots } else { i % slots };
        let offset = slot * case.block;
        let op =
            if case.write { Op::Write { offset, buffers, fua: false } } else { Op::Read { offset, buffers } };
        queue.submit(i, op).expect("room");
    }
    while queue.in_use() > 0 {
        reap(&mut queue, &mut idle);
    }
    if case.write {
        queue.run(Op::Flush).0.expect("flush");
    }
    let (took, used) = (start.elapsed(), processor() - before);
    let bytes = (count * case.block) as f64;
    (bytes / 1e6 / took.as_secs_f64(), used.as_nanos() as f64 / (bytes / 1024.0))
}

/// Has the files out of the page cache.
fn forget(dir: &Path) {
    for entry in std::fs::read_dir(dir).expect("list") {
        let file = std::fs::File::open(entry.expect("entry").path()).expect("open");
        file.sync_all().expect("sync");
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).expect("fadvise");
    }
}

/// Both, in this order.
fn pick<T>([first, second]: &mut [T; 2], turn: [usize; 2]) -> [&mut T; 2] {
    if turn[0] == 0 { [first, second] } else { [second, first] }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let dir = arguments.next().expect("usage: encryption DIR [ROUNDS]");
    let rounds: usize = arguments.next().map_or(3, |n| n.parse().expect("ROUNDS is a number"));
    let direct = arguments.next().is_some_and(|word| word == "direct");
    let plain = VolumeDir::new(Path::new(&dir).join("plain")).with_direct(direct);
    let key = VdcSecret::generate().expect("random bytes");
    let encrypted = VolumeDir::new(Path::new(&dir).join("encrypted")).with_key(key).with_direct(direct);
    let subjects = [("plain", plain), ("encrypted", encrypted)];
    let fill = Case { name: "", block: 1 << 20, depth: 8, write: true, random: false, cold: false };
    for (_, dir) in &subjects {
        dir.create(SIZE).expect("create");
        let volume = dir.open(Access::ReadWrite).expect("open");
        // A layer below, as in every encrypted volume, so that only encryption differs.
        if volume.layer_count() == 1 {
            dir.snapshot(&volume, "bottom").expect("snapshot");
        }
        assert!(!direct || volume.go_direct().is_ok(), "there is no O_DIRECT in {}", dir.path().display());
        run(&volume, fill);
    }
    for case in CASES.into_iter().filter(|case| !direct || case.cold || case.write) {
        let mut found = [Vec::new(), Vec::new()];
        for round in 0..rounds {
            // Each is as often the first as the second.
            let turn = [round % 2, 1 - round % 2];
            for ((_, dir), found) in turn.map(|i| &subjects[i]).into_iter().zip(pick(&mut found, turn)) {
                let volume = dir.open(Access::ReadWrite).expect("open");
                if case.cold {
                    forget(dir.path());
                } else if !case.write {
                    run(&volume, case);
                }
                found.push(run(&volume, case));
            }
        }
        let pairs = found[0].iter().zip(&found[1]);
        let (times, costs) =
            pairs.map(|(plain, encrypted)| (plain.0 / encrypted.0, encrypted.1 / plain.1)).unzip();
        println!("{}\tpairs\t{:.3}\t{:.3}", case.name, median(times), median(costs));
        for ((name, _), found) in subjects.iter().zip(found) {
            let (rates, costs) = found.into_iter().unzip();
            println!("{}\t{name}\t{:.0}\t{:.0}", case.name, median(rates), median(costs));
        }
    }
}
