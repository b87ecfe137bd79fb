//! FAT, read-only: the firmware's partition, and a `/boot` of systemd-boot.

use std::io::{self, Read, Seek, SeekFrom, Write};

use crate::disk::{ReadAt, Window};
use crate::fs::FsError;

/// Entries of a directory that are looked at.
const ENTRIES_MAX: usize = 4096;

/// The library wants a stream that can be written; this one cannot.
pub(crate) struct Stream {
    window: Window,
    at: u64,
}

impl Read for Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.window.size_bytes().saturating_sub(self.at)).unwrap_or(usize::MAX);
        let len = buf.len().min(left);
        let buf = buf.get_mut(..len).unwrap_or_default();
        if !buf.is_empty() {
            self.window.read_at(buf, self.at)?;
        }
        self.at = self.at.saturating_add(len as u64);
        Ok(len)
    }
}

impl Write for Stream {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Stream {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.window.size_bytes().checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

/// A FAT file system.
pub(crate) struct Fat(fatfs::FileSystem<Stream>);

fn failed(error: io::Error) -> FsError {
    FsError::Read(error.to_string())
}

impl Fat {
    /// Whether the first sector is one of a FAT file system (the strings are not binding, and everybody writes them).
    pub(crate) fn is_here(window: &Window) -> bool {
        let Some(sector) = window.peek::<512>(0) else { return false };
        let has = |at: usize| sector.get(at..at + 3) == Some(b"FAT");
        matches!(sector, [0xeb | 0xe9, ..]) && (has(54) || has(82))
    }

    pub(crate) fn open(window: Window) -> Result<Self, FsError> {
        let stream = Stream { window, at: 0 };
        Ok(Self(fatfs::FileSystem::new(stream, fatfs::FsOptions::new()).map_err(failed)?))
    }

    /// As GRUB prints it: 1234-ABCD.
    pub(crate) fn uuid(&self) -> String {
        let id = self.0.volume_id();
        format!("{:04X}-{:04X}", id >> 16, id & 0xffff)
    }

    pub(crate) fn label(&self) -> String {
        self.0.volume_label()
    }

    /// The size of a regular file; `None` when there is none.
    pub(crate) fn size(&self, path: &str) -> Result<Option<u64>, FsError> {
        let (parent, name) = path.trim_end_matches('/').rsplit_once('/').unwrap_or(("", path));
        let Some(dir) = self.dir(parent)? else { return Ok(None) };
        for entry in dir.iter().take(ENTRIES_MAX) {
            let entry = entry.map_err(failed)?;
            if entry.is_file() && entry.file_name().eq_ignore_ascii_case(name) {
                return Ok(Some(entry.len()));
            }
        }
        Ok(None)
    }

    fn dir(&self, path: &str) -> Result<Option<fatfs::Dir<'_, Stream>>, FsError> {
        let root = self.0.root_dir();
        match path.trim_matches('/') {
            "" => Ok(Some(root)),
            path => match root.open_dir(path) {
                Ok(dir) => Ok(Some(dir)),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                // Also "it is a file": not a directory of that name.
                Err(e) if e.kind() == io::ErrorKind::Other => Ok(None),
                Err(e) => Err(failed(e)),
            },
        }
    }

    /// The names in a directory; none when there is no such directory.
    pub(crate) fn list(&self, path: &str) -> Result<Vec<String>, FsError> {
        let Some(dir) = self.dir(path)? else { return Ok(Vec::new()) };
        let mut names = Vec::new();
        for entry in dir.iter().take(ENTRIES_MAX) {
            names.push(entry.map_err(failed)?.file_name());
        }
        Ok(names)
    }

    /// Hands a file's bytes on, piece by piece.
    pub(crate) fn read(
        &self,
        path: &str,
        each: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), FsError> {
        let mut file = self.0.root_dir().open_file(path.trim_matches('/')).map_err(failed)?;
        let mut piece = vec![0; 64 * 1024];
        loop {
            let len = file.read(&mut piece).map_err(failed)?;
            if len == 0 {
                return Ok(());
            }
            each(piece.get(..len).unwrap_or_default()).map_err(FsError::Write)?;
        }
    }
}
