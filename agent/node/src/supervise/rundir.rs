//! The files by which a process is found again: who it is (`meta`), its sockets, its last words (`exit`).
//!
//! Owns: their names and forms. Never: processes.
//!
//! `meta` is JSON of one line, written to a temporary file, synced and renamed, so it is whole or absent. Fields
//! are only ever added: a newer seriod reads what an older one wrote.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::{
        fs::{DirBuilderExt, OpenOptionsExt},
        net::UnixListener,
    },
    path::{Path, PathBuf},
};

use prost::Message;
use serde::{Deserialize, Serialize};
use serio_control::message;

use super::{
    error::{FileError, SpawnError},
    plan::{EndKind, EndRecord},
};

/// The largest `exit` file that is read: a kind and a sentence.
const EXIT_BYTES_MAX: u64 = 64 * 1024;
/// Past this a log of standard error is cut back to its tail.
const LOG_BYTES_MAX: u64 = 1 << 20;
/// What stays then.
const LOG_BYTES_KEPT: u64 = 128 * 1024;

/// Who a process is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Meta {
    /// Its number.
    pub(super) pid: u32,
    /// Its start, clock ticks after boot.
    pub(super) start_ticks: u64,
    /// The boot that these are of.
    pub(super) boot_id: String,
    /// The VM's generation when it was launched; 0 for exports.
    #[serde(default)]
    pub(super) generation: u64,
    /// blake3 of what it was asked to run, hex.
    #[serde(default)]
    pub(super) plan: String,
    /// Bridges to look at when it has ended.
    #[serde(default)]
    pub(super) bridges: Vec<String>,
}

/// The files of one VM's run.
#[derive(Debug, Clone)]
pub(super) struct RunDir {
    path: PathBuf,
}

impl RunDir {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn control(&self) -> PathBuf {
        self.path.join("control.sock")
    }

    pub(super) fn console(&self) -> PathBuf {
        self.path.join("console.sock")
    }

    /// Clients of the guest's vsock ports.
    pub(super) fn vsock(&self) -> PathBuf {
        self.path.join("vsock.sock")
    }

    /// Where somebody waits for the guest's connections to that port.
    pub(super) fn vsock_port(&self, port: u32) -> PathBuf {
        self.path.join(format!("vsock_{port}"))
    }

    pub(super) fn exit(&self) -> PathBuf {
        self.path.join("exit")
    }

    pub(super) fn meta(&self) -> PathBuf {
        self.path.join("meta")
    }

    pub(super) fn stderr(&self) -> PathBuf {
        self.path.join("vmm.log")
    }

    /// What the VM's process said last. `None` when it has said nothing.
    pub(super) fn last_words(&self) -> Option<EndRecord> {
        let mut bytes = Vec::new();
        File::open(self.exit()).ok()?.take(EXIT_BYTES_MAX).read_to_end(&mut bytes).ok()?;
        if bytes.is_empty() {
            return None;
        }
        let record = message::EndRecord::decode(bytes.as_slice()).ok()?;
        let kind = match record.kind() {
            message::EndKind::Unspecified => EndKind::Died,
            message::EndKind::PowerOff => EndKind::PowerOff,
            message::EndKind::Reset => EndKind::Reset,
            message::EndKind::Stopped => EndKind::Stopped,
            message::EndKind::GuestError => EndKind::GuestError,
            message::EndKind::HostError => EndKind::HostError,
            message::EndKind::LaunchFailed => EndKind::LaunchFailed,
        };
        Some(EndRecord { kind, reason: record.reason })
    }
}

/// Writes a `meta` file: whole, synced, or not at all.
pub(super) fn write_meta(path: &Path, meta: &Meta) -> Result<(), FileError> {
    let text = serde_json::to_vec(meta).expect("a struct of numbers and texts always makes JSON");
    let temporary = path.with_extension("new");
    let write = || -> io::Result<()> {
        let mut file = File::create(&temporary)?;
        file.write_all(&text)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        sync_parent(path)
    };
    write().map_err(FileError::at("write", path))
}

/// Reads a `meta` file. `None` when there is none, it is not whole, or it is of another boot.
pub(super) fn read_meta(path: &Path) -> Option<Meta> {
    let meta: Meta = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
    (meta.boot_id == boot_id()).then_some(meta)
}

/// Which boot of the host this is.
pub(super) fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Makes a directory that only root enters, and those above it.
pub(super) fn make_dir(path: &Path) -> Result<(), FileError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(FileError::at("create", path))
}

