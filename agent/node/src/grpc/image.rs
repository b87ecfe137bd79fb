//! ImageService. An import writes below `STATE/images/<uid>/`: kernel and initrd here, the disk through
//! `serio-volumed` (`image_disk.rs`). It is a task of its own: when the client goes, the stream breaks off, and the task
//! removes what it wrote; of an upload that can be gone on with, when nobody did (`uploads.rs`).

use std::{io, path::PathBuf, pin::Pin};

use serio_api::v1::{
    DeleteImageRequest, DeleteImageResponse, GetImageRequest, GetImageUploadRequest, Image, ImageChunk,
    ImagePart, ImageUpload, ImportImageHeader, ImportImageRequest, ListImagesRequest, ListImagesResponse,
    image_service_server::ImageService, import_image_request::What,
};
use serio_store::record::ImageRecord;
use serio_types::{Cmdline, Name, resource};
use tokio::{
    fs::{self, File},
    io::AsyncWriteExt,
};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;

use super::{
    Context,
    convert::{self, Fields, field, request_of},
    image_disk::{Disk, DiskHeader},
    kernel, page, unexpected,
    uploads::{Cut, Line, Taken, Uploads},
};
use crate::{
    error::Error,
    state::command::{Answer, Command, ImportedFiles, Mutation, Query},
};

/// The largest chunk.
const CHUNK_BYTES_MAX: usize = 1 << 20;
/// The largest kernel and initrd.
const PART_BYTES_MAX: u64 = 1 << 30;

/// The service.
#[derive(Debug, Clone)]
pub(super) struct ImageApi {
    context: Context,
    uploads: Uploads,
}

impl ImageApi {
    pub(super) fn new(context: Context) -> Self {
        Self { context, uploads: Uploads::default() }
    }
}

/// A header that was checked.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) name: Name,
    pub(super) disk: DiskHeader,
    pub(super) cmdline: Cmdline,
    pub(super) kernel_bytes: u64,
    pub(super) initrd_bytes: u64,
}

fn check(header: &ImportImageHeader) -> Result<Header, Error> {
    let mut fields = Fields::default();
    let name = fields.take("image_id", header.image_id.parse::<Name>());
    let cmdline = fields.take("cmdline", Cmdline::try_from(header.cmdline.clone()));
    let disk = DiskHeader {
        format: header.format.clone(),
        bytes: header.disk_bytes,
        blake3: header.expected_blake3.clone(),
    };
    disk.check(&mut fields, "disk_bytes");
    for (field, bytes) in [("kernel_bytes", header.kernel_bytes), ("initrd_bytes", header.initrd_bytes)] {
        if bytes > PART_BYTES_MAX {
            fields.wrong(field, format!("{bytes} bytes: at most 1GiB"));
        }
    }
    if header.disk_bytes == 0 && header.kernel_bytes == 0 {
        fields.wrong("disk_bytes", "the image has neither disk nor kernel");
    }
    let whole = name.zip(cmdline).map(|(name, cmdline)| Header {
        name,
        disk,
        cmdline,
        kernel_bytes: header.kernel_bytes,
        initrd_bytes: header.initrd_bytes,
    });
    fields.done(whole)
}

/// Where a part that seriod itself writes is.
struct PartFile {
    file: File,
    field: &'static str,
    path: PathBuf,
    expected: u64,
    received: u64,
    head: Vec<u8>,
}

impl PartFile {
    async fn create(path: PathBuf, field: &'static str, expected: u64) -> Result<Self, Error> {
        let file = File::create_new(&path).await.map_err(|e| host(&path, &e))?;
        Ok(Self { file, field, path, expected, received: 0, head: Vec::new() })
    }

    async fn write(&mut self, offset: u64, data: &[u8]) -> Result<(), Error> {
        let end = offset.checked_add(u64::try_from(data.len()).unwrap_or(u64::MAX));
        if offset != self.received || end.is_none_or(|end| end > self.expected) {
            let problem = format!(
                "a chunk at {offset} with {} bytes, but {} of {} bytes were received: send them in order",
                data.len(),
                self.received,
                self.expected
            );
            return Err(Error::invalid(self.field, problem));
        }
        let missing = kernel::HEAD_BYTES.saturating_sub(self.head.len());
        self.head.extend(data.iter().take(missing));
        self.file.write_all(data).await.map_err(|e| host(&self.path, &e))?;
        self.received = end.unwrap_or(self.received);
        Ok(())
    }

    async fn finish(mut self) -> Result<Vec<u8>, Error> {
        if self.received != self.expected {
            let problem = format!("broke off after {} of {} bytes", self.received, self.expected);
            return Err(Error::invalid(self.field, problem));
        }
        self.file.shutdown().await.map_err(|e| host(&self.path, &e))?;
        self.file.sync_all().await.map_err(|e| host(&self.path, &e))?;
        Ok(self.head)
    }
}

