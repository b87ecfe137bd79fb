//! Places: of connections, calls and streams so many at a time, and of these so many for one peer, so that one that has gone
//! mad keeps nobody else out.
//!
//! Owns: the count. Never: what is done with a place. Threads: any.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::net::{TcpStream, UnixStream};
use tonic::{codegen::http, transport::server::UdsConnectInfo};

use super::auth::TlsInfo;

/// Who shares with nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Peer {
    /// On this host: a process.
    Process(i32),
    /// Elsewhere: an address; of IPv6 its network, since a host has as many as it likes there.
    Host(IpAddr),
    /// Not known; all of these share.
    Unknown,
}

impl Peer {
    pub(super) fn of_address(address: Option<IpAddr>) -> Self {
        match address.map(|address| address.to_canonical()) {
            Some(IpAddr::V6(address)) => {
                let network = u128::from(address) >> 64 << 64;
                Self::Host(IpAddr::V6(network.into()))
            }
            Some(address) => Self::Host(address),
            None => Self::Unknown,
        }
    }

    fn of_process(pid: Option<i32>) -> Self {
        pid.map_or(Self::Unknown, Self::Process)
    }

    /// Who makes a call.
    pub(super) fn of_call(extensions: &http::Extensions) -> Self {
        if let Some(info) = extensions.get::<UdsConnectInfo>() {
            return Self::of_process(info.peer_cred.and_then(|peer| peer.pid()));
        }
        let tls = extensions.get::<TlsInfo>();
        let address = tls.and_then(|info| info.get_ref().info.remote_addr());
        Self::of_address(address.map(|address| address.ip()))
    }
}

/// A connection that says whose it is.
pub(super) trait FromPeer {
    /// Who is at the other end.
    fn peer(&self) -> Peer;
}

impl FromPeer for UnixStream {
    fn peer(&self) -> Peer {
        Peer::of_process(self.peer_cred().ok().and_then(|peer| peer.pid()))
    }
}

impl FromPeer for TcpStream {
    fn peer(&self) -> Peer {
        Peer::of_address(self.peer_addr().ok().map(|address| address.ip()))
    }
}

/// So many, and so many for each.
#[derive(Debug)]
pub(super) struct Places {
    max: usize,
    of_peer_max: usize,
    taken: Mutex<HashMap<Peer, usize>>,
}

/// One place; dropping it gives it back.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    peer: Peer,
}

/// Why there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Taken {
    /// All are.
    #[error("all {0} are in use")]
    All(usize),
    /// Those that one peer may have.
    #[error("it has {0} already, as many as one may have")]
    OfPeer(usize),
}

impl Places {
    pub(super) fn new(max: usize, of_peer_max: usize) -> Arc<Self> {
        Arc::new(Self { max, of_peer_max, taken: Mutex::default() })
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<Peer, usize>> {
        // Numbers, each changed at once.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more.
    pub(super) fn take(self: &Arc<Self>, peer: Peer) -> Result<Place, Taken> {
        let mut taken = self.taken();
        // A few hundred at most, and not for each byte.
        if taken.values().sum::<usize>() >= self.max {
            return Err(Taken::All(self.max));
        }
        let own = taken.entry(peer).or_default();
        if *own >= self.of_peer_max {
            return Err(Taken::OfPeer(self.of_peer_max));
        }
        *own = own.saturating_add(1);
        Ok(Place { places: Arc::clone(self), peer })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        let left = taken.get(&self.peer).map_or(0, |own| own.saturating_sub(1));
        // Peers come and go: one that has nothing is forgotten.
        if left == 0 {
            taken.remove(&self.peer);
        } else {
            taken.insert(self.peer, left);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_peer_never_has_all_and_what_is_given_back_is_free() {
        let places = Places::new(5, 3);
        let first: Vec<_> = (0..3).map(|_| places.take(Peer::Process(1)).unwrap()).collect();
        assert_eq!(places.take(Peer::Process(1)).unwrap_err(), Taken::OfPeer(3));
        let second: Vec<_> = (0..2).map(|_| places.take(Peer::Process(2)).unwrap()).collect();
        assert_eq!(places.take(Peer::Process(2)).unwrap_err(), Taken::All(5));
        drop(first);
        assert!(places.take(Peer::Process(3)).is_ok());
        drop(second);
        assert!(places.taken().is_empty());
    }

    #[test]
    fn a_network_of_ipv6_is_one_peer_and_an_address_of_ipv4_is_one() {
        let of = |text: &str| Peer::of_address(Some(text.parse().unwrap()));
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
    }
}
