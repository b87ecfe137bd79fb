//! `vm snapshot export` and `import`: a VM with its memory and its disks, as one stream between a node and a file.
//!
//! The archive's bytes are the node's (agent/archive has them): here they only go by. An export becomes a file only when its
//! stream has ended well; an import that ends before its file leaves nothing on the node, which sees the stream break off.

use std::{
    fs::File,
    io::{self, IsTerminal, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use indicatif::ProgressBar;
use serio_api::v1::{
    ExportVmSnapshotRequest, ImportVmSnapshotRequest, ImportVmSnapshotTarget, VmArchivePiece, VmSnapshot,
    import_vm_snapshot_request::What, vm_service_client::VmServiceClient,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{image::progress, request_id};
use crate::{
    args::{ExportSnapshotArgs, ImportSnapshotArgs, VmSnapshotVerb},
    client::Client,
    error::Failure,
    names,
    output::{self, Output},
};

/// The API's limit for one piece.
const PIECE_BYTES: usize = 1 << 20;
/// Read ahead of the network, or of the disk.
const PIECES_MAX: usize = 4;

pub(super) async fn run(client: &Client, verb: VmSnapshotVerb, output: Output) -> Result<(), Failure> {
    match verb {
        VmSnapshotVerb::Export(args) => export(client, args, output).await,
        VmSnapshotVerb::Import(args) => import(client, args, output).await,
    }
}

/// Where an archive goes.
enum Sink {
    Stdout,
    File(File),
}

impl Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Stdout => io::stdout().write_all(bytes),
            Self::File(file) => file.write_all(bytes),
        }
    }

    #[allow(clippy::disallowed_methods, reason = "a pipe is not synced, but its buffer must go out")]
    fn finish(self) -> io::Result<()> {
        match self {
            Self::Stdout => io::stdout().flush(),
            // A file is whole once it survives a power cut.
            Self::File(file) => file.sync_all(),
        }
    }
}

/// It holds a guest's memory: nobody else may read it.
fn create(path: &Path) -> Result<Sink, Failure> {
    if path.as_os_str() == "-" {
        if io::stdout().is_terminal() {
            return Err(Failure::Usage("standard output is a terminal: a VM is not for reading".to_owned()));
        }
        return Ok(Sink::Stdout);
    }
    let mut options = File::options();
    let file = options.write(true).create_new(true).mode(0o600).open(path);
    Ok(Sink::File(file.map_err(|e| Failure::local(format!("cannot create {}", path.display()), e))?))
}

async fn export(client: &Client, args: ExportSnapshotArgs, output: Output) -> Result<(), Failure> {
    let ExportSnapshotArgs { snapshot, file } = args;
    let doing = format!("export vm snapshot {snapshot}");
    let name = names::vm_snapshot(&snapshot.volume, &snapshot.snapshot);
    // Before the node opens all of it; and by its own handle, so that what is there is not touched.
    let sink = create(&file)?;
    let stdout = matches!(sink, Sink::Stdout);
    let received = tokio::select! {
        received = receive(client, &doing, name.clone(), sink, &file) => received,
        _ = tokio::signal::ctrl_c() => Err(Failure::plain("interrupted")),
    };
    if received.is_err() && !stdout {
        // It is no archive, and nobody shall take it for one.
        let _ = std::fs::remove_file(&file);
    }
    let bytes = received?;
    let sentence = format!("exported vm snapshot {snapshot}: {}; it is not encrypted", output::size(bytes));
    if stdout {
        eprintln!("{sentence}");
        return Ok(());
    }
    output.done(&VmSnapshot { name, ..VmSnapshot::default() }, &sentence)
}

