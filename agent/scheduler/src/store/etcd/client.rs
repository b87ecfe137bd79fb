//! Calls to an etcd cluster: each has a time limit, and goes to the next member when one does not answer.
//!
//! ```text
//!  call ─▶ the member that answered last ── 1 s, or UNAVAILABLE ──▶ the next ─▶ … ── 4 s in all ──▶ Unreachable
//! ```
//! A call that got no answer may have been done, and is repeated: whoever calls sees to it that twice is as good as once,
//! and that a late one does no harm (a paused member may do it when it wakes up).
//! With a user each call carries the token that etcd gave for its password; one that etcd has forgotten is asked for anew.
//! Never: knows what the keys mean.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Request, Status, Streaming,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};
use tonic_prost::ProstCodec;

use super::wire::{
    AuthenticateRequest, AuthenticateResponse, Event, LeaseGrantRequest, LeaseGrantResponse,
    LeaseKeepAliveResponse, LeaseRequest, Nothing, RangeRequest, RangeResponse, TxnRequest, TxnResponse,
    WatchAsk, WatchCreateRequest, WatchRequest, WatchResponse,
};
use crate::config::Access;

/// One member's time for one call.
const CALL_WAIT: Duration = Duration::from_secs(1);
/// All members' time: longer than etcd needs to elect its own leader.
const CALL_WAIT_ALL: Duration = Duration::from_secs(4);
/// Between two rounds over all members.
const ROUND_PAUSE: Duration = Duration::from_millis(50);
/// A watch that is silent for that long is asked to say something, and is given up after as long again.
const WATCH_SILENCE: Duration = Duration::from_secs(1);
/// A page of the largest records.
const MESSAGE_BYTES_MAX: usize = 1 << 30;

/// Why a call did nothing that can be told.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// An address that is none.
    #[error("{0} is not the address of an etcd member: HOST:PORT is")]
    Address(String),
    /// No member did it in time.
    #[error("no member of etcd does it: {0}")]
    Unreachable(String),
    /// A file of certificates or of the password.
    #[error("cannot read {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Certificates that are none.
    #[error("the certificates for etcd cannot be used")]
    Tls(#[source] tonic::transport::Error),
    /// It answers, and does not do it.
    #[error("etcd refuses: {}", .0.message())]
    Refused(Box<Status>),
}

/// The cluster; cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    members: Arc<[(String, Channel)]>,
    /// The member that answered last.
    current: Arc<AtomicUsize>,
    user: Option<Arc<User>>,
}

/// Who we are to etcd.
#[derive(Debug)]
struct User {
    name: String,
    password: String,
    /// Said with each call, once etcd has believed us; it forgets it after a while without calls.
    token: Mutex<Option<MetadataValue<Ascii>>>,
}

impl User {
    fn token(&self) -> Option<MetadataValue<Ascii>> {
        self.token.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, token: Option<MetadataValue<Ascii>>) {
        *self.token.lock().unwrap_or_else(PoisonError::into_inner) = token;
    }
}

fn read(path: &Path) -> Result<Vec<u8>, EtcdError> {
    std::fs::read(path).map_err(|source| EtcdError::File { path: path.to_owned(), source })
}

fn tls(access: &Access) -> Result<Option<ClientTlsConfig>, EtcdError> {
    let Some(ca) = &access.ca else { return Ok(None) };
    let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?));
    Ok(Some(match &access.identity {
        Some((cert, key)) => config.identity(Identity::from_pem(read(cert)?, read(key)?)),
        None => config,
    }))
}

impl Client {
    /// Of those members, as HOST:PORT, in the clear and without a user. Connections are made when they are needed.
    ///
    /// # Errors
    /// When one cannot be an address.
    ///
    /// # Panics
    /// Outside of a runtime.
    pub fn new(members: &[String]) -> Result<Self, EtcdError> {
        Self::with(members, &Access::default())
    }

