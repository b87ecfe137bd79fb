//! An image's way to a node over a line that breaks: the agent keeps what it has for a while, and the next stream goes on from there.
//!
//! ```text
//! where is it? ──► stream from there ──► answer                 the same command, typed again, begins here, too
//!      ▲                  ╳ the line breaks
//!      └── a pause ◄──────┘            at most TRIES_MAX without a step forward
//! ```
//! Owns: what an upload is known by, when it is tried again, and that what arrived is what is here. Never: what is sent (`image.rs`).

use std::{
    os::unix::fs::{FileExt, MetadataExt},
    sync::Arc,
    time::Duration,
};

use serio_api::v1::{
    GetImageUploadRequest, Image as ApiImage, ImagePart, ImageUpload, ImportImageHeader,
    image_service_client::ImageServiceClient,
};
use tonic::{Code, Status};

use super::image::{Content, Part, progress, stream};
use crate::{
    client::{Client, is_cut},
    error::Failure,
    output,
};

/// Tries, one after the other, of which none has brought it forward.
const TRIES_MAX: u32 = 8;
/// Before the first of them; twice as long before each that follows.
const PAUSE_MS: u64 = 250;
const PAUSE_MS_MAX: u64 = 10_000;

/// What the upload is known by: the same command with the same files gives the same. Empty, so that nobody waits for its other half,
/// if that may be other bytes the next time: an NBD export, standard input.
pub(super) fn id(header: &ImportImageHeader, parts: &[Part]) -> String {
    let mut hash = blake3::Hasher::new();
    for text in [&header.image_id, &header.format, &header.cmdline, &header.expected_blake3] {
        hash.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    }
    for part in parts {
        let Content::File(file) = &part.content else { return String::new() };
        let Some(meta) = file.metadata().ok().filter(|meta| meta.nlink() > 0) else { return String::new() };
        let kind = i64::from(i32::from(part.part));
        for number in [meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec(), kind] {
            hash.update(&number.to_le_bytes());
        }
        for number in [meta.dev(), meta.ino(), meta.len()] {
            hash.update(&number.to_le_bytes());
        }
    }
    hash.finalize().to_hex().chars().take(32).collect()
}

/// How far it is, as a number that grows.
fn bytes_before(place: &ImageUpload, parts: &[Part]) -> u64 {
    let before = parts.iter().take_while(|part| part.part != place.part());
    match place.part() {
        ImagePart::Unspecified => 0,
        _ => before.fold(place.offset, |sum, part| sum.saturating_add(part.bytes)),
    }
}

/// Imports, over as many streams as it takes.
pub(super) async fn upload(
    client: &Client,
    doing: &str,
    header: ImportImageHeader,
    parts: Arc<Vec<Part>>,
) -> Result<ApiImage, Failure> {
    let bytes = parts.iter().map(|p| p.bytes).sum();
    let bar = progress(bytes);
    // Of the same command before; who cannot tell is asked by the import itself what is wrong.
    let mut from = place(client, &header).await.unwrap_or_default();
    let (mut best, mut tries) = (bytes_before(&from, &parts), 0);
    let mut resumed = best > 0;
    if resumed {
        bar.suspend(|| eprintln!("note: goes on at {} of {}", output::size(best), output::size(bytes)));
    }
    let ended = loop {
        let cut = match stream(client, header.clone(), &parts, from, &bar).await {
            Ok(Ok(image)) => break Ok(image),
            Ok(Err(status)) if is_cut(&status) && !header.upload_id.is_empty() => status,
            Ok(Err(status)) => break Err(client.failure(doing, status)),
            Err(failure) => break Err(failure),
        };
        let found = match place_again(client, &header, &mut tries, cut).await {
            Ok(found) => found,
            Err(cut) => {
                bar.suspend(|| {
                    eprintln!("note: the same command goes on where it broke off, for ten minutes")
                });
                break Err(client.failure(doing, cut));
            }
        };
        let reached = bytes_before(&found, &parts);
        bar.suspend(|| eprintln!("note: the line broke: goes on at {}", output::size(reached)));
        if reached > best {
            (best, tries) = (reached, 0);
        }
        (from, resumed) = (found, true);
    };
    bar.finish_and_clear();
    let image = ended?;
    if resumed && header.format == "raw" {
        tokio::task::spawn_blocking(move || compare(&parts, image))
            .await
            .unwrap_or_else(|e| Err(Failure::local("the comparison broke off", e)))
    } else {
        Ok(image)
    }
}

/// After a break: where it is now, once the agent says so; else why the line is still down.
async fn place_again(
    client: &Client,
    header: &ImportImageHeader,
    tries: &mut u32,
    mut cut: Status,
) -> Result<ImageUpload, Status> {
    while *tries < TRIES_MAX {
        let pause = PAUSE_MS.saturating_mul(1 << *tries).min(PAUSE_MS_MAX);
        *tries = tries.saturating_add(1);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        match place(client, header).await {
            Ok(found) => return Ok(found),
            Err(status) if is_cut(&status) => cut = status,
            // An agent that knows of no such thing.
            Err(_) => break,
        }
    }
    Err(cut)
}

/// Up to where an upload has come; the beginning if there is none.
async fn place(client: &Client, header: &ImportImageHeader) -> Result<ImageUpload, Status> {
    if header.upload_id.is_empty() {
        return Ok(ImageUpload::default());
    }
    let request = GetImageUploadRequest { upload_id: header.upload_id.clone() };
    match ImageServiceClient::new(client.channel()).get_image_upload(request).await {
        Ok(answer) => Ok(answer.into_inner()),
        Err(status) if status.code() == Code::NotFound => Ok(ImageUpload::default()),
        Err(status) => Err(status),
    }
}

/// What came by several streams is what is in the file, whatever has happened to that meanwhile.
fn compare(parts: &[Part], image: ApiImage) -> Result<ApiImage, Failure> {
    let disk = parts.iter().find(|part| part.part == ImagePart::Disk);
    let Some(Part { content: Content::File(file), path, .. }) = disk else { return Ok(image) };
    let mut hash = blake3::Hasher::new();
    let (mut piece, mut at) = (vec![0; 1 << 20], 0);
    loop {
        let got =
            file.read_at(&mut piece, at).map_err(|e| Failure::local(format!("cannot read {path}"), e))?;
        if got == 0 {
            break;
        }
        hash.update(piece.get(..got).unwrap_or_default());
        at = at.saturating_add(got as u64);
    }
    let here = hash.finalize().to_hex();
    if here.as_str() == image.blake3 {
        return Ok(image);
    }
    Err(Failure::plain(format!(
        "{path} has changed while it was uploaded: its blake3 is {here}, the image's {}; `serio image delete` it, and import again",
        image.blake3
    )))
}
