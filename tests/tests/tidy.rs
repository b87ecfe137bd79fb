//! The source tree keeps the sizes of STYLE rule 2, and what is exempt only becomes less.
#![forbid(unsafe_code)]

use std::{path::Path, process::Command};

use serio_tests::sizes::{judge, measure};

#[test]
fn sizes_are_kept() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace");
    let listed = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .expect("git runs");
    assert!(listed.status.success(), "git ls-files failed");
    let mut findings = Vec::new();
    for path in String::from_utf8(listed.stdout).expect("paths are text").lines() {
        let script = (path.starts_with("scripts/") || path.starts_with("images/"))
            && !path.ends_with(".md")
            && !path.ends_with(".lock");
        if !(script || path.ends_with(".rs")) {
            continue;
        }
        // A file that is listed but gone was just deleted; one that is no text has no lines.
        if let Ok(text) = std::fs::read_to_string(root.join(path)) {
            findings.extend(measure(path, &text));
        }
    }
    let allow_list =
        std::fs::read_to_string(root.join("tests/tidy-allow.txt")).expect("tests/tidy-allow.txt is there");
    let complaints = judge(&findings, &allow_list);
    assert!(complaints.is_empty(), "too large (STYLE rule 2):\n  {}\n", complaints.join("\n  "));
}
