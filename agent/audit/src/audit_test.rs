//! Chains over restarts and files, every single change found, torn ends, bounded room.

use std::{fs, path::PathBuf};

use proptest::prelude::*;

use super::*;

fn action(on: &str) -> Action<'_> {
    let detail = &[("key_id", "ab\"\n"), ("size", "7")];
    let role = "control-plane";
    Action {
        time_ms: 1_700_000_000_123,
        who: "uid 0",
        role,
        what: "EraseVdc",
        on,
        detail,
        ..Action::default()
    }
}

fn log_of(lines: u64, limits: Limits) -> (tempfile::TempDir, Vec<Receipt>) {
    let dir = tempfile::tempdir().unwrap();
    let mut receipts = Vec::new();
    for i in 0..lines {
        // Opened anew each time: the chain goes on over restarts.
        let log = AuditLog::open(dir.path(), limits).unwrap();
        receipts.push(log.append(&action(&format!("vdcs/v{i}"))).unwrap());
    }
    (dir, receipts)
}

fn check(files: &[PathBuf]) -> Result<Verified, AuditError> {
    verify(files, |_, _| {})
}

#[test]
fn lines_are_chained_over_restarts() {
    let (dir, receipts) = log_of(5, Limits::default());
    let mut on = Vec::new();
    let files = files_of(dir.path()).unwrap();
    let verified = verify(&files, |entry, _| on.push(entry.on)).unwrap();
    assert_eq!(on, ["vdcs/v0", "vdcs/v1", "vdcs/v2", "vdcs/v3", "vdcs/v4"]);
    assert_eq!((verified.lines, verified.first, &verified.hash), (5, 1, &receipts[4].hash));
    assert_eq!(receipts[0].time, "2023-11-14T22:13:20.123Z");
    let text = fs::read_to_string(dir.path().join("audit.log")).unwrap();
    assert!(
        text.starts_with(r#"{"n":1,"time":"2023-11-14T22:13:20.123Z","who":"uid 0","role":"control-plane""#)
    );
    assert_eq!(text.lines().count(), 5, "a value cannot end a line");
}

#[test]
fn lines_of_the_first_version_are_still_read() {
    let mut chain = Chain::default();
    let line = format!(
        r#"{{"n":1,"time":"2026-01-01T00:00:00.000Z","who":"uid 0","what":"EraseVdc","on":"vdcs/a","detail":{{}},"prev":"{FIRST}"}}"#
    );
    assert_eq!(chain.take(line.as_bytes()).unwrap().role, "");
}

#[test]
fn any_change_before_the_end_is_found() {
    let (dir, _) = log_of(4, Limits::default());
    let path = dir.path().join("audit.log");
    let files = [path.clone()];
    let good = fs::read(&path).unwrap();
    let last = good.len() - 1 - good[..good.len() - 1].iter().rev().position(|b| *b == b'\n').unwrap();
    for at in 0..last {
        let mut bad = good.clone();
        bad[at] ^= 4;
        fs::write(&path, &bad).unwrap();
        assert!(check(&files).is_err(), "byte {at}");
    }
    let lines: Vec<_> = good.split_inclusive(|b| *b == b'\n').collect();
    for out in 1..3 {
        let rest: Vec<_> = lines.iter().enumerate().filter(|(i, _)| *i != out).map(|(_, l)| *l).collect();
        fs::write(&path, rest.concat()).unwrap();
        assert!(matches!(check(&files), Err(AuditError::Broken { .. })), "line {out} taken out");
    }
    // Those at the beginning may be in a file that is not here: it is said which is the first.
    fs::write(&path, lines[1..].concat()).unwrap();
    assert_eq!(check(&files).map(|v| (v.first, v.lines)).unwrap(), (2, 3));
    // What is cut off at the end shows to who has the receipt.
    fs::write(&path, lines[..3].concat()).unwrap();
    assert_eq!(check(&files).unwrap().lines, 3);
}

#[test]
fn half_a_line_is_cut_off_and_told() {
    let (dir, _) = log_of(2, Limits::default());
    let path = dir.path().join("audit.log");
    let good = fs::read(&path).unwrap();
    fs::write(&path, [&good[..], b"{\"n\":3,\"ti"].concat()).unwrap();
    assert_eq!(check(std::slice::from_ref(&path)).unwrap().lines, 2, "it may be being written");
    let log = AuditLog::open(dir.path(), Limits::default()).unwrap();
    log.append(&action("vdcs/after")).unwrap();
    let mut what = Vec::new();
    verify(&[path], |entry, _| what.push((entry.what, entry.detail))).unwrap();
    assert_eq!((what[2].0.as_str(), what[2].1["torn_bytes"].as_str()), ("RepairAuditLog", "10"));
    assert_eq!(what.len(), 4);
}

#[test]
fn nonsense_at_the_end_is_not_built_upon() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.log");
    fs::write(&path, "not an entry\n").unwrap();
    assert!(matches!(AuditLog::open(dir.path(), Limits::default()), Err(AuditError::Broken { .. })));
    fs::write(&path, vec![b'x'; 100_000]).unwrap();
    assert!(AuditLog::open(dir.path(), Limits::default()).is_err());
}

