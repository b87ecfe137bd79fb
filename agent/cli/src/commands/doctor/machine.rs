//! The checks of this machine. Each reads, opens or asks; none changes anything. What is judged from text is a pure
//! function beside its check.

use std::{
    fs::{self, OpenOptions},
    io,
    path::Path,
    process::Command,
};

use kvm_ioctls::{Cap, Kvm};
use rustix::{
    fs::{AtFlags, Mode, OFlags, StatxFlags, open, statvfs, statx},
    process::{Resource, getrlimit},
};

use super::Check;
use crate::output;

/// What a machine without hardware virtualization means.
pub(super) const SOFTWARE_KVM: &str = "stock Linux kernels do not boot on this KVM: use a machine with vmx or svm, or try things in a testbed (scripts/testbed)";

/// The only version of KVM's interface there is.
const KVM_API_VERSION: i32 = 12;
/// Bit of CAP_NET_ADMIN (capability.h).
const CAP_NET_ADMIN: u32 = 12;
const DISK_BYTES_FAIL: u64 = 1 << 30;
const DISK_BYTES_WARN: u64 = 10 << 30;
/// A node opens a few dozen descriptors for each VM.
const NOFILE_WARN: u64 = 4096;
/// io_uring of older kernels accounts its rings there.
const MEMLOCK_BYTES_WARN: u64 = 8 << 20;

/// All of them, in the order in which one would fix them.
pub(super) fn all(state_dir: &Path) -> Vec<Check> {
    let mut checks = vec![
        kvm(),
        cgroup(),
        tap(),
        bridge(),
        vhost_net(),
        io_uring(),
        disk(state_dir),
        direct_io(state_dir),
        clock(),
    ];
    checks.extend(limits());
    checks
}

fn kvm() -> Check {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return kvm_absent(&io::Error::from_raw_os_error(error.errno())),
    };
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION {
        return Check::fail(
            "kvm",
            format!("API version {version}, not {KVM_API_VERSION}"),
            "run a kernel from this side of 2007",
        );
    }
    let needed = [
        (Cap::Irqchip, "irqchip"),
        (Cap::Irqfd, "irqfd"),
        (Cap::IrqRouting, "irq routing"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::IoeventfdNoLength, "ioeventfd of any width"),
        (Cap::UserMemory, "user memory"),
        (Cap::ImmediateExit, "immediate exit"),
    ];
    let missing: Vec<&str> =
        needed.into_iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| name).collect();
    if !missing.is_empty() {
        return Check::fail(
            "kvm",
            format!("/dev/kvm lacks {}", missing.join(", ")),
            "run Debian 12's kernel or a newer one",
        );
    }
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    match kind(&cpuinfo, Path::new("/sys/module/kvm_pvm").exists()) {
        Kind::Hardware(flag) => {
            Check::ok("kvm", format!("{flag}, API {version}, all that is needed is there"))
        }
        Kind::Software(name) => {
            Check::warn("kvm", format!("{name}, API {version}, no hardware virtualization"), SOFTWARE_KVM)
        }
    }
}

fn kvm_absent(error: &io::Error) -> Check {
    let found = format!("cannot open /dev/kvm: {error}");
    match error.kind() {
        io::ErrorKind::NotFound => Check::fail(
            "kvm",
            found,
            "modprobe kvm_intel or kvm_amd; if that fails, switch virtualization on in the firmware (or nested, in the hypervisor above)",
        ),
        io::ErrorKind::PermissionDenied => {
            Check::warn("kvm", found, "the agent runs as root and may; run doctor as root to be sure")
        }
        _ => Check::fail("kvm", found, "see `dmesg | grep -i kvm`"),
    }
}

/// Who runs guest code.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    /// The processor: "svm" or "vmx".
    Hardware(&'static str),
    /// The kernel.
    Software(&'static str),
}

fn kind(cpuinfo: &str, pvm: bool) -> Kind {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    match ["svm", "vmx"].into_iter().find(|flag| flags.split_whitespace().any(|f| f == *flag)) {
        Some(flag) => Kind::Hardware(flag),
        None if pvm => Kind::Software("software (pvm)"),
        None => Kind::Software("software"),
    }
}

fn cgroup() -> Check {
    let remedy = "VMs run, but without limits of their own: boot with systemd.unified_cgroup_hierarchy=1";
    match fs::read_to_string("/sys/fs/cgroup/cgroup.controllers") {
        Ok(controllers) => {
            let missing: Vec<&str> = ["cpu", "memory", "io"]
                .into_iter()
                .filter(|want| !controllers.split_whitespace().any(|c| c == *want))
                .collect();
            if missing.is_empty() {
                return Check::ok("cgroup", format!("v2: {}", controllers.trim()));
            }
            let found = format!("v2 without the controllers {}", missing.join(", "));
            Check::warn(
                "cgroup",
                found,
                "VMs run, but without those shares and limits of their vdcs: give the controllers to the hierarchy where the agent runs",
            )
        }
        Err(_) if Path::new("/sys/fs/cgroup/unified").exists() => {
            Check::warn("cgroup", "hybrid: v2 has no controllers", remedy)
        }
        Err(_) => Check::warn("cgroup", "no v2 hierarchy at /sys/fs/cgroup", remedy),
    }
}

fn tap() -> Check {
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        let found = format!("cannot open /dev/net/tun: {error}");
        return match error.kind() {
            io::ErrorKind::PermissionDenied => {
                Check::warn("tap", found, "the agent runs as root and may; run doctor as root to be sure")
            }
            _ => Check::fail("tap", found, "modprobe tun"),
        };
    }
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    if has_capability(&status, CAP_NET_ADMIN) {
        return Check::ok("tap", "/dev/net/tun opens, and network devices may be made");
    }
    Check::warn(
        "tap",
        "/dev/net/tun opens; making devices wants CAP_NET_ADMIN",
        "the agent has it; run doctor as root to be sure",
    )
}

