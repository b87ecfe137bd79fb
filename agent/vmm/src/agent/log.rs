//! The file that keeps what the guest printed, within a bound.
//!
//! When the file is full its older half is dropped: the newer half moves to the front. A reader of the file therefore
//! sees at least the last [`LOG_BYTES_MAX`] / 2 bytes, and never more than the bound. While the host's disk is full what comes
//! is lost; the next line that has room says how much.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Most bytes of the file.
pub(super) const LOG_BYTES_MAX: u64 = 1 << 20;

/// The log. An error of its file system stops the log, not the VM.
pub(super) struct SerialLog {
    file: Option<File>,
    len: u64,
    /// Bytes that found no room since the last that did.
    lost: u64,
}

impl SerialLog {
    /// Appends to what the file holds already: the VM may have run before.
    pub(super) fn new(file: Option<File>) -> SerialLog {
        let len = file.as_ref().and_then(|file| file.metadata().ok()).map_or(0, |metadata| metadata.len());
        SerialLog { file, len, lost: 0 }
    }

    /// Keeps `bytes`.
    pub(super) fn write(&mut self, bytes: &[u8]) {
        let Some(file) = &self.file else { return };
        let gap = match self.lost {
            0 => Vec::new(),
            lost => format!("\n[{lost} bytes are missing here: the host's disk was full]\n").into_bytes(),
        };
        match append(file, self.len, &[&gap, bytes].concat()) {
            Ok(len) => (self.len, self.lost) = (len, 0),
            Err(error) if is_full(&error) => self.lost = self.lost.saturating_add(bytes.len() as u64),
            Err(error) => {
                super::say(format_args!("the serial log ends here, its file fails: {error}"));
                self.file = None;
            }
        }
    }
}

/// There may be room again.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Returns the new length.
fn append(file: &File, len: u64, bytes: &[u8]) -> io::Result<u64> {
    // More than fits at once: only its end would stay anyway.
    let keep = usize::try_from(LOG_BYTES_MAX / 2).unwrap_or(usize::MAX);
    let bytes = bytes.get(bytes.len().saturating_sub(keep)..).unwrap_or_default();
    let added = bytes.len() as u64;
    let mut len = len;
    if len.saturating_add(added) > LOG_BYTES_MAX {
        len = shrink(file, len)?;
    }
    file.write_all_at(bytes, len)?;
    Ok(len.saturating_add(added))
}

/// Drops all but the last half of the bound.
fn shrink(file: &File, len: u64) -> io::Result<u64> {
    let keep = len.min(LOG_BYTES_MAX / 2);
    let mut tail = vec![0u8; usize::try_from(keep).map_err(io::Error::other)?];
    file.read_exact_at(&mut tail, len.saturating_sub(keep))?;
    file.write_all_at(&tail, 0)?;
    file.set_len(keep)?;
    Ok(keep)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_bytes_stay_and_the_bound_holds() {
        let file = tempfile::tempfile().expect("a file");
        let mut log = SerialLog::new(Some(file.try_clone().expect("a descriptor")));
        let mut all = Vec::new();
        for round in 0..40u8 {
            let chunk = vec![round; 100_000];
            log.write(&chunk);
            all.extend(chunk);
            let len = file.metadata().expect("a file").len();
            assert!(len <= LOG_BYTES_MAX);
            let mut held = vec![0; len as usize];
            file.read_exact_at(&mut held, 0).expect("readable");
            assert_eq!(held, all[all.len() - held.len()..], "round {round}");
            assert!(held.len() >= all.len().min(LOG_BYTES_MAX as usize / 2));
        }
        log.write(&vec![7; 3 << 20]);
        assert_eq!(file.metadata().expect("a file").len(), LOG_BYTES_MAX);
    }

    #[test]
    fn a_second_run_goes_on_behind_the_first() {
        let file = tempfile::tempfile().expect("a file");
        SerialLog::new(file.try_clone().ok()).write(b"one ");
        SerialLog::new(file.try_clone().ok()).write(b"two");
        let mut held = [0; 7];
        file.read_exact_at(&mut held, 0).expect("readable");
        assert_eq!(&held, b"one two");
    }
}
