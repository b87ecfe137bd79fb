//! Node state in SQLite: tables and migrations.
#![forbid(unsafe_code)]
