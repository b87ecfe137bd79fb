//! A hostile guest: each misuse on each device that it fits, and what must hold afterwards.
//!
//! ```text
//!   row (a misuse) × subject (a device, or one queue of it)
//!     reset the subject → misuse → what the row demands
//!       → put the bus back, reset → the subject works again → another device never noticed
//! ```
//!
//! A row demands one of four things ([`Must`]). Whatever it is, the machine goes on: the same program does all rows, one
//! after the other, and a row that kills the process or wedges a device is seen by all that follow. `mini.test=hostile`
//! runs them; `hostile.ROW` and `hostile.ROW.SUBJECT` choose.

mod address;
mod bars;
mod blk;
mod msix;
mod net;
mod registers;
mod ring;
mod serial;
mod stage;
mod status;
mod storm;

use self::stage::{Kind, Stage, Subject, Witness};
use crate::suite::{Failure, Machine, Outcome};
use crate::virtio::status::NEEDS_RESET;
use crate::{clock, mem, println};
use alloc::format;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;

/// What must hold right after a misuse.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Must {
    /// The device says NEEDS_RESET, if it reads that queue without being asked for data.
    Break,
    /// The chain comes back, or the device says NEEDS_RESET.
    Settle,
    /// The device does not say NEEDS_RESET.
    Go,
    /// Nothing but what holds after every row.
    Survive,
}

/// What a misuse is done to.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum On {
    /// Each device, once.
    Devices,
    /// Each queue of each device.
    Queues,
    /// The devices of one kind.
    Only(Kind),
}

/// A misuse.
pub struct Row {
    name: &'static str,
    on: On,
    must: Must,
    run: fn(&mut Stage) -> Outcome,
}

const fn row(name: &'static str, on: On, must: Must, run: fn(&mut Stage) -> Outcome) -> Row {
    Row { name, on, must, run }
}

fn rows() -> impl Iterator<Item = &'static Row> {
    [
        status::ROWS,
        registers::ROWS,
        msix::ROWS,
        bars::ROWS,
        ring::ROWS,
        address::ROWS,
        storm::ROWS,
        blk::ROWS,
        net::ROWS,
        serial::ROWS,
    ]
    .into_iter()
    .flatten()
}

/// Runs the chosen rows on all they fit, prints a line each and the sum; true if none failed and at least one ran.
pub fn run(machine: &mut Machine, choice: &str) -> bool {
    let (mut passed, mut failed) = (0, 0);
    let subjects = match stage::subjects(machine) {
        Ok(subjects) => subjects,
        Err(Failure::Failed(reason) | Failure::Skipped(reason)) => {
            println!("not ok hostile: {reason}");
            return false;
        }
    };
    let (part, parts) = part(machine);
    stage::VECTORS.store(machine.boot.option("mini.vectors").is_some(), Ordering::Relaxed);
    for row in rows().skip(part).step_by(parts) {
        for subject in subjects.iter().filter(|subject| fits(row, subject)) {
            let name = format!("hostile.{}.{}", row.name, subject.label);
            if !is_chosen(&name, choice) {
                continue;
            }
            // All that a row allocates is gone with it: its device has been reset.
            let mark = mem::mark();
            match attempt(row, subject, &subjects) {
                Ok(()) => {
                    passed += 1;
                    println!("ok {name}");
                }
                Err(Failure::Failed(reason) | Failure::Skipped(reason)) => {
                    failed += 1;
                    println!("not ok {name}: {reason}");
                }
            }
            mem::rewind(mark);
        }
    }
    println!("mini: {passed} passed, {failed} failed, 0 skipped");
    failed == 0 && passed > 0
}

/// `mini.part=K/N`: only the K-th of N rows, from 0, so that several machines can share the work.
fn part(machine: &Machine) -> (usize, usize) {
    let words = machine.boot.option("mini.part").and_then(|text| text.split_once('/'));
    let numbers = words.and_then(|(part, parts)| Some((part.parse().ok()?, parts.parse().ok()?)));
    numbers.filter(|(part, parts)| part < parts).unwrap_or((0, 1))
}

fn is_chosen(name: &str, choice: &str) -> bool {
    choice
        .split(',')
        .any(|word| name.strip_prefix(word).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
}

fn fits(row: &Row, subject: &Subject) -> bool {
    match row.on {
        On::Devices => subject.is_first,
        On::Queues => subject.target.is_some(),
        On::Only(kind) => subject.is_first && subject.kind == kind,
    }
}

fn attempt(row: &Row, subject: &Subject, all: &[Subject]) -> Outcome {
    let mut witness = Witness::choose(subject, all)?;
    if let Some(witness) = &mut witness {
        witness.ask("before")?;
    }
    let mut stage = Stage::new(subject, all)?;
    let outcome = (row.run)(&mut stage).and_then(|()| demand(row.must, &stage));
    let healed = stage.heal().and_then(|()| subject.works());
    outcome?;
    healed.map_err(|failure| prefix("afterwards", failure))?;
    if let Some(witness) = &mut witness {
        witness.ask("after")?;
        witness.dismiss()?;
    }
    Ok(())
}

fn prefix(when: &str, failure: Failure) -> Failure {
    match failure {
        Failure::Failed(reason) | Failure::Skipped(reason) => Failure::Failed(format!("{when}: {reason}")),
    }
}

fn demand(must: Must, stage: &Stage) -> Outcome {
    let broken = || stage.device.status() & NEEDS_RESET != 0;
    match must {
        Must::Break if stage.is_eager() => {
            crate::ensure!(clock::poll(2000, broken), "DEVICE_NEEDS_RESET is not set");
        }
        Must::Settle if stage.is_eager() => {
            let settled = clock::poll(2000, || stage.used() > 0 || broken());
            crate::ensure!(settled, "neither answered nor DEVICE_NEEDS_RESET");
            let (room, written) = (stage.writable, stage.first_used_len());
            crate::ensure!(broken() || written <= room, "{written} bytes written of {room}");
        }
        Must::Go => {
            crate::ensure!(!broken(), "DEVICE_NEEDS_RESET");
        }
        Must::Break | Must::Settle | Must::Survive => {}
    }
    Ok(())
}

/// For rows that have to look at several things: all reasons in one.
fn all_of(checks: Vec<Outcome>) -> Outcome {
    checks.into_iter().collect()
}
