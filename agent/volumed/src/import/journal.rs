//! `import.journal`, a small JSON file beside the files of a volume that is not finished: from what, and how far.
//!
//! It is replaced whole (a new file, synced, renamed), and only after the data that it speaks of are synced. Whoever goes
//! on compares the source's identity, and reads what is there against the checksum: a journal that lies costs a fresh
//! start, never a wrong disk.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use super::{
    bar::Wish,
    convert::{ConvertError, Steps, Sum},
};

const NAME: &str = "import.journal";
/// A journal is read whole; it is never longer.
const BYTES_MAX: u64 = 64 << 10;
/// Bytes, or time, after which progress is kept.
const KEEP_BYTES: u64 = 1 << 30;
const KEEP_TIME: Duration = Duration::from_secs(5);

/// What stands in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// What is imported: kind, place, size, time.
    pub source: String,
    /// All below is done.
    pub done_bytes: u64,
    /// Its blake3, in hexadecimal digits.
    pub blake3: String,
}

impl Entry {
    fn to_json(&self) -> String {
        serde_json::json!({
            "version": 1, "source": self.source, "done_bytes": self.done_bytes, "blake3": self.blake3
        })
        .to_string()
    }

    fn from_json(text: &str) -> Option<Entry> {
        let json: serde_json::Value = serde_json::from_str(text).ok()?;
        (json.get("version")?.as_u64()? == 1).then_some(())?;
        Some(Entry {
            source: json.get("source")?.as_str()?.to_owned(),
            done_bytes: json.get("done_bytes")?.as_u64()?,
            blake3: json.get("blake3")?.as_str()?.to_owned(),
        })
    }
}

/// The journal of a volume's directory.
#[derive(Debug, Clone)]
pub struct Journal {
    dir: PathBuf,
}

impl Journal {
    /// Of this directory.
    pub fn new(dir: &Path) -> Journal {
        Journal { dir: dir.to_owned() }
    }

    fn path(&self) -> PathBuf {
        self.dir.join(NAME)
    }

    /// What an interrupted import left; nothing if what is there cannot be read.
    pub fn read(&self) -> Option<Entry> {
        let path = self.path();
        (fs::metadata(&path).ok()?.len() <= BYTES_MAX).then_some(())?;
        Entry::from_json(&fs::read_to_string(path).ok()?)
    }

    /// Keeps how far it is.
    pub fn write(&self, entry: &Entry) -> io::Result<()> {
        let new = self.dir.join("import.journal.new");
        let mut file = File::create(&new)?;
        file.write_all(entry.to_json().as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, self.path())?;
        File::open(&self.dir)?.sync_all()
    }

    /// It is not needed any more.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_file(self.path()) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

/// Keeps the journal while an import goes on.
pub(super) struct Keeping<'a> {
    pub(super) journal: &'a Journal,
    pub(super) source: &'a str,
    pub(super) data: &'a File,
    pub(super) wish: &'a Wish,
    /// Without a checksum nothing can be verified later, so nothing is kept.
    pub(super) last: (u64, Instant),
}

impl Keeping<'_> {
    fn keep(&mut self, done: u64, sum: &Sum) -> Result<(), ConvertError> {
        let io = |what| move |source| ConvertError::Io { what, source };
        let Some(value) = sum.value() else { return Ok(()) };
        self.data.sync_data().map_err(io("sync the disk"))?;
        let entry = Entry { source: self.source.to_owned(), done_bytes: done, blake3: hex(&value) };
        self.journal.write(&entry).map_err(io("keep the journal of the import"))?;
        self.last = (done, Instant::now());
        Ok(())
    }
}

impl Steps for Keeping<'_> {
    fn step(&mut self, done: u64, sum: &Sum) -> Result<(), ConvertError> {
        let (kept, when) = self.last;
        let due = done.saturating_sub(kept) >= KEEP_BYTES || when.elapsed() >= KEEP_TIME;
        if due || self.wish.stops() { self.keep(done, sum) } else { Ok(()) }
    }

    fn stops(&self) -> bool {
        self.wish.stops()
    }
}

/// Hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_comes_back_and_rubbish_does_not() {
        let temp = tempfile::tempdir().expect("tempdir");
        let journal = Journal::new(temp.path());
        assert_eq!(journal.read(), None);
        let entry = Entry { source: "a \"b\"\n".into(), done_bytes: 5, blake3: hex(&[1, 255]) };
        journal.write(&entry).expect("write");
        assert_eq!(journal.read(), Some(entry));
        for rubbish in ["", "{}", "{\"version\":2}", "[1]", "\u{0}"] {
            fs::write(journal.path(), rubbish).expect("write");
            assert_eq!(journal.read(), None);
        }
        journal.remove().expect("remove");
        journal.remove().expect("nothing to remove");
    }
}