/// Whether `/proc/self/status` shows the capability as effective.
fn has_capability(status: &str, bit: u32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    mask.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_some_and(|mask| mask >> bit & 1 == 1)
}

/// A module that is loaded, built in, or can be loaded.
fn module(name: &str) -> Option<&'static str> {
    if Path::new("/sys/module").join(name).exists() {
        return Some("loaded");
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let folder = Path::new("/lib/modules").join(release.trim());
    // Module files are spelled with - or _ alike.
    let listed = |file: &str| {
        let text = fs::read_to_string(folder.join(file)).unwrap_or_default().replace('-', "_");
        text.contains(&format!("/{name}.ko"))
    };
    if listed("modules.builtin") {
        return Some("built in");
    }
    listed("modules.dep").then_some("can be loaded")
}

fn bridge() -> Check {
    match module("bridge") {
        Some(how) => Check::ok("bridge", format!("the module is {how}").replace("is can", "can")),
        None => Check::fail(
            "bridge",
            "the kernel has no bridge module",
            "modprobe bridge, or run a kernel that has it (CONFIG_BRIDGE)",
        ),
    }
}

fn vhost_net() -> Check {
    if Path::new("/dev/vhost-net").exists() {
        return Check::ok("vhost_net", "/dev/vhost-net is there");
    }
    Check::warn(
        "vhost_net",
        "no /dev/vhost-net: networks work, with more processor time",
        "modprobe vhost_net (optional)",
    )
}

fn io_uring() -> Check {
    let error = match io_uring::IoUring::new(2) {
        Ok(_) => return Check::ok("io_uring", "allowed"),
        Err(error) => error,
    };
    let disabled = fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let remedy = match disabled.trim() {
        "1" | "2" => "sysctl -w kernel.io_uring_disabled=0",
        _ => "run a kernel with io_uring, and let no seccomp profile forbid it",
    };
    Check::warn("io_uring", format!("refused ({error}): disks work, slower"), remedy)
}

/// Before the first start the folder is not there yet: the one above it tells.
fn existing(state_dir: &Path) -> &Path {
    state_dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

/// Whether volumes could go past the page cache there, and in which steps. A file without a name is asked, which leaves nothing.
fn direct_io(state_dir: &Path) -> Check {
    let existing = existing(state_dir);
    let asked = open(existing, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)
        .and_then(|file| statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN));
    let found = match asked {
        Ok(told) if told.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
            judge_direct_io(told.stx_dio_mem_align, told.stx_dio_offset_align)
        }
        Ok(_) => "the kernel does not say".into(),
        Err(error) => format!("cannot ask in {}: {error}", existing.display()),
    };
    Check::ok("direct_io", found)
}

fn judge_direct_io(memory: u32, offset: u32) -> String {
    match (memory, offset) {
        (0, _) | (_, 0) => "not on this file system: volumes go through the page cache".into(),
        (..=512, ..=512) => format!("possible, at multiples of {offset} bytes, from memory at {memory}"),
        _ => format!(
            "only at multiples of {offset} bytes, from memory at {memory}: volumes go through the page cache"
        ),
    }
}

fn disk(state_dir: &Path) -> Check {
    let existing = existing(state_dir);
    match statvfs(existing) {
        Ok(fs) => {
            let unit = fs.f_frsize.max(1);
            judge_disk(state_dir, fs.f_bavail.saturating_mul(unit), fs.f_blocks.saturating_mul(unit))
        }
        Err(error) => Check::fail(
            "disk",
            format!("cannot ask {}: {error}", existing.display()),
            "name the right folder with --state-dir",
        ),
    }
}

fn judge_disk(state_dir: &Path, free: u64, total: u64) -> Check {
    let found = format!("{} free of {} for {}", output::size(free), output::size(total), state_dir.display());
    match free {
        0..DISK_BYTES_FAIL => {
            Check::fail("disk", found, "free some space, or move state_dir (seriod.toml) to a larger disk")
        }
        DISK_BYTES_FAIL..DISK_BYTES_WARN => {
            Check::warn("disk", found, "images and volumes soon need more: a larger disk for state_dir")
        }
        _ => Check::ok("disk", found),
    }
}

