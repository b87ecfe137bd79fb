//! `pki`: a small certificate authority in a folder. Needs no node.
//!
//! DIR/ca-cert.pem, DIR/ca-key.pem (0600) and, for each name, DIR/NAME/{ca-cert,server-cert,server-key,client-cert,
//! client-key}.pem: one certificate under both names, since agents are servers and clients. ECDSA P-256 (RFC 5480), the
//! role is the OU of the subject. Nothing is ever overwritten; a folder of certificates appears whole, by rename.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    net::IpAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::Path,
};

use clap::{ArgMatches, parser::ValueSource};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use serde_json::json;
use time::{Duration, OffsetDateTime};

use crate::{
    args::{IssueArgs, PkiVerb},
    error::Failure,
    output::Output,
};

const CA_CERT: &str = "ca-cert.pem";
const CA_KEY: &str = "ca-key.pem";
const CA_DAYS: i64 = 3650;
/// Clocks of new nodes may lag: a certificate is valid a little before it was made.
const BACKDATE: Duration = Duration::HOUR;

pub(super) fn run(verb: PkiVerb, matches: &ArgMatches, output: Output) -> Result<(), Failure> {
    match verb {
        PkiVerb::Init { dir, name } => {
            init(&dir, &name)?;
            output.done(
                &json!({ "cert": dir.join(CA_CERT), "key": dir.join(CA_KEY) }),
                &format!("made the authority `{name}` in {}", dir.display()),
            )
        }
        PkiVerb::Issue(mut args) => {
            // `--host` of this verb shadows the global one, whose default or SERIO_HOST would arrive here too.
            let typed = matches
                .subcommand_matches("pki")
                .and_then(|pki| pki.subcommand_matches("issue"))
                .is_some_and(|issue| issue.value_source("host") == Some(ValueSource::CommandLine));
            if !typed {
                args.hosts.clear();
            }
            issue(&args)?;
            let dir = args.dir.join(args.name.as_str());
            output.done(
                &json!({ "dir": dir, "role": args.role.organizational_unit(), "days": args.days }),
                &format!(
                    "issued {} ({}, {} days) in {}",
                    args.name,
                    args.role.organizational_unit(),
                    args.days,
                    dir.display()
                ),
            )
        }
    }
}

fn init(dir: &Path, name: &str) -> Result<(), Failure> {
    let cannot = |e: io::Error| Failure::local(format!("cannot make an authority in {}", dir.display()), e);
    for file in [CA_CERT, CA_KEY] {
        if dir.join(file).exists() {
            return Err(Failure::plain(format!(
                "{} is there already, and certificates may depend on it: name another folder",
                dir.join(file).display()
            )));
        }
    }
    let key =
        KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|e| Failure::local("cannot make a key", e))?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params.not_before, params.not_after) = validity(CA_DAYS);
    let certificate =
        params.self_signed(&key).map_err(|e| Failure::local("cannot sign the authority's certificate", e))?;

    fs::create_dir_all(dir).map_err(cannot)?;
    write_new(&dir.join(CA_KEY), &key.serialize_pem(), 0o600).map_err(cannot)?;
    write_new(&dir.join(CA_CERT), &certificate.pem(), 0o644).map_err(cannot)
}

fn issue(args: &IssueArgs) -> Result<(), Failure> {
    let out = args.dir.join(args.name.as_str());
    let cannot = |e: io::Error| Failure::local(format!("cannot issue {}", out.display()), e);
    if out.exists() {
        return Err(Failure::plain(format!(
            "{} is there already: remove it first, or choose another name",
            out.display()
        )));
    }
    let read = |file: &str| {
        fs::read_to_string(args.dir.join(file)).map_err(|e| {
            let what = format!("cannot read {}", args.dir.join(file).display());
            match e.kind() {
                io::ErrorKind::NotFound => Failure::plain(format!(
                    "{what}: make the authority first: serio pki init {}",
                    args.dir.display()
                )),
                _ => Failure::local(what, e),
            }
        })
    };
    let ca_cert = read(CA_CERT)?;
    let ca_key =
        KeyPair::from_pem(&read(CA_KEY)?).map_err(|e| Failure::local("cannot use the authority's key", e))?;
    let issuer = Issuer::from_ca_cert_pem(&ca_cert, ca_key)
        .map_err(|e| Failure::local("cannot use the authority's certificate", e))?;
    let key =
        KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|e| Failure::local("cannot make a key", e))?;
    let certificate = params(args)?
        .signed_by(&key, &issuer)
        .map_err(|e| Failure::local("cannot sign the certificate", e))?;

    // Whole or not at all.
    let half = args.dir.join(format!(".{}.new", args.name));
    let _ = fs::remove_dir_all(&half);
    let written = (|| {
        fs::DirBuilder::new().mode(0o755).create(&half)?;
        write_new(&half.join(CA_CERT), &ca_cert, 0o644)?;
        for side in ["server", "client"] {
            write_new(&half.join(format!("{side}-cert.pem")), &certificate.pem(), 0o644)?;
            write_new(&half.join(format!("{side}-key.pem")), &key.serialize_pem(), 0o600)?;
        }
        fs::rename(&half, &out)
    })();
    if written.is_err() {
        let _ = fs::remove_dir_all(&half);
    }
    written.map_err(cannot)
}

