//! Copies of the database that it has of itself: what a damaged one is put back from.
//!
//! ```text
//!  state.db ──VACUUM INTO──▶ copies/new ──read back whole, synced──▶ copies/state-000012.db    now and then, if it has changed
//!                                                               └──▶ copies/before-0008.db     before that migration
//! ```
//!
//! Owns: the folder `copies` beside the database; [`KEPT`] copies of each kind stay. Never: when a copy is made, and never puts one
//! back by itself: what was promised after it was taken is not in it, which somebody must know.
//! Invariants: a copy was whole when it was made, so a damaged database never replaces a good copy; at any moment of putting one
//! back there is a file under the database's name, since an empty state would end what runs.
//! Threads: any, one at a time; a copy needs a connection of its own and stops nobody who writes.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use rusqlite::{Connection, OpenFlags, ffi};

use crate::{StoreError, load, schema};

/// Copies that stay, of each kind.
pub const KEPT: usize = 3;

/// Made now and then; the number counts up, whatever the clock says.
const NOW_AND_THEN: &str = "state-";
/// Made before the migration of that number.
const BEFORE: &str = "before-";

fn dir(database: &Path) -> PathBuf {
    database.with_file_name("copies")
}

fn beside(database: &Path, suffix: &str) -> PathBuf {
    let mut name = database.file_name().unwrap_or_default().to_owned();
    name.push(suffix);
    database.with_file_name(name)
}

fn number(path: &Path, kind: &str) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix(kind)?.strip_suffix(".db")?.parse().ok()
}

/// Those of one kind, newest first.
fn of_kind(database: &Path, kind: &str) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(dir(database)).into_iter().flatten().flatten();
    let mut found: Vec<_> =
        entries.map(|entry| entry.path()).filter_map(|path| Some((number(&path, kind)?, path))).collect();
    found.sort_unstable_by(|a, b| b.cmp(a));
    found
}

/// The copies that there are, newest first; those of before a migration come last.
#[must_use]
pub fn list(database: &Path) -> Vec<PathBuf> {
    let all = [NOW_AND_THEN, BEFORE].into_iter().flat_map(|kind| of_kind(database, kind));
    all.map(|(_, path)| path).collect()
}

/// Makes a copy of a database that may be in use. `None`: nothing has changed since the newest one.
///
/// # Errors
/// [`StoreError`]: damaged, no room. The copies that there were are left.
pub fn make(database: &Path) -> Result<Option<PathBuf>, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let at = |source| StoreError::from_sqlite(database, source);
    let connection = Connection::open_with_flags(database, flags).map_err(at)?;
    schema::configure(&connection).map_err(at)?;
    let fresh = take(&connection, database)?;
    let known = of_kind(database, NOW_AND_THEN);
    let newest = known.first();
    if let Some((_, path)) = newest
        && same(path, &fresh).map_err(|source| failed(path, source))?
    {
        fs::remove_file(&fresh).map_err(|source| failed(&fresh, source))?;
        return Ok(None);
    }
    let next = newest.map_or(1, |(number, _)| number.saturating_add(1));
    keep(database, &fresh, NOW_AND_THEN, format!("{next:06}")).map(Some)
}

/// Makes the copy that is there for whoever goes back to the seriod of before.
pub(crate) fn before_migration(
    connection: &Connection,
    database: &Path,
    number: u32,
) -> Result<PathBuf, StoreError> {
    let fresh = take(connection, database)?;
    keep(database, &fresh, BEFORE, format!("{number:04}"))
}

fn failed(path: &Path, source: io::Error) -> StoreError {
    match source.kind() {
        io::ErrorKind::StorageFull => StoreError::NoRoomForCopy { path: path.to_owned(), source },
        _ => StoreError::Copy { path: path.to_owned(), source },
    }
}

/// A copy under no name that counts, read back and synced.
fn take(connection: &Connection, database: &Path) -> Result<PathBuf, StoreError> {
    let dir = dir(database);
    fs::create_dir_all(&dir).map_err(|source| failed(&dir, source))?;
    let fresh = dir.join("new");
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(&fresh, error)),
        _ => {}
    }
    let name = fresh.to_string_lossy();
    // An index is not read but built anew: that it is damaged would not be noticed.
    let copied =
        check_structure(connection).and_then(|()| connection.execute("VACUUM INTO ?1", [name.as_ref()]));
    let kept = copied.map_err(|source| StoreError::from_sqlite(database, source)).and_then(|_| {
        check(&fresh)?;
        File::open(&fresh).and_then(|file| file.sync_all()).map_err(|source| failed(&fresh, source))
    });
    if kept.is_err() {
        // On a full disk its room is needed.
        let _ = fs::remove_file(&fresh);
    }
    kept.map(|()| fresh)
}

