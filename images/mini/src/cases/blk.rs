//! virtio-blk, on every disk that is there. They are overwritten.

use crate::blk::{self, Disk, feature, kind, pattern};
use crate::mem::Dma;
use crate::suite::{Case, Failure, Machine, Outcome};
use crate::virtio::Segment;
use crate::{ensure, skip};
use alloc::format;
use alloc::vec::Vec;

pub const CASES: &[Case] = &[
    Case { group: "blk", name: "capacity", run: capacity },
    Case { group: "blk", name: "identify", run: identify },
    Case { group: "blk", name: "write-read", run: write_read },
    Case { group: "blk", name: "segments", run: segments },
    Case { group: "blk", name: "ends", run: ends },
    Case { group: "blk", name: "out-of-range", run: out_of_range },
    Case { group: "blk", name: "unknown-request", run: unknown_request },
    Case { group: "blk", name: "flush", run: flush },
    Case { group: "blk", name: "readonly", run: readonly },
    Case { group: "blk", name: "distinct", run: distinct },
    Case { group: "blk", name: "multi-queue", run: multi_queue },
    Case { group: "blk", name: "depth", run: depth },
    Case { group: "blk", name: "discard", run: discard },
    Case { group: "blk", name: "write-zeroes", run: write_zeroes },
    Case { group: "blk", name: "high-memory", run: high_memory },
    Case { group: "blk", name: "mark", run: mark },
];

/// Runs a check on each disk; skipped if all of them skip.
fn each(machine: &mut Machine, check: impl Fn(u64, &mut Disk) -> Outcome) -> Outcome {
    let functions = machine.bus()?.virtio(2);
    let mut skipped = Some(Failure::Skipped("no virtio-blk".into()));
    for (index, function) in functions.into_iter().enumerate() {
        let mut disk = Disk::open(function, 128)?;
        let outcome = check(index as u64, &mut disk);
        disk.device.reset()?;
        match outcome {
            Ok(()) => skipped = None,
            Err(Failure::Failed(reason)) => return Err(Failure::Failed(format!("disk {index}: {reason}"))),
            Err(why) if skipped.is_some() => skipped = Some(why),
            Err(_) => {}
        }
    }
    skipped.map_or(Ok(()), Err)
}

/// The same for disks that can be written.
fn each_writable(machine: &mut Machine, check: impl Fn(u64, &mut Disk) -> Outcome) -> Outcome {
    each(machine, |index, disk| {
        if disk.read_only() {
            skip!("every disk is read-only");
        }
        check(index, disk)
    })
}

fn capacity(machine: &mut Machine) -> Outcome {
    let wanted = machine.boot.number("mini.disk_sectors");
    each(machine, |_, disk| {
        ensure!(disk.sectors >= 256, "{} sectors", disk.sectors);
        ensure!(disk.features & feature::FLUSH != 0, "flush is not offered");
        if let Some(wanted) = wanted {
            ensure!(disk.sectors == wanted, "{} sectors, the command line says {wanted}", disk.sectors);
        }
        Ok(())
    })
}

fn identify(machine: &mut Machine) -> Outcome {
    each(machine, |_, disk| {
        let id = Dma::new(20);
        Ok(disk.expect(kind::GET_ID, 0, &[Segment::into(id)])?)
    })
}

fn write_read(machine: &mut Machine) -> Outcome {
    each_writable(machine, |index, disk| {
        let (out, back) = (Dma::new(64 << 10), Dma::new(64 << 10));
        for (sector, len) in
            [(0, 512), (1, 512), (3, 1024), (8, 4096), (9, 4096), (16, 64 << 10), (127, 8192)]
        {
            let (out, back) = (out.part(0, len), back.part(0, len));
            pattern(out, index, sector, 1);
            back.fill(0xcc);
            disk.write(sector, out)?;
            disk.read(sector, back)?;
            let wrong = out.first_difference(&back);
            ensure!(wrong.is_none(), "sector {sector}, {len} bytes: differs at {wrong:?}");
        }
        Ok(())
    })
}

