//! `serio-volumed check` and `scrub`: what `serio_volume` finds in a volume directory, as a table for people or JSON.

use std::{
    fmt::Write,
    io::{self, IsTerminal},
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::{Context, bail};
use clap::Args;
use serio_types::ByteSize;
use serio_volume::{Access, CheckReport, HeaderState, LayerReport, ScrubReport, VolumeDir};

use crate::{
    copy::Progress,
    integrity::{self, Depth},
};

/// Problems that are shown; a broken volume has few or very many.
const PROBLEMS_SHOWN_MAX: usize = 50;
/// Between two looks at the progress of a scrub.
const TICK: Duration = Duration::from_millis(250);

/// What to check.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The volume's directory.
    volume: PathBuf,
    /// Also read all sealed data and compare them with their checksums.
    #[arg(long)]
    data: bool,
    /// Compute the checksums that sealed layers do not have yet; the map files are written.
    #[arg(long)]
    add_sums: bool,
    /// Bytes read a second, such as 50MiB; as fast as it goes if not given.
    #[arg(long)]
    pace: Option<ByteSize>,
    /// For programs.
    #[arg(long)]
    json: bool,
}

/// What to scrub.
#[derive(Debug, Args)]
pub struct ScrubArgs {
    /// The volume's directory.
    volume: PathBuf,
    /// Bytes read a second, such as 50MiB; as fast as it goes if not given.
    #[arg(long)]
    pace: Option<ByteSize>,
    /// For programs.
    #[arg(long)]
    json: bool,
}

impl From<ScrubArgs> for CheckArgs {
    fn from(args: ScrubArgs) -> CheckArgs {
        let ScrubArgs { volume, pace, json } = args;
        CheckArgs { volume, data: true, add_sums: true, pace, json }
    }
}

/// Prints what the volume is made of. `Err` (and so exit code 1) when something is wrong with it.
pub fn run(args: &CheckArgs) -> anyhow::Result<()> {
    let name = args.volume.display();
    let access = if args.add_sums { Access::ReadWrite } else { Access::ReadOnly };
    let files = VolumeDir::new(&args.volume).files(access)?;
    let bytes_per_s = args.pace.map_or(0, ByteSize::bytes);
    let depth = Depth { data: args.data, add_sums: args.add_sums, from: None, bytes_per_s, head: true };
    let (checked, scrubbed) = with_bar("scrubbing", |progress| {
        integrity::examine(&files, depth, &AtomicBool::new(false), progress)
    })
    .with_context(|| format!("cannot check {name}"))?;
    match args.json {
        true => println!("{:#}", json(&checked, scrubbed.as_ref())),
        false => print!("{}", render(&checked, scrubbed.as_ref())),
    }
    match checked.problems.len() as u64 + scrubbed.map_or(0, |s| s.rot_count) {
        0 => Ok(()),
        1 => bail!("{name} has 1 problem"),
        n => bail!("{name} has {n} problems"),
    }
}

/// Runs `work` and, on a terminal, shows how far it is.
pub(crate) fn with_bar<T>(what: &str, work: impl FnOnce(&Progress) -> T) -> T {
    let (progress, over) = (Progress::default(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let shown = io::stderr().is_terminal().then(|| scope.spawn(|| show(what, &progress, &over)));
        let result = work(&progress);
        over.store(true, Ordering::Relaxed);
        if let Some(thread) = shown {
            thread.thread().unpark();
        }
        result
    })
}

fn show(what: &str, progress: &Progress, over: &AtomicBool) {
    while !over.load(Ordering::Relaxed) {
        std::thread::park_timeout(TICK);
        let (done, total) = (progress.done.load(Ordering::Relaxed), progress.total.load(Ordering::Relaxed));
        if total > 0 {
            let percent = u128::from(done) * 100 / u128::from(total);
            let whole = ByteSize::from_bytes(total);
            eprint!("\r\x1b[K{what}: {percent:3} % of {whole}");
        }
    }
    eprint!("\r\x1b[K");
}

