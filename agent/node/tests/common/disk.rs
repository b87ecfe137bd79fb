//! A disk of the host that can be filled.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A small disk of its own, gone when dropped.
pub struct Disk(PathBuf);

impl Disk {
    pub fn mount(at: &Path, mib: u32) -> Result<Self, String> {
        fs::create_dir_all(at).unwrap();
        let size = format!("size={mib}m,mode=700");
        mount(Some("serio-test"), at, Some("tmpfs"), MsFlags::empty(), Some(size.as_str()))
            .map_err(|e| format!("no file system can be mounted: {e}"))?;
        Ok(Self(at.to_owned()))
    }

    /// Takes all that is free; the file that has it.
    pub fn fill(&self) -> PathBuf {
        let path = self.0.join("fill");
        let mut file = fs::File::create(&path).unwrap();
        for size in [64 << 10, 4 << 10, 1] {
            while file.write_all(&vec![1; size]).is_ok() {}
        }
        path
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}