/// Makes what was created in, renamed in or removed from the parent of `path` survive a power cut.
pub(super) fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// Removes a file or directory; that it is not there is fine.
pub(super) fn remove(path: &Path) -> Result<(), FileError> {
    let removed = if fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir()) {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match removed {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(FileError::at("remove", path)),
    }
}

/// As [`remove`]; a failure is logged, not told.
pub(super) fn remove_quietly(path: &Path) {
    if let Err(error) = remove(path) {
        tracing::warn!(error = &error as &dyn std::error::Error, "a leftover stays");
    }
}

/// A new file that only root reads; there must be none of that name.
pub(super) fn create_new(path: &Path) -> Result<File, FileError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600);
    options.open(path).map_err(FileError::at("create", path))
}

/// A log that is appended to, kept from earlier.
pub(super) fn open_log(path: &Path) -> Result<File, FileError> {
    let mut options = OpenOptions::new();
    options.read(true).append(true).create(true).mode(0o600);
    options.open(path).map_err(FileError::at("open", path))
}

/// Listens on a new Unix socket.
pub(super) fn listen(path: &Path) -> Result<UnixListener, SpawnError> {
    UnixListener::bind(path).map_err(|source| SpawnError::Listen { path: path.to_owned(), source })
}

/// Cuts a log back to its tail when it has grown too long. Its writer appends, so it goes on at the new end.
pub(super) fn bound_log(path: &Path) {
    let bound = || -> io::Result<()> {
        let mut file = OpenOptions::new().read(true).append(true).open(path)?;
        let len = file.metadata()?.len();
        if len <= LOG_BYTES_MAX {
            return Ok(());
        }
        let mut tail = Vec::new();
        file.seek(SeekFrom::Start(len - LOG_BYTES_KEPT))?;
        Read::by_ref(&mut file).take(LOG_BYTES_KEPT).read_to_end(&mut tail)?;
        file.set_len(0)?;
        file.write_all(&tail)
    };
    // Its absence only means that the run has ended.
    let _ = bound();
}

/// The last lines of a log, for a message: at most 500 bytes of text.
pub(super) fn log_tail(path: &Path) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let len = file.metadata()?.len();
        file.seek(SeekFrom::Start(len.saturating_sub(500)))?;
        let mut bytes = Vec::new();
        file.take(500).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    };
    read().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meta_is_whole_or_absent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meta");
        assert_eq!(read_meta(&path), None);
        let meta = Meta {
            pid: 7,
            start_ticks: 9,
            boot_id: boot_id(),
            generation: 3,
            plan: "ab".into(),
            bridges: vec!["srv-1".into()],
        };
        write_meta(&path, &meta).unwrap();
        assert_eq!(read_meta(&path), Some(meta.clone()));
        write_meta(&path, &Meta { boot_id: "another".into(), ..meta }).unwrap();
        assert_eq!(read_meta(&path), None, "a process number of another boot means nothing");
        fs::write(&path, b"{\"pid\":7").unwrap();
        assert_eq!(read_meta(&path), None);
    }

    #[test]
    fn last_words() {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::new(dir.path().to_owned());
        assert_eq!(run.last_words(), None);
        fs::write(run.exit(), b"").unwrap();
        assert_eq!(run.last_words(), None);
        let record =
            message::EndRecord { kind: message::EndKind::GuestError.into(), reason: "triple".into() };
        fs::write(run.exit(), record.encode_to_vec()).unwrap();
        let expected = EndRecord { kind: EndKind::GuestError, reason: "triple".into() };
        assert_eq!(run.last_words(), Some(expected));
        fs::write(run.exit(), [0xff; 9]).unwrap();
        assert_eq!(run.last_words(), None, "garbage is no word");
    }

    #[test]
    fn a_long_log_keeps_its_tail() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm.log");
        fs::write(&path, vec![b'a'; LOG_BYTES_MAX as usize]).unwrap();
        bound_log(&path);
        assert_eq!(fs::metadata(&path).unwrap().len(), LOG_BYTES_MAX);
        let mut log = open_log(&path).unwrap();
        log.write_all(b"the end").unwrap();
        bound_log(&path);
        assert_eq!(fs::metadata(&path).unwrap().len(), LOG_BYTES_KEPT);
        log.write_all(b"!").unwrap();
        assert!(log_tail(&path).ends_with("athe end!"));
    }
}
