//! The command line, as typed. What it means is found out in `run` and `agent`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serio_devices::limit::{Limits, Rate};
use serio_hv::{Baseline, PageKind};
use serio_types::ByteSize;

use crate::machine::WatchdogAction;

const EXAMPLES: &str = "\
Examples:
  A stock kernel with its initrd, the console on this terminal (ctrl-A x ends it):
    serio-vmm run --kernel vmlinuz --initrd initrd.img --memory 256MiB --cpus 1 \\
                  --cmdline \"console=ttyS0 root=/dev/vda1\" --disk disk.raw --net tap0
  (On a terminal, ctrl-A p presses the power button. When all files are open the process seals itself: another user if root
  starts it, an empty root, no network, system-call filters.)
  A second disk that the guest cannot write:
    serio-vmm run --kernel vmlinuz --memory 1GiB --cpus 2 --disk disk.raw --disk seed.img,readonly

Exit codes: 0 the guest powered off, 1 anything else that ended it or kept it from starting, 2 wrong usage.";

/// Runs one virtual machine on KVM.
#[derive(Debug, Parser)]
#[command(name = "serio-vmm", version, after_help = EXAMPLES, max_term_width = 110)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The two ways to be started.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs a VM with its serial console on this terminal, for development
    #[command(after_help = EXAMPLES)]
    Run(RunArgs),
    /// Runs a VM for seriod: everything comes by descriptor over a control socket
    Agent(AgentArgs),
}

/// `serio-vmm run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Kernel: bzImage (vmlinuz) or vmlinux. One that lies on the disk is found by `serio vm run` only
    #[arg(long, value_name = "FILE")]
    pub kernel: PathBuf,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0", allow_hyphen_values = true)]
    pub cmdline: String,
    /// Guest memory, such as 256MiB or 4GiB
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    pub memory: ByteSize,
    /// Number of vcpus
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=254))]
    pub cpus: u32,
    /// What the guest's processors show: host, or x86-64-v2 or x86-64-v3, so that unlike hosts look alike
    #[arg(long, value_name = "BASELINE", default_value_t = Baseline::Host)]
    pub cpu: Baseline,
    /// The host's pages behind the memory: 4KiB, or 2MiB or 1GiB from its pool of huge pages
    #[arg(long, value_name = "SIZE", default_value = "4KiB", value_parser = parse_pages)]
    pub pages: PageKind,
    /// A disk: a raw file or a block device; again for more, in the order vda, vdb, …
    #[arg(long = "disk", value_name = "FILE[,readonly][,iops=N][,bandwidth=SIZE]")]
    pub disks: Vec<DiskArg>,
    /// A network card on this tap device, which exists and may be opened; again for more. One that was made with `multi_queue` gives
    /// it a queue pair for each vcpu, up to four. Where the host has vhost-net and the card no limits, the kernel moves its packets by
    /// itself, unless `novhost` says no
    #[arg(long = "net", value_name = "TAP[,mac=MAC][,packets=N][,bandwidth=SIZE][,novhost]")]
    pub nets: Vec<NetArg>,
    /// A virtio console (hvc0 in Linux) on this pseudo-terminal, pipe or file
    #[arg(long, value_name = "FILE")]
    pub console: Option<PathBuf>,
    /// Stream connections between the guest, whose address is CID (3 or more), and Unix sockets: clients connect to PATH
    /// and write "CONNECT PORT"; the guest's connections to port N go to PATH_N. The process does not seal itself then
    #[arg(long, value_name = "CID,PATH")]
    pub vsock: Option<VsockArg>,
    /// Do not pass standard input to the guest's serial port
    #[arg(long)]
    pub no_serial_input: bool,
    /// What a reset by the guest does
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = OnReset::Reboot)]
    pub on_reset: OnReset,
    /// What happens to a guest that started its watchdog and does not pet it
    #[arg(long, value_name = "WHAT", value_enum, default_value_t = WatchdogAction::Reset)]
    pub watchdog: WatchdogAction,
}

/// `serio-vmm agent`.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Descriptor of a listening Unix socket on which requests come
    #[arg(long, value_name = "N")]
    pub control_fd: i32,
    /// It becomes the user and group of this number plus its process number, nobody else's on this host; 0: it does not
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub first_uid: u32,
}