/// All of it into the sink; gives back how much that was.
async fn receive(
    client: &Client,
    doing: &str,
    name: String,
    mut sink: Sink,
    path: &Path,
) -> Result<u64, Failure> {
    let failed = |status| client.failure(doing, status);
    let mut service = VmServiceClient::new(client.channel());
    let mut pieces: Streaming<VmArchivePiece> =
        service.export_vm_snapshot(ExportVmSnapshotRequest { name }).await.map_err(failed)?.into_inner();
    let bar = progress(0);
    let (sender, mut receiver) = mpsc::channel::<Vec<u8>>(PIECES_MAX);
    let writing = tokio::task::spawn_blocking(move || {
        while let Some(piece) = receiver.blocking_recv() {
            sink.write(&piece)?;
        }
        sink.finish()
    });
    let mut bytes: u64 = 0;
    let ended = loop {
        match pieces.message().await {
            Ok(Some(piece)) => {
                if piece.estimated_bytes > 0 {
                    bar.set_length(piece.estimated_bytes);
                }
                bytes = bytes.saturating_add(piece.data.len() as u64);
                bar.set_position(bytes);
                // The writer's trouble is told below.
                if sender.send(piece.data).await.is_err() {
                    break Ok(());
                }
            }
            Ok(None) => break Ok(()),
            Err(status) => break Err(failed(status)),
        }
    };
    drop(sender);
    let what = format!("cannot write {}", path.display());
    let written = writing.await.unwrap_or_else(|e| Err(io::Error::other(e)));
    bar.finish_and_clear();
    written.map_err(|e| Failure::local(what, e))?;
    ended.map(|()| bytes)
}

async fn import(client: &Client, args: ImportSnapshotArgs, output: Output) -> Result<(), Failure> {
    let path = args.file.display().to_string();
    let doing = format!("import vm snapshot {path}");
    let what = format!("cannot read {path}");
    let (source, bytes): (Box<dyn Read + Send>, u64) = if args.file.as_os_str() == "-" {
        (Box::new(io::stdin()), 0)
    } else {
        let open = || -> io::Result<_> {
            let file = File::open(&args.file)?;
            let bytes = file.metadata()?.len();
            Ok((file, bytes))
        };
        let (file, bytes) = open().map_err(|e| Failure::local(what.as_str(), e))?;
        (Box::new(file), bytes)
    };
    let text = |name: Option<serio_types::Name>| name.map(String::from).unwrap_or_default();
    let target = ImportVmSnapshotTarget {
        request_id: request_id(),
        parent: args.vdc.as_ref().map(names::vdc).unwrap_or_default(),
        vm_id: text(args.name),
        image: args.image.as_ref().map(names::image).unwrap_or_default(),
        new_macs: args.new_macs,
    };
    let bar = progress(bytes);
    let (sender, receiver) = mpsc::channel(PIECES_MAX);
    let moving = bar.clone();
    let reading = tokio::task::spawn_blocking(move || send(source, target, &sender, &moving));
    let answer =
        VmServiceClient::new(client.channel()).import_vm_snapshot(ReceiverStream::new(receiver)).await;
    bar.finish_and_clear();
    // What comes through a pipe may never end: once the node has said what is wrong, nobody waits for that.
    if answer.is_ok() || reading.is_finished() {
        let read = reading.await.unwrap_or_else(|e| Err(io::Error::other(e)));
        read.map_err(|e| Failure::local(what, e))?;
    }
    let made = match answer {
        Ok(made) => made.into_inner(),
        Err(status) => return Err(client.failure(&doing, status)),
    };
    let name = names::short(&made.name);
    let (vm, point) = name.split_once('@').unwrap_or((&name, ""));
    let sentence =
        format!("imported vm {vm} with snapshot {point}\nlet it go on: serio vm restore {vm} {point}");
    output.done(&made, &sentence)
}

/// Sends where it shall be, and the file. `Ok` also when the node hung up: its answer says why.
fn send(
    mut source: impl Read,
    target: ImportVmSnapshotTarget,
    sender: &mpsc::Sender<ImportVmSnapshotRequest>,
    bar: &ProgressBar,
) -> io::Result<()> {
    let mut what = What::Target(target);
    loop {
        if sender.blocking_send(ImportVmSnapshotRequest { what: Some(what) }).is_err() {
            return Ok(());
        }
        let mut piece = Vec::with_capacity(PIECE_BYTES);
        source.by_ref().take(PIECE_BYTES as u64).read_to_end(&mut piece)?;
        if piece.is_empty() {
            return Ok(());
        }
        bar.inc(piece.len() as u64);
        what = What::Data(piece);
    }
}
