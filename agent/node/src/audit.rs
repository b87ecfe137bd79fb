//! The audit log: what was done to this node, by whom, in a file that only ever grows and whose lines are chained.
//!
//! ```text
//! {"n":1,"time":"2026-…Z","who":"uid 0","what":"EraseVdc","on":"vdcs/ardesio","detail":{…},"prev":"000…"}
//!      ▲ blake3 of the whole line, without its end ─────────────────────────────────────┐
//! {"n":2,"time":…                                                                "prev":"5f3…"}
//! ```
//!
//! A line that is changed, moved or taken out breaks the chain at the next one; that lines are missing at the end shows only
//! to who remembers the last hash, which is why [`Receipt`] carries it. A line is synced before its action is answered.
//!
//! A crash may leave half a line at the end. Nobody was told of it, so it is cut off, and the next line says so.
//!
//! Owns: STATE/audit.log. Never: secrets, in any field. Threads: none; appending waits for the disk.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};

/// The longest line; a longer one is no line of ours.
const LINE_BYTES_MAX: u64 = 64 << 10;
/// What the first line names as the one before.
const FIRST: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// Why something is not in the log.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The disk.
    #[error("cannot {what} the audit log {path}")]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The answer.
        #[source]
        source: io::Error,
    },
    /// The chain is broken.
    #[error(
        "line {line} of the audit log {path}: {why}; keep a copy of the file and find out who changed it"
    )]
    Broken {
        /// The file.
        path: PathBuf,
        /// Which line, from 1.
        line: u64,
        /// What does not fit.
        why: &'static str,
    },
}

/// A line, as it is read.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Entry {
    /// Counts from 1.
    pub n: u64,
    /// RFC 3339, UTC.
    pub time: String,
    /// Who asked.
    pub who: String,
    /// What was done, as the API names it.
    pub what: String,
    /// To which resource.
    pub on: String,
    /// What else is worth keeping: names and values.
    pub detail: BTreeMap<String, String>,
    /// blake3 of the line before, hex.
    pub prev: String,
}

/// What an action's caller may keep: with it, it can be shown that the line is in the log, or that it was taken out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// The line's number.
    pub number: u64,
    /// When.
    pub time: String,
    /// blake3 of the line, hex.
    pub hash: String,
}

/// What is to be written.
#[derive(Debug, Clone)]
pub struct Action<'a> {
    /// Milliseconds since 1970.
    pub time_ms: u64,
    /// Who asked.
    pub who: &'a str,
    /// What was done, as the API names it.
    pub what: &'a str,
    /// To which resource.
    pub on: &'a str,
    /// Names and values.
    pub detail: &'a [(&'a str, &'a str)],
}

#[derive(Debug)]
struct Tail {
    file: File,
    number: u64,
    hash: String,
}

/// The log, open for appending.
#[derive(Debug)]
pub struct AuditLog {
    path: PathBuf,
    tail: Mutex<Tail>,
}

fn at(what: &'static str, path: &Path) -> impl Fn(io::Error) -> AuditError {
    let path = path.to_owned();
    move |source| AuditError::File { what, path: path.clone(), source }
}

fn hash(line: &[u8]) -> String {
    blake3::hash(line).to_hex().to_string()
}

/// A moment as RFC 3339 in UTC, to the millisecond.
fn rfc3339(time_ms: u64) -> String {
    let moment = pbjson_types::Timestamp {
        seconds: (time_ms / 1000).cast_signed(),
        nanos: i32::try_from(time_ms % 1000).unwrap_or(0) * 1_000_000,
    };
    // The API's own JSON mapping of a time.
    let text =
        serde_json::to_value(moment).ok().and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default();
    text.strip_suffix("+00:00").map_or_else(|| text.clone(), |moment| format!("{moment}Z"))
}