    /// The same with certificates and a user.
    ///
    /// # Errors
    /// When one cannot be an address, or a file cannot be read.
    ///
    /// # Panics
    /// Outside of a runtime.
    pub fn with(members: &[String], access: &Access) -> Result<Self, EtcdError> {
        let tls = tls(access)?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let member = |address: &String| {
            let endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))
                .map_err(|_| EtcdError::Address(address.clone()))?;
            let endpoint = match &tls {
                Some(tls) => endpoint.tls_config(tls.clone()).map_err(EtcdError::Tls)?,
                None => endpoint,
            };
            Ok((address.clone(), endpoint.connect_timeout(CALL_WAIT).tcp_nodelay(true).connect_lazy()))
        };
        let members = members.iter().map(member).collect::<Result<Vec<_>, EtcdError>>()?;
        if members.is_empty() {
            return Err(EtcdError::Address(String::new()));
        }
        let user = match &access.user {
            Some((name, path)) => {
                let password = String::from_utf8_lossy(&read(path)?).trim_end_matches('\n').to_owned();
                Some(Arc::new(User { name: name.clone(), password, token: Mutex::new(None) }))
            }
            None => None,
        };
        Ok(Self { members: members.into(), current: Arc::new(AtomicUsize::new(0)), user })
    }

    /// A request with the user's token; who has none yet says first who it is.
    async fn request<Q>(&self, grpc: &mut Grpc<Channel>, message: Q) -> Result<Request<Q>, Status> {
        let mut request = Request::new(message);
        let Some(user) = &self.user else { return Ok(request) };
        let token = match user.token() {
            Some(token) => token,
            None => {
                let (name, password) = (user.name.clone(), user.password.clone());
                let ask = Request::new(AuthenticateRequest { name, password });
                let path = PathAndQuery::from_static("/etcdserverpb.Auth/Authenticate");
                let codec = ProstCodec::<AuthenticateRequest, AuthenticateResponse>::default();
                let answer = grpc.unary(ask, path, codec).await?.into_inner();
                let token: MetadataValue<Ascii> =
                    answer.token.parse().map_err(|_| Status::internal("a token of etcd that is no text"))?;
                user.set(Some(token.clone()));
                ready(grpc).await?;
                token
            }
        };
        request.metadata_mut().insert("token", token);
        Ok(request)
    }

    /// Whether etcd has only forgotten who we are.
    fn is_forgotten(&self, status: &Status) -> bool {
        let Some(user) = &self.user else { return false };
        let old = ["invalid auth token", "revision of auth store is old"];
        if user.token().is_none() || !old.iter().any(|text| status.message().contains(text)) {
            return false;
        }
        user.set(None);
        true
    }

    fn member(&self) -> Option<(usize, &str, Grpc<Channel>)> {
        let number = self.current.load(Ordering::Relaxed).checked_rem(self.members.len())?;
        let (address, channel) = self.members.get(number)?;
        let grpc = Grpc::new(channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        Some((number, address, grpc))
    }

    /// Nobody has gone on to the next meanwhile: then it is that one's turn.
    fn next_member(&self, failed: usize) {
        let next = failed.wrapping_add(1).checked_rem(self.members.len()).unwrap_or(0);
        // Somebody else's next is as good.
        let _ = self.current.compare_exchange(failed, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Until a member does it, for [`CALL_WAIT_ALL`].
    async fn call<T, F>(&self, attempt: impl Fn(Grpc<Channel>) -> F) -> Result<T, EtcdError>
    where
        F: Future<Output = Result<T, Status>>,
    {
        let until = Instant::now() + CALL_WAIT_ALL;
        let mut failures: usize = 0;
        loop {
            let Some((number, address, grpc)) = self.member() else {
                return Err(EtcdError::Address(String::new()));
            };
            let failure = match timeout(CALL_WAIT, attempt(grpc)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(status)) if Instant::now() < until && self.is_forgotten(&status) => continue,
                Ok(Err(status)) if is_final(&status) => return Err(EtcdError::Refused(Box::new(status))),
                Ok(Err(status)) => format!("{address}: {}", status.message()),
                Err(_) => format!("{address}: no answer within {} ms", CALL_WAIT.as_millis()),
            };
            tracing::debug!(failure, "a member of etcd");
            self.next_member(number);
            failures = failures.wrapping_add(1);
            if Instant::now() >= until {
                return Err(EtcdError::Unreachable(failure));
            }
            if failures.checked_rem(self.members.len()) == Some(0) {
                tokio::time::sleep(ROUND_PAUSE).await;
            }
        }
    }

    async fn unary<Q, A>(&self, path: &'static str, request: Q) -> Result<A, EtcdError>
    where
        Q: prost::Message + Clone + 'static,
        A: prost::Message + Default + 'static,
    {
        self.call(|mut grpc: Grpc<Channel>| {
            let request = request.clone();
            async move {
                ready(&mut grpc).await?;
                let request = self.request(&mut grpc, request).await?;
                let path = PathAndQuery::from_static(path);
                Ok(grpc.unary(request, path, ProstCodec::<Q, A>::default()).await?.into_inner())
            }
        })
        .await
    }

    /// Reads keys, as all members agree that they are.
    ///
    /// # Errors
    /// See [`EtcdError`]; so for all of these.
    pub async fn range(&self, request: RangeRequest) -> Result<RangeResponse, EtcdError> {
        self.unary("/etcdserverpb.KV/Range", request).await
    }

    /// A transaction.
    ///
    /// # Errors
    /// As above.
    pub async fn txn(&self, request: TxnRequest) -> Result<TxnResponse, EtcdError> {
        self.unary("/etcdserverpb.KV/Txn", request).await
    }

    /// A new lease.
    ///
    /// # Errors
    /// As above.
    pub async fn grant(&self, ttl_seconds: i64) -> Result<i64, EtcdError> {
        let request = LeaseGrantRequest { ttl: ttl_seconds };
        let answer: LeaseGrantResponse = self.unary("/etcdserverpb.Lease/LeaseGrant", request).await?;
        Ok(answer.id)
    }

    /// Ends a lease, and the keys with it.
    ///
    /// # Errors
    /// As above.
    pub async fn revoke(&self, id: i64) -> Result<(), EtcdError> {
        let Nothing {} = self.unary("/etcdserverpb.Lease/LeaseRevoke", LeaseRequest { id }).await?;
        Ok(())
    }

    /// The lease begins anew; whether it was still there.
    ///
    /// # Errors
    /// As above.
    pub async fn keep_alive(&self, id: i64) -> Result<bool, EtcdError> {
        self.call(|mut grpc: Grpc<Channel>| async move {
            ready(&mut grpc).await?;
            let once = tokio_stream::once(LeaseRequest { id });
            let path = PathAndQuery::from_static("/etcdserverpb.Lease/LeaseKeepAlive");
            let codec = ProstCodec::<LeaseRequest, LeaseKeepAliveResponse>::default();
            let request = self.request(&mut grpc, once).await?;
            let mut answers = grpc.streaming(request, path, codec).await?.into_inner();
            let answer = answers.message().await?;
            answer.map(|answer| answer.ttl > 0).ok_or_else(|| Status::unavailable("no answer to a lease"))
        })
        .await
    }

    /// What happens to those keys from that revision on.
    ///
    /// # Errors
    /// As above.
    pub async fn watch(&self, create: WatchCreateRequest) -> Result<Watch, EtcdError> {
        self.call(|mut grpc: Grpc<Channel>| {
            let first = WatchRequest { ask: Some(WatchAsk::Create(create.clone())) };
            async move {
                ready(&mut grpc).await?;
                let (asks, receiver) = mpsc::channel(4);
                asks.try_send(first).map_err(|_| Status::internal("a new channel has room"))?;
                let mut request = self.request(&mut grpc, ReceiverStream::new(receiver)).await?;
                // A member that is cut off from its leader ends the watch, instead of being silent for ever.
                request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
                let path = PathAndQuery::from_static("/etcdserverpb.Watch/Watch");
                let codec = ProstCodec::<WatchRequest, WatchResponse>::default();
                let events = grpc.streaming(request, path, codec).await?.into_inner();
                Ok(Watch { asks, events })
            }
        })
        .await
    }
}

async fn ready(grpc: &mut Grpc<Channel>) -> Result<(), Status> {
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))
}

