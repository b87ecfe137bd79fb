//! Where the bytes of a volume lie in files: for who sends them from there, without a copy through memory.
//!
//! What is found stays right without the gate. Sealed layers do not change, and a file that is removed keeps its bytes for
//! who has it open. The head changes in place: who reads a range while others write it may see either. Space is freed
//! only where nothing was, where zeros were asked for, or where the caller's own range was given up. Blocks that a layer
//! keeps encrypted are never found, nor those of a head that goes past the page cache: a pipe takes its bytes from there.

use std::{fs::File, sync::Arc};

use crate::{
    media::Media,
    plan::Range,
    stack::{Source, Stack},
};

/// A run of bytes of a volume.
#[derive(Debug, Clone)]
pub enum FileRun {
    /// `len` bytes of a file, from `offset`. They are read, never written.
    File {
        /// The data file of a layer.
        file: Arc<File>,
        /// First byte in it.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// So many zeros that lie nowhere.
    Zeros {
        /// Bytes.
        len: u64,
    },
}

/// Appends the runs of a range in order, `max` at most; false, and `runs` means nothing, if there are more, or the range
/// is not of the volume, or some bytes do not lie in a file as they are read.
pub(crate) fn find(stack: &Stack, range: Range, max: usize, runs: &mut Vec<FileRun>) -> bool {
    let end = range.offset.checked_add(range.len);
    if end.is_none_or(|end| end > stack.head().size_bytes) {
        return false;
    }
    let mut left = max;
    let mut whole = true;
    stack.byte_runs(range.offset, range.len, |source, offset, len| {
        let Some(less) = left.checked_sub(1).filter(|_| whole) else {
            whole = false;
            return;
        };
        left = less;
        match source {
            Source::Zero => runs.push(FileRun::Zeros { len }),
            Source::Layer(index) => match stack.layers.get(index) {
                Some(layer) if layer.is_plain() && !layer.is_direct() => match &layer.data {
                    Media::File(file) => runs.push(FileRun::File { file: Arc::clone(file), offset, len }),
                    #[cfg(test)]
                    Media::Sim(_) => whole = false,
                },
                _ => whole = false,
            },
        }
    });
    whole
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use tempfile::TempDir;

    use crate::{Access, FileRun, Op, VolumeDir, uring::Buffers};

    #[test]
    fn runs_have_the_bytes_that_are_read() {
        let temp = TempDir::new().expect("tempdir");
        let dir = VolumeDir::new(temp.path().join("vol"));
        let size = (4 << 20) + 700;
        dir.create(size).expect("create");
        let volume = dir.open(Access::ReadWrite).expect("open");
        let mut queue = volume.queue(8).expect("queue");
        let mut write = |offset, len: usize, byte| {
            let mut buffers = Buffers::owned(len);
            buffers.as_mut_slice().expect("owned").fill(byte);
            assert!(queue.run(Op::Write { offset, buffers, fua: false }).0.is_ok());
        };
        write(0, 1 << 20, 1);
        dir.snapshot(&volume, "a").expect("snapshot");
        write(65_000, 9_000, 2);
        assert!(queue.run(Op::Discard { offset: 200_704, len: 40_960 }).0.is_ok());
        for (offset, len) in [(0, size), (0, 4096), (64_999, 10_000), (1 << 20, 5000), (size - 701, 701)] {
            let mut runs = Vec::new();
            assert!(queue.runs(offset, len, 100, &mut runs));
            let mut found = Vec::new();
            for run in &runs {
                match run {
                    FileRun::Zeros { len } => found.resize(found.len() + *len as usize, 0),
                    FileRun::File { file, offset, len } => {
                        let mut bytes = vec![0; *len as usize];
                        file.read_exact_at(&mut bytes, *offset).expect("read");
                        found.extend(bytes);
                    }
                }
            }
            let (result, buffers) = queue.run(Op::Read { offset, buffers: Buffers::owned(len as usize) });
            assert!(result.is_ok() && buffers.as_slice() == Some(&found[..]), "{offset} {len}: {runs:?}");
        }
        assert!(!queue.runs(0, size, 3, &mut Vec::new()), "too many");
        assert!(!queue.runs(1, size, 100, &mut Vec::new()), "past the end");
    }
}
