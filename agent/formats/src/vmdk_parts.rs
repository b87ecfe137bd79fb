//! vmdk over several files, read: a description in a file of its own, and the extents that it names
//! (`monolithicFlat`, `twoGbMaxExtentFlat`, `twoGbMaxExtentSparse`). The words are those of VMware's "Virtual Disk Format 5.0".
//!
//! ```text
//! disk.vmdk   RW 4192256 SPARSE "disk-s001.vmdk"     ──► the first 4192256 sectors of the disk
//!             RW 4192256 FLAT "disk-f002.vmdk" 0     ──► the next ones, from sector 0 of that file
//!             RW 2048 ZERO                           ──► zeros, no file
//! ```
//! Each file is asked for by its name ([`Backings::part`]), so that only what the caller allowed is opened. Invariant: each
//! extent holds the sectors that the description says.

use super::{
    Backings, FormatError, Image, Run, printable,
    source::Source,
    vmdk::{Description, SECTOR, Vmdk, malformed, unsupported},
};

/// Files of one disk: each holds a descriptor. Parts of 2 GiB make a disk of 1 TiB.
const EXTENTS_MAX: usize = 512;

/// What a description starts with.
pub(crate) const START: &[u8] = b"# Disk DescriptorFile";
const KINDS: [&str; 3] = ["monolithicFlat", "twoGbMaxExtentFlat", "twoGbMaxExtentSparse"];

#[derive(Debug)]
enum Content {
    /// From this byte of the file.
    Flat(Source, u64),
    Sparse(Box<Vmdk>),
    Zeros,
}

#[derive(Debug)]
struct Extent {
    /// First byte in the disk.
    start: u64,
    len: u64,
    content: Content,
}

/// See the head of this file.
#[derive(Debug)]
pub struct VmdkParts {
    extents: Vec<Extent>,
    size: u64,
}

impl VmdkParts {
    /// Reads the description, and opens and validates what it names.
    pub(crate) fn open(
        source: &Source,
        size_max: u64,
        backings: &mut dyn Backings,
    ) -> Result<VmdkParts, FormatError> {
        let description = Description::read(source, 0, source.len())?;
        description.check_no_parent()?;
        let kind = description.value("createType").unwrap_or_default();
        if !KINDS.contains(&kind.as_str()) {
            return unsupported(format!(
                "it is a `{}`: convert it first, `qemu-img convert -O vmdk`",
                printable(&kind)
            ));
        }
        let mut parts = VmdkParts { extents: Vec::new(), size: 0 };
        for line in description.extents() {
            if parts.extents.len() >= EXTENTS_MAX {
                return unsupported(format!(
                    "it has more than {EXTENTS_MAX} files: convert it first, `qemu-img convert -O vmdk`"
                ));
            }
            parts.add(&line, size_max, backings)?;
        }
        if parts.extents.is_empty() {
            return malformed("its description names no extent");
        }
        Ok(parts)
    }

    /// One line: `RW sectors SPARSE "name"`, `RW sectors FLAT "name" first-sector`, `RW sectors ZERO`.
    fn add(&mut self, line: &str, size_max: u64, backings: &mut dyn Backings) -> Result<(), FormatError> {
        let wrong = || malformed(format!("its description has the extent `{}`", printable(line)));
        // Names may have spaces.
        let (before, name, after) = match line.split('"').collect::<Vec<_>>().as_slice() {
            [before] => (*before, None, ""),
            [before, name, after] => (*before, Some(*name), *after),
            _ => return wrong(),
        };
        let words: Vec<&str> = before.split_ascii_whitespace().collect();
        let [access, sectors, kind] = words.as_slice() else { return wrong() };
        if *access == "NOACCESS" {
            return unsupported("a part of it may not be accessed");
        }
        let len = sectors.parse::<u64>().ok().and_then(|n| n.checked_mul(SECTOR)).filter(|len| *len > 0);
        let Some(len) = len else { return wrong() };
        let size = self.size.saturating_add(len);
        if size > size_max {
            return Err(FormatError::TooLarge { size, max: size_max });
        }
        let content = match (*kind, name) {
            ("ZERO", _) => Content::Zeros,
            ("FLAT", Some(name)) => {
                let first = after.trim();
                let first = if first.is_empty() { Some(0) } else { first.parse::<u64>().ok() };
                let Some(first) = first.and_then(|n| n.checked_mul(SECTOR)) else { return wrong() };
                let file = backings.part(name)?;
                if !file.holds(first, len) {
                    return malformed(format!(
                        "`{}` has {} bytes, which are too few for {len} from {first}",
                        printable(name),
                        file.len()
                    ));
                }
                Content::Flat(file, first)
            }
            ("SPARSE", Some(name)) => {
                let extent = Vmdk::open_extent(backings.part(name)?, size_max)?;
                if extent.size_bytes() < len {
                    return malformed(format!(
                        "`{}` holds {} bytes of the disk, not {len}",
                        printable(name),
                        extent.size_bytes()
                    ));
                }
                Content::Sparse(Box::new(extent))
            }
            _ => return wrong(),
        };
        self.extents.push(Extent { start: self.size, len, content });
        self.size = size;
        Ok(())
    }

    /// The extent at `offset`, how far into it that is, and how much of it is left.
    fn at(&mut self, offset: u64) -> Result<(&mut Content, u64, u64), FormatError> {
        let i = self.extents.partition_point(|extent| extent.start.saturating_add(extent.len) <= offset);
        match self.extents.get_mut(i) {
            Some(extent) => {
                let within = offset.saturating_sub(extent.start);
                Ok((&mut extent.content, within, extent.len.saturating_sub(within)))
            }
            None => malformed(format!("nothing is at {offset}")),
        }
    }
}

impl Image for VmdkParts {
    fn size_bytes(&self) -> u64 {
        self.size
    }

    fn run(&mut self, offset: u64) -> Result<Run, FormatError> {
        let (content, within, left) = self.at(offset)?;
        let run = match content {
            Content::Zeros => Run { len: left, zero: true },
            Content::Flat(file, first) => file.run(first.saturating_add(within)),
            Content::Sparse(extent) => extent.run(within)?,
        };
        Ok(Run { len: run.len.min(left).max(1), zero: run.zero })
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), FormatError> {
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let (content, within, left) = self.at(at)?;
            let n = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
            let (part, more) = std::mem::take(&mut rest).split_at_mut(n);
            match content {
                Content::Zeros => part.fill(0),
                Content::Flat(file, first) => file.read_exact_at(part, first.saturating_add(within))?,
                Content::Sparse(extent) => extent.read(within, part)?,
            }
            at = at.saturating_add(n as u64);
            rest = more;
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "vmdk_parts_test.rs"]
mod tests;
