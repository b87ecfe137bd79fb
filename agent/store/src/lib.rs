//! The node's state on disk: one SQLite file, written by one task of `seriod`.
//!
//! ```text
//!  state: Vec<Change> ──▶ Store::commit ──one transaction──▶ state.db (WAL, synchronous=FULL)
//!  start: Store::open ──▶ check ──▶ migrate ──▶ load ──▶ Contents
//! ```
//!
//! Owns: tables, migrations, the rows' types ([`record`]), copies of the file ([`copies`]).
//! Never: decisions. What a row means is the business of `seriod`'s state.
//! Invariants: a commit is whole or not there, and durable when it returns; a database of a newer schema, or a
//! damaged one, is refused and not touched.
//! Threads: a [`Store`] is used by one thread at a time.
#![forbid(unsafe_code)]

mod change;
pub mod copies;
mod error;
mod load;
pub mod meter;
pub mod record;
mod schema;

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension, params};
use uuid::Uuid;

pub use change::{Change, Key};
pub use error::{StoreError, WayBack};
pub use load::Contents;
use record::{EventRecord, RequestRecord};

/// Events that are kept; older ones go.
pub const EVENTS_MAX: u64 = 10_000;
/// How long a request id is known, milliseconds: one day.
pub const REQUEST_KEPT_MS: i64 = 24 * 60 * 60 * 1000;

/// The open database.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
    path: PathBuf,
}

impl Store {
    /// Opens the database, makes it if it is not there, and brings it to the newest schema.
    ///
    /// # Errors
    /// [`StoreError`]: damaged, newer than this program, full disk, no permission.
    pub fn open(path: &Path) -> Result<(Self, Contents), StoreError> {
        let at = |source| StoreError::from_sqlite(path, source);
        let copies = copies::list(path);
        let gone = || StoreError::Gone { path: path.to_owned(), way_back: WayBack::of(path) };
        // SQLite would take that for a new one, and a state without VMs ends all that run.
        let is_empty = std::fs::metadata(path).map_or(true, |found| found.len() == 0);
        if is_empty && !copies.is_empty() {
            return Err(gone());
        }
        let mut connection = Connection::open(path).map_err(at)?;
        schema::configure(&connection).map_err(at)?;
        copies::check_structure(&connection).map_err(at)?;
        // The log beside it (`-wal`) is read up to its first damage and no word is said of the rest.
        if schema::is_new(&connection).map_err(at)? && !copies.is_empty() {
            return Err(gone());
        }
        schema::migrate(&mut connection, path)?;
        let store = Self { connection, path: path.to_owned() };
        let contents = load::load(&store.connection).map_err(|source| StoreError::from_load(path, source))?;
        if let Some(copy) = copies.into_iter().next()
            && copies::newest_event(&copy).is_some_and(|newest| newest > contents.last_event)
        {
            return Err(StoreError::Older { path: path.to_owned(), copy, way_back: WayBack::of(path) });
        }
        Ok((store, contents))
    }

    fn error(&self, source: rusqlite::Error) -> StoreError {
        StoreError::from_sqlite(&self.path, source)
    }

    /// Writes all changes, or none; they are on the disk when it returns.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing was written.
    pub fn commit(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        if changes.is_empty() {
            return Ok(());
        }
        write(&mut self.connection, changes).map_err(|source| self.error(source))
    }

    /// Events from a number on, at most `limit`, in order.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn events(&self, from: u64, limit: u32) -> Result<Vec<EventRecord>, StoreError> {
        load::events(&self.connection, from, limit).map_err(|source| self.error(source))
    }

    /// The request of that id, if it is still known.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn request(&self, id: Uuid) -> Result<Option<RequestRecord>, StoreError> {
        self.connection
            .prepare_cached("SELECT id, method, digest, resource, time_ms FROM requests WHERE id = ?1")
            .and_then(|mut statement| statement.query_row(params![id.to_string()], load::request).optional())
            .map_err(|source| self.error(source))
    }
}

fn write(connection: &mut Connection, changes: &[Change]) -> Result<(), rusqlite::Error> {
    let transaction = connection.transaction()?;
    for change in changes {
        change.write(&transaction)?;
    }
    transaction.commit()
}

#[cfg(test)]
mod copies_test;
#[cfg(test)]
mod store_test;
