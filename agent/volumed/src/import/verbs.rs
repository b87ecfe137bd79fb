//! `serio-volumed import` and `serio-volumed export`, for people.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, bail};
use clap::Args;
use serio_formats::{
    self as formats, Format, GRAIN, Image,
    allowed::Allowed,
    is_zero, qcow2_out,
    raw::RawNbd,
    sinks::{ImageSink, NbdSink, PipeSink, RawSink, Sink, SinkError},
    source::Source,
    vmdk_out,
};
use serio_nbd::client::{Client, Options, Uri, is_uri};
use serio_types::ByteSize;
use serio_volume::{Access, LayerFiles, SIZE_BYTES_MAX, Volume, VolumeDir};

use super::{
    bar::{Wish, with_bar},
    convert::{ConvertError, Start, Sum, convert, sum_of},
    journal::{Entry, Journal, Keeping, hex},
    pipe::Pipe,
    reading::{self, Piece, ReadError},
};
use crate::{
    copy::{self, Imported, Progress},
    key::Dirs,
};

/// What to import.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The volume's directory; made if it is not there.
    volume: PathBuf,
    /// The image: a file, a block device, an NBD URI, or - for standard input (raw).
    image: String,
    /// Format of the image: raw, qcow2 or vmdk; never guessed.
    #[arg(long, default_value = "raw")]
    format: Format,
    /// A file that the image may lean on or have parts in, by the name that stands in the image; may be given several times.
    #[arg(long, value_name = "NAME")]
    backing: Vec<String>,
    /// Size of the volume if larger than the image's.
    #[arg(long)]
    size: Option<ByteSize>,
    /// Refuse the image if the blake3 of its disk is another.
    #[arg(long, value_name = "HEX")]
    blake3: Option<String>,
    /// Compute no checksum, which takes a second for every few GiB of zeros, too; an interrupted import then begins anew.
    #[arg(long, conflicts_with = "blake3")]
    no_checksum: bool,
    /// Begin anew where an unfinished import could go on.
    #[arg(long)]
    restart: bool,
}

/// What to export.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The volume's directory, with @SNAPSHOT for a point of it.
    volume: String,
    /// Where to: a file, a block device, an NBD URI, or - for standard output (raw).
    image: String,
    /// Format of the image: raw, qcow2 or vmdk.
    #[arg(long, default_value = "raw")]
    format: Format,
    /// Compute no checksum, which takes a second for every few GiB of zeros, too.
    #[arg(long)]
    no_checksum: bool,
    /// Write into a file or device that is there already.
    #[arg(long)]
    force: bool,
    /// Go on with an export that was interrupted (raw): what is there is compared, and only what differs is written.
    #[arg(long)]
    resume: bool,
}

/// Opens and validates what is imported; with the identity that a later attempt must find again.
fn open_image(args: &ImportArgs) -> anyhow::Result<(Box<dyn Image + Send>, String)> {
    let name = &args.image;
    if is_uri(name) {
        if args.format != Format::Raw {
            bail!("--format {}: over NBD a disk comes as raw", args.format);
        }
        let client = connect(name)?;
        let size = client.size_bytes();
        if size == 0 || size > SIZE_BYTES_MAX {
            bail!("the export has {size} bytes: 1 to {SIZE_BYTES_MAX} can be imported");
        }
        return Ok((Box::new(RawNbd::new(client)), format!("raw {name} {size} bytes")));
    }
    let path = Path::new(name);
    let file = File::open(path).with_context(|| format!("cannot open the image {name}"))?;
    let meta = file.metadata().with_context(|| format!("cannot look at the image {name}"))?;
    if !(meta.is_file() || meta.file_type().is_block_device()) {
        bail!("{name} is neither a file nor a block device; for a pipe use - (raw)");
    }
    let full = fs::canonicalize(path).with_context(|| format!("cannot look at the image {name}"))?;
    let source = Source::new(file).with_context(|| format!("cannot measure the image {name}"))?;
    let identity = format!(
        "{} {} {} bytes, modified {}.{:09}",
        args.format,
        full.display(),
        source.len(),
        meta.mtime(),
        meta.mtime_nsec()
    );
    let mut allowed = Allowed::new(&args.backing, &full, source.file(), SIZE_BYTES_MAX)
        .with_context(|| format!("cannot look at the image {name}"))?;
    let image = formats::open(source, args.format, SIZE_BYTES_MAX, &mut allowed)
        .with_context(|| format!("cannot import {name}"))?;
    Ok((image, identity))
}

