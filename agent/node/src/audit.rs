//! The audit trail: who asked for which change, in the log of `serio-audit`, before it is done and when it is over.
//!
//! ```text
//!   call ──▶ asked: a line, synced ──▶ the change ──▶ ended: a line ──▶ answer
//!              │ cannot be written: refused, nothing is done
//! ```
//!
//! Owns: STATE/audit.log and the closed files beside it. Never: decides who may call (`grpc::policy`); secrets.
//! Threads: lines are written on tokio's blocking threads, since each waits for the disk.

use std::{
    path::Path,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use serio_audit::{Action, AuditError, AuditLog, Entry, Limits, Reader, Receipt, Verified};
use tokio::{sync::watch, task::spawn_blocking};

use crate::error::{Error, chain};

/// Who calls, and what.
#[derive(Debug, Clone)]
pub struct Caller {
    /// "uid 0", or a certificate's subject and address.
    pub who: String,
    /// "control-plane".
    pub role: &'static str,
    /// The method: "DeleteVm".
    pub what: String,
}

impl Caller {
    /// The daemon by itself.
    #[must_use]
    pub fn own(what: &str) -> Self {
        Self { who: "seriod".to_owned(), role: "", what: what.to_owned() }
    }
}

/// The log, for all who write or read it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Trail {
    log: Arc<AuditLog>,
    newest: Arc<watch::Sender<u64>>,
}

/// Names and values of a line.
pub type Detail = Vec<(&'static str, String)>;

/// A call that was asked, by the number of its line.
#[derive(Debug, Clone)]
pub struct Asked {
    caller: Caller,
    on: String,
    number: u64,
}

/// Now, as lines have it.
#[must_use]
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

fn failed(error: &AuditError) -> Error {
    match error {
        AuditError::File { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => Error::Full {
            doing: "writing the audit log",
            why: format!("{}; nothing is changed without a line there: free some space", chain(error)),
        },
        _ => Error::Failed { doing: "writing the audit log", why: chain(error) },
    }
}

/// A result as lines have it: `OK`, or the code with the reason.
#[must_use]
pub fn result<T>(result: &Result<T, Error>) -> String {
    match result {
        Ok(_) => "OK".to_owned(),
        Err(error) => format!("{}: {}", error.word(), chain(error)),
    }
}

impl Trail {
    /// Opens the log in the state directory, or begins it.
    ///
    /// # Errors
    /// [`AuditError`].
    pub fn open(state_dir: &Path) -> Result<Self, AuditError> {
        let log = AuditLog::open(state_dir, Limits::default())?;
        let (newest, _) = watch::channel(log.last().0);
        Ok(Self { log: Arc::new(log), newest: Arc::new(newest) })
    }

    async fn line(
        &self,
        caller: &Caller,
        on: &str,
        (of, result): (Option<u64>, Option<String>),
        detail: Detail,
    ) -> Result<Receipt, Error> {
        let (log, caller, on) = (Arc::clone(&self.log), caller.clone(), on.to_owned());
        let written = spawn_blocking(move || {
            let detail: Vec<_> = detail.iter().map(|(name, value)| (*name, value.as_str())).collect();
            let action = Action {
                time_ms: now_ms(),
                who: &caller.who,
                role: caller.role,
                what: &caller.what,
                on: &on,
                of,
                result: result.as_deref(),
                detail: &detail,
            };
            if of.is_some() { log.append_lazily(&action) } else { log.append(&action) }
        });
        let receipt = written.await.map_err(|_| Error::Ending)?.map_err(|e| failed(&e))?;
        self.newest.send_if_modified(|known| {
            let more = *known < receipt.number;
            *known = (*known).max(receipt.number);
            more
        });
        Ok(receipt)
    }

    /// Writes that something is asked for; what cannot be written must not be done.
    ///
    /// # Errors
    /// It is not in the log.
    pub async fn asked(&self, caller: Caller, on: String, detail: Detail) -> Result<Asked, Error> {
        let number = self.line(&caller, &on, (None, None), detail).await?.number;
        Ok(Asked { caller, on, number })
    }

    /// Writes how it ended. It has happened: what cannot be written is only said to the daemon's own log.
    pub async fn ended(&self, asked: Asked, result: String) {
        let line = (Some(asked.number), Some(result));
        if let Err(error) = self.line(&asked.caller, &asked.on, line, Vec::new()).await {
            tracing::error!(line = asked.number, "a result is not in the audit log: {}", chain(&error));
        }
    }

    /// Writes a line of its own, for its receipt.
    ///
    /// # Errors
    /// It is not in the log.
    pub async fn note(&self, caller: &Caller, on: &str, detail: Detail) -> Result<Receipt, Error> {
        self.line(caller, on, (None, None), detail).await
    }

    /// The newest line's number.
    #[must_use]
    pub fn newest(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    /// Reads lines from a number on.
    #[must_use]
    pub fn reader(&self, from: u64) -> Reader {
        Reader::new(self.log.dir(), from)
    }

    /// The newest line that something is true of, with its hash. Reads all that is kept: only for what is rare.
    ///
    /// # Errors
    /// The log cannot be read, or is broken.
    pub async fn find(
        &self,
        wanted: impl Fn(&Entry) -> bool + Send + 'static,
    ) -> Result<Option<(Entry, String)>, Error> {
        let log = Arc::clone(&self.log);
        let found = spawn_blocking(move || {
            let mut found = None;
            let files = serio_audit::files_of(log.dir())?;
            serio_audit::verify(&files, |entry, hash| {
                if wanted(&entry) {
                    found = Some((entry, hash.to_owned()));
                }
            })
            .map(|_| found)
        });
        let found = found.await.map_err(|_| Error::Ending)?;
        found.map_err(|e| Error::Failed { doing: "reading the audit log", why: chain(&e) })
    }

    /// Checks the chain over all files.
    ///
    /// # Errors
    /// [`AuditError::Broken`], or it cannot be read.
    pub async fn verify(&self) -> Result<Result<Verified, AuditError>, Error> {
        let log = Arc::clone(&self.log);
        let verified = spawn_blocking(move || {
            let files = serio_audit::files_of(log.dir())?;
            serio_audit::verify(&files, |_, _| {})
        });
        verified.await.map_err(|_| Error::Ending)
    }
}
