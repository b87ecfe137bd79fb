//! One cell of `scripts/bench volume`: the engine at a depth, on a volume directory.
//!
//! `volume_bench DIR read|write|randread|randwrite BLOCK-BYTES DEPTH SECONDS` prints operations a second and
//! microseconds of processor time for each. `volume_bench DIR snapshot NAME` prints the milliseconds that it took.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a program for measurements")]

use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use serio_volume::{Access, Buffers, Op, VolumeDir};

struct Load {
    writes: bool,
    random: bool,
    block: u64,
    blocks: u64,
    at: u64,
    state: u64,
}

impl Load {
    fn offset(&mut self) -> u64 {
        if self.random {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            return self.state % self.blocks * self.block;
        }
        self.at = (self.at + 1) % self.blocks;
        self.at * self.block
    }

    fn op(&mut self, buffers: Buffers) -> Op {
        let offset = self.offset();
        match self.writes {
            true => Op::Write { offset, buffers, fua: false },
            false => Op::Read { offset, buffers },
        }
    }
}

fn cpu() -> Duration {
    let usage = getrusage(UsageWho::RUSAGE_SELF).unwrap();
    let micros = |t: nix::sys::time::TimeVal| t.tv_sec() as u64 * 1_000_000 + t.tv_usec() as u64;
    Duration::from_micros(micros(usage.user_time()) + micros(usage.system_time()))
}

fn run(dir: &VolumeDir, kind: &str, block: u64, depth: u16, seconds: u64) {
    let volume = dir.open(Access::ReadWrite).unwrap();
    let mut queue = volume.queue(depth).unwrap();
    let (writes, random) = (kind.ends_with("write"), kind.starts_with("rand"));
    let blocks = volume.size_bytes() / block;
    let mut load = Load { writes, random, block, blocks, at: 0, state: 0x9e37_79b9_7f4a_7c15 };
    let mut idle: Vec<Buffers> = (0..depth).map(|_| Buffers::owned(block as usize)).collect();
    let (start, before) = (Instant::now(), cpu());
    let (mut done, mut going) = (0u64, true);
    while going || queue.in_use() > 0 {
        if going {
            for buffers in idle.drain(..) {
                queue.submit(0, load.op(buffers)).unwrap();
            }
            queue.kick();
        }
        queue.wait();
        queue.reap(|_, result, buffers| {
            result.unwrap();
            done += 1;
            idle.push(buffers);
        });
        going = start.elapsed() < Duration::from_secs(seconds);
    }
    let (elapsed, used) = (start.elapsed().as_secs_f64(), (cpu() - before).as_secs_f64());
    println!("{:.0} {:.3}", done as f64 / elapsed, used * 1e6 / done as f64);
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        [dir, "snapshot", name] => {
            let dir = VolumeDir::new(dir);
            let volume = dir.open(Access::ReadWrite).unwrap();
            let start = Instant::now();
            dir.snapshot(&volume, name).unwrap();
            println!("{:.3}", start.elapsed().as_secs_f64() * 1e3);
        }
        [dir, kind, block, depth, seconds] => {
            let (block, depth, seconds) =
                (block.parse().unwrap(), depth.parse().unwrap(), seconds.parse().unwrap());
            run(&VolumeDir::new(dir), kind, block, depth, seconds);
        }
        _ => panic!("usage: see the head of this example"),
    }
}
