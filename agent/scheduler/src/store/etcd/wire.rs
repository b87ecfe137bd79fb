//! The messages of etcd's API v3 that are used here, field numbers as in its `rpc.proto` and `kv.proto`. Written by hand:
//! a dozen messages are not worth a protocol compiler at build time. Fields that nobody here reads are left out.

/// Of each answer.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ResponseHeader {
    /// Of the store, when it answered.
    #[prost(int64, tag = "3")]
    pub revision: i64,
}

/// One key as it is.
#[derive(Clone, PartialEq, prost::Message)]
pub struct KeyValue {
    /// Its name.
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    /// When it was made.
    #[prost(int64, tag = "2")]
    pub create_revision: i64,
    /// How often it was written since; 1 when it was made.
    #[prost(int64, tag = "4")]
    pub version: i64,
    /// What it holds.
    #[prost(bytes = "vec", tag = "5")]
    pub value: Vec<u8>,
}

/// Asks for keys.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RangeRequest {
    /// The first.
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    /// Behind the last; empty: only the one.
    #[prost(bytes = "vec", tag = "2")]
    pub range_end: Vec<u8>,
    /// At most so many; 0: all.
    #[prost(int64, tag = "3")]
    pub limit: i64,
    /// As of then; 0: now.
    #[prost(int64, tag = "4")]
    pub revision: i64,
}

/// The keys.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RangeResponse {
    /// When.
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// In order of their names.
    #[prost(message, repeated, tag = "2")]
    pub kvs: Vec<KeyValue>,
    /// There are more than the limit.
    #[prost(bool, tag = "3")]
    pub more: bool,
}

/// Writes a key.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PutRequest {
    /// Its name.
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    /// What it holds.
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
    /// It goes with this lease; 0: it stays.
    #[prost(int64, tag = "3")]
    pub lease: i64,
}

/// Removes a key.
#[derive(Clone, PartialEq, prost::Message)]
pub struct DeleteRangeRequest {
    /// Its name.
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
}

/// A part of a transaction.
#[derive(Clone, PartialEq, prost::Message)]
pub struct RequestOp {
    /// Which.
    #[prost(oneof = "Op", tags = "1, 2, 3")]
    pub request: Option<Op>,
}

/// What a part of a transaction does.
#[derive(Clone, PartialEq, prost::Oneof)]
pub enum Op {
    /// Reads.
    #[prost(message, tag = "1")]
    Range(RangeRequest),
    /// Writes.
    #[prost(message, tag = "2")]
    Put(PutRequest),
    /// Removes.
    #[prost(message, tag = "3")]
    Delete(DeleteRangeRequest),
}

/// The answer to a part; of those that do not read nothing is of interest.
#[derive(Clone, PartialEq, prost::Message)]
pub struct ResponseOp {
    /// What was read.
    #[prost(message, optional, tag = "1")]
    pub range: Option<RangeResponse>,
}

/// A condition of a transaction.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Compare {
    /// 0: equal.
    #[prost(int32, tag = "1")]
    pub result: i32,
    /// 0: the version, 1: the create revision.
    #[prost(int32, tag = "2")]
    pub target: i32,
    /// Of this one.
    #[prost(bytes = "vec", tag = "3")]
    pub key: Vec<u8>,
    /// With what.
    #[prost(oneof = "Wanted", tags = "4, 5")]
    pub wanted: Option<Wanted>,
}

/// What a key must have.
#[derive(Clone, Copy, PartialEq, Eq, prost::Oneof)]
pub enum Wanted {
    /// So many writes.
    #[prost(int64, tag = "4")]
    Version(i64),
    /// That beginning; 0: it is not there.
    #[prost(int64, tag = "5")]
    CreateRevision(i64),
}

/// All of the one, or all of the other.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TxnRequest {
    /// All must hold.
    #[prost(message, repeated, tag = "1")]
    pub compare: Vec<Compare>,
    /// Then this.
    #[prost(message, repeated, tag = "2")]
    pub success: Vec<RequestOp>,
    /// Else this.
    #[prost(message, repeated, tag = "3")]
    pub failure: Vec<RequestOp>,
}

/// What became of it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct TxnResponse {
    /// When.
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// The conditions held.
    #[prost(bool, tag = "2")]
    pub succeeded: bool,
    /// One a part.
    #[prost(message, repeated, tag = "3")]
    pub responses: Vec<ResponseOp>,
}

/// Asks for a lease.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct LeaseGrantRequest {
    /// Seconds.
    #[prost(int64, tag = "1")]
    pub ttl: i64,
}

/// The lease.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct LeaseGrantResponse {
    /// Its id.
    #[prost(int64, tag = "2")]
    pub id: i64,
    /// Seconds.
    #[prost(int64, tag = "3")]
    pub ttl: i64,
}

/// Names a lease: to keep it alive, or to end it.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct LeaseRequest {
    /// Its id.
    #[prost(int64, tag = "1")]
    pub id: i64,
}

/// How long it lives.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct LeaseKeepAliveResponse {
    /// Seconds; 0: it is over.
    #[prost(int64, tag = "3")]
    pub ttl: i64,
}

/// Nothing of interest.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Nothing {}

/// Said in a watch.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct WatchRequest {
    /// What.
    #[prost(oneof = "WatchAsk", tags = "1, 3")]
    pub ask: Option<WatchAsk>,
}

/// What is asked of a watch.
#[derive(Clone, PartialEq, Eq, prost::Oneof)]
pub enum WatchAsk {
    /// To begin.
    #[prost(message, tag = "1")]
    Create(WatchCreateRequest),
    /// To say something.
    #[prost(message, tag = "3")]
    Progress(Nothing),
}

/// What is watched.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct WatchCreateRequest {
    /// The first key.
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    /// Behind the last.
    #[prost(bytes = "vec", tag = "2")]
    pub range_end: Vec<u8>,
    /// From then on.
    #[prost(int64, tag = "3")]
    pub start_revision: i64,
}

/// What happened.
#[derive(Clone, PartialEq, prost::Message)]
pub struct WatchResponse {
    /// The watch is over.
    #[prost(bool, tag = "4")]
    pub canceled: bool,
    /// Why.
    #[prost(string, tag = "6")]
    pub cancel_reason: String,
    /// In order.
    #[prost(message, repeated, tag = "11")]
    pub events: Vec<Event>,
}

/// One thing that happened.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Event {
    /// 0: written, 1: removed.
    #[prost(int32, tag = "1")]
    pub kind: i32,
    /// The key as it is now; of one that is gone only its name.
    #[prost(message, optional, tag = "2")]
    pub kv: Option<KeyValue>,
}

/// Says who one is.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AuthenticateRequest {
    /// The user.
    #[prost(string, tag = "1")]
    pub name: String,
    /// In the clear.
    #[prost(string, tag = "2")]
    pub password: String,
}

/// Who is believed.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AuthenticateResponse {
    /// To be said with each call.
    #[prost(string, tag = "2")]
    pub token: String,
}
