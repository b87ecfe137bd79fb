//! Why the database cannot be used, and what to do.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use rusqlite::ErrorCode;

use crate::copies;

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
    #[error("{path} is damaged, and was not touched: {way_back}")]
    Damaged {
        /// The database.
        path: PathBuf,
        /// What to do.
        way_back: WayBack,
        /// SQLite's word.
        #[source]
        source: rusqlite::Error,
    },
    /// Not there, or empty, though it was not always so.
    #[error("{path} is empty or gone, though there are copies of it: {way_back}")]
    Gone {
        /// The database.
        path: PathBuf,
        /// What to do.
        way_back: WayBack,
    },
    /// It has forgotten what a copy of it knows.
    #[error(
        "{path} is older than its copy {copy}, so the newest changes were lost: {way_back}; is it meant to be older, move the \
         copies away"
    )]
    Older {
        /// The database.
        path: PathBuf,
        /// The copy.
        copy: PathBuf,
        /// What to do.
        way_back: WayBack,
    },
    /// A value in it makes no sense.
    #[error("{path} has a row in {table} that cannot be read ({what}): {way_back}")]
    Row {
        /// The database.
        path: PathBuf,
        /// What to do.
        way_back: WayBack,
        /// Its table.
        table: &'static str,
        /// Which value.
        what: String,
    },
    /// Written by a newer program.
    #[error(
        "{path} has schema {found}, this seriod knows up to {known}: install the newer seriod again, or go back to how it was before the upgrade: {way_back}"
    )]
    Newer {
        /// The database.
        path: PathBuf,
        /// What to do.
        way_back: WayBack,
        /// Its schema.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// A copy of the database cannot be written.
    #[error("the disk of {path} is full, so there is no copy of the database there: free some space")]
    NoRoomForCopy {
        /// The copy.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// A copy of the database cannot be made or put back.
    #[error("cannot use {path}, a copy of the database")]
    Copy {
        /// The file.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// There is nothing to put back.
    #[error(
        "there is no copy in {dir} that this seriod can use: restore the database from a backup of your own"
    )]
    NoCopy {
        /// Where copies are.
        dir: PathBuf,
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

/// What to do about a database that cannot be used: put a copy in its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WayBack(Option<PathBuf>);

impl WayBack {
    pub(crate) fn of(database: &Path) -> Self {
        Self(copies::list(database).into_iter().next())
    }
}

impl fmt::Display for WayBack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(copy) => write!(
                f,
                "`seriod --restore-state` (with the same --config) puts its newest good copy back, by name {}; what was made after \
                 that was taken is not in it: such VMs would be ended, the files of such volumes stay",
                copy.display()
            ),
            None => f.write_str(
                "there is no copy of it yet: restore it from a backup, or move it away to start empty (running VMs would then be ended)",
            ),
        }
    }
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
            Some(ErrorCode::DatabaseCorrupt | ErrorCode::NotADatabase) => {
                Self::Damaged { way_back: WayBack::of(&path), path, source }
            }
            Some(ErrorCode::CannotOpen | ErrorCode::PermissionDenied | ErrorCode::ReadOnly) => {
                Self::Access { path, source }
            }
            _ => Self::Sqlite { path, source },
        }
    }

    pub(crate) fn from_load(path: &Path, error: LoadError) -> Self {
        match error {
            LoadError::Sqlite(source) => Self::from_sqlite(path, source),
            LoadError::Row { table, what } => {
                Self::Row { path: path.to_owned(), way_back: WayBack::of(path), table, what }
            }
        }
    }

    /// Whether there is no room.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. } | Self::NoRoomForCopy { .. })
    }
}
