//! Reading: the files in their order, and whether the lines follow each other. Works without a daemon, on copies too.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use crate::{AuditError, Entry, FIRST, LINE_BYTES_MAX, hash};

/// The file that grows.
pub(crate) const OPEN: &str = "audit.log";

pub(crate) fn at(what: &'static str, path: &Path) -> impl Fn(io::Error) -> AuditError {
    let path = path.to_owned();
    move |source| AuditError::File { what, path: path.clone(), source }
}

/// The name of a closed file.
pub(crate) fn closed_name(first: u64) -> String {
    format!("audit-{first:020}.log")
}

/// Of a closed file: the number of its first line.
pub(crate) fn first_of(name: &str) -> Option<u64> {
    let digits = name.strip_prefix("audit-")?.strip_suffix(".log")?;
    (digits.len() == 20).then(|| digits.parse().ok()).flatten()
}

/// The closed files of a directory by the numbers of their first lines, oldest first.
pub(crate) fn closed(dir: &Path) -> Result<Vec<(u64, PathBuf)>, AuditError> {
    let io = at("list", dir);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(&io)? {
        let entry = entry.map_err(&io)?;
        if let Some(first) = entry.file_name().to_str().and_then(first_of) {
            found.push((first, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

/// The files of a log, oldest first. `path` is a directory that has them, or a single file.
///
/// # Errors
/// It cannot be read.
pub fn files_of(path: &Path) -> Result<Vec<PathBuf>, AuditError> {
    if !fs::metadata(path).map_err(at("look at", path))?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut files: Vec<PathBuf> = closed(path)?.into_iter().map(|(_, file)| file).collect();
    let open = path.join(OPEN);
    if open.exists() {
        files.push(open);
    }
    Ok(files)
}

/// What a whole log shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// How many lines there are.
    pub lines: u64,
    /// The number of the first one, 0 if there is none. Beyond 1: earlier files are not here, and whether they were as they
    /// should be is not known.
    pub first: u64,
    /// The number of the last one.
    pub last: u64,
    /// blake3 of the last one, hex; of an empty log zeros.
    pub hash: String,
}

/// Takes one line after the other, and says where they do not follow each other.
#[derive(Debug, Clone)]
pub struct Chain {
    seen: Verified,
}

impl Default for Chain {
    fn default() -> Self {
        Self { seen: Verified { lines: 0, first: 0, last: 0, hash: FIRST.to_owned() } }
    }
}

impl Chain {
    /// The next line, without its end. The first one that is given may have any number; the first of all has the hash of none.
    ///
    /// # Errors
    /// Why it does not follow.
    pub fn take(&mut self, line: &[u8]) -> Result<Entry, &'static str> {
        let entry: Entry = serde_json::from_slice(line).map_err(|_| "it is no entry")?;
        if self.seen.lines == 0 && entry.n > 1 {
            self.seen.first = entry.n;
        } else {
            if self.seen.last.checked_add(1) != Some(entry.n) {
                return Err("its number is not the next one: lines were added or taken out");
            }
            if entry.prev != self.seen.hash {
                return Err("it does not follow the line before, which was changed");
            }
            self.seen.first = self.seen.first.max(1);
        }
        self.seen.lines += 1;
        self.seen.last = entry.n;
        self.seen.hash = hash(line);
        Ok(entry)
    }

    /// What was seen so far.
    #[must_use]
    pub fn seen(&self) -> &Verified {
        &self.seen
    }
}

/// Reads files in order and checks the chain over all of them; calls `each` with the lines and their hashes. Half a line
/// at the very end is left out: it is one that is being written.
///
/// # Errors
/// [`AuditError::Broken`] says where.
pub fn verify(files: &[PathBuf], mut each: impl FnMut(Entry, &str)) -> Result<Verified, AuditError> {
    let mut chain = Chain::default();
    for (index, path) in files.iter().enumerate() {
        let io = at("read", path);
        let mut reader = BufReader::new(File::open(path).map_err(&io)?);
        for number in 1.. {
            let mut line = Vec::new();
            let read = reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line).map_err(&io)?;
            if read == 0 {
                break;
            }
            let broken = |why| AuditError::Broken { path: path.to_owned(), line: number, why };
            let Some(line) = line.strip_suffix(b"\n") else {
                if index + 1 == files.len() && (line.len() as u64) < LINE_BYTES_MAX {
                    break;
                }
                return Err(broken("it has no end"));
            };
            let entry = chain.take(line).map_err(broken)?;
            each(entry, &chain.seen().hash);
        }
    }
    Ok(chain.seen.clone())
}
