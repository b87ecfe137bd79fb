//! The region's store: an etcd cluster that several schedulers share, of which one leads.
//!
//! ```text
//! /serio/scheduler/format                   "1"
//! /serio/scheduler/id                       of the region
//! /serio/scheduler/leader/LEASE             HOST:PORT of a candidate; gone with its lease. The oldest one leads
//! /serio/scheduler/records/KIND/KEY         see the head of the module above
//! ```
//! Invariants: (1) each write is a transaction that holds only while the leader's key is the one of this leader
//! (`create_revision`) and was written as often as this leader knows (`version`); it writes that key again. So it is done
//! once or never, in order, also when an answer was lost, it was sent twice, or a paused member does it late; (2) what a
//! deposed leader sent is refused as soon as its key is gone, and before that its successor does not read.
//!
//! Old revisions are compacted by etcd itself (`--auto-compaction-retention`), not from here: a compaction is one of all
//! keys, also of those that others may keep there and still read. Nothing here needs a revision that is older than the
//! last look; who follows and finds it compacted reads everything anew.

mod client;
pub mod wire;

use tokio::runtime::Handle;
use tonic::Code;

use super::{Backend, Change, Kind, StoreError};
pub use client::{Client, EtcdError, Watch};
use wire::{
    Compare, DeleteRangeRequest, KeyValue, Op, PutRequest, RangeRequest, RangeResponse, RequestOp,
    TxnRequest, Wanted, WatchCreateRequest,
};

/// Of the keys; another one is refused.
const FORMAT: &str = "1";
const ROOT: &str = "/serio/scheduler/";
/// Behind all keys of [`ROOT`]: '0' follows '/'.
const ROOT_END: &str = "/serio/scheduler0";
const LEADERS: &str = "/serio/scheduler/leader/";
const RECORDS: &str = "/serio/scheduler/records/";
/// Keys of one answer.
const PAGE: i64 = 512;
/// Records of one transaction: etcd takes 128 parts, and one is the leader's key.
const RECORDS_MAX: usize = 100;
/// Bytes of one transaction, unless a single record has more: etcd takes 1.5 MiB.
const BYTES_MAX: usize = 1 << 20;
/// `Compare.target`.
const VERSION: i32 = 0;
const CREATE: i32 = 1;

impl From<EtcdError> for StoreError {
    fn from(error: EtcdError) -> Self {
        match error {
            // The lease of the leader's key.
            EtcdError::Refused(status) if status.code() == Code::NotFound => Self::Deposed,
            EtcdError::Refused(status) if is_full(&status) => Self::Full,
            EtcdError::Refused(status) => Self::Refused(status.message().to_owned()),
            error => Self::Unreachable(error.to_string()),
        }
    }
}

/// `ErrGRPCNoSpace`; a member that is overloaded has the same code.
fn is_full(status: &tonic::Status) -> bool {
    status.code() == Code::ResourceExhausted && status.message().contains("space exceeded")
}

fn op(op: Op) -> RequestOp {
    RequestOp { request: Some(op) }
}

fn one(key: &str) -> RangeRequest {
    RangeRequest { key: key.into(), ..RangeRequest::default() }
}

fn put(key: &str, value: &[u8], lease: i64) -> RequestOp {
    op(Op::Put(PutRequest { key: key.into(), value: value.to_vec(), lease }))
}

fn created_at(key: &str, revision: i64) -> Compare {
    Compare { result: 0, target: CREATE, key: key.into(), wanted: Some(Wanted::CreateRevision(revision)) }
}

/// What a key of etcd is to the scheduler.
#[derive(Debug, PartialEq, Eq)]
pub enum Key {
    /// A candidate's, by its lease.
    Leader(String),
    /// A record's.
    Record(Kind, String),
    /// Neither.
    Other,
}

