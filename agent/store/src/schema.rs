//! The schema's versions. One file each; a released one is never edited.

use std::{path::Path, time::Duration};

use rusqlite::Connection;

use crate::{StoreError, WayBack, copies};

/// In order; the schema's version (`PRAGMA user_version`) is how many of them were run.
const MIGRATIONS: [&str; 8] = [
    include_str!("migrations/0001_first.sql"),
    include_str!("migrations/0002_operations.sql"),
    include_str!("migrations/0003_encryption.sql"),
    include_str!("migrations/0004_kernel.sql"),
    include_str!("migrations/0005_orders.sql"),
    include_str!("migrations/0006_vdc_limits.sql"),
    include_str!("migrations/0007_vm_snapshots.sql"),
    include_str!("migrations/0008_clock.sql"),
];

/// How long a lock of another program (a backup, `sqlite3`) is waited for.
const BUSY: Duration = Duration::from_secs(5);

pub(crate) fn configure(connection: &Connection) -> Result<(), rusqlite::Error> {
    connection.busy_timeout(BUSY)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // FULL: each commit is synced. A VM whose record was lost would be an orphan after a power cut.
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", "ON")?;
    // The state is small: a small page cache keeps the idle daemon small.
    connection.pragma_update(None, "cache_size", -512)?;
    connection.set_prepared_statement_cache_capacity(32);
    Ok(())
}

fn version(connection: &Connection) -> Result<u32, rusqlite::Error> {
    connection.pragma_query_value(None, "user_version", |row| row.get(0))
}

/// Whether there is nothing in it yet.
pub(crate) fn is_new(connection: &Connection) -> Result<bool, rusqlite::Error> {
    version(connection).map(|version| version == 0)
}

fn known() -> u32 {
    u32::try_from(MIGRATIONS.len()).unwrap_or(u32::MAX)
}

/// Whether it has this program's schema; an older one has not.
pub(crate) fn is_current(connection: &Connection, path: &Path) -> Result<bool, StoreError> {
    let found = version(connection).map_err(|source| StoreError::from_sqlite(path, source))?;
    if found > known() {
        return Err(newer(path, found));
    }
    Ok(found == known())
}

fn newer(path: &Path, found: u32) -> StoreError {
    StoreError::Newer { path: path.to_owned(), way_back: WayBack::of(path), found, known: known() }
}

pub(crate) fn migrate(connection: &mut Connection, path: &Path) -> Result<(), StoreError> {
    let at = |source| StoreError::from_sqlite(path, source);
    let found = version(connection).map_err(at)?;
    if found > known() {
        return Err(newer(path, found));
    }
    if found > 0 && found < known() {
        copies::before_migration(connection, path, found.saturating_add(1))?;
    }
    for (number, sql) in (1_u32..).zip(MIGRATIONS).filter(|(number, _)| *number > found) {
        // One transaction a step, with the version: a step is never half done.
        let transaction = connection.transaction().map_err(at)?;
        transaction.execute_batch(sql).map_err(at)?;
        transaction.pragma_update(None, "user_version", number).map_err(at)?;
        transaction.commit().map_err(at)?;
    }
    Ok(())
}
