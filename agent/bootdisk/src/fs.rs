//! Files of a partition, whatever its file system; and the names of those that cannot be read.

use std::{io, rc::Rc};

use crate::disk::{ReadAt, Window, le16, le32};
use crate::{ext4::Ext, fat::Fat};

/// Why something of a file system could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// Its structures, or the medium.
    #[error("{0}")]
    Read(String),
    /// A file is larger than it may be.
    #[error("{path} has {bytes} bytes, at most {max} are read")]
    TooLarge {
        /// Which.
        path: String,
        /// Its size.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// What was read could not be handed on.
    #[error("cannot write what was read")]
    Write(#[source] io::Error),
}

enum Kind {
    Ext(Ext),
    Fat(Fat),
}

/// A file system that can be read. Cheap to clone.
#[derive(Clone)]
pub(crate) struct FileSystem(Rc<Kind>);

/// What is in a partition.
pub(crate) enum Content {
    Readable(FileSystem),
    /// Something known that cannot be read: its name.
    Other(&'static str),
    /// A file system of a kind that can be read, but not this one.
    Broken(FsError),
    Unknown,
}

/// Signatures of what cannot be read: where, what, its name.
const OTHERS: &[(u64, &[u8], &str)] = &[
    (0, b"XFSB", "XFS"),
    (0x1_0040, b"_BHRfS_M", "Btrfs"),
    (0, b"LUKS\xba\xbe", "LUKS (encrypted)"),
    (0x200, b"LABELONE", "LVM"),
    (0, b"hsqs", "SquashFS"),
    (0x400, &[0x10, 0x20, 0xf5, 0xf2], "F2FS"),
    (0x400, &[0xe2, 0xe1, 0xf5, 0xe0], "EROFS"),
    (3, b"NTFS    ", "NTFS"),
    (0x8001, b"CD001", "ISO 9660"),
    (0x1000, &[0xfc, 0x4e, 0x2b, 0xa9], "Linux RAID"),
    (0x1018, &[0xc6, 0x85, 0x73, 0xf6], "bcachefs"),
];

/// Looks what a partition has.
pub(crate) fn look(window: &Window) -> Content {
    let other = OTHERS.iter().find(|(at, magic, _)| {
        let mut bytes = vec![0; magic.len()];
        window.read_at(&mut bytes, *at).is_ok() && bytes == *magic
    });
    if let Some((_, _, name)) = other {
        return Content::Other(name);
    }
    let superblock: Option<[u8; 1024]> = window.peek(1024);
    if superblock.is_some_and(|block| le16(&block, 0x38) == Some(0xef53) && le32(&block, 0x20) != Some(0)) {
        return match Ext::open(window.clone()) {
            Ok(ext) => Content::Readable(FileSystem(Rc::new(Kind::Ext(ext)))),
            Err(error) => Content::Broken(error),
        };
    }
    if Fat::is_here(window) {
        return match Fat::open(window.clone()) {
            Ok(fat) => Content::Readable(FileSystem(Rc::new(Kind::Fat(fat)))),
            Err(error) => Content::Broken(error),
        };
    }
    Content::Unknown
}

impl FileSystem {
    /// Paths always start at the file system's root.
    pub(crate) fn size(&self, path: &str) -> Result<Option<u64>, FsError> {
        match &*self.0 {
            Kind::Ext(ext) => ext.size(path),
            Kind::Fat(fat) => fat.size(path),
        }
    }

    /// The names in a directory; none when there is no such directory.
    pub(crate) fn list(&self, path: &str) -> Result<Vec<String>, FsError> {
        match &*self.0 {
            Kind::Ext(ext) => ext.list(path),
            Kind::Fat(fat) => fat.list(path),
        }
    }

    /// Hands a file's bytes on, piece by piece.
    pub(crate) fn stream(
        &self,
        path: &str,
        each: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), FsError> {
        match &*self.0 {
            Kind::Ext(ext) => ext.read(path, each),
            Kind::Fat(fat) => fat.read(path, each),
        }
    }

    /// A small file whole; `None` when there is none.
    pub(crate) fn read(&self, path: &str, max: u64) -> Result<Option<Vec<u8>>, FsError> {
        let Some(bytes) = self.size(path)? else { return Ok(None) };
        if bytes > max {
            return Err(FsError::TooLarge { path: path.to_owned(), bytes, max });
        }
        let mut content = Vec::new();
        self.stream(path, &mut |piece| {
            content.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(Some(content))
    }

    /// As GRUB's `search --fs-uuid` wants it.
    pub(crate) fn uuid(&self) -> String {
        match &*self.0 {
            Kind::Ext(ext) => ext.uuid(),
            Kind::Fat(fat) => fat.uuid(),
        }
    }

    pub(crate) fn label(&self) -> String {
        match &*self.0 {
            Kind::Ext(ext) => ext.label(),
            Kind::Fat(fat) => fat.label(),
        }
    }
}
