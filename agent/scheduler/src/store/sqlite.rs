//! The embedded store: one SQLite file in the state folder, WAL, full sync. A batch is one transaction.
//!
//! ```text
//! meta(key, value)            format, scheduler_id
//! records(kind, key, value)   see the head of the module above
//! ```
//! Format 1 had a table of nodes only; it is brought over when it is opened.

use std::path::Path;

use pbjson_types::Timestamp;
use prost::Message;
use rusqlite::{Connection, OptionalExtension, params};
use serio_api::v1::{Allocations, Hello, Inventory};
use serio_types::Name;

use super::{Backend, Change, Kind, StoreError, record_of};
use crate::inventory::Durable;

/// Of the file; a newer one is refused.
const FORMAT: &str = "2";

/// The open database.
#[derive(Debug)]
pub struct Sqlite {
    connection: Connection,
}

impl Sqlite {
    /// Opens or makes `scheduler.db` in that folder.
    ///
    /// # Errors
    /// When it cannot be made, is none, or was made by a newer version.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        std::fs::create_dir_all(folder)
            .map_err(|source| StoreError::Folder { path: folder.to_owned(), source })?;
        let connection = Connection::open(folder.join("scheduler.db"))?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        connection.execute_batch(
            "BEGIN IMMEDIATE;
             CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
             CREATE TABLE IF NOT EXISTS records (
                 kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (kind, key)
             ) STRICT, WITHOUT ROWID;
             COMMIT;",
        )?;
        let mut store = Self { connection };
        match store.meta("format", || FORMAT.to_owned())?.as_str() {
            FORMAT => {}
            "1" => store.bring_over()?,
            found => return Err(StoreError::Format { found: found.to_owned(), known: FORMAT }),
        }
        Ok(store)
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

    /// From format 1, in one transaction.
    fn bring_over(&mut self) -> Result<(), StoreError> {
        let transaction = self.connection.transaction()?;
        {
            let mut statement =
                transaction.prepare("SELECT name, hello, inventory, allocations, seen FROM nodes")?;
            let mut rows = statement.query([])?;
            while let Some(row) = rows.next()? {
                let key: String = row.get(0)?;
                let bad = || StoreError::Row { kind: "nodes".to_owned(), key: key.clone() };
                let (inventory, allocations): (Option<Vec<u8>>, Option<Vec<u8>>) = (row.get(2)?, row.get(3)?);
                let node = Durable {
                    hello: Hello::decode(row.get::<_, Vec<u8>>(1)?.as_slice()).map_err(|_| bad())?,
                    inventory: inventory
                        .map(|bytes| Inventory::decode(bytes.as_slice()).map_err(|_| bad()))
                        .transpose()?,
                    allocations: allocations
                        .map(|bytes| Allocations::decode(bytes.as_slice()).map_err(|_| bad()))
                        .transpose()?,
                    last_seen: Timestamp { seconds: row.get(4)?, nanos: 0 },
                    fence: None,
                };
                let name: Name = key.parse().map_err(|_| bad())?;
                transaction.execute(
                    "INSERT OR REPLACE INTO records (kind, key, value) VALUES ('nodes', ?1, ?2)",
                    params![key, record_of(&name, &node).encode_to_vec()],
                )?;
            }
        }
        transaction.execute_batch("DROP TABLE nodes;")?;
        transaction.execute("UPDATE meta SET value = ?1 WHERE key = 'format'", [FORMAT])?;
        Ok(transaction.commit()?)
    }
}

impl Backend for Sqlite {
    fn load(&mut self) -> Result<Vec<Change>, StoreError> {
        let mut statement =
            self.connection.prepare("SELECT kind, key, value FROM records ORDER BY kind, key")?;
        let mut rows = statement.query([])?;
        let mut records = Vec::new();
        while let Some(row) = rows.next()? {
            let (kind, key): (String, String) = (row.get(0)?, row.get(1)?);
            let Some(kind) = Kind::parse(&kind) else { return Err(StoreError::Row { kind, key }) };
            records.push(Change { kind, key, value: Some(row.get(2)?) });
        }
        Ok(records)
    }

