//! `seriod.toml`: what an operator sets. Every key is documented in the shipped file, which equals the defaults.
//!
//! Owns: parsing and defaults. Never: resolving (a missing node name is looked up by [`Config::node_name`]).

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use serio_types::{ByteSize, Name};

use crate::{direct::DirectIo, energy::EnergySettings, scrub::Every};

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(
        "cannot read the configuration {path}: create it from the shipped seriod.toml, or name another with --config"
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not valid.
    #[error("the configuration {path} is not valid")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Which key, and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// The host's name does not make a node name.
    #[error("the host's name {host:?} cannot be the node's name: set node_name in the configuration")]
    HostName {
        /// The host's name.
        host: String,
        /// Why.
        #[source]
        source: serio_types::NameError,
    },
    /// A combination that cannot work.
    #[error("configuration: {0}")]
    Inconsistent(String),
}

/// The kernel has up to 2^22 process numbers, and some programs take user numbers from 2^31 on for negative.
const FIRST_UID_MAX: u32 = (1 << 31) - (1 << 22) - 1;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The node's name; the host's when empty.
    pub node_name: String,
    /// The data centre.
    pub site: String,
    /// What fails together inside the site: a rack, a room.
    pub failure_domain: String,
    /// Where state is kept.
    pub state_dir: PathBuf,
    /// Seconds between two copies that are made of the database.
    pub copy_interval_s: u64,
    /// Where sockets and run files are.
    pub run_dir: PathBuf,
    /// The VMM's binary.
    pub vmm_path: PathBuf,
    /// The volume daemon's binary.
    pub volumed_path: PathBuf,
    /// Processes that hold a VM or a volume become the user of this number plus their process number.
    pub first_uid: u32,
    /// The gRPC services.
    pub grpc: Grpc,
    /// NBD for the network.
    pub nbd: Nbd,
    /// Background work on volumes.
    pub volumes: Volumes,
    /// Network cards of VMs.
    pub network: Network,
    /// The keys of encrypted vdcs.
    pub keys: Keys,
    /// The scheduler.
    pub scheduler: Scheduler,
    /// What is reported and promised.
    pub capacity: Capacity,
    /// What is counted for invoices.
    pub meter: Meter,
    /// What is watched.
    pub health: Health,
    /// How energy is shared out.
    pub energy: EnergySettings,
    /// For the monitoring.
    pub metrics: Metrics,
}

/// What is counted for invoices.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Meter {
    /// Seconds between two looks.
    pub interval_s: u64,
}

/// What is watched.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Health {
    /// Seconds between two looks.
    pub interval_s: u64,
    /// With less free on the disk of `state_dir` nothing new is made or started.
    pub disk_floor: ByteSize,
}

/// For the monitoring.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// Plain HTTP; none when empty.
    pub listen: Addr,
}

/// The gRPC services.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Grpc {
    /// The Unix socket; `RUN/seriod.sock` when empty.
    pub socket: PathBuf,
    /// TCP with mutual TLS; none when empty.
    pub listen: Addr,
    /// ca-cert.pem, server-cert.pem, server-key.pem; needed with `listen`.
    pub tls_dir: PathBuf,
}

/// NBD for the network.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Nbd {
    /// TCP with forced TLS; none when empty.
    pub listen: Addr,
    /// `HOST:PORT` or `HOST` in the URIs given to clients; the listener's when empty.
    pub advertise: String,
}

/// Background work on volumes.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Volumes {
    /// Bytes a second that a merge of layers may copy; 0: as fast as it goes.
    pub merge_pace: ByteSize,
    /// How long after its last scrub a volume is scrubbed again; 0: never.
    pub scrub_interval: Every,
    /// Bytes a second that a scrub may read; 0: as fast as it goes.
    pub scrub_pace: ByteSize,
    /// Which disks go past the page cache.
    pub direct_io: DirectIo,
}

/// Network cards of VMs.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Network {
    /// Whether the kernel may move their packets by itself, where it can.
    pub vhost_net: bool,
}

/// The keys of encrypted vdcs.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Keys {
    /// Where the key encryption key comes from; none when empty.
    pub source: String,
    /// Where earlier ones come from.
    pub previous: Vec<String>,
}

/// The scheduler.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scheduler {
    /// `https://HOST:7450`; none when empty.
    pub url: String,
    /// Those of a region with several; the one above is one of them, when it is set.
    pub urls: Vec<String>,
    /// ca-cert.pem, client-cert.pem, client-key.pem; those of `grpc.tls_dir` when empty.
    pub tls_dir: PathBuf,
}

impl Scheduler {
    /// All of them, each once.
    #[must_use]
    pub fn all(&self) -> Vec<String> {
        let mut all: Vec<String> = Vec::new();
        for url in std::iter::once(&self.url).chain(&self.urls).filter(|url| !url.is_empty()) {
            if !all.contains(url) {
                all.push(url.clone());
            }
        }
        all
    }
}

/// What is reported and promised.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Capacity {
    /// Between two usage reports, milliseconds.
    pub usage_interval_ms: u64,
    /// Between two leases, milliseconds.
    pub lease_interval_ms: u64,
    /// Memory kept for the host.
    pub reserve_memory: ByteSize,
    /// Vcpus promised for one logical processor.
    pub overcommit_vcpu: f64,
}

/// An address to listen on; empty text is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "String")]
pub struct Addr(pub Option<SocketAddr>);

