//! A VM's snapshot to another node, and from one: the streams of VmService, and what is behind them.
//!
//! ```text
//!   STATE/vms/VM/saved/POINT/{state,memory} ──▶ ┐                                ┌ ──▶ files of a new point, synced
//!                                               ├ serio_archive ──gRPC, a file──▶┤
//!   serio-volumed, the volumes' points ──NBD──▶ ┘                                └ ──NBD──▶ serio-volumed, new volumes; sealed
//! ```
//! So the bytes of volumes are only asked of and given to those who hold them, and encrypted ones are opened with their vdc's
//! key here and encrypted with the other vdc's there.
//!
//! - **Out**: while it is read each volume's point has an export, with its row, so that nothing merges it away; that ends with its
//!   only client, also when this process dies. The files are open.
//! - **In**: everything that the manifest says is checked against the vdc and the host before anything is made; then the rows
//!   stand as `creating`, and whatever breaks off ends in their being undone, here or by the next start (`state/vm_imports.rs`).
//!   What came is only taken for whole when the archive's last hash was right.
//!
//! A point that goes on from others goes with their files, as they are: its memory's checksums stay those that the VMM made, and
//! nobody but the VMM reads a guest's pages or a machine's state.
//!
//! Owns: the threads that read and write archives, [`MOVES_MAX`] at most. Never: the archive's bytes (`serio_archive`), rows.

mod disks;
mod export;
mod import;
mod manifest;

use std::{io, pin::Pin, sync::Arc, time::Duration};

use serio_api::v1::{ImportVmSnapshotRequest, VmArchivePiece, VmSnapshot, import_vm_snapshot_request::What};
use serio_archive::ReadError;
use serio_types::resource;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Status, Streaming};

use super::{
    Context,
    convert::{self, field, request_of},
};
use crate::error::{Error, chain};

/// Archives that are read and written at once: each has a thread.
const MOVES_MAX: usize = 4;
/// The largest piece of a stream.
const PIECE_BYTES_MAX: usize = 1 << 20;
/// Pieces that wait between a thread and the network.
const PIECES_MAX: usize = 4;

/// For so long a client may send nothing: it has one of few places.
const SILENCE_MAX: Duration = Duration::from_secs(600);

/// What a client reads.
pub(super) type Pieces = Pin<Box<dyn Stream<Item = Result<VmArchivePiece, Status>> + Send>>;

/// Places for those that go on. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Moves(Arc<Semaphore>);

impl Default for Moves {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MOVES_MAX)))
    }
}

impl Moves {
    fn place(&self) -> Result<OwnedSemaphorePermit, Error> {
        let why = || {
            format!(
                "{MOVES_MAX} snapshots go to other nodes or come from them already: try again when one is done"
            )
        };
        Arc::clone(&self.0).try_acquire_owned().map_err(|_| Error::precondition("the node", why()))
    }
}

/// `ExportVmSnapshot`: everything is opened before the first piece is sent.
pub(super) async fn export(context: &Context, name: String) -> Result<Pieces, Status> {
    let (vm, point) = field("name", resource::parse_vm_snapshot(&name))?;
    let place = context.moves.place()?;
    let (sender, pieces) = mpsc::channel(PIECES_MAX);
    let this = context.clone();
    let begin = async move {
        let going = export::open(&this, vm, point).await?;
        tokio::spawn(async move {
            going.send(&this, sender).await;
            drop(place);
        });
        Ok(())
    };
    context.audited(name, None, begin).await?;
    Ok(Box::pin(ReceiverStream::new(pieces)))
}

/// `ImportVmSnapshot`: answers when the VM is there, or nothing of it.
pub(super) async fn import(
    context: &Context,
    mut input: Streaming<ImportVmSnapshotRequest>,
) -> Result<VmSnapshot, Status> {
    let Some(What::Target(target)) = input.message().await?.and_then(|m| m.what) else {
        return Err(
            Error::invalid("target", "is missing: the first message says where the VM shall be").into()
        );
    };
    let id = request_of!("ImportVmSnapshot", &target)?;
    let target = import::Target::parse(target)?;
    let place = context.moves.place()?;
    let (sender, pieces) = mpsc::channel(PIECES_MAX);
    let on = target.resource();
    let (request, this) = (id.as_ref().map(|id| id.id), context.clone());
    // It goes on, and cleans up, also when this call is dropped because the client went.
    let work = async move {
        let (_place, passing) = (place, tokio::spawn(pass(input, sender)));
        let done = import::run(this, target, id, PieceReader::new(pieces)).await;
        passing.abort();
        done
    };
    Ok(convert::vm_snapshot(&context.audited(on, request, work).await?))
}

/// From the network to the thread, until either has enough.
async fn pass(mut input: Streaming<ImportVmSnapshotRequest>, sender: mpsc::Sender<io::Result<Vec<u8>>>) {
    loop {
        let piece = match tokio::time::timeout(SILENCE_MAX, input.message()).await.unwrap_or_else(|_| {
            let waited = SILENCE_MAX.as_secs();
            Err(Status::deadline_exceeded(format!("nothing came for {waited} s")))
        }) {
            Ok(None) => return,
            Ok(Some(ImportVmSnapshotRequest { what: Some(What::Data(data)) }))
                if data.len() <= PIECE_BYTES_MAX =>
            {
                Ok(data)
            }
            Ok(Some(_)) => Err(io::Error::other("a message without data, or with more than 1 MiB")),
            Err(status) => Err(io::Error::other(format!("the stream broke off: {}", status.message()))),
        };
        let ends = piece.is_err();
        if sender.send(piece).await.is_err() || ends {
            return;
        }
    }
}

/// The archive, as it comes. To be read on a thread that may wait.
#[derive(Debug)]
struct PieceReader {
    pieces: mpsc::Receiver<io::Result<Vec<u8>>>,
    piece: io::Cursor<Vec<u8>>,
}

impl PieceReader {
    fn new(pieces: mpsc::Receiver<io::Result<Vec<u8>>>) -> Self {
        Self { pieces, piece: io::Cursor::default() }
    }
}

impl io::Read for PieceReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.piece.read(buffer)? {
                0 if !buffer.is_empty() => match self.pieces.blocking_recv() {
                    Some(piece) => self.piece = io::Cursor::new(piece?),
                    None => return Ok(0),
                },
                read => return Ok(read),
            }
        }
    }
}

/// What is wrong with what a client sends.
fn refused(error: &ReadError) -> Error {
    Error::invalid("data", chain(error))
}

/// What is wrong with a file of the host.
fn host(doing: &'static str, error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::StorageFull => {
            Error::Full { doing, why: format!("{error}; free some space on the disk of state_dir") }
        }
        _ => Error::Failed { doing, why: error.to_string() },
    }
}