fn connect(text: &str) -> anyhow::Result<Client> {
    let uri: Uri = text.parse()?;
    if uri.tls {
        bail!("{text}: TLS is not spoken here; on the node itself use nbd+unix://, else `serio`");
    }
    Ok(Client::connect(Options::new(&uri))?)
}

/// The volume's files, and where to begin: anew, or where the journal says, if what is there is what it says.
fn begin(
    dir: &VolumeDir,
    journal: &Journal,
    args: &ImportArgs,
    identity: &str,
    progress: &Progress,
) -> anyhow::Result<(LayerFiles, Start)> {
    let anew = || Ok((dir.begin()?, Start { offset: 0, sum: Sum::new(!args.no_checksum) }));
    let Some(found) = journal.read().filter(|_| !args.restart && !args.no_checksum) else { return anew() };
    if found.source != identity {
        bail!(
            "{} holds an unfinished import of another image ({}): give that one to go on, or --restart to begin anew",
            dir.path().display(),
            found.source.escape_debug()
        );
    }
    let open = |suffix: &str| {
        let path = dir.path().join(format!("{:08}.{suffix}", 0));
        OpenOptions::new().read(true).write(true).open(&path)
    };
    let (Ok(data), Ok(map)) = (open("data"), open("map")) else { return anew() };
    if map.metadata().map_or(1, |meta| meta.len()) > 0 {
        // Finished, but for the journal's removal; or somebody else's.
        return anew();
    }
    let sum = with_bar(progress, || sum_of(&data, found.done_bytes, progress))?;
    if sum.value().map(|value| hex(&value)).as_ref() != Some(&found.blake3) {
        eprintln!("note: what the unfinished import left is not what its journal says: it begins anew");
        return anew();
    }
    eprintln!("going on at {} MiB", found.done_bytes >> 20);
    Ok((LayerFiles { data, map }, Start { offset: found.done_bytes, sum }))
}

/// Imports an image into a new volume.
pub fn import(args: &ImportArgs, dirs: &Dirs) -> anyhow::Result<()> {
    if dirs.encrypt() {
        bail!(
            "--key: an image cannot be imported into an encrypted volume at once: create one with --key, serve it, and copy into it with nbdcopy or qemu-img"
        );
    }
    if args.image == "-" {
        return import_stdin(args);
    }
    // Before any thread starts.
    let wish = Wish::listen().context("cannot listen for signals")?;
    // Refused before a file of the volume is made.
    let (mut image, identity) = open_image(args)?;
    let size = volume_size(args, image.size_bytes())?;
    let (dir, journal) = (VolumeDir::new(&args.volume), Journal::new(&args.volume));
    let progress = Progress::default();
    let (files, start) = begin(&dir, &journal, args, &identity, &progress)?;
    match start.sum.value() {
        Some(sum) if start.offset == 0 => journal
            .write(&Entry { source: identity.clone(), done_bytes: 0, blake3: hex(&sum) })
            .context("cannot keep the journal of the import")?,
        Some(_) => {}
        None => journal.remove().context("cannot remove an old journal of an import")?,
    }
    let mut steps = Keeping {
        journal: &journal,
        source: &identity,
        data: &files.data,
        wish: &wish,
        last: (start.offset, Instant::now()),
    };
    if start.offset == 0 && args.format == Format::Raw && share(&args.image, &files.data) {
        let mut sum = start.sum;
        if !args.no_checksum {
            sum = with_bar(&progress, || sum_of(&files.data, image.size_bytes(), &progress))?;
        }
        let size_bytes = image.size_bytes().next_multiple_of(512);
        let done = Imported { size_bytes, blake3: sum.value().unwrap_or_default() };
        finish(args, &dir, &files, size, &done)?;
        return journal.remove().context("cannot remove the journal of the import");
    }
    let converted =
        with_bar(&progress, || convert(image.as_mut(), &files.data, start, &progress, &mut steps));
    let done = match converted {
        Err(ConvertError::Stopped) => bail!("interrupted: the same command goes on where it was"),
        other => other.with_context(|| {
            format!("cannot import {}: the same command goes on where it was", args.image)
        })?,
    };
    finish(args, &dir, &files, size, &done)?;
    journal.remove().context("cannot remove the journal of the import")
}

