//! The host's side of a VM's network: a bridge per vdc, a tap per card.
//!
//! ```text
//!   serio-vmm ──descriptor── tap srt<8 hex>-<n> ──port of── bridge srv-<8 hex> (one a vdc)
//! ```
//!
//! Owns: bridges named `srv-…`, made with the first card of a vdc on this host and removed with the last; taps,
//! which are never persistent: the VMM holds the only descriptors, so a tap ends with its VM whatever happens to
//! seriod. Never: addresses, routes, filters; any other link of the host.

use std::{fs::OpenOptions, io, os::fd::OwnedFd};

use rtnetlink::{Handle, LinkBridge, LinkUnspec, packet_route::link::LinkAttribute};
use tokio::sync::Mutex;
use tokio_stream::StreamExt;
use uuid::Uuid;

use crate::sys;

#[cfg(test)]
mod net_test;

/// The kernel's own network device, where the host has it: `linux/vhost.h`.
pub const VHOST_NET: &str = "/dev/vhost-net";
const BRIDGE_PREFIX: &str = "srv-";

/// Why a bridge or tap could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The tap.
    #[error("cannot make the tap {tap}: is the module tun loaded (modprobe tun)?")]
    Tap {
        /// Its name.
        tap: String,
        /// The system's word.
        #[source]
        source: io::Error,
    },
    /// rtnetlink.
    #[error("cannot {doing} {link}")]
    Link {
        /// The verb.
        doing: &'static str,
        /// The bridge or tap.
        link: String,
        /// The system's word.
        #[source]
        source: io::Error,
    },
}

/// The bridge of a vdc: `srv-` and the last 8 hex digits of its uid.
#[must_use]
pub fn bridge_name(vdc: Uuid) -> String {
    format!("{BRIDGE_PREFIX}{}", short(vdc))
}

/// The tap of a VM's card: `srt`, 8 hex digits of its uid, `-`, the card's place from 0.
#[must_use]
pub fn tap_name(vm: Uuid, index: usize) -> String {
    format!("srt{}-{index}", short(vm))
}

/// The first of a VM's names for taps that no link has.
#[must_use]
pub fn free_tap_name(vm: Uuid) -> String {
    let names = (0..).map(|index| tap_name(vm, index));
    // Longer names than a link can have are not looked for: making it fails then, and says why.
    names.take(100).find(|name| index(name).is_none()).unwrap_or_else(|| tap_name(vm, 0))
}

/// Whether a tap of that name can be a card's of this VM.
#[must_use]
pub fn is_tap_of(vm: Uuid, name: &str) -> bool {
    let number = name.strip_prefix(&format!("srt{}-", short(vm)));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// One of the kernel's own network devices for each of `count` queue pairs. None where the host has not got it, which is no fault:
/// packets pass through the VMM then.
#[must_use]
pub fn vhosts(count: usize) -> Vec<OwnedFd> {
    let open = |_| OpenOptions::new().read(true).write(true).open(VHOST_NET).map(OwnedFd::from);
    match (0..count).map(open).collect::<io::Result<Vec<_>>>() {
        Ok(vhosts) => vhosts,
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO)) => {
            Vec::new()
        }
        Err(error) => {
            tracing::warn!(%error, "{VHOST_NET} cannot be opened: packets pass through the VMs' own threads");
            Vec::new()
        }
    }
}

/// 8 hex digits of a uid that differ between uids made in the same moment (version 7 puts the time first).
fn short(uid: Uuid) -> String {
    let text = uid.simple().to_string();
    text.get(24..).unwrap_or(&text).to_owned()
}

/// The links of this host's VMs.
#[derive(Debug, Default)]
pub struct Net {
    /// One change at a time: a bridge is not removed between its making and its first tap.
    change: Mutex<()>,
}