/// Leases, certificates and recovery points want a clock that is right. The time daemons say so; the kernel's own answer
/// (adjtimex) comes by way of timedatectl.
fn clock() -> Check {
    if Path::new("/run/systemd/timesync/synchronized").exists() {
        return Check::ok("clock", "synchronised (systemd-timesyncd)");
    }
    let said = |program: &str, args: &[&str]| {
        Command::new(program)
            .args(args)
            .output()
            .ok()
            .filter(|o| o.status.success())
            .map(|o| String::from_utf8_lossy(&o.stdout).into_owned())
    };
    let timedatectl = said("timedatectl", &["show", "--property=NTPSynchronized", "--value"]);
    let chrony = said("chronyc", &["-c", "-n", "tracking"]);
    judge_clock(timedatectl.as_deref(), chrony.as_deref())
}

fn judge_clock(timedatectl: Option<&str>, chrony: Option<&str>) -> Check {
    let remedy = "run a time daemon: apt install chrony, or systemctl enable --now systemd-timesyncd";
    // The last field of chrony's CSV is the leap status.
    if chrony.and_then(|csv| csv.trim().rsplit(',').next()).is_some_and(|leap| leap == "Normal") {
        return Check::ok("clock", "synchronised (chrony)");
    }
    match timedatectl.map(str::trim) {
        Some("yes") => Check::ok("clock", "synchronised"),
        Some("no") => Check::warn("clock", "not synchronised", remedy),
        _ => Check::warn("clock", "nothing here says that it is synchronised", remedy),
    }
}

fn limits() -> [Check; 2] {
    let hard = |resource| getrlimit(resource).maximum;
    [judge_nofile(hard(Resource::Nofile)), judge_memlock(hard(Resource::Memlock))]
}

/// `None` is no limit.
fn judge_nofile(limit: Option<u64>) -> Check {
    match limit {
        Some(files) if files < NOFILE_WARN => Check::warn(
            "nofile",
            format!("{files} open files at most"),
            "LimitNOFILE=65536 in the agent's unit, or ulimit -n",
        ),
        Some(files) => Check::ok("nofile", format!("{files} open files at most")),
        None => Check::ok("nofile", "no limit"),
    }
}

fn judge_memlock(limit: Option<u64>) -> Check {
    match limit {
        Some(bytes) if bytes < MEMLOCK_BYTES_WARN => Check::warn(
            "memlock",
            format!("{} of locked memory at most", output::size(bytes)),
            "LimitMEMLOCK=infinity in the agent's unit, or ulimit -l",
        ),
        Some(bytes) => Check::ok("memlock", format!("{} of locked memory at most", output::size(bytes))),
        None => Check::ok("memlock", "no limit"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn kinds_of_kvm() {
        assert_eq!(kind("processor : 0\nflags : fpu svm sse\n", false), Kind::Hardware("svm"));
        assert_eq!(kind("flags\t: fpu vmx\n", true), Kind::Hardware("vmx"));
        assert_eq!(kind("flags : fpu svmx\n", true), Kind::Software("software (pvm)"));
        assert_eq!(kvm_absent(&io::Error::from(io::ErrorKind::NotFound)).level, Level::Fail);
        assert_eq!(kvm_absent(&io::Error::from(io::ErrorKind::PermissionDenied)).level, Level::Warn);
    }

    #[test]
    fn capabilities() {
        assert!(has_capability("Name:\tx\nCapEff:\t000001ffffffffff\n", CAP_NET_ADMIN));
        assert!(!has_capability("CapEff:\t0000000000000000\n", CAP_NET_ADMIN));
        assert!(!has_capability("", CAP_NET_ADMIN));
    }

    #[test]
    fn space_clock_and_limits() {
        let dir = Path::new("/var/lib/serio");
        assert_eq!(judge_disk(dir, 1, 1 << 40).level, Level::Fail);
        assert_eq!(judge_disk(dir, 2 << 30, 1 << 40).level, Level::Warn);
        assert_eq!(judge_disk(dir, 20 << 30, 1 << 40).level, Level::Ok);
        assert!(judge_direct_io(4, 512).starts_with("possible"));
        assert!(judge_direct_io(0, 0).starts_with("not") && judge_direct_io(4096, 4096).starts_with("only"));
        assert_eq!(judge_clock(Some("yes\n"), None).level, Level::Ok);
        assert_eq!(judge_clock(Some("no\n"), None).level, Level::Warn);
        assert_eq!(judge_clock(Some("no\n"), Some("A29FC87B,1.2.3.4,3,0.1,Normal\n")).level, Level::Ok);
        assert_eq!(judge_clock(None, Some("7F7F0101,,0,0,Not synchronised\n")).level, Level::Warn);
        assert_eq!(judge_nofile(Some(1024)).level, Level::Warn);
        assert_eq!(judge_nofile(None).level, Level::Ok);
        assert_eq!(judge_memlock(Some(64 << 10)).level, Level::Warn);
    }

    #[test]
    fn every_line_that_is_not_ok_has_a_remedy() {
        for check in all(Path::new("/var/lib/serio")) {
            assert_eq!(check.level == Level::Ok, check.remedy.is_empty(), "{check:?}");
        }
    }
}
