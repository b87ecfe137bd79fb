//! Asks a seriod over its Unix socket and says how long that took: the client of `scripts/bench agent`.
//!
//! `agent_load SOCKET furnish` makes an image and a vdc; `… create FIRST COUNT [start]` VMs; `… get|list|create-delete SECONDS`
//! measures, one call after the other and then 32 at a time. Prints lines `NAME VALUE`: microseconds, or calls a second.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a program for measurements: a panic is a finding")]

use std::{
    future::Future,
    path::PathBuf,
    time::{Duration, Instant},
};

use hyper_util::rt::TokioIo;
use serio_api::v1::{
    CreateVdcRequest, CreateVmRequest, DeleteVmRequest, GetVmRequest, ImageChunk, ImagePart,
    ImportImageHeader, ImportImageRequest, ListVmsRequest, Quota, RestartPolicy, VmSpec,
    image_service_client::ImageServiceClient, import_image_request::What,
    vdc_service_client::VdcServiceClient, vm_service_client::VmServiceClient,
};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

type Vms = VmServiceClient<Channel>;

/// Calls at a time where throughput is measured.
const AT_A_TIME: usize = 32;

async fn connect(socket: PathBuf) -> Channel {
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://seriod").connect_with_connector(connector).await.unwrap()
}

async fn furnish(channel: Channel) {
    let kernel = b"\x7fELF\x02\x01\x01 a kernel for those who do not look further".to_vec();
    let header = ImportImageHeader {
        image_id: "tiny".to_owned(),
        format: "raw".to_owned(),
        cmdline: "quiet".to_owned(),
        kernel_bytes: kernel.len() as u64,
        ..ImportImageHeader::default()
    };
    let chunk = ImageChunk { part: ImagePart::Kernel.into(), offset: 0, data: kernel };
    let parts = [What::Header(header), What::Chunk(chunk)];
    let parts = parts.map(|what| ImportImageRequest { what: Some(what) });
    ImageServiceClient::new(channel.clone()).import_image(tokio_stream::iter(parts)).await.unwrap();
    let quota = Quota { vcpus: 100_000, memory_bytes: 1 << 50, storage_bytes: 1 << 50, ..Quota::default() };
    let vdc = CreateVdcRequest { vdc_id: "bench".to_owned(), quota: Some(quota), ..Default::default() };
    VdcServiceClient::new(channel).create_vdc(vdc).await.unwrap();
}

async fn create(mut vms: Vms, name: String, start: bool) {
    let spec = VmSpec {
        vcpus: 1,
        memory_bytes: 16 << 20,
        image: "images/tiny".to_owned(),
        root_disk_bytes: 1 << 20,
        restart_policy: RestartPolicy::Never.into(),
        ..VmSpec::default()
    };
    let request = CreateVmRequest {
        parent: "vdcs/bench".to_owned(),
        vm_id: name,
        spec: Some(spec),
        start,
        ..CreateVmRequest::default()
    };
    vms.create_vm(request).await.unwrap();
}

/// Has `work` done with each number, some at a time.
async fn each<F: Future<Output = ()> + Send + 'static>(
    numbers: std::ops::Range<usize>,
    at_a_time: usize,
    work: impl Fn(usize) -> F,
) {
    let mut tasks = tokio::task::JoinSet::new();
    for number in numbers {
        if tasks.len() == at_a_time {
            tasks.join_next().await.unwrap().unwrap();
        }
        tasks.spawn(work(number));
    }
    tasks.join_all().await;
}

/// One call after the other, then many at a time.
async fn measure<F: Future<Output = ()> + Send + 'static>(
    seconds: u64,
    call: impl Fn(usize) -> F + Clone + Send + 'static,
) {
    let time = Duration::from_secs(seconds);
    let mut took = Vec::new();
    let began = Instant::now();
    while began.elapsed() < time {
        let one = Instant::now();
        call(took.len()).await;
        took.push(one.elapsed());
    }
    took.sort_unstable();
    let at = |share: usize| took[(took.len() * share / 100).min(took.len() - 1)].as_micros();
    println!("p50 {}\np99 {}", at(50), at(99));
    let began = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for worker in 0..AT_A_TIME {
        let call = call.clone();
        tasks.spawn(async move {
            let mut made = 0_usize;
            while began.elapsed() < time {
                call((worker + 1) * 1_000_000 + made).await;
                made += 1;
            }
            made
        });
    }
    let made: usize = tasks.join_all().await.into_iter().sum();
    println!("rate {:.1}", made as f64 / began.elapsed().as_secs_f64());
}

#[tokio::main]
async fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let channel = connect(PathBuf::from(words[0])).await;
    let vms = VmServiceClient::new(channel.clone());
    match words[1..] {
        ["furnish"] => furnish(channel).await,
        ["create", first, count, ref start @ ..] => {
            let (first, count): (usize, usize) = (first.parse().unwrap(), count.parse().unwrap());
            let start = !start.is_empty();
            let work = |number| create(vms.clone(), format!("vm{number:05}"), start);
            each(first..first + count, 8, work).await;
        }
        ["get", seconds] => {
            let call = move |_| {
                let mut vms = vms.clone();
                async move {
                    let request = GetVmRequest { name: "vdcs/bench/vms/vm00000".to_owned() };
                    vms.get_vm(request).await.unwrap();
                }
            };
            measure(seconds.parse().unwrap(), call).await;
        }
        ["list", seconds] => {
            let call = move |_| {
                let mut vms = vms.clone();
                async move {
                    let request = ListVmsRequest { parent: "vdcs/bench".to_owned(), ..Default::default() };
                    assert!(!vms.list_vms(request).await.unwrap().into_inner().vms.is_empty());
                }
            };
            measure(seconds.parse().unwrap(), call).await;
        }
        ["create-delete", seconds] => {
            let call = move |number| {
                let mut vms = vms.clone();
                async move {
                    create(vms.clone(), format!("x{number}"), false).await;
                    let name = format!("vdcs/bench/vms/x{number}");
                    vms.delete_vm(DeleteVmRequest { name, ..Default::default() }).await.unwrap();
                }
            };
            measure(seconds.parse().unwrap(), call).await;
        }
        _ => panic!("see the head of examples/agent_load.rs"),
    }
}
