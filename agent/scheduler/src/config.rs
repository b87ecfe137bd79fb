//! `scheduler.toml` and the flags over it. Unknown keys are refused.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// The default port is the scheduler's; on all addresses, since nodes come from elsewhere.
const LISTEN: &str = "[::]:7450";

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file says something else.
    #[error("{path} is not a configuration of the scheduler")]
    Parse {
        /// Which.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// Nobody could be told from anybody.
    #[error(
        "no certificates: name their folder (tls_dir, --tls-dir; `serio pki issue` makes it), or say --insecure on a loopback address"
    )]
    NoTls,
    /// Open to everyone.
    #[error("--insecure is for loopback only, and {0} is not: listen on 127.0.0.1 or [::1], or use tls_dir")]
    InsecureAddress(SocketAddr),
    /// Both at once.
    #[error("tls_dir and insecure exclude each other: choose one")]
    Both,
    /// Half of what etcd wants.
    #[error("{0}")]
    Access(&'static str),
    /// Another store.
    #[error("store {0} is none: leave it out for the one in state_dir, or say etcd://HOST:PORT,HOST:PORT,…")]
    Store(String),
    /// Nobody could find the leader.
    #[error(
        "several schedulers need to know where to find each other: say advertise (--advertise HOST:PORT), since {0} is everywhere"
    )]
    NoAdvertise(SocketAddr),
}

/// Keys as written; all may be left out.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Where agents and clients connect; [::]:7450.
    pub listen: Option<SocketAddr>,
    /// ca-cert.pem, server-cert.pem, server-key.pem.
    pub tls_dir: Option<PathBuf>,
    /// The database's folder; /var/lib/serio-scheduler.
    pub state_dir: Option<PathBuf>,
    /// No certificates; loopback only.
    pub insecure: Option<bool>,
    /// etcd://HOST:PORT,… for a region with several schedulers; else the database in `state_dir`.
    pub store: Option<String>,
    /// HOST:PORT where agents and clients reach this scheduler; as `listen`.
    pub advertise: Option<String>,
    /// The authority of etcd's certificates (PEM): its members are reached by TLS.
    pub etcd_ca: Option<PathBuf>,
    /// This scheduler's certificate for etcd (PEM).
    pub etcd_cert: Option<PathBuf>,
    /// Its key (PEM).
    pub etcd_key: Option<PathBuf>,
    /// The user of etcd, where its authentication is on.
    pub etcd_user: Option<String>,
    /// A file with that user's password, which nobody else may read.
    pub etcd_password_file: Option<PathBuf>,
}

impl File {
    /// Reads one.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })
    }

    /// What the other says goes before.
    #[must_use]
    pub fn overridden_by(self, other: Self) -> Self {
        Self {
            listen: other.listen.or(self.listen),
            tls_dir: other.tls_dir.or(self.tls_dir),
            state_dir: other.state_dir.or(self.state_dir),
            insecure: other.insecure.or(self.insecure),
            store: other.store.or(self.store),
            advertise: other.advertise.or(self.advertise),
            etcd_ca: other.etcd_ca.or(self.etcd_ca),
            etcd_cert: other.etcd_cert.or(self.etcd_cert),
            etcd_key: other.etcd_key.or(self.etcd_key),
            etcd_user: other.etcd_user.or(self.etcd_user),
            etcd_password_file: other.etcd_password_file.or(self.etcd_password_file),
        }
    }
}

/// How connections are secured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Security {
    /// Certificates on both sides, from that folder.
    Tls(PathBuf),
    /// None; loopback only.
    Insecure,
}

/// Where what is known survives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Store {
    /// In a database in the state folder; this is the only scheduler.
    Embedded,
    /// In etcd, with those members; there may be other schedulers.
    Etcd(Vec<String>, Access),
}

/// How the members of etcd are reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// The authority of their certificates; none: in the clear.
    pub ca: Option<PathBuf>,
    /// Our certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// A user, and the file of the password.
    pub user: Option<(String, PathBuf)>,
}

impl Access {
    fn of(file: &File) -> Result<Self, ConfigError> {
        let wrong = |why| Err(ConfigError::Access(why));
        let identity = match (&file.etcd_cert, &file.etcd_key) {
            (Some(cert), Some(key)) => Some((cert.clone(), key.clone())),
            (None, None) => None,
            _ => return wrong("etcd_cert and etcd_key belong together: name both files, or none"),
        };
        let user = match (&file.etcd_user, &file.etcd_password_file) {
            (Some(user), Some(path)) => Some((user.clone(), path.clone())),
            (None, None) => None,
            _ => return wrong("etcd_user and etcd_password_file belong together: name both, or none"),
        };
        let access = Self { ca: file.etcd_ca.clone(), identity, user };
        if access.identity.is_some() && access.ca.is_none() {
            return wrong("etcd_cert without etcd_ca: name the authority that signed etcd's certificates");
        }
        if access != Self::default() && file.store.is_none() {
            return wrong("etcd_… is set, and store is not: say store = \"etcd://HOST:PORT,…\"");
        }
        Ok(access)
    }
}

