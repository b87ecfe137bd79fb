//! What of a disk counts: first the entries of the Boot Loader Specification, on any partition; then grub.cfg.
//!
//! An entry whose kernel is not there is passed over, as boot loaders do. With entries *and* a grub.cfg that asks for
//! them (`blscfg`), GRUB's `default` chooses among them; else loader.conf's `default`; else the specification's order.

use std::io::{self, Write};
use std::rc::Rc;

use crate::bls::{self, BlsEntry};
use crate::disk::{Budgeted, ReadAt, Window};
use crate::error::FindError;
use crate::fs::{Content, FileSystem, FsError, look};
use crate::grub::{Chosen, ENVIRONMENT_BYTES_MAX, Grub, Host, SCRIPT_BYTES_MAX, Search};
use crate::kernel::{HEAD_BYTES, KernelKind};
use crate::partition::{Partition, partitions};

/// What one search may read, copies of kernel and initrds included.
pub const BUDGET_BYTES: u64 = 8 << 30;
/// Longest command line: more than any kernel takes.
const CMDLINE_BYTES_MAX: usize = 2047;
const INITRDS_MAX: usize = 16;
/// Partitions that are looked at.
const PARTITIONS_MAX: usize = 128;
const BLS_DIRS: [&str; 2] = ["/loader", "/boot/loader"];
const GRUB_DIRS: [&str; 4] = ["/boot/grub", "/grub", "/boot/grub2", "/grub2"];

/// A file that is booted.
#[derive(Clone)]
pub struct BootFile {
    /// From its file system's root.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    partition: String,
    fs: FileSystem,
}

impl std::fmt::Debug for BootFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} bytes, {})", self.path, self.bytes, self.partition)
    }
}

impl BootFile {
    fn read(&self, source: FsError) -> FindError {
        FindError::Read { partition: self.partition.clone(), source }
    }

    /// Writes it out; `max` bytes at most.
    fn copy(&self, out: &mut dyn Write, max: u64) -> Result<u64, FindError> {
        let too_large = |bytes| FsError::TooLarge { path: self.path.clone(), bytes, max };
        if self.bytes > max {
            return Err(self.read(too_large(self.bytes)));
        }
        let mut done: u64 = 0;
        let copied = self.fs.stream(&self.path, &mut |piece| {
            done = done.saturating_add(piece.len() as u64);
            if done > max {
                return Err(io::ErrorKind::FileTooLarge.into());
            }
            out.write_all(piece)
        });
        copied.map_err(|e| self.read(e))?;
        Ok(done)
    }

    fn head(&self) -> Result<Vec<u8>, FindError> {
        let mut head = Vec::new();
        let read = self.fs.stream(&self.path, &mut |piece| {
            head.extend_from_slice(piece);
            // No more is wanted: the way to say so.
            if head.len() >= HEAD_BYTES { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
        });
        match read {
            Ok(()) | Err(FsError::Write(_)) => Ok(head),
            Err(error) => Err(self.read(error)),
        }
    }
}

/// What is booted.
#[derive(Debug, Clone)]
pub struct Entry {
    /// As the boot loader's menu shows it.
    pub title: String,
    /// The kernel's version as far as it is known: the entry's, or what follows `vmlinuz-`.
    pub version: String,
    /// The file that says so.
    pub source: String,
    /// The partition of that file, as the kernel numbers it; 0: the disk has none.
    pub partition: u32,
    /// The kernel.
    pub kernel: BootFile,
    /// In the order in which the kernel gets them, one behind the other.
    pub initrds: Vec<BootFile>,
    /// The kernel's command line.
    pub cmdline: String,
}

impl Entry {
    /// The command line as it is, and the serial port as console if it names none: what a VM here has to talk by.
    #[must_use]
    pub fn cmdline_with_console(&self) -> String {
        match self.cmdline.split_ascii_whitespace().any(|word| word.starts_with("console=")) {
            true => self.cmdline.clone(),
            false => format!("{} console=ttyS0", self.cmdline).trim_start().to_owned(),
        }
    }
}

/// What was found.
#[derive(Debug, Clone)]
pub struct Found {
    /// The entry.
    pub entry: Entry,
    /// What its kernel is.
    pub kind: KernelKind,
}

impl Found {
    /// Writes the kernel out; its size.
    ///
    /// # Errors
    /// It cannot be read, is larger than `bytes_max`, or `out` fails.
    pub fn write_kernel(&self, out: &mut dyn Write, bytes_max: u64) -> Result<u64, FindError> {
        self.entry.kernel.copy(out, bytes_max)
    }

