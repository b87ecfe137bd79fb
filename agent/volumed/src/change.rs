//! `serio-volumed resize|clone|rollback|delete-snapshot|flatten|changes`: what changes the layers of a volume directory, for people.
//! The volume must not be in use, but for `clone` and `changes` between snapshots.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use clap::Args;
use serio_types::ByteSize;
use serio_volume::{Access, Volume, VolumeDir};

use crate::{
    check::with_bar,
    copy::{Progress, clone_file},
    key::Dirs,
    layers,
};

/// Ranges that are looked up at once.
const PAGE: usize = 4096;

/// A volume's directory and a snapshot of it.
#[derive(Debug, Clone)]
pub struct Point {
    dir: PathBuf,
    snapshot: String,
}

impl std::str::FromStr for Point {
    type Err = String;

    fn from_str(text: &str) -> Result<Point, String> {
        match text.rsplit_once('@') {
            Some((dir, snapshot)) if !dir.is_empty() && !snapshot.is_empty() => {
                Ok(Point { dir: dir.into(), snapshot: snapshot.into() })
            }
            _ => Err("a snapshot is named VOLUME-DIR@SNAPSHOT, such as vol@monday".into()),
        }
    }
}

/// What `resize` is told.
#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// The volume's directory.
    volume: PathBuf,
    /// Its new size, such as 20GiB.
    size: ByteSize,
}

/// What `clone` is told.
#[derive(Debug, Args)]
pub struct CloneArgs {
    /// A snapshot, as VOLUME-DIR@SNAPSHOT; or a raw image, which must never change afterwards.
    source: PathBuf,
    /// The new volume's directory.
    volume: PathBuf,
    /// Size of the new volume if larger than the source's.
    #[arg(long)]
    size: Option<ByteSize>,
}

/// What `rollback` is told.
#[derive(Debug, Args)]
pub struct RollbackArgs {
    /// The snapshot, as VOLUME-DIR@SNAPSHOT.
    point: Point,
    /// Lose later snapshots too.
    #[arg(long)]
    discard_later: bool,
}

/// What `delete-snapshot` is told.
#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// The snapshot, as VOLUME-DIR@SNAPSHOT.
    point: Point,
    /// Copy no faster than this a second, such as 50MiB.
    #[arg(long)]
    pace: Option<ByteSize>,
}

/// What `flatten` is told.
#[derive(Debug, Args)]
pub struct FlattenArgs {
    /// The volume's directory.
    volume: PathBuf,
    /// Copy no faster than this a second, such as 50MiB.
    #[arg(long)]
    pace: Option<ByteSize>,
}

/// What `changes` is told.
#[derive(Debug, Args)]
pub struct ChangesArgs {
    /// The volume's directory.
    volume: PathBuf,
    /// The earlier snapshot.
    #[arg(long)]
    from: String,
    /// The later snapshot; else the volume as it is, which must not be in use.
    #[arg(long)]
    to: Option<String>,
    /// For programs: one object a line, bytes.
    #[arg(long)]
    json: bool,
}

/// Grows a volume.
pub fn resize(args: &ResizeArgs, dirs: &Dirs) -> anyhow::Result<()> {
    let volume = dirs.at(&args.volume).open(Access::ReadWrite)?;
    volume
        .resize(args.size.bytes())
        .with_context(|| format!("cannot resize the volume in {}", args.volume.display()))
}

/// Makes a volume that shares the data of a snapshot or of an image.
pub fn clone(args: &CloneArgs, dirs: &Dirs) -> anyhow::Result<()> {
    let dir = dirs.at(&args.volume);
    let size = args.size.map(ByteSize::bytes);
    if args.source.is_file() {
        return Ok(dir.clone_image(&args.source, size, &mut share)?);
    }
    let Some(Ok(point)) = args.source.to_str().map(str::parse::<Point>) else {
        bail!(
            "{} is neither a file nor a snapshot: name a snapshot as VOLUME-DIR@SNAPSHOT, such as vol@monday",
            args.source.display()
        );
    };
    Ok(dir.clone_point(&dirs.at(&point.dir), &point.snapshot, size, &mut share)?)
}

