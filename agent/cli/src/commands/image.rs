//! `image`: import, list, show, delete.
//!
//! An import is one stream: the header, then chunks of kernel, initrd and disk in order. A blocking thread reads the
//! files and sends at most [`CHUNKS_MAX`] chunks ahead; holes (`SEEK_DATA`) and chunks of zeros of the disk
//! are skipped, which the API reads as zeros; kernel and initrd go whole. A file that fails to read ends the stream early, and the agent then keeps nothing.
//! What breaks off otherwise is gone on with (`upload.rs`).

use std::{
    fs::File,
    io::{self, IsTerminal},
    os::unix::fs::FileExt,
    path::Path,
    sync::{Arc, Mutex},
};

use indicatif::{ProgressBar, ProgressStyle};
use rustix::fs::{SeekFrom, seek};
use serio_api::v1::{
    DeleteImageRequest, GetImageRequest, Image as ApiImage, ImageChunk, ImagePart, ImageUpload,
    ImportImageHeader, ImportImageRequest, ListImagesRequest, image_service_client::ImageServiceClient,
    import_image_request::What,
};
use serio_formats::{Image, is_zero};
use serio_nbd::client::is_uri;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{request_id, source, upload};
use crate::{
    args::{Global, ImageVerb, ImportArgs},
    client::Client,
    error::Failure,
    names, output,
    output::Output,
};

/// The API's limit for one chunk.
const CHUNK_BYTES: usize = 1 << 20;
/// Read ahead of the network.
const CHUNKS_MAX: usize = 4;

pub(super) async fn run(
    client: &Client,
    global: &Global,
    verb: ImageVerb,
    output: Output,
) -> Result<(), Failure> {
    match verb {
        ImageVerb::Import(args) => import(client, global, args, output).await,
        ImageVerb::List => {
            let answer = client
                .call("list the images", ListImagesRequest::default(), |channel, request| async move {
                    ImageServiceClient::new(channel).list_images(request).await
                })
                .await?;
            output.list(&answer.images, &["NAME", "SIZE", "KERNEL", "INITRD", "CREATED"], |image| {
                vec![
                    names::short(&image.name),
                    output::size(image.size_bytes),
                    yes_no(image.has_kernel),
                    yes_no(image.has_initrd),
                    output::time(image.create_time.as_ref()),
                ]
            })
        }
        ImageVerb::Show { name } => {
            let request = GetImageRequest { name: names::image(&name) };
            let image = client
                .call(&format!("show image {name}"), request, |channel, request| async move {
                    ImageServiceClient::new(channel).get_image(request).await
                })
                .await?;
            show(&image, output)
        }
        ImageVerb::Delete { name } => {
            let request = DeleteImageRequest { request_id: request_id(), name: names::image(&name) };
            let answer = client
                .call(&format!("delete image {name}"), request, |channel, request| async move {
                    ImageServiceClient::new(channel).delete_image(request).await
                })
                .await?;
            output.done(&answer, &format!("deleted image {name}"))
        }
    }
}

