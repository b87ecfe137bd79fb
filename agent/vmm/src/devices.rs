//! From what a VM is given (files, taps) to the devices on its PCI bus.
//!
//! [`Devices`] holds what must stay open over resets: volumes with their locks, taps. [`Devices::make`] makes the
//! devices of one boot from it. Their order is the order on the bus: disks, network cards, then the rest; a disk or card
//! that came later has its own place there ([`slots`]), and keeps it over resets.

use std::fs::{File, OpenOptions};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use nix::sys::eventfd::EventFd;
use serio_control::message::{self, TroubleKind};
use serio_devices::balloon::{Balloon, BalloonHandle};
use serio_devices::blk::{Blk, BlkConfig, CapacityBell};
use serio_devices::console::{Console, ConsoleEnds};
use serio_devices::count::{DiskCounts, NicCounts};
use serio_devices::limit::{Limiter, Limits};
use serio_devices::net::{COMMAND_LIMITS, Link, Net, NetConfig};
use serio_devices::ports::{GUEST_AGENT, HostPort, Ports};
use serio_devices::rng::{self, Rng};
use serio_devices::vsock::{Outgoing, Vsock, VsockHost};
use serio_devices::{Notices, Trouble};
use serio_hv::{Tap, VhostNet};
use serio_virtio::VirtioDevice;
use serio_volume::{Access, Volume};

use crate::cli::{DiskArg, NetArg, RunArgs, VsockArg};
use crate::guest_agent::GuestAgent;
use slots::Plugged;

#[path = "slots.rs"]
mod slots;

/// A disk's queues follow the vcpus up to this many: beyond, threads cost more than they bring.
const DISK_QUEUES_MAX: u32 = 4;