impl Store {
    fn parse(text: &str, access: Access) -> Result<Self, ConfigError> {
        let bad = || ConfigError::Store(text.to_owned());
        let members = text.strip_prefix("etcd://").ok_or_else(bad)?;
        let member = |member: &str| {
            let (host, port) = member.rsplit_once(':').ok_or_else(bad)?;
            let good = !host.is_empty() && !host.contains(['/', '@']) && port.parse::<u16>().is_ok();
            if good { Ok(member.to_owned()) } else { Err(bad()) }
        };
        let members = members.trim_end_matches('/').split(',').map(member).collect::<Result<_, _>>()?;
        Ok(Self::Etcd(members, access))
    }
}

/// A configuration that can work.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen.
    pub listen: SocketAddr,
    /// How.
    pub security: Security,
    /// The database's folder.
    pub state_dir: PathBuf,
    /// Where what is known survives.
    pub store: Store,
    /// Where others reach it; none: where it listens.
    pub advertise: Option<String>,
}

impl TryFrom<File> for Config {
    type Error = ConfigError;

    fn try_from(file: File) -> Result<Self, ConfigError> {
        let access = Access::of(&file)?;
        let listen = file.listen.unwrap_or_else(|| LISTEN.parse().expect("a constant that is an address"));
        let security = match (file.tls_dir, file.insecure.unwrap_or(false)) {
            (Some(_), true) => return Err(ConfigError::Both),
            (Some(folder), false) => Security::Tls(folder),
            (None, true) if listen.ip().is_loopback() => Security::Insecure,
            (None, true) => return Err(ConfigError::InsecureAddress(listen)),
            (None, false) => return Err(ConfigError::NoTls),
        };
        let parse = |text: &str| Store::parse(text, access);
        let store = file.store.as_deref().map_or(Ok(Store::Embedded), parse)?;
        if store != Store::Embedded && file.advertise.is_none() && listen.ip().is_unspecified() {
            return Err(ConfigError::NoAdvertise(listen));
        }
        Ok(Self {
            listen,
            security,
            store,
            advertise: file.advertise,
            state_dir: file.state_dir.unwrap_or_else(|| "/var/lib/serio-scheduler".into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        toml::from_str::<File>(text).expect("keys").try_into()
    }

    #[test]
    fn what_may_be_combined() {
        assert_eq!(parse("tls_dir = '/etc/x'").unwrap().listen.port(), 7450);
        assert_eq!(parse("listen = '127.0.0.1:0'\ninsecure = true").unwrap().security, Security::Insecure);
        assert!(matches!(parse("insecure = true"), Err(ConfigError::InsecureAddress(_))));
        assert!(matches!(parse(""), Err(ConfigError::NoTls)));
        assert!(matches!(parse("tls_dir = '/x'\ninsecure = true"), Err(ConfigError::Both)));
        assert!(matches!(parse("tls_dir = '/x'\nstore = 'etcd://a:1'"), Err(ConfigError::NoAdvertise(_))));
        let region = parse("tls_dir = '/x'\nadvertise = 's1:7450'\nstore = 'etcd://a:1,[::1]:2'").unwrap();
        assert_eq!(region.store, Store::Etcd(vec!["a:1".into(), "[::1]:2".into()], Access::default()));
        for wrong in ["etcd://", "etcd://a", "etcd://a:1,", "etcd://a:x", "a:1", "etcd://u@a:1"] {
            assert!(matches!(Store::parse(wrong, Access::default()), Err(ConfigError::Store(_))), "{wrong}");
        }
        let etcd = "tls_dir = '/x'\nadvertise = 's:1'\nstore = 'etcd://a:1'\n";
        for half in
            ["etcd_cert = 'c'", "etcd_key = 'k'", "etcd_user = 'u'", "etcd_cert = 'c'\netcd_key = 'k'"]
        {
            assert!(matches!(parse(&format!("{etcd}{half}")), Err(ConfigError::Access(_))), "{half}");
        }
        assert!(matches!(parse("tls_dir = '/x'\netcd_ca = 'c'"), Err(ConfigError::Access(_))));
        let whole =
            "etcd_ca = 'a'\netcd_cert = 'c'\netcd_key = 'k'\netcd_user = 'u'\netcd_password_file = 'p'";
        let Store::Etcd(_, access) = parse(&format!("{etcd}{whole}")).unwrap().store else { panic!("etcd") };
        assert_eq!(access.user, Some(("u".to_owned(), "p".into())));
        assert!(toml::from_str::<File>("listn = 1").is_err());
        assert!(matches!(File::read(Path::new("/nowhere.toml")), Err(ConfigError::Read { .. })));
    }

    #[test]
    fn flags_go_before_the_file() {
        let file: File = toml::from_str("listen = '127.0.0.1:1'\nstate_dir = '/a'").unwrap();
        let flags = File { listen: "127.0.0.1:2".parse().ok(), insecure: Some(true), ..File::default() };
        let config: Config = file.overridden_by(flags).try_into().unwrap();
        assert_eq!((config.listen.port(), config.state_dir.to_str()), (2, Some("/a")));
    }
}