fn yes_no(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

fn show(image: &ApiImage, output: Output) -> Result<(), Failure> {
    output.one(
        image,
        &[
            ("name", names::short(&image.name)),
            ("uid", image.uid.clone()),
            ("generation", image.generation.to_string()),
            ("created", output::time(image.create_time.as_ref())),
            ("size", output::size(image.size_bytes)),
            ("kernel", yes_no(image.has_kernel)),
            ("initrd", yes_no(image.has_initrd)),
            ("cmdline", image.cmdline.clone()),
            ("blake3", image.blake3.clone()),
        ],
    )
}

/// Where its bytes are.
pub(super) enum Content {
    /// A file, as it is.
    File(File),
    /// The disk, wherever it is.
    Image(Mutex<Box<dyn Image + Send>>),
}

/// What is sent.
pub(super) struct Part {
    pub(super) part: ImagePart,
    pub(super) content: Content,
    pub(super) bytes: u64,
    /// For messages.
    pub(super) path: String,
}

fn open(part: ImagePart, path: &Path) -> Result<Part, Failure> {
    let what = || format!("cannot read {}", path.display());
    let file = File::open(path).map_err(|e| Failure::local(what(), e))?;
    let metadata = file.metadata().map_err(|e| Failure::local(what(), e))?;
    if !metadata.is_file() {
        return Err(Failure::plain(format!("{}: it is not a regular file", what())));
    }
    if metadata.len() == 0 {
        return Err(Failure::plain(format!("{}: it is empty", what())));
    }
    let content = Content::File(file);
    Ok(Part { part, content, bytes: metadata.len(), path: path.display().to_string() })
}

/// The disk: a file goes as it is, whatever its format; an NBD export goes as the disk that it is.
async fn open_disk(name: &str, format: &str, global: &Global) -> Result<Part, Failure> {
    if name == "-" {
        let file = source::spool()?;
        let bytes = file.metadata().map_err(|e| Failure::local("cannot keep standard input", e))?.len();
        if bytes == 0 {
            return Err(Failure::plain("standard input is empty"));
        }
        let path = "standard input".to_owned();
        return Ok(Part { part: ImagePart::Disk, content: Content::File(file), bytes, path });
    }
    if !is_uri(name) {
        return open(ImagePart::Disk, Path::new(name));
    }
    let image = source::open(name, format, &[], global).await?;
    let (bytes, path) = (image.size_bytes(), name.to_owned());
    Ok(Part { part: ImagePart::Disk, content: Content::Image(Mutex::new(image)), bytes, path })
}

async fn import(client: &Client, global: &Global, args: ImportArgs, output: Output) -> Result<(), Failure> {
    let kernel = args.kernel.as_deref().map(|path| open(ImagePart::Kernel, path)).transpose()?;
    let initrd = args.initrd.as_deref().map(|path| open(ImagePart::Initrd, path)).transpose()?;
    // One of them is there: the arguments say so.
    let disk = args.source.or(args.disk).unwrap_or_default();
    let disk = open_disk(&disk, &args.format, global).await?;
    let mut header = ImportImageHeader {
        request_id: request_id(),
        image_id: args.name.to_string(),
        format: args.format,
        cmdline: args.cmdline,
        disk_bytes: disk.bytes,
        kernel_bytes: kernel.as_ref().map_or(0, |p| p.bytes),
        initrd_bytes: initrd.as_ref().map_or(0, |p| p.bytes),
        expected_blake3: args.blake3,
        upload_id: String::new(),
    };
    // In the order that the API wants.
    let parts: Vec<Part> = kernel.into_iter().chain(initrd).chain([disk]).collect();
    header.upload_id = upload::id(&header, &parts);
    let image =
        upload::upload(client, &format!("import image {}", args.name), header, Arc::new(parts)).await?;
    let size = output::size(image.size_bytes);
    output.done(&image, &format!("imported image {}: {size}, blake3 {}", args.name, image.blake3))
}

/// One stream of an import, from a place on: what the agent says to it, or why it could not be read what is to be sent.
pub(super) async fn stream(
    client: &Client,
    header: ImportImageHeader,
    parts: &Arc<Vec<Part>>,
    from: ImageUpload,
    progress: &ProgressBar,
) -> Result<Result<ApiImage, tonic::Status>, Failure> {
    let (sender, receiver) = mpsc::channel(CHUNKS_MAX);
    let (progress, parts) = (progress.clone(), Arc::clone(parts));
    let reader = tokio::task::spawn_blocking(move || send(&parts, header, &from, &sender, &progress));
    let answer = ImageServiceClient::new(client.channel()).import_image(ReceiverStream::new(receiver)).await;
    // Ends by itself: the receiver is gone by now. Our own trouble explains what the agent then says of a short stream.
    reader.await.unwrap_or_else(|e| Err(Failure::local("the reading broke off", e)))?;
    Ok(answer.map(tonic::Response::into_inner))
}

/// A bar on a terminal, else nothing.
pub(super) fn progress(bytes: u64) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}");
    ProgressBar::new(bytes).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Sends the header, and the parts from a place on. `Ok` also when the agent hung up: its answer says why.
