//! Writing: one line after the other, and the change from one file to the next.
//!
//! Invariants: a line is in the file whole before the next one is begun; the number and the hash in memory are those of the
//! last whole line. Files are closed by a rename, so at each instant every line is in exactly one file.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    Action, AuditError, Entry, FIRST, LINE_BYTES_MAX, Receipt,
    chain::{OPEN, at, closed, closed_name},
    hash,
};

/// How much is kept.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// A file that has so many bytes is closed.
    pub file_bytes_max: u64,
    /// Closed files that are kept.
    pub files_max: usize,
}

impl Default for Limits {
    /// 64 files of 4 MiB: about half a million calls.
    fn default() -> Self {
        Self { file_bytes_max: 4 << 20, files_max: 64 }
    }
}

#[derive(Debug)]
struct Tail {
    file: File,
    /// The number of the first line in this file.
    first: u64,
    /// Of the last line; 0: there is none.
    number: u64,
    hash: String,
    bytes: u64,
}

/// The log, open for appending.
#[derive(Debug)]
pub struct AuditLog {
    dir: PathBuf,
    limits: Limits,
    tail: Mutex<Tail>,
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(0))
}

fn open_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).read(true).append(true).mode(0o600).open(path)
}

impl AuditLog {
    /// Opens the log in a directory, or makes it. Only its end is looked at: see [`crate::verify`].
    ///
    /// # Errors
    /// It cannot be opened, or its last line is none.
    pub fn open(dir: &Path, limits: Limits) -> Result<Self, AuditError> {
        let path = dir.join(OPEN);
        let io = at("open", &path);
        let mut file = open_file(&path).map_err(&io)?;
        let torn = cut_torn_line(&mut file).map_err(&io)?;
        let (number, hash) = match last_entry(&mut file, &path)? {
            Some(last) => last,
            // New, or the end came between two files.
            None => match closed(dir)?.pop() {
                Some((_, newest)) => {
                    let mut before = File::open(&newest).map_err(at("open", &newest))?;
                    last_entry(&mut before, &newest)?.ok_or(AuditError::Broken {
                        path: newest,
                        line: 1,
                        why: "it is not there, though the file was closed after it",
                    })?
                }
                None => (0, FIRST.to_owned()),
            },
        };
        let first = first_entry(&mut file).map_err(&io)?.unwrap_or(number + 1);
        let bytes = file.metadata().map_err(&io)?.len();
        let tail = Mutex::new(Tail { file, first, number, hash, bytes });
        let log = Self { dir: dir.to_owned(), limits, tail };
        if torn > 0 {
            let torn = torn.to_string();
            let detail = [("torn_bytes", torn.as_str())];
            log.append(&Action { detail: &detail, ..own("RepairAuditLog") })?;
        }
        Ok(log)
    }

    /// Writes a line and syncs it.
    ///
    /// # Errors
    /// It is not in the log; what was to be done should not be done then.
    pub fn append(&self, action: &Action<'_>) -> Result<Receipt, AuditError> {
        self.write(action, true)
    }

    /// Writes a line that may be lost by a power cut: the next [`AuditLog::append`] syncs it too.
    ///
    /// # Errors
    /// It is not in the log.
    pub fn append_lazily(&self, action: &Action<'_>) -> Result<Receipt, AuditError> {
        self.write(action, false)
    }

    fn write(&self, action: &Action<'_>, sync: bool) -> Result<Receipt, AuditError> {
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        if tail.bytes >= self.limits.file_bytes_max && tail.number >= tail.first {
            self.begin_file(&mut tail)?;
        }
        self.write_line(&mut tail, action, sync)
    }

