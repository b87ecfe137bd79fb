//! The disk of an image on its way in. Raw disks go straight through a pipe into a job of `serio-volumed`; other formats,
//! whose tables may lie anywhere, are first put into a file beside (`upload`), which the job then reads.
//!
//! Owns: the order of chunks, and the staging file. Never: what a format's bytes mean.

use std::{io::SeekFrom, path::PathBuf};

use bytes::Bytes;
use serio_types::VolumeSize;
use tokio::{
    fs::{self, File},
    io::{AsyncSeekExt, AsyncWriteExt},
    sync::mpsc,
    task::JoinHandle,
};

use super::{Context, convert::Fields, image::host};
use crate::{
    error::{Error, chain},
    supervise::{ImportedImage, JobError},
};

/// Chunks that wait for the disk; then the client waits.
const CHUNKS_MAX: usize = 4;
const DOING: &str = "importing the disk";

/// What a client says of a disk before it comes.
#[derive(Debug, Clone)]
pub(super) struct DiskHeader {
    /// `raw`, `qcow2`, `vmdk`.
    pub(super) format: String,
    /// Bytes of the file.
    pub(super) bytes: u64,
    /// The blake3 that the disk must have, in hexadecimal digits; any if empty.
    pub(super) blake3: String,
}

impl DiskHeader {
    /// Collects what is wrong. `bytes_field`: the name of the field that has the length.
    pub(super) fn check(&self, fields: &mut Fields, bytes_field: &'static str) {
        if !["raw", "qcow2", "vmdk"].contains(&self.format.as_str()) {
            let short: String = self.format.chars().take(40).collect();
            fields
                .wrong("format", format!("`{}` is not known: raw, qcow2 and vmdk are", short.escape_debug()));
        }
        if self.bytes > 0 {
            fields.take(bytes_field, VolumeSize::holding(self.bytes));
        }
        let digits = self.blake3.bytes().all(|b| b.is_ascii_hexdigit());
        if !self.blake3.is_empty() && (self.blake3.len() != 64 || !digits) {
            fields.wrong("expected_blake3", "is not 64 hexadecimal digits".to_owned());
        }
    }
}

enum Way {
    Stream { sender: mpsc::Sender<(u64, Bytes)>, job: JoinHandle<Result<ImportedImage, JobError>> },
    Staged { file: File, path: PathBuf, received: u64 },
}

/// A disk on its way in.
pub(super) struct Disk {
    context: Context,
    header: DiskHeader,
    dest: PathBuf,
    way: Way,
}

impl Disk {
    /// Begins; the disk will be `disk.raw` in `dir`.
    pub(super) async fn start(
        context: &Context,
        dir: &std::path::Path,
        header: &DiskHeader,
    ) -> Result<Disk, Error> {
        let dest = dir.join("disk.raw");
        let way = if header.format == "raw" {
            let (sender, receiver) = mpsc::channel(CHUNKS_MAX);
            let (supervisor, to, bytes) = (context.supervisor.clone(), dest.clone(), header.bytes);
            let job = tokio::spawn(async move { supervisor.import_image(&to, "raw", bytes, receiver).await });
            Way::Stream { sender, job }
        } else {
            let path = dir.join("upload");
            let file = File::create_new(&path).await.map_err(|e| host(&path, &e))?;
            Way::Staged { file, path, received: 0 }
        };
        Ok(Disk { context: context.clone(), header: header.clone(), dest, way })
    }

    /// Takes a chunk; false: the job wants no more, and [`Disk::finish`] says why.
    pub(super) async fn write(&mut self, offset: u64, data: Vec<u8>) -> Result<bool, Error> {
        match &mut self.way {
            Way::Stream { sender, .. } => Ok(sender.send((offset, Bytes::from(data))).await.is_ok()),
            Way::Staged { file, path, received } => {
                let end = offset.checked_add(data.len() as u64).filter(|end| *end <= self.header.bytes);
                let Some(end) = end.filter(|_| offset >= *received) else {
                    let problem = format!(
                        "{} bytes at {offset}, but the next could lie between {received} and {}",
                        data.len(),
                        self.header.bytes
                    );
                    return Err(Error::invalid("chunk", problem));
                };
                let written = async {
                    file.seek(SeekFrom::Start(offset)).await?;
                    file.write_all(&data).await
                };
                written.await.map_err(|e| host(path, &e))?;
                *received = end;
                Ok(true)
            }
        }
    }

    /// A clean end: what was not sent at the end is a hole, too.
    pub(super) async fn end(&mut self) -> Result<(), Error> {
        match &mut self.way {
            Way::Stream { sender, .. } => {
                sender.send((self.header.bytes, Bytes::new())).await.ok();
            }
            Way::Staged { file, path, .. } => {
                let ended = async {
                    file.shutdown().await?;
                    file.set_len(self.header.bytes).await
                };
                ended.await.map_err(|e| host(path, &e))?;
            }
        }
        Ok(())
    }

    /// Waits for the disk to be whole and synced, and compares its checksum.
    pub(super) async fn finish(self) -> Result<ImportedImage, Error> {
        let image = match self.way {
            Way::Stream { sender, job } => {
                drop(sender);
                match job.await {
                    Ok(result) => result,
                    Err(error) => return Err(Error::Failed { doing: DOING, why: chain(&error) }),
                }
            }
            Way::Staged { file, path, .. } => {
                drop(file);
                let format = &self.header.format;
                let result = self.context.supervisor.convert_image(&self.dest, format, &path).await;
                // The state removes the folder of an import that fails; of one that does not, only this is too much.
                fs::remove_file(&path).await.map_err(|e| host(&path, &e))?;
                result
            }
        };
        let image = image.map_err(|e| Error::from_job(DOING, &e))?;
        let wanted = &self.header.blake3;
        if !wanted.is_empty() && !wanted.eq_ignore_ascii_case(&image.blake3) {
            let problem = format!("the disk's blake3 is {}: it is not the one that was meant", image.blake3);
            return Err(Error::invalid("expected_blake3", problem));
        }
        Ok(image)
    }

    /// The chunks broke off: waits for the job to have removed its file.
    pub(super) async fn abandon(self) {
        if let Way::Stream { sender, job } = self.way {
            drop(sender);
            job.await.ok();
        }
    }
}
