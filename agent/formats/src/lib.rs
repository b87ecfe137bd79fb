//! Disk image formats, read and written: raw, qcow2, vmdk. A format is named by the caller, never guessed.
//!
//! | module | what |
//! |---|---|
//! | [`source`] | the bytes of an image file, with its length |
//! | [`raw`] | a file, device or NBD export that is the disk itself |
//! | [`qcow2`], `qcow2_check` | header, tables, clusters; all metadata are validated before anything is read |
//! | [`vmdk`], [`vmdk_parts`] | hosted sparse extents: monolithicSparse and streamOptimized; disks over several files |
//! | [`allowed`] | the files that a person allowed an image to lean on |
//! | [`sinks`], [`transfer`] | where a disk goes, and the way from an image there |
//! | [`qcow2_out`], [`vmdk_out`] | writers, for a disk that is read once from its start |
//!
//! Owns: the meaning of an image's bytes. Never: opens a file that the caller did not allow by name ([`Backings`]), writes
//! where an import goes.
//!
//! An image's bytes are hostile. Readers are bounded: a table is read only after its place and size were checked
//! against the file and a limit; each cluster that is used must lie in the file and belong to one owner; what does not
//! fit is refused before the first byte of the disk is written anywhere.
#![forbid(unsafe_code)]

pub mod allowed;
pub mod qcow2;
mod qcow2_check;
pub mod qcow2_out;
pub mod raw;
pub mod sinks;
pub mod source;
pub mod transfer;
pub mod vmdk;
pub mod vmdk_out;
pub mod vmdk_parts;

#[cfg(test)]
mod hostile_test;

use std::io;

/// Grain at which zeros are told from data when a disk is written, bytes. The clusters that are written are as large.
pub const GRAIN: usize = 64 << 10;

/// Whether there is nothing but zeros.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Words at a time; the compiler makes vectors of it.
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|&b| b == 0)
}

/// The formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The disk itself.
    Raw,
    /// QEMU's.
    Qcow2,
    /// VMware's.
    Vmdk,
}

impl Format {
    /// Its name, as qemu-img has it.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A format that nobody here knows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the format `{0}` is not known: raw, qcow2 and vmdk are; convert others first, `qemu-img convert -O qcow2`"
)]
pub struct UnknownFormat(String);

impl std::str::FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Format, UnknownFormat> {
        [Format::Raw, Format::Qcow2, Format::Vmdk]
            .into_iter()
            .find(|format| format.name() == name)
            .ok_or_else(|| UnknownFormat(name.chars().take(40).collect()))
    }
}

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// It breaks its format.
    #[error("this is not a sound {format} image: {why}")]
    Malformed {
        /// Its format.
        format: Format,
        /// What is wrong, and where.
        why: String,
    },
    /// It uses something that is not read here.
    #[error("this {format} image cannot be imported: {why}")]
    Unsupported {
        /// Its format.
        format: Format,
        /// What, and what to do.
        why: String,
    },
    /// It leans on another file.
    #[error(
        "the image leans on the file `{0}`, which was not allowed: look at it, then allow it by its name"
    )]
    NotAllowed(String),
    /// One of the files that were allowed.
    #[error("cannot open `{name}`, which the image leans on")]
    Named {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The disk is too large.
    #[error("the disk has {size} bytes; {max} are the most that is allowed")]
    TooLarge {
        /// Its size.
        size: u64,
        /// The limit.
        max: u64,
    },
    /// Reading failed.
    #[error("cannot read the image")]
    Io(#[from] io::Error),
    /// The NBD server.
    #[error("cannot read the NBD export")]
    Nbd(#[from] serio_nbd::client::ClientError),
}

/// A stretch of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Bytes, at least 1.
    pub len: u64,
    /// It reads as zeros for sure.
    pub zero: bool,
}

/// A disk that can be read. Its metadata were validated when it was opened.
pub trait Image {
    /// Size of the disk, bytes.
    fn size_bytes(&self) -> u64;
    /// The stretch at `offset`, which lies within the disk.
    fn run(&mut self, offset: u64) -> Result<Run, FormatError>;
    /// Fills the buffer from `offset`; all of it lies within the disk.
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), FormatError>;
}

/// Gives the files that images lean on, by the name that stands in the image: only those that the caller allowed.
pub trait Backings {
    /// The file and its format, or a refusal. Called once for each name.
    fn open(&mut self, name: &str, format: Format) -> Result<Box<dyn Image + Send>, FormatError>;

    /// A file that is one part of the image, as it is, or a refusal.
    fn part(&mut self, name: &str) -> Result<source::Source, FormatError> {
        Err(FormatError::NotAllowed(printable(name)))
    }
}

/// Nothing is allowed.
#[derive(Debug, Clone, Copy)]
pub struct NoBackings;

impl Backings for NoBackings {
    fn open(&mut self, name: &str, _: Format) -> Result<Box<dyn Image + Send>, FormatError> {
        Err(FormatError::NotAllowed(printable(name)))
    }
}

/// Text from an image, made harmless for a terminal.
fn printable(text: &str) -> String {
    text.chars().take(200).collect::<String>().escape_debug().to_string()
}

/// Opens a file as an image of a format, and validates it.
pub fn open(
    file: source::Source,
    format: Format,
    size_max: u64,
    backings: &mut dyn Backings,
) -> Result<Box<dyn Image + Send>, FormatError> {
    let image: Box<dyn Image + Send> = match format {
        Format::Raw => Box::new(raw::RawFile::open(file)?),
        Format::Qcow2 => Box::new(qcow2::Qcow2::open(file, size_max, backings)?),
        Format::Vmdk if file.starts_with(vmdk_parts::START)? => {
            Box::new(vmdk_parts::VmdkParts::open(&file, size_max, backings)?)
        }
        Format::Vmdk => Box::new(vmdk::Vmdk::open(file, size_max)?),
    };
    match image.size_bytes() {
        0 => Err(FormatError::Malformed { format, why: "the disk has no bytes".into() }),
        size if size > size_max => Err(FormatError::TooLarge { size, max: size_max }),
        _ => Ok(image),
    }
}
