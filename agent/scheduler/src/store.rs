//! What survives: one SQLite file in the state folder, WAL, full sync. Written by the owner thread only.
//!
//! ```text
//! meta(key, value)                                    format, scheduler_id
//! nodes(name, hello, inventory, allocations, seen)    protobuf messages; seen in seconds since 1970
//! ```
//! Usage and leases are not here: after a restart they would be lies.

use std::{
    io,
    path::{Path, PathBuf},
};

use pbjson_types::Timestamp;
use prost::Message;
use rusqlite::{Connection, OptionalExtension, params};
use serio_types::Name;

use crate::inventory::Durable;

/// Of the file; a newer one is refused.
const FORMAT: &str = "1";

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder cannot be made.
    #[error("cannot make the state folder {path}")]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// SQLite says no.
    #[error("the database of the scheduler")]
    Database(#[from] rusqlite::Error),
    /// Made by a newer version.
    #[error("the state has format {found}, this version knows {FORMAT}: run the newer scheduler again")]
    Format {
        /// In the file.
        found: String,
    },
    /// A row that is no node.
    #[error(
        "the record of node {name} cannot be read: delete its row from the table nodes, the node will report again"
    )]
    Row {
        /// As in the row.
        name: String,
    },
}

/// The open database.
#[derive(Debug)]
pub struct Store {
    connection: Connection,
}

impl Store {
    /// Opens or makes `scheduler.db` in that folder.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        std::fs::create_dir_all(folder)
            .map_err(|source| StoreError::Folder { path: folder.to_owned(), source })?;
        let connection = Connection::open(folder.join("scheduler.db"))?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.execute_batch(
            "BEGIN IMMEDIATE;
             CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
             CREATE TABLE IF NOT EXISTS nodes (
                 name TEXT PRIMARY KEY, hello BLOB NOT NULL, inventory BLOB, allocations BLOB, seen INTEGER NOT NULL
             ) STRICT;
             COMMIT;",
        )?;
        let store = Self { connection };
        let found = store.meta("format", || FORMAT.to_owned())?;
        if found == FORMAT { Ok(store) } else { Err(StoreError::Format { found }) }
    }

    /// The id of this scheduler, made once.
    pub fn scheduler_id(&self) -> Result<String, StoreError> {
        self.meta("scheduler_id", || uuid::Uuid::new_v4().to_string())
    }

    fn meta(&self, key: &str, make: impl FnOnce() -> String) -> Result<String, StoreError> {
        let found = self
            .connection
            .query_row("SELECT value FROM meta WHERE key = ?1", [key], |row| row.get(0))
            .optional()?;
        if let Some(value) = found {
            return Ok(value);
        }
        let value = make();
        self.connection.execute("INSERT INTO meta (key, value) VALUES (?1, ?2)", [key, &value])?;
        Ok(value)
    }

    /// All nodes.
    pub fn load(&self) -> Result<Vec<(Name, Durable)>, StoreError> {
        let mut statement = self
            .connection
            .prepare("SELECT name, hello, inventory, allocations, seen FROM nodes ORDER BY name")?;
        let rows = statement.query_map([], |row| {
            Ok((
                row.get::<_, String>(0)?,
                row.get::<_, Vec<u8>>(1)?,
                row.get::<_, Option<Vec<u8>>>(2)?,
                row.get(3)?,
                row.get(4)?,
            ))
        })?;
        let mut nodes = Vec::new();
        for row in rows {
            let (name, hello, inventory, allocations, seen): (String, _, _, Option<Vec<u8>>, i64) = row?;
            let bad = || StoreError::Row { name: name.clone() };
            let durable = Durable {
                hello: decode(&hello).ok_or_else(bad)?,
                inventory: inventory.as_deref().map(decode).map(|i| i.ok_or_else(bad)).transpose()?,
                allocations: allocations.as_deref().map(decode).map(|a| a.ok_or_else(bad)).transpose()?,
                last_seen: Timestamp { seconds: seen, nanos: 0 },
            };
            nodes.push((name.parse().map_err(|_| bad())?, durable));
        }
        Ok(nodes)
    }

    /// Writes one node; on disk when it returns.
    pub fn save(&self, name: &Name, node: &Durable) -> Result<(), StoreError> {
        self.connection.execute(
            "INSERT INTO nodes (name, hello, inventory, allocations, seen) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (name) DO UPDATE SET hello = ?2, inventory = ?3, allocations = ?4, seen = ?5",
            params![
                name.as_str(),
                node.hello.encode_to_vec(),
                node.inventory.as_ref().map(Message::encode_to_vec),
                node.allocations.as_ref().map(Message::encode_to_vec),
                node.last_seen.seconds,
            ],
        )?;
        Ok(())
    }

    /// Removes one node.
    pub fn remove(&self, name: &Name) -> Result<(), StoreError> {
        self.connection.execute("DELETE FROM nodes WHERE name = ?1", [name.as_str()])?;
        Ok(())
    }
}

fn decode<M: Message + Default>(bytes: &[u8]) -> Option<M> {
    M::decode(bytes).ok()
}

#[cfg(test)]
mod tests {
    use serio_api::v1::{Allocations, Hello, Inventory};

    use super::*;

    #[test]
    fn what_is_saved_is_there_after_opening_again() {
        let dir = tempfile::tempdir().unwrap();
        let name: Name = "a".parse().unwrap();
        let node = Durable {
            hello: Hello { node_id: "a".into(), site: "milano".into(), ..Hello::default() },
            inventory: Some(Inventory { generation: 7, ..Inventory::default() }),
            allocations: Some(Allocations { digest: "d".into(), complete: true, ..Allocations::default() }),
            last_seen: Timestamp { seconds: 1_700_000_000, nanos: 0 },
        };
        let store = Store::open(dir.path()).unwrap();
        let id = store.scheduler_id().unwrap();
        store.save(&name, &Durable::default()).unwrap();
        store.save(&name, &node).unwrap();
        drop(store);
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.scheduler_id().unwrap(), id);
        assert_eq!(store.load().unwrap(), [(name.clone(), node)]);
        store.remove(&name).unwrap();
        assert!(store.load().unwrap().is_empty());
    }

    #[test]
    fn a_newer_format_and_a_broken_row_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.connection.execute("INSERT INTO nodes VALUES ('a', x'ff', NULL, NULL, 0)", []).unwrap();
        assert!(matches!(store.load(), Err(StoreError::Row { name }) if name == "a"));
        store.connection.execute("UPDATE meta SET value = '2' WHERE key = 'format'", []).unwrap();
        drop(store);
        assert!(matches!(Store::open(dir.path()), Err(StoreError::Format { .. })));
    }
}