/// Gives a copy its name, and drops the oldest of its kind.
fn keep(database: &Path, fresh: &Path, kind: &str, number: String) -> Result<PathBuf, StoreError> {
    let path = dir(database).join(format!("{kind}{number}.db"));
    fs::rename(fresh, &path).map_err(|source| failed(&path, source))?;
    sync_dir(&path).map_err(|source| failed(&path, source))?;
    for (_, old) in of_kind(database, kind).into_iter().skip(KEPT) {
        fs::remove_file(&old).map_err(|source| failed(&old, source))?;
    }
    Ok(path)
}

fn same(a: &Path, b: &Path) -> io::Result<bool> {
    Ok(fs::metadata(a)?.len() == fs::metadata(b)?.len() && fs::read(a)? == fs::read(b)?)
}

fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
}

/// Reads a database whole.
pub(crate) fn check_structure(connection: &Connection) -> Result<(), rusqlite::Error> {
    let word: String = connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    if word == "ok" {
        return Ok(());
    }
    Err(rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_CORRUPT), Some(word)))
}

/// Whether a copy can be put in the database's place for this program.
fn check(copy: &Path) -> Result<(), StoreError> {
    let at = |source| StoreError::from_sqlite(copy, source);
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(copy, flags).map_err(at)?;
    check_structure(&connection).map_err(at)?;
    // An older one is brought to this schema first, when it is opened in its place.
    if schema::is_current(&connection, copy)? {
        load::load(&connection).map_err(|source| StoreError::from_load(copy, source))?;
    }
    Ok(())
}

/// The newest event in a copy; none if it cannot be read.
pub(crate) fn newest_event(copy: &Path) -> Option<u64> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(copy, flags).ok()?;
    let newest = connection.query_row("SELECT coalesce(max(number), 0) FROM events", [], |row| row.get(0));
    newest.ok().and_then(|number: i64| u64::try_from(number).ok())
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// What is in the database's place now.
    pub copy: PathBuf,
    /// Where the damaged one is; none if there was none.
    pub aside: Option<PathBuf>,
    /// Newer copies that could not be used, and why.
    pub passed_over: Vec<String>,
}

/// Puts the newest copy that is whole in the database's place; what was there is kept beside it. Nobody may have it open.
///
/// # Errors
/// [`StoreError`]: there is no such copy, no room; then the database is as it was.
pub fn restore(database: &Path) -> Result<Restored, StoreError> {
    let mut passed_over = Vec::new();
    let copy = list(database).into_iter().find(|copy| match check(copy) {
        Ok(()) => true,
        Err(error) => {
            passed_over.push(error.to_string());
            false
        }
    });
    let copy = copy.ok_or_else(|| StoreError::NoCopy { dir: dir(database) })?;
    let coming = beside(database, ".restoring");
    fs::copy(&copy, &coming)
        .and_then(|_| File::open(&coming)?.sync_all())
        .map_err(|source| failed(&coming, source))?;
    let aside = put_aside(database)?;
    fs::rename(&coming, database)
        .and_then(|()| sync_dir(database))
        .map_err(|source| failed(database, source))?;
    Ok(Restored { copy, aside, passed_over })
}

/// Gives the damaged database a second name, and takes its log away: it would be played into the copy.
fn put_aside(database: &Path) -> Result<Option<PathBuf>, StoreError> {
    let mut aside = None;
    for number in 1_u32.. {
        let path = beside(database, &format!(".damaged-{number}"));
        match fs::hard_link(database, &path) {
            Ok(()) => aside = Some(path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(&path, error)),
        }
        break;
    }
    // A log without its database is of no use, but it is not ours to throw away.
    let kept = aside.clone().unwrap_or_else(|| beside(database, ".damaged"));
    for suffix in ["-wal", "-shm"] {
        let (from, to) = (beside(database, suffix), beside(&kept, suffix));
        match fs::rename(&from, &to) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(&from, error)),
            _ => {}
        }
    }
    Ok(aside)
}
