//! Uploads that outlive their connection: chunks from one stream after the other, as one to who takes them.
//!
//! ```text
//!            take(header, line)                     run
//!  stream 1 ────────────────────► ┌────────┐ chunks    ┌────────┐
//!     ╳ breaks off                │ splice │ ────────► │ import │ ──► record ──► every caller
//!  stream 2 ────────────────────► └────────┘           └────────┘
//! ```
//! Owns: who goes on with what, and up to where an upload has come. Never: bytes; the import that takes them waits meanwhile
//! with its files and its job, as it does for a client that is slow, and removes what it has when it is told of the end.
//!
//! - The newest stream counts: the one before may be one whose line died without a word. What comes a second time is left out.
//! - An upload waits [`WAIT`], or until another one into the same image begins. And there are [`UPLOADS_MAX`] at most, each with a few chunks in memory. What is more ends with its stream.
//! - They live in memory: after a restart of the daemon there are none, and an import begins anew.
//!
//! Threads: the splice of an upload is a task, which ends with its import.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serio_api::v1::{ImageChunk, ImagePart, ImportImageHeader};
use serio_store::record::ImageRecord;
use tokio::sync::{mpsc, watch};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Code, Status};

use super::image::Chunks;
use crate::error::Error;

/// How long an upload without a client waits for one.
const WAIT: Duration = Duration::from_secs(600);
/// Uploads that can be gone on with, at once.
const UPLOADS_MAX: usize = 16;
/// Streams that want to go on with one upload, and were not looked at yet.
const LINES_MAX: usize = 4;
const ID_CHARS_MAX: usize = 64;

/// Why a stream gives no more chunks.
#[derive(Debug)]
pub(super) enum Cut {
    /// Its connection: another may go on.
    Line(Error),
    /// What was sent is wrong.
    Client(Error),
}

impl Cut {
    /// What the end of a stream means.
    pub(super) fn of(status: &Status) -> Self {
        let error = Error::invalid("chunk", format!("the stream broke off: {status}"));
        match status.code() {
            Code::Cancelled | Code::Unknown | Code::Unavailable | Code::Internal | Code::DeadlineExceeded => {
                Self::Line(error)
            }
            _ => Self::Client(error),
        }
    }
}

/// The chunks of one stream.
pub(super) type Line = Pin<Box<dyn Stream<Item = Result<ImageChunk, Cut>> + Send>>;

/// A part, as the API numbers them, and how much of it has come. Parts come in the order of their numbers but for the disk.
type Place = (i32, u64);

/// Where a place lies in the order in which everything comes: kernel, initrd, disk.
fn order((part, offset): Place) -> (u8, u64) {
    let rank = match ImagePart::try_from(part) {
        Ok(ImagePart::Kernel) => 1,
        Ok(ImagePart::Initrd) => 2,
        Ok(ImagePart::Disk) => 3,
        _ => 0,
    };
    (rank, offset)
}

/// How far an upload is.
#[derive(Debug, Default)]
struct Reached {
    place: Place,
    /// Its stream has broken off.
    waits: bool,
}

type Outcome = Option<Result<ImageRecord, Error>>;

#[derive(Debug)]
struct Entry {
    header: ImportImageHeader,
    reached: Arc<Mutex<Reached>>,
    lines: mpsc::Sender<LineOf>,
    outcome: watch::Receiver<Outcome>,
}

/// A line; in a struct, since it cannot be shown.
struct LineOf(Line);

impl std::fmt::Debug for LineOf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LineOf")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See the head of this file. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Uploads {
    entries: Arc<Mutex<HashMap<String, Entry>>>,
    wait: Duration,
}

impl Default for Uploads {
    fn default() -> Self {
        Self { entries: Arc::default(), wait: WAIT }
    }
}

/// What becomes of a stream.
pub(super) enum Taken {
    /// It begins an upload: the caller runs it.
    Begun(Upload),
    /// It goes on with one.
    Joined(Joined),
}

