//! Changes: what a commit writes. The state makes a list of them, the store writes all or none.

use rusqlite::{Transaction, params};
use serio_types::{Desired, Name};
use uuid::Uuid;

use crate::{
    EVENTS_MAX, REQUEST_KEPT_MS,
    record::{
        ClockRecord, EventRecord, ExportRecord, ImageRecord, OperationRecord, OrdersRecord, RequestRecord,
        ReservationRecord, SnapshotRecord, VdcRecord, VdcSnapshotRecord, VmRecord, VolumeRecord,
    },
};

/// A row that goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    /// A vdc.
    Vdc(Uuid),
    /// An image.
    Image(Uuid),
    /// A VM, with the reservation that it has taken and the fence that ended it.
    Vm(Uuid),
    /// A reservation.
    Reservation(String),
    /// A volume and its snapshots.
    Volume(Uuid),
    /// A snapshot.
    Snapshot(Uuid, Name),
    /// An export.
    Export(Name),
    /// A vdc's snapshot.
    VdcSnapshot(Uuid),
    /// An operation.
    Operation(Uuid),
    /// A request, because what it made was undone.
    Request(Uuid),
    /// All requests about a resource, because its making was undone.
    RequestsOf(String),
}

/// A row that is written (new, or in place of the one with its id), or goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The node's id; once.
    Node(Uuid),
    /// A vdc.
    Vdc(VdcRecord),
    /// An image.
    Image(ImageRecord),
    /// A VM.
    Vm(Box<VmRecord>),
    /// A volume.
    Volume(VolumeRecord),
    /// A snapshot.
    Snapshot(SnapshotRecord),
    /// An export.
    Export(ExportRecord),
    /// A vdc's snapshot.
    VdcSnapshot(VdcSnapshotRecord),
    /// A long operation.
    Operation(OperationRecord),
    /// An event; the oldest beyond [`EVENTS_MAX`] go.
    Event(EventRecord),
    /// A request; those older than [`REQUEST_KEPT_MS`] go.
    Request(RequestRecord),
    /// A reservation that is to outlive the agent.
    Reservation(Box<ReservationRecord>),
    /// What is in force for the whole node.
    Orders(OrdersRecord),
    /// The steady clock at the start of seriod.
    Clock(ClockRecord),
    /// A VM was ended by the fence of that generation.
    Fenced(Uuid, u64),
    /// A row that goes.
    Delete(Key),
}

/// SQLite's integers are signed: amounts beyond are never admitted, so this keeps their order.
fn int(amount: u64) -> i64 {
    i64::try_from(amount).unwrap_or(i64::MAX)
}

pub(crate) fn desired_word(desired: Desired) -> &'static str {
    match desired {
        Desired::Running => "running",
        Desired::Stopped => "stopped",
    }
}

impl Change {
    pub(crate) fn write(&self, tx: &Transaction<'_>) -> Result<(), rusqlite::Error> {
        match self {
            Self::Node(uid) => {
                tx.execute("INSERT INTO node (id, uid) VALUES (1, ?1)", params![uid.to_string()]).map(drop)
            }
            Self::Vdc(r) => vdc(tx, r),
            Self::Image(r) => image(tx, r),
            Self::Vm(r) => vm(tx, r),
            Self::Volume(r) => volume(tx, r),
            Self::Snapshot(r) => snapshot(tx, r),
            Self::Export(r) => export(tx, r),
            Self::VdcSnapshot(r) => vdc_snapshot(tx, r),
            Self::Operation(r) => operation(tx, r),
            Self::Event(r) => event(tx, r),
            Self::Request(r) => request(tx, r),
            Self::Reservation(r) => reservation(tx, r),
            Self::Clock(r) => tx
                .prepare_cached(
                    "INSERT OR REPLACE INTO clock (id, boot_id, boot_ms, steady_ms) VALUES (1, ?1, ?2, ?3)",
                )?
                .execute(params![r.boot_id, r.boot_ms, r.steady.0])
                .map(drop),
            Self::Orders(r) => tx
                .prepare_cached(
                    "INSERT OR REPLACE INTO orders (id, drain_reason, fence_generation) VALUES (1, ?1, ?2)",
                )?
                .execute(params![r.drain_reason, int(r.fence_generation)])
                .map(drop),
            Self::Fenced(vm, generation) => tx
                .prepare_cached("INSERT OR REPLACE INTO fenced (vm, generation) VALUES (?1, ?2)")?
                .execute(params![vm.to_string(), int(*generation)])
                .map(drop),
            Self::Delete(key) => delete(tx, key),
        }
    }
}

