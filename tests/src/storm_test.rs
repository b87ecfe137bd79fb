//! The model against a disk that does what a disk may do, and against ones that do not.

use crate::storm::{Act, Content, LANES, Log, Model, Plan, SECTOR, read, stamp};

const SECTORS: u64 = 2000;

/// Runs the plan up to a step of each lane on a disk in memory; `keep` says which of the unsafe steps reach the disk.
fn run(disk: &mut [u8], run: u64, ends: [u64; LANES], mut keep: impl FnMut(usize, u64) -> bool) {
    for (lane, end) in ends.iter().enumerate() {
        for step in Plan::new(run, lane, SECTORS).take_while(|step| step.index < *end) {
            if step.act == Act::Flush || !keep(lane, step.index) {
                continue;
            }
            for sector in step.first..step.first + step.count {
                let at = sector as usize * SECTOR;
                let bytes = if step.act == Act::Zero { [0; SECTOR] } else { stamp(sector, run, step.index) };
                disk[at..at + SECTOR].copy_from_slice(&bytes);
            }
        }
    }
}

fn blank() -> Vec<u8> {
    vec![0; SECTORS as usize * SECTOR]
}

#[test]
fn what_was_safe_must_be_there_and_the_rest_may() {
    let log = Log::new(
        3,
        "noise\nstorm 3 safe 100 90 80 70;\nstorm 2 safe 999 999 999 999;\nstorm 3 fua 1 95;\nstorm 3 safe 1",
    );
    assert_eq!((log.safe, log.flushes), ([100, 90, 80, 70], 1));
    let mut model = Model::new(SECTORS);
    model.ran(&log);
    for keep_rest in [false, true] {
        let mut disk = blank();
        run(&mut disk, 3, [120, 110, 100, 90], |lane, step| {
            step < log.safe[lane] || log.durable.contains(&(lane, step)) || keep_rest
        });
        assert!(model.clone().judge(&disk, true).is_ok());
    }
}

#[test]
fn a_lost_step_is_seen() {
    let log = Log::new(1, "storm 1 safe 300 300 300 300;");
    let mut model = Model::new(SECTORS);
    model.ran(&log);
    // The last write of all: nothing later may cover it.
    let last = Plan::new(1, 2, SECTORS).take(300).filter(|step| step.act == Act::Write).last().unwrap();
    let mut disk = blank();
    run(&mut disk, 1, [300; LANES], |lane, step| (lane, step) != (2, last.index));
    let wrong = model.judge(&disk, true).unwrap_err();
    assert!(
        wrong.sectors as u64 <= last.count && wrong.first[0].contains(&format!("sector {}", last.first)),
        "{wrong}"
    );
}

#[test]
fn a_torn_or_foreign_sector_is_seen() {
    let log = Log::new(1, "storm 1 safe 50 50 50 50;");
    let mut model = Model::new(SECTORS);
    model.ran(&log);
    let mut disk = blank();
    run(&mut disk, 1, [50; LANES], |_, _| true);
    assert!(model.clone().judge(&disk, true).is_ok());
    let at = disk.iter().position(|byte| *byte != 0).unwrap() / SECTOR * SECTOR;
    for (offset, value) in [(300, 0xff), (16, 9)] {
        let mut bad = disk.clone();
        bad[at + offset] ^= value;
        assert_eq!(model.clone().judge(&bad, true).unwrap_err().sectors, 1);
    }
    assert_eq!(read(7, &stamp(7, 1, 2)), Some(Content::Stamp(1, 2)));
    assert_eq!(read(8, &stamp(7, 1, 2)), None, "a stamp of another sector");
}

#[test]
fn what_was_seen_after_a_kill_is_safe_only_after_a_flush() {
    let log = Log::new(1, "storm 1 safe 10 10 10 10;");
    let mut model = Model::new(SECTORS);
    model.ran(&log);
    let (mut all, mut safe) = (blank(), blank());
    run(&mut all, 1, [40; LANES], |_, _| true);
    run(&mut safe, 1, [10; LANES], |_, _| true);
    // The process was killed, its unsafe writes were seen, then the power went before anybody flushed: they may go.
    model.judge(&all, false).unwrap();
    model.ran(&Log::new(2, ""));
    assert!(model.clone().judge(&safe, true).is_ok());
    // With a flush in between they must not.
    model.ran(&Log::new(2, "storm 2 safe 0 0 0 0;"));
    assert!(model.judge(&safe, true).is_err());
}