    /// Writes the initrds out, one behind the other, each from a multiple of four bytes on; their size in all.
    ///
    /// # Errors
    /// As [`Found::write_kernel`].
    pub fn write_initrd(&self, out: &mut dyn Write, bytes_max: u64) -> Result<u64, FindError> {
        let mut done: u64 = 0;
        for file in &self.entry.initrds {
            let gap = done.next_multiple_of(4).saturating_sub(done);
            let zeros = [0_u8; 4];
            let padding = zeros.get(..usize::try_from(gap).unwrap_or_default()).unwrap_or_default();
            out.write_all(padding).map_err(|e| file.read(FsError::Write(e)))?;
            done = done.saturating_add(gap);
            done = done.saturating_add(file.copy(out, bytes_max.saturating_sub(done))?);
        }
        Ok(done)
    }
}

/// A partition that can be read.
struct Place {
    partition: Partition,
    fs: FileSystem,
}

impl Place {
    fn failed(&self, source: FsError) -> FindError {
        FindError::Read { partition: self.partition.to_string(), source }
    }

    fn config(&self, file: &str, why: impl ToString) -> FindError {
        FindError::Config {
            file: file.to_owned(),
            partition: self.partition.to_string(),
            why: why.to_string(),
        }
    }

    /// A small text; `None` if there is none.
    fn text(&self, path: &str, max: u64) -> Result<Option<String>, FindError> {
        let bytes = self.fs.read(path, max).map_err(|e| self.failed(e))?;
        Ok(bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// A file that a configuration names. `/boot` may be this very file system, or a directory of it.
    fn file(&self, path: &str) -> Result<Option<BootFile>, FindError> {
        let path = format!("/{}", path.trim_start_matches('/'));
        let inside = format!("/boot{path}");
        for path in [path.as_str(), path.strip_prefix("/boot").unwrap_or(&inside)] {
            if let Some(bytes) = self.fs.size(path).map_err(|e| self.failed(e))? {
                let (path, fs) = (path.to_owned(), self.fs.clone());
                return Ok(Some(BootFile { path, bytes, fs, partition: self.partition.to_string() }));
            }
        }
        Ok(None)
    }
}

/// The disk as GRUB's scripts see it.
struct Devices<'a>(&'a [Place]);

impl Devices<'_> {
    /// `hd0,gpt2`, `hd0,msdos2`, `hd0,2`: the second.
    fn place(&self, device: &str) -> Option<&Place> {
        let digits = device
            .rsplit_once(',')
            .map_or("0", |(_, part)| part.trim_start_matches(|c: char| !c.is_ascii_digit()));
        let number: u32 = digits.parse().ok()?;
        self.0.iter().find(|place| place.partition.number == number)
    }
}

impl Host for Devices<'_> {
    fn read(&self, device: &str, path: &str) -> Option<Vec<u8>> {
        let max = if path.ends_with("/grubenv") { ENVIRONMENT_BYTES_MAX } else { SCRIPT_BYTES_MAX };
        self.place(device)?.fs.read(path, max).ok()?
    }

    fn size(&self, device: &str, path: &str) -> Option<u64> {
        self.place(device)?.fs.size(path).ok()?
    }

    fn search(&self, by: Search, what: &str) -> Option<String> {
        let found = self.0.iter().find(|place| match by {
            Search::Uuid => place.fs.uuid().eq_ignore_ascii_case(what),
            Search::Label => place.fs.label() == what,
            Search::File => place.fs.size(what).is_ok_and(|size| size.is_some()),
        })?;
        Some(format!("hd0,{}", found.partition.number))
    }
}

/// Finds what a disk boots with.
///
/// # Errors
/// [`FindError`]: what is missing or cannot be read, and what to do.
pub fn find(disk: Box<dyn ReadAt>) -> Result<Found, FindError> {
    find_with_budget(disk, BUDGET_BYTES)
}

/// As [`find`], reading so many bytes at most.
///
/// # Errors
/// As [`find`].
pub fn find_with_budget(disk: Box<dyn ReadAt>, bytes: u64) -> Result<Found, FindError> {
    let disk = Window::whole(Rc::new(Budgeted::new(disk, bytes)));
    let mut all = partitions(&disk).map_err(|_| FindError::Table)?;
    all.truncate(PARTITIONS_MAX);
    let (mut places, mut looked) = (Vec::new(), Vec::new());
    let mut broken = None;
    for partition in all {
        match look(&partition.window) {
            Content::Readable(fs) => places.push(Place { partition, fs }),
            Content::Other(name) => looked.push(format!("{partition} has {name}, which cannot be read")),
            Content::Broken(source) => {
                looked.push(format!("{partition} is damaged: {source}"));
                let partition = partition.to_string();
                broken.get_or_insert(FindError::Read { partition, source });
            }
            Content::Unknown => {}
        }
    }
    let chosen = match loader_entry(&places)? {
        Some(entry) => Some(entry),
        None => grub_entry(&places)?,
    };
    match (chosen, broken) {
        (Some(entry), _) => checked(entry),
        // It may have been there.
        (None, Some(error)) => Err(error),
        (None, None) if looked.is_empty() => Err(match efi_program(&places) {
            Some(what) => FindError::UefiOnly { what },
            None => FindError::Nothing {
                looked: match places.len() {
                    0 => "there is no file system that can be read".to_owned(),
                    count => format!("{count} file systems were searched"),
                },
            },
        }),
        (None, None) => Err(FindError::Nothing { looked: looked.join("; ") }),
    }
}

