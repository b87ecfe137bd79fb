//! The two files of a saved VM, opened by who takes them to another node or brings them from one.

use std::{fs::File, path::PathBuf};

use uuid::Uuid;

use super::{FileError, Supervisor, files, rundir};

/// `state` and `memory` of a point.
#[derive(Debug)]
pub struct SavedFiles {
    /// All but memory.
    pub state: File,
    /// RAM; pages of zeros, or of a diff those that it does not have, are holes.
    pub memory: File,
    dir: PathBuf,
}

impl SavedFiles {
    /// Makes both, and their names, survive a power cut.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn sync(&self) -> Result<(), FileError> {
        let synced = || {
            // The memory first: the state says that it is there.
            self.memory.sync_all()?;
            self.state.sync_all()?;
            rundir::sync_parent(&self.dir.join("state"))?;
            // And the directories above, which may be new.
            self.dir.ancestors().take(3).try_for_each(rundir::sync_parent)
        };
        synced().map_err(FileError::at("sync", &self.dir))
    }
}

impl Supervisor {
    /// Of a point that is there, to read.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn open_saved(&self, vm: Uuid, point: Uuid) -> Result<SavedFiles, FileError> {
        let dir = self.saved_dir(vm, point);
        let open = |name: &str| files::open(&dir.join(name), true);
        Ok(SavedFiles { state: open("state")?, memory: open("memory")?, dir })
    }

    /// Of a new one, empty.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn new_saved(&self, vm: Uuid, point: Uuid) -> Result<SavedFiles, FileError> {
        let dir = self.saved_dir(vm, point);
        rundir::make_dir(&dir)?;
        let create = |name: &str| rundir::create_new(&dir.join(name));
        Ok(SavedFiles { state: create("state")?, memory: create("memory")?, dir })
    }

    /// Where a saved VM is.
    pub(crate) fn saved_dir(&self, vm: Uuid, point: Uuid) -> PathBuf {
        let vm = self.inner.settings.state_dir.join("vms").join(vm.to_string());
        vm.join("saved").join(point.to_string())
    }
}