    fn write(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        let transaction = self.connection.transaction()?;
        {
            let mut put = transaction
                .prepare_cached("INSERT OR REPLACE INTO records (kind, key, value) VALUES (?1, ?2, ?3)")?;
            let mut remove =
                transaction.prepare_cached("DELETE FROM records WHERE kind = ?1 AND key = ?2")?;
            for change in changes {
                match &change.value {
                    Some(value) => put.execute(params![change.kind.name(), change.key, value])?,
                    None => remove.execute(params![change.kind.name(), change.key])?,
                };
            }
        }
        Ok(transaction.commit()?)
    }

    fn scheduler_id(&mut self) -> Result<String, StoreError> {
        self.meta("scheduler_id", || uuid::Uuid::new_v4().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::{super::State, *};

    fn change(key: &str, value: Option<&[u8]>) -> Change {
        Change { kind: Kind::Plan, key: key.into(), value: value.map(<[u8]>::to_vec) }
    }

    #[test]
    fn what_is_written_is_there_after_opening_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Sqlite::open(dir.path()).unwrap();
        let id = store.scheduler_id().unwrap();
        store.write(&[change("a", Some(b"1")), change("b", Some(b"2")), change("a", Some(b"3"))]).unwrap();
        store.write(&[change("b", None), change("never", None)]).unwrap();
        drop(store);
        let mut store = Sqlite::open(dir.path()).unwrap();
        assert_eq!(store.scheduler_id().unwrap(), id);
        assert_eq!(store.load().unwrap(), [change("a", Some(b"3"))]);
    }

    #[test]
    fn a_newer_format_and_a_broken_row_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Sqlite::open(dir.path()).unwrap();
        store.write(&[Change { kind: Kind::Node, key: "a".into(), value: Some(vec![0xff]) }]).unwrap();
        let records = store.load().unwrap();
        assert!(matches!(State::decode(&records), Err(StoreError::Row { key, .. }) if key == "a"));
        store.connection.execute("UPDATE meta SET value = '3' WHERE key = 'format'", []).unwrap();
        drop(store);
        assert!(matches!(Sqlite::open(dir.path()), Err(StoreError::Format { .. })));
    }

    #[test]
    fn the_first_format_is_brought_over() {
        let dir = tempfile::tempdir().unwrap();
        let connection = Connection::open(dir.path().join("scheduler.db")).unwrap();
        connection
            .execute_batch(
                "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
                 INSERT INTO meta VALUES ('format', '1'), ('scheduler_id', 'me');
                 CREATE TABLE nodes (
                     name TEXT PRIMARY KEY, hello BLOB NOT NULL, inventory BLOB, allocations BLOB, seen INTEGER NOT NULL
                 ) STRICT;",
            )
            .unwrap();
        let hello = Hello { node_id: "a".into(), site: "milano".into(), ..Hello::default() };
        let inventory = Inventory { generation: 7, ..Inventory::default() };
        connection
            .execute(
                "INSERT INTO nodes VALUES ('a', ?1, ?2, NULL, 1700000000)",
                params![hello.encode_to_vec(), inventory.encode_to_vec()],
            )
            .unwrap();
        drop(connection);
        for _ in 0..2 {
            let mut store = Sqlite::open(dir.path()).unwrap();
            assert_eq!(store.scheduler_id().unwrap(), "me");
            let state = State::decode(&store.load().unwrap()).unwrap();
            let (name, node) = state.nodes.first().unwrap();
            assert_eq!((name.as_str(), node.hello.site.as_str()), ("a", "milano"));
            assert_eq!(node.inventory.as_ref().unwrap().generation, 7);
            assert_eq!(node.last_seen.seconds, 1_700_000_000);
        }
    }
}