/// Another member would say the same.
fn is_final(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::ResourceExhausted
            | Code::OutOfRange
            | Code::Unimplemented
    )
}

/// A stream of events.
#[derive(Debug)]
pub struct Watch {
    asks: mpsc::Sender<WatchRequest>,
    events: Streaming<WatchResponse>,
}

impl Watch {
    /// The next events; none of them now and then.
    ///
    /// # Errors
    /// When the watch is over: begin another one.
    pub async fn next(&mut self) -> Result<Vec<Event>, EtcdError> {
        let over = |why: &str| EtcdError::Unreachable(format!("the watch ended: {why}"));
        let mut asked = false;
        loop {
            match timeout(WATCH_SILENCE, self.events.message()).await {
                Ok(Ok(Some(answer))) if answer.canceled => return Err(over(&answer.cancel_reason)),
                Ok(Ok(Some(answer))) => return Ok(answer.events),
                Ok(Ok(None)) => return Err(over("closed")),
                Ok(Err(status)) => return Err(over(status.message())),
                Err(_) if asked => return Err(over("silence")),
                Err(_) => {
                    let ask = WatchRequest { ask: Some(WatchAsk::Progress(Nothing {})) };
                    self.asks.try_send(ask).map_err(|_| over("closed"))?;
                    asked = true;
                }
            }
        }
    }
}
