//! A node that answers as the test wants: the services of the API over a Unix socket or TLS, without anything behind.

mod archive;
mod operation;

use std::{
    path::Path,
    pin::Pin,
    sync::{Arc, Mutex},
    time::Duration,
};

use serio_api::v1::{
    AttachNicRequest, AttachVolumeRequest, ConsoleInput, ConsoleOutput, CreateVdcRequest,
    CreateVdcSnapshotRequest, CreateVmRequest, DeleteImageRequest, DeleteImageResponse, DeleteVdcRequest,
    DeleteVdcResponse, DeleteVdcSnapshotRequest, DeleteVmRequest, DeleteVmResponse, DeleteVmSnapshotRequest,
    DetachNicRequest, DetachVolumeRequest, Encryption, EraseVdcRequest, EraseVdcResponse,
    ExportVmSnapshotRequest, GetImageRequest, GetImageUploadRequest, GetVdcRequest, GetVdcSnapshotRequest,
    GetVmRequest, Image, ImageUpload, ImportImageRequest, ImportVmSnapshotRequest, ListImagesRequest,
    ListImagesResponse, ListUsageRequest, ListUsageResponse, ListVdcSnapshotsRequest,
    ListVdcSnapshotsResponse, ListVdcsRequest, ListVdcsResponse, ListVmSnapshotsRequest,
    ListVmSnapshotsResponse, ListVmsRequest, ListVmsResponse, Operation, OperationState, PauseVmRequest,
    PointClass, Quota, ReadLogRequest, RebootVmRequest, Receipt, RestoreVmRequest, ResumeVmRequest,
    RotateVdcKeyRequest, RotateVdcKeyResponse, Snapshot, SnapshotVmRequest, StartVmRequest, StopVmRequest,
    UpdateVdcRequest, UpdateVmRequest, Vdc, VdcSnapshot, VdcUsage, Vm, VmArchivePiece, VmSnapshot, VmSpec,
    VmState, VmStatus,
    image_service_server::{ImageService, ImageServiceServer},
    import_image_request::What,
    operation_service_server::OperationServiceServer,
    vdc_service_server::{VdcService, VdcServiceServer},
    vm_service_server::{VmService, VmServiceServer},
};
use tokio::{net::UnixListener, sync::mpsc};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, UnixListenerStream},
};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::Router},
};
use tonic_types::{ErrorDetails, StatusExt};

/// What was asked, for the test to look at.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) request_ids: Vec<String>,
    pub(crate) vm: Option<CreateVmRequest>,
    pub(crate) stop: Option<StopVmRequest>,
    pub(crate) update: Option<UpdateVmRequest>,
    pub(crate) kernel: Vec<u8>,
    pub(crate) disk: Vec<u8>,
    pub(crate) chunk_bytes: usize,
    pub(crate) flaky: bool,
}

/// The node.
#[derive(Clone, Default)]
pub(crate) struct Fake {
    pub(crate) seen: Arc<Mutex<Seen>>,
}

type Pinned<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub(crate) const LOG: &str = "one\r\ntwo\r\nthree\r\n";

impl Fake {
    fn router(&self) -> Router {
        Server::builder()
            .add_service(VdcServiceServer::new(self.clone()))
            .add_service(OperationServiceServer::new(self.clone()))
            .add_service(VmServiceServer::new(self.clone()))
            .add_service(ImageServiceServer::new(self.clone()))
    }

    /// Serves on that socket for the rest of the test.
    pub(crate) fn serve(&self, socket: &Path) {
        let incoming = UnixListenerStream::new(UnixListener::bind(socket).unwrap());
        let router = self.router();
        tokio::spawn(async move { router.serve_with_incoming(incoming).await.unwrap() });
    }

    /// The same over TLS, with the files that `serio pki` made; returns the port.
    pub(crate) async fn serve_tls(&self, folder: &Path) -> u16 {
        use tonic::transport::{Certificate, Identity, ServerTlsConfig};
        let read = |file: &str| std::fs::read(folder.join(file)).unwrap();
        let tls = ServerTlsConfig::new()
            .identity(Identity::from_pem(read("server-cert.pem"), read("server-key.pem")))
            .client_ca_root(Certificate::from_pem(read("ca-cert.pem")));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let router =
            Server::builder().tls_config(tls).unwrap().add_service(VdcServiceServer::new(self.clone()));
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        tokio::spawn(async move { router.serve_with_incoming(incoming).await.unwrap() });
        port
    }
}

