//! The keys of encrypted vdcs: made, kept wrapped, given to the processes that hold their volumes, rotated, destroyed.
//!
//! ```text
//! key encryption key      seriod.toml [keys] source: a file, a credential, a command       source.rs
//!        │ wraps
//! key of a vdc            STATE/keys/<vdc uuid>, one small file                            wrapped.rs
//!        │ wraps, in serio-vmm and serio-volumed
//! data key of a layer     in the header of its map file                                    agent/volume
//! ```
//!
//! Rotating the key encryption key rewrites the small file: no volume is touched, running VMs do not notice. Destroying
//! that file makes all bytes of the vdc's volumes unreadable for ever, wherever copies of them are. What remains then is
//! `<vdc uuid>.erased`, so that nobody makes a new key by accident. Which vdc's key a volume is encrypted under stands in
//! `STATE/keys/volumes/<volume uuid>`, written before the volume is made: a volume without that file is a plain one, and if it is
//! not, whoever opens it says so.
//!
//! Owns: STATE/keys. Never: keeps a key in the clear, in memory for longer than a question, or on disk at all; logs one.
//! Threads: none; the files are changed by one caller at a time.

#[cfg(test)]
mod keys_test;
mod source;
mod wrapped;

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use serio_control::message::VdcKey;
use tokio::sync::Mutex;
use uuid::Uuid;
use zeroize::Zeroizing;

use self::wrapped::{Secret, WrappedFile};
pub use source::{Source, SourceError};

/// The largest file that is read: one that we wrote has a quarter of it.
const FILE_BYTES_MAX: u64 = 4096;
/// Below STATE/keys: whose key a volume is encrypted under.
const VOLUMES: &str = "volumes";

/// Why a key is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// Nothing is configured.
    #[error(
        "this node has no key encryption key: set source in the section [keys] of seriod.toml, then restart seriod"
    )]
    NotConfigured,
    /// The source does not give it.
    #[error("the key encryption key is not to be had")]
    Source(#[from] SourceError),
    /// No configured source opens it.
    #[error(
        "the key of vdc {vdc} is wrapped under another key encryption key ({kek}) than those of [keys] in seriod.toml: add its source to `previous`"
    )]
    OtherKek {
        /// The vdc.
        vdc: Uuid,
        /// The name of the key that is needed.
        kek: String,
    },
    /// It is not there.
    #[error(
        "the key of vdc {0} is not in STATE/keys: restore it from a backup; without it the volumes cannot be read"
    )]
    Missing(Uuid),
    /// It was destroyed on purpose.
    #[error("the key of vdc {0} was destroyed: its volumes can only be deleted")]
    Erased(Uuid),
    /// The file is damaged.
    #[error("{0} is damaged: restore it from a backup")]
    Damaged(PathBuf),
    /// The disk.
    #[error("cannot {what} {path}")]
    File {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The answer.
        #[source]
        source: io::Error,
    },
    /// No random bytes.
    #[error("the system gave no random bytes: {0}")]
    Random(getrandom::Error),
}

/// A key that was wrapped anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rotated {
    /// Which key of the vdc.
    pub key_id: String,
    /// The name of the key encryption key that wrapped it.
    pub from: String,
    /// The name of the one that does now.
    pub to: String,
}

/// A key that is no more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destroyed {
    /// Which key of the vdc.
    pub key_id: String,
    /// blake3 of the file that was destroyed, hex.
    pub blake3: String,
}

/// See the head of this file. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Keys {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    source: Option<Source>,
    previous: Vec<Source>,
    /// Held while a file is changed.
    change: Mutex<()>,
}

fn at(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KeysError {
    let path = path.to_owned();
    move |source| KeysError::File { what, path, source }
}

fn random<const N: usize>() -> Result<[u8; N], KeysError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(KeysError::Random)?;
    Ok(bytes)
}

impl Keys {
    /// Keys below `state_dir`. `source` and `previous` as in seriod.toml; empty: none.
    ///
    /// # Errors
    /// A source is not one, or the directory cannot be made.
    pub fn new(state_dir: &Path, source: &str, previous: &[String]) -> Result<Self, KeysError> {
        let dir = state_dir.join("keys");
        let volumes = dir.join(VOLUMES);
        DirBuilder::new().recursive(true).mode(0o700).create(&volumes).map_err(at("create", &volumes))?;
        let source = if source.is_empty() { None } else { Some(source.parse()?) };
        let previous = previous.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
        Ok(Self { inner: Arc::new(Inner { dir, source, previous, change: Mutex::new(()) }) })
    }

    fn path(&self, vdc: Uuid) -> PathBuf {
        self.inner.dir.join(vdc.to_string())
    }