/// What a reset by the guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OnReset {
    /// Boots again
    Reboot,
    /// Ends the VM, as a power-off does
    Exit,
}

/// `FILE[,readonly][,iops=N][,bandwidth=SIZE]`: requests and bytes a second.
fn parse_pages(text: &str) -> Result<PageKind, String> {
    let bytes = text.parse::<ByteSize>().map_err(|error| error.to_string())?.bytes();
    PageKind::of_bytes(bytes).ok_or_else(|| format!("`{text}`: pages are of 4KiB, 2MiB or 1GiB"))
}

/// `FILE[,readonly]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskArg {
    /// The file or device.
    pub path: PathBuf,
    /// The guest cannot write.
    pub read_only: bool,
    /// What it may do.
    pub limits: Limits,
}

/// Takes a last `,iops=N` (or what counts operations here) or `,bandwidth=SIZE` off; `None`: there is none.
fn take_limit<'a>(text: &'a str, operations: &str, limits: &mut Limits) -> Result<Option<&'a str>, String> {
    let Some((rest, last)) = text.rsplit_once(',') else { return Ok(None) };
    let rate = |per_second: u64| Rate { per_second, burst: 0 };
    if let Some(number) = last.strip_prefix("bandwidth=") {
        let size = number.parse::<ByteSize>().map_err(|error| format!("bandwidth: {error}"))?;
        limits.bytes = rate(size.bytes());
    } else if let Some(number) = last.strip_prefix(operations).and_then(|rest| rest.strip_prefix('=')) {
        let number = number.parse().map_err(|_| format!("{operations}: `{number}` is no number"))?;
        limits.operations = rate(number);
    } else {
        return Ok(None);
    }
    Ok(Some(rest))
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<DiskArg, String> {
        let (mut path, mut read_only, mut limits) = (text, false, Limits::default());
        loop {
            if let Some(rest) = path.strip_suffix(",readonly") {
                (path, read_only) = (rest, true);
            } else if let Some(rest) = take_limit(path, "iops", &mut limits)? {
                path = rest;
            } else {
                break;
            }
        }
        if path.is_empty() {
            return Err("no file name: write FILE or FILE,readonly".to_owned());
        }
        Ok(DiskArg { path: path.into(), read_only, limits })
    }
}

/// `CID,PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VsockArg {
    /// The guest's address.
    pub cid: u32,
    /// The listening socket, which is made.
    pub path: PathBuf,
}

impl FromStr for VsockArg {
    type Err = String;

    fn from_str(text: &str) -> Result<VsockArg, String> {
        let (cid, path) = text.split_once(',').ok_or("write CID,PATH, such as 3,/run/vm.vsock")?;
        match cid.parse() {
            Ok(cid @ 3..=0xffff_fffe) if !path.is_empty() => Ok(VsockArg { cid, path: path.into() }),
            _ => Err(format!("`{text}`: a guest's address is 3 to 4294967294, and a path follows")),
        }
    }
}

/// `TAP[,mac=MAC][,packets=N][,bandwidth=SIZE][,novhost]`: packets and bytes a second in each direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetArg {
    /// The tap device's name.
    pub tap: String,
    /// The card's address; without one it follows from the name, so that it stays the same.
    pub mac: [u8; 6],
    /// What it may do, in each direction.
    pub limits: Limits,
    /// Whether the kernel may move its packets by itself, where it can.
    pub vhost: bool,
}

impl FromStr for NetArg {
    type Err = String;

    fn from_str(text: &str) -> Result<NetArg, String> {
        let (text, vhost) = match text.strip_suffix(",novhost") {
            Some(rest) => (rest, false),
            None => (text, true),
        };
        let (mut text, mut limits) = (text, Limits::default());
        while let Some(rest) = take_limit(text, "packets", &mut limits)? {
            text = rest;
        }
        let (tap, mac) = match text.split_once(",mac=") {
            Some((tap, mac)) => (tap, Some(mac)),
            None => (text, None),
        };
        // IFNAMSIZ is 16 with its end mark.
        if tap.is_empty() || tap.len() > 15 || tap.contains(['/', ',']) || tap.contains(char::is_whitespace) {
            return Err(format!("`{tap}` is no device name: 1 to 15 characters without / and , and blanks"));
        }
        let mac = match mac {
            Some(mac) => parse_mac(mac)?,
            None => mac_of(tap),
        };
        Ok(NetArg { tap: tap.to_owned(), mac, limits, vhost })
    }
}

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("`{text}` is no MAC address of one card: write it like 52:54:00:12:34:56");
    let mut mac = [0u8; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    let multicast = mac.first().is_some_and(|first| first & 1 != 0);
    if parts.next().is_some() || multicast { Err(wrong()) } else { Ok(mac) }
}