impl Uploads {
    /// Up to where everything of an upload has come.
    pub(super) fn place(&self, id: &str) -> Option<Place> {
        lock(&self.entries).get(id).map(|entry| lock(&entry.reached).place)
    }

    /// Begins an upload, or goes on with the one that has the header's `upload_id`.
    pub(super) fn take(&self, mut header: ImportImageHeader, line: Line) -> Result<Taken, Error> {
        header.request_id.clear();
        let id = header.upload_id.clone();
        if id.len() > ID_CHARS_MAX || !id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            let problem = format!("at most {ID_CHARS_MAX} letters, digits and hyphens");
            return Err(Error::invalid("header.upload_id", problem));
        }
        let mut uploads = lock(&self.entries);
        if let Some(entry) = uploads.get(&id) {
            if entry.header != header {
                let problem = "another import has it: its header differs".to_owned();
                return Err(Error::invalid("header.upload_id", problem));
            }
            // After the last chunk nobody takes it any more, and it waits for the answer only.
            if let Err(mpsc::error::TrySendError::Full(_)) = entry.lines.try_send(LineOf(line)) {
                return Err(Error::Busy { resource: format!("upload {id}"), operation: "its import" });
            }
            return Ok(Taken::Joined(Joined(entry.outcome.clone())));
        }
        // Whoever begins anew wants the name, and not what waits under it: without its sender that one ends.
        let name = header.image_id.clone();
        let waits = |entry: &Entry| entry.header.image_id == name && lock(&entry.reached).waits;
        let before =
            uploads.extract_if(|_, entry| waits(entry)).map(|(_, entry)| Joined(entry.outcome)).collect();
        let kept = !id.is_empty() && uploads.len() < UPLOADS_MAX;
        let (lines, more) = mpsc::channel(LINES_MAX);
        let (tell, outcome) = watch::channel(None);
        let reached = Arc::<Mutex<Reached>>::default();
        if kept {
            uploads.insert(id.clone(), Entry { header, reached: Arc::clone(&reached), lines, outcome });
        }
        let wait = if kept { self.wait } else { Duration::ZERO };
        let splice = Splice { line: Some(line), more, reached, wait, name, again: false, cut: None };
        Ok(Taken::Begun(Upload { uploads: self.clone(), id: kept.then_some(id), before, splice, tell }))
    }
}

/// One who waits for the import that another has begun.
pub(super) struct Joined(watch::Receiver<Outcome>);

impl Joined {
    /// What came of it.
    pub(super) async fn record(mut self) -> Result<ImageRecord, Error> {
        match self.0.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.clone().unwrap_or(Err(Error::Ending)),
            Err(_) => Err(Error::Ending),
        }
    }
}

/// An upload that begins.
pub(super) struct Upload {
    uploads: Uploads,
    id: Option<String>,
    /// Others into the same image, which nobody goes on with any more.
    before: Vec<Joined>,
    splice: Splice,
    tell: watch::Sender<Outcome>,
}

/// Nobody can go on with it from here on.
struct Listed(Uploads, Option<String>);

impl Drop for Listed {
    fn drop(&mut self) {
        if let Some(id) = &self.1 {
            lock(&self.0.entries).remove(id);
        }
    }
}

impl Upload {
    /// Imports what comes by `import`, and tells everybody who waits for it.
    pub(super) async fn run<F>(self, import: impl FnOnce(Chunks) -> F) -> Result<ImageRecord, Error>
    where
        F: Future<Output = Result<ImageRecord, Error>>,
    {
        let Upload { uploads, id, before, splice, tell } = self;
        let listed = Listed(uploads, id);
        for one in before {
            // Its failure is no matter of this one.
            let _ = one.record().await;
        }
        let (out, chunks) = mpsc::channel(1);
        tokio::spawn(splice.run(out));
        let record = import(Box::pin(ReceiverStream::new(chunks))).await;
        // First: who looks for it after the answer finds that it has ended.
        drop(listed);
        // Mostly nobody else waits.
        let _ = tell.send(Some(record.clone()));
        record
    }
}

