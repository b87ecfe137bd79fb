//! `--key FILE`: the key of encrypted volumes, for people. seriod passes keys over its socket instead.
//!
//! The file holds 32 random bytes, or 64 hex digits that stand for them. What tells one key from another, so that a wrong one
//! is named, is derived from it: the volume keeps only that.

use std::{
    fs::File,
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use serio_volume::{VdcSecret, VolumeDir};
use zeroize::Zeroizing;

/// What a key's name is derived under.
const NAME_OF: &str = "serio-volumed key file, name of the key";
/// 64 digits, and ends of lines.
const FILE_BYTES_MAX: u64 = 128;

/// Volume directories, opened with the key if there is one.
#[derive(Debug, Default)]
pub struct Dirs {
    key: Option<VdcSecret>,
}

impl Dirs {
    /// Reads the key.
    pub fn with_key(file: Option<&Path>) -> anyhow::Result<Dirs> {
        Ok(Dirs { key: file.map(read).transpose()? })
    }

    /// The volume in a directory.
    pub fn at(&self, path: impl Into<PathBuf>) -> VolumeDir {
        let dir = VolumeDir::new(path);
        match &self.key {
            Some(key) => dir.with_key(key.clone()),
            None => dir,
        }
    }

    /// Whether new volumes are encrypted.
    pub fn encrypt(&self) -> bool {
        self.key.is_some()
    }
}

fn read(path: &Path) -> anyhow::Result<VdcSecret> {
    let name = path.display();
    let file = File::open(path).with_context(|| format!("cannot open the key {name}"))?;
    let meta = file.metadata().with_context(|| format!("cannot look at the key {name}"))?;
    if meta.mode() & 0o077 != 0 && meta.is_file() {
        bail!("the key {name} can be read by others: chmod 600 {name}");
    }
    let mut text = Zeroizing::new(Vec::with_capacity(FILE_BYTES_MAX as usize));
    file.take(FILE_BYTES_MAX)
        .read_to_end(&mut text)
        .with_context(|| format!("cannot read the key {name}"))?;
    let Some(key) = parse(&text) else {
        bail!(
            "the key {name} has {} bytes: 32 random ones are needed, or 64 hex digits; for a new one: \
             (umask 077; head -c 32 /dev/urandom > {name})",
            text.len()
        );
    };
    let digest = blake3::derive_key(NAME_OF, &*key);
    let id = digest.first_chunk().context("a digest has 32 bytes")?;
    Ok(VdcSecret::new(*id, *key))
}

fn parse(text: &[u8]) -> Option<Zeroizing<[u8; 32]>> {
    let mut key = Zeroizing::new([0; 32]);
    if text.len() == key.len() {
        key.copy_from_slice(text);
        return Some(key);
    }
    let digits = text.trim_ascii();
    if digits.len() != 2 * key.len() {
        return None;
    }
    let value = |digit: u8| char::from(digit).to_digit(16).and_then(|v| u8::try_from(v).ok());
    for (byte, pair) in key.iter_mut().zip(digits.as_chunks::<2>().0) {
        *byte = value(pair[0])? << 4 | value(pair[1])?;
    }
    Some(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_is_bytes_or_digits_and_nobody_else_s() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let put = |bytes: &[u8], mode| {
            std::fs::write(&path, bytes).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            Dirs::with_key(Some(&path)).map(|dirs| format!("{dirs:?}"))
        };
        let bytes = put(&[0xab; 32], 0o600).unwrap();
        assert_eq!(put("aB".repeat(32).as_bytes(), 0o400).unwrap(), bytes);
        assert_eq!(put(("ab".repeat(32) + "\n").as_bytes(), 0o400).unwrap(), bytes);
        assert_ne!(put(&[0xac; 32], 0o600).unwrap(), bytes);
        assert!(put(&[0xab; 32], 0o640).unwrap_err().to_string().contains("chmod 600"));
        for wrong in [&b""[..], &[1; 31], &[b'x'; 64], &[7; 1000]] {
            assert!(put(wrong, 0o600).unwrap_err().to_string().contains("64 hex digits"));
        }
        assert!(!Dirs::with_key(None).unwrap().encrypt());
    }
}