    fn erased_path(&self, vdc: Uuid) -> PathBuf {
        self.inner.dir.join(format!("{vdc}.erased"))
    }

    /// Whether a vdc's key could be made now.
    ///
    /// # Errors
    /// There is no key encryption key, or it is not to be had.
    pub async fn check(&self) -> Result<(), KeysError> {
        self.inner.source.as_ref().ok_or(KeysError::NotConfigured)?.load().await?;
        Ok(())
    }

    /// Makes the key of a vdc, unless it has one.
    ///
    /// # Errors
    /// [`KeysError`]; the key of an erased vdc is never made again.
    pub async fn ensure(&self, vdc: Uuid) -> Result<(), KeysError> {
        let _one = self.inner.change.lock().await;
        match self.read(vdc) {
            Err(KeysError::Missing(_)) => {}
            other => return other.map(drop),
        }
        let kek = self.inner.source.as_ref().ok_or(KeysError::NotConfigured)?.load().await?;
        let secret = Secret { id: random()?, key: Zeroizing::new(random()?) };
        self.write(vdc, &WrappedFile::wrap(vdc, &secret, &kek, random()?))
    }

    /// The key of a vdc, for a process that holds its volumes.
    ///
    /// # Errors
    /// [`KeysError`].
    pub async fn open(&self, vdc: Uuid) -> Result<VdcKey, KeysError> {
        let secret = self.secret(vdc, &self.read(vdc)?).await?;
        Ok(VdcKey { id: secret.id.to_vec(), secret: secret.key.to_vec() })
    }

    /// Notes that a new volume is encrypted under a vdc's key, which is made if it is not there.
    ///
    /// # Errors
    /// [`KeysError`].
    pub async fn assign(&self, volume: Uuid, vdc: Uuid) -> Result<(), KeysError> {
        self.ensure(vdc).await?;
        let _one = self.inner.change.lock().await;
        self.replace(&self.volume_path(volume), format!("{vdc}\n").as_bytes())
    }

    /// A copy is encrypted as its source is.
    ///
    /// # Errors
    /// [`KeysError`].
    pub async fn assign_like(&self, volume: Uuid, source: Uuid) -> Result<(), KeysError> {
        match self.owner(source)? {
            Some(vdc) => self.assign(volume, vdc).await,
            None => Ok(()),
        }
    }

    /// A volume is gone.
    pub fn unassign(&self, volume: Uuid) {
        // What is left of it harms nobody: no other volume ever has this id.
        let _ = fs::remove_file(self.volume_path(volume));
    }

    /// The key that opens a volume; none if it is a plain one.
    ///
    /// # Errors
    /// [`KeysError`].
    pub async fn key_of(&self, volume: Uuid) -> Result<Option<VdcKey>, KeysError> {
        match self.owner(volume)? {
            Some(vdc) => self.open(vdc).await.map(Some),
            None => Ok(None),
        }
    }

    fn volume_path(&self, volume: Uuid) -> PathBuf {
        self.inner.dir.join(VOLUMES).join(volume.to_string())
    }

    fn owner(&self, volume: Uuid) -> Result<Option<Uuid>, KeysError> {
        let path = self.volume_path(volume);
        let bytes = match read_bounded(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(at("read", &path))?,
        };
        let vdc = std::str::from_utf8(&bytes).ok().and_then(|text| text.trim_end().parse().ok());
        vdc.map(Some).ok_or(KeysError::Damaged(path))
    }

    /// Wraps the key of a vdc under the key encryption key of today.
    ///
    /// # Errors
    /// [`KeysError`].
    pub async fn rotate(&self, vdc: Uuid) -> Result<Rotated, KeysError> {
        let _one = self.inner.change.lock().await;
        let old = self.read(vdc)?;
        let secret = self.secret(vdc, &old).await?;
        let kek = self.inner.source.as_ref().ok_or(KeysError::NotConfigured)?.load().await?;
        let new = WrappedFile::wrap(vdc, &secret, &kek, random()?);
        self.write(vdc, &new)?;
        Ok(Rotated { key_id: old.key_id, from: old.kek, to: new.kek })
    }

