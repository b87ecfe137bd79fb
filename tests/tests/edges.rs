//! Dependencies between the crates run downward only, and what must not be linked somewhere is not.
//!
//! The edges are those of DESIGN.md ("Repository"). Seen over `cargo metadata`: normal dependencies only, so that a test may
//! borrow what the product may not.
#![forbid(unsafe_code)]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    process::Command,
};

use serde_json::Value;

/// What each crate of the workspace may depend on directly. One that is not listed here fails the test.
const ALLOWED: &[(&str, &[&str])] = &[
    ("serio-api", &[]),
    ("serio-archive", &[]),
    ("serio-audit", &[]),
    ("serio-types", &[]),
    ("serio-hv", &[]),
    ("serio-control", &["serio-types"]),
    ("serio-sandbox", &[]),
    ("serio-virtio", &["serio-hv"]),
    ("serio-volume", &["serio-sandbox", "serio-types"]),
    ("serio-devices", &["serio-virtio", "serio-volume", "serio-hv", "serio-sandbox", "serio-types"]),
    ("serio-nbd", &["serio-types"]),
    ("serio-formats", &["serio-nbd"]),
    ("serio-bootdisk", &[]),
    (
        "serio-vmm",
        &[
            "serio-control",
            "serio-devices",
            "serio-hv",
            "serio-sandbox",
            "serio-types",
            "serio-virtio",
            "serio-volume",
        ],
    ),
    (
        "serio-volumed",
        &[
            "serio-bootdisk",
            "serio-control",
            "serio-formats",
            "serio-nbd",
            "serio-sandbox",
            "serio-types",
            "serio-volume",
        ],
    ),
    ("serio-vdc", &["serio-types"]),
    ("serio-store", &["serio-types"]),
    (
        "serio-node",
        &[
            "serio-api",
            "serio-archive",
            "serio-audit",
            "serio-control",
            "serio-nbd",
            "serio-sandbox",
            "serio-store",
            "serio-types",
            "serio-vdc",
        ],
    ),
    ("serio-scheduler", &["serio-api", "serio-store", "serio-types", "serio-vdc"]),
    ("serio-cli", &["serio-api", "serio-audit", "serio-formats", "serio-nbd", "serio-types"]),
    ("serio-tests", &["serio-api", "serio-control", "serio-types"]),
];

/// Crates that must not be reachable from a crate, with the reason.
const FORBIDDEN: &[(&str, &[&str], &str)] = &[
    (
        "serio-vmm",
        &["tokio", "tonic", "hyper", "serio-api"],
        "the VMM has threads and epoll, no async runtime",
    ),
    (
        "serio-volumed",
        &["tokio", "tonic", "hyper", "serio-api"],
        "it runs the VMM's volume code in the VMM's way",
    ),
    (
        "serio-node",
        &["serio-hv", "serio-devices", "serio-volume", "serio-vmm"],
        "seriod holds no guest memory and no volume bytes",
    ),
    ("serio-scheduler", &["serio-hv", "serio-volume", "serio-node"], "it plans, the node acts"),
    (
        "serio-cli",
        &["serio-node", "serio-store", "serio-hv"],
        "the CLI talks gRPC, and NBD to exports that it asked for",
    ),
    ("serio-types", &["tokio", "nix"], "types do no I/O"),
];

struct Graph {
    /// Direct normal dependencies by package name.
    edges: BTreeMap<String, BTreeSet<String>>,
    members: BTreeSet<String>,
}

fn graph() -> Graph {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace");
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--locked",
            "--filter-platform",
            "x86_64-unknown-linux-gnu",
        ])
        .current_dir(root)
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let list = |value: &Value| value.as_array().expect("a list").clone();
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let names: BTreeMap<String, String> =
        list(&metadata["packages"]).iter().map(|p| (text(&p["id"]), text(&p["name"]))).collect();
    let members = list(&metadata["workspace_members"]).iter().map(|id| names[&text(id)].clone()).collect();
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for node in list(&metadata["resolve"]["nodes"]) {
        let from = edges.entry(names[&text(&node["id"])].clone()).or_default();
        for dependency in list(&node["deps"]) {
            // Kind null is a normal dependency; "dev" and "build" are not linked into the product.
            if list(&dependency["dep_kinds"]).iter().any(|kind| kind["kind"].is_null()) {
                from.insert(names[&text(&dependency["pkg"])].clone());
            }
        }
    }
    Graph { edges, members }
}

#[test]
fn edges_run_downward() {
    let graph = graph();
    let mut wrong = Vec::new();
    for member in &graph.members {
        let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| name == member) else {
            wrong.push(format!("{member} is not listed in tests/tests/edges.rs"));
            continue;
        };
        for dependency in graph.edges[member].iter().filter(|name| graph.members.contains(*name)) {
            if !allowed.contains(&dependency.as_str()) {
                wrong.push(format!("{member} must not depend on {dependency}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_must_not_be_linked_is_not() {
    let graph = graph();
    for (from, forbidden, reason) in FORBIDDEN {
        let path = BTreeMap::from([((*from).to_owned(), None)]);
        let reached = reach(&graph, path);
        for name in *forbidden {
            if reached.contains_key(*name) {
                panic!("{from} links {name}: {}; {reason}", chain(&reached, name));
            }
        }
    }
}

/// All that is reachable, each with the package through which it was found first.
fn reach(graph: &Graph, mut found: BTreeMap<String, Option<String>>) -> BTreeMap<String, Option<String>> {
    let mut open: Vec<String> = found.keys().cloned().collect();
    while let Some(package) = open.pop() {
        for dependency in graph.edges.get(&package).into_iter().flatten() {
            if !found.contains_key(dependency) {
                found.insert(dependency.clone(), Some(package.clone()));
                open.push(dependency.clone());
            }
        }
    }
    found
}

fn chain(found: &BTreeMap<String, Option<String>>, name: &str) -> String {
    let mut names = vec![name.to_owned()];
    while let Some(Some(parent)) = found.get(names.last().expect("never empty")) {
        names.push(parent.clone());
    }
    names.reverse();
    names.join(" → ")
}
