//! Uploads whose streams break off.

use super::*;

fn header(id: &str) -> ImportImageHeader {
    ImportImageHeader { upload_id: id.to_owned(), image_id: "i".to_owned(), ..Default::default() }
}

fn chunk(part: ImagePart, offset: u64, data: &[u8]) -> ImageChunk {
    ImageChunk { part: part.into(), offset, data: data.to_vec() }
}

fn disk(offset: u64, data: &[u8]) -> ImageChunk {
    chunk(ImagePart::Disk, offset, data)
}

/// A stream of chunks, which then breaks off or ends.
fn line(chunks: Vec<ImageChunk>, breaks: bool) -> Line {
    let cut = breaks.then(|| Err(Cut::of(&Status::unknown("h2"))));
    Box::pin(tokio_stream::iter(chunks.into_iter().map(Ok).chain(cut)))
}

/// An import that only notes what comes: (part, offset, bytes), and its failure.
async fn note(mut chunks: Chunks, into: Arc<Mutex<Vec<ImageChunk>>>) -> Result<ImageRecord, Error> {
    while let Some(chunk) = chunks.next().await {
        lock(&into).push(chunk?);
    }
    Err(Error::not_found("whole"))
}

fn is_whole(result: Result<ImageRecord, Error>) -> bool {
    matches!(result, Err(Error::NotFound { resource, .. }) if resource == "whole")
}

type Importing = tokio::task::JoinHandle<Result<ImageRecord, Error>>;

fn begin(
    uploads: &Uploads,
    header: ImportImageHeader,
    line: Line,
) -> (Importing, Arc<Mutex<Vec<ImageChunk>>>) {
    let Ok(Taken::Begun(upload)) = uploads.take(header, line) else { panic!("it does not begin") };
    let noted = Arc::new(Mutex::new(Vec::new()));
    let into = Arc::clone(&noted);
    (tokio::spawn(upload.run(move |chunks| note(chunks, into))), noted)
}

fn join(uploads: &Uploads, header: ImportImageHeader, line: Line) -> Joined {
    let Ok(Taken::Joined(joined)) = uploads.take(header, line) else { panic!("it does not go on") };
    joined
}

/// Until the upload has come to a place.
async fn until(uploads: &Uploads, id: &str, place: Place) {
    while uploads.place(id) != Some(place) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn another_stream_goes_on_and_what_comes_twice_counts_once() {
    let uploads = Uploads::default();
    let first = vec![chunk(ImagePart::Kernel, 0, b"kern"), disk(0, b"ab"), disk(10, b"cd")];
    let (whole, noted) = begin(&uploads, header("u"), line(first.clone(), true));
    until(&uploads, "u", (ImagePart::Disk.into(), 12)).await;
    let other = ImportImageHeader { disk_bytes: 7, ..header("u") };
    assert!(matches!(uploads.take(other, line(vec![], false)), Err(Error::Invalid(_))));
    // It begins where it likes: with what is there, a part of it, and what is new.
    let again = vec![chunk(ImagePart::Kernel, 0, b"kern"), disk(10, b"cd"), disk(11, b"def"), disk(20, b"g")];
    let same = ImportImageHeader { request_id: "another".to_owned(), ..header("u") };
    let joined = join(&uploads, same, line(again, false));
    assert!(is_whole(whole.await.unwrap()) && is_whole(joined.record().await));
    let expected = [first, vec![disk(12, b"ef"), disk(20, b"g")]].concat();
    assert_eq!(*lock(&noted), expected);
    assert_eq!(uploads.place("u"), None, "it has ended");
}

#[tokio::test]
async fn a_newer_stream_counts_though_the_older_is_silent_only() {
    let uploads = Uploads::default();
    let silent: Line =
        Box::pin(line(vec![disk(0, b"ab")], false).chain(tokio_stream::pending::<Result<ImageChunk, Cut>>()));
    let (whole, noted) = begin(&uploads, header("u"), silent);
    until(&uploads, "u", (ImagePart::Disk.into(), 2)).await;
    let joined = join(&uploads, header("u"), line(vec![disk(2, b"c")], false));
    assert!(is_whole(whole.await.unwrap()) && is_whole(joined.record().await));
    assert_eq!(*lock(&noted), [disk(0, b"ab"), disk(2, b"c")]);
}

#[tokio::test]
async fn an_upload_that_nobody_goes_on_with_ends() {
    let uploads = Uploads { wait: Duration::from_millis(50), ..Uploads::default() };
    let since = std::time::Instant::now();
    let (whole, _) = begin(&uploads, header("u"), line(vec![disk(0, b"ab")], true));
    assert!(matches!(whole.await.unwrap(), Err(Error::Invalid(_))));
    assert!(since.elapsed() >= uploads.wait);
    assert_eq!(uploads.place("u"), None);
}

#[tokio::test]
async fn what_cannot_be_gone_on_with_ends_with_its_stream() {
    // For ten minutes others would wait.
    let uploads = Uploads::default();
    let (whole, _) = begin(&uploads, header(""), line(vec![disk(0, b"ab")], true));
    assert!(whole.await.unwrap().is_err());
    let silent = || -> Line { Box::pin(tokio_stream::pending()) };
    let waiting: Vec<_> =
        (0..UPLOADS_MAX).map(|i| begin(&uploads, header(&format!("u{i}")), silent())).collect();
    let (whole, _) = begin(&uploads, header("more"), line(vec![], true));
    assert!(whole.await.unwrap().is_err());
    for (whole, _) in waiting {
        whole.abort();
        assert!(whole.await.unwrap_err().is_cancelled());
    }
    assert!(lock(&uploads.entries).is_empty());
    // Nor what a client does wrong.
    assert!(uploads.take(header("a b"), silent()).is_err());
    let wrong: Line = Box::pin(tokio_stream::iter([Err(Cut::Client(Error::invalid("what", "x")))]));
    let (whole, _) = begin(&uploads, header("u"), wrong);
    assert!(whole.await.unwrap().is_err());
    assert_eq!(uploads.place("u"), None);
}

#[tokio::test]
async fn who_begins_anew_does_not_wait_for_what_broke_off() {
    let uploads = Uploads::default();
    let (old, _) = begin(&uploads, header("old"), line(vec![disk(0, b"ab")], true));
    while !lock(&uploads.entries).get("old").is_some_and(|entry| lock(&entry.reached).waits) {
        tokio::task::yield_now().await;
    }
    let (new, noted) = begin(&uploads, header("new"), line(vec![disk(0, b"xy")], false));
    assert!(is_whole(new.await.unwrap()));
    assert!(old.is_finished(), "the old one ends first");
    assert!(matches!(old.await.unwrap(), Err(Error::Invalid(_))));
    assert_eq!(*lock(&noted), [disk(0, b"xy")]);
}
