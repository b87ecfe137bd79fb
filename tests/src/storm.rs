//! A storm of writes of which every trace on a disk can be judged from outside.
//!
//! Owns: the plan of what each lane of the program `storm` does to a disk (a pure function of the run's number and the lane),
//! what its sectors look like, and the model: which contents each sector may have, given what the storm said was safe before
//! somebody pulled the plug. `bin/storm.rs` is the program that runs in a guest; the test that kills it replays the same plan.
//!
//! Each lane does one thing at a time, to sectors that are its own. These lie in units of ten KiB, lane after lane, so that the
//! blocks of four KiB at their edges belong to two lanes: partial writes to one block meet. What the storm prints, each line ended by
//! a semicolon (a line that a kill has cut does not count):
//!
//! ```text
//! storm 7 safe 130 128 0 131;   before step 130 of lane 0 (128 of lane 1, …) all was on the disk when this was printed
//! storm 7 fua 2 140;            so is step 140 of lane 2, by itself
//! ```
//!
//! A sector then holds what its last safe step left there, or what any later step did; never anything else, old or mixed.

use std::{collections::BTreeSet, fmt};

/// Bytes of what a disk writes whole.
pub const SECTOR: usize = 512;
/// How many things are under way together.
pub const LANES: usize = 4;
/// Sectors of a unit: two and a half blocks.
pub const UNIT: u64 = 20;
const MAGIC: u64 = 0x5354_4f52_4d21_2121;
/// A lane flushes after about so many steps.
const FLUSH_EVERY: u64 = 48;
/// So many flushes of a lane may have happened whose lines were lost on the way from the guest to the test.
const UNSEEN_FLUSHES: usize = 12;

/// What a step does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Writes stamps.
    Write,
    /// Writes stamps and returns when they are safe.
    Durable,
    /// Makes zeros of it.
    Zero,
    /// Makes all safe that has been written.
    Flush,
}

/// One thing that a lane does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// From 0, within the lane.
    pub index: u64,
    /// What.
    pub act: Act,
    /// The first sector; a flush has none.
    pub first: u64,
    /// How many.
    pub count: u64,
}

/// What a lane does, step after step, for ever.
#[derive(Debug, Clone)]
pub struct Plan {
    random: u64,
    lane: u64,
    units: u64,
    next: u64,
}

impl Plan {
    /// The plan of a lane in a run, on a disk of so many sectors (at least a unit for each lane).
    #[must_use]
    pub fn new(run: u64, lane: usize, sectors: u64) -> Self {
        let lane = lane as u64;
        let random = (run << 8 | lane).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Self { random, lane, units: sectors / UNIT / LANES as u64, next: 0 }
    }

    fn roll(&mut self, sides: u64) -> u64 {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % sides
    }
}

impl Iterator for Plan {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let index = self.next;
        self.next += 1;
        if self.roll(FLUSH_EVERY) == 0 {
            return Some(Step { index, act: Act::Flush, first: 0, count: 0 });
        }
        let unit = self.roll(self.units) * LANES as u64 + self.lane;
        let start = self.roll(UNIT);
        let count = 1 + self.roll(UNIT - start);
        let act = match self.roll(16) {
            0 | 1 => Act::Zero,
            2 => Act::Durable,
            _ => Act::Write,
        };
        Some(Step { index, act, first: unit * UNIT + start, count })
    }
}

/// What a sector may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Content {
    /// Zeros.
    Zero,
    /// The stamp of a step of a run.
    Stamp(u64, u64),
}

