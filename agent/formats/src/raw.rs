//! The disk itself: a file or block device, or an NBD export.

use serio_nbd::{client::Client, wire::STATE_ZERO};

use super::{FormatError, Image, Run, source::Source};

/// A file or block device.
#[derive(Debug)]
pub struct RawFile {
    source: Source,
}

impl RawFile {
    /// Any bytes are a raw disk.
    pub fn open(source: Source) -> Result<RawFile, FormatError> {
        Ok(RawFile { source })
    }
}

impl Image for RawFile {
    fn size_bytes(&self) -> u64 {
        self.source.len()
    }

    fn run(&mut self, offset: u64) -> Result<Run, FormatError> {
        Ok(self.source.run(offset))
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), FormatError> {
        Ok(self.source.read_exact_at(buffer, offset)?)
    }
}

/// An NBD export.
#[derive(Debug)]
pub struct RawNbd {
    client: Client,
    context: Option<usize>,
    /// Stretches that were asked for already, and where they start.
    known: (u64, std::collections::VecDeque<Run>),
}

impl RawNbd {
    /// Reads through this client.
    pub fn new(client: Client) -> RawNbd {
        let context = client.context("base:allocation");
        RawNbd { client, context, known: (0, std::collections::VecDeque::new()) }
    }
}

impl Image for RawNbd {
    fn size_bytes(&self) -> u64 {
        self.client.size_bytes()
    }

    fn run(&mut self, offset: u64) -> Result<Run, FormatError> {
        let left = self.client.size_bytes().saturating_sub(offset);
        let Some(context) = self.context else { return Ok(Run { len: left, zero: false }) };
        loop {
            let (start, runs) = &mut self.known;
            match runs.front() {
                Some(run) if (*start..start.saturating_add(run.len)).contains(&offset) => {
                    let len = start.saturating_add(run.len).saturating_sub(offset);
                    return Ok(Run { len: len.min(left).max(1), zero: run.zero });
                }
                Some(run) if *start <= offset => {
                    *start = start.saturating_add(run.len);
                    runs.pop_front();
                }
                _ => {
                    let block = u64::from(self.client.terms().block_min_bytes);
                    let from = offset - offset % block;
                    let found = self.client.status(context, from, self.client.size_bytes() - from)?;
                    let zero = |flags: u64| flags & u64::from(STATE_ZERO) != 0;
                    let runs = found.iter().map(|run| Run { len: run.len, zero: zero(run.flags) });
                    self.known = (from, runs.collect());
                }
            }
        }
    }

    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Result<(), FormatError> {
        Ok(self.client.read(offset, buffer)?)
    }
}