fn vdc(tx: &Transaction<'_>, r: &VdcRecord) -> Result<(), rusqlite::Error> {
    let limits =
        serde_json::to_string(&r.limits).map_err(|e| rusqlite::Error::ToSqlConversionFailure(Box::new(e)))?;
    tx.prepare_cached(
        "INSERT INTO vdcs (uid, name, generation, create_time_ms, vcpus, memory_bytes, storage_bytes, encryption, limits)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
         ON CONFLICT (uid) DO UPDATE SET generation = ?3, vcpus = ?5, memory_bytes = ?6, storage_bytes = ?7,
             encryption = ?8, limits = ?9",
    )?
    .execute(params![
        r.uid.to_string(),
        r.name.as_str(),
        int(r.generation.0),
        r.create_time.0,
        int(r.quota.vcpus),
        int(r.quota.memory_bytes),
        int(r.quota.storage_bytes),
        r.encryption.as_str(),
        limits
    ])
    .map(drop)
}

fn image(tx: &Transaction<'_>, r: &ImageRecord) -> Result<(), rusqlite::Error> {
    tx.prepare_cached(
        "INSERT INTO images (uid, name, generation, create_time_ms, state, size_bytes, has_kernel, has_initrd, cmdline, blake3)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)
         ON CONFLICT (uid) DO UPDATE SET generation = ?3, state = ?5, size_bytes = ?6, has_kernel = ?7, has_initrd = ?8,
             cmdline = ?9, blake3 = ?10",
    )?
    .execute(params![
        r.uid.to_string(),
        r.name.as_str(),
        int(r.generation.0),
        r.create_time.0,
        r.state.as_str(),
        int(r.size_bytes),
        r.has_kernel,
        r.has_initrd,
        r.cmdline,
        r.blake3
    ])
    .map(drop)
}

fn vm(tx: &Transaction<'_>, r: &VmRecord) -> Result<(), rusqlite::Error> {
    let failed = |e: serde_json::Error| rusqlite::Error::ToSqlConversionFailure(Box::new(e));
    let spec = serde_json::to_string(&r.spec).map_err(failed)?;
    let kernel = r.kernel.as_ref().map(serde_json::to_string).transpose().map_err(failed)?;
    tx.prepare_cached(
        "INSERT INTO vms (uid, vdc, name, generation, create_time_ms, spec, root_volume, desired, run, start_time_ms,
             end_time_ms, end_kind, end_reason, restarts, kernel, restore)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16)
         ON CONFLICT (uid) DO UPDATE SET generation = ?4, spec = ?6, desired = ?8, run = ?9, start_time_ms = ?10,
             end_time_ms = ?11, end_kind = ?12, end_reason = ?13, restarts = ?14, kernel = ?15, restore = ?16",
    )?
    .execute(params![
        r.uid.to_string(),
        r.vdc.to_string(),
        r.name.as_str(),
        int(r.generation.0),
        r.create_time.0,
        spec,
        r.root_volume.to_string(),
        desired_word(r.desired),
        r.run.as_str(),
        r.start_time.map(|t| t.0),
        r.last_end.as_ref().map(|e| e.time.0),
        r.last_end.as_ref().map(|e| e.kind.as_str()),
        r.last_end.as_ref().map(|e| e.reason.as_str()),
        r.restarts,
        kernel,
        r.restore.map(|group| group.to_string())
    ])
    .map(drop)
}

