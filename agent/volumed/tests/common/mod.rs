//! `serio-volumed serve` as a child process, and strangers' tools.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

pub(crate) const BIN: &str = env!("CARGO_BIN_EXE_serio-volumed");

/// A server; it is told to end, in order, when this is dropped.
pub(crate) struct Serving {
    child: Child,
    pub(crate) socket: PathBuf,
}

impl Serving {
    /// Starts it and waits until it listens.
    pub(crate) fn start(source: &Path, socket: &Path, more: &[&str]) -> Serving {
        let mut child = Command::new(BIN)
            .arg("serve")
            .arg(source)
            .arg("--socket")
            .arg(socket)
            .args(more)
            .stderr(Stdio::piped())
            .spawn()
            .expect("start serio-volumed");
        let started = std::time::Instant::now();
        while std::os::unix::net::UnixStream::connect(socket).is_err() {
            if let Some(status) = child.try_wait().expect("wait") {
                let stderr = BufReader::new(child.stderr.take().expect("stderr"));
                let lines: Vec<_> = stderr.lines().map_while(Result::ok).collect();
                panic!("serio-volumed ended: {status}: {}", lines.join("\n"));
            }
            assert!(started.elapsed().as_secs() < 20, "serio-volumed does not listen");
            std::thread::yield_now();
        }
        Serving { child, socket: socket.to_owned() }
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", self.socket.display())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it ends by itself.
    pub(crate) fn ends(&mut self) -> std::process::ExitStatus {
        self.child.wait().expect("wait")
    }

    /// Ends it and says how it ended.
    pub(crate) fn stop(mut self) -> std::process::ExitStatus {
        self.terminate()
    }

    fn terminate(&mut self) -> std::process::ExitStatus {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).expect("signal");
        self.child.wait().expect("wait")
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|s| s.is_none()) {
            self.terminate();
        }
    }
}

/// Whether a tool is there; says so when not.
pub(crate) fn have(tool: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(tool).is_file()));
    if !found {
        println!("skipped: {tool} is not installed");
    }
    found
}

/// Runs a command that must succeed.
pub(crate) fn run(program: &str, args: &[&str]) -> Output {
    let output = Command::new(program).args(args).output().expect(program);
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

pub(crate) fn volumed(args: &[&str]) -> Output {
    run(BIN, args)
}

/// Bytes that no compressor or zero detector shortens, different in each block.
pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A 32 MiB disk: noise, a hole, noise, a hole to the end.
pub(crate) fn image() -> Vec<u8> {
    let mut image = vec![0; 32 << 20];
    image[..5 << 20].copy_from_slice(&noise(5 << 20, 1));
    image[12 << 20..(12 << 20) + 70_000].copy_from_slice(&noise(70_000, 2));
    image
}
