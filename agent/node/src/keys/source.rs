//! Where the key encryption key comes from: a file, a systemd credential, or what a command prints.
//!
//! The key is 32 bytes, as such or as 64 hexadecimal digits. It is read anew each time that it is needed and wiped
//! afterwards, so that whoever keeps it may change, move or lock it. No shell is involved, output and time are bounded.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    process::Stdio,
    str::FromStr,
    time::Duration,
};

use tokio::io::AsyncReadExt;
use zeroize::Zeroizing;

/// A key encryption key.
pub(super) type Kek = Zeroizing<[u8; 32]>;

/// How long a command may take.
const COMMAND_WAIT: Duration = Duration::from_secs(10);
/// More than this is no key; of an error message no more is shown.
const OUTPUT_BYTES_MAX: u64 = 4096;
/// Where systemd puts credentials.
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";

/// Why the key encryption key is not to be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The configuration does not name a source.
    #[error("`{0}` is no source of a key: write file:/PATH, credential:NAME, or command:/PATH ARGUMENT…")]
    Syntax(String),
    /// It cannot be read.
    #[error("cannot read the key from {0}")]
    Read(String, #[source] io::Error),
    /// Others can read it.
    #[error("{path} may be read by others (mode {mode:o}): chmod 600 {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// systemd gave no credentials.
    #[error(
        "there is no credential `{0}`: seriod was not started by systemd with credentials; set LoadCredential={0}:PATH in its unit"
    )]
    NoCredentials(String),
    /// The command failed.
    #[error("the command {command} {how}")]
    Command {
        /// The program.
        command: String,
        /// What it did.
        how: String,
    },
    /// It is no key.
    #[error(
        "what {0} gives is no key: it must be 32 bytes, or 64 hexadecimal digits; `head -c 32 /dev/urandom` makes one"
    )]
    Form(String),
}

/// A source, as it is written in seriod.toml.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// `file:/etc/serio/kek`.
    File(PathBuf),
    /// `credential:serio-kek`.
    Credential(String),
    /// `command:/usr/bin/kms get serio`; split at spaces, run without a shell.
    Command(Vec<String>),
}

impl FromStr for Source {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        let wrong = || SourceError::Syntax(text.to_owned());
        let (kind, rest) = text.split_once(':').ok_or_else(wrong)?;
        match kind {
            "file" if rest.starts_with('/') => Ok(Self::File(rest.into())),
            "credential" if !rest.is_empty() && !rest.contains('/') && !rest.starts_with('.') => {
                Ok(Self::Credential(rest.to_owned()))
            }
            "command" if rest.starts_with('/') => {
                Ok(Self::Command(rest.split_whitespace().map(str::to_owned).collect()))
            }
            _ => Err(wrong()),
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Credential(name) => write!(f, "credential:{name}"),
            // The arguments may be nobody's business.
            Self::Command(words) => write!(f, "command:{}", words.first().map_or("", String::as_str)),
        }
    }
}

impl Source {
    /// Reads the key.
    pub(super) async fn load(&self) -> Result<Kek, SourceError> {
        let bytes = match self {
            Self::File(path) => read_file(path)?,
            Self::Credential(name) => {
                let dir =
                    std::env::var_os(CREDENTIALS).ok_or_else(|| SourceError::NoCredentials(name.clone()))?;
                // systemd has made sure that nobody else reads it.
                read_bounded(&Path::new(&dir).join(name))?
            }
            Self::Command(words) => run(words).await?,
        };
        parse(&bytes).ok_or_else(|| SourceError::Form(self.to_string()))
    }
}

fn read_bounded(path: &Path) -> Result<Zeroizing<Vec<u8>>, SourceError> {
    use io::Read as _;
    let mut bytes = Zeroizing::new(Vec::with_capacity(OUTPUT_BYTES_MAX as usize));
    fs::File::open(path)
        .and_then(|file| file.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes))
        .map_err(|e| SourceError::Read(path.display().to_string(), e))?;
    Ok(bytes)
}

fn read_file(path: &Path) -> Result<Zeroizing<Vec<u8>>, SourceError> {
    let meta = fs::metadata(path).map_err(|e| SourceError::Read(path.display().to_string(), e))?;
    if meta.mode() & 0o077 != 0 {
        return Err(SourceError::Open { path: path.to_owned(), mode: meta.mode() & 0o7777 });
    }
    read_bounded(path)
}