fn volume(tx: &Transaction<'_>, r: &VolumeRecord) -> Result<(), rusqlite::Error> {
    tx.prepare_cached(
        "INSERT INTO volumes (uid, vdc, name, generation, create_time_ms, state, size_bytes, source_image, vm,
             source_snapshot, unsure)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)
         ON CONFLICT (uid) DO UPDATE SET generation = ?4, state = ?6, size_bytes = ?7, vm = ?9, unsure = ?11",
    )?
    .execute(params![
        r.uid.to_string(),
        r.vdc.to_string(),
        r.name.as_str(),
        int(r.generation.0),
        r.create_time.0,
        r.state.as_str(),
        int(r.size_bytes),
        r.source_image.as_ref().map(Name::as_str),
        r.vm.map(|u| u.to_string()),
        r.source_snapshot.as_deref(),
        r.unsure
    ])
    .map(drop)
}

fn snapshot(tx: &Transaction<'_>, r: &SnapshotRecord) -> Result<(), rusqlite::Error> {
    tx.prepare_cached(
        "INSERT INTO snapshots (volume, name, number, create_time_ms, state, size_bytes, group_uid, class, reason)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
         ON CONFLICT (volume, name) DO UPDATE SET create_time_ms = ?4, state = ?5, size_bytes = ?6, class = ?8, reason = ?9",
    )?
    .execute(params![
        r.volume.to_string(),
        r.name.as_str(),
        int(r.number),
        r.create_time.0,
        r.state.as_str(),
        int(r.size_bytes),
        r.group.map(|u| u.to_string()),
        r.class.as_str(),
        r.reason
    ])
    .map(drop)
}

fn vdc_snapshot(tx: &Transaction<'_>, r: &VdcSnapshotRecord) -> Result<(), rusqlite::Error> {
    let failed = |e: serde_json::Error| rusqlite::Error::ToSqlConversionFailure(Box::new(e));
    let saved = r.saved.as_ref().map(serde_json::to_string).transpose().map_err(failed)?;
    tx.prepare_cached(
        "INSERT INTO vdc_snapshots (uid, vdc, name, create_time_ms, state, vm, saved) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
         ON CONFLICT (uid) DO UPDATE SET create_time_ms = ?4, state = ?5, saved = ?7",
    )?
    .execute(params![
        r.uid.to_string(),
        r.vdc.to_string(),
        r.name.as_str(),
        r.create_time.0,
        r.state.as_str(),
        r.saved.as_ref().map(|saved| saved.vm.to_string()),
        saved
    ])
    .map(drop)
}

fn operation(tx: &Transaction<'_>, r: &OperationRecord) -> Result<(), rusqlite::Error> {
    tx.prepare_cached(
        "INSERT INTO operations (uid, kind, target, subject, point, state, done_bytes, total_bytes, error,
             create_time_ms, end_time_ms)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)
         ON CONFLICT (uid) DO UPDATE SET state = ?6, done_bytes = ?7, total_bytes = ?8, error = ?9, end_time_ms = ?11",
    )?
    .execute(params![
        r.uid.to_string(),
        r.kind.as_str(),
        r.target,
        r.subject.map(|u| u.to_string()),
        r.point.as_ref().map(Name::as_str),
        r.state.as_str(),
        int(r.done_bytes),
        int(r.total_bytes),
        r.error,
        r.create_time.0,
        r.end_time.map(|t| t.0)
    ])
    .map(drop)
}

fn export(tx: &Transaction<'_>, r: &ExportRecord) -> Result<(), rusqlite::Error> {
    tx.prepare_cached(
        "INSERT INTO exports (id, volume, snapshot, writable, state, create_time_ms, expire_time_ms)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
         ON CONFLICT (id) DO UPDATE SET state = ?5, expire_time_ms = ?7",
    )?
    .execute(params![
        r.id.as_str(),
        r.volume.to_string(),
        r.snapshot.as_ref().map(Name::as_str),
        r.writable,
        r.state.as_str(),
        r.create_time.0,
        r.expire_time.0
    ])
    .map(drop)
}

