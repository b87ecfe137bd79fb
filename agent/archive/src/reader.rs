//! Reads an archive from its start; believes nothing.

use std::io::{self, Read};

use crate::{
    HASH_BYTES, HEAD_BYTES, MAGIC, MANIFEST_BYTES_MAX, RECORD_BYTES_MAX, RECORD_HEAD_BYTES, VERSION,
    writer::after,
};

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// Another kind of file.
    #[error("this is no snapshot of a VM: it does not begin with its mark")]
    Magic,
    /// Of a later program.
    #[error(
        "the snapshot's archive has version {0}, {VERSION} is known here: use the version of Serio that exported it"
    )]
    Version(u32),
    /// The manifest is too large.
    #[error("the archive's manifest has {0} bytes; {MANIFEST_BYTES_MAX} are the most")]
    Manifest(u32),
    /// A hash is another one.
    #[error("the archive is damaged: the checksum of {what} is wrong")]
    Damaged {
        /// "its manifest", "part 3".
        what: String,
    },
    /// A record is where none can be.
    #[error("the archive is damaged: part {part} has {bytes} bytes at {offset}, after {before} of {size}")]
    Order {
        /// Counted from 1.
        part: u32,
        /// Where the record says that it is.
        offset: u64,
        /// Its length.
        bytes: u32,
        /// What came before.
        before: u64,
        /// What the part has.
        size: u64,
    },
    /// It ends too early.
    #[error("the archive broke off within {what}")]
    Short {
        /// What is cut.
        what: String,
    },
    /// Something follows.
    #[error("something follows the end of the archive")]
    Longer,
    /// It cannot be read.
    #[error("cannot read the archive")]
    Io(#[source] io::Error),
}

/// An archive that is being read.
#[derive(Debug)]
pub struct Reader<R> {
    from: R,
    hash: blake3::Hasher,
    /// Counted from 1; 0: none was begun.
    part: u32,
    size: u64,
    before: u64,
    ended: bool,
}

impl<R: Read> Reader<R> {
    /// Reads the head; gives the manifest.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn new(mut from: R) -> Result<(Self, Vec<u8>), ReadError> {
        let mut head = [0; HEAD_BYTES];
        fill(&mut from, &mut head, || "its head".to_owned())?;
        if !head.starts_with(&MAGIC) {
            return Err(ReadError::Magic);
        }
        let [.., v0, v1, v2, v3, l0, l1, l2, l3] = head;
        let version = u32::from_le_bytes([v0, v1, v2, v3]);
        if version != VERSION {
            return Err(ReadError::Version(version));
        }
        let bytes = u32::from_le_bytes([l0, l1, l2, l3]);
        let len = usize::try_from(bytes).ok().filter(|len| *len <= MANIFEST_BYTES_MAX);
        let len = len.ok_or(ReadError::Manifest(bytes))?;
        let (mut wanted, mut manifest) = ([0; HASH_BYTES], vec![0; len]);
        fill(&mut from, &mut wanted, || "its head".to_owned())?;
        fill(&mut from, &mut manifest, || "its manifest".to_owned())?;
        let hash = blake3::Hasher::new().update(&head).update(&manifest).finalize();
        if hash != wanted {
            return Err(ReadError::Damaged { what: "its manifest".to_owned() });
        }
        Ok((Self { from, hash: after(&hash), part: 0, size: 0, before: 0, ended: true }, manifest))
    }

    /// Begins the next part, which has so many bytes. The one before was read to its end.
    pub fn begin_part(&mut self, size: u64) {
        debug_assert!(self.ended, "a part was not read to its end");
        self.part = self.part.saturating_add(1);
        (self.size, self.before, self.ended) = (size, 0, false);
    }

    /// The next data of the part, into `data`, and its place; `None`: the part is whole.
    ///
    /// # Errors
    /// [`ReadError`]. What came of the part before may be wrong then.
    pub fn next(&mut self, data: &mut Vec<u8>) -> Result<Option<u64>, ReadError> {
        if self.ended {
            return Ok(None);
        }
        let part = self.part;
        let within = || format!("part {part}");
        let mut head = [0; RECORD_HEAD_BYTES];
        fill(&mut self.from, &mut head, within)?;
        self.hash.update(&head);
        let [a, b, c, d, e, f, g, h, i, j, k, l] = head;
        let (offset, bytes) =
            (u64::from_le_bytes([a, b, c, d, e, f, g, h]), u32::from_le_bytes([i, j, k, l]));
        let wrong = ReadError::Order { part, offset, bytes, before: self.before, size: self.size };
        if bytes == 0 {
            if offset != self.size {
                return Err(wrong);
            }
            let mut wanted = [0; HASH_BYTES];
            fill(&mut self.from, &mut wanted, within)?;
            let hash = self.hash.finalize();
            if hash != wanted {
                return Err(ReadError::Damaged { what: within() });
            }
            (self.hash, self.ended) = (after(&hash), true);
            return Ok(None);
        }
        let len = usize::try_from(bytes).ok().filter(|len| *len <= RECORD_BYTES_MAX);
        let end = offset.checked_add(bytes.into()).filter(|end| offset >= self.before && *end <= self.size);
        let (Some(len), Some(end)) = (len, end) else { return Err(wrong) };
        data.resize(len, 0);
        fill(&mut self.from, data, within)?;
        self.hash.update(data);
        self.before = end;
        Ok(Some(offset))
    }

    /// The last part was read: nothing may follow.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn finish(mut self) -> Result<(), ReadError> {
        loop {
            match self.from.read(&mut [0]) {
                Ok(0) => return Ok(()),
                Ok(_) => return Err(ReadError::Longer),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(ReadError::Io(e)),
            }
        }
    }
}

fn fill(from: &mut impl Read, bytes: &mut [u8], what: impl Fn() -> String) -> Result<(), ReadError> {
    from.read_exact(bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => ReadError::Short { what: what() },
        _ => ReadError::Io(error),
    })
}
