//! Starting `serio-vmm` and `serio-volumed`, and watching them.
//!
//! Owns: how they are started (own session, nothing inherited but a listening socket and a log), and one task per
//! process that waits for its end and reaps it. Never: what they are asked to do.

use std::{
    fs,
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use tokio::sync::watch;

use super::{
    error::{FileError, SpawnError},
    process::{Exit, Process},
    rundir,
};

/// Between two looks at the size of a process's log.
const LOG_LOOK: Duration = Duration::from_secs(10);
/// `oom_score_adj`: rather a guest than the daemons of the host.
const OOM_SCORE: &str = "200";

/// A process whose end is waited for by a task of its own.
#[derive(Debug, Clone)]
pub(super) struct Watched {
    process: Arc<Process>,
    exit: watch::Receiver<Option<Exit>>,
}

impl Watched {
    /// Starts the task. `log` is kept short meanwhile.
    pub(super) fn new(process: Process, log: PathBuf) -> Self {
        let process = Arc::new(process);
        let (sender, exit) = watch::channel(None);
        let watched = Arc::clone(&process);
        tokio::spawn(async move {
            let mut look = tokio::time::interval(LOG_LOOK);
            let wait = watched.wait();
            tokio::pin!(wait);
            let exit = loop {
                tokio::select! {
                    exit = &mut wait => break exit,
                    _ = look.tick() => rundir::bound_log(&log),
                }
            };
            sender.send_replace(Some(exit));
        });
        Self { process, exit }
    }

    pub(super) fn process(&self) -> &Process {
        &self.process
    }

    /// Whether it is known to have ended.
    pub(super) fn exit_now(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Resolves when it is dead.
    pub(super) async fn exit(&self) -> Exit {
        let mut receiver = self.exit.clone();
        match receiver.wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or(Exit::Unknown),
            // The runtime is ending, and the watching task went first.
            Err(_) => Exit::Unknown,
        }
    }

    /// As [`Watched::exit`], but not for ever.
    pub(super) async fn exit_within(&self, wait: Duration) -> Option<Exit> {
        tokio::time::timeout(wait, self.exit()).await.ok()
    }

    /// Kills it and waits. A process that even SIGKILL does not end (it hangs in the kernel) is given up after a
    /// while, so that it costs nobody else.
    pub(super) async fn kill(&self) -> Exit {
        const GIVE_UP: Duration = Duration::from_secs(30);
        self.process.kill();
        self.exit_within(GIVE_UP).await.unwrap_or_else(|| {
            tracing::error!(
                pid = self.process.pid(),
                "a process does not end even by SIGKILL: the host has a problem"
            );
            Exit::Unknown
        })
    }
}

/// Starts `PROGRAM agent --control-fd N --first-uid N` with its standard error in `log`.
pub(super) async fn spawn(
    program: &Path,
    first_uid: u32,
    control: UnixListener,
    log: &Path,
) -> Result<Watched, SpawnError> {
    let program = program.to_owned();
    let log_path = log.to_owned();
    let stderr = rundir::open_log(log)?;
    // fork copies page tables and exec reads the disk: not on a thread that serves others.
    let started = tokio::task::spawn_blocking(move || start(&program, first_uid, &control, &stderr));
    let process = match started.await {
        Ok(process) => process?,
        Err(join) => return Err(FileError::at("start a process for", log)(io::Error::other(join)).into()),
    };
    Ok(Watched::new(process, log_path))
}

fn start(
    program: &Path,
    first_uid: u32,
    control: &UnixListener,
    stderr: &File,
) -> Result<Process, SpawnError> {
    let exec = |source| SpawnError::Exec { path: program.to_owned(), source };
    let mut command = Command::new(program);
    command
        .args(["agent", "--control-fd", &control.as_raw_fd().to_string()])
        .args(["--first-uid", &first_uid.to_string()])
        .current_dir("/")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(stderr.try_clone().map_err(exec)?)
        .stderr(stderr.try_clone().map_err(exec)?);
    for kept in ["RUST_LOG", "RUST_BACKTRACE"] {
        if let Some(value) = std::env::var_os(kept) {
            command.env(kept, value);
        }
    }
    let child = crate::sys::spawn_in_session(&mut command, control.as_fd()).map_err(exec)?;
    // Nobody else waits for this child, so its number is its own until we reap it.
    let process = Process::child(child.id()).map_err(exec)?;
    if let Err(error) = fs::write(format!("/proc/{}/oom_score_adj", child.id()), OOM_SCORE) {
        tracing::debug!(pid = child.id(), %error, "oom_score_adj could not be set");
    }
    Ok(process)
}