fn receipt() -> Receipt {
    let time = Some(pbjson_types::Timestamp { seconds: 1_700_000_000, nanos: 0 });
    Receipt { number: 7, time, who: "uid 0".into(), hash: "cd".repeat(32) }
}

fn vdc(name: &str) -> Vdc {
    Vdc {
        name: name.to_owned(),
        uid: "u".into(),
        generation: 3,
        create_time: Some(pbjson_types::Timestamp { seconds: 1_700_000_000, nanos: 0 }),
        quota: Some(Quota { vcpus: 4, memory_bytes: 4 << 30, storage_bytes: 20 << 30, ..Default::default() }),
        used: Some(Quota { vcpus: 1, memory_bytes: 256 << 20, storage_bytes: 1 << 30, ..Default::default() }),
        encryption: Encryption::Encrypted.into(),
        share: None,
    }
}

#[tonic::async_trait]
impl VdcService for Fake {
    async fn rotate_vdc_key(
        &self,
        _: Request<RotateVdcKeyRequest>,
    ) -> Result<Response<RotateVdcKeyResponse>, Status> {
        let (from_kek, to_kek) = ("0123456789abcdef".to_owned(), "fedcba9876543210".to_owned());
        let receipt = Some(receipt());
        Ok(Response::new(RotateVdcKeyResponse { key_id: "77".repeat(16), from_kek, to_kek, receipt }))
    }

    async fn erase_vdc(
        &self,
        request: Request<EraseVdcRequest>,
    ) -> Result<Response<EraseVdcResponse>, Status> {
        let request = request.into_inner();
        assert_eq!(request.uid, "u");
        Ok(Response::new(EraseVdcResponse {
            vdc: Some(vdc(&request.name)),
            key_id: "77".repeat(16),
            destroyed_blake3: "ab".repeat(32),
            receipt: Some(receipt()),
        }))
    }

    async fn create_vdc_snapshot(
        &self,
        request: Request<CreateVdcSnapshotRequest>,
    ) -> Result<Response<VdcSnapshot>, Status> {
        let name = request.into_inner().snapshot_id;
        let part = Snapshot {
            name: format!("vdcs/ardesio/volumes/web-root/snapshots/{name}"),
            class: PointClass::Crash.into(),
            class_reason: "no agent answers".into(),
            ..Snapshot::default()
        };
        let name = format!("vdcs/ardesio/snapshots/{name}");
        Ok(Response::new(VdcSnapshot { name, snapshots: vec![part], ..VdcSnapshot::default() }))
    }

    async fn get_vdc_snapshot(
        &self,
        _: Request<GetVdcSnapshotRequest>,
    ) -> Result<Response<VdcSnapshot>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn list_vdc_snapshots(
        &self,
        _: Request<ListVdcSnapshotsRequest>,
    ) -> Result<Response<ListVdcSnapshotsResponse>, Status> {
        Ok(Response::new(ListVdcSnapshotsResponse::default()))
    }

    async fn list_usage(
        &self,
        request: Request<ListUsageRequest>,
    ) -> Result<Response<ListUsageResponse>, Status> {
        let ListUsageRequest { parent, page_token, .. } = request.into_inner();
        // Two pages.
        let (start, next_page_token) =
            if page_token.is_empty() { (0, "more".to_owned()) } else { (3600, String::new()) };
        let stamp = |seconds| Some(pbjson_types::Timestamp { seconds, nanos: 0 });
        let usage = VdcUsage {
            vdc: parent,
            start_time: stamp(start),
            end_time: stamp(start + 3600),
            vcpu_seconds: 7200.0,
            memory_byte_seconds: 3600.0 * (1_u64 << 30) as f64,
            ..Default::default()
        };
        Ok(Response::new(ListUsageResponse { usages: vec![usage], next_page_token }))
    }