    /// Destroys the key of a vdc: first it is written down that this was meant, then the file is overwritten and removed.
    /// Interrupted, it goes on when asked again. `None`: it was gone already.
    ///
    /// # Errors
    /// [`KeysError`].
    pub async fn destroy(&self, vdc: Uuid) -> Result<Option<Destroyed>, KeysError> {
        let _one = self.inner.change.lock().await;
        let (path, erased) = (self.path(vdc), self.erased_path(vdc));
        let bytes = match read_bounded(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            other => other.map_err(at("read", &path))?,
        };
        let file = WrappedFile::parse(&bytes);
        let destroyed = Destroyed {
            key_id: file.map_or_else(|| "unknown".to_owned(), |file| file.key_id),
            blake3: blake3::hash(&bytes).to_hex().to_string(),
        };
        if !erased.exists() {
            let note = format!(
                "{{\"vdc\":\"{vdc}\",\"key_id\":\"{}\",\"blake3\":\"{}\"}}\n",
                destroyed.key_id, destroyed.blake3
            );
            self.replace(&erased, note.as_bytes())?;
        }
        if bytes.is_empty() && !path.exists() {
            return Ok(None);
        }
        let file = OpenOptions::new().write(true).open(&path).map_err(at("open", &path))?;
        // In place, for file systems that write in place. Others keep old blocks for a while: what stays there is still
        // wrapped under the key encryption key.
        for fill in [0xff, 0] {
            file.write_all_at(&vec![fill; bytes.len()], 0).map_err(at("overwrite", &path))?;
            file.sync_all().map_err(at("sync", &path))?;
        }
        fs::remove_file(&path).map_err(at("remove", &path))?;
        self.sync_dir()?;
        Ok(Some(destroyed))
    }

    /// Vdcs whose erasure was begun and perhaps not finished.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn half_erased(&self) -> Result<Vec<Uuid>, KeysError> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.inner.dir).map_err(at("read", &self.inner.dir))? {
            let name = entry.map_err(at("read", &self.inner.dir))?.file_name();
            let vdc = name.to_str().and_then(|name| name.strip_suffix(".erased")?.parse().ok());
            found.extend(vdc.filter(|vdc| self.path(*vdc).exists()));
        }
        Ok(found)
    }

    /// Forgets a deleted vdc: its files go. Nothing of it is encrypted any more.
    ///
    /// # Errors
    /// [`KeysError::File`].
    pub async fn forget(&self, vdc: Uuid) -> Result<(), KeysError> {
        let _one = self.inner.change.lock().await;
        for path in [self.path(vdc), self.erased_path(vdc)] {
            match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(at("remove", &path)(e)),
                _ => {}
            }
        }
        self.sync_dir()
    }

    fn read(&self, vdc: Uuid) -> Result<WrappedFile, KeysError> {
        if self.erased_path(vdc).exists() {
            return Err(KeysError::Erased(vdc));
        }
        let path = self.path(vdc);
        match read_bounded(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(KeysError::Missing(vdc)),
            Err(e) => Err(at("read", &path)(e)),
            Ok(bytes) => WrappedFile::parse(&bytes).ok_or(KeysError::Damaged(path)),
        }
    }

    async fn secret(&self, vdc: Uuid, file: &WrappedFile) -> Result<Secret, KeysError> {
        let source = self.inner.source.as_ref().ok_or(KeysError::NotConfigured)?;
        let kek = source.load().await?;
        if wrapped::kek_name(&kek) == file.kek {
            return file.unwrap(vdc, &kek).ok_or_else(|| KeysError::Damaged(self.path(vdc)));
        }
        for source in &self.inner.previous {
            let kek = match source.load().await {
                Ok(kek) => kek,
                Err(error) => {
                    // Another one may be the right one.
                    tracing::warn!(%source, error = &error as &dyn std::error::Error, "a previous key is not to be had");
                    continue;
                }
            };
            if wrapped::kek_name(&kek) == file.kek {
                return file.unwrap(vdc, &kek).ok_or_else(|| KeysError::Damaged(self.path(vdc)));
            }
        }
        Err(KeysError::OtherKek { vdc, kek: file.kek.clone() })
    }

    fn write(&self, vdc: Uuid, file: &WrappedFile) -> Result<(), KeysError> {
        self.replace(&self.path(vdc), &file.to_bytes())
    }

    /// Writes a file whole or not at all: beside it, synced, renamed, the directory synced.
    fn replace(&self, path: &Path, bytes: &[u8]) -> Result<(), KeysError> {
        let new = path.with_extension("new");
        let written =
            OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&new).and_then(
                |mut file| {
                    file.write_all(bytes)?;
                    file.sync_all()
                },
            );
        written.map_err(at("write", &new))?;
        fs::rename(&new, path).map_err(at("replace", path))?;
        let dir = path.parent().unwrap_or(&self.inner.dir);
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(at("sync", dir))
    }

    fn sync_dir(&self) -> Result<(), KeysError> {
        let dir = &self.inner.dir;
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(at("sync", dir))
    }
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    use io::Read as _;
    let mut bytes = Vec::new();
    File::open(path)?.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(bytes)
}
