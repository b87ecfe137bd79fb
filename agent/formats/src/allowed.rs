//! The files that a person allowed an image to lean on, by the names that stand in the image.
//!
//! Owns: which names are let through, and where they are looked for: beside the file that names them. Never: a file that
//! was not allowed, a chain that comes back to itself.

use std::{
    fs::File,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use super::{Backings, Format, FormatError, Image, open, printable, source::Source};

/// Backing files below one another.
const BACKINGS_MAX: usize = 16;

/// See the head of this file.
#[derive(Debug)]
pub struct Allowed {
    names: Vec<String>,
    /// Where the image that names them lies.
    dir: PathBuf,
    /// Images that are open already, by device and number.
    open: Vec<(u64, u64)>,
    size_max: u64,
}

impl Allowed {
    /// `names` are allowed to the image at `path`, which is open as `file`; `size_max` bounds each disk.
    pub fn new(names: &[String], path: &Path, file: &File, size_max: u64) -> std::io::Result<Allowed> {
        let meta = file.metadata()?;
        let dir = path.parent().unwrap_or(Path::new(".")).to_owned();
        Ok(Allowed { names: names.to_vec(), dir, open: vec![(meta.dev(), meta.ino())], size_max })
    }

    fn find(&self, name: &str) -> Result<(PathBuf, File), FormatError> {
        if !self.names.iter().any(|known| known == name) {
            return Err(FormatError::NotAllowed(printable(name)));
        }
        let path = self.dir.join(name);
        let opened = File::open(&path);
        let file = opened.map_err(|source| FormatError::Named { name: printable(name), source })?;
        Ok((path, file))
    }
}

impl Backings for Allowed {
    fn open(&mut self, name: &str, format: Format) -> Result<Box<dyn Image + Send>, FormatError> {
        let (path, file) = self.find(name)?;
        let id = file.metadata().map(|meta| (meta.dev(), meta.ino()))?;
        if self.open.contains(&id) || self.open.len() >= BACKINGS_MAX {
            let why = format!("its backing files come back to `{}`", printable(name));
            return Err(FormatError::Malformed { format, why });
        }
        self.open.push(id);
        let before = std::mem::replace(&mut self.dir, path.parent().unwrap_or(Path::new(".")).to_owned());
        let image = open(Source::new(file)?, format, self.size_max, self);
        self.dir = before;
        image
    }

    fn part(&mut self, name: &str) -> Result<Source, FormatError> {
        let (_, file) = self.find(name)?;
        Ok(Source::new(file)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_allowed_is_opened_and_no_circle() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("top");
        std::fs::write(&path, [0; 512]).unwrap();
        std::fs::write(dir.path().join("base"), [7; 1024]).unwrap();
        let top = File::open(&path).unwrap();
        let names = ["base".to_owned(), "top".to_owned(), "gone".to_owned()];
        let mut allowed = Allowed::new(&names, &path, &top, 1 << 20).unwrap();
        assert!(matches!(allowed.open("other", Format::Raw), Err(FormatError::NotAllowed(_))));
        assert!(matches!(allowed.part("../base"), Err(FormatError::NotAllowed(_))));
        assert!(allowed.part("gone").unwrap_err().to_string().contains("`gone`"));
        assert_eq!(allowed.part("base").unwrap().len(), 1024);
        assert_eq!(allowed.open("base", Format::Raw).unwrap().size_bytes(), 1024);
        for circle in ["top", "base"] {
            assert!(matches!(allowed.open(circle, Format::Raw), Err(FormatError::Malformed { .. })));
        }
    }
}
