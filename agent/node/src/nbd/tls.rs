//! The certificates of the NBD front, and who a client is.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio_rustls::rustls::{
    CipherSuite, RootCertStore, ServerConfig, ServerConnection,
    crypto::{self, CryptoProvider},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};

/// Why the certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file.
    #[error("cannot use {path}: `serio pki` makes it")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// What is in them does not fit together.
    #[error("the certificates in {path} cannot be used together")]
    Content {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// `ca-cert.pem`, `server-cert.pem` and `server-key.pem` of a directory, demanding a client certificate of that CA.
///
/// # Errors
/// [`TlsError`].
pub fn tls_config(dir: &Path) -> Result<Arc<ServerConfig>, TlsError> {
    let content =
        |source: Box<dyn std::error::Error + Send + Sync>| TlsError::Content { path: dir.into(), source };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&dir.join("ca-cert.pem"))? {
        roots.add(certificate).map_err(|e| content(e.into()))?;
    }
    let key_path = dir.join("server-key.pem");
    let key = fs::read(&key_path).map_err(|e| e.into()).and_then(|pem| {
        PrivateKeyDer::from_pem_slice(&pem).map_err(Box::<dyn std::error::Error + Send + Sync>::from)
    });
    let key = key.map_err(|source| TlsError::File { path: key_path, source })?;
    let provider = Arc::new(provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(|e| content(e.into()))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| content(e.into()))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates(&dir.join("server-cert.pem"))?, key)
        .map_err(|e| content(e.into()))?;
    // Clients name the slowest first.
    config.ignore_client_order = true;
    Ok(Arc::new(config))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let file = |source| TlsError::File { path: path.to_owned(), source };
    let pem = fs::read(path).map_err(|e| file(e.into()))?;
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let certificates = parsed.map_err(|e| file(e.into()))?;
    if certificates.is_empty() { Err(file("there is no certificate in it".into())) } else { Ok(certificates) }
}

/// Named, not the process's default: that depends on which crates are linked. The fastest cipher comes first.
fn provider() -> CryptoProvider {
    let mut provider = crypto::ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
}

/// The SHA-256 fingerprint of the certificate that a client has shown, in hex, as `openssl x509 -fingerprint -sha256`
/// has it without the colons. The front demands one, so `None` is for connections that are not whole.
pub(super) fn fingerprint(session: &ServerConnection) -> Option<String> {
    let certificate = session.peer_certificates()?.first()?;
    let suites = crypto::ring::ALL_CIPHER_SUITES;
    let sha256 = suites.iter().find(|suite| suite.suite() == CipherSuite::TLS13_AES_128_GCM_SHA256)?;
    let digest = sha256.tls13()?.common.hash_provider.hash(certificate);
    Some(digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect())
}
