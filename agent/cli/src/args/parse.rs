//! Value parsers: texts that a person types, into types. Resource names of the API are understood too, since people
//! paste them from JSON output: `vdcs/ardesio/vms/web` is `ardesio/web`.

use std::{str::FromStr, time::Duration};

use serio_types::{Name, SnapshotName, VdcName};

/// A length of time: `500ms`, `30s`, `5m`, `2h`; a bare number is seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seconds(pub Duration);

impl FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let malformed = || format!("`{text}` is not a time: write 500ms, 30s, 5m or 2h");
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(end);
        let number: u64 = number.parse().map_err(|_| malformed())?;
        let milliseconds: u64 = match unit {
            "ms" => 1,
            "" | "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(malformed()),
        };
        number.checked_mul(milliseconds).map(|ms| Self(Duration::from_millis(ms))).ok_or_else(malformed)
    }
}

/// `ardesio`, or `vdcs/ardesio`.
pub fn vdc_name(text: &str) -> Result<Name, String> {
    bare(text, "vdcs/")
}

/// `tiny`, or `images/tiny`.
pub fn image_name(text: &str) -> Result<Name, String> {
    bare(text, "images/")
}

fn bare(text: &str, collection: &str) -> Result<Name, String> {
    text.strip_prefix(collection).unwrap_or(text).parse().map_err(|e: serio_types::NameError| e.to_string())
}

/// `ardesio/web`, or `vdcs/ardesio/vms/web` (and so for volumes).
pub fn in_vdc(text: &str) -> Result<VdcName, String> {
    let parts: Vec<&str> = text.split('/').collect();
    let short = match parts.as_slice() {
        ["vdcs", vdc, "vms" | "volumes", name] => format!("{vdc}/{name}"),
        _ => text.to_owned(),
    };
    short.parse().map_err(|e: serio_types::NameError| e.to_string())
}

/// `ardesio/web-root@before`, or `vdcs/ardesio/volumes/web-root/snapshots/before` (and so for VMs).
pub fn snapshot_name(text: &str) -> Result<SnapshotName, String> {
    let of_vm = |(volume, snapshot)| SnapshotName { volume, snapshot };
    let pasted = serio_types::resource::parse_snapshot(text)
        .or_else(|_| serio_types::resource::parse_vm_snapshot(text).map(of_vm));
    match pasted {
        Ok(name) => Ok(name),
        Err(_) => text.parse().map_err(|e: serio_types::NameError| e.to_string()),
    }
}