fn segments(machine: &mut Machine) -> Outcome {
    each_writable(machine, |index, disk| {
        let (out, back) = (Dma::new(8192), Dma::new(8192));
        pattern(out, index, 64, 2);
        // Odd sizes and addresses: a request is a byte string, however it is cut.
        let cuts = [0u64, 1, 512, 513, 1500, 4095, 4096, 8191, 8192];
        let parts = |whole: &Dma, make: fn(Dma) -> Segment| -> Vec<Segment> {
            cuts.windows(2).map(|cut| make(whole.part(cut[0], cut[1] - cut[0]))).collect()
        };
        disk.expect(kind::OUT, 64, &parts(&out, Segment::out))?;
        disk.read(64, back)?;
        ensure!(
            out.first_difference(&back).is_none(),
            "written in parts, read whole: {:?}",
            out.first_difference(&back)
        );
        back.fill(0);
        disk.expect(kind::IN, 64, &parts(&back, Segment::into))?;
        ensure!(out.first_difference(&back).is_none(), "read in parts: {:?}", out.first_difference(&back));
        Ok(())
    })
}

fn ends(machine: &mut Machine) -> Outcome {
    each_writable(machine, |index, disk| {
        let (out, back) = (Dma::new(4096), Dma::new(4096));
        for sector in [0, disk.sectors - 8] {
            pattern(out, index, sector, 3);
            disk.write(sector, out)?;
            disk.read(sector, back)?;
            ensure!(out.first_difference(&back).is_none(), "sector {sector}");
        }
        Ok(())
    })
}

fn out_of_range(machine: &mut Machine) -> Outcome {
    each(machine, |_, disk| {
        let data = Dma::new(4096);
        let end = disk.sectors;
        for sector in [end, end - 7, end + 1, 1 << 55, u64::MAX >> 9, u64::MAX - 7, u64::MAX] {
            let status = disk.request(0, kind::IN, sector, &[Segment::into(data)])?;
            ensure!(status == blk::IO_ERROR, "read at sector {sector} of {end}: status {status}");
            let status = disk.request(0, kind::OUT, sector, &[Segment::out(data)])?;
            ensure!(status == blk::IO_ERROR, "write at sector {sector} of {end}: status {status}");
        }
        Ok(disk.read(0, data)?)
    })
}

fn unknown_request(machine: &mut Machine) -> Outcome {
    each(machine, |_, disk| {
        let status = disk.request(0, 0x5e10, 0, &[Segment::into(Dma::new(512))])?;
        ensure!(status == blk::UNSUPPORTED, "status {status}");
        Ok(())
    })
}

fn flush(machine: &mut Machine) -> Outcome {
    each_writable(machine, |index, disk| {
        let out = Dma::new(4096);
        for round in 0..4 {
            pattern(out, index, round * 8, 4);
            disk.write(round * 8, out)?;
            disk.flush()?;
        }
        Ok(())
    })
}

fn readonly(machine: &mut Machine) -> Outcome {
    each(machine, |_, disk| {
        if !disk.read_only() {
            skip!("no disk is read-only");
        }
        let (before, after) = (Dma::new(4096), Dma::new(4096));
        disk.read(0, before)?;
        let status = disk.request(0, kind::OUT, 0, &[Segment::out(Dma::new(4096))])?;
        ensure!(status != blk::OK, "a write was taken");
        disk.read(0, after)?;
        ensure!(before.first_difference(&after).is_none(), "a refused write changed the disk");
        Ok(())
    })
}

/// Each disk keeps its own data: written on all, then read from all.
fn distinct(machine: &mut Machine) -> Outcome {
    if machine.bus()?.virtio(2).len() < 2 {
        skip!("fewer than two disks");
    }
    let (out, back) = (Dma::new(4096), Dma::new(4096));
    each_writable(machine, |index, disk| {
        pattern(out, index, 40, 5);
        Ok(disk.write(40, out)?)
    })?;
    each_writable(machine, |index, disk| {
        pattern(out, index, 40, 5);
        disk.read(40, back)?;
        ensure!(out.first_difference(&back).is_none(), "it has another disk's data");
        Ok(())
    })
}

