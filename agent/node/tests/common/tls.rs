//! Certificates of an authority made for a test, and clients that have one.

use std::{fs, path::Path};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::Seriod;

pub struct Authority {
    pub pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A new one.
pub fn authority() -> Authority {
    let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let pem = params.self_signed(&key).unwrap().pem();
    Authority { pem, issuer: Issuer::new(params, key) }
}

impl Authority {
    /// A certificate and key with a role.
    pub fn issue(&self, role: &str) -> (String, String) {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::OrganizationalUnitName, role);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    pub fn write_server(&self, dir: &Path) {
        let (certificate, key) = self.issue("peer-agent");
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("ca-cert.pem"), &self.pem).unwrap();
        fs::write(dir.join("server-cert.pem"), certificate).unwrap();
        fs::write(dir.join("server-key.pem"), key).unwrap();
    }
}

pub async fn connect_tls(
    seriod: &Seriod,
    trusted: &Authority,
    identity: Option<(String, String)>,
) -> Result<Channel, tonic::transport::Error> {
    let mut tls =
        ClientTlsConfig::new().domain_name("localhost").ca_certificate(Certificate::from_pem(&trusted.pem));
    if let Some((certificate, key)) = identity {
        tls = tls.identity(Identity::from_pem(certificate, key));
    }
    let address = format!("https://localhost:{}", seriod.tcp.unwrap().port());
    Endpoint::from_shared(address).unwrap().tls_config(tls)?.connect().await
}
