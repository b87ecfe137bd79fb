//! What a user wants to bring to a node: a file, standard input, or an NBD export; opened and validated here.

use std::{fs::File, io, os::unix::fs::OpenOptionsExt, path::Path};

use serio_formats::{Format, Image, allowed::Allowed, raw::RawNbd, source::Source};
use serio_nbd::client::is_uri;

use crate::{args::Global, error::Failure, nbd::connect};

/// The largest disk: the largest volume.
const SIZE_BYTES_MAX: u64 = 1 << 46;
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
    let allowed = Allowed::new(backing, Path::new(name), &file, SIZE_BYTES_MAX);
    let mut allowed = allowed.map_err(|e| Failure::local(what(), e))?;
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