fn reservation(tx: &Transaction<'_>, r: &ReservationRecord) -> Result<(), rusqlite::Error> {
    tx.prepare_cached(
        "INSERT INTO reservations (token, key, resource, vcpus, memory_bytes, storage_bytes, class, wish, numa_node,
             fence_generation, vm)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)
         ON CONFLICT (token) DO UPDATE SET vm = ?11",
    )?
    .execute(params![
        r.token,
        r.key,
        r.resource,
        int(r.amount.vcpus),
        int(r.amount.memory_bytes),
        int(r.amount.storage_bytes),
        r.class.as_str(),
        r.wish.as_str(),
        r.numa_node,
        int(r.fence_generation),
        r.vm.map(|u| u.to_string())
    ])
    .map(drop)
}

fn event(tx: &Transaction<'_>, r: &EventRecord) -> Result<(), rusqlite::Error> {
    tx.prepare_cached(
        "INSERT INTO events (number, time_ms, resource, kind, message) VALUES (?1, ?2, ?3, ?4, ?5)",
    )?
    .execute(params![int(r.number), r.time.0, r.resource, r.kind, r.message])?;
    tx.prepare_cached("DELETE FROM events WHERE number <= ?1")?
        .execute(params![int(r.number.saturating_sub(EVENTS_MAX))])
        .map(drop)
}

fn request(tx: &Transaction<'_>, r: &RequestRecord) -> Result<(), rusqlite::Error> {
    tx.prepare_cached("DELETE FROM requests WHERE time_ms < ?1")?
        .execute(params![r.time.0 - REQUEST_KEPT_MS])?;
    tx.prepare_cached(
        "INSERT OR REPLACE INTO requests (id, method, digest, resource, time_ms) VALUES (?1, ?2, ?3, ?4, ?5)",
    )?
    .execute(params![r.id.to_string(), r.method, r.digest, r.resource, r.time.0])
    .map(drop)
}

fn delete(tx: &Transaction<'_>, key: &Key) -> Result<(), rusqlite::Error> {
    let one = |sql: &str, id: String| tx.prepare_cached(sql)?.execute(params![id]).map(drop);
    match key {
        Key::Vdc(uid) => one("DELETE FROM vdcs WHERE uid = ?1", uid.to_string()),
        Key::Image(uid) => one("DELETE FROM images WHERE uid = ?1", uid.to_string()),
        Key::Vm(uid) => {
            one("DELETE FROM reservations WHERE vm = ?1", uid.to_string())?;
            one("DELETE FROM fenced WHERE vm = ?1", uid.to_string())?;
            one("DELETE FROM vms WHERE uid = ?1", uid.to_string())
        }
        Key::Reservation(token) => one("DELETE FROM reservations WHERE token = ?1", token.clone()),
        Key::Volume(uid) => {
            one("DELETE FROM snapshots WHERE volume = ?1", uid.to_string())?;
            one("DELETE FROM volumes WHERE uid = ?1", uid.to_string())
        }
        Key::Snapshot(volume, name) => tx
            .prepare_cached("DELETE FROM snapshots WHERE volume = ?1 AND name = ?2")?
            .execute(params![volume.to_string(), name.as_str()])
            .map(drop),
        Key::Export(id) => one("DELETE FROM exports WHERE id = ?1", id.as_str().to_owned()),
        Key::VdcSnapshot(uid) => one("DELETE FROM vdc_snapshots WHERE uid = ?1", uid.to_string()),
        Key::Operation(uid) => one("DELETE FROM operations WHERE uid = ?1", uid.to_string()),
        Key::Request(id) => one("DELETE FROM requests WHERE id = ?1", id.to_string()),
        Key::RequestsOf(resource) => one("DELETE FROM requests WHERE resource = ?1", resource.clone()),
    }
}
