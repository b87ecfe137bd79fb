//! The parts of an archive: files with holes, and disks over NBD. All of it waits: it is for a thread of its own.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::Path,
};

use rustix::fs::{SeekFrom, seek};
use serio_archive::{RECORD_BYTES_MAX, Reader, Writer};
use serio_nbd::{
    client::{Address, Client, ClientError, Op, Options, Ticket, Uri},
    wire::STATE_ZERO,
};

use super::{host, refused};
use crate::error::{Error, chain};

/// Read of a disk at once: several pieces are under way then.
const WINDOW_BYTES: u64 = 8 << 20;
/// Writes to a disk that are under way.
const WRITES_MAX: usize = 8;

const READING: &str = "reading the snapshot";
const WRITING: &str = "writing the snapshot";

fn nbd(doing: &'static str) -> impl Fn(ClientError) -> Error {
    move |error| match &error {
        ClientError::Server { value, .. } if *value == serio_nbd::wire::errno::ENOSPC => {
            Error::Full { doing, why: "free some space on the disk of state_dir".to_owned() }
        }
        // Of what the archive says, not of the host.
        ClientError::Range { .. } => Error::invalid("data", chain(&error)),
        _ => Error::Failed { doing, why: chain(&error) },
    }
}

/// Connects to an export of this node.
pub(super) fn connect(socket: &Path, export: &str) -> Result<Client, Error> {
    let address = Address::Unix(socket.to_owned());
    let uri = Uri { address, export: export.to_owned(), tls: false, parameters: Vec::new() };
    Client::connect(Options::new(&uri)).map_err(nbd("connecting to the volume"))
}

/// Writes a part from a file, without its holes.
pub(super) fn write_file<W: Write>(writer: &mut Writer<W>, file: &File, bytes: u64) -> Result<(), Error> {
    let read = |e: io::Error| host(READING, &e);
    let mut data = vec![0; RECORD_BYTES_MAX];
    let mut at = 0;
    while let Some((from, to)) = next_data(file, at, bytes).map_err(read)? {
        at = from;
        while at < to {
            let len =
                usize::try_from(to.saturating_sub(at)).unwrap_or(RECORD_BYTES_MAX).min(RECORD_BYTES_MAX);
            let piece = data.get_mut(..len).unwrap_or_default();
            file.read_exact_at(piece, at).map_err(read)?;
            put(writer, at, piece)?;
            at = at.saturating_add(len as u64);
        }
    }
    writer.end_part(bytes).map_err(|_| Error::Ending)
}

/// What is not zero of a piece. An archive that nobody takes any more ends its writing.
fn put<W: Write>(writer: &mut Writer<W>, at: u64, piece: &[u8]) -> Result<(), Error> {
    if piece.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    writer.data(at, piece).map_err(|_| Error::Ending)
}

/// The next range of `at..end` with data.
fn next_data(file: &File, at: u64, end: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= end {
        return Ok(None);
    }
    let from = match seek(file, SeekFrom::Data(at)) {
        Ok(from) => from,
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        Err(rustix::io::Errno::INVAL) => return Ok(Some((at, end))),
        Err(error) => return Err(error.into()),
    };
    if from >= end {
        return Ok(None);
    }
    let to = seek(file, SeekFrom::Hole(from))?.min(end);
    Ok(Some((from, to)))
}

/// Writes a part from a disk, without what is known to be zero.
pub(super) fn write_disk<W: Write>(writer: &mut Writer<W>, disk: &Client, bytes: u64) -> Result<(), Error> {
    let context = disk.context("base:allocation");
    let mut data = Vec::new();
    let mut at = 0;
    while at < bytes {
        let left = bytes.saturating_sub(at);
        let runs = match context {
            Some(context) => disk.status(context, at, left).map_err(nbd(READING))?,
            None => Vec::new(),
        };
        let known = runs.iter().map(|run| (run.len.min(left), run.flags & u64::from(STATE_ZERO) != 0));
        let known: Vec<(u64, bool)> = if runs.is_empty() { vec![(left, false)] } else { known.collect() };
        for (len, zero) in known {
            let end = at.saturating_add(len).min(bytes);
            while at < end && !zero {
                let window = end.saturating_sub(at).min(WINDOW_BYTES);
                data.resize(usize::try_from(window).unwrap_or_default(), 0);
                disk.read(at, &mut data).map_err(nbd(READING))?;
                for piece in data.chunks(RECORD_BYTES_MAX) {
                    put(writer, at, piece)?;
                    at = at.saturating_add(piece.len() as u64);
                }
            }
            at = end;
        }
    }
    writer.end_part(bytes).map_err(|_| Error::Ending)
}

/// Reads a part into an empty file, which has so many bytes then.
pub(super) fn read_file<R: Read>(reader: &mut Reader<R>, file: &File, bytes: u64) -> Result<(), Error> {
    let write = |e: io::Error| host(WRITING, &e);
    reader.begin_part(bytes);
    let mut data = Vec::new();
    while let Some(offset) = reader.next(&mut data).map_err(|e| refused(&e))? {
        file.write_all_at(&data, offset).map_err(write)?;
    }
    file.set_len(bytes).map_err(write)
}

/// Reads a part into an empty disk of that size; it is durable there afterwards.
pub(super) fn read_disk<R: Read>(reader: &mut Reader<R>, disk: &Client, bytes: u64) -> Result<(), Error> {
    reader.begin_part(bytes);
    let mut under_way = VecDeque::<Ticket>::new();
    let mut data = Vec::new();
    let piece = usize::try_from(disk.piece_bytes()).unwrap_or(RECORD_BYTES_MAX).max(1);
    while let Some(offset) = reader.next(&mut data).map_err(|e| refused(&e))? {
        let mut at = offset;
        for part in data.chunks(piece) {
            if under_way.len() >= WRITES_MAX
                && let Some(ticket) = under_way.pop_front()
            {
                drop(ticket.wait().map_err(nbd(WRITING))?);
            }
            let write = Op::Write { offset: at, data: part.to_vec().into() };
            under_way.push_back(disk.submit(write).map_err(nbd(WRITING))?);
            at = at.saturating_add(part.len() as u64);
        }
    }
    for ticket in under_way {
        drop(ticket.wait().map_err(nbd(WRITING))?);
    }
    disk.flush().map_err(nbd(WRITING))
}
