//! Reading on: from a line of any number to the newest, and later to those that came since, over the change of files.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crate::{
    AuditError, Entry, LINE_BYTES_MAX,
    chain::{Chain, OPEN, at, closed},
};

/// Where somebody is in a log that grows.
#[derive(Debug)]
pub struct Reader {
    dir: PathBuf,
    /// The first number wanted.
    from: u64,
    chain: Chain,
    now: Option<Now>,
}

/// The file that is being read.
#[derive(Debug)]
struct Now {
    path: PathBuf,
    inode: u64,
    file: BufReader<File>,
    /// How many lines were read of it.
    line: u64,
    /// What was read of a line that has no end yet.
    part: Vec<u8>,
}

impl Now {
    fn open(path: &Path) -> Result<Self, AuditError> {
        let io = at("open", path);
        let file = File::open(path).map_err(&io)?;
        let inode = file.metadata().map_err(&io)?.ino();
        Ok(Self { path: path.to_owned(), inode, file: BufReader::new(file), line: 0, part: Vec::new() })
    }

    /// The next line with its end, if it is whole.
    fn line(&mut self) -> Result<Option<Vec<u8>>, AuditError> {
        let left = LINE_BYTES_MAX.saturating_sub(self.part.len() as u64);
        self.file.by_ref().take(left).read_until(b'\n', &mut self.part).map_err(at("read", &self.path))?;
        if self.part.ends_with(b"\n") {
            self.line += 1;
            return Ok(Some(std::mem::take(&mut self.part)));
        }
        if self.part.len() as u64 >= LINE_BYTES_MAX {
            return Err(self.broken("it is longer than any that we write"));
        }
        Ok(None)
    }

    fn broken(&self, why: &'static str) -> AuditError {
        AuditError::Broken { path: self.path.clone(), line: self.line.max(1), why }
    }
}

impl Reader {
    /// One that begins at a number; before it lies what is not wanted.
    #[must_use]
    pub fn new(dir: &Path, from: u64) -> Self {
        Self { dir: dir.to_owned(), from, chain: Chain::default(), now: None }
    }

    /// The next line with its hash; `None`: there is none yet.
    ///
    /// # Errors
    /// The disk's, or the chain is broken there.
    pub fn next_entry(&mut self) -> Result<Option<(Entry, String)>, AuditError> {
        loop {
            let Some(now) = &mut self.now else {
                match self.first_file()? {
                    Some(path) => self.now = Some(Now::open(&path)?),
                    None => return Ok(None),
                }
                continue;
            };
            if let Some(line) = now.line()? {
                let line = line.strip_suffix(b"\n").unwrap_or(&line);
                let entry = self.chain.take(line).map_err(|why| now.broken(why))?;
                if entry.n >= self.from {
                    return Ok(Some((entry, self.chain.seen().hash.clone())));
                }
                continue;
            }
            if !self.go_on()? {
                return Ok(None);
            }
        }
    }

    /// The newest file that begins at or before what is wanted.
    fn first_file(&self) -> Result<Option<PathBuf>, AuditError> {
        let files = closed(&self.dir)?;
        let begins = files.iter().rev().find(|(first, _)| *first <= self.from.max(1)).or(files.first());
        if let Some((_, path)) = begins {
            return Ok(Some(path.clone()));
        }
        let open = self.dir.join(OPEN);
        Ok(open.exists().then_some(open))
    }

    /// At the end of a file: goes to the one that follows. `false`: it is the newest.
    fn go_on(&mut self) -> Result<bool, AuditError> {
        let Some(now) = &mut self.now else { return Ok(false) };
        let next = self.chain.seen().last.saturating_add(1);
        let followed = closed(&self.dir)?.into_iter().find(|(first, _)| *first == next).map(|(_, path)| path);
        let path = match followed {
            Some(path) => path,
            None => {
                let open = self.dir.join(OPEN);
                let inode = std::fs::metadata(&open).map(|found| found.ino()).unwrap_or(now.inode);
                if inode == now.inode {
                    return Ok(false);
                }
                open
            }
        };
        // It may have got its last lines, and been closed, since we were at its end.
        let at = now.file.get_ref().metadata().map_err(crate::chain::at("look at", &now.path))?.len();
        let read =
            std::io::Seek::stream_position(&mut now.file).map_err(crate::chain::at("read", &now.path))?;
        if read < at {
            return Ok(true);
        }
        self.now = Some(Now::open(&path)?);
        Ok(true)
    }
}
