//! What a user wants to bring to a node: a file, standard input, or an NBD export; opened and validated here.

use std::{
    fs::File,
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serio_formats::{Backings, Format, FormatError, Image, raw::RawNbd, source::Source};
use serio_nbd::client::is_uri;

use crate::{args::Global, error::Failure, nbd::connect};

/// The largest disk: the largest volume.
const SIZE_BYTES_MAX: u64 = 1 << 46;
/// Backing files below one another.
const BACKINGS_MAX: usize = 16;

/// The files that the user allowed an image to lean on.
struct Allowed {
    names: Vec<String>,
    dir: PathBuf,
    /// By device and number: a chain must not come back to itself.
    open: Vec<(u64, u64)>,
}

impl Backings for Allowed {
    fn open(&mut self, name: &str, format: Format) -> Result<Box<dyn Image + Send>, FormatError> {
        if !self.names.iter().any(|known| known == name) {
            return Err(FormatError::NotAllowed(name.escape_debug().to_string()));
        }
        let path = self.dir.join(name);
        let file = File::open(&path)?;
        let id = file.metadata().map(|meta| (meta.dev(), meta.ino()))?;
        if self.open.contains(&id) || self.open.len() >= BACKINGS_MAX {
            let why = format!("its backing files come back to `{}`", name.escape_debug());
            return Err(FormatError::Malformed { format, why });
        }
        self.open.push(id);
        let before = std::mem::replace(&mut self.dir, path.parent().unwrap_or(Path::new(".")).to_owned());
        let image = serio_formats::open(Source::new(file)?, format, SIZE_BYTES_MAX, self);
        self.dir = before;
        image
    }
}

/// Opens an image.
pub(super) async fn open(
    name: &str,
    format: &str,
    backing: &[String],
    global: &Global,
) -> Result<Box<dyn Image + Send>, Failure> {
    let format: Format = format.parse().map_err(|e| Failure::Usage(format!("{e}")))?;
    if is_uri(name) {
        if format != Format::Raw {
            return Err(Failure::Usage(format!("--format {format}: over NBD a disk comes as raw")));
        }
        return Ok(Box::new(RawNbd::new(connect(name, global).await?)));
    }
    let what = || format!("cannot read {name}");
    let file =
        if name == "-" { spool()? } else { File::open(name).map_err(|e| Failure::local(what(), e))? };
    let meta = file.metadata().map_err(|e| Failure::local(what(), e))?;
    if meta.is_dir() {
        return Err(Failure::plain(format!("{}: it is a folder", what())));
    }
    let dir = Path::new(name).parent().unwrap_or(Path::new(".")).to_owned();
    let mut allowed = Allowed { names: backing.to_vec(), dir, open: vec![(meta.dev(), meta.ino())] };
    let source = Source::new(file).map_err(|e| Failure::local(what(), e))?;
    serio_formats::open(source, format, SIZE_BYTES_MAX, &mut allowed).map_err(|e| Failure::local(what(), e))
}

/// Standard input, whole, in a file without a name: how long it is must be known before a volume is made.
pub(super) fn spool() -> Result<File, Failure> {
    let dir = std::env::temp_dir();
    let what = |e| Failure::local(format!("cannot keep standard input in {}", dir.display()), e);
    let tmpfile = rustix::fs::OFlags::TMPFILE.bits();
    let mut file = File::options()
        .read(true)
        .write(true)
        .custom_flags(tmpfile.cast_signed())
        .open(&dir)
        .map_err(what)?;
    io::copy(&mut io::stdin().lock(), &mut file).map_err(what)?;
    Ok(file)
}
