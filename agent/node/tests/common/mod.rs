//! A real `seriod` in a directory of its own, and clients to it.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test binary uses a part; a test may panic"
)]

pub mod disk;
pub mod guest;
pub mod http2;
pub mod rig;
pub mod tls;
pub mod writer;

use std::{
    fs,
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use serio_api::v1::{
    ImageChunk, ImagePart, ImportImageHeader, ImportImageRequest, image_service_client::ImageServiceClient,
    import_image_request::What,
};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// A daemon in its directory. Killed when dropped; its VMs too.
pub struct Seriod {
    pub dir: tempfile::TempDir,
    child: Option<Child>,
    pub tcp: Option<SocketAddr>,
    /// Where it serves /metrics, if it does.
    pub metrics: Option<SocketAddr>,
    /// What all of them have said.
    pub log: Arc<Mutex<String>>,
    /// In a network namespace of its own, from the next start on.
    pub own_network: bool,
    /// For the next start.
    pub more_env: Vec<(&'static str, &'static str)>,
}

impl Seriod {
    /// A directory with a configuration; the VMM and volumed are copies in it, so that their processes are told apart.
    pub fn new(more: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("sd").tempdir_in("/tmp").unwrap();
        let path = dir.path().display();
        let config = format!(
            "node_name = \"t\"\nstate_dir = \"{path}/state\"\nrun_dir = \"{path}/run\"\nvmm_path = \"{path}/serio-vmm\"\n\
             volumed_path = \"{path}/serio-volumed\"\n{more}"
        );
        fs::write(dir.path().join("seriod.toml"), config).unwrap();
        let (child, tcp, metrics) = (None, None, None);
        Self { dir, child, tcp, metrics, log: Arc::default(), own_network: false, more_env: Vec::new() }
    }

    /// Puts the real VMM and volumed there; `Err` says what is missing.
    pub fn with_programs(&self) -> Result<(), String> {
        let beside = Path::new(env!("CARGO_BIN_EXE_seriod")).parent().unwrap();
        for program in ["serio-vmm", "serio-volumed"] {
            let from = beside.join(program);
            fs::copy(&from, self.dir.path().join(program))
                .map_err(|e| format!("{}: {e}: build it first", from.display()))?;
        }
        fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map_err(|e| format!("/dev/kvm: {e}"))?;
        Ok(())
    }

    pub fn command(&self) -> Command {
        let seriod = env!("CARGO_BIN_EXE_seriod");
        let mut command = Command::new(if self.own_network { "unshare" } else { seriod });
        if self.own_network {
            command.args(["-n", seriod]);
        }
        command.arg("--config").arg(self.dir.path().join("seriod.toml"));
        command.envs(self.more_env.iter().copied());
        command
    }

    /// Starts it; returns when it serves.
    pub fn start(&mut self) {
        let mut child = self.command().stderr(Stdio::piped()).spawn().unwrap();
        let log = child.stderr.take().unwrap();
        let verbose = std::env::var_os("SERIO_TEST_LOG").is_some();
        let (sender, receiver) = mpsc::channel();
        let said = Arc::clone(&self.log);
        std::thread::spawn(move || {
            for line in BufReader::new(log).lines().map_while(Result::ok) {
                *said.lock().unwrap() += &format!("{line}\n");
                if verbose || line.starts_with("seriod: ") {
                    eprintln!("{line}");
                }
                if let Some((_, what)) = line.split_once(" serving ") {
                    let _ = sender.send(what.to_owned());
                }
            }
        });
        self.child = Some(child);
        loop {
            let what = receiver.recv_timeout(Duration::from_secs(60)).expect("seriod serves");
            if let Some(address) = what.strip_prefix("/metrics on ") {
                self.metrics = address.parse().ok();
            }
            let Some(at) = what.strip_prefix("gRPC on ") else { continue };
            match at.strip_suffix(" with mutual TLS") {
                Some(address) => self.tcp = address.parse().ok(),
                None => return,
            }
        }
    }

    pub fn pid(&self) -> i32 {
        self.child.as_ref().unwrap().id().try_into().unwrap()
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// SIGTERM; returns how it ended.
    pub fn terminate(&mut self) -> std::process::ExitStatus {
        let pid = nix::unistd::Pid::from_raw(self.pid());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.child.take().unwrap().wait().unwrap()
    }

    /// A channel over the Unix socket.
    pub async fn connect(&self) -> Result<Channel, tonic::transport::Error> {
        let socket = self.dir.path().join("run/seriod.sock");
        Endpoint::from_static("http://seriod")
            .connect_with_connector(tower::service_fn(move |_: Uri| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            }))
            .await
    }

    /// Ends one of [`Seriod::vmms`] by `kill -9`; returns when it is gone.
    pub fn kill_vmm(&self, pid: u32) {
        let process = nix::unistd::Pid::from_raw(pid.try_into().unwrap());
        // It may have ended by itself just now.
        let _ = nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGKILL);
        while self.vmms().contains(&pid) {
            std::thread::yield_now();
        }
    }

    /// Living processes of this directory's VMM.
    pub fn vmms(&self) -> Vec<u32> {
        let vmm = self.dir.path().join("serio-vmm");
        let mut found: Vec<u32> =
            processes().into_iter().filter(|(_, exe)| *exe == vmm).map(|(pid, _)| pid).collect();
        found.sort_unstable();
        found
    }
}