/// Looks whether the entry can be booted.
fn checked(mut entry: Entry) -> Result<Found, FindError> {
    let kind = KernelKind::of(&entry.kernel.head()?);
    let path = entry.kernel.path.clone();
    match kind {
        KernelKind::BzImage | KernelKind::Elf => {}
        KernelKind::Efi => {
            return Err(FindError::UefiOnly {
                what: format!("{path} (a program for UEFI) on {}", entry.kernel.partition),
            });
        }
        KernelKind::Unknown => {
            return Err(FindError::NotAKernel { path, partition: entry.kernel.partition.clone() });
        }
    }
    let wrong = |what| FindError::Cmdline { entry: entry.source.clone(), what };
    if entry.cmdline.len() > CMDLINE_BYTES_MAX {
        return Err(wrong("has more than 2047 bytes"));
    }
    if entry.cmdline.chars().any(char::is_control) {
        return Err(wrong("has control characters in it"));
    }
    if entry.initrds.len() > INITRDS_MAX {
        return Err(wrong("goes with more than 16 initrds"));
    }
    if entry.version.is_empty() {
        let name = path.rsplit_once('/').map_or(path.as_str(), |(_, name)| name);
        entry.version = name.split_once('-').map_or_else(String::new, |(_, version)| version.to_owned());
    }
    Ok(Found { entry, kind })
}

/// A program that only a firmware runs.
fn efi_program(places: &[Place]) -> Option<String> {
    let is_efi = |name: &String| name.to_ascii_lowercase().ends_with(".efi");
    for place in places {
        for dir in ["/EFI/Linux", "/EFI/BOOT", "/EFI/systemd"] {
            if let Some(name) = place.fs.list(dir).unwrap_or_default().into_iter().find(is_efi) {
                return Some(format!("{dir}/{name} on {}", place.partition));
            }
        }
    }
    places
        .iter()
        .find(|place| place.partition.esp)
        .map(|place| format!("an EFI system partition ({})", place.partition))
}

/// The entry of the Boot Loader Specification that is booted by itself; `None` when there are none.
fn loader_entry(places: &[Place]) -> Result<Option<Entry>, FindError> {
    let (mut only_efi, mut missing) = (None, None);
    for place in places {
        for dir in BLS_DIRS {
            let entries = read_entries(place, dir)?;
            let grub = entries.first().and_then(|_| grub_of(places, place));
            let (mut bootable, mut others) = (Vec::new(), entries);
            others.sort_by(bls::order);
            for entry in others.into_iter().filter(BlsEntry::fits) {
                let source = format!("{dir}/entries/{}.conf", entry.id);
                if entry.linux.is_empty() {
                    if entry.efi {
                        only_efi.get_or_insert(format!("{source} on {}", place.partition));
                    }
                    continue;
                }
                match resolved(place, &entry, &source, grub.as_ref()) {
                    Ok(found) => bootable.push((entry, found)),
                    Err(error @ FindError::Missing { .. }) => drop(missing.get_or_insert(error)),
                    Err(error) => return Err(error),
                }
            }
            let conf = place.text(&format!("{dir}/loader.conf"), bls::FILE_BYTES_MAX)?;
            if let Some(at) = default_of(&bootable, conf.as_deref(), grub.as_ref()) {
                return Ok(Some(bootable.swap_remove(at).1));
            }
        }
    }
    match (missing, only_efi) {
        (Some(error), _) => Err(error),
        (None, Some(what)) => Err(FindError::UefiOnly { what }),
        (None, None) => Ok(None),
    }
}

fn read_entries(place: &Place, dir: &str) -> Result<Vec<BlsEntry>, FindError> {
    let names = place.fs.list(&format!("{dir}/entries")).map_err(|e| place.failed(e))?;
    let mut entries = Vec::new();
    for name in names.into_iter().filter(|name| name.ends_with(".conf")).take(bls::ENTRIES_MAX) {
        let text = place.text(&format!("{dir}/entries/{name}"), bls::FILE_BYTES_MAX)?;
        entries.extend(text.and_then(|text| bls::parse(&name, &text)));
    }
    Ok(entries)
}