    fn write_line(
        &self,
        tail: &mut MutexGuard<'_, Tail>,
        action: &Action<'_>,
        sync: bool,
    ) -> Result<Receipt, AuditError> {
        let io = at("append to", &self.dir);
        let entry = action.entry(tail.number + 1, tail.hash.clone());
        let mut line = serde_json::to_vec(&entry).map_err(|e| io(e.into()))?;
        if line.len() as u64 >= LINE_BYTES_MAX {
            return Err(io(io::ErrorKind::FileTooLarge.into()));
        }
        let hash = hash(&line);
        line.push(b'\n');
        let written =
            tail.file.write_all(&line).and_then(|()| if sync { tail.file.sync_data() } else { Ok(()) });
        if let Err(error) = written {
            // What may be there of it is not in the chain.
            let _ = tail.file.set_len(tail.bytes);
            return Err(io(error));
        }
        tail.bytes += line.len() as u64;
        tail.number = entry.n;
        tail.hash.clone_from(&hash);
        Ok(Receipt { number: entry.n, time: entry.time, hash })
    }

    /// Closes the file and goes on in a new one; forgets the oldest beyond the limit, and says so.
    fn begin_file(&self, tail: &mut MutexGuard<'_, Tail>) -> Result<(), AuditError> {
        let path = self.dir.join(OPEN);
        let io = at("begin a new file of", &path);
        tail.file.sync_all().map_err(&io)?;
        fs::rename(&path, self.dir.join(closed_name(tail.first))).map_err(&io)?;
        tail.file = open_file(&path).map_err(&io)?;
        tail.first = tail.number + 1;
        tail.bytes = 0;
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(&io)?;
        let files = closed(&self.dir)?;
        let surplus = files.len().saturating_sub(self.limits.files_max);
        for ((first, old), (next, _)) in files.iter().zip(files.iter().skip(1)).take(surplus) {
            let (first, last) = (first.to_string(), next.saturating_sub(1).to_string());
            let detail = [("first_line", first.as_str()), ("last_line", last.as_str())];
            // First the line: a file must not be missing without one.
            self.write_line(tail, &Action { detail: &detail, ..own("DropAuditFile") }, true)?;
            fs::remove_file(old).map_err(at("remove a file of", old))?;
        }
        Ok(())
    }

    /// The number and the hash of the last line.
    #[must_use]
    pub fn last(&self) -> (u64, String) {
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        (tail.number, tail.hash.clone())
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// A line that the log writes about itself.
fn own(what: &'static str) -> Action<'static> {
    Action { time_ms: now_ms(), who: "seriod", what, on: "audit", ..Action::default() }
}

/// Cuts what follows the last line's end; how many bytes.
fn cut_torn_line(file: &mut File) -> io::Result<u64> {
    let (start, bytes) = end_of(file)?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at as u64 + 1);
    if whole == 0 && start > 0 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "its last line is longer than any that we write",
        ));
    }
    let torn = bytes.len() as u64 - whole;
    if torn > 0 {
        file.set_len(start + whole)?;
        file.sync_all()?;
    }
    Ok(torn)
}

/// As much of the end as a line may have, and where it begins.
fn end_of(file: &mut File) -> io::Result<(u64, Vec<u8>)> {
    let len = file.seek(SeekFrom::End(0))?;
    let start = len.saturating_sub(LINE_BYTES_MAX);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(LINE_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok((start, bytes))
}

/// Number and hash of the last line; the file ends in one, or is empty.
fn last_entry(file: &mut File, path: &Path) -> Result<Option<(u64, String)>, AuditError> {
    let (_, bytes) = end_of(file).map_err(at("read", path))?;
    let Some(lines) = bytes.strip_suffix(b"\n") else { return Ok(None) };
    let line = lines.rsplit(|byte| *byte == b'\n').next().unwrap_or_default();
    let entry: Entry = serde_json::from_slice(line).map_err(|_| AuditError::Broken {
        path: path.to_owned(),
        line: 0,
        why: "the last line is no entry",
    })?;
    Ok(Some((entry.n, hash(line))))
}

/// The number of the first line.
fn first_entry(file: &mut File) -> io::Result<Option<u64>> {
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = Vec::new();
    file.take(LINE_BYTES_MAX).read_to_end(&mut bytes)?;
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    Ok(serde_json::from_slice::<Entry>(line).ok().map(|entry| entry.n))
}
