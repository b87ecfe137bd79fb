//! Volumes of a testbed host as tests look at them: exported and copied by a stranger's tool, or found on the host's disk.

use std::fs;

use serde_json::Value;

use crate::bed::{Host, run};

/// A number of the API's JSON, which writes 64 bits as text.
#[must_use]
pub fn number(value: &Value) -> u64 {
    value.as_u64().or_else(|| value.as_str()?.parse().ok()).unwrap_or(0)
}

/// The folder of a volume on its host.
#[track_caller]
pub fn folder(host: &Host, volume: &str) -> String {
    let shown = host.json(&["volume", "show", volume]);
    format!("/var/lib/serio/volumes/{}", shown["uid"].as_str().expect("a volume has a uid"))
}

/// `serio volume export` with these arguments: the URI.
#[track_caller]
pub fn export(host: &Host, args: &[&str]) -> String {
    let printed = host.serio(&[&["volume", "export"], args].concat()).ok();
    printed.split_whitespace().find(|word| word.starts_with("nbd")).expect("an NBD URI is printed").to_owned()
}

/// Ends all exports of the host.
#[track_caller]
pub fn unexport_all(host: &Host) {
    for export in host.json(&["volume", "exports"]).as_array().into_iter().flatten() {
        host.serio(&["volume", "unexport", export["name"].as_str().expect("an export has a name")]).ok();
    }
}

/// The bytes of what `serio volume export` with these arguments offers.
#[track_caller]
pub fn copy(host: &Host, args: &[&str]) -> Vec<u8> {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let copy = folder.path().join("copy");
    run(host.command("nbdcopy").arg(export(host, args)).arg(&copy)).ok();
    unexport_all(host);
    fs::read(copy).expect("the copy can be read")
}
