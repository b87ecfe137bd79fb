//! NBD from where the user is: a Unix socket, or TLS with the user's certificate.
//!
//! The NBD client reads and writes a socket on a thread of its own. Where TLS is wanted it gets one end of a pair, and a
//! task relays between the other end and the TLS connection.

use std::{io, sync::Arc, time::Duration};

use serio_nbd::client::{Client, Options, Stream, Tls, Uri};
use tokio::{
    net::{TcpStream, UnixStream},
    runtime::Handle,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        ClientConfig, RootCertStore,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    },
};

use crate::{args::Global, error::Failure};

/// For the handshake of TLS.
const HANDSHAKE_MAX: Duration = Duration::from_secs(15);

/// Connects to the export that a URI names.
pub(crate) async fn connect(uri: &str, global: &Global) -> Result<Client, Failure> {
    let uri: Uri = uri.parse().map_err(|e| Failure::Usage(format!("{e}")))?;
    let mut options = Options::new(&uri);
    if uri.tls {
        options.tls = Some(Arc::new(relay(&uri, global)?));
    }
    tokio::task::spawn_blocking(move || Client::connect(options))
        .await
        .map_err(|e| Failure::local("cannot connect", e))?
        .map_err(|e| Failure::local("cannot connect to the NBD export", e))
}

struct Relay {
    connector: TlsConnector,
    name: ServerName<'static>,
    runtime: Handle,
}

fn relay(uri: &Uri, global: &Global) -> Result<Relay, Failure> {
    let serio_nbd::client::Address::Tcp { host, .. } = &uri.address else {
        return Err(Failure::Usage("TLS is spoken over TCP only: use nbd+unix://".to_owned()));
    };
    let (Some(ca), Some(cert), Some(key)) = (&global.ca, &global.cert, &global.key) else {
        return Err(Failure::Usage(
            "the NBD export wants certificates: name the files with --ca, --cert and --key or SERIO_CA, SERIO_CERT and SERIO_KEY"
                .to_owned(),
        ));
    };
    let name = ServerName::try_from(host.clone())
        .map_err(|e| Failure::local(format!("`{host}` is not the name of a server"), e))?;
    let bad = |what: &std::path::Path| {
        let what = format!("cannot use {}", what.display());
        move |e| Failure::local(what, e)
    };
    let mut roots = RootCertStore::empty();
    for authority in CertificateDer::pem_file_iter(ca).map_err(bad(ca))? {
        roots.add(authority.map_err(bad(ca))?).map_err(|e| Failure::local("cannot use the authority", e))?;
    }
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(cert).map_err(bad(cert))?.collect();
    let key = PrivateKeyDer::from_pem_file(key).map_err(bad(key))?;
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .and_then(|builder| {
            builder.with_root_certificates(roots).with_client_auth_cert(chain.unwrap_or_default(), key)
        })
        .map_err(|e| Failure::local("cannot use your certificate", e))?;
    Ok(Relay { connector: TlsConnector::from(Arc::new(config)), name, runtime: Handle::current() })
}

impl Tls for Relay {
    fn wrap(&self, stream: Stream) -> io::Result<Stream> {
        let Stream::Tcp(tcp) = stream else { return Err(io::ErrorKind::Unsupported.into()) };
        tcp.set_nonblocking(true)?;
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        theirs.set_nonblocking(true)?;
        let (connector, name) = (self.connector.clone(), self.name.clone());
        let (done, connected) = std::sync::mpsc::sync_channel::<io::Result<()>>(1);
        // On the runtime's own thread: the caller's may wait, the runtime's may not.
        self.runtime.spawn(async move {
            let opened = async {
                let (tcp, theirs) = (TcpStream::from_std(tcp)?, UnixStream::from_std(theirs)?);
                let tls = tokio::time::timeout(HANDSHAKE_MAX, connector.connect(name, tcp)).await;
                Ok::<_, io::Error>((tls.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??, theirs))
            };
            match opened.await {
                Err(error) => drop(done.send(Err(error))),
                Ok((mut tls, mut theirs)) => {
                    if done.send(Ok(())).is_ok() {
                        // Either side's end, or failure, is seen by the client as the end of its socket.
                        let _ = tokio::io::copy_bidirectional_with_sizes(
                            &mut tls,
                            &mut theirs,
                            256 << 10,
                            256 << 10,
                        )
                        .await;
                    }
                }
            }
        });
        connected.recv().map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))??;
        Ok(Stream::Unix(ours))
    }
}