async fn run(words: &[String]) -> Result<Zeroizing<Vec<u8>>, SourceError> {
    let (program, arguments) =
        words.split_first().ok_or_else(|| SourceError::Syntax("command:".to_owned()))?;
    let failed = |how: String| SourceError::Command { command: program.clone(), how };
    let mut child = tokio::process::Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|e| failed(format!("cannot be started: {e}")))?;
    let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(failed("has no output".to_owned()));
    };
    let mut bytes = Zeroizing::new(Vec::with_capacity(OUTPUT_BYTES_MAX as usize));
    let mut words = Vec::new();
    let (mut stdout, mut stderr) = (stdout.take(OUTPUT_BYTES_MAX), stderr.take(OUTPUT_BYTES_MAX));
    let all = async {
        // Both at once: a command that fills one pipe would never come to the other.
        tokio::try_join!(stdout.read_to_end(&mut bytes), stderr.read_to_end(&mut words))?;
        // Who writes more gets a broken pipe, and that is its failure.
        drop((stdout, stderr));
        child.wait().await
    };
    match tokio::time::timeout(COMMAND_WAIT, all).await {
        Err(_) => Err(failed(format!("gave no key within {} s", COMMAND_WAIT.as_secs()))),
        Ok(Err(e)) => Err(failed(format!("cannot be read: {e}"))),
        Ok(Ok(status)) if status.success() => Ok(bytes),
        Ok(Ok(status)) => {
            let said = String::from_utf8_lossy(&words);
            let said = said.trim().lines().last().unwrap_or("it said nothing").to_owned();
            Err(failed(format!("failed ({status}): {said}")))
        }
    }
}

/// 32 bytes, or 64 hexadecimal digits and perhaps a line's end.
fn parse(bytes: &[u8]) -> Option<Kek> {
    let mut kek = Kek::new([0; 32]);
    if let Ok(raw) = <&[u8; 32]>::try_from(bytes) {
        kek.copy_from_slice(raw);
        return Some(kek);
    }
    let digits: &[u8; 64] = bytes.trim_ascii_end().try_into().ok()?;
    for (byte, pair) in kek.iter_mut().zip(digits.chunks_exact(2)) {
        let [high, low] = <[u8; 2]>::try_from(pair).ok()?.map(|digit| char::from(digit).to_digit(16));
        *byte = u8::try_from(high? << 4 | low?).ok()?;
    }
    Some(kek)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn sources_as_they_are_written() {
        let shown = |text: &str| text.parse::<Source>().map(|source| source.to_string());
        assert_eq!(shown("file:/a/b").unwrap(), "file:/a/b");
        assert_eq!(shown("credential:kek").unwrap(), "credential:kek");
        assert_eq!(shown("command:/bin/kms get key").unwrap(), "command:/bin/kms");
        for wrong in
            ["", "file:", "file:relative", "credential:", "credential:../x", "command:kms", "env:KEK", "x"]
        {
            assert!(shown(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn keys_are_bytes_or_digits() {
        assert_eq!(parse(&[7; 32]).unwrap()[..], [7; 32]);
        assert_eq!(parse("0aF0".repeat(16).as_bytes()).unwrap()[..4], [0x0a, 0xf0, 0x0a, 0xf0]);
        assert!(parse(format!("{}\n", "00".repeat(32)).as_bytes()).is_some());
        for wrong in [&[0; 31][..], &[0; 33], b"", "0g".repeat(32).as_bytes(), "0".repeat(63).as_bytes()] {
            assert!(parse(wrong).is_none());
        }
    }

    #[tokio::test]
    async fn a_file_must_be_private() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kek");
        fs::write(&path, [1; 32]).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let source = Source::File(path.clone());
        assert!(matches!(source.load().await, Err(SourceError::Open { mode: 0o640, .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(source.load().await.unwrap()[..], [1; 32]);
        assert!(matches!(Source::File(dir.path().join("none")).load().await, Err(SourceError::Read(..))));
    }

    #[tokio::test]
    async fn commands_are_bounded() {
        let command = |text: &str| format!("command:{text}").parse::<Source>().unwrap();
        assert_eq!(command("/usr/bin/head -c 32 /dev/zero").load().await.unwrap()[..], [0; 32]);
        let says = |error: SourceError| error.to_string();
        assert!(says(command("/bin/false").load().await.unwrap_err()).contains("it said nothing"));
        assert!(says(command("/bin/ls /none/such").load().await.unwrap_err()).contains("No such file"));
        assert!(says(command("/none/such").load().await.unwrap_err()).contains("cannot be started"));
        // It would write for ever.
        assert!(command("/usr/bin/yes").load().await.is_err());
        assert!(matches!(command("/bin/true").load().await, Err(SourceError::Form(_))));
    }
}