/// A locally administered address from a name (FNV-1a).
fn mac_of(name: &str) -> [u8; 6] {
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let [a, b, c, ..] = hash.to_le_bytes();
    [0x52, 0x54, 0x00, a, b, c]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    fn run(args: &[&str]) -> Result<RunArgs, clap::Error> {
        let all = ["serio-vmm", "run"].iter().chain(args);
        match Cli::try_parse_from(all)?.command {
            Command::Run(run) => Ok(run),
            Command::Agent(_) => unreachable!("run was typed"),
        }
    }

    #[test]
    fn what_the_readme_types_is_understood() {
        let args = run(&[
            "--kernel",
            "k",
            "--initrd",
            "i",
            "--cmdline",
            "console=ttyS0 -- a=b",
            "--memory",
            "256MiB",
            "--cpus",
            "2",
            "--disk",
            "a.raw",
            "--disk",
            "b,c.raw,readonly",
            "--net",
            "tap0",
            "--net",
            "tap1,mac=02:00:00:00:00:01",
            "--on-reset",
            "exit",
        ])
        .expect("understood");
        assert_eq!(args.memory.bytes(), 256 << 20);
        assert_eq!(
            args.disks[0],
            DiskArg { path: "a.raw".into(), read_only: false, limits: Limits::default() }
        );
        assert_eq!(
            args.disks[1],
            DiskArg { path: "b,c.raw".into(), read_only: true, limits: Limits::default() }
        );
        assert_eq!(args.nets[0].mac, mac_of("tap0"));
        assert_eq!(args.nets[1].mac, [2, 0, 0, 0, 0, 1]);
        assert_eq!(args.on_reset, OnReset::Exit);
    }

    #[test]
    fn limits_are_taken_off_the_end_in_any_order() {
        let disk: DiskArg = "a,b.raw,iops=500,readonly,bandwidth=10MiB".parse().expect("a disk");
        assert_eq!((disk.path.as_path(), disk.read_only), (std::path::Path::new("a,b.raw"), true));
        assert_eq!(disk.limits.operations, Rate { per_second: 500, burst: 0 });
        assert_eq!(disk.limits.bytes, Rate { per_second: 10 << 20, burst: 0 });
        let net: NetArg = "tap0,mac=02:00:00:00:00:01,packets=1000".parse().expect("a card");
        assert_eq!((net.tap.as_str(), net.mac), ("tap0", [2, 0, 0, 0, 0, 1]));
        assert_eq!(net.limits.operations, Rate { per_second: 1000, burst: 0 });
        assert!("a.raw,iops=many".parse::<DiskArg>().is_err());
        assert!(net.vhost && net.limits != Limits::default());
        let net: NetArg = "tap0,mac=02:00:00:00:00:01,packets=1000,novhost".parse().expect("a card");
        assert!(!net.vhost && net.mac == [2, 0, 0, 0, 0, 1] && net.limits != Limits::default());
        assert!("tap0,bandwidth=fast".parse::<NetArg>().is_err());
    }

    #[test]
    fn wrong_usage_is_told_with_code_2() {
        for wrong in [
            &["--cpus", "0"][..],
            &["--cpus", "1000"],
            &["--memory", "lots"],
            &["--cpu", "x86-64-v9"],
            &["--pages", "8KiB"],
            &["--disk", ""],
            &["--disk", ",readonly"],
            &["--vsock", "2,/tmp/v"],
            &["--vsock", "3"],
            &["--vsock", "3,"],
            &["--net", "a name"],
            &["--net", "tap0,mac=01:00:00:00:00:00"],
            &["--net", "tap0,mac=02:00"],
        ] {
            let all = ["--kernel", "k"].iter().chain(wrong).copied().collect::<Vec<_>>();
            let error = run(&all).expect_err("wrong");
            assert_eq!(error.exit_code(), 2, "{wrong:?}");
        }
        assert_eq!(run(&[]).expect_err("no kernel").exit_code(), 2);
    }
}