/// The bytes of a stamp; no other sector, run or step has them.
#[must_use]
pub fn stamp(sector: u64, run: u64, step: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    let mut word = sector ^ run.rotate_left(24) ^ step.rotate_left(48) ^ MAGIC;
    for (at, chunk) in bytes.chunks_exact_mut(8).enumerate() {
        word = word.wrapping_mul(0xd129_0d3d_4d5a_ed4d).rotate_left(29).wrapping_add(at as u64);
        let value = match at {
            0 => MAGIC,
            1 => sector,
            2 => run,
            3 => step,
            _ => word,
        };
        chunk.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// What a sector holds; none if it is neither zeros nor a whole stamp that belongs there.
#[must_use]
pub fn read(sector: u64, bytes: &[u8]) -> Option<Content> {
    if bytes.iter().all(|byte| *byte == 0) {
        return Some(Content::Zero);
    }
    let word = |at: usize| Some(u64::from_le_bytes(bytes.get(at * 8..at * 8 + 8)?.try_into().ok()?));
    let (run, step) = (word(2)?, word(3)?);
    (bytes == stamp(sector, run, step)).then_some(Content::Stamp(run, step))
}

/// What the lines of one run prove.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Log {
    /// The run's number.
    pub run: u64,
    /// Steps before this one are safe, lane by lane.
    pub safe: [u64; LANES],
    /// Single steps that are.
    pub durable: BTreeSet<(usize, u64)>,
    /// How many lines said `safe`.
    pub flushes: usize,
}

impl Log {
    /// Reads the lines of run `run` in `text`, which may hold anything else too.
    #[must_use]
    pub fn new(run: u64, text: &str) -> Self {
        let mut log = Self { run, ..Self::default() };
        let head = format!("storm {run} ");
        for line in text.lines() {
            let Some(said) = line.trim().strip_prefix(&head).and_then(|said| said.strip_suffix(';')) else {
                continue;
            };
            let words: Vec<&str> = said.split(' ').collect();
            let numbers: Vec<u64> = words.iter().skip(1).filter_map(|word| word.parse().ok()).collect();
            match (words.first().copied(), numbers.as_slice()) {
                (Some("safe"), numbers) if numbers.len() == LANES => {
                    for (safe, number) in log.safe.iter_mut().zip(numbers) {
                        *safe = (*safe).max(*number);
                    }
                    log.flushes += 1;
                }
                (Some("fua"), &[lane, step]) if lane < LANES as u64 => {
                    log.durable.insert((lane as usize, step));
                }
                _ => {}
            }
        }
        log
    }
}

/// A disk that is not what it must be.
#[derive(Debug)]
pub struct Wrong {
    /// How many sectors.
    pub sectors: usize,
    /// The first of them, for a person.
    pub first: Vec<String>,
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} sectors are neither what was safe nor anything later:\n{}",
            self.sectors,
            self.first.join("\n")
        )
    }
}

/// What each sector of a disk may hold.
#[derive(Debug, Clone)]
pub struct Model {
    allowed: Vec<Vec<Content>>,
    seen: Vec<Content>,
}

impl Model {
    /// A disk of zeros.
    #[must_use]
    pub fn new(sectors: u64) -> Self {
        let sectors = usize::try_from(sectors).expect("a test's disk is small");
        Self { allowed: vec![vec![Content::Zero]; sectors], seen: vec![Content::Zero; sectors] }
    }

    /// A run has ended, and this is what it said.
    pub fn ran(&mut self, log: &Log) {
        if log.flushes > 0 {
            // A flush covers also what was there, safe or not, when this run began.
            for (allowed, seen) in self.allowed.iter_mut().zip(&self.seen) {
                *allowed = vec![*seen];
            }
        }
        let sectors = self.allowed.len() as u64;
        for lane in 0..LANES {
            let mut unseen = 0;
            for step in Plan::new(log.run, lane, sectors) {
                let safe = step.index < log.safe[lane] || log.durable.contains(&(lane, step.index));
                unseen += usize::from(step.act == Act::Flush && step.index >= log.safe[lane]);
                if unseen > UNSEEN_FLUSHES {
                    break;
                }
                self.step(log.run, &step, safe);
            }
        }
    }

    fn step(&mut self, run: u64, step: &Step, safe: bool) {
        let content = match step.act {
            Act::Flush => return,
            Act::Zero => Content::Zero,
            Act::Write | Act::Durable => Content::Stamp(run, step.index),
        };
        for sector in step.first..step.first + step.count {
            let allowed = &mut self.allowed[sector as usize];
            if safe {
                allowed.clear();
            }
            allowed.push(content);
        }
    }

    /// Compares the disk, and learns what it holds. `settled`: it was read after a loss of power, so what it holds is safe.
    ///
    /// # Errors
    /// Sectors hold what they must not.
    pub fn judge(&mut self, disk: &[u8], settled: bool) -> Result<usize, Wrong> {
        let mut wrong = Wrong { sectors: 0, first: Vec::new() };
        let mut stamped = 0;
        assert_eq!(disk.len(), self.allowed.len() * SECTOR, "the disk has another size");
        for (sector, bytes) in disk.chunks_exact(SECTOR).enumerate() {
            let found = read(sector as u64, bytes);
            match found {
                Some(content) if self.allowed[sector].contains(&content) => {
                    stamped += usize::from(content != Content::Zero);
                    self.seen[sector] = content;
                    if settled {
                        self.allowed[sector] = vec![content];
                    }
                }
                _ => {
                    wrong.sectors += 1;
                    if wrong.first.len() < 20 {
                        let allowed = &self.allowed[sector];
                        wrong.first.push(format!("sector {sector}: {found:?}, may hold {allowed:?}"));
                    }
                }
            }
        }
        if wrong.sectors > 0 { Err(wrong) } else { Ok(stamped) }
    }
}