/// A second name; or a copy, where the file system cannot give one.
fn share(from: &Path, to: &Path) -> io::Result<()> {
    let Err(error) = fs::hard_link(from, to) else { return Ok(()) };
    let unlinkable = [nix::libc::EXDEV, nix::libc::EMLINK, nix::libc::EPERM, nix::libc::EOPNOTSUPP];
    if !unlinkable.iter().any(|e| error.raw_os_error() == Some(*e)) {
        return Err(error);
    }
    eprintln!("{}: cannot be shared ({error}), so it is copied", from.display());
    let copy = File::options().read(true).write(true).create_new(true).open(to)?;
    let source = File::open(from)?;
    with_bar("copying", |progress| clone_file(&source, &copy, progress)).map_err(io::Error::other)?;
    copy.sync_all()
}

/// Puts a volume back to a snapshot.
pub fn rollback(args: &RollbackArgs, dirs: &Dirs) -> anyhow::Result<()> {
    let Point { dir, snapshot } = &args.point;
    dirs.at(dir).rollback(snapshot, args.discard_later)?;
    Ok(())
}

/// Deletes a snapshot; what only it has, the next newer point gets.
pub fn delete_snapshot(args: &DeleteArgs, dirs: &Dirs) -> anyhow::Result<()> {
    let Point { dir, snapshot } = &args.point;
    let dir = dirs.at(dir);
    let volume = dir.open(Access::ReadWrite)?;
    let found = volume.snapshots().into_iter().find(|s| s.name == *snapshot);
    let Some(found) = found else { bail!("{} has no snapshot named `{snapshot}`", dir.path().display()) };
    merge(&dir, &volume, found.layer, args.pace)
}

/// Copies what a volume shares with others into its own files.
pub fn flatten(args: &FlattenArgs, dirs: &Dirs) -> anyhow::Result<()> {
    let dir = dirs.at(&args.volume);
    let volume = dir.open(Access::ReadWrite)?;
    for layer in dir.inherited(&volume)? {
        merge(&dir, &volume, layer, args.pace)?;
    }
    Ok(())
}

fn merge(dir: &VolumeDir, volume: &Volume, layer: u64, pace: Option<ByteSize>) -> anyhow::Result<()> {
    let pace = pace.map_or(0, ByteSize::bytes);
    let done = with_bar("merging", |progress: &Progress| layers::merge(volume, layer, pace, progress))
        .with_context(|| {
            format!("cannot merge layer {layer} of {}; give the command again", dir.path().display())
        })?;
    Ok(dir.settle(layer, &done)?)
}

/// Prints what has changed between two points.
pub fn changes(args: &ChangesArgs) -> anyhow::Result<()> {
    let name = args.volume.display();
    let files = VolumeDir::new(&args.volume).files(Access::ReadOnly)?;
    let maps = files.maps(args.to.as_deref()).with_context(|| format!("cannot read the maps in {name}"))?;
    let mut out = io::stdout().lock();
    let mut next = Some(0);
    if !args.json {
        writeln!(out, "{:>20}  {:>20}  CONTENT", "OFFSET", "BYTES")?;
    }
    while let Some(offset) = next {
        let (ranges, after) = layers::changed_ranges(&maps, &args.from, offset, PAGE)
            .map_err(|refused| anyhow::anyhow!("{name}: {}", refused.message))?;
        for range in ranges {
            let (offset, bytes, zero) = (range.offset, range.len, range.zero);
            match args.json {
                true => {
                    writeln!(out, "{}", serde_json::json!({"offset": offset, "len": bytes, "zero": zero}))?;
                }
                false => {
                    writeln!(out, "{offset:>20}  {bytes:>20}  {}", if zero { "zeros" } else { "data" })?;
                }
            }
        }
        next = after;
    }
    Ok(())
}
