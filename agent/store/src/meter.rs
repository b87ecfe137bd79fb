//! The meter's own database (`meter.db`): what each vdc has used, hour by hour, and in all.
//!
//! ```text
//!   hours  (vdc, hour)  what was added in that hour of the wall clock, UTC
//!   totals (vdc)        the sum since the vdc was made: never goes back, also when old hours go
//!   carry               what the sources showed at the last look, so that the next look goes on from there
//! ```
//!
//! A look is one transaction: hours, totals and carry agree at every instant, whoever dies. Apart from `state.db`, so that a
//! look never makes a client wait, and a damaged meter never keeps a VM from starting.
//! Threads: used by one at a time.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension, Transaction, params};
use serde::{Deserialize, Serialize};
use serio_types::Name;
use uuid::Uuid;

use crate::{StoreError, error::LoadError, schema};

/// Hours that are kept: 13 months.
pub const HOURS_KEPT: u32 = 24 * (365 + 32);

const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS hours (
    vdc TEXT NOT NULL, name TEXT NOT NULL, hour INTEGER NOT NULL, amounts TEXT NOT NULL, PRIMARY KEY (vdc, hour)
) STRICT;
CREATE INDEX IF NOT EXISTS hours_by_hour ON hours (hour);
CREATE TABLE IF NOT EXISTS totals (vdc TEXT PRIMARY KEY, name TEXT NOT NULL, amounts TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS carry (id INTEGER PRIMARY KEY CHECK (id = 1), state TEXT NOT NULL) STRICT;
";

/// What was used. All only ever grow; `None` is not measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Amounts {
    /// Time that was looked at.
    pub metered_ms: u64,
    /// Vcpus of running VMs × time.
    pub vcpu_ms: u64,
    /// Processor time of VMs' processes.
    pub cpu_us: u64,
    /// Memory of running VMs' guests × time, MiB × s.
    pub memory_mib_s: u64,
    /// Volumes as provisioned × time, MiB × s.
    pub storage_mib_s: u64,
    /// Bytes that VMs' processes read from disks.
    pub read_bytes: u64,
    /// And wrote.
    pub write_bytes: u64,
    /// Reads that reached a disk.
    pub read_ops: Option<u64>,
    /// And writes.
    pub write_ops: Option<u64>,
    /// Bytes to the guests.
    pub net_rx_bytes: u64,
    /// Bytes from the guests.
    pub net_tx_bytes: u64,
    /// Millijoules.
    pub energy_mj: Option<u64>,
    /// Milligrams of CO2.
    pub carbon_mg: Option<u64>,
}

fn sum(a: Option<u64>, b: Option<u64>) -> Option<u64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.saturating_add(b)),
        (one, other) => one.or(other),
    }
}

impl Amounts {
    /// Adds; saturates.
    #[must_use]
    pub fn plus(self, more: Self) -> Self {
        Self {
            metered_ms: self.metered_ms.saturating_add(more.metered_ms),
            vcpu_ms: self.vcpu_ms.saturating_add(more.vcpu_ms),
            cpu_us: self.cpu_us.saturating_add(more.cpu_us),
            memory_mib_s: self.memory_mib_s.saturating_add(more.memory_mib_s),
            storage_mib_s: self.storage_mib_s.saturating_add(more.storage_mib_s),
            read_bytes: self.read_bytes.saturating_add(more.read_bytes),
            write_bytes: self.write_bytes.saturating_add(more.write_bytes),
            read_ops: sum(self.read_ops, more.read_ops),
            write_ops: sum(self.write_ops, more.write_ops),
            net_rx_bytes: self.net_rx_bytes.saturating_add(more.net_rx_bytes),
            net_tx_bytes: self.net_tx_bytes.saturating_add(more.net_tx_bytes),
            energy_mj: sum(self.energy_mj, more.energy_mj),
            carbon_mg: sum(self.carbon_mg, more.carbon_mg),
        }
    }
}

/// What a vdc used in an hour, or in all (then `hour` is 0).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UsageRow {
    /// The vdc.
    pub vdc: Uuid,
    /// Its name; another vdc may have had it before.
    pub name: Name,
    /// Hours since 1970, UTC.
    pub hour: i64,
    /// How much.
    pub amounts: Amounts,
}

