//! Where an export goes. Data come in order, at most 1 MiB at once, from grain to grain.
//!
//! A sink that *resumes* has been written before: what is there is read, and only what differs is written. So no note has
//! to be kept of how far it came, and what was written is verified on the way.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
    sync::Arc,
};

use rustix::fs::{FallocateFlags, fallocate};
use serio_nbd::client::{Client, ClientError, Op, Ticket};

use crate::{GRAIN, is_zero, qcow2_out, vmdk_out};

/// Writes of an NBD sink that are not waited for.
const TICKETS_MAX: usize = 24;
static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

/// Why an export cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The file, device or pipe.
    #[error("cannot write the image")]
    Io(#[from] io::Error),
    /// The NBD server.
    #[error("cannot write to the NBD export")]
    Nbd(#[from] ClientError),
}

/// See the head of this file.
pub trait Sink {
    /// The next bytes.
    fn data(&mut self, offset: u64, data: &[u8]) -> Result<(), SinkError>;
    /// The next bytes are zeros.
    fn zeros(&mut self, offset: u64, len: u64) -> Result<(), SinkError>;
    /// All came: makes it durable.
    fn finish(&mut self) -> Result<(), SinkError>;
}

/// A raw file or block device.
#[derive(Debug)]
pub struct RawSink {
    /// Opened for reading and writing.
    pub file: File,
    /// The disk's size.
    pub size: u64,
    /// What it held before is unknown: zeros must be written, and what is alike need not.
    pub used: bool,
}

impl RawSink {
    fn differs(&self, offset: u64, data: &[u8]) -> io::Result<bool> {
        let mut there = vec![0; data.len()];
        let mut filled = 0;
        while let Some(rest) = there.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, offset.saturating_add(filled as u64)) {
                // Shorter than the disk: what is missing is not there.
                Ok(0) => return Ok(true),
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(there != data)
    }
}

impl Sink for RawSink {
    fn data(&mut self, offset: u64, data: &[u8]) -> Result<(), SinkError> {
        let mut at = offset;
        for grain in data.chunks(GRAIN) {
            if self.used {
                if self.differs(at, grain)? {
                    self.file.write_all_at(grain, at)?;
                }
            } else if !is_zero(grain) {
                self.file.write_all_at(grain, at)?;
            }
            at = at.saturating_add(grain.len() as u64);
        }
        Ok(())
    }

    fn zeros(&mut self, offset: u64, len: u64) -> Result<(), SinkError> {
        if !self.used {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if fallocate(&self.file, flags, offset, len).is_ok() {
            return Ok(());
        }
        let mut left = len;
        while left > 0 {
            let part = left.min(ZEROS.len() as u64);
            self.file.write_all_at(ZEROS.get(..part as usize).unwrap_or_default(), offset + (len - left))?;
            left -= part;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), SinkError> {
        if self.file.metadata()?.is_file() {
            self.file.set_len(self.size)?;
        }
        Ok(self.file.sync_all()?)
    }
}

/// A pipe.
pub struct PipeSink<W>(pub W);

impl<W: Write> Sink for PipeSink<W> {
    fn data(&mut self, _: u64, data: &[u8]) -> Result<(), SinkError> {
        Ok(self.0.write_all(data)?)
    }

    fn zeros(&mut self, _: u64, len: u64) -> Result<(), SinkError> {
        let mut left = len;
        while left > 0 {
            let part = left.min(ZEROS.len() as u64);
            self.0.write_all(ZEROS.get(..part as usize).unwrap_or_default())?;
            left -= part;
        }
        Ok(())
    }

    #[allow(clippy::disallowed_methods, reason = "a pipe is not synced, but its buffer must go out")]
    fn finish(&mut self) -> Result<(), SinkError> {
        Ok(self.0.flush()?)
    }
}

/// An NBD export.
pub struct NbdSink {
    client: Client,
    resumes: bool,
    under_way: VecDeque<Ticket>,
}

impl NbdSink {
    /// Writes through this client.
    pub fn new(client: Client, resumes: bool) -> NbdSink {
        NbdSink { client, resumes, under_way: VecDeque::new() }
    }

    fn wait_for(&mut self, left: usize) -> Result<(), SinkError> {
        while self.under_way.len() > left {
            if let Some(ticket) = self.under_way.pop_front() {
                let _ = ticket.wait()?;
            }
        }
        Ok(())
    }
}

impl Sink for NbdSink {
    fn data(&mut self, offset: u64, data: &[u8]) -> Result<(), SinkError> {
        if self.resumes {
            let mut there = vec![0; data.len()];
            self.client.read(offset, &mut there)?;
            if there == data {
                return Ok(());
            }
        }
        let mut at = offset;
        for part in data.chunks(self.client.piece_bytes() as usize) {
            self.wait_for(TICKETS_MAX)?;
            let ticket = self.client.submit(Op::Write { offset: at, data: Arc::new(part.to_vec()) })?;
            self.under_way.push_back(ticket);
            at = at.saturating_add(part.len() as u64);
        }
        Ok(())
    }

    fn zeros(&mut self, offset: u64, len: u64) -> Result<(), SinkError> {
        // What was there is unknown.
        Ok(self.client.write_zeroes(offset, len, true)?)
    }

    fn finish(&mut self) -> Result<(), SinkError> {
        self.wait_for(0)?;
        Ok(self.client.flush()?)
    }
}

/// A new qcow2 or vmdk file.
pub enum ImageSink<'a> {
    /// qcow2.
    Qcow2(Option<qcow2_out::Writer<'a>>),
    /// vmdk.
    Vmdk(Option<vmdk_out::Writer<'a>>),
}

impl Sink for ImageSink<'_> {
    fn data(&mut self, offset: u64, data: &[u8]) -> Result<(), SinkError> {
        let mut at = offset;
        // The grains of both formats are as large as ours.
        for grain in data.chunks(GRAIN) {
            if !is_zero(grain) {
                match self {
                    ImageSink::Qcow2(Some(writer)) => writer.put(at, grain)?,
                    ImageSink::Vmdk(Some(writer)) => writer.put(at, grain)?,
                    ImageSink::Qcow2(None) | ImageSink::Vmdk(None) => {}
                }
            }
            at = at.saturating_add(grain.len() as u64);
        }
        Ok(())
    }

    fn zeros(&mut self, _: u64, _: u64) -> Result<(), SinkError> {
        Ok(())
    }

    fn finish(&mut self) -> Result<(), SinkError> {
        match self {
            ImageSink::Qcow2(writer) => writer.take().map(|w| w.finish()).transpose()?,
            ImageSink::Vmdk(writer) => writer.take().map(|w| w.finish()).transpose()?,
        };
        Ok(())
    }
}