impl AuditLog {
    /// Opens `STATE/audit.log`, or makes it. Only the end is looked at: see [`verify`].
    ///
    /// # Errors
    /// It cannot be opened, or its last line is none.
    pub fn open(path: &Path) -> Result<Self, AuditError> {
        let io = at("open", path);
        let mut file =
            OpenOptions::new().create(true).read(true).append(true).mode(0o600).open(path).map_err(&io)?;
        let torn = cut_torn_line(&mut file).map_err(&io)?;
        let last = last_line(&mut file).map_err(&io)?;
        let tail = match last.as_deref().map(|line| (serde_json::from_slice::<Entry>(line), line)) {
            None => Tail { file, number: 0, hash: FIRST.to_owned() },
            Some((Ok(entry), line)) => Tail { file, number: entry.n, hash: hash(line) },
            Some((Err(_), _)) => {
                return Err(AuditError::Broken {
                    path: path.to_owned(),
                    line: 0,
                    why: "the last line is no entry",
                });
            }
        };
        let log = Self { path: path.to_owned(), tail: Mutex::new(tail) };
        if torn > 0 {
            let detail = [("torn_bytes", torn.to_string())];
            let detail: Vec<_> = detail.iter().map(|(name, value)| (*name, value.as_str())).collect();
            let time_ms = std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(0));
            let action =
                Action { time_ms, who: "seriod", what: "RepairAuditLog", on: "audit", detail: &detail };
            log.append(&action)?;
        }
        Ok(log)
    }

    /// Writes a line and syncs it.
    ///
    /// # Errors
    /// It is not in the log; what was to be done should not be done then.
    pub fn append(&self, action: &Action<'_>) -> Result<Receipt, AuditError> {
        let io = at("append to", &self.path);
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = Entry {
            n: tail.number + 1,
            time: rfc3339(action.time_ms),
            who: action.who.to_owned(),
            what: action.what.to_owned(),
            on: action.on.to_owned(),
            detail: action
                .detail
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect(),
            prev: tail.hash.clone(),
        };
        let mut line = serde_json::to_vec(&entry).map_err(|e| io(e.into()))?;
        if line.len() as u64 >= LINE_BYTES_MAX {
            return Err(io(io::ErrorKind::FileTooLarge.into()));
        }
        let hash = hash(&line);
        line.push(b'\n');
        let end = tail.file.seek(SeekFrom::End(0)).map_err(&io)?;
        let written = tail.file.write_all(&line).and_then(|()| tail.file.sync_data());
        if let Err(error) = written {
            // What may be there of it is not in the chain.
            let _ = tail.file.set_len(end);
            return Err(io(error));
        }
        tail.number = entry.n;
        tail.hash.clone_from(&hash);
        Ok(Receipt { number: entry.n, time: entry.time, hash })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Cuts what follows the last line's end; how many bytes.
fn cut_torn_line(file: &mut File) -> io::Result<u64> {
    let len = file.seek(SeekFrom::End(0))?;
    let start = len.saturating_sub(LINE_BYTES_MAX);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(LINE_BYTES_MAX).read_to_end(&mut bytes)?;
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

/// The last line without its end; the file ends in one.
fn last_line(file: &mut File) -> io::Result<Option<Vec<u8>>> {
    let len = file.seek(SeekFrom::End(0))?;
    let start = len.saturating_sub(LINE_BYTES_MAX);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(LINE_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes
        .strip_suffix(b"\n")
        .map(|lines| lines.rsplit(|byte| *byte == b'\n').next().unwrap_or_default().to_vec()))
}

/// What a whole log shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// How many lines there are.
    pub lines: u64,
    /// blake3 of the last one, hex; of an empty log zeros.
    pub hash: String,
}

/// Reads a log from its beginning and checks the chain; calls `each` with the lines.
///
/// # Errors
/// [`AuditError::Broken`] says where.
pub fn verify(path: &Path, mut each: impl FnMut(Entry)) -> Result<Verified, AuditError> {
    let io = at("read", path);
    let mut reader = BufReader::new(File::open(path).map_err(&io)?);
    let mut verified = Verified { lines: 0, hash: FIRST.to_owned() };
    loop {
        let mut line = Vec::new();
        let read = reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line).map_err(&io)?;
        if read == 0 {
            return Ok(verified);
        }
        let number = verified.lines + 1;
        let broken = |why| AuditError::Broken { path: path.to_owned(), line: number, why };
        let line = line.strip_suffix(b"\n").ok_or_else(|| broken("it has no end"))?;
        let entry: Entry = serde_json::from_slice(line).map_err(|_| broken("it is no entry"))?;
        if entry.n != number {
            return Err(broken("its number is not the next one: lines were added or taken out"));
        }
        if entry.prev != verified.hash {
            return Err(broken("it does not follow the line before, which was changed"));
        }
        verified = Verified { lines: number, hash: hash(line) };
        each(entry);
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn action(on: &str) -> Action<'_> {
        let detail = &[("key_id", "ab\"\n"), ("size", "7")];
        Action { time_ms: 1_700_000_000_123, who: "uid 0", what: "EraseVdc", on, detail }
    }

    fn log_of(lines: u64) -> (tempfile::TempDir, PathBuf, Vec<Receipt>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        let mut receipts = Vec::new();
        for i in 0..lines {
            // Opened anew each time: the chain goes on over restarts.
            let log = AuditLog::open(&path).unwrap();
            receipts.push(log.append(&action(&format!("vdcs/v{i}"))).unwrap());
        }
        (dir, path, receipts)
    }

    #[test]
    fn lines_are_chained_over_restarts() {
        let (_dir, path, receipts) = log_of(5);
        let mut on = Vec::new();
        let verified = verify(&path, |entry| on.push(entry.on)).unwrap();
        assert_eq!(on, ["vdcs/v0", "vdcs/v1", "vdcs/v2", "vdcs/v3", "vdcs/v4"]);
        assert_eq!((verified.lines, &verified.hash), (5, &receipts[4].hash));
        assert_eq!(receipts[0].time, "2023-11-14T22:13:20.123Z");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with(r#"{"n":1,"time":"2023-11-14T22:13:20.123Z","who":"uid 0""#));
        assert_eq!(text.lines().count(), 5, "a value cannot end a line");
    }

    #[test]
    fn any_change_before_the_end_is_found() {
        let (_dir, path, _) = log_of(4);
        let good = fs::read(&path).unwrap();
        let last = good.len() - 1 - good[..good.len() - 1].iter().rev().position(|b| *b == b'\n').unwrap();
        for at in 0..last {
            let mut bad = good.clone();
            bad[at] ^= 4;
            fs::write(&path, &bad).unwrap();
            assert!(verify(&path, |_| {}).is_err(), "byte {at}");
        }
        let lines: Vec<_> = good.split_inclusive(|b| *b == b'\n').collect();
        for out in 0..3 {
            let rest: Vec<_> = lines.iter().enumerate().filter(|(i, _)| *i != out).map(|(_, l)| *l).collect();
            fs::write(&path, rest.concat()).unwrap();
            assert!(matches!(verify(&path, |_| {}), Err(AuditError::Broken { .. })), "line {out} taken out");
        }
        // What is cut off at the end shows to who has the receipt.
        fs::write(&path, lines[..3].concat()).unwrap();
        assert_eq!(verify(&path, |_| {}).unwrap().lines, 3);
    }

    #[test]
    fn half_a_line_is_cut_off_and_told() {
        let (_dir, path, _) = log_of(2);
        let good = fs::read(&path).unwrap();
        fs::write(&path, [&good[..], b"{\"n\":3,\"ti"].concat()).unwrap();
        assert!(verify(&path, |_| {}).is_err());
        let log = AuditLog::open(&path).unwrap();
        log.append(&action("vdcs/after")).unwrap();
        let mut what = Vec::new();
        verify(&path, |entry| what.push((entry.what, entry.detail))).unwrap();
        assert_eq!((what[2].0.as_str(), what[2].1["torn_bytes"].as_str()), ("RepairAuditLog", "10"));
        assert_eq!(what.len(), 4);
    }

    #[test]
    fn nonsense_at_the_end_is_not_built_upon() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("audit.log");
        fs::write(&path, "not an entry\n").unwrap();
        assert!(matches!(AuditLog::open(&path), Err(AuditError::Broken { .. })));
        fs::write(&path, vec![b'x'; 100_000]).unwrap();
        assert!(AuditLog::open(&path).is_err());
    }
}