impl TryFrom<String> for Addr {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        if text.is_empty() {
            return Ok(Self(None));
        }
        text.parse().map(|addr| Self(Some(addr))).map_err(|_| {
            format!("`{text}` is not an address: write IP:PORT, for example 0.0.0.0:7440 or [::]:7440")
        })
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node_name: String::new(),
            site: "default".to_owned(),
            failure_domain: "default".to_owned(),
            state_dir: "/var/lib/serio".into(),
            copy_interval_s: 3600,
            run_dir: "/run/serio".into(),
            vmm_path: "/usr/lib/serio/serio-vmm".into(),
            volumed_path: "/usr/lib/serio/serio-volumed".into(),
            first_uid: 0x7000_0000,
            grpc: Grpc::default(),
            nbd: Nbd::default(),
            volumes: Volumes::default(),
            network: Network::default(),
            keys: Keys::default(),
            scheduler: Scheduler::default(),
            capacity: Capacity::default(),
            meter: Meter::default(),
            health: Health::default(),
            energy: EnergySettings::default(),
            metrics: Metrics::default(),
        }
    }
}

impl Default for Volumes {
    fn default() -> Self {
        Self {
            merge_pace: ByteSize::from_mib(100),
            scrub_interval: Every(Duration::from_secs(30 * 24 * 60 * 60)),
            scrub_pace: ByteSize::from_mib(20),
            direct_io: DirectIo::Auto,
        }
    }
}

impl Default for Network {
    fn default() -> Self {
        Self { vhost_net: true }
    }
}

impl Default for Meter {
    fn default() -> Self {
        Self { interval_s: 60 }
    }
}

impl Default for Health {
    fn default() -> Self {
        Self { interval_s: 30, disk_floor: ByteSize::from_mib(64) }
    }
}

impl Default for Capacity {
    fn default() -> Self {
        Self {
            usage_interval_ms: 5000,
            lease_interval_ms: 2000,
            reserve_memory: ByteSize::from_mib(256),
            overcommit_vcpu: 4.0,
        }
    }
}

impl Config {
    /// Reads and checks the file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let config: Self = toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let inconsistent = |text: &str| Err(ConfigError::Inconsistent(text.to_owned()));
        if self.grpc.listen.0.is_some() && self.grpc.tls_dir.as_os_str().is_empty() {
            return inconsistent(
                "grpc.listen needs grpc.tls_dir: TCP is only served with mutual TLS (`serio pki` makes the files)",
            );
        }
        if self.nbd.listen.0.is_some() && self.grpc.tls_dir.as_os_str().is_empty() {
            return inconsistent("nbd.listen needs grpc.tls_dir: NBD on TCP is only served with mutual TLS");
        }
        if !(1..=FIRST_UID_MAX).contains(&self.first_uid) {
            return inconsistent(
                "first_uid must be from 1 to 2143289343: it and the 4 million numbers after it are users of single processes",
            );
        }
        if self.capacity.usage_interval_ms == 0 || self.capacity.lease_interval_ms == 0 {
            return inconsistent("capacity.usage_interval_ms and lease_interval_ms must be at least 1");
        }
        if self.copy_interval_s == 0 {
            return inconsistent("copy_interval_s must be at least 1");
        }
        if self.meter.interval_s == 0 || self.health.interval_s == 0 {
            return inconsistent("meter.interval_s and health.interval_s must be at least 1");
        }
        if !(0.0..=1.0).contains(&self.energy.memory_share)
            || !(0.0..1e4).contains(&self.energy.carbon_grams_per_kwh)
        {
            return inconsistent(
                "energy.memory_share must be from 0 to 1, carbon_grams_per_kwh from 0 to less than 10000",
            );
        }
        if !self.capacity.overcommit_vcpu.is_finite() || self.capacity.overcommit_vcpu <= 0.0 {
            return inconsistent("capacity.overcommit_vcpu must be more than 0");
        }
        Ok(())
    }

    /// The node's name: as set, or the host's (its first label).
    pub fn node_name(&self) -> Result<Name, ConfigError> {
        let host = if self.node_name.is_empty() {
            let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            host.trim().split('.').next().unwrap_or_default().to_lowercase()
        } else {
            self.node_name.clone()
        };
        host.parse().map_err(|source| ConfigError::HostName { host, source })
    }

    /// The Unix socket of the gRPC services.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        if self.grpc.socket.as_os_str().is_empty() {
            self.run_dir.join("seriod.sock")
        } else {
            self.grpc.socket.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_file_is_the_defaults() {
        let shipped: Config = toml::from_str(include_str!("../seriod.toml")).unwrap();
        assert_eq!(shipped, Config::default());
        shipped.check().unwrap();
    }

    #[test]
    fn unknown_keys_are_refused() {
        let error = toml::from_str::<Config>("[grpc]\nsokket = \"/x\"").unwrap_err().to_string();
        assert!(error.contains("sokket"), "{error}");
    }

    #[test]
    fn tcp_needs_certificates() {
        let config: Config = toml::from_str("[grpc]\nlisten = \"0.0.0.0:7440\"").unwrap();
        assert!(config.check().unwrap_err().to_string().contains("tls_dir"));
        assert!(
            toml::from_str::<Config>("[grpc]\nlisten = \"7440\"")
                .unwrap_err()
                .to_string()
                .contains("IP:PORT")
        );
    }
}
