//! Reading everything back at start.

use std::str::FromStr;

use rusqlite::{Connection, Row, params};
use serio_types::{Desired, Generation, Name, Quota};
use uuid::Uuid;

use crate::{
    error::LoadError,
    record::{
        ClockRecord, End, EventRecord, ExportRecord, ImageRecord, Millis, OperationRecord, OrdersRecord,
        RequestRecord, ReservationRecord, SavedVm, SnapshotRecord, VdcRecord, VdcSnapshotRecord, VmRecord,
        VolumeRecord,
    },
};

/// All that the state works with, and where the events are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// The node's id; absent in a new database.
    pub node: Option<Uuid>,
    /// All vdcs.
    pub vdcs: Vec<VdcRecord>,
    /// All images.
    pub images: Vec<ImageRecord>,
    /// All VMs.
    pub vms: Vec<VmRecord>,
    /// All volumes.
    pub volumes: Vec<VolumeRecord>,
    /// All snapshots.
    pub snapshots: Vec<SnapshotRecord>,
    /// All exports.
    pub exports: Vec<ExportRecord>,
    /// All snapshots of vdcs.
    pub vdc_snapshots: Vec<VdcSnapshotRecord>,
    /// All operations that are kept.
    pub operations: Vec<OperationRecord>,
    /// All reservations that were committed or taken.
    pub reservations: Vec<ReservationRecord>,
    /// What is in force for the whole node.
    pub orders: OrdersRecord,
    /// The steady clock at the last start of seriod.
    pub clock: Option<ClockRecord>,
    /// VMs that were ended by a fence, with its generation.
    pub fenced: Vec<(Uuid, u64)>,
    /// The newest event's number; 0 if there is none.
    pub last_event: u64,
}

/// A row's values by name, parsed; what cannot be parsed names its table and column.
struct Fields<'a> {
    table: &'static str,
    row: &'a Row<'a>,
}

impl Fields<'_> {
    fn get<T: rusqlite::types::FromSql>(&self, column: &str) -> Result<T, LoadError> {
        self.row.get(column).map_err(|e| self.bad(column, &e))
    }

    fn bad(&self, column: &str, why: &dyn std::fmt::Display) -> LoadError {
        LoadError::Row { table: self.table, what: format!("{column}: {why}") }
    }

    fn parse<T: FromStr<Err: std::fmt::Display>>(&self, column: &str) -> Result<T, LoadError> {
        self.get::<String>(column)?.parse().map_err(|e| self.bad(column, &e))
    }

    fn parse_optional<T: FromStr<Err: std::fmt::Display>>(
        &self,
        column: &str,
    ) -> Result<Option<T>, LoadError> {
        self.get::<Option<String>>(column)?
            .map(|text| text.parse().map_err(|e| self.bad(column, &e)))
            .transpose()
    }

    fn unsigned(&self, column: &str) -> Result<u64, LoadError> {
        u64::try_from(self.get::<i64>(column)?).map_err(|e| self.bad(column, &e))
    }

    fn millis(&self, column: &str) -> Result<Millis, LoadError> {
        self.get(column).map(Millis)
    }

    fn generation(&self) -> Result<Generation, LoadError> {
        self.unsigned("generation").map(Generation)
    }
}

fn all<T>(
    connection: &Connection,
    table: &'static str,
    order: &str,
    read: impl Fn(&Fields<'_>) -> Result<T, LoadError>,
) -> Result<Vec<T>, LoadError> {
    let mut statement = connection.prepare(&format!("SELECT * FROM {table} ORDER BY {order}"))?;
    let mut rows = statement.query([])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(read(&Fields { table, row })?);
    }
    Ok(found)
}

pub(crate) fn load(connection: &Connection) -> Result<Contents, LoadError> {
    Ok(Contents {
        node: all(connection, "node", "id", |f| f.parse("uid"))?.pop(),
        vdcs: all(connection, "vdcs", "uid", vdc)?,
        images: all(connection, "images", "uid", image)?,
        vms: all(connection, "vms", "uid", vm)?,
        volumes: all(connection, "volumes", "uid", volume)?,
        snapshots: all(connection, "snapshots", "volume, number", snapshot)?,
        exports: all(connection, "exports", "id", export)?,
        vdc_snapshots: all(connection, "vdc_snapshots", "uid", vdc_snapshot)?,
        operations: all(connection, "operations", "uid", operation)?,
        reservations: all(connection, "reservations", "token", reservation)?,
        orders: all(connection, "orders", "id", orders)?.pop().unwrap_or_default(),
        clock: all(connection, "clock", "id", clock)?.pop(),
        fenced: all(connection, "fenced", "vm", |f| Ok((f.parse("vm")?, f.unsigned("generation")?)))?,
        last_event: connection
            .query_row("SELECT coalesce(max(number), 0) FROM events", [], |row| row.get::<_, i64>(0))
            .map(i64::unsigned_abs)?,
    })
}