#[test]
fn files_are_closed_and_the_oldest_dropped_while_the_chain_goes_on() {
    let limits = Limits { file_bytes_max: 1000, files_max: 2 };
    let (dir, receipts) = log_of(40, limits);
    let files = files_of(dir.path()).unwrap();
    assert_eq!(files.len(), 3, "{files:?}");
    let mut dropped = 0;
    let mut hashes = Vec::new();
    let verified = verify(&files, |entry, hash| {
        dropped += u64::from(entry.what == "DropAuditFile");
        hashes.push((entry.n, hash.to_owned()));
    })
    .unwrap();
    assert!(verified.first > 1 && dropped > 0, "{verified:?}");
    let newest = receipts.last().unwrap();
    assert!(hashes.contains(&(newest.number, newest.hash.clone())));
    // A file from the middle cannot go unseen.
    assert!(check(&[files[0].clone(), files[2].clone()]).is_err());
    // The end came between the rename and the new file.
    fs::remove_file(&files[2]).unwrap();
    let before = check(&files[..2]).unwrap();
    let receipt = AuditLog::open(dir.path(), limits).unwrap().append(&action("vdcs/on")).unwrap();
    assert_eq!(receipt.number, before.last + 1);
    check(&files_of(dir.path()).unwrap()).unwrap();
}

#[test]
fn long_values_are_cut_rather_than_refused() {
    let dir = tempfile::tempdir().unwrap();
    let log = AuditLog::open(dir.path(), Limits::default()).unwrap();
    let long = "ü".repeat(100_000);
    log.append(&Action { who: &long, result: Some(&long), ..action(&long) }).unwrap();
    check(&files_of(dir.path()).unwrap()).unwrap();
}

#[test]
fn a_reader_follows_over_files() {
    let limits = Limits { file_bytes_max: 700, files_max: 4 };
    let dir = tempfile::tempdir().unwrap();
    let log = AuditLog::open(dir.path(), limits).unwrap();
    let mut reader = Reader::new(dir.path(), 0);
    let mut late = Reader::new(dir.path(), 7);
    let mut seen = Vec::new();
    for i in 0..30 {
        log.append(&action(&format!("vdcs/v{i}"))).unwrap();
        if i % 3 == 0 {
            while let Some((entry, hash)) = reader.next_entry().unwrap() {
                assert_eq!(hash.len(), 64);
                seen.push(entry.n);
            }
        }
    }
    while let Some((entry, _)) = reader.next_entry().unwrap() {
        seen.push(entry.n);
    }
    assert_eq!(seen, (1..=log.last().0).collect::<Vec<_>>());
    // What was wanted is gone already: from the oldest that is kept.
    let first = late.next_entry().unwrap().unwrap().0.n;
    assert!(first >= 7, "{first}");
    let mut end = Reader::new(dir.path(), log.last().0);
    assert_eq!(end.next_entry().unwrap().unwrap().0.n, log.last().0);
    assert!(end.next_entry().unwrap().is_none());
}

proptest! {
    #[test]
    fn lines_of_any_bytes_are_refused_or_read(line in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Chain::default().take(&line);
    }
}
