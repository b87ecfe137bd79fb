//! The serial console of a VM: attached to (bytes both ways), or its log read. Bounded: a reader that is slow holds up
//! its own stream only.

use std::{
    io::{self, SeekFrom},
    path::PathBuf,
    time::Duration,
};

use bytes::Bytes;
use serio_api::v1::{ConsoleInput, ConsoleOutput};
use serio_types::resource;
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt},
    net::unix::{OwnedReadHalf, OwnedWriteHalf},
    sync::mpsc,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::Context;
use crate::{
    error::{Error, chain},
    state::command::VmView,
};

/// Bytes of one message.
const CHUNK_BYTES: usize = 16 << 10;
/// Messages that wait for a slow reader: few, for many may read.
const CHUNKS_MAX: usize = 1;
/// How often a followed log is looked at; only while somebody follows.
const FOLLOW: Duration = Duration::from_millis(200);
/// The most of what was printed before that an attaching client gets.
const HISTORY_BYTES_MAX: u32 = 1 << 20;

type Output = ReceiverStream<Result<ConsoleOutput, Status>>;
type Sender = mpsc::Sender<Result<ConsoleOutput, Status>>;

fn failed(doing: &'static str, error: &dyn std::error::Error) -> Status {
    Error::Failed { doing, why: chain(error) }.into()
}

/// Attaches a client to a running VM's console.
pub(super) async fn attach(
    context: &Context,
    view: &VmView,
    first: ConsoleInput,
    input: Streaming<ConsoleInput>,
) -> Result<Output, Error> {
    let off = || Error::precondition(resource::vm(&view.name), "does not run: start it, or read its log");
    let handle = context.handles.vm(view.record.uid).ok_or_else(off)?;
    let history = first.history_bytes.min(HISTORY_BYTES_MAX);
    // Connected before the log is read: nothing printed in between is lost (a little may come twice).
    let stream = handle.attach_console().await;
    let stream = stream.map_err(|e| Error::Failed { doing: "attaching to the console", why: chain(&e) })?;
    let (reader, writer) = stream.into_split();
    let (sender, receiver) = mpsc::channel(CHUNKS_MAX);
    let log = handle.log_path();
    tokio::spawn(async move {
        let typed = tokio::spawn(type_in(writer, first.data, input));
        if history > 0 {
            let _ = copy_log(log, u64::from(history), false, &sender).await;
        }
        print_out(reader, sender).await;
        typed.abort();
    });
    Ok(ReceiverStream::new(receiver))
}

/// Guest to client, until the VM ends or the client goes.
async fn print_out(mut reader: OwnedReadHalf, sender: Sender) {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let read = tokio::select! {
            read = reader.read(&mut buffer) => read,
            () = sender.closed() => return,
        };
        let message = match read {
            Ok(0) => return,
            Ok(length) => Ok(ConsoleOutput { data: buffer.get(..length).unwrap_or_default().to_vec() }),
            Err(error) => Err(failed("reading the console", &error)),
        };
        let broken = message.is_err();
        if sender.send(message).await.is_err() || broken {
            return;
        }
    }
}

/// Client to guest, until the client closes its side (its output goes on then).
async fn type_in(
    mut writer: OwnedWriteHalf,
    first: impl Into<Bytes>,
    mut input: Streaming<ConsoleInput>,
) -> io::Result<()> {
    writer.write_all(&first.into()).await?;
    while let Ok(Some(message)) = input.message().await {
        writer.write_all(&message.data).await?;
    }
    // Dropping the half would close it for writing, which a console may take for a hang-up: kept until the end.
    std::future::pending().await
}

/// What was printed, from `tail` bytes before its end (0: from its beginning).
pub(super) fn read_log(path: PathBuf, tail: u64, follow: bool) -> Output {
    let (sender, receiver) = mpsc::channel(CHUNKS_MAX);
    tokio::spawn(async move {
        if let Err(error) = copy_log(path, tail, follow, &sender).await {
            let _ = sender.send(Err(failed("reading the log", &error))).await;
        }
    });
    ReceiverStream::new(receiver)
}

/// Opens the log; a VM that never ran has none, which reads as empty.
async fn open_log(path: &PathBuf, follow: bool, sender: &Sender) -> io::Result<Option<File>> {
    loop {
        match File::open(path).await {
            Ok(file) => return Ok(Some(file)),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Err(_) if !follow => return Ok(None),
            Err(_) => {}
        }
        tokio::select! {
            () = tokio::time::sleep(FOLLOW) => {}
            () = sender.closed() => return Ok(None),
        }
    }
}

async fn copy_log(path: PathBuf, tail: u64, follow: bool, sender: &Sender) -> io::Result<()> {
    let Some(mut file) = open_log(&path, follow, sender).await? else { return Ok(()) };
    let size = file.metadata().await?.len();
    let mut position = if tail == 0 { 0 } else { size.saturating_sub(tail) };
    file.seek(SeekFrom::Start(position)).await?;
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let length = file.read(&mut buffer).await?;
        if length > 0 {
            position = position.saturating_add(u64::try_from(length).unwrap_or(u64::MAX));
            let data = buffer.get(..length).unwrap_or_default().to_vec();
            if sender.send(Ok(ConsoleOutput { data })).await.is_err() {
                return Ok(());
            }
            continue;
        }
        if !follow {
            return Ok(());
        }
        tokio::select! {
            () = tokio::time::sleep(FOLLOW) => {}
            () = sender.closed() => return Ok(()),
        }
        // The log is bounded by starting over: a file that shrank is read from its beginning.
        if file.metadata().await?.len() < position {
            position = 0;
            file.seek(SeekFrom::Start(0)).await?;
        }
    }
}