fn reservation(f: &Fields<'_>) -> Result<ReservationRecord, LoadError> {
    Ok(ReservationRecord {
        token: f.get("token")?,
        key: f.get("key")?,
        resource: f.get("resource")?,
        amount: Quota {
            vcpus: f.unsigned("vcpus")?,
            memory_bytes: f.unsigned("memory_bytes")?,
            storage_bytes: f.unsigned("storage_bytes")?,
        },
        class: f.parse("class")?,
        wish: f.parse("wish")?,
        numa_node: f.get("numa_node")?,
        fence_generation: f.unsigned("fence_generation")?,
        vm: f.parse_optional("vm")?,
    })
}

fn clock(f: &Fields<'_>) -> Result<ClockRecord, LoadError> {
    Ok(ClockRecord {
        boot_id: f.get("boot_id")?,
        boot_ms: f.get("boot_ms")?,
        steady: Millis(f.get("steady_ms")?),
    })
}

fn orders(f: &Fields<'_>) -> Result<OrdersRecord, LoadError> {
    Ok(OrdersRecord {
        drain_reason: f.get("drain_reason")?,
        fence_generation: f.unsigned("fence_generation")?,
    })
}

fn vdc(f: &Fields<'_>) -> Result<VdcRecord, LoadError> {
    let limits: String = f.get("limits")?;
    Ok(VdcRecord {
        uid: f.parse("uid")?,
        name: f.parse("name")?,
        generation: f.generation()?,
        create_time: f.millis("create_time_ms")?,
        quota: Quota {
            vcpus: f.unsigned("vcpus")?,
            memory_bytes: f.unsigned("memory_bytes")?,
            storage_bytes: f.unsigned("storage_bytes")?,
        },
        limits: serde_json::from_str(&limits).map_err(|e| f.bad("limits", &e))?,
        encryption: f.parse("encryption")?,
    })
}

fn image(f: &Fields<'_>) -> Result<ImageRecord, LoadError> {
    Ok(ImageRecord {
        uid: f.parse("uid")?,
        name: f.parse("name")?,
        generation: f.generation()?,
        create_time: f.millis("create_time_ms")?,
        state: f.parse("state")?,
        size_bytes: f.unsigned("size_bytes")?,
        has_kernel: f.get("has_kernel")?,
        has_initrd: f.get("has_initrd")?,
        cmdline: f.get("cmdline")?,
        blake3: f.get("blake3")?,
    })
}

fn vm(f: &Fields<'_>) -> Result<VmRecord, LoadError> {
    let spec: String = f.get("spec")?;
    let desired = match f.get::<String>("desired")?.as_str() {
        "running" => Desired::Running,
        "stopped" => Desired::Stopped,
        other => return Err(f.bad("desired", &format!("unknown word `{other}`"))),
    };
    let last_end = match (f.get::<Option<i64>>("end_time_ms")?, f.parse_optional("end_kind")?) {
        (Some(time), Some(kind)) => Some(End {
            time: Millis(time),
            kind,
            reason: f.get::<Option<String>>("end_reason")?.unwrap_or_default(),
        }),
        _ => None,
    };
    Ok(VmRecord {
        uid: f.parse("uid")?,
        vdc: f.parse("vdc")?,
        name: f.parse("name")?,
        generation: f.generation()?,
        create_time: f.millis("create_time_ms")?,
        spec: serde_json::from_str(&spec).map_err(|e| f.bad("spec", &e))?,
        root_volume: f.parse("root_volume")?,
        desired,
        run: f.parse("run")?,
        start_time: f.get::<Option<i64>>("start_time_ms")?.map(Millis),
        last_end,
        restarts: f.get("restarts")?,
        kernel: match f.get::<Option<String>>("kernel")? {
            Some(kernel) => Some(serde_json::from_str(&kernel).map_err(|e| f.bad("kernel", &e))?),
            None => None,
        },
        restore: f.parse_optional("restore")?,
    })
}