/// Makes one stream of many.
struct Splice {
    line: Option<Line>,
    more: mpsc::Receiver<LineOf>,
    reached: Arc<Mutex<Reached>>,
    wait: Duration,
    /// Of the image.
    name: String,
    /// A second stream has come.
    again: bool,
    cut: Option<Error>,
}

impl Splice {
    /// Gives every chunk to `out` once; ends with the last one, or after a failure that it gives, or when nobody takes them.
    async fn run(mut self, out: mpsc::Sender<Result<ImageChunk, Error>>) {
        loop {
            let Some(line) = &mut self.line else {
                if !self.comes_again(&out).await {
                    return;
                }
                continue;
            };
            tokio::select! {
                biased;
                Some(newer) = self.more.recv() => self.go_on(newer),
                () = out.closed() => return,
                chunk = line.next() => match chunk {
                    None => return,
                    Some(Ok(chunk)) => {
                        let Some(chunk) = self.rest_of(chunk) else { continue };
                        let end = chunk.offset.saturating_add(chunk.data.len() as u64);
                        let place = (chunk.part, end);
                        if out.send(Ok(chunk)).await.is_err() {
                            return;
                        }
                        lock(&self.reached).place = place;
                    }
                    Some(Err(Cut::Line(error))) => (self.line, self.cut) = (None, Some(error)),
                    Some(Err(Cut::Client(error))) => {
                        // It is told to the client if the import still listens.
                        let _ = out.send(Err(error)).await;
                        return;
                    }
                }
            }
        }
    }

    /// Waits for who goes on; false: nobody does, or nobody wants it.
    async fn comes_again(&mut self, out: &mpsc::Sender<Result<ImageChunk, Error>>) -> bool {
        lock(&self.reached).waits = true;
        if !self.wait.is_zero() {
            let (image, bytes, wait_s) = (&self.name, lock(&self.reached).place.1, self.wait.as_secs());
            tracing::info!(image, bytes, wait_s, "an upload broke off: it waits for who goes on with it");
        }
        tokio::select! {
            biased;
            newer = self.more.recv() => match newer {
                Some(newer) => {
                    self.go_on(newer);
                    true
                }
                None => {
                    self.give_up(out).await;
                    false
                }
            },
            () = out.closed() => false,
            () = tokio::time::sleep(self.wait) => {
                if !self.wait.is_zero() {
                    tracing::warn!(image = self.name, "nobody has gone on with an upload: it is removed");
                }
                self.give_up(out).await;
                false
            }
        }
    }

    async fn give_up(&mut self, out: &mpsc::Sender<Result<ImageChunk, Error>>) {
        if let Some(error) = self.cut.take() {
            // The import may have failed meanwhile.
            let _ = out.send(Err(error)).await;
        }
    }

    fn go_on(&mut self, newer: LineOf) {
        tracing::info!(image = self.name, bytes = lock(&self.reached).place.1, "an upload goes on");
        lock(&self.reached).waits = false;
        (self.line, self.again) = (Some(newer.0), true);
    }

    /// What of a chunk has not come before.
    fn rest_of(&self, mut chunk: ImageChunk) -> Option<ImageChunk> {
        let place = lock(&self.reached).place;
        if !self.again || order((chunk.part, chunk.offset)) >= order(place) {
            return Some(chunk);
        }
        let end = chunk.offset.saturating_add(chunk.data.len() as u64);
        if order((chunk.part, end)) <= order(place) {
            return None;
        }
        let known = usize::try_from(place.1.saturating_sub(chunk.offset)).unwrap_or(usize::MAX);
        chunk.data.drain(..known.min(chunk.data.len()));
        chunk.offset = place.1;
        Some(chunk)
    }
}

#[cfg(test)]
#[path = "uploads_test.rs"]
mod tests;
