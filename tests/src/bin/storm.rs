//! `storm DEVICE RUN`: writes a disk from several threads until it is killed, and says what is safe. See `serio_tests::storm`.
//!
//! Past the page cache (O_DIRECT), so that what it says concerns the disk. One thread a lane; what a flush of one covers, it says for
//! all. A line is printed before the lane goes on, so the reader of the console is never far behind.
#![forbid(unsafe_code)]

use std::{
    fs::{File, OpenOptions},
    io::{self, Seek, SeekFrom, Write},
    os::unix::fs::{FileExt, OpenOptionsExt},
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use anyhow::{Context, ensure};
use nix::{
    fcntl::{FallocateFlags, OFlag, fallocate},
    sys::termios::tcdrain,
};
use serio_tests::storm::{Act, LANES, Plan, SECTOR, Step, UNIT, stamp};

/// Steps that a lane has done, lane by lane.
static DONE: [AtomicU64; LANES] = [const { AtomicU64::new(0) }; LANES];

struct Disk {
    plain: File,
    durable: File,
    sectors: u64,
    run: u64,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("storm: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [device, run] = args.as_slice() else { anyhow::bail!("usage: storm DEVICE RUN") };
    let open = |flags: OFlag| {
        let flags = (OFlag::O_DIRECT | flags).bits();
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(device)
            .context("cannot open the disk")
    };
    let (mut plain, durable) = (open(OFlag::empty())?, open(OFlag::O_DSYNC)?);
    let sectors = plain.seek(SeekFrom::End(0))? / SECTOR as u64;
    ensure!(sectors >= UNIT * LANES as u64, "{sectors} sectors are too few");
    let disk = Disk { plain, durable, sectors, run: run.parse().context("RUN must be a number")? };
    say(&format!("storm {} begins;", disk.run))?;
    thread::scope(|scope| -> anyhow::Result<()> {
        let lanes: Vec<_> = (0..LANES)
            .map(|lane| {
                scope.spawn({
                    let disk = &disk;
                    move || go(disk, lane)
                })
            })
            .collect();
        lanes.into_iter().try_for_each(|lane| lane.join().expect("a lane does not panic"))
    })
}

/// One lane, for ever.
fn go(disk: &Disk, lane: usize) -> anyhow::Result<()> {
    let room = UNIT as usize * SECTOR;
    let mut memory = vec![0; room + 4096];
    // O_DIRECT wants aligned memory.
    let start = memory.as_ptr().align_offset(4096);
    let buffer = &mut memory[start..start + room];
    for step in Plan::new(disk.run, lane, disk.sectors) {
        take(disk, lane, &step, buffer).with_context(|| format!("lane {lane}, {step:?}"))?;
        DONE[lane].store(step.index + 1, Ordering::SeqCst);
    }
    Ok(())
}

fn take(disk: &Disk, lane: usize, step: &Step, buffer: &mut [u8]) -> anyhow::Result<()> {
    let (at, length) = (step.first * SECTOR as u64, step.count * SECTOR as u64);
    match step.act {
        Act::Flush => {
            let done: Vec<String> = DONE.iter().map(|done| done.load(Ordering::SeqCst).to_string()).collect();
            disk.plain.sync_data()?;
            say(&format!("storm {} safe {};", disk.run, done.join(" ")))?;
        }
        Act::Zero => {
            let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(&disk.plain, mode, at.try_into()?, length.try_into()?)?;
        }
        Act::Write | Act::Durable => {
            let bytes = &mut buffer[..length as usize];
            for (sector, chunk) in (step.first..).zip(bytes.chunks_exact_mut(SECTOR)) {
                chunk.copy_from_slice(&stamp(sector, disk.run, step.index));
            }
            let file = if step.act == Act::Write { &disk.plain } else { &disk.durable };
            file.write_all_at(bytes, at)?;
            if step.act == Act::Durable {
                say(&format!("storm {} fua {lane} {};", disk.run, step.index))?;
            }
        }
    }
    Ok(())
}

/// Prints a line, whole, and returns when it has left the machine.
fn say(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes())?;
    // Not a terminal: nothing to wait for.
    let _ = tcdrain(&out);
    Ok(())
}
