//! What the serial log of a mini guest in the mode `mini.test=writer` proves: each `writer: N` was flushed to the disk
//! before it was printed, so the next start must find at least N. See images/mini/README.md.

use std::{collections::BTreeMap, fs, path::Path};

/// A run may have flushed rounds whose lines did not reach the log before its process was killed. A round takes 20 ms
/// and more; a second writer that goes on unseen is soon further ahead.
const UNSEEN_MAX: u64 = 25;

/// How a run begins, after an empty line.
const START: &str = "mini: started by ";

/// What one log shows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Shown {
    /// The last round that is known to be safe.
    pub safe: u64,
    /// Runs that said what they found.
    pub runs: u64,
    /// Those that found rounds of an earlier run.
    pub continued: u64,
}

/// Reads a log; `Err` says what it proves wrong.
pub fn examine(log: &str) -> Result<Shown, String> {
    let (mut shown, mut last) = (Shown::default(), None);
    let lines: Vec<&str> = log.split('\n').collect();
    for (index, pair) in lines.windows(2).enumerate() {
        let (line, next) = (pair[0], pair[1]);
        // A start prints a newline first: without an empty line in between, this one was cut off by a kill. The start may not be whole
        // yet; of the last line, when nothing follows it, nobody knows.
        let newest = index + 2 == lines.len();
        let cut = next.starts_with(START) || (newest && !next.is_empty() && START.starts_with(next));
        if line.starts_with(START) {
            last = None;
        }
        let Some(said) = line.strip_prefix("writer: ").filter(|_| !cut) else { continue };
        match judge(said, &mut shown, &mut last) {
            Err(_) if newest && next.is_empty() => {}
            Err(why) => return Err(format!("{line:?}: {why}, {shown:?}, this run's last round {last:?}")),
            Ok(()) => {}
        }
    }
    Ok(shown)
}

/// What a run says, after `writer: `; `last` is its last round.
fn judge(said: &str, shown: &mut Shown, last: &mut Option<u64>) -> Result<(), &'static str> {
    match (said.strip_prefix("found "), *last) {
        (Some(found), None) => match found.parse() {
            Ok(found) if found < shown.safe => return Err("flushed rounds are lost"),
            Ok(found) if found > shown.safe + UNSEEN_MAX => return Err("somebody else has written"),
            Ok(found) => {
                *last = Some(found);
                shown.safe = found;
                shown.runs += 1;
                shown.continued += u64::from(found > 0);
            }
            Err(_) => return Err("not a number"),
        },
        (None, Some(before)) => match said.parse() {
            Ok(round) if round == before + 1 => (*last, shown.safe) = (Some(round), round),
            Ok(_) => return Err("out of order"),
            Err(_) => return Err("the disk is not as it was written"),
        },
        _ => return Err("two runs in one, or a run without a start"),
    }
    Ok(())
}

/// The logs of all VMs of a node, by uid, over time.
#[derive(Debug, Default)]
pub struct Logs {
    seen: BTreeMap<String, Shown>,
}

impl Logs {
    /// Looks at every log in a folder of VMs (`STATE/vms`).
    pub fn look(&mut self, vms: &Path) {
        for entry in fs::read_dir(vms).unwrap().flatten() {
            let uid = entry.file_name().into_string().unwrap();
            // A VM that is being created or deleted has none.
            let Ok(bytes) = fs::read(entry.path().join("serial.log")) else { continue };
            let log = String::from_utf8_lossy(&bytes);
            let shown = examine(&log).unwrap_or_else(|why| panic!("{uid}: {why}\n{log}"));
            let before = self.seen.insert(uid.clone(), shown).unwrap_or_default();
            assert!(
                before.safe <= shown.safe && before.runs <= shown.runs,
                "{uid} went back from {before:?}:\n{log}"
            );
        }
    }

    /// All runs, and those that went on with an earlier run's disk.
    pub fn runs(&self) -> (u64, u64) {
        self.seen
            .values()
            .fold((0, 0), |(runs, continued), shown| (runs + shown.runs, continued + shown.continued))
    }

    /// All rounds that were written.
    pub fn rounds(&self) -> u64 {
        self.seen.values().map(|shown| shown.safe).sum()
    }
}