fn params(args: &IssueArgs) -> Result<CertificateParams, Failure> {
    // The name itself is one of the hosts, so that a certificate without --host still names somebody.
    let mut hosts = vec![args.name.to_string()];
    for host in &args.hosts {
        if !is_host(host) {
            return Err(Failure::Usage(format!(
                "--host `{host}` is neither a DNS name nor an address (no scheme, no port)"
            )));
        }
        if !hosts.contains(host) {
            hosts.push(host.clone());
        }
    }
    let mut params = CertificateParams::new(hosts).map_err(|e| Failure::local("cannot use a --host", e))?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationalUnitName, args.role.organizational_unit());
    params.distinguished_name.push(DnType::CommonName, args.name.as_str());
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    (params.not_before, params.not_after) = validity(i64::from(args.days));
    Ok(params)
}

/// A DNS name (letters, digits, `-`, `.`, a leading `*.`) or an IP address.
fn is_host(host: &str) -> bool {
    let labels = host.strip_prefix("*.").unwrap_or(host);
    host.parse::<IpAddr>().is_ok()
        || (host.len() <= 253
            && labels.split('.').all(|label| {
                (1..=63).contains(&label.len())
                    && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_')
            }))
}

fn validity(days: i64) -> (OffsetDateTime, OffsetDateTime) {
    let now = OffsetDateTime::now_utc();
    (now - BACKDATE, now + Duration::days(days))
}

fn write_new(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::PermissionsExt, process::Command};

    use super::*;
    use crate::args::Role;

    fn args(dir: &Path, name: &str, hosts: &[&str]) -> IssueArgs {
        IssueArgs {
            dir: dir.to_owned(),
            name: name.parse().unwrap(),
            role: Role::Node,
            hosts: hosts.iter().map(|&h| h.to_owned()).collect(),
            days: 30,
        }
    }

    #[test]
    fn an_authority_and_a_node() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        init(dir, "Test CA").unwrap();
        issue(&args(dir, "node-a", &["a.example.net", "10.0.0.5", "::1"])).unwrap();
        for (file, mode) in [
            ("ca-key.pem", 0o600),
            ("node-a/ca-cert.pem", 0o644),
            ("node-a/server-cert.pem", 0o644),
            ("node-a/client-cert.pem", 0o644),
            ("node-a/server-key.pem", 0o600),
            ("node-a/client-key.pem", 0o600),
        ] {
            assert_eq!(fs::metadata(dir.join(file)).unwrap().permissions().mode() & 0o777, mode, "{file}");
        }
        assert!(init(dir, "again").unwrap_err().render().contains("there already"));
        assert!(issue(&args(dir, "node-a", &[])).unwrap_err().render().contains("there already"));
        assert_eq!(issue(&args(dir, "b", &["https://a:1"])).unwrap_err().exit_code(), 2);
        assert!(!dir.join("b").exists());

        let Ok(openssl) = Command::new("openssl")
            .args([
                "verify",
                "-x509_strict",
                "-purpose",
                "sslserver",
                "-verify_hostname",
                "a.example.net",
                "-CAfile",
            ])
            .arg(dir.join("ca-cert.pem"))
            .arg(dir.join("node-a/server-cert.pem"))
            .output()
        else {
            println!("skipped: openssl is not installed");
            return;
        };
        assert!(openssl.status.success(), "{openssl:?}");
        let shown = Command::new("openssl")
            .args(["x509", "-noout", "-subject", "-ext", "subjectAltName", "-in"])
            .arg(dir.join("node-a/client-cert.pem"))
            .output()
            .unwrap();
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        assert!(shown.contains("OU = node") && shown.contains("CN = node-a"), "{shown}");
        assert!(shown.contains("DNS:a.example.net") && shown.contains("IP Address:10.0.0.5"), "{shown}");
    }

    #[test]
    fn an_authority_is_needed() {
        let dir = tempfile::tempdir().unwrap();
        let text = issue(&args(dir.path(), "x", &[])).unwrap_err().render();
        assert!(text.contains("serio pki init"), "{text}");
    }

    #[test]
    fn hosts() {
        for good in ["a", "a.example.net", "*.example.net", "10.0.0.1", "fe80::1"] {
            assert!(is_host(good), "{good}");
        }
        for bad in ["", "a b", "https://a", "a:1", "unix:/run/x", ".a"] {
            assert!(!is_host(bad), "{bad}");
        }
    }
}