/// Why a device cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A disk's file cannot be opened.
    #[error("disk {path}: cannot open it{}", if *.read_only { "" } else { " for writing (add `,readonly` to read only)" })]
    Open {
        /// Which.
        path: String,
        /// How it was tried.
        read_only: bool,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is no usable volume, or somebody else has it.
    #[error("disk {name}")]
    Volume {
        /// Its file or its volume's id.
        name: String,
        /// Why.
        #[source]
        source: serio_volume::OpenError,
    },
    /// A network card's tap cannot be used.
    #[error("net {name}")]
    Tap {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: serio_hv::TapError,
    },
    /// The guest agent's port or the balloon's bell cannot be made.
    #[error("an eventfd cannot be made: raise the limit of open files")]
    Port(#[source] std::io::Error),
    /// The socket for vsock's clients cannot be made.
    #[error("vsock {path}: cannot listen there (remove what an earlier run left, or choose another path)")]
    Vsock {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A console's file cannot be opened.
    #[error("console {path}: cannot open it for reading and writing")]
    Console {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl DeviceError {
    /// The field of the VM's configuration that is to blame, or none.
    pub fn field(&self) -> &'static str {
        match self {
            DeviceError::Open { .. } | DeviceError::Volume { .. } => "disks",
            DeviceError::Tap { .. } => "nics",
            DeviceError::Console { .. } => "console",
            DeviceError::Vsock { .. } => "vsock",
            DeviceError::Port(_) => "",
        }
    }

    /// Whether somebody else has what is needed.
    pub fn is_in_use(&self) -> bool {
        matches!(self, DeviceError::Volume { source: serio_volume::OpenError::InUse { .. }, .. })
    }
}

/// A disk that stays open.
#[derive(Debug)]
pub struct Disk {
    /// The name by which it is asked for, and the serial number that the guest sees.
    pub name: String,
    /// Its contents.
    pub volume: Volume,
    /// Rung when it has grown.
    pub bell: CapacityBell,
    /// What it may do. Kept here, so that a reset fills no bucket.
    pub limiter: Arc<Limiter>,
    /// For the host's errors.
    pub notices: Notices,
    /// While the host's disk is full.
    pub trouble: Trouble,
    /// What was asked of it since the launch.
    pub counts: DiskCounts,
    /// Its device number on the bus, once it has one.
    slot: OnceLock<u8>,
}

impl Disk {
    /// A disk that nobody has been told of, without limits.
    #[must_use]
    pub fn new(name: String, volume: Volume) -> Disk {
        let notices = notices(format!("disk {name}"));
        let counts = DiskCounts::new(DISK_QUEUES_MAX as u16);
        Disk {
            name,
            volume,
            bell: CapacityBell::default(),
            limiter: Limiter::new(Limits::default()),
            notices,
            trouble: Trouble::default(),
            counts,
            slot: OnceLock::new(),
        }
    }

    /// The same, with limits.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Disk {
        self.limiter = Limiter::new(limits);
        self
    }
}

/// A network card whose tap stays open.
#[derive(Debug)]
pub struct Nic {
    /// Its cables, one for each queue pair: queues of one tap.
    taps: Vec<Arc<Tap>>,
    /// Its address.
    pub mac: [u8; 6],
    /// Bytes of its largest packet, without the header, if the guest shall be told.
    pub mtu: Option<u16>,
    /// What it may receive and send. Kept here, so that a reset fills no bucket.
    pub limiters: [Arc<Limiter>; 2],
    /// How often it may use more or fewer queue pairs. Kept here for the same reason.
    commands: Arc<Limiter>,
    /// For a cable that was pulled.
    pub notices: Notices,
    /// Since it was.
    pub trouble: Trouble,
    /// What went through since the launch.
    pub counts: NicCounts,
    /// Its device number on the bus, once it has one.
    slot: OnceLock<u8>,
}

impl Nic {
    /// A card on these queues of a tap; its limits hold in each direction.
    #[must_use]
    pub fn new(taps: Vec<Tap>, mac: [u8; 6], mtu: Option<u16>, limits: Limits) -> Nic {
        let notices = notices(format!("nic {}", mac_text(mac)));
        let limiters = [Limiter::new(limits), Limiter::new(limits)];
        let commands = Limiter::new(COMMAND_LIMITS);
        let counts = NicCounts::new(u16::try_from(taps.len()).unwrap_or(u16::MAX));
        let (taps, trouble) = (taps.into_iter().map(Arc::new).collect(), Trouble::default());
        let slot = OnceLock::new();
        Nic { taps, mac, mtu, limiters, commands, notices, trouble, counts, slot }
    }

    /// How many queue pairs it has.
    pub fn pairs(&self) -> usize {
        self.taps.len()
    }

    /// The tap's interface.
    pub fn tap(&self) -> &str {
        self.taps.first().map_or("", |tap| tap.name())
    }

    /// Its address, in words.
    pub fn name(&self) -> String {
        mac_text(self.mac)
    }
}

/// An address as people write it.
pub(crate) fn mac_text([a, b, c, d, e, f]: [u8; 6]) -> String {
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

/// Lines in the process' own log, which is its standard error.
fn notices(device: String) -> Notices {
    Notices::new(move |text| eprintln!("serio-vmm: {device}: {text}"))
}

/// All that a VM's devices are made from.
#[derive(Debug)]
pub struct Devices {
    /// Disks and cards, which may come and go.
    plugged: Mutex<Plugged>,
    /// Rung when a device gets into trouble or out of it.
    bell: Option<Arc<EventFd>>,
    /// The two ends of each virtio console.
    pub consoles: Vec<Arc<ConsoleEnds>>,
    /// What the guest gives back of its memory.
    pub balloon: BalloonHandle,
    /// Connections with the guest, if it shall have a device for them.
    pub vsock: Option<VsockHost>,
    /// Queues of each disk.
    pub disk_queues: u16,
    /// The agent in the guest, if it has one.
    pub guest_agent: GuestAgent,
    /// How much entropy it gets. Kept here, so that a reset fills no bucket.
    pub entropy: Arc<Limiter>,
}

/// What a command line names, opened: a sealed process opens nothing.
#[derive(Debug)]
pub struct Files {
    disks: Vec<File>,
    nics: Vec<Nic>,
    consoles: Vec<Arc<ConsoleEnds>>,
    vsock: Option<VsockHost>,
}

impl Files {
    /// Opens all of it. No thread is made, and no disk is looked into.
    pub fn open(args: &RunArgs) -> Result<Files, DeviceError> {
        Ok(Files {
            disks: args
                .disks
                .iter()
                .map(|disk| open_file(&disk.path, disk.read_only))
                .collect::<Result<_, _>>()?,
            nics: args.nets.iter().map(|net| open_nic(net, args.cpus)).collect::<Result<_, _>>()?,
            consoles: args.console.iter().map(|path| open_console(path)).collect::<Result<_, _>>()?,
            vsock: args.vsock.as_ref().map(open_vsock).transpose()?,
        })
    }
}

impl Devices {
    /// None yet, for a machine with so many vcpus.
    pub fn new(vcpus: u32) -> Result<Devices, DeviceError> {
        let guest_agent = GuestAgent::new(HostPort::new().map_err(DeviceError::Port)?);
        let balloon = BalloonHandle::new().map_err(DeviceError::Port)?;
        Ok(Devices {
            plugged: Mutex::default(),
            bell: None,
            consoles: Vec::new(),
            balloon,
            vsock: None,
            disk_queues: disk_queues(vcpus),
            guest_agent,
            entropy: Limiter::new(rng::LIMITS),
        })
    }

    /// The devices of a command line, from its files, in order.
    pub fn of_files(args: &RunArgs, files: Files) -> Result<Devices, DeviceError> {
        let Files { disks, nics, consoles, vsock } = files;
        let disks = args.disks.iter().zip(disks);
        let disks: Vec<Disk> = disks.map(|(disk, file)| open_disk(disk, file)).collect::<Result<_, _>>()?;
        let mut devices = Devices { consoles, vsock, ..Devices::new(args.cpus)? };
        disks.into_iter().for_each(|disk| devices.add_disk(disk));
        nics.into_iter().for_each(|nic| devices.add_nic(nic));
        Ok(devices)
    }

    /// The device of a disk.
    pub fn blk(&self, disk: &Disk) -> Box<dyn VirtioDevice> {
        let config = BlkConfig { serial: disk.name.clone(), queues: self.disk_queues };
        let blk = Blk::new(disk.volume.clone(), &config)
            .with_bell(disk.bell.clone())
            .with_limiter(disk.limiter.clone())
            .with_notices(disk.notices.clone())
            .with_trouble(disk.trouble.clone())
            .with_counts(disk.counts.clone());
        Box::new(blk)
    }

    /// The device of a card.
    pub fn net(nic: &Nic) -> Box<dyn VirtioDevice> {
        let config = NetConfig { mac: nic.mac, mtu: nic.mtu };
        let [receive, send] = nic.limiters.clone();
        let links = nic.taps.iter().map(|tap| tap.clone() as Arc<dyn Link>);
        let net = Net::new(links.collect(), config)
            .with_limiters(receive, send)
            .with_command_limiter(nic.commands.clone())
            .with_notices(nic.notices.clone())
            .with_trouble(nic.trouble.clone())
            .with_counts(nic.counts.clone());
        Box::new(net)
    }

    /// The devices that neither come nor go, of one boot.
    fn others(&self) -> Vec<Box<dyn VirtioDevice>> {
        let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
        for console in &self.consoles {
            devices.push(Box::new(Console::new(console.clone())));
        }
        devices.push(Box::new(Rng::new(self.entropy.clone())));
        devices.push(Box::new(Ports::new(GUEST_AGENT, self.guest_agent.port().clone())));
        devices.push(Box::new(Balloon::new(self.balloon.clone())));
        if let Some(vsock) = &self.vsock {
            devices.push(Box::new(Vsock::new(vsock.clone())));
        }
        devices
    }

    /// What does not work now.
    pub fn troubles(&self) -> Vec<message::Trouble> {
        let of = |kind: TroubleKind, device: String, trouble: &Trouble| {
            Some(message::Trouble { kind: kind.into(), device, reason: trouble.reason()? })
        };
        let (disks, nics) = (self.disks(), self.nics());
        let disks = disks.iter().map(|disk| of(TroubleKind::DiskHeld, disk.name.clone(), &disk.trouble));
        let nics = nics.iter().map(|nic| of(TroubleKind::Unplugged, nic.name(), &nic.trouble));
        disks.chain(nics).flatten().collect()
    }
}

/// How many queues a disk gets.
fn disk_queues(vcpus: u32) -> u16 {
    vcpus.clamp(1, DISK_QUEUES_MAX) as u16
}

fn open_file(path: &Path, read_only: bool) -> Result<File, DeviceError> {
    OpenOptions::new().read(true).write(!read_only).open(path).map_err(|source| DeviceError::Open {
        path: path.display().to_string(),
        read_only,
        source,
    })
}

fn open_disk(disk: &DiskArg, file: File) -> Result<Disk, DeviceError> {
    let access = if disk.read_only { Access::ReadOnly } else { Access::ReadWrite };
    let name = disk.path.display().to_string();
    let volume = Volume::open_raw(file, access)
        .map_err(|source| DeviceError::Volume { name: name.clone(), source })?;
    // The serial number is short: the file's name says more than the start of its path.
    let serial = disk.path.file_name().map_or(name, |name| name.to_string_lossy().into_owned());
    Ok(Disk::new(serial, volume).with_limits(disk.limits))
}

fn open_nic(net: &NetArg, vcpus: u32) -> Result<Nic, DeviceError> {
    // At most four.
    let pairs = message::nic_pairs(vcpus) as u16;
    let mut taps =
        Tap::open(&net.tap, pairs).map_err(|source| DeviceError::Tap { name: net.tap.clone(), source })?;
    if net.vhost {
        // Without it packets pass here.
        let vhosts = std::iter::repeat_with(VhostNet::open).map_while(Result::ok);
        for (tap, vhost) in taps.iter_mut().zip(vhosts) {
            tap.set_vhost(vhost).map_err(|source| DeviceError::Tap { name: net.tap.clone(), source })?;
        }
    }
    Ok(Nic::new(taps, net.mac, None, net.limits))
}

fn open_vsock(vsock: &VsockArg) -> Result<VsockHost, DeviceError> {
    let outgoing = Outgoing::Path(vsock.path.clone());
    UnixListener::bind(&vsock.path)
        .and_then(|listener| VsockHost::new(vsock.cid, listener, outgoing))
        .map_err(|source| DeviceError::Vsock { path: vsock.path.display().to_string(), source })
}

fn open_console(path: &Path) -> Result<Arc<ConsoleEnds>, DeviceError> {
    let failed = |source| DeviceError::Console { path: path.display().to_string(), source };
    let input = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
    let output = input.try_clone().map_err(failed)?;
    Ok(Arc::new(ConsoleEnds { input: input.into(), output: output.into() }))
}
