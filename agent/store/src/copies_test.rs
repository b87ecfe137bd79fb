//! Copies of the database: made, kept, refused, put back.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
};

use rusqlite::Connection;
use uuid::Uuid;

use crate::{Change, Store, StoreError, copies, record::EventRecord, record::Millis};

fn event(number: u64) -> Change {
    let message = "long enough to fill some pages of the file ".repeat(20);
    Change::Event(EventRecord {
        number,
        time: Millis(0),
        resource: "r".to_owned(),
        kind: "k".to_owned(),
        message,
    })
}

/// Changes bytes in the middle of the file, as a bad disk would.
fn spoil(path: &Path) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    let middle = file.metadata().unwrap().len() / 2;
    file.write_all_at(&[0xa5; 4096], middle / 4096 * 4096).unwrap();
}

/// A database with so many events, closed.
fn database(path: &Path, events: u64) {
    let (mut store, _) = Store::open(path).unwrap();
    store.commit(&[Change::Node(Uuid::from_u128(1))]).unwrap();
    store.commit(&(1..=events).map(event).collect::<Vec<_>>()).unwrap();
}

#[test]
fn copies_are_made_of_what_has_changed_and_three_stay() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let (mut store, _) = Store::open(&path).unwrap();
    for number in 1..=5 {
        store.commit(&[event(number)]).unwrap();
        let made = copies::make(&path).unwrap().unwrap();
        assert!(made.ends_with(format!("copies/state-{number:06}.db")), "{made:?}");
        assert_eq!(copies::make(&path).unwrap(), None);
    }
    let names = copies::list(&path);
    let names: Vec<_> = names.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["state-000005.db", "state-000004.db", "state-000003.db"]);
}

#[test]
fn a_damaged_database_is_refused_with_the_way_back_and_never_copied() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    database(&path, 50);
    let copy = copies::make(&path).unwrap().unwrap();
    database_more(&path, 60);
    spoil(&path);
    let before = fs::read(&path).unwrap();
    let error = Store::open(&path).unwrap_err();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error:?}");
    let said = error.to_string();
    assert!(said.contains(copy.to_str().unwrap()) && said.contains("seriod --restore-state"), "{said}");
    assert!(matches!(copies::make(&path), Err(StoreError::Damaged { .. })));
    assert_eq!(copies::list(&path), std::slice::from_ref(&copy));
    assert_eq!(fs::read(&path).unwrap(), before);

    let restored = copies::restore(&path).unwrap();
    assert_eq!((restored.copy, restored.passed_over), (copy, Vec::<String>::new()));
    assert_eq!(fs::read(restored.aside.unwrap()).unwrap(), before);
    let (store, contents) = Store::open(&path).unwrap();
    assert_eq!((contents.node, contents.last_event), (Some(Uuid::from_u128(1)), 50));
    assert_eq!(store.events(0, 100).unwrap().len(), 50);
}

fn database_more(path: &Path, until: u64) {
    let (mut store, contents) = Store::open(path).unwrap();
    let more: Vec<_> = (contents.last_event + 1..=until).map(event).collect();
    store.commit(&more).unwrap();
}

#[test]
fn a_copy_that_is_damaged_itself_is_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    database(&path, 30);
    assert!(matches!(copies::restore(&path), Err(StoreError::NoCopy { .. })));
    let good = copies::make(&path).unwrap().unwrap();
    database_more(&path, 40);
    spoil(&copies::make(&path).unwrap().unwrap());
    let restored = copies::restore(&path).unwrap();
    assert_eq!((restored.copy, restored.passed_over.len()), (good, 1));
    assert_eq!(Store::open(&path).unwrap().1.last_event, 30);
}

#[test]
fn a_database_that_is_gone_is_not_begun_anew() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    database(&path, 3);
    copies::make(&path).unwrap();
    fs::write(&path, "").unwrap();
    assert!(matches!(Store::open(&path), Err(StoreError::Gone { .. })));
    fs::remove_file(&path).unwrap();
    assert!(matches!(Store::open(&path), Err(StoreError::Gone { .. })));
    assert!(!path.exists());
    copies::restore(&path).unwrap();
    assert_eq!(Store::open(&path).unwrap().1.last_event, 3);
}

#[test]
fn a_database_that_has_lost_its_log_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    database(&path, 3);
    // As after a kill: what is newest is in the log only.
    let (mut store, _) = Store::open(&path).unwrap();
    store.commit(&[event(4)]).unwrap();
    copies::make(&path).unwrap();
    for name in ["state.db", "copies"] {
        let (from, to) = (dir.path().join(name), dir.path().join(format!("as-it-was/{name}")));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::process::Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    }
    let lost = dir.path().join("as-it-was/state.db");
    let error = Store::open(&lost).unwrap_err();
    assert!(matches!(error, StoreError::Older { .. }), "{error:?}");
    copies::restore(&lost).unwrap();
    assert_eq!(Store::open(&lost).unwrap().1.last_event, 4);
}

#[test]
fn before_a_migration_there_is_a_copy_for_who_goes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.db");
    let old = Connection::open(&path).unwrap();
    old.execute_batch(include_str!("migrations/0001_first.sql")).unwrap();
    old.pragma_update(None, "user_version", 1).unwrap();
    drop(old);
    Store::open(&path).unwrap();
    let [copy] = &copies::list(&path)[..] else { panic!("{:?}", copies::list(&path)) };
    assert!(copy.ends_with("copies/before-0002.db"));
    let version: u32 =
        Connection::open(copy).unwrap().pragma_query_value(None, "user_version", |row| row.get(0)).unwrap();
    assert_eq!(version, 1);
    copies::restore(&path).unwrap();
    Store::open(&path).unwrap();
}