/// The open database.
#[derive(Debug)]
pub struct MeterStore {
    connection: Connection,
    path: PathBuf,
    /// The hour that was written last: old ones are looked for when it changes.
    hour: i64,
}

impl MeterStore {
    /// Opens the database; makes it if it is not there.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let at = |source| StoreError::from_sqlite(path, source);
        let connection = Connection::open(path).map_err(at)?;
        schema::configure(&connection).map_err(at)?;
        connection.execute_batch(SCHEMA).map_err(at)?;
        Ok(Self { connection, path: path.to_owned(), hour: i64::MIN })
    }

    fn error(&self, error: LoadError) -> StoreError {
        StoreError::from_load(&self.path, error)
    }

    /// What the last look left, if there was one.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn carry(&self) -> Result<Option<String>, StoreError> {
        let found = self.connection.query_row("SELECT state FROM carry", [], |row| row.get(0)).optional();
        found.map_err(|source| StoreError::from_sqlite(&self.path, source))
    }

    /// Writes a look whole, or not at all.
    ///
    /// # Errors
    /// [`StoreError`]; then nothing was written, and the carry of before still holds.
    pub fn add(&mut self, hour: i64, used: &[(Uuid, Name, Amounts)], carry: &str) -> Result<(), StoreError> {
        let is_new = hour != self.hour;
        let path = self.path.clone();
        let at = |error| StoreError::from_load(&path, error);
        let transaction = self.connection.transaction().map_err(|e| at(e.into()))?;
        write(&transaction, hour, used, carry, is_new).map_err(at)?;
        transaction.commit().map_err(|e| at(e.into()))?;
        self.hour = hour;
        Ok(())
    }

    /// What vdcs of that name used from one hour to before another, oldest first.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn hours(&self, name: &Name, from: i64, before: i64) -> Result<Vec<UsageRow>, StoreError> {
        let sql = "SELECT vdc, name, hour, amounts FROM hours WHERE name = ?1 AND hour >= ?2 AND hour < ?3 ORDER BY hour, vdc";
        self.rows(sql, params![name.as_str(), from, before]).map_err(|e| self.error(e))
    }

    /// What each vdc used since it was made, deleted ones too.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn totals(&self) -> Result<Vec<UsageRow>, StoreError> {
        let sql = "SELECT vdc, name, 0, amounts FROM totals ORDER BY name, vdc";
        self.rows(sql, []).map_err(|e| self.error(e))
    }

    fn rows(&self, sql: &str, params: impl rusqlite::Params) -> Result<Vec<UsageRow>, LoadError> {
        let mut statement = self.connection.prepare_cached(sql)?;
        let mut rows = statement.query(params)?;
        let mut found = Vec::new();
        while let Some(row) = rows.next()? {
            let (vdc, name): (String, String) = (row.get(0)?, row.get(1)?);
            found.push(UsageRow {
                vdc: vdc.parse().map_err(|e| bad("vdc", &e))?,
                name: name.parse().map_err(|e| bad("name", &e))?,
                hour: row.get(2)?,
                amounts: amounts(&row.get::<_, String>(3)?)?,
            });
        }
        Ok(found)
    }
}

fn bad(column: &str, why: &dyn std::fmt::Display) -> LoadError {
    LoadError::Row { table: "hours", what: format!("{column}: {why}") }
}

fn amounts(text: &str) -> Result<Amounts, LoadError> {
    serde_json::from_str(text).map_err(|e| bad("amounts", &e))
}

