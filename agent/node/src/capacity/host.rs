//! What the host has, read from /sys and /proc below a given root, so that tests bring recorded trees.
//!
//! Owns: the readers. Never: what is promised of it. A file that is missing or odd costs the number it would have
//! given, nothing else: hosts differ, and a capacity report must come from each.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use serio_api::v1::NetworkCard;

/// Bytes of one huge page of the kind that is reported.
const HUGE_BYTES: u64 = 2 << 20;

/// The files of a host.
#[derive(Debug, Clone)]
pub(super) struct Host {
    root: PathBuf,
}

/// Processors and memory that lie together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) id: u32,
    /// Logical processors that are online.
    pub(super) cpus: u64,
    /// All memory, that in huge pages included.
    pub(super) memory_bytes: u64,
    /// In 2 MiB pages: all, and not yet taken.
    pub(super) huge_bytes: u64,
    pub(super) huge_free_bytes: u64,
}

/// A file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Disk {
    pub(super) physical_bytes: u64,
    pub(super) used_bytes: u64,
}

impl Host {
    pub(super) fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// A file's text; `None` when it cannot be read.
    pub(super) fn read(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.root.join(path)).ok()
    }

    fn number(&self, path: &str) -> Option<u64> {
        self.read(path)?.trim().parse().ok()
    }

    fn names(&self, dir: &str) -> BTreeSet<String> {
        let entries = fs::read_dir(self.root.join(dir)).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    }

    /// The NUMA nodes, by number; one of everything on a kernel without NUMA.
    pub(super) fn nodes(&self) -> Vec<Node> {
        let names = self.names("sys/devices/system/node");
        let ids = names.iter().filter_map(|name| name.strip_prefix("node")?.parse().ok());
        let mut nodes: Vec<Node> = ids.map(|id| self.node(id)).collect();
        nodes.sort_by_key(|node| node.id);
        if nodes.is_empty() {
            let cpus = self.read("sys/devices/system/cpu/online").map_or(0, |list| count(&list));
            nodes.push(Node { cpus, memory_bytes: self.meminfo("MemTotal"), ..Node::default() });
        }
        nodes
    }

    fn node(&self, id: u32) -> Node {
        let dir = format!("sys/devices/system/node/node{id}");
        let huge = |name: &str| {
            let pages = self.number(&format!("{dir}/hugepages/hugepages-2048kB/{name}")).unwrap_or(0);
            pages.saturating_mul(HUGE_BYTES)
        };
        Node {
            id,
            cpus: self.read(&format!("{dir}/cpulist")).map_or(0, |list| count(&list)),
            memory_bytes: self
                .read(&format!("{dir}/meminfo"))
                .map_or(0, |text| kib_field(&text, "MemTotal:")),
            huge_bytes: huge("nr_hugepages"),
            huge_free_bytes: huge("free_hugepages"),
        }
    }

    /// A line of /proc/meminfo, bytes; 0 when it is not there.
    pub(super) fn meminfo(&self, name: &str) -> u64 {
        self.read("proc/meminfo").map_or(0, |text| kib_field(&text, &format!("{name}:")))
    }

    /// The cards with a device behind them: no bridges, taps or loopback.
    pub(super) fn cards(&self) -> Vec<NetworkCard> {
        let names = self.names("sys/class/net").into_iter();
        let real = names.filter(|name| self.root.join(format!("sys/class/net/{name}/device")).exists());
        real.map(|name| {
            let file = |what: &str| self.read(&format!("sys/class/net/{name}/{what}"));
            NetworkCard {
                mac: file("address").unwrap_or_default().trim().to_owned(),
                // -1, or an error, when it is not known.
                speed_mbps: self.number(&format!("sys/class/net/{name}/speed")).unwrap_or(0),
                up: file("operstate").is_some_and(|state| state.trim() == "up"),
                name,
            }
        })
        .collect()
    }

    /// The processor's name, and its feature level (x86-64 psABI, "Micro-Architecture Levels").
    pub(super) fn processor(&self) -> (String, String) {
        let text = self.read("proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = text.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
            line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim())
        };
        let flags: BTreeSet<&str> = field("flags").split_ascii_whitespace().collect();
        (field("model name").to_owned(), level(&flags).to_owned())
    }

    /// Bytes of a VMM beside guest memory: what it alone has of private and file pages. Guest memory is a memfd,
    /// which the kernel counts as shared memory.
    pub(super) fn overhead(&self, pid: u32) -> Option<u64> {
        let text = self.read(&format!("proc/{pid}/smaps_rollup"))?;
        Some(kib_field(&text, "Pss_Anon:").saturating_add(kib_field(&text, "Pss_File:")))
    }

    /// Which boot this is.
    pub(super) fn boot_id(&self) -> String {
        self.read("proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
    }
}

/// The file system that holds a directory.
pub(super) fn disk(dir: &Path) -> io::Result<Disk> {
    let stat = rustix::fs::statvfs(dir)?;
    let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
    Ok(Disk {
        physical_bytes: bytes(stat.f_blocks),
        used_bytes: bytes(stat.f_blocks.saturating_sub(stat.f_bfree)),
    })
}

/// The value of a line `[Node 0 ]Name:   123 kB`, bytes.
fn kib_field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| {
        let (_, value) =
            line.split_once(name).filter(|(before, _)| before.is_empty() || before.ends_with(' '))?;
        value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    });
    line.unwrap_or(0).saturating_mul(1024)
}

/// How many numbers a list such as `0-3,8` has.
fn count(list: &str) -> u64 {
    let ranges = list.trim().split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<u64>().ok()?, last.parse::<u64>().ok()?);
        last.checked_sub(first)?.checked_add(1)
    });
    ranges.fold(0, u64::saturating_add)
}

fn level(flags: &BTreeSet<&str>) -> &'static str {
    let has = |names: &[&str]| names.iter().all(|name| flags.contains(name));
    // As Linux names them: pni is SSE3, abm is LZCNT.
    let v2 = has(&["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"]);
    let v3 = v2 && has(&["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"]);
    let v4 = v3 && has(&["avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"]);
    match (v2, v3, v4) {
        (_, _, true) => "x86-64-v4",
        (_, true, _) => "x86-64-v3",
        (true, _, _) => "x86-64-v2",
        _ => "x86-64-v1",
    }
}
