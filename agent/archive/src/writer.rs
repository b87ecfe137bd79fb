//! Writes an archive from its start.

use std::io::{self, Write};

use crate::{MANIFEST_BYTES_MAX, RECORD_BYTES_MAX, head, record_head};

/// An archive that is being written.
#[derive(Debug)]
pub struct Writer<W> {
    to: W,
    hash: blake3::Hasher,
}

impl<W: Write> Writer<W> {
    /// Writes the head.
    ///
    /// # Errors
    /// The manifest has more than [`MANIFEST_BYTES_MAX`], or `to` does not take it.
    pub fn new(mut to: W, manifest: &[u8]) -> io::Result<Self> {
        let bytes = u32::try_from(manifest.len()).ok().filter(|_| manifest.len() <= MANIFEST_BYTES_MAX);
        let bytes =
            bytes.ok_or_else(|| io::Error::other(format!("a manifest of {} bytes", manifest.len())))?;
        let head = head(bytes);
        let hash = blake3::Hasher::new().update(&head).update(manifest).finalize();
        to.write_all(&head)?;
        to.write_all(hash.as_bytes())?;
        to.write_all(manifest)?;
        Ok(Self { to, hash: after(&hash) })
    }

    /// Data of the present part, at `offset`, which lies behind all that was written of it. Zeros need not be written.
    ///
    /// # Errors
    /// `to` does not take it.
    pub fn data(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut at = offset;
        for piece in data.chunks(RECORD_BYTES_MAX) {
            // At most a MiB.
            let head = record_head(at, u32::try_from(piece.len()).unwrap_or(u32::MAX));
            self.hash.update(&head).update(piece);
            self.to.write_all(&head)?;
            self.to.write_all(piece)?;
            at = at.saturating_add(piece.len() as u64);
        }
        Ok(())
    }

    /// Ends the present part; the next one begins.
    ///
    /// # Errors
    /// `to` does not take it.
    pub fn end_part(&mut self, part_bytes: u64) -> io::Result<()> {
        let head = record_head(part_bytes, 0);
        let hash = self.hash.update(&head).finalize();
        self.to.write_all(&head)?;
        self.to.write_all(hash.as_bytes())?;
        self.hash = after(&hash);
        Ok(())
    }

    /// The last part was ended: all of it is handed on.
    ///
    /// # Errors
    /// `to` does not take it.
    #[allow(
        clippy::disallowed_methods,
        reason = "whoever gave `to` syncs it; what it has buffered must go out"
    )]
    pub fn finish(mut self) -> io::Result<W> {
        self.to.flush()?;
        Ok(self.to)
    }
}

/// The hash of what follows one.
pub(super) fn after(hash: &blake3::Hash) -> blake3::Hasher {
    let mut next = blake3::Hasher::new();
    next.update(hash.as_bytes());
    next
}