fn volume(f: &Fields<'_>) -> Result<VolumeRecord, LoadError> {
    Ok(VolumeRecord {
        uid: f.parse("uid")?,
        vdc: f.parse("vdc")?,
        name: f.parse("name")?,
        generation: f.generation()?,
        create_time: f.millis("create_time_ms")?,
        state: f.parse("state")?,
        size_bytes: f.unsigned("size_bytes")?,
        source_image: f.parse_optional("source_image")?,
        source_snapshot: f.get("source_snapshot")?,
        unsure: f.get("unsure")?,
        vm: f.parse_optional("vm")?,
    })
}

fn snapshot(f: &Fields<'_>) -> Result<SnapshotRecord, LoadError> {
    Ok(SnapshotRecord {
        volume: f.parse("volume")?,
        name: f.parse("name")?,
        number: f.unsigned("number")?,
        create_time: f.millis("create_time_ms")?,
        state: f.parse("state")?,
        size_bytes: f.unsigned("size_bytes")?,
        group: f.parse_optional("group_uid")?,
        class: f.parse("class")?,
        reason: f.get("reason")?,
    })
}

fn vdc_snapshot(f: &Fields<'_>) -> Result<VdcSnapshotRecord, LoadError> {
    Ok(VdcSnapshotRecord {
        uid: f.parse("uid")?,
        vdc: f.parse("vdc")?,
        name: f.parse("name")?,
        create_time: f.millis("create_time_ms")?,
        state: f.parse("state")?,
        saved: match (f.get::<Option<String>>("saved")?, f.parse_optional("vm")?) {
            (Some(saved), Some(vm)) => {
                let saved: SavedVm = serde_json::from_str(&saved).map_err(|e| f.bad("saved", &e))?;
                Some(Box::new(SavedVm { vm, ..saved }))
            }
            _ => None,
        },
    })
}

fn operation(f: &Fields<'_>) -> Result<OperationRecord, LoadError> {
    Ok(OperationRecord {
        uid: f.parse("uid")?,
        kind: f.parse("kind")?,
        target: f.get("target")?,
        subject: f.parse_optional("subject")?,
        point: f.parse_optional("point")?,
        state: f.parse("state")?,
        done_bytes: f.unsigned("done_bytes")?,
        total_bytes: f.unsigned("total_bytes")?,
        error: f.get("error")?,
        create_time: f.millis("create_time_ms")?,
        end_time: f.get::<Option<i64>>("end_time_ms")?.map(Millis),
    })
}

fn export(f: &Fields<'_>) -> Result<ExportRecord, LoadError> {
    Ok(ExportRecord {
        id: f.parse("id")?,
        volume: f.parse("volume")?,
        snapshot: f.parse_optional::<Name>("snapshot")?,
        writable: f.get("writable")?,
        state: f.parse("state")?,
        create_time: f.millis("create_time_ms")?,
        expire_time: f.millis("expire_time_ms")?,
    })
}

pub(crate) fn request(row: &Row<'_>) -> Result<RequestRecord, rusqlite::Error> {
    let id: String = row.get(0)?;
    Ok(RequestRecord {
        id: id.parse().map_err(|e: uuid::Error| {
            rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, Box::new(e))
        })?,
        method: row.get(1)?,
        digest: row.get(2)?,
        resource: row.get(3)?,
        time: Millis(row.get(4)?),
    })
}

pub(crate) fn events(
    connection: &Connection,
    from: u64,
    limit: u32,
) -> Result<Vec<EventRecord>, rusqlite::Error> {
    connection
        .prepare_cached(
            "SELECT number, time_ms, resource, kind, message FROM events WHERE number >= ?1 ORDER BY number LIMIT ?2",
        )?
        .query_map(params![i64::try_from(from).unwrap_or(i64::MAX), limit], |row| {
            Ok(EventRecord {
                number: row.get::<_, i64>(0)?.unsigned_abs(),
                time: Millis(row.get(1)?),
                resource: row.get(2)?,
                kind: row.get(3)?,
                message: row.get(4)?,
            })
        })?
        .collect()
}
