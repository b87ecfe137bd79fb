//! Whether the kernel killed a process because memory ran out: the signal alone does not say who sent it.

use std::{fs, path::Path};

/// Processes that the kernel has killed for want of memory since the host's boot; 0 where it does not count them.
pub(super) fn kills() -> u64 {
    fs::read_to_string("/proc/vmstat").map_or(0, |text| counter(&text, "oom_kill"))
}

/// The number behind a name, in `/proc/vmstat` or `memory.events` (Documentation/admin-guide/cgroup-v2.rst).
fn counter(text: &str, name: &str) -> u64 {
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok();
    text.lines().find_map(value).unwrap_or(0)
}

/// Why a process that ended by SIGKILL did so, if it was for want of memory: its cgroup says it for sure; without one, that the
/// host has killed somebody since `before` was counted.
pub(super) fn why_killed(group: Option<&Path>, before: u64) -> Option<String> {
    let events = group.and_then(|group| fs::read_to_string(group.join("memory.events")).ok());
    let advice = "see the kernel's log (`dmesg | grep -i oom`); give the vdc more memory, or move VMs away";
    match events {
        Some(events) if counter(&events, "oom_kill") > 0 => {
            Some(format!("was killed by the kernel: memory ran out, its vdc's or the host's; {advice}"))
        }
        Some(_) => None,
        None if kills() > before => {
            Some(format!("was killed while the host's memory ran out, by the kernel as it seems; {advice}"))
        }
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_tells_for_sure() {
        let dir = tempfile::tempdir().unwrap();
        let group = Some(dir.path());
        let events = |text: &str| fs::write(dir.path().join("memory.events"), text).unwrap();
        events("low 0\nhigh 0\nmax 12\noom 3\noom_kill 0\noom_group_kill 4\n");
        assert_eq!(why_killed(group, 0), None, "that of another one");
        events("low 0\nmax 12\noom 3\noom_kill 1\n");
        assert!(why_killed(group, u64::MAX).unwrap().contains("memory ran out"));
        events("nothing that is known");
        assert_eq!(why_killed(group, 0), None);
    }

    #[test]
    fn without_one_the_host_is_asked() {
        assert_eq!(why_killed(None, u64::MAX), None);
        assert_eq!(counter("oom_kill 7\noom_killer 8\n", "oom_kill"), 7);
    }
}
