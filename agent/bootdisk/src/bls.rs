//! Entries of the Boot Loader Specification, type 1: `loader/entries/ID.conf`, one `key value` a line.

use std::cmp::Ordering;

use crate::version;

/// Longest file that is read.
pub(crate) const FILE_BYTES_MAX: u64 = 64 * 1024;
/// Entries that are looked at.
pub(crate) const ENTRIES_MAX: usize = 512;

/// An entry as it is written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct BlsEntry {
    /// The file's name without `.conf` and without the counters of boot attempts.
    pub(crate) id: String,
    pub(crate) title: String,
    pub(crate) version: String,
    pub(crate) sort_key: String,
    pub(crate) machine_id: String,
    pub(crate) architecture: String,
    pub(crate) linux: String,
    pub(crate) initrds: Vec<String>,
    pub(crate) options: String,
    /// It names a program for UEFI instead of a kernel.
    pub(crate) efi: bool,
    /// It has used its attempts up without ever being marked as good ("+0" in its name).
    pub(crate) bad: bool,
}

/// `id+LEFT[-DONE]`: the id, and whether no attempt is left.
fn counters(stem: &str) -> (&str, bool) {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let Some((id, counters)) = stem.rsplit_once('+') else { return (stem, false) };
    let (left, done) = counters.split_once('-').unwrap_or((counters, "0"));
    if number(left) && number(done) { (id, left.bytes().all(|byte| byte == b'0')) } else { (stem, false) }
}

/// Reads an entry. `None`: the name is no entry's.
pub(crate) fn parse(name: &str, text: &str) -> Option<BlsEntry> {
    let (id, bad) = counters(name.strip_suffix(".conf").filter(|stem| !stem.is_empty())?);
    let mut entry = BlsEntry { id: id.to_owned(), bad, ..BlsEntry::default() };
    for line in text.lines().map(str::trim) {
        if line.starts_with('#') {
            continue;
        }
        let Some((key, value)) = line.split_once([' ', '\t']) else { continue };
        let value = value.trim();
        match key {
            "title" => value.clone_into(&mut entry.title),
            "version" => value.clone_into(&mut entry.version),
            "sort-key" => value.clone_into(&mut entry.sort_key),
            "machine-id" => value.clone_into(&mut entry.machine_id),
            "architecture" => value.clone_into(&mut entry.architecture),
            "linux" => value.clone_into(&mut entry.linux),
            "initrd" => entry.initrds.extend(value.split_ascii_whitespace().map(str::to_owned)),
            "options" if entry.options.is_empty() => value.clone_into(&mut entry.options),
            "options" => entry.options = format!("{} {value}", entry.options),
            "efi" | "uki" | "uki-url" => entry.efi = true,
            _ => {}
        }
    }
    Some(entry)
}

impl BlsEntry {
    /// Whether it is for this machine.
    pub(crate) fn fits(&self) -> bool {
        self.architecture.is_empty() || self.architecture.eq_ignore_ascii_case("x64")
    }

    /// What a person calls it.
    pub(crate) fn name(&self) -> &str {
        if self.title.is_empty() { &self.id } else { &self.title }
    }
}

/// The specification's order ("Sorting"): what shall be booted first, first.
pub(crate) fn order(a: &BlsEntry, b: &BlsEntry) -> Ordering {
    let keyed = |entry: &BlsEntry| !entry.sort_key.is_empty();
    let by_key = || {
        if !keyed(a) || !keyed(b) {
            return keyed(b).cmp(&keyed(a));
        }
        (a.sort_key.cmp(&b.sort_key))
            .then_with(|| a.machine_id.cmp(&b.machine_id))
            .then_with(|| version::compare(&b.version, &a.version))
    };
    a.bad
        .cmp(&b.bad)
        .then_with(by_key)
        .then_with(|| version::compare(&b.id, &a.id))
        .then_with(|| b.id.cmp(&a.id))
}

/// The pattern of `default` in loader.conf, if it has one that names an entry.
pub(crate) fn default_pattern(loader_conf: &str) -> Option<String> {
    let value = loader_conf.lines().rev().find_map(|line| line.trim().strip_prefix("default"))?;
    let value = value.strip_prefix([' ', '\t'])?.trim();
    // "@saved" and the like are kept in the firmware, which a VM here does not have.
    (!value.is_empty() && !value.starts_with('@'))
        .then(|| value.strip_suffix(".conf").unwrap_or(value).to_owned())
}

/// Shell patterns as far as `*` and `?` go.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    // Where the last star was, and what it has taken.
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(byte) if *byte == b'?' || Some(byte) == name.get(n) => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    (p, n) = (at + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    pattern.get(p..).unwrap_or_default().iter().all(|byte| *byte == b'*')
}
