//! A simulated disk that loses power.
//!
//! The engine runs unchanged on [`SimFile`]s. Every write, truncation and sync is a step of the world; at a chosen
//! step the power goes: that step and all later ones fail. Then, for each write that no sync has covered, a
//! seeded coin decides whether the disk has it, has it not, or has some of its 512-byte sectors.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, Ordering},
    },
};

use rand::{Rng, rngs::StdRng};

use crate::media::Media;

const SECTOR: usize = 512;

/// Steps until the power goes.
#[derive(Debug)]
pub(crate) struct Power(AtomicI64);

impl Power {
    pub(crate) fn endless() -> Arc<Power> {
        Arc::new(Power(AtomicI64::new(i64::MAX)))
    }

    pub(crate) fn set(&self, steps: i64) {
        self.0.store(steps, Ordering::SeqCst);
    }

    fn step(&self) -> io::Result<()> {
        match self.0.fetch_sub(1, Ordering::SeqCst) {
            left if left > 0 => Ok(()),
            _ => Err(io::Error::from_raw_os_error(libc::EIO)),
        }
    }
}

/// A file on the simulated disk.
#[derive(Debug)]
pub(crate) struct SimFile {
    power: Arc<Power>,
    inner: Mutex<SimInner>,
}

#[derive(Debug, Default, Clone)]
struct SimInner {
    now: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<Pending>,
}

#[derive(Debug, Clone)]
enum Pending {
    Write(usize, Vec<u8>),
    Len(usize),
}

impl SimFile {
    pub(crate) fn media(power: &Arc<Power>) -> Media {
        Media::Sim(Arc::new(SimFile { power: Arc::clone(power), inner: Mutex::default() }))
    }

    pub(crate) fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let inner = self.inner.lock().expect("lock");
        let at = offset as usize;
        bytes.copy_from_slice(inner.now.get(at..at + bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    pub(crate) fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut inner = self.inner.lock().expect("lock");
        // Into the list before the step: a write that the power cut hits may be there in part.
        inner.pending.push(Pending::Write(offset as usize, bytes.to_vec()));
        self.power.step()?;
        inner.now[offset as usize..offset as usize + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    pub(crate) fn sync_data(&self) -> io::Result<()> {
        self.power.step()?;
        let mut inner = self.inner.lock().expect("lock");
        inner.durable = inner.now.clone();
        inner.pending.clear();
        Ok(())
    }

    pub(crate) fn set_len(&self, len: u64) -> io::Result<()> {
        let mut inner = self.inner.lock().expect("lock");
        inner.pending.push(Pending::Len(len as usize));
        self.power.step()?;
        inner.now.resize(len as usize, 0);
        Ok(())
    }

    pub(crate) fn len(&self) -> u64 {
        self.inner.lock().expect("lock").now.len() as u64
    }

    pub(crate) fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        // Like a punched hole, it never makes the file longer.
        let len = len.min(self.len().saturating_sub(offset));
        self.write_all_at(&vec![0; len as usize], offset)
    }

    /// What the disk has after the power came back.
    fn after_crash(&self, rng: &mut StdRng, power: &Arc<Power>) -> Media {
        let inner = self.inner.lock().expect("lock");
        let mut disk = inner.durable.clone();
        for pending in &inner.pending {
            match (pending, rng.random_range(0..3)) {
                (_, 0) => {}
                (Pending::Len(len), _) => disk.resize(*len, 0),
                (Pending::Write(at, bytes), luck) => {
                    for (i, sector) in bytes.chunks(SECTOR).enumerate() {
                        let at = at + i * SECTOR;
                        if (luck == 1 || rng.random()) && at + sector.len() <= disk.len() {
                            disk[at..at + sector.len()].copy_from_slice(sector);
                        }
                    }
                }
            }
        }
        let inner = SimInner { now: disk.clone(), durable: disk, pending: Vec::new() };
        Media::Sim(Arc::new(SimFile { power: Arc::clone(power), inner: Mutex::new(inner) }))
    }
}

/// What is left of a file.
pub(crate) fn crash(media: &Media, rng: &mut StdRng, power: &Arc<Power>) -> Media {
    match media {
        Media::Sim(sim) => sim.after_crash(rng, power),
        Media::File(_) => unreachable!("the simulation has no real files"),
    }
}
