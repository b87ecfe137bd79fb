//! Why the database cannot be used, and what to do.

use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;

/// Why the store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No room.
    #[error("the disk of {path} is full: free some space, then try again; nothing was changed")]
    Full {
        /// The database.
        path: PathBuf,
        /// SQLite's word.
        #[source]
        source: rusqlite::Error,
    },
    /// Not a database, or broken.
    #[error(
        "{path} is damaged: restore it from a backup, or move it away to start empty (running VMs would then be ended)"
    )]
    Damaged {
        /// The database.
        path: PathBuf,
        /// SQLite's word.
        #[source]
        source: rusqlite::Error,
    },
    /// A value in it makes no sense.
    #[error("{path} has a row in {table} that cannot be read ({what}): restore it from a backup")]
    Row {
        /// The database.
        path: PathBuf,
        /// Its table.
        table: &'static str,
        /// Which value.
        what: String,
    },
    /// Written by a newer program.
    #[error(
        "{path} has schema {found}, this seriod knows up to {known}: install the newer seriod again, or restore the backup made before the upgrade"
    )]
    Newer {
        /// The database.
        path: PathBuf,
        /// Its schema.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// Cannot be opened or written.
    #[error("cannot use the database {path}: check that its directory exists and is writable")]
    Access {
        /// The database.
        path: PathBuf,
        /// SQLite's word.
        #[source]
        source: rusqlite::Error,
    },
    /// Anything else.
    #[error("the database {path} failed")]
    Sqlite {
        /// The database.
        path: PathBuf,
        /// SQLite's word.
        #[source]
        source: rusqlite::Error,
    },
}

/// Why loading failed.
pub(crate) enum LoadError {
    /// SQLite.
    Sqlite(rusqlite::Error),
    /// A value.
    Row { table: &'static str, what: String },
}

impl From<rusqlite::Error> for LoadError {
    fn from(source: rusqlite::Error) -> Self {
        Self::Sqlite(source)
    }
}

impl StoreError {
    pub(crate) fn from_sqlite(path: &Path, source: rusqlite::Error) -> Self {
        let path = path.to_owned();
        match source.sqlite_error_code() {
            Some(ErrorCode::DiskFull) => Self::Full { path, source },
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => Self::Damaged { path, source },
            Some(ErrorCode::CannotOpen | ErrorCode::PermissionDenied | ErrorCode::ReadOnly) => {
                Self::Access { path, source }
            }
            _ => Self::Sqlite { path, source },
        }
    }

    pub(crate) fn from_load(path: &Path, error: LoadError) -> Self {
        match error {
            LoadError::Sqlite(source) => Self::from_sqlite(path, source),
            LoadError::Row { table, what } => Self::Row { path: path.to_owned(), table, what },
        }
    }

    /// Whether there is no room.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. })
    }
}