fn send(
    parts: &[Part],
    header: ImportImageHeader,
    from: &ImageUpload,
    sender: &mpsc::Sender<ImportImageRequest>,
    progress: &ProgressBar,
) -> Result<(), Failure> {
    let message = |what| ImportImageRequest { what: Some(what) };
    if sender.blocking_send(message(What::Header(header))).is_err() {
        return Ok(());
    }
    let mut sent_before = 0;
    // Those before the place are there whole.
    let first = parts.iter().position(|part| part.part == from.part()).unwrap_or_default();
    for (index, part) in parts.iter().enumerate() {
        let mut offset = if index == first { from.offset } else { 0 };
        if index < first {
            sent_before += part.bytes;
            continue;
        }
        let file = match &part.content {
            Content::File(file) => file,
            Content::Image(image) => {
                if !send_image(image, part, offset, sender, progress)? {
                    return Ok(());
                }
                continue;
            }
        };
        let read = |e: io::Error| Failure::local(format!("cannot read {}", part.path), e);
        let sparse = part.part == ImagePart::Disk;
        while let Some((start, end)) = next_data(file, offset, part.bytes, sparse).map_err(read)? {
            offset = end.min(start.saturating_add(CHUNK_BYTES as u64));
            let mut data = vec![0; usize::try_from(offset.saturating_sub(start)).unwrap_or(CHUNK_BYTES)];
            file.read_exact_at(&mut data, start).map_err(read)?;
            progress.set_position(sent_before + offset);
            if sparse && data.iter().all(|byte| *byte == 0) {
                continue;
            }
            let chunk = ImageChunk { part: part.part.into(), offset: start, data };
            if sender.blocking_send(message(What::Chunk(chunk))).is_err() {
                return Ok(());
            }
        }
        sent_before += part.bytes;
        progress.set_position(sent_before);
    }
    Ok(())
}

/// Sends the disk of an image from `at` on; false: the agent hung up.
fn send_image(
    image: &Mutex<Box<dyn Image + Send>>,
    part: &Part,
    mut at: u64,
    sender: &mpsc::Sender<ImportImageRequest>,
    progress: &ProgressBar,
) -> Result<bool, Failure> {
    let mut image = image.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let read = |e| Failure::local(format!("cannot read {}", part.path), e);
    while at < part.bytes {
        let run = image.run(at).map_err(read)?;
        let left = run.len.min(part.bytes - at);
        let len = if run.zero { left } else { left.min(CHUNK_BYTES as u64) };
        if !run.zero {
            let mut data = vec![0; usize::try_from(len).unwrap_or(CHUNK_BYTES)];
            image.read(at, &mut data).map_err(read)?;
            let chunk = ImageChunk { part: part.part.into(), offset: at, data };
            let whole = is_zero(&chunk.data);
            let message = ImportImageRequest { what: Some(What::Chunk(chunk)) };
            if !whole && sender.blocking_send(message).is_err() {
                return Ok(false);
            }
        }
        at = at.saturating_add(len);
        progress.set_position(at);
    }
    Ok(true)
}

/// The next stretch of data at or after `from`; `None` if only holes follow. A file system without `SEEK_DATA` has no holes,
/// nor has a file that is not sent as sparse.
fn next_data(file: &File, from: u64, end: u64, sparse: bool) -> io::Result<Option<(u64, u64)>> {
    if from >= end {
        return Ok(None);
    }
    if !sparse {
        return Ok(Some((from, end)));
    }
    let start = match seek(file, SeekFrom::Data(from)) {
        Ok(start) => start,
        Err(rustix::io::Errno::NXIO) => return Ok(None),
        Err(rustix::io::Errno::INVAL) => return Ok(Some((from, end))),
        Err(error) => return Err(error.into()),
    };
    if start >= end {
        return Ok(None);
    }
    let hole = seek(file, SeekFrom::Hole(start))?;
    Ok(Some((start, hole.min(end))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_and_zeros_are_not_sent() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let file = path.reopen().unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(&vec![0; 3 << 20], 8 << 20).unwrap();
        file.write_all_at(b"end", (64 << 20) - 3).unwrap();
        let part = open(ImagePart::Disk, path.path()).unwrap();
        let (sender, mut receiver) = mpsc::channel(1000);
        send(&[part], ImportImageHeader::default(), &ImageUpload::default(), &sender, &ProgressBar::hidden())
            .unwrap();
        drop(sender);
        let mut whole = vec![0; 64 << 20];
        let mut sent = 0;
        while let Some(message) = receiver.blocking_recv() {
            if let Some(What::Chunk(chunk)) = message.what {
                let at = usize::try_from(chunk.offset).unwrap();
                whole[at..at + chunk.data.len()].copy_from_slice(&chunk.data);
                sent += chunk.data.len();
                assert!(chunk.data.len() <= CHUNK_BYTES);
            }
        }
        assert_eq!(whole, std::fs::read(path.path()).unwrap());
        assert!(sent <= 2 << 20, "{sent} bytes sent of a sparse file");
    }
}
