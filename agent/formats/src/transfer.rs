//! A disk from an image into a sink, in order.

use crate::{
    FormatError, GRAIN, Image,
    sinks::{Sink, SinkError},
};

/// Bytes that are read at once: several pieces of an NBD client are under way then.
const BUFFER_BYTES: u64 = 8 << 20;
/// Zeros that are handed on at once, so that progress moves and a wish to stop is heard.
const ZEROS_BYTES: u64 = 1 << 30;

/// Why a transfer ended.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// Reading.
    #[error(transparent)]
    Read(#[from] FormatError),
    /// Writing.
    #[error(transparent)]
    Write(#[from] SinkError),
    /// Somebody wanted it.
    #[error("interrupted")]
    Stopped,
}

/// Sees all bytes go by.
pub trait Watch {
    /// The next bytes.
    fn data(&mut self, data: &[u8]);
    /// So many zeros are next.
    fn zeros(&mut self, len: u64);
    /// So far all is handed on. False: stop.
    fn step(&mut self, done: u64) -> bool;
}

/// Hands the whole disk on and makes it durable there. A last grain that is shorter than the disk's sectors is not padded.
pub fn transfer(
    image: &mut dyn Image,
    sink: &mut dyn Sink,
    watch: &mut dyn Watch,
) -> Result<(), TransferError> {
    let size = image.size_bytes();
    let (mut at, mut buffer) = (0, Vec::new());
    while at < size {
        let run = image.run(at)?;
        let left = size.saturating_sub(at);
        let grain = GRAIN as u64;
        // Whole grains go on, since a sink's clusters are grains; one that is zeros in part is read.
        let zeros = if run.zero { run.len.min(left).min(ZEROS_BYTES) } else { 0 };
        let zeros = if zeros == left { zeros } else { zeros / grain * grain };
        let len = if zeros > 0 {
            watch.zeros(zeros);
            sink.zeros(at, zeros)?;
            zeros
        } else {
            let len = run.len.next_multiple_of(grain).min(BUFFER_BYTES).min(left);
            buffer.resize(len as usize, 0);
            image.read(at, &mut buffer)?;
            watch.data(&buffer);
            sink.data(at, &buffer)?;
            len
        };
        at = at.saturating_add(len);
        if !watch.step(at) {
            return Err(TransferError::Stopped);
        }
    }
    Ok(sink.finish()?)
}
