//! A peer on the host's side of a tap, which sends each frame of the mini guest back.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvfrom, sendto, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

/// The local experimental EtherType that the guest uses.
const TYPE: [u8; 2] = [0x88, 0xb5];

/// Echoes until it is dropped.
pub(crate) struct Echo {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    /// On the interface with this name, which is there.
    pub(crate) fn on(interface: &str) -> Echo {
        let index = nix::net::if_::if_nametoindex(interface).expect("it is there") as usize;
        let peer = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll);
        let peer = peer.expect("root may open packet sockets");
        setsockopt(&peer, sockopt::ReceiveTimeout, &TimeVal::milliseconds(100)).expect("a valid time");
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        Echo { stop, thread: Some(std::thread::spawn(move || echo(&peer, index, &told))) }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
    }
}

/// Sends frames of our type that arrive on one interface back to where they came from, until told to stop.
fn echo(peer: &OwnedFd, index: usize, stop: &AtomicBool) {
    let mut frame = [0u8; 4096];
    while !stop.load(Ordering::Relaxed) {
        // Ends by itself after 100 ms without a frame.
        let Ok((len, Some(from))) = recvfrom::<LinkAddr>(peer.as_raw_fd(), &mut frame) else { continue };
        if from.ifindex() == index && len >= 14 && frame[12..14] == TYPE {
            let (destination, rest) = frame.split_at_mut(6);
            destination.swap_with_slice(&mut rest[..6]);
            let _ = sendto(peer.as_raw_fd(), &frame[..len], &from, MsgFlags::empty());
        }
    }
}
