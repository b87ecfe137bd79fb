//! Which disks of VMs go past the page cache: what the operator has set, and what the file system of the volumes can.
//!
//! ```text
//! auto   encrypted volumes: their bytes pass through the processor once already, a second copy is what it can be spared
//! on     all that can: few VMs with much memory of their own
//! off    none: many small VMs, whose disks share the host's memory
//! ```
//! Only asks and tells. The engine decides for each head, and goes through the page cache where it must (`serio-volume`,
//! `direct.rs`). Never: opens or reads a volume.

use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, openat, statx};
use serde::Deserialize;

/// What is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DirectIo {
    /// Encrypted volumes.
    #[default]
    Auto,
    /// All.
    On,
    /// None.
    Off,
}

/// The step of the engine, bytes.
const STEP: u32 = 512;

impl DirectIo {
    /// Whether a disk shall go past the page cache.
    #[must_use]
    pub fn wants(self, encrypted: bool) -> bool {
        match self {
            Self::Auto => encrypted,
            Self::On => true,
            Self::Off => false,
        }
    }

    /// As it is written.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::On => "on",
            Self::Off => "off",
        }
    }

    /// Why no disk there goes past the page cache although some should; empty when they do. A file without a name is asked,
    /// which leaves nothing.
    #[must_use]
    pub fn refused(self, state_dir: &Path) -> String {
        if self == Self::Off {
            return String::new();
        }
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let asked = openat(CWD, state_dir, flags, Mode::RUSR | Mode::WUSR)
            .and_then(|file| statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN));
        match asked {
            Ok(told) if told.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
                judge(told.stx_dio_mem_align, told.stx_dio_offset_align)
            }
            // The engine tries it, and says so in the VM's log.
            Ok(_) | Err(_) => String::new(),
        }
    }
}

fn judge(memory: u32, offset: u32) -> String {
    match (memory, offset) {
        (0, _) | (_, 0) => "the file system has no O_DIRECT".to_owned(),
        (..=STEP, ..=STEP) => String::new(),
        _ => format!("O_DIRECT of the file system is in steps of {}, not of {STEP}", memory.max(offset)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encrypted_disks_unless_it_is_said() {
        assert!(DirectIo::Auto.wants(true) && !DirectIo::Auto.wants(false));
        assert!(DirectIo::On.wants(false) && !DirectIo::Off.wants(true));
    }

    #[test]
    fn a_file_system_that_cannot_is_named() {
        assert!(judge(4, 512).is_empty() && judge(512, 512).is_empty());
        assert!(judge(0, 0).contains("no O_DIRECT"));
        assert!(judge(4, 4096).contains("steps of 4096"));
        assert!(DirectIo::Off.refused(Path::new("/")).is_empty());
    }
}