pub(super) fn host(path: &std::path::Path, error: &io::Error) -> Error {
    let why = format!("{}: {error}", path.display());
    match error.kind() {
        io::ErrorKind::StorageFull => Error::Full {
            doing: "importing the image",
            why: format!("{why}; free some space on the disk of state_dir"),
        },
        _ => Error::Failed { doing: "importing the image", why },
    }
}

/// What is received, whatever the request that it is a part of.
pub(super) type Chunks = Pin<Box<dyn Stream<Item = Result<ImageChunk, Error>> + Send>>;

/// An import that goes on. Its files are removed by the state if it does not finish.
pub(super) struct Import {
    context: Context,
    header: Header,
    uid: Uuid,
    dir: PathBuf,
}

impl Import {
    pub(super) fn new(context: &Context, header: Header, uid: Uuid) -> Import {
        let dir = context.node.state_dir.join("images").join(uid.to_string());
        Import { context: context.clone(), header, uid, dir }
    }

    async fn part(&self, name: &'static str, expected: u64) -> Result<Option<PartFile>, Error> {
        if expected == 0 {
            return Ok(None);
        }
        PartFile::create(self.dir.join(name), name, expected).await.map(Some)
    }

    /// Receives everything; on an error the caller aborts.
    async fn receive(&self, mut input: Chunks) -> Result<ImportedFiles, Error> {
        fs::create_dir_all(&self.dir).await.map_err(|e| host(&self.dir, &e))?;
        let mut kernel = self.part("kernel", self.header.kernel_bytes).await?;
        let mut initrd = self.part("initrd", self.header.initrd_bytes).await?;
        let mut disk = match self.header.disk.bytes {
            0 => None,
            _ => Some(Disk::start(&self.context, &self.dir, &self.header.disk).await?),
        };
        loop {
            let chunk = match input.next().await {
                Some(Ok(chunk)) if chunk.data.len() > CHUNK_BYTES_MAX => Err(Error::invalid(
                    "chunk.data",
                    format!("{} bytes: at most 1 MiB a chunk", chunk.data.len()),
                )),
                Some(chunk) => chunk,
                None => break,
            };
            let taken = match chunk {
                Ok(chunk) => self.take(chunk, &mut kernel, &mut initrd, &mut disk).await,
                Err(error) => Err(error),
            };
            match taken {
                Ok(true) => {}
                // The disk's job ended early: it says why.
                Ok(false) => return self.finish(kernel, initrd, disk).await,
                Err(error) => {
                    if let Some(disk) = disk {
                        disk.abandon().await;
                    }
                    return Err(error);
                }
            }
        }
        if let Some(disk) = &mut disk {
            disk.end().await?;
        }
        self.finish(kernel, initrd, disk).await
    }

    /// Takes a chunk; false: no more are wanted.
    async fn take(
        &self,
        chunk: ImageChunk,
        kernel: &mut Option<PartFile>,
        initrd: &mut Option<PartFile>,
        disk: &mut Option<Disk>,
    ) -> Result<bool, Error> {
        let unannounced = || Error::invalid("chunk.part", "a part that the header did not announce");
        match ImagePart::try_from(chunk.part).unwrap_or(ImagePart::Unspecified) {
            ImagePart::Kernel => {
                kernel.as_mut().ok_or_else(unannounced)?.write(chunk.offset, &chunk.data).await?;
            }
            ImagePart::Initrd => {
                initrd.as_mut().ok_or_else(unannounced)?.write(chunk.offset, &chunk.data).await?;
            }
            ImagePart::Disk => {
                return disk.as_mut().ok_or_else(unannounced)?.write(chunk.offset, chunk.data).await;
            }
            ImagePart::Unspecified => return Err(Error::invalid("chunk.part", "is missing or unknown")),
        }
        Ok(true)
    }

    async fn finish(
        &self,
        kernel: Option<PartFile>,
        initrd: Option<PartFile>,
        disk: Option<Disk>,
    ) -> Result<ImportedFiles, Error> {
        let disk = match disk {
            Some(disk) => Some(disk.finish().await?),
            None => None,
        };
        let (has_kernel, has_initrd) = (kernel.is_some(), initrd.is_some());
        if let Some(kernel) = kernel
            && !kernel::is_kernel(&kernel.finish().await?)
        {
            let problem =
                "is neither a bzImage nor a 64-bit vmlinux (ELF): give the kernel file of an x86-64 Linux";
            return Err(Error::invalid("kernel", problem));
        }
        if let Some(initrd) = initrd {
            initrd.finish().await?;
        }
        let dir = File::open(&self.dir).await.map_err(|e| host(&self.dir, &e))?;
        dir.sync_all().await.map_err(|e| host(&self.dir, &e))?;
        let (size_bytes, blake3) = disk.map_or((0, String::new()), |d| (d.size_bytes, d.blake3));
        Ok(ImportedFiles { uid: self.uid, size_bytes, blake3, has_kernel, has_initrd })
    }

