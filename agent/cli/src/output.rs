//! The one place that prints: tables for people, the API's JSON mapping (also as YAML) for programs.
//!
//! Invariants: the columns of a table are stable, nothing is coloured, a cell never holds a control character; a list is
//! always a JSON array. Writing to a pipe that was closed (`serio vm list | head -1`) ends the command silently.

use std::io::{self, Write};

use comfy_table::{ContentArrangement, Table, presets};
use pbjson_types::Timestamp;
use serde::Serialize;
use serio_types::ByteSize;
use time::{OffsetDateTime, UtcOffset, macros::format_description};

use crate::{args::Format, error::Failure};

/// Prints what commands found.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    format: Format,
}

impl Output {
    /// In that format.
    #[must_use]
    pub const fn new(format: Format) -> Self {
        Self { format }
    }

    /// The format.
    #[must_use]
    pub const fn format(self) -> Format {
        self.format
    }

    /// A list: a table with those columns, or an array.
    pub fn list<T: Serialize>(
        self,
        items: &[T],
        columns: &[&str],
        row: impl Fn(&T) -> Vec<String>,
    ) -> Result<(), Failure> {
        match self.format {
            Format::Table => text(&table(columns, items.iter().map(row))),
            _ => self.value(&items),
        }
    }

    /// One resource: lines of "field  value", or the object.
    pub fn one<T: Serialize>(self, item: &T, fields: &[(&str, String)]) -> Result<(), Failure> {
        match self.format {
            Format::Table => text(&pairs(fields)),
            _ => self.value(item),
        }
    }

    /// One resource after a change: a sentence, or the object.
    pub fn done<T: Serialize>(self, item: &T, sentence: &str) -> Result<(), Failure> {
        match self.format {
            Format::Table => text(&format!("{sentence}\n")),
            _ => self.value(item),
        }
    }

    /// The object in any case; what has no table is JSON.
    pub fn value<T: Serialize>(self, item: &T) -> Result<(), Failure> {
        // Straight from the message, so that fields keep the order of the API.
        let rendered = match self.format {
            Format::Yaml => serde_yaml_ng::to_string(item)
                .map_err(|e| Failure::local("cannot write the answer as YAML", e))?,
            _ => {
                let json = serde_json::to_string_pretty(item);
                format!("{}\n", json.map_err(|e| Failure::local("cannot write the answer as JSON", e))?)
            }
        };
        text(&rendered)
    }

    /// One item of a stream: a line, a JSON object on one line, or a YAML document.
    pub fn item<T: Serialize>(self, item: &T, line: impl FnOnce() -> String) -> Result<(), Failure> {
        match self.format {
            Format::Table => text(&format!("{}\n", line())),
            Format::Json => {
                let json = serde_json::to_string(item)
                    .map_err(|e| Failure::local("cannot write the answer as JSON", e))?;
                text(&format!("{json}\n"))
            }
            Format::Yaml => {
                text("---\n")?;
                self.value(item)
            }
        }
    }
}

/// Writes to stdout, at once.
pub fn text(text: &str) -> Result<(), Failure> {
    bytes(text.as_bytes())
}

/// Writes bytes to stdout, at once.
pub fn bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    #[expect(
        clippy::disallowed_methods,
        reason = "stdout is line-buffered: what is printed must be seen now"
    )]
    let written = out.write_all(bytes).and_then(|()| out.flush());
    written.map_err(|error| match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::Silent(0),
        _ => Failure::local("cannot write to stdout", error),
    })
}

/// The one table: no borders, two spaces between columns, no colours, nothing wrapped.
#[must_use]
pub fn table(columns: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(columns.iter().copied());
    for row in rows {
        table.add_row(row.iter().map(|cell| clean(cell)));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut text = table.trim_fmt();
    text.push('\n');
    text
}

/// A cell as a terminal may show it: what guests and peers wrote must not steer it.
#[must_use]
pub fn clean(cell: &str) -> String {
    if cell.is_empty() {
        return "-".to_owned();
    }
    cell.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Lines of "field  value".
fn pairs(fields: &[(&str, String)]) -> String {
    let width = fields.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    fields.iter().map(|(name, value)| format!("{name:width$}  {}\n", clean(value))).collect()
}

/// Bytes for people: whole units as `4GiB`, the rest with one decimal.
#[must_use]
pub fn size(bytes: u64) -> String {
    let exact = ByteSize::from_bytes(bytes).to_string();
    if bytes < 1024 || exact.len() <= 7 {
        return exact;
    }
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1}{}", units.get(unit).unwrap_or(&"EiB"))
}

/// A time as `2026-03-01 12:00:00Z`; empty when absent.
#[must_use]
pub fn time(stamp: Option<&Timestamp>) -> String {
    let form = format_description!("[year]-[month]-[day] [hour]:[minute]:[second]Z");
    stamp
        .and_then(|s| OffsetDateTime::from_unix_timestamp(s.seconds).ok())
        .and_then(|t| t.to_offset(UtcOffset::UTC).format(form).ok())
        .unwrap_or_default()
}

/// The time now as a part of a name: `20260131-235959`.
#[must_use]
pub fn now_compact() -> String {
    let form = format_description!("[year][month][day]-[hour][minute][second]");
    OffsetDateTime::now_utc().format(form).unwrap_or_default()
}

/// Seconds for people: `5s`, `3m20s`, `4h07m`, `12d3h`.
#[must_use]
pub fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m{:02}s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{}h{:02}m", seconds / 3_600, seconds % 3_600 / 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds % 86_400 / 3_600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_stable_columns_and_no_escapes() {
        let text = table(
            &["NAME", "SIZE"],
            [vec!["a\x1b[31m".to_owned(), "1GiB".to_owned()], vec![String::new(), "2GiB".to_owned()]]
                .into_iter(),
        );
        assert_eq!(text, "NAME    SIZE\na\u{fffd}[31m  1GiB\n-       2GiB\n");
    }

    #[test]
    fn an_empty_list_still_has_its_head() {
        assert_eq!(table(&["NAME", "SIZE"], std::iter::empty()), "NAME  SIZE\n");
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(size(4 << 30), "4GiB");
        assert_eq!(size(0), "0B");
        assert_eq!(size(1_234_567_890), "1.1GiB");
        assert_eq!(size(u64::MAX), "16.0EiB");
        assert_eq!(
            (span(5), span(200), span(15_000), span(1_000_000)),
            ("5s".into(), "3m20s".into(), "4h10m".into(), "11d13h".into())
        );
        assert_eq!(time(Some(&Timestamp { seconds: 0, nanos: 0 })), "1970-01-01 00:00:00Z");
        assert_eq!(time(None), "");
    }
}
