//! Running `serio-vmm run` with the mini guest, with a deadline instead of sleeps.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Longer than any run takes on two busy cores; only a hang meets it.
const DEADLINE: Duration = Duration::from_secs(120);

/// The entry that a loader takes.
#[derive(Clone, Copy)]
pub(crate) enum Entry {
    /// PVH, by the ELF note.
    Pvh,
    /// The 64-bit Linux entry: the same program without that note.
    Linux64,
}

/// Whether guests can run here; says why not, the way that the test runner counts.
pub(crate) fn kvm_usable() -> bool {
    match serio_hv::Kvm::open() {
        Ok(_) => true,
        Err(error) => {
            println!("skipped: no usable /dev/kvm ({error})");
            false
        }
    }
}

/// Builds the mini guest (once: the recipe takes a lock and does nothing when it is fresh).
pub(crate) fn mini_elf(entry: Entry) -> PathBuf {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../images/mini/build");
    let output = Command::new(&recipe).output().expect("images/mini/build starts");
    assert!(output.status.success(), "images/mini/build: {}", String::from_utf8_lossy(&output.stderr));
    let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    match entry {
        Entry::Pvh => path,
        Entry::Linux64 => path.with_file_name("mini-linux64.elf"),
    }
}

/// A guest that runs.
pub(crate) struct Guest {
    child: Child,
    lines: Receiver<String>,
    errors: std::thread::JoinHandle<String>,
    seen: Vec<String>,
    deadline: Instant,
}

/// What is left of a guest.
pub(crate) struct Done {
    /// The exit code; None when a signal ended it.
    pub(crate) code: Option<i32>,
    /// All lines of the serial port.
    pub(crate) lines: Vec<String>,
    /// Standard error.
    pub(crate) errors: String,
}

/// Starts `serio-vmm run` with the guest, a command line, and more arguments.
pub(crate) fn start(entry: Entry, cmdline: &str, arguments: &[&str]) -> Guest {
    let mut command = Command::new(env!("CARGO_BIN_EXE_serio-vmm"));
    command.arg("run").arg("--kernel").arg(mini_elf(entry)).args(["--cmdline", cmdline]).args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("serio-vmm starts");
    let (sender, lines) = channel();
    let stdout = child.stdout.take().expect("piped above");
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            let text = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
            if sender.send(text).is_err() {
                break;
            }
        }
    });
    let mut stderr = child.stderr.take().expect("piped above");
    let errors = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stderr.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    });
    Guest { child, lines, errors, seen: Vec::new(), deadline: Instant::now() + DEADLINE }
}

impl Guest {
    /// The process.
    pub(crate) fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"))
    }

    /// The guest's serial input.
    pub(crate) fn input(&mut self) -> std::process::ChildStdin {
        self.child.stdin.take().expect("piped at start, taken once")
    }

    /// The next line; None when the output has ended.
    pub(crate) fn next_line(&mut self) -> Option<String> {
        match self.lines.recv_timeout(self.deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                self.seen.push(line.clone());
                Some(line)
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => {
                let _ = self.child.kill();
                panic!("nothing for {DEADLINE:?} after:\n{}", self.seen.join("\n"))
            }
        }
    }

    /// Waits for a line that starts with `start`.
    pub(crate) fn wait_for(&mut self, start: &str) -> String {
        while let Some(line) = self.next_line() {
            if line.starts_with(start) {
                return line;
            }
        }
        panic!("the guest ended before it said {start:?}:\n{}", self.seen.join("\n"))
    }

    /// Reads to the end and collects the exit code.
    pub(crate) fn finish(mut self) -> Done {
        drop(self.child.stdin.take());
        while self.next_line().is_some() {}
        let status = self.child.wait().expect("a child of ours");
        let errors = self.errors.join().unwrap_or_default();
        Done { code: status.code(), lines: self.seen, errors }
    }
}

/// Starts and waits.
pub(crate) fn run(entry: Entry, cmdline: &str, arguments: &[&str]) -> Done {
    start(entry, cmdline, arguments).finish()
}

impl Done {
    /// Everything, for a failed assertion.
    pub(crate) fn text(&self) -> String {
        format!("exit {:?}\n{}\n{}", self.code, self.lines.join("\n"), self.errors)
    }

    /// No case failed, at least one passed, and the machine powered off in order.
    pub(crate) fn assert_passed(&self) {
        let failed: Vec<_> = self.lines.iter().filter(|line| line.starts_with("not ok")).collect();
        assert!(failed.is_empty(), "{failed:#?}\n{}", self.text());
        let sum = self.lines.iter().find(|line| line.starts_with("mini: ") && line.contains(" passed, "));
        assert!(sum.is_some_and(|sum| !sum.starts_with("mini: 0 ")), "no sum\n{}", self.text());
        assert_eq!(self.code, Some(0), "{}", self.text());
    }

    /// These cases ran and passed (the guest skips what the machine does not have).
    pub(crate) fn assert_ok(&self, cases: &[&str]) {
        for case in cases {
            let wanted = format!("ok {case}");
            assert!(self.lines.contains(&wanted), "{wanted:?} is missing\n{}", self.text());
        }
    }
}