    pub(super) async fn run(self, input: Chunks) -> Result<ImageRecord, Error> {
        let result = match self.receive(input).await {
            Ok(files) => self.context.state.ask(Command::FinishImport(files)).await,
            Err(error) => Err(error),
        };
        match result {
            Ok(Answer::Image(record)) => Ok(record),
            Ok(other) => Err(unexpected(&other)),
            Err(error) => {
                self.context.state.ask(Command::AbortImport(self.uid)).await.ok();
                Err(error)
            }
        }
    }
}

/// A stream's chunks, and whether its end is the client's or the line's.
fn line(input: Streaming<ImportImageRequest>) -> Line {
    Box::pin(input.map(|message| match message.map(|m| m.what) {
        Err(status) => Err(Cut::of(&status)),
        Ok(Some(What::Chunk(chunk))) => Ok(chunk),
        Ok(Some(What::Header(_))) => Err(Cut::Client(Error::invalid("header", "came twice"))),
        Ok(None) => Err(Cut::Client(Error::invalid("what", "is missing: send a chunk"))),
    }))
}

#[tonic::async_trait]
impl ImageService for ImageApi {
    async fn import_image(
        &self,
        request: Request<Streaming<ImportImageRequest>>,
    ) -> Result<Response<Image>, Status> {
        let mut input = request.into_inner();
        let Some(What::Header(header)) = input.message().await?.and_then(|m| m.what) else {
            return Err(Error::invalid("header", "is missing: the first message is the header").into());
        };
        let id = request_of!("ImportImage", &header)?;
        let checked = check(&header)?;
        let upload = match self.uploads.take(header, line(input))? {
            Taken::Begun(upload) => upload,
            Taken::Joined(joined) => return Ok(Response::new(convert::image(&joined.record().await?))),
        };
        let begin = Mutation::BeginImport { name: checked.name.clone(), cmdline: checked.cmdline.clone() };
        let context = self.context.clone();
        let (on, request) = (begin.resource(), id.as_ref().map(|id| id.id));
        // It cleans up also when this call is dropped because the client went.
        let whole = upload.run(move |chunks| async move {
            let uid = match context.apply(begin, id).await? {
                Answer::Import(uid) => uid,
                // Done before, by the same request.
                Answer::Image(record) => return Ok(record),
                other => return Err(unexpected(&other)),
            };
            Import::new(&context, checked, uid).run(chunks).await
        });
        let record = self.context.audited(on, request, whole).await?;
        Ok(Response::new(convert::image(&record)))
    }

    async fn get_image_upload(
        &self,
        request: Request<GetImageUploadRequest>,
    ) -> Result<Response<ImageUpload>, Status> {
        let place = self.uploads.place(&request.get_ref().upload_id);
        let (part, offset) = place.ok_or_else(|| Error::not_found("an upload with this upload_id"))?;
        Ok(Response::new(ImageUpload { part, offset }))
    }

    async fn get_image(&self, request: Request<GetImageRequest>) -> Result<Response<Image>, Status> {
        let name = field("name", resource::parse_image(&request.get_ref().name))?;
        match self.context.query(Query::Images(Some(name))).await? {
            Answer::Images(images) if images.len() == 1 => {
                Ok(Response::new(images.first().map(convert::image).unwrap_or_default()))
            }
            other => Err(unexpected(&other).into()),
        }
    }

    async fn list_images(
        &self,
        request: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        let ListImagesRequest { page_size, page_token } = request.into_inner();
        match self.context.query(Query::Images(None)).await? {
            Answer::Images(images) => {
                let key = |image: &ImageRecord| image.name.to_string();
                let (images, next_page_token) = page::cut(images, page_size, &page_token, key)?;
                let images = images.iter().map(convert::image).collect();
                Ok(Response::new(ListImagesResponse { images, next_page_token }))
            }
            other => Err(unexpected(&other).into()),
        }
    }

    async fn delete_image(
        &self,
        request: Request<DeleteImageRequest>,
    ) -> Result<Response<DeleteImageResponse>, Status> {
        let message = request.into_inner();
        let id = request_of!("DeleteImage", &message)?;
        let name = field("name", resource::parse_image(&message.name))?;
        self.context.mutate(Mutation::DeleteImage { name }, id).await?;
        Ok(Response::new(DeleteImageResponse {}))
    }
}
