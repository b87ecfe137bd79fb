//! All decisions, as they stand in `plan_golden.txt`; and what must never be decided.

use std::fmt::Write as _;

use super::*;

const RUNS: [Run; 10] = [
    Run::Creating,
    Run::Off,
    Run::Failed,
    Run::Starting,
    Run::Running,
    Run::Paused,
    Run::Stopping,
    Run::Killing,
    Run::Deleting,
    Run::DeletingKeepRoot,
];
/// Those whose process is looked for.
const ALIVE: [Run; 5] = [Run::Starting, Run::Running, Run::Paused, Run::Stopping, Run::Killing];
const ENDS: [EndWord; 7] = [
    EndWord::PowerOff,
    EndWord::Reset,
    EndWord::Stopped,
    EndWord::GuestError,
    EndWord::HostError,
    EndWord::LaunchFailed,
    EndWord::Died,
];
const POLICIES: [RestartPolicy; 3] = [RestartPolicy::Never, RestartPolicy::OnFailure, RestartPolicy::Always];
const STANDINGS: [Standing; 4] = [Standing::Runs, Standing::Stops, Standing::Pauses, Standing::Other];

/// Every wish for a row that says so, and its words.
fn wishes(run: Run) -> impl Iterator<Item = (Wish, String)> {
    let flags = [(false, false), (true, false), (false, true), (true, true)];
    POLICIES.into_iter().flat_map(move |policy| {
        flags.into_iter().map(move |(boots_from_disk, is_fenced)| {
            let wish = Wish { run, policy, boots_from_disk, is_fenced, failures: 0 };
            let disk = if boots_from_disk { ", boots from its disk" } else { "" };
            let fence = if is_fenced { ", fenced" } else { "" };
            (wish, format!("row {run}, restarts {policy:?}{disk}{fence}"))
        })
    })
}

#[derive(Default)]
struct Table(String);

impl Table {
    fn line(&mut self, occasion: &str, what: &str, decided: impl std::fmt::Debug) {
        writeln!(self.0, "{occasion:<9} | {what:<96} | {decided:?}").unwrap();
    }
}

/// All that can be decided, one line each.
fn table() -> String {
    let mut table = Table::default();
    for run in RUNS {
        for (has_files, what) in [(false, "no run files"), (true, "run files")] {
            table.line("start", &format!("row {run}, {what}"), at_start(run, has_files));
        }
    }
    for (wish, what) in ALIVE.into_iter().flat_map(wishes) {
        // Neither the policy nor the disk is asked; that they are not is tested below.
        if wish.policy == RestartPolicy::Never && !wish.boots_from_disk {
            for (still, guest) in [(false, "its guest runs"), (true, "its guest stands still")] {
                table.line("found", &format!("{what}, {guest}"), found(wish, still));
            }
        }
        for end in ENDS.map(Some).into_iter().chain([None]) {
            let said = end.map_or("it said nothing".to_owned(), |end| format!("it said {end}"));
            table.line("not found", &format!("{what}, {said}"), not_found(wish, end));
        }
    }
    for (wish, what) in wishes(Run::Running) {
        for end in ENDS {
            table.line("ended", &format!("{what}, {end}"), ended(wish, end, Some(1000)));
        }
    }
    let (wish, _) = wishes(Run::Running).nth(4).unwrap();
    for (failures, ran_ms) in [
        (0, None),
        (1, Some(1000)),
        (4, Some(1000)),
        (8, Some(1000)),
        (u32::MAX, Some(1000)),
        (4, Some(STEADY_MS - 1)),
        (4, Some(STEADY_MS)),
    ] {
        let ran = ran_ms.map_or("not having run".to_owned(), |ran_ms| format!("having run {ran_ms} ms"));
        let what = format!("restarts {:?}, died after {failures} failures in a row, {ran}", wish.policy);
        table.line("ended", &what, ended(Wish { failures, ..wish }, EndWord::Died, ran_ms));
    }
    for standing in STANDINGS {
        table.line("fence", &format!("{standing:?}"), fenced(standing));
    }
    table.0
}

#[test]
fn all_decisions_are_as_they_were() {
    let (golden, table) = (include_str!("plan_golden.txt"), table());
    if golden != table {
        let at = std::env::temp_dir().join("plan_golden.txt");
        std::fs::write(&at, &table).unwrap();
        let differs = golden.lines().zip(table.lines()).find(|(was, is)| was != is);
        panic!(
            "decided otherwise than before: {differs:#?}; if that is meant, {} is the new table",
            at.display()
        );
    }
}

/// Whatever else is so: what is fenced is never started, nor left to run.
#[test]
fn a_fence_stands_above_all() {
    for (wish, what) in RUNS.into_iter().flat_map(wishes).filter(|(wish, _)| wish.is_fenced) {
        for end in ENDS {
            assert!(matches!(ended(wish, end, None), Gone::Rest { .. }), "{what}, {end}");
            assert!(matches!(not_found(wish, Some(end)), Gone::Rest { .. } | Gone::Stopped), "{what}, {end}");
        }
        assert!(matches!(not_found(wish, None), Gone::Rest { .. } | Gone::Stopped), "{what}");
        assert_eq!((found(wish, false), found(wish, true)), (Found::Kill, Found::Kill), "{what}");
    }
    assert_eq!((fenced(Standing::Runs), fenced(Standing::Stops)), (Fenced::Kill, Fenced::Kill));
}

/// What somebody has asked to end is not started again, and what is found then ends.
#[test]
fn a_stop_is_a_stop() {
    for (wish, what) in [Run::Stopping, Run::Killing].into_iter().flat_map(wishes) {
        for end in ENDS.map(Some).into_iter().chain([None]) {
            assert_eq!(not_found(wish, end), Gone::Stopped, "{what}");
        }
        for still in [false, true] {
            assert!(matches!(found(wish, still), Found::PowerButton | Found::Kill), "{what}");
        }
    }
}

/// What was found goes on as its row says, whatever its policy.
#[test]
fn policies_and_disks_say_nothing_of_what_runs() {
    for run in ALIVE {
        for is_fenced in [false, true] {
            for still in [false, true] {
                let all: Vec<Found> = wishes(run)
                    .filter(|(wish, _)| wish.is_fenced == is_fenced)
                    .map(|(wish, _)| found(wish, still))
                    .collect();
                assert!(all.windows(2).all(|pair| pair[0] == pair[1]), "{run}: {all:?}");
            }
        }
    }
}

#[test]
fn pauses_grow_to_a_limit() {
    assert_eq!((0..10).map(pause_ms).collect::<Vec<_>>()[..4], [1000, 2000, 4000, 8000]);
    assert_eq!(pause_ms(9), PAUSE_MS_MAX);
    assert_eq!(pause_ms(u32::MAX), PAUSE_MS_MAX);
}