fn json(checked: &CheckReport, scrubbed: Option<&ScrubReport>) -> serde_json::Value {
    let report = integrity::report(checked, scrubbed);
    let problems: Vec<_> = report
        .problems
        .iter()
        .map(|p| {
            serde_json::json!({
                "message": p.message, "layer": p.layer, "offset": p.offset, "len": p.len, "points": p.points,
            })
        })
        .collect();
    let layers: Vec<_> = checked
        .layers
        .iter()
        .map(|layer| {
            serde_json::json!({
                "layer": layer.header.layer, "snapshot": layer.header.snapshot,
                "head": layer.header.state == HeaderState::Head, "compared": layer.compared,
                "data_bytes": layer.data_bytes, "zero_bytes": layer.zero_bytes,
                "leaked_bytes": layer.leaked_bytes, "shared": layer.shared, "checksums": layer.summed,
            })
        })
        .collect();
    serde_json::json!({
        "size_bytes": checked.size_bytes(), "layers": layers, "problems": problems,
        "problem_count": report.problem_count, "leaked_bytes": report.leaked_bytes,
        "compared_bytes": report.compared_bytes, "added_bytes": report.added_bytes, "notes": report.notes,
    })
}

fn render(checked: &CheckReport, scrubbed: Option<&ScrubReport>) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = render_into(checked, scrubbed, &mut text);
    text
}

fn render_into(checked: &CheckReport, scrubbed: Option<&ScrubReport>, out: &mut String) -> std::fmt::Result {
    if !checked.layers.is_empty() {
        writeln!(
            out,
            "{:>5}  {:>16}  {:>16}  {:>16}  {:>4}  POINT",
            "LAYER", "DATA", "ZEROS", "LEAKED", "SUMS"
        )?;
    }
    for layer in &checked.layers {
        let (number, sums, point) = (layer.header.layer, sums(layer), point(layer));
        if !layer.compared {
            writeln!(out, "{number:>5}  {:>16}  {:>16}  {:>16}  {sums:>4}  {point}", "-", "-", "-")?;
            continue;
        }
        let (data, zeros, leaked) = (layer.data_bytes, layer.zero_bytes, layer.leaked_bytes);
        writeln!(out, "{number:>5}  {data:>16}  {zeros:>16}  {leaked:>16}  {sums:>4}  {point}")?;
    }
    let report = integrity::report(checked, scrubbed);
    for problem in report.problems.iter().take(PROBLEMS_SHOWN_MAX) {
        writeln!(out, "problem: {}", problem.message)?;
    }
    if let more @ 1.. = report.problem_count.saturating_sub(PROBLEMS_SHOWN_MAX as u64) {
        writeln!(out, "problem: and {more} more")?;
    }
    for note in &report.notes {
        writeln!(out, "note: {note}")?;
    }
    if let Some(scrubbed) = scrubbed {
        let (compared, added) = (scrubbed.compared_bytes, scrubbed.added_bytes);
        writeln!(out, "scrubbed: {compared} bytes compared, {added} bytes got their checksum")?;
    }
    if report.problem_count == 0 {
        let (size, data) = (checked.size_bytes(), checked.data_bytes());
        let layers = checked.layers.len();
        writeln!(out, "clean: {} in {layers} layers, {data} bytes of data", ByteSize::from_bytes(size))?;
    }
    Ok(())
}

/// Whether a layer has its checksums.
fn sums(layer: &LayerReport) -> &'static str {
    match (layer.header.state, layer.summed) {
        (HeaderState::Head, _) => "-",
        (_, Some(true)) => "yes",
        (_, Some(false)) => "some",
        (_, None) => "no",
    }
}

/// Which point of the volume a layer is the top of, and what else is to be said of it.
fn point(layer: &LayerReport) -> String {
    let mut point = match layer.header.state {
        HeaderState::Head => "(head)".to_owned(),
        HeaderState::Sealed { .. } if layer.header.snapshot.is_empty() => "(no name)".to_owned(),
        // A name may hold anything; a terminal must not obey it.
        HeaderState::Sealed { .. } => layer.header.snapshot.escape_debug().to_string(),
    };
    if layer.shared {
        point.push_str(", shared");
    }
    if !layer.compared {
        point.push_str(", in use: not compared");
    }
    point
}