fn write(
    tx: &Transaction<'_>,
    hour: i64,
    used: &[(Uuid, Name, Amounts)],
    carry: &str,
    is_new_hour: bool,
) -> Result<(), LoadError> {
    for (vdc, name, more) in used {
        let vdc = vdc.to_string();
        let select = "SELECT amounts FROM hours WHERE vdc = ?1 AND hour = ?2";
        let known: Option<String> =
            tx.prepare_cached(select)?.query_row(params![vdc, hour], |row| row.get(0)).optional()?;
        let text = added(known.as_deref(), *more)?;
        let insert = "INSERT OR REPLACE INTO hours (vdc, name, hour, amounts) VALUES (?1, ?2, ?3, ?4)";
        tx.prepare_cached(insert)?.execute(params![vdc, name.as_str(), hour, text])?;
        let select = "SELECT amounts FROM totals WHERE vdc = ?1";
        let known: Option<String> =
            tx.prepare_cached(select)?.query_row(params![vdc], |row| row.get(0)).optional()?;
        let text = added(known.as_deref(), *more)?;
        let insert = "INSERT OR REPLACE INTO totals (vdc, name, amounts) VALUES (?1, ?2, ?3)";
        tx.prepare_cached(insert)?.execute(params![vdc, name.as_str(), text])?;
    }
    tx.prepare_cached("INSERT OR REPLACE INTO carry (id, state) VALUES (1, ?1)")?.execute(params![carry])?;
    if is_new_hour {
        // Counted, not reckoned from the clock: a clock that jumps far ahead must not empty the table.
        tx.prepare_cached(
            "DELETE FROM hours WHERE hour < (SELECT DISTINCT hour FROM hours ORDER BY hour DESC LIMIT 1 OFFSET ?1)",
        )?
        .execute(params![HOURS_KEPT - 1])?;
    }
    Ok(())
}

fn added(known: Option<&str>, more: Amounts) -> Result<String, LoadError> {
    let before = known.map(amounts).transpose()?.unwrap_or_default();
    serde_json::to_string(&before.plus(more)).map_err(|e| bad("amounts", &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(cpu_us: u64) -> Amounts {
        Amounts { cpu_us, energy_mj: (cpu_us > 5).then_some(1), ..Amounts::default() }
    }

    #[test]
    fn hours_add_up_and_are_kept_thirteen_months_whatever_the_clock_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meter.db");
        let mut store = MeterStore::open(&path).unwrap();
        assert_eq!(store.carry().unwrap(), None);
        let (vdc, name): (Uuid, Name) = (Uuid::new_v4(), "ardesio".parse().unwrap());
        let add = |store: &mut MeterStore, hour, cpu| {
            store.add(hour, &[(vdc, name.clone(), used(cpu))], &format!("{hour}")).unwrap();
        };
        add(&mut store, 10, 1);
        add(&mut store, 10, 2);
        // A clock that jumps a century, and back.
        add(&mut store, 1_000_000, 4);
        add(&mut store, 11, 8);
        drop(store);
        let mut store = MeterStore::open(&path).unwrap();
        assert_eq!(store.carry().unwrap().as_deref(), Some("11"));
        let hours = store.hours(&name, 0, 1000).unwrap();
        let seen: Vec<_> =
            hours.iter().map(|row| (row.hour, row.amounts.cpu_us, row.amounts.energy_mj)).collect();
        assert_eq!(seen, [(10, 3, None), (11, 8, Some(1))]);
        assert!(store.hours(&"other".parse().unwrap(), 0, i64::MAX).unwrap().is_empty());
        let hours: Vec<(Uuid, Name, Amounts)> = vec![(vdc, name.clone(), used(1))];
        // The full time would take a while: the last hours are written, the rest at once.
        let tx = store.connection.transaction().unwrap();
        for hour in 12..i64::from(HOURS_KEPT) + 12 {
            assert!(write(&tx, hour, &hours, "", false).is_ok());
        }
        tx.commit().unwrap();
        add(&mut store, i64::from(HOURS_KEPT) + 12, 1);
        let kept = store.hours(&name, 0, i64::MAX).unwrap();
        assert_eq!(kept.len(), HOURS_KEPT as usize);
        assert_eq!(store.totals().unwrap()[0].amounts.cpu_us, 3 + 4 + 8 + u64::from(HOURS_KEPT) + 1);
    }

    #[test]
    fn garbage_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meter.db");
        std::fs::write(&path, vec![7; 8192]).unwrap();
        assert!(matches!(MeterStore::open(&path), Err(StoreError::Damaged { .. })));
    }
}
