//! The audit log: what was done to a node, by whom, in files that only ever grow and whose lines are chained.
//!
//! ```text
//! {"n":1,"time":"2026-…Z","who":"uid 0","role":"control-plane","what":"DeleteVm","on":"vdcs/a/vms/web","detail":{…},"prev":"000…"}
//!      ▲ blake3 of the whole line, without its end ───────────────────────────────────────────────────────────────┐
//! {"n":2,"time":…,"what":"DeleteVm","on":"vdcs/a/vms/web","of":1,"result":"OK","detail":{},                 "prev":"5f3…"}
//! ```
//!
//! A call is *asked* in a line that is synced before anything is done, and its *result* is a later line that names the
//! first as `of`; a call without a result was under way when the daemon died. A line that is changed, moved or taken out
//! breaks the chain at the next one; that lines are missing at the end shows only to who remembers the last hash, which is
//! why [`Receipt`] carries it.
//!
//! A file of [`Limits::file_bytes_max`] is closed: it gets the name `audit-<number of its first line>.log`, and the chain
//! goes on in a new `audit.log`. Of closed files the newest [`Limits::files_max`] are kept; a line in the log says which went.
//!
//! A crash may leave half a line at the end. Nobody was told of it, so it is cut off, and the next line says so.
//!
//! Owns: the files, their names and bytes. Never: secrets, in any field; who may do what. Threads: none; appending waits
//! for the disk.
#![forbid(unsafe_code)]

mod chain;
mod log;
mod reader;

use std::{collections::BTreeMap, io, path::PathBuf};

use serde::{Deserialize, Serialize};

pub use chain::{Chain, Verified, files_of, verify};
pub use log::{AuditLog, Limits};
pub use reader::Reader;

/// The longest line; a longer one is no line of ours.
pub const LINE_BYTES_MAX: u64 = 64 << 10;
/// What the first line names as the one before.
pub const FIRST: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// The longest value in a line; longer ones are cut, so that nobody makes a line too long to be written.
const VALUE_CHARS_MAX: usize = 512;

/// Why something is not in the log.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The disk.
    #[error("cannot {what} the audit log {path}")]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The answer.
        #[source]
        source: io::Error,
    },
    /// The chain is broken.
    #[error(
        "line {line} of the audit log {path}: {why}; keep a copy of the file and find out who changed it"
    )]
    Broken {
        /// The file.
        path: PathBuf,
        /// Which line of the file, from 1.
        line: u64,
        /// What does not fit.
        why: &'static str,
    },
}

/// A line, as it is read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Counts from 1, over all files.
    pub n: u64,
    /// RFC 3339, UTC.
    pub time: String,
    /// Who asked.
    pub who: String,
    /// By which right: the role.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub role: String,
    /// What was asked for, as the API names it.
    pub what: String,
    /// Of which resource.
    pub on: String,
    /// The line of which this is the result.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of: Option<u64>,
    /// How it ended: `OK`, or the API's code with the reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<String>,
    /// What else is worth keeping: names and values.
    pub detail: BTreeMap<String, String>,
    /// blake3 of the line before, hex.
    pub prev: String,
}

/// What an action's caller may keep: with it, it can be shown that the line is in the log, or that it was taken out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// The line's number.
    pub number: u64,
    /// When.
    pub time: String,
    /// blake3 of the line, hex.
    pub hash: String,
}

/// What is to be written.
#[derive(Debug, Clone, Copy, Default)]
pub struct Action<'a> {
    /// Milliseconds since 1970.
    pub time_ms: u64,
    /// Who asked.
    pub who: &'a str,
    /// By which right.
    pub role: &'a str,
    /// What was asked for, as the API names it.
    pub what: &'a str,
    /// Of which resource.
    pub on: &'a str,
    /// The line of which this is the result.
    pub of: Option<u64>,
    /// How it ended.
    pub result: Option<&'a str>,
    /// Names and values.
    pub detail: &'a [(&'a str, &'a str)],
}

/// blake3 of a line without its end, hex.
#[must_use]
pub fn hash(line: &[u8]) -> String {
    blake3::hash(line).to_hex().to_string()
}

fn short(value: &str) -> String {
    if value.len() <= VALUE_CHARS_MAX {
        return value.to_owned();
    }
    let mut short: String = value.chars().take(VALUE_CHARS_MAX).collect();
    short.push('…');
    short
}

/// A moment as RFC 3339 in UTC, to the millisecond.
fn rfc3339(time_ms: u64) -> String {
    let form = time::macros::format_description!(
        "[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z"
    );
    let moment = time::OffsetDateTime::from_unix_timestamp_nanos(i128::from(time_ms) * 1_000_000);
    moment.ok().and_then(|moment| moment.format(form).ok()).unwrap_or_default()
}

impl Action<'_> {
    /// As the line after one.
    fn entry(&self, n: u64, prev: String) -> Entry {
        Entry {
            n,
            time: rfc3339(self.time_ms),
            who: short(self.who),
            role: short(self.role),
            what: short(self.what),
            on: short(self.on),
            of: self.of,
            result: self.result.map(short),
            detail: self
                .detail
                .iter()
                .take(32)
                .map(|(name, value)| ((*name).to_owned(), short(value)))
                .collect(),
            prev,
        }
    }
}

#[cfg(test)]
mod audit_test;