impl Net {
    /// Makes a tap with so many queues on a bridge (made too when it is not there); both are up when it returns. The tap lives
    /// as long as one of its descriptors, a queue each, is open somewhere.
    ///
    /// # Errors
    /// [`NetError`]; then the tap is gone, and the bridge too if nothing else is on it.
    pub async fn attach(
        &self,
        bridge: &str,
        tap: &str,
        mtu: u32,
        queues: u32,
    ) -> Result<Vec<OwnedFd>, NetError> {
        let _change = self.change.lock().await;
        let links = Links::connect()?;
        let attached = try_attach(&links, bridge, tap, mtu, queues).await;
        if attached.is_err() {
            links.remove_if_empty(bridge).await;
        }
        attached
    }

    /// Removes those of our bridges that nothing is on any more.
    pub async fn release(&self, bridges: &[String]) {
        if bridges.is_empty() {
            return;
        }
        let _change = self.change.lock().await;
        match Links::connect() {
            Ok(links) => {
                for bridge in bridges {
                    links.remove_if_empty(bridge).await;
                }
            }
            Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "bridges are left over"),
        }
    }
}

async fn try_attach(
    links: &Links,
    bridge: &str,
    tap: &str,
    mtu: u32,
    queues: u32,
) -> Result<Vec<OwnedFd>, NetError> {
    let bridge_index = match index(bridge) {
        Some(index) => index,
        None => links.add_bridge(bridge).await?,
    };
    let made = sys::make_tap(tap, queues);
    let descriptors = made.map_err(|source| NetError::Tap { tap: tap.to_owned(), source })?;
    // The host has no business of its own on a tenant's network: no link-local address, no router discovery.
    silence(tap);
    let failed = |source| NetError::Link { doing: "set up", link: tap.to_owned(), source };
    let tap_index = index(tap).ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    let message = LinkUnspec::new_with_index(tap_index).mtu(mtu).controller(bridge_index).up().build();
    links.handle.link().set(message).execute().await.map_err(|e| failed(to_io(e)))?;
    Ok(descriptors)
}

/// A connection to rtnetlink, for one change.
struct Links {
    handle: Handle,
    /// Ends with the change: it would otherwise live as long as the runtime.
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for Links {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Links {
    fn connect() -> Result<Self, NetError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(|source| NetError::Link {
            doing: "reach",
            link: "rtnetlink".to_owned(),
            source,
        })?;
        Ok(Self { handle, connection: tokio::spawn(connection) })
    }

    async fn add_bridge(&self, bridge: &str) -> Result<u32, NetError> {
        let failed = |source| NetError::Link { doing: "make the bridge", link: bridge.to_owned(), source };
        let made = self.handle.link().add(LinkBridge::new(bridge).build()).execute().await;
        made.map_err(|e| failed(to_io(e)))?;
        silence(bridge);
        index(bridge).ok_or_else(|| failed(io::ErrorKind::NotFound.into()))
    }

    /// Removes a bridge of ours that has no port.
    async fn remove_if_empty(&self, bridge: &str) {
        let Some(index) = index(bridge).filter(|_| bridge.starts_with(BRIDGE_PREFIX)) else { return };
        match self.has_ports(index).await {
            Ok(true) => {}
            Ok(false) => {
                if let Err(error) = self.handle.link().del(index).execute().await {
                    tracing::warn!(bridge, %error, "a bridge cannot be removed");
                }
            }
            Err(error) => tracing::warn!(bridge, %error, "the ports of a bridge cannot be listed"),
        }
    }

    async fn has_ports(&self, index: u32) -> Result<bool, rtnetlink::Error> {
        let links = self.handle.link().get().execute();
        tokio::pin!(links);
        let mut found = false;
        // Read to its end: a dump that is broken off would answer the next question.
        while let Some(link) = links.next().await {
            found |= link?.attributes.contains(&LinkAttribute::Controller(index));
        }
        Ok(found)
    }
}

fn index(link: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(link).ok()
}

fn silence(link: &str) {
    let path = format!("/proc/sys/net/ipv6/conf/{link}/disable_ipv6");
    if let Err(error) = std::fs::write(&path, "1") {
        // A host without IPv6 has no such file.
        tracing::debug!(path, %error, "IPv6 stays as it is");
    }
}

fn to_io(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}