impl Drop for Seriod {
    fn drop(&mut self) {
        self.kill();
        for (pid, exe) in processes() {
            // Only processes of programs that were copied into this directory.
            if exe.starts_with(self.dir.path()) {
                let pid = nix::unistd::Pid::from_raw(pid.try_into().unwrap());
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
    }
}

/// Processes with their program's path; a zombie has none.
fn processes() -> Vec<(u32, PathBuf)> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid: u32| Some((pid, fs::read_link(format!("/proc/{pid}/exe")).ok()?))).collect()
}

/// The mini guest, built if it is not fresh; `Err` says why it is not there.
pub fn mini_guest() -> Result<Vec<u8>, String> {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../images/mini/build");
    let built = Command::new(recipe).output().map_err(|e| format!("images/mini/build: {e}"))?;
    if !built.status.success() {
        return Err(format!("images/mini/build: {}", String::from_utf8_lossy(&built.stderr)));
    }
    let elf = String::from_utf8_lossy(&built.stdout).trim().to_owned();
    fs::read(&elf).map_err(|e| format!("{elf}: {e}"))
}

/// The messages that import an image.
pub fn import(id: &str, cmdline: &str, kernel: &[u8], disk: &[u8]) -> Vec<ImportImageRequest> {
    let header = ImportImageHeader {
        request_id: String::new(),
        image_id: id.to_owned(),
        format: "raw".to_owned(),
        cmdline: cmdline.to_owned(),
        disk_bytes: disk.len() as u64,
        kernel_bytes: kernel.len() as u64,
        initrd_bytes: 0,
        ..ImportImageHeader::default()
    };
    let mut messages = vec![What::Header(header)];
    for (part, bytes) in [(ImagePart::Kernel, kernel), (ImagePart::Disk, disk)] {
        for (index, data) in bytes.chunks(256 << 10).enumerate() {
            let offset = (index * (256 << 10)) as u64;
            messages.push(What::Chunk(ImageChunk { part: part.into(), offset, data: data.to_vec() }));
        }
    }
    messages.into_iter().map(|what| ImportImageRequest { what: Some(what) }).collect()
}

/// Imports an image.
pub async fn import_image(channel: Channel, id: &str, cmdline: &str, kernel: &[u8], disk: &[u8]) {
    let messages = import(id, cmdline, kernel, disk);
    ImageServiceClient::new(channel).import_image(tokio_stream::iter(messages)).await.unwrap();
}