    async fn delete_vdc_snapshot(
        &self,
        request: Request<DeleteVdcSnapshotRequest>,
    ) -> Result<Response<Operation>, Status> {
        let target = request.into_inner().name;
        let name = format!("operations/{}", target.rsplit('/').next().unwrap());
        let state = OperationState::Running.into();
        Ok(Response::new(Operation { name, target, state, ..Operation::default() }))
    }

    async fn create_vdc(&self, request: Request<CreateVdcRequest>) -> Result<Response<Vdc>, Status> {
        let request = request.into_inner();
        let tries = {
            let mut seen = self.seen.lock().unwrap();
            seen.request_ids.push(request.request_id.clone());
            seen.request_ids.len()
        };
        match request.vdc_id.as_str() {
            "flaky" if tries == 1 => Err(Status::unavailable("restarting")),
            "down" => Err(Status::unavailable("restarting")),
            "slow" => {
                tokio::time::sleep(Duration::from_secs(3600)).await;
                Err(Status::internal("late"))
            }
            "taken" => Err(Status::already_exists(
                "vdcs/taken exists already: choose another name, or delete it first",
            )),
            "bad" => {
                let details =
                    ErrorDetails::with_bad_request_violation("quota.vcpus", "0 is not in 1 to 4096");
                Err(Status::with_error_details(tonic::Code::InvalidArgument, "the quota is wrong", details))
            }
            name => Ok(Response::new(vdc(&format!("vdcs/{name}")))),
        }
    }

    async fn get_vdc(&self, request: Request<GetVdcRequest>) -> Result<Response<Vdc>, Status> {
        let name = request.into_inner().name;
        if name == "vdcs/none" {
            Err(Status::not_found("vdcs/none does not exist"))
        } else {
            Ok(Response::new(vdc(&name)))
        }
    }

    async fn list_vdcs(&self, _: Request<ListVdcsRequest>) -> Result<Response<ListVdcsResponse>, Status> {
        Ok(Response::new(ListVdcsResponse {
            vdcs: vec![vdc("vdcs/ardesio"), vdc("vdcs/b")],
            ..Default::default()
        }))
    }

    async fn update_vdc(&self, request: Request<UpdateVdcRequest>) -> Result<Response<Vdc>, Status> {
        let request = request.into_inner();
        assert_eq!(request.expected_generation, 3);
        Ok(Response::new(Vdc { quota: request.quota, ..vdc(&request.name) }))
    }

    async fn delete_vdc(&self, _: Request<DeleteVdcRequest>) -> Result<Response<DeleteVdcResponse>, Status> {
        Err(Status::permission_denied("the role auditor may not change anything"))
    }
}

#[tonic::async_trait]
impl VmService for Fake {
    type AttachConsoleStream = Pinned<ConsoleOutput>;
    type ReadLogStream = Pinned<ConsoleOutput>;

    async fn create_vm(&self, request: Request<CreateVmRequest>) -> Result<Response<Vm>, Status> {
        let request = request.into_inner();
        let vm = Vm {
            name: format!("{}/vms/{}", request.parent, request.vm_id),
            spec: request.spec.clone(),
            ..Vm::default()
        };
        self.seen.lock().unwrap().vm = Some(request);
        Ok(Response::new(vm))
    }

    async fn get_vm(&self, _: Request<GetVmRequest>) -> Result<Response<Vm>, Status> {
        Err(Status::unimplemented("get_vm"))
    }

    async fn list_vms(&self, _: Request<ListVmsRequest>) -> Result<Response<ListVmsResponse>, Status> {
        Ok(Response::new(ListVmsResponse { vms: vec![], ..Default::default() }))
    }

    async fn attach_volume(&self, request: Request<AttachVolumeRequest>) -> Result<Response<Vm>, Status> {
        Ok(Response::new(Vm { name: request.into_inner().name, ..Vm::default() }))
    }

    async fn detach_volume(&self, request: Request<DetachVolumeRequest>) -> Result<Response<Vm>, Status> {
        let request = request.into_inner();
        assert_eq!(request.timeout.map(|timeout| timeout.seconds), Some(7));
        Err(Status::failed_precondition("the guest did not let go of it"))
    }

