//! `serio-volumed check`: what `serio_volume` finds in a volume directory, as a table for people.

use std::{fmt::Write, path::PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use serio_types::ByteSize;
use serio_volume::{Access, CheckReport, HeaderState, LayerReport, VolumeDir};

/// Problems that are shown; a broken volume has few or very many.
const PROBLEMS_SHOWN_MAX: usize = 50;

/// What to check.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The volume's directory.
    volume: PathBuf,
}

/// Prints what the volume is made of. `Err` (and so exit code 1) when something is wrong with it.
pub fn run(args: &CheckArgs) -> anyhow::Result<()> {
    let name = args.volume.display();
    let report = VolumeDir::new(&args.volume)
        .files(Access::ReadOnly)?
        .check()
        .with_context(|| format!("cannot check {name}"))?;
    print!("{}", render(&report));
    match report.problems.len() {
        0 => Ok(()),
        1 => bail!("{name} has 1 problem"),
        n => bail!("{name} has {n} problems"),
    }
}

fn render(report: &CheckReport) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = render_into(report, &mut text);
    text
}

fn render_into(report: &CheckReport, out: &mut String) -> std::fmt::Result {
    if !report.layers.is_empty() {
        writeln!(out, "{:>5}  {:>16}  {:>16}  {:>16}  POINT", "LAYER", "DATA", "ZEROS", "LEAKED")?;
    }
    for layer in &report.layers {
        let number = layer.header.layer;
        let point = point(layer);
        if !layer.compared {
            writeln!(out, "{number:>5}  {:>16}  {:>16}  {:>16}  {point}", "-", "-", "-")?;
            continue;
        }
        let (data, zeros, leaked) = (layer.data_bytes, layer.zero_bytes, layer.leaked_bytes);
        writeln!(out, "{number:>5}  {data:>16}  {zeros:>16}  {leaked:>16}  {point}")?;
    }
    for problem in report.problems.iter().take(PROBLEMS_SHOWN_MAX) {
        writeln!(out, "problem: {problem}")?;
    }
    if let more @ 1.. = report.problems.len().saturating_sub(PROBLEMS_SHOWN_MAX) {
        writeln!(out, "problem: and {more} more")?;
    }
    if report.leaked_bytes() > 0 {
        let leaked = report.leaked_bytes();
        writeln!(
            out,
            "note: {leaked} bytes are allocated that nothing reads; a crash leaves such, no data are lost"
        )?;
    }
    if let files @ 1.. = report.leftovers.len() {
        let bytes = report.leftover_bytes;
        writeln!(
            out,
            "note: {files} layers ({bytes} bytes) are not part of the chain: an unfinished or a deleted snapshot"
        )?;
    }
    if report.is_clean() {
        let (size, data) = (report.size_bytes(), report.data_bytes());
        let layers = report.layers.len();
        writeln!(out, "clean: {} in {layers} layers, {data} bytes of data", ByteSize::from_bytes(size))?;
    }
    Ok(())
}

/// Which point of the volume a layer is the top of, and what else is to be said of it.
fn point(layer: &LayerReport) -> String {
    let mut point = match layer.header.state {
        HeaderState::Head => "(head)".to_owned(),
        HeaderState::Sealed { .. } if layer.header.snapshot.is_empty() => "(no name)".to_owned(),
        // A name may hold anything; a terminal must not obey it.
        HeaderState::Sealed { .. } => layer.header.snapshot.escape_debug().to_string(),
    };
    if !layer.compared {
        point.push_str(", in use: not compared");
    }
    if layer.torn_header {
        point.push_str(", one header slot damaged");
    }
    point
}
