//! Progress for a person, on a terminal only; and the person's wish to stop (SIGINT, SIGTERM).

use std::{
    io::{self, IsTerminal, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{RecvTimeoutError, channel},
    },
    time::{Duration, Instant},
};

use nix::sys::signal::{SigSet, Signal};
use serio_types::ByteSize;

use crate::copy::Progress;

/// Between two drawings.
const EVERY: Duration = Duration::from_millis(250);

/// Set once somebody wants to stop.
#[derive(Debug, Clone, Default)]
pub struct Wish(Arc<AtomicBool>);

impl Wish {
    /// Listens for SIGINT and SIGTERM from now on. To be called before any other thread starts, so that all inherit it.
    pub fn listen() -> io::Result<Wish> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGINT);
        signals.add(Signal::SIGTERM);
        signals.thread_block()?;
        let wish = Wish::default();
        let heard = wish.clone();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            // Any answer means that it is time to go.
            let _ = signals.wait();
            heard.0.store(true, Ordering::SeqCst);
            // Asked twice: at once.
            let _ = signals.wait();
            std::process::exit(130);
        })?;
        Ok(wish)
    }

    /// Whether to stop.
    pub fn stops(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// Does `work`, drawing its progress meanwhile.
pub fn with_bar<T>(progress: &Progress, work: impl FnOnce() -> T) -> T {
    if !io::stderr().is_terminal() {
        return work();
    }
    std::thread::scope(|scope| {
        let (end, ended) = channel::<()>();
        scope.spawn(move || {
            let start = Instant::now();
            while ended.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                draw(&line(progress, start.elapsed()));
            }
            draw("");
        });
        let result = work();
        drop(end);
        result
    })
}

fn draw(line: &str) {
    // To the start of the line, the text, and nothing behind it. A terminal that is gone is no reason to stop.
    let _ = write!(io::stderr(), "\r{line}\x1b[K");
}

fn line(progress: &Progress, since: Duration) -> String {
    let done = progress.done.load(Ordering::Relaxed);
    let total = progress.total.load(Ordering::Relaxed);
    let pace = ByteSize::from_bytes((done as f64 / since.as_secs_f64().max(0.001)) as u64 >> 20 << 20);
    if total == 0 {
        return format!("{} MiB, {pace}/s", done >> 20);
    }
    let percent = (done as f64 / total as f64 * 100.0).min(100.0);
    let full = (percent / 5.0) as usize;
    format!(
        "[{}{}] {percent:.1} % of {} MiB, {pace}/s",
        "#".repeat(full),
        "-".repeat(20 - full.min(20)),
        total >> 20
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_how_far() {
        let progress = Progress::default();
        progress.done.store(512 << 20, Ordering::Relaxed);
        assert_eq!(line(&progress, Duration::from_secs(4)), "512 MiB, 128MiB/s");
        progress.total.store(1 << 30, Ordering::Relaxed);
        let half = line(&progress, Duration::from_secs(4));
        assert_eq!(half, "[##########----------] 50.0 % of 1024 MiB, 128MiB/s");
    }
}
