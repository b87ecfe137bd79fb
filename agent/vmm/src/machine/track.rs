//! Which pages have changed since the VM's last snapshot, so that the next one need only hold those.
//!
//! ```text
//!   Untracked ── saved with a link, or restored from one ──► since that link: logged ── saved again ──► since the new one
//!       ▲                                                       │ KVM refuses, or the snapshot is lost after all
//!       └───────────────────────────────────────────────────────┘ the next snapshot is a whole one
//! ```
//!
//! - Nothing is logged before there is a snapshot to log from: a VM that has none pays nothing.
//! - What was taken out of the logs and is in no snapshot stays here: a snapshot that fails loses nothing.
//! - It ends with its machine: after a reset all is new, and so is the next snapshot.

use serio_hv::{GuestMemory, Vm};

use crate::snapshot::{Link, PageSet};

/// The changes of one machine's memory.
#[derive(Debug, Default)]
pub(super) struct Track {
    since: Option<(Link, PageSet)>,
}

impl Track {
    /// Of a VM that is [`Vm::logged`], whose memory is that of `base` now.
    pub(super) fn restored(vm: &Vm, base: Link) -> Track {
        Track { since: Some((base, PageSet::none(bytes(vm.memory())))) }
    }

    /// What has changed until now, and since when. While nothing changes.
    pub(super) fn changes(&mut self, vm: &Vm) -> Option<(Link, &PageSet)> {
        let (_, pages) = self.since.as_mut()?;
        match vm.changes() {
            Ok(words) => pages.add(&PageSet::of_words(words, bytes(vm.memory()))),
            Err(_) => self.since = None,
        }
        self.since.as_ref().map(|(link, pages)| (*link, pages))
    }

    /// All that has changed is in the snapshot `link`. While nothing changes.
    pub(super) fn begin(&mut self, vm: &Vm, link: Link) {
        let logs = self.since.is_some() || vm.start_log().is_ok();
        self.since = logs.then(|| (link, PageSet::none(bytes(vm.memory()))));
    }

    /// The last snapshot is lost: the next one has nothing to go on from.
    pub(super) fn forget(&mut self) {
        self.since = None;
    }
}

fn bytes(memory: &GuestMemory) -> u64 {
    use serio_hv::vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};
    memory.iter().map(|region| region.len()).sum()
}