impl Key {
    /// By its name.
    #[must_use]
    pub fn parse(key: &[u8]) -> Self {
        let Ok(text) = std::str::from_utf8(key) else { return Self::Other };
        if let Some(lease) = text.strip_prefix(LEADERS) {
            return Self::Leader(lease.to_owned());
        }
        let record = text.strip_prefix(RECORDS).and_then(|rest| rest.split_once('/'));
        match record.and_then(|(kind, key)| Some((Kind::parse(kind)?, key))) {
            Some((kind, key)) => Self::Record(kind, key.to_owned()),
            None => Self::Other,
        }
    }
}

/// A candidate's key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Of its lease.
    pub name: String,
    /// When it was made: the smallest leads.
    pub create_revision: i64,
    lease: i64,
    address: String,
}

impl Client {
    /// The value of that key, which is made when it is not there.
    async fn made(&self, key: &str, value: &str) -> Result<String, EtcdError> {
        let request = TxnRequest {
            compare: vec![created_at(key, 0)],
            success: vec![put(key, value.as_bytes(), 0)],
            failure: Vec::new(),
        };
        self.txn(request).await?;
        let found = self.range(one(key)).await?;
        let value = found.kvs.first().map(|kv| String::from_utf8_lossy(&kv.value).into_owned());
        Ok(value.unwrap_or_default())
    }

    /// The region's id, made by the first scheduler that comes.
    ///
    /// # Errors
    /// When etcd does not answer, or the keys are of a newer version.
    pub async fn region_id(&self) -> Result<String, StoreError> {
        let found = self.made("/serio/scheduler/format", FORMAT).await?;
        if found != FORMAT {
            return Err(StoreError::Format { found, known: FORMAT });
        }
        Ok(self.made("/serio/scheduler/id", &uuid::Uuid::new_v4().to_string()).await?)
    }

    /// Everything, as of one revision, and which.
    ///
    /// # Errors
    /// When etcd does not answer.
    pub async fn everything(&self) -> Result<(Vec<KeyValue>, i64), EtcdError> {
        let (mut all, mut revision, mut key) = (Vec::new(), 0, ROOT.as_bytes().to_vec());
        loop {
            let request = RangeRequest { key, range_end: ROOT_END.into(), limit: PAGE, revision };
            let RangeResponse { header, kvs, more } = self.range(request).await?;
            if revision == 0 {
                revision = header.map_or(0, |header| header.revision);
            }
            all.extend(kvs);
            let Some(last) = all.last().filter(|_| more) else { return Ok((all, revision)) };
            key = last.key.clone();
            key.push(0);
        }
    }

    /// What happens from that revision on.
    ///
    /// # Errors
    /// When etcd does not answer.
    pub async fn events(&self, start_revision: i64) -> Result<Watch, EtcdError> {
        let (key, range_end) = (ROOT.into(), ROOT_END.into());
        self.watch(WatchCreateRequest { key, range_end, start_revision }).await
    }

    /// Stands as a candidate, as long as the lease lives.
    ///
    /// # Errors
    /// When etcd does not answer, or the lease is over.
    pub async fn stand(&self, lease: i64, address: &str) -> Result<Candidate, StoreError> {
        let name = format!("{lease:016x}");
        let key = format!("{LEADERS}{name}");
        let request = TxnRequest {
            compare: vec![created_at(&key, 0)],
            success: vec![put(&key, address.as_bytes(), lease)],
            failure: Vec::new(),
        };
        self.txn(request).await?;
        let found = self.range(one(&key)).await?;
        let create_revision = found.kvs.first().map(|kv| kv.create_revision).ok_or(StoreError::Deposed)?;
        Ok(Candidate { name, create_revision, lease, address: address.to_owned() })
    }
}

/// The records among them.
#[must_use]
pub fn records(all: Vec<KeyValue>) -> Vec<Change> {
    let record = |kv: KeyValue| match Key::parse(&kv.key) {
        Key::Record(kind, key) => Some(Change { kind, key, value: Some(kv.value) }),
        Key::Leader(_) | Key::Other => None,
    };
    all.into_iter().filter_map(record).collect()
}

/// The leader's way to write.
#[derive(Debug)]
pub struct Etcd {
    client: Client,
    runtime: Handle,
    leader: Candidate,
    /// How often the leader's key was written.
    version: i64,
}