/// Whether the volume's file now shares the blocks of a raw image: where the file system can, nothing is copied.
fn share(image: &str, data: &File) -> bool {
    !is_uri(image) && File::open(image).is_ok_and(|file| rustix::fs::ioctl_ficlone(data, file).is_ok())
}

/// Compares the checksum, makes the volume, and says what it is.
fn finish(
    args: &ImportArgs,
    dir: &VolumeDir,
    files: &LayerFiles,
    size: u64,
    done: &Imported,
) -> anyhow::Result<()> {
    let got = hex(&done.blake3);
    if let Some(wanted) = &args.blake3
        && !wanted.eq_ignore_ascii_case(&got)
    {
        bail!("the disk's blake3 is {got}, not {wanted}: it is not the one that was meant");
    }
    dir.commit(files, size.max(done.size_bytes))?;
    let data = files.data.metadata().map_or(0, |meta| meta.blocks() * 512);
    let sum = if args.no_checksum { String::new() } else { format!(", blake3 {got}") };
    println!("imported {}: {size} bytes, {data} of them allocated{sum}", args.image);
    Ok(())
}

fn volume_size(args: &ImportArgs, image_bytes: u64) -> anyhow::Result<u64> {
    let whole = image_bytes.next_multiple_of(512);
    match args.size.map(ByteSize::bytes) {
        Some(size) if size < whole => {
            bail!("--size is smaller than the image, which has {image_bytes} bytes")
        }
        size => Ok(size.unwrap_or(whole)),
    }
}

/// A pipe cannot be asked twice: there is nothing to go on with, so what broke off is taken back.
fn import_stdin(args: &ImportArgs) -> anyhow::Result<()> {
    if args.format != Format::Raw {
        bail!("--format {}: from standard input a disk comes as raw; give a file", args.format);
    }
    // Before any thread starts.
    let wish = Wish::listen().context("cannot listen for signals")?;
    let dir = VolumeDir::new(&args.volume);
    let files = dir.begin()?;
    // What an older import left is not in the files any more.
    Journal::new(&args.volume).remove().context("cannot remove an old journal of an import")?;
    let done = from_stdin(args, &dir, &files, wish);
    if done.is_err()
        && let Err(e) = dir.give_up()
    {
        eprintln!("note: what the import left could not be removed: {e}");
    }
    done.context(
        "cannot import standard input: nothing of it was kept, so the same command with the whole image again begins anew",
    )
}

fn from_stdin(args: &ImportArgs, dir: &VolumeDir, files: &LayerFiles, wish: Wish) -> anyhow::Result<()> {
    let progress = Progress::default();
    let pipe = Pipe::new(io::stdin(), wish);
    let done = with_bar(&progress, || copy::import_raw(pipe, &files.data, 0, SIZE_BYTES_MAX, &progress))?;
    let size = volume_size(args, done.size_bytes)?;
    finish(args, dir, files, size, &done)
}

/// Why an export ended.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Sink(#[from] SinkError),
    #[error("interrupted")]
    Stopped,
}

/// Copies a volume or a point of it out.
pub fn export(args: &ExportArgs, dirs: &Dirs) -> anyhow::Result<()> {
    // Before any thread starts.
    let wish = Wish::listen().context("cannot listen for signals")?;
    let volume = open_point(&args.volume, dirs)?;
    let size = volume.size_bytes();
    if args.resume && (args.format != Format::Raw || args.image == "-") {
        bail!("--resume: only a raw file, device or NBD export can be gone on with");
    }
    let name = &args.image;
    let (file, mut sink): (Option<File>, Box<dyn Sink>);
    if name == "-" {
        if args.format != Format::Raw {
            bail!("--format {}: to standard output a disk goes as raw; give a file", args.format);
        }
        sink = Box::new(PipeSink(io::stdout().lock()));
    } else if is_uri(name) {
        if args.format != Format::Raw {
            bail!("--format {}: over NBD a disk goes as raw", args.format);
        }
        let client = connect(name)?;
        if client.size_bytes() < size {
            bail!("the NBD export has {} bytes, the volume {size}", client.size_bytes());
        }
        sink = Box::new(NbdSink::new(client, args.resume));
    } else {
        let (opened, used) = open_destination(args, size)?;
        match args.format {
            Format::Raw => sink = Box::new(RawSink { file: opened, size, used }),
            format => {
                file = Some(opened);
                let file = file.as_ref().context("the file was just opened")?;
                return copy_out(args, &volume, &wish, &mut image_sink(file, format, size)?);
            }
        }
    }
    copy_out(args, &volume, &wish, sink.as_mut())
}