    async fn attach_nic(&self, request: Request<AttachNicRequest>) -> Result<Response<Vm>, Status> {
        let AttachNicRequest { name, nic, .. } = request.into_inner();
        let spec = VmSpec { nics: nic.into_iter().collect(), ..VmSpec::default() };
        Ok(Response::new(Vm { name, spec: Some(spec), ..Vm::default() }))
    }

    async fn detach_nic(&self, request: Request<DetachNicRequest>) -> Result<Response<Vm>, Status> {
        let request = request.into_inner();
        assert_eq!(request.timeout.map(|timeout| timeout.seconds), Some(7));
        Err(Status::failed_precondition("the guest did not let go of it"))
    }

    async fn start_vm(&self, _: Request<StartVmRequest>) -> Result<Response<Vm>, Status> {
        Err(Status::resource_exhausted("vdcs/ardesio has 0 of 4 vcpus left, and 2 are asked for"))
    }

    async fn stop_vm(&self, request: Request<StopVmRequest>) -> Result<Response<Vm>, Status> {
        let request = request.into_inner();
        let vm = Vm { name: request.name.clone(), ..Vm::default() };
        self.seen.lock().unwrap().stop = Some(request);
        Ok(Response::new(vm))
    }

    async fn reboot_vm(&self, _: Request<RebootVmRequest>) -> Result<Response<Vm>, Status> {
        Err(Status::failed_precondition("the VM is stopped"))
    }

    async fn update_vm(&self, request: Request<UpdateVmRequest>) -> Result<Response<Vm>, Status> {
        let request = request.into_inner();
        let vm = Vm { name: request.name.clone(), ..Vm::default() };
        self.seen.lock().unwrap().update = Some(request);
        Ok(Response::new(vm))
    }

    async fn snapshot_vm(&self, request: Request<SnapshotVmRequest>) -> Result<Response<VmSnapshot>, Status> {
        let request = request.into_inner();
        let name = format!("{}/snapshots/{}", request.vm, request.snapshot_id);
        Ok(Response::new(VmSnapshot { name, memory_bytes: 1 << 20, ..VmSnapshot::default() }))
    }

    async fn list_vm_snapshots(
        &self,
        _: Request<ListVmSnapshotsRequest>,
    ) -> Result<Response<ListVmSnapshotsResponse>, Status> {
        Ok(Response::new(ListVmSnapshotsResponse::default()))
    }

    async fn delete_vm_snapshot(
        &self,
        _: Request<DeleteVmSnapshotRequest>,
    ) -> Result<Response<Operation>, Status> {
        Err(Status::not_found("vdcs/ardesio/vms/web/snapshots/none does not exist"))
    }

    type ExportVmSnapshotStream = Pinned<VmArchivePiece>;

    async fn export_vm_snapshot(
        &self,
        request: Request<ExportVmSnapshotRequest>,
    ) -> Result<Response<Self::ExportVmSnapshotStream>, Status> {
        Ok(Response::new(Box::pin(tokio_stream::iter(archive::export(&request.get_ref().name)))))
    }

    async fn import_vm_snapshot(
        &self,
        request: Request<Streaming<ImportVmSnapshotRequest>>,
    ) -> Result<Response<VmSnapshot>, Status> {
        archive::import(request.into_inner()).await.map(Response::new)
    }

    async fn restore_vm(&self, request: Request<RestoreVmRequest>) -> Result<Response<Vm>, Status> {
        let request = request.into_inner();
        assert_eq!(request.name, "vdcs/ardesio/vms/web/snapshots/before");
        let status = Some(VmStatus { state: VmState::Running.into(), ..VmStatus::default() });
        let name = format!("vdcs/ardesio/vms/{}", request.as_new);
        Ok(Response::new(Vm { name, status, ..Vm::default() }))
    }

    async fn pause_vm(&self, request: Request<PauseVmRequest>) -> Result<Response<Vm>, Status> {
        let status = Some(VmStatus { state: VmState::Paused.into(), ..VmStatus::default() });
        Ok(Response::new(Vm { name: request.into_inner().name, status, ..Vm::default() }))
    }

    async fn resume_vm(&self, _: Request<ResumeVmRequest>) -> Result<Response<Vm>, Status> {
        Err(Status::failed_precondition("is not paused"))
    }