/// The grub.cfg of the same file system, after it ran, if it is one that shows loader entries.
fn grub_of(places: &[Place], place: &Place) -> Option<GrubOver> {
    let dir = GRUB_DIRS
        .into_iter()
        .find(|dir| place.fs.size(&format!("{dir}/grub.cfg")).is_ok_and(|size| size.is_some()))?;
    let script = place.text(&format!("{dir}/grub.cfg"), SCRIPT_BYTES_MAX).ok()??;
    GrubOver::run(places, place, dir, &script)
}

/// What a grub.cfg left in its variables.
struct GrubOver {
    default: String,
    values: Vec<(String, String)>,
}

impl GrubOver {
    fn run(places: &[Place], place: &Place, dir: &str, script: &str) -> Option<Self> {
        let devices = Devices(places);
        let mut grub = Grub::new(&devices, &format!("hd0,{}", place.partition.number), dir);
        grub.run(script).ok()?;
        let values = grub.variables();
        let default = grub.variable("default").to_owned();
        grub.blscfg.then_some(Self { default, values })
    }
}

/// Which of the entries is the default.
fn default_of(
    entries: &[(BlsEntry, Entry)],
    loader_conf: Option<&str>,
    grub: Option<&GrubOver>,
) -> Option<usize> {
    if let Some(grub) = grub {
        let by_name =
            entries.iter().position(|(entry, _)| entry.id == grub.default || entry.title == grub.default);
        let by_number = grub.default.parse().ok().filter(|index| *index < entries.len());
        if let Some(at) = by_name.or(by_number) {
            return Some(at);
        }
    }
    let pattern = loader_conf.and_then(bls::default_pattern);
    let by_pattern =
        pattern.and_then(|pattern| entries.iter().position(|(entry, _)| bls::matches(&pattern, &entry.id)));
    by_pattern.or_else(|| (!entries.is_empty()).then_some(0))
}

/// An entry with its files.
fn resolved(
    place: &Place,
    entry: &BlsEntry,
    source: &str,
    grub: Option<&GrubOver>,
) -> Result<Entry, FindError> {
    let values = grub.map(|grub| grub.values.as_slice()).unwrap_or_default();
    let expand = |text: &str| crate::grub::expand(text, values);
    let file = |path: &str| {
        let missing = || FindError::Missing {
            entry: format!("{source} on {}", place.partition),
            path: path.to_owned(),
        };
        place.file(path)?.ok_or_else(missing)
    };
    let initrds: Vec<String> =
        entry.initrds.iter().map(|path| expand(path)).filter(|path| !path.is_empty()).collect();
    Ok(Entry {
        title: entry.name().to_owned(),
        version: entry.version.clone(),
        source: source.to_owned(),
        partition: place.partition.number,
        kernel: file(&expand(&entry.linux))?,
        initrds: initrds.iter().map(|path| file(path)).collect::<Result<_, _>>()?,
        cmdline: expand(&entry.options).split_ascii_whitespace().collect::<Vec<_>>().join(" "),
    })
}

/// The entry that GRUB boots by itself; `None` when there is no grub.cfg.
fn grub_entry(places: &[Place]) -> Result<Option<Entry>, FindError> {
    for place in places {
        for dir in GRUB_DIRS {
            let file = format!("{dir}/grub.cfg");
            let Some(script) = place.text(&file, SCRIPT_BYTES_MAX)? else { continue };
            let devices = Devices(places);
            let mut grub = Grub::new(&devices, &format!("hd0,{}", place.partition.number), dir);
            let chosen = grub.run(&script).and_then(|()| grub.boot()).map_err(|e| place.config(&file, e))?;
            return loaded(&devices, place, &file, chosen).map(Some);
        }
    }
    Ok(None)
}

/// A menu entry with its files.
fn loaded(devices: &Devices<'_>, place: &Place, source: &str, chosen: Chosen) -> Result<Entry, FindError> {
    let file = |named: &crate::grub::Place| {
        let missing = || FindError::Missing {
            entry: format!("the entry `{}` of {source} on {}", chosen.title, place.partition),
            path: format!("({}){}", named.device, named.path),
        };
        let on = devices.place(&named.device).ok_or_else(missing)?;
        on.file(&named.path)?.ok_or_else(missing)
    };
    Ok(Entry {
        version: String::new(),
        source: source.to_owned(),
        partition: place.partition.number,
        kernel: file(&chosen.kernel)?,
        initrds: chosen.initrds.iter().map(file).collect::<Result<_, _>>()?,
        cmdline: chosen.cmdline.clone(),
        title: chosen.title,
    })
}