fn image_sink(file: &File, format: Format, size: u64) -> anyhow::Result<ImageSink<'_>> {
    Ok(match format {
        Format::Vmdk => ImageSink::Vmdk(Some(vmdk_out::Writer::new(file, size)?)),
        Format::Raw | Format::Qcow2 => ImageSink::Qcow2(Some(qcow2_out::Writer::new(file, size))),
    })
}

fn open_point(text: &str, dirs: &Dirs) -> anyhow::Result<Volume> {
    // A directory whose name has an @ is meant before a snapshot of a shorter one is.
    if !Path::new(text).is_dir()
        && let Some((dir, snapshot)) = text.rsplit_once('@')
    {
        return Ok(dirs.at(dir).open_snapshot(snapshot)?);
    }
    Ok(dirs.at(text).open(Access::ReadOnly)?)
}

/// The file or device, and whether it may hold something already.
fn open_destination(args: &ExportArgs, size: u64) -> anyhow::Result<(File, bool)> {
    let (path, name) = (Path::new(&args.image), &args.image);
    let there = path.exists();
    if there && !args.force && !args.resume {
        bail!("{name} is there already: --resume to go on with it, --force to write over it");
    }
    let is_device = there && fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device());
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(!there)
        // What was there before is no part of a new image.
        .truncate(there && !args.resume && !is_device)
        .open(path)
        .with_context(|| format!("cannot open {name}"))?;
    if is_device {
        let len = Source::new(file.try_clone()?)?.len();
        if args.format != Format::Raw || len < size {
            bail!("{name} has {len} bytes, the volume {size}, and a device takes raw only");
        }
    }
    Ok((file, is_device || args.resume))
}

fn copy_out(args: &ExportArgs, volume: &Volume, wish: &Wish, sink: &mut dyn Sink) -> anyhow::Result<()> {
    let progress = Progress::default();
    progress.total.store(volume.size_bytes(), std::sync::atomic::Ordering::Relaxed);
    let mut sum = Sum::new(!args.no_checksum);
    let mut data_bytes = 0;
    let copied: Result<(), ExportError> = with_bar(&progress, || {
        reading::read(volume, |offset, piece| {
            let len = match piece {
                Piece::Zeros(len) => {
                    sum.zeros(len, || wish.stops()).map_err(|_| ExportError::Stopped)?;
                    sink.zeros(offset, len)?;
                    len
                }
                Piece::Data(data) => {
                    sum.data(data);
                    sink.data(offset, data)?;
                    data_bytes += data.chunks(GRAIN).filter(|g| !is_zero(g)).map(<[u8]>::len).sum::<usize>();
                    data.len() as u64
                }
            };
            progress.done.store(offset.saturating_add(len), std::sync::atomic::Ordering::Relaxed);
            if wish.stops() { Err(ExportError::Stopped) } else { Ok(()) }
        })?;
        Ok(sink.finish()?)
    });
    let resumable = args.format == Format::Raw && args.image != "-";
    match copied {
        Err(e) if resumable => Err(e).with_context(|| {
            format!("{} is not complete: the same command with --resume goes on", args.image)
        })?,
        Err(e) => {
            if args.image != "-" {
                // No image, and nobody shall take it for one.
                let _ = fs::remove_file(&args.image);
            }
            Err(e).with_context(|| format!("cannot export to {}", args.image))?
        }
        Ok(()) => {}
    }
    let blake3 = sum.value().map(|sum| format!(", blake3 {}", hex(&sum))).unwrap_or_default();
    // Standard output may be the image.
    eprintln!("exported {} bytes, {data_bytes} of them data{blake3}", volume.size_bytes());
    Ok(())
}
