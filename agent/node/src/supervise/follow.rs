//! What VMMs tell by themselves: troubles of their VMs' devices.
//!
//! Owns: one connection a running VM, which only listens. Never: what follows from it. A VMM tells of each change; here the
//! first one is passed on at once, later ones with a pause, since a guest on a full disk can make as many as it likes. Whatever
//! becomes of the connection, the VM's end is heard elsewhere, so nothing here fails: it is connected anew.

use std::time::Duration;

use serio_control::message::{self, Body, Empty, VmStatus};
use tokio::{sync::mpsc, time::sleep};

use super::{
    TalkError,
    link::Link,
    vm::{ANSWER_WAIT, VmHandle, peer},
};

/// Between two reports.
const REPORT_PAUSE: Duration = Duration::from_secs(1);
/// Between two connections.
const CONNECT_PAUSE: Duration = Duration::from_secs(1);
/// More than a VM has devices.
const TROUBLES_MAX: usize = 64;
/// Characters of a reason that are kept.
const REASON_MAX: usize = 512;

/// What a trouble is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum TroubleKind {
    /// Requests of a disk wait for room on the host's disk.
    DiskHeld,
    /// A card's tap is gone.
    Unplugged,
    /// A newer VMM's.
    Other,
}

impl TroubleKind {
    /// As the API and events have it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::DiskHeld => "disk-held",
            Self::Unplugged => "unplugged",
            Self::Other => "trouble",
        }
    }
}

/// What a device cannot do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TroubleReport {
    /// Of what kind.
    pub kind: TroubleKind,
    /// A volume's uid, or a card's address.
    pub device: String,
    /// For the person.
    pub reason: String,
}

fn report(trouble: message::Trouble) -> TroubleReport {
    let kind = match trouble.kind() {
        message::TroubleKind::DiskHeld => TroubleKind::DiskHeld,
        message::TroubleKind::Unplugged => TroubleKind::Unplugged,
        message::TroubleKind::Unknown => TroubleKind::Other,
    };
    TroubleReport { kind, device: trouble.device, reason: trouble.reason.chars().take(REASON_MAX).collect() }
}

fn reports(status: VmStatus) -> Vec<TroubleReport> {
    status.troubles.into_iter().take(TROUBLES_MAX).map(report).collect()
}

impl VmHandle {
    /// Tells all troubles of the VM whenever they are others than before. Never ends, but when nobody listens any more.
    pub async fn follow_troubles(&self, told: &mpsc::Sender<Vec<TroubleReport>>) {
        let mut known = Vec::new();
        loop {
            match self.follow_once(&mut known, told).await {
                Ok(()) => return,
                Err(error) => tracing::debug!(pid = self.pid(), %error, "a VMM does not tell of itself"),
            }
            sleep(CONNECT_PAUSE).await;
        }
    }

    async fn follow_once(
        &self,
        known: &mut Vec<TroubleReport>,
        told: &mpsc::Sender<Vec<TroubleReport>>,
    ) -> Result<(), TalkError> {
        let mut link = Link::connect(&self.control(), peer(self.pid()), ANSWER_WAIT).await?;
        loop {
            // Asked, not taken from what it has told: that may be old after the pause.
            let Body::VmStatus(status) = link.call(Body::Status(Empty {}), &[], ANSWER_WAIT).await? else {
                return Err(serio_control::ChannelError::Unexpected.into());
            };
            let now = reports(status);
            if now != *known {
                known.clone_from(&now);
                if told.send(now).await.is_err() {
                    return Ok(());
                }
                sleep(REPORT_PAUSE).await;
                continue;
            }
            link.changed().await?;
        }
    }
}
