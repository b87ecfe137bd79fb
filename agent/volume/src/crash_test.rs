//! A simulated disk file that can lose power, and the tests that make it do so.

use std::{
    io,
    sync::{Arc, Mutex},
};

/// A file: what is durable, what is written since.
#[derive(Debug, Default)]
pub(crate) struct SimFile {
    inner: Mutex<SimInner>,
}

#[derive(Debug, Default)]
struct SimInner {
    now: Vec<u8>,
}

impl SimFile {
    pub(crate) fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let inner = self.inner.lock().expect("lock");
        let at = offset as usize;
        bytes.copy_from_slice(inner.now.get(at..at + bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
    pub(crate) fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut inner = self.inner.lock().expect("lock");
        let at = offset as usize;
        inner.now[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
    pub(crate) fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }
    pub(crate) fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.lock().expect("lock").now.resize(len as usize, 0);
        Ok(())
    }
    pub(crate) fn len(&self) -> u64 {
        self.inner.lock().expect("lock").now.len() as u64
    }
    pub(crate) fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_all_at(&vec![0; len as usize], offset)
    }
}
#[allow(dead_code)]
type A = Arc<SimFile>;