    async fn delete_vm(&self, _: Request<DeleteVmRequest>) -> Result<Response<DeleteVmResponse>, Status> {
        Ok(Response::new(DeleteVmResponse {}))
    }

    /// A guest that prints "login: ", echoes what is typed as a terminal does, answers each line, and ends at "off".
    async fn attach_console(
        &self,
        request: Request<Streaming<ConsoleInput>>,
    ) -> Result<Response<Self::AttachConsoleStream>, Status> {
        let mut input = request.into_inner();
        let first = input.message().await?.unwrap();
        let (output, receiver) = mpsc::channel(16);
        tokio::spawn(async move {
            let print =
                async |text: String| drop(output.send(Ok(ConsoleOutput { data: text.into_bytes() })).await);
            print(format!("history {}\r\n", first.history_bytes)).await;
            print("login: ".to_owned()).await;
            let mut line = String::new();
            while let Ok(Some(message)) = input.message().await {
                for byte in message.data {
                    if byte != b'\n' {
                        line.push(char::from(byte));
                        continue;
                    }
                    print(format!("{line}\r\n")).await;
                    if line == "off" {
                        return;
                    }
                    print(format!("you said {line}\r\n# ")).await;
                    line.clear();
                }
            }
            // A serial line does not end because nobody types any more.
            output.closed().await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn read_log(
        &self,
        request: Request<ReadLogRequest>,
    ) -> Result<Response<Self::ReadLogStream>, Status> {
        let tail = usize::try_from(request.into_inner().tail_bytes).unwrap();
        let start = if tail == 0 { 0 } else { LOG.len().saturating_sub(tail) };
        let pieces: Vec<_> = LOG.as_bytes()[start..]
            .chunks(4)
            .map(|piece| Ok(ConsoleOutput { data: piece.to_vec() }))
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(pieces))))
    }
}

#[tonic::async_trait]
impl ImageService for Fake {
    async fn get_image_upload(
        &self,
        _request: Request<GetImageUploadRequest>,
    ) -> Result<Response<ImageUpload>, Status> {
        Err(Status::not_found("no upload broke off here"))
    }

    async fn import_image(
        &self,
        request: Request<Streaming<ImportImageRequest>>,
    ) -> Result<Response<Image>, Status> {
        let mut stream = request.into_inner();
        let Some(What::Header(header)) = stream.message().await?.and_then(|m| m.what) else {
            return Err(Status::invalid_argument("the first message must be the header"));
        };
        if header.format != "raw" {
            return Err(Status::invalid_argument(format!(
                "format: `{}` is not known, write raw",
                header.format
            )));
        }
        let mut disk = vec![0; usize::try_from(header.disk_bytes).unwrap()];
        let (mut kernel, mut chunk_bytes) = (Vec::new(), 0);
        while let Some(message) = stream.message().await? {
            let Some(What::Chunk(chunk)) = message.what else { panic!("two headers") };
            chunk_bytes += chunk.data.len();
            match chunk.part() {
                serio_api::v1::ImagePart::Kernel => kernel.extend_from_slice(&chunk.data),
                serio_api::v1::ImagePart::Disk => {
                    let at = usize::try_from(chunk.offset).unwrap();
                    disk[at..at + chunk.data.len()].copy_from_slice(&chunk.data);
                }
                other => panic!("{other:?}"),
            }
        }
        let size_bytes = disk.len() as u64;
        let mut seen = self.seen.lock().unwrap();
        (seen.kernel, seen.disk, seen.chunk_bytes) = (kernel, disk, chunk_bytes);
        Ok(Response::new(Image {
            name: format!("images/{}", header.image_id),
            size_bytes,
            ..Image::default()
        }))
    }

    async fn get_image(&self, _: Request<GetImageRequest>) -> Result<Response<Image>, Status> {
        Err(Status::internal("the disk is on fire"))
    }

    async fn list_images(
        &self,
        _: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        Ok(Response::new(ListImagesResponse::default()))
    }

    async fn delete_image(
        &self,
        _: Request<DeleteImageRequest>,
    ) -> Result<Response<DeleteImageResponse>, Status> {
        Err(Status::aborted("changed meanwhile"))
    }
}