impl Etcd {
    /// Of that leader, which has written nothing yet.
    ///
    /// # Panics
    /// Outside of a runtime.
    #[must_use]
    pub fn new(client: Client, leader: Candidate) -> Self {
        Self { client, runtime: Handle::current(), leader, version: 1 }
    }

    /// One transaction: see invariant 1 of this module.
    async fn write_some(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        let key = format!("{LEADERS}{}", self.leader.name);
        let version = Compare {
            result: 0,
            target: VERSION,
            key: key.clone().into(),
            wanted: Some(Wanted::Version(self.version)),
        };
        let mut success: Vec<RequestOp> = changes.iter().map(write_one).collect();
        success.push(put(&key, self.leader.address.as_bytes(), self.leader.lease));
        let request = TxnRequest {
            compare: vec![created_at(&key, self.leader.create_revision), version],
            success,
            failure: vec![op(Op::Range(one(&key)))],
        };
        let answer = self.client.txn(request).await?;
        let next = self.version.saturating_add(1);
        let found = answer.responses.first().and_then(|op| op.range.as_ref()?.kvs.first());
        // Only this leader writes its key: when it was written once more, this transaction was done, and its answer lost.
        let done_before =
            found.is_some_and(|kv| kv.create_revision == self.leader.create_revision && kv.version == next);
        if !answer.succeeded && !done_before {
            return Err(StoreError::Deposed);
        }
        self.version = next;
        Ok(())
    }

    async fn write_all(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        let mut rest = changes;
        while !rest.is_empty() {
            let (some, later) = rest.split_at(portion(rest));
            self.write_some(some).await?;
            rest = later;
        }
        Ok(())
    }
}

fn write_one(change: &Change) -> RequestOp {
    let key = format!("{RECORDS}{}/{}", change.kind, change.key);
    match &change.value {
        Some(value) => put(&key, value, 0),
        None => op(Op::Delete(DeleteRangeRequest { key: key.into() })),
    }
}

/// How many of the first fit into one transaction; at least one.
fn portion(changes: &[Change]) -> usize {
    let mut bytes: usize = 0;
    let fits = |change: &&Change| {
        let more = change.value.as_ref().map_or(0, Vec::len).saturating_add(change.key.len());
        bytes = bytes.saturating_add(more);
        bytes <= BYTES_MAX
    };
    changes.iter().take(RECORDS_MAX).take_while(fits).count().max(1).min(changes.len())
}

impl Backend for Etcd {
    fn load(&mut self) -> Result<Vec<Change>, StoreError> {
        let (all, _) = self.runtime.clone().block_on(self.client.everything())?;
        Ok(records(all))
    }

    fn write(&mut self, changes: &[Change]) -> Result<(), StoreError> {
        self.runtime.clone().block_on(self.write_all(changes))
    }

    fn scheduler_id(&mut self) -> Result<String, StoreError> {
        self.runtime.clone().block_on(self.client.region_id())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(bytes: usize) -> Change {
        Change { kind: Kind::Plan, key: "k".into(), value: Some(vec![0; bytes]) }
    }

    #[test]
    fn a_transaction_takes_what_etcd_takes() {
        assert_eq!(portion(&vec![change(1); 250]), RECORDS_MAX);
        assert_eq!(portion(&vec![change(BYTES_MAX / 3); 4]), 2);
        assert_eq!(portion(&[change(BYTES_MAX * 2), change(1)]), 1);
        assert_eq!(portion(&[change(1)]), 1);
    }

    #[test]
    fn keys_are_told_apart() {
        assert_eq!(Key::parse(b"/serio/scheduler/leader/0a"), Key::Leader("0a".into()));
        assert_eq!(Key::parse(b"/serio/scheduler/records/plans/a"), Key::Record(Kind::Plan, "a".into()));
        for other in [b"/serio/scheduler/records/cats/a".as_slice(), b"/serio/scheduler/id", b"\xff", b""] {
            assert_eq!(Key::parse(other), Key::Other);
        }
    }
}