fn multi_queue(machine: &mut Machine) -> Outcome {
    each_writable(machine, |index, disk| {
        if disk.queues.len() < 2 {
            skip!("one queue");
        }
        let (out, back) = (Dma::new(4096), Dma::new(4096));
        for queue in 0..disk.queues.len() {
            let sector = 64 + queue as u64 * 8;
            pattern(out, index, sector, 6);
            let status = disk.request(queue, kind::OUT, sector, &[Segment::out(out)])?;
            ensure!(status == blk::OK, "write through queue {queue}: status {status}");
            let other = (queue + 1) % disk.queues.len();
            let status = disk.request(other, kind::IN, sector, &[Segment::into(back)])?;
            ensure!(status == blk::OK, "read through queue {other}: status {status}");
            ensure!(
                out.first_difference(&back).is_none(),
                "queue {queue} wrote what queue {other} does not read"
            );
        }
        Ok(())
    })
}

/// As many requests at once as the ring holds, several times around.
fn depth(machine: &mut Machine) -> Outcome {
    each_writable(machine, |index, disk| {
        let count = u64::from(disk.queues[0].size / 3).min(disk.sectors / 8 - 1);
        let requests = crate::bench::Requests::new(count, 4096);
        for seed in 0..4 {
            for slot in 0..count {
                pattern(requests.data(slot), index, slot * 8, seed);
            }
            requests.run_once(&mut disk.queues[0], kind::OUT)?;
            for slot in 0..count {
                requests.data(slot).fill(0);
            }
            requests.run_once(&mut disk.queues[0], kind::IN)?;
            let wanted = Dma::new(4096);
            for slot in 0..count {
                pattern(wanted, index, slot * 8, seed);
                ensure!(
                    wanted.first_difference(&requests.data(slot)).is_none(),
                    "round {seed}, request {slot}"
                );
            }
        }
        Ok(())
    })
}

fn range_request(index: u64, disk: &mut Disk, kind: u32, must_be_zero: bool) -> Outcome {
    let (out, back) = (Dma::new(32 << 10), Dma::new(32 << 10));
    pattern(out, index, 64, 7);
    disk.write(64, out)?;
    let range = Dma::new(16);
    range.set64(0, 72);
    range.set32(8, 16);
    range.set32(12, 0);
    disk.expect(kind, 0, &[Segment::out(range)])?;
    disk.read(64, back)?;
    for sector in (0..8).chain(24..64) {
        let (wanted, found) = (out.part(sector * 512, 512), back.part(sector * 512, 512));
        ensure!(
            wanted.first_difference(&found).is_none(),
            "sector {} outside the range changed",
            64 + sector
        );
    }
    if must_be_zero {
        let middle = back.part(8 * 512, 16 * 512);
        ensure!((0..middle.len).all(|at| middle.get8(at) == 0), "the range does not read as zeroes");
    }
    Ok(())
}

fn discard(machine: &mut Machine) -> Outcome {
    each_writable(machine, |index, disk| {
        if disk.features & feature::DISCARD == 0 {
            skip!("discard is not offered");
        }
        range_request(index, disk, kind::DISCARD, false)
    })
}

fn write_zeroes(machine: &mut Machine) -> Outcome {
    each_writable(machine, |index, disk| {
        if disk.features & feature::WRITE_ZEROES == 0 {
            skip!("write-zeroes is not offered");
        }
        range_request(index, disk, kind::WRITE_ZEROES, true)
    })
}

fn high_memory(machine: &mut Machine) -> Outcome {
    let Some(high) = machine.boot.ram().filter(|range| range.start >= 1 << 32).last() else {
        skip!("no RAM above 4 GiB");
    };
    let at = (high.start + high.len - (1 << 20)) & !4095;
    crate::mem::map(at, 1 << 20);
    each_writable(machine, |index, disk| {
        let (out, back) = (Dma::at(at, 8192), Dma::at(at + 8192, 8192));
        pattern(out, index, 48, 8);
        back.fill(0);
        disk.write(48, out)?;
        disk.read(48, back)?;
        ensure!(out.first_difference(&back).is_none(), "buffers at {at:#x}");
        Ok(())
    })
}

/// Leaves a text in each disk's first sector, for the host to check.
fn mark(machine: &mut Machine) -> Outcome {
    each_writable(machine, |index, disk| {
        let sector = Dma::new(512);
        sector.copy_in(0, format!("serio mini disk {index}\n").as_bytes());
        disk.write(0, sector)?;
        Ok(disk.flush()?)
    })
}
