//! Who is at a volume's files: one at a time, and a merge gives way to everybody else.
//!
//! Each exclusive piece of work (a snapshot, a launch, a resize …) *enters* the volume's gate; entering raises a count that
//! a merge, which may be at it for hours, watches: it stops half-way (its nature allows that) and leaves. Gates of several
//! volumes are entered in the order of their ids.

use std::sync::{Arc, PoisonError};

use tokio::sync::{Mutex, OwnedMutexGuard, watch};
use uuid::Uuid;

use super::{Inner, JobError, spawn::Watched};

/// The gate of a volume.
#[derive(Debug)]
pub(super) struct VolumeGate {
    inside: Arc<Mutex<Gate>>,
    /// How many wait to enter.
    wanted: watch::Sender<u32>,
}

/// What is known by whoever is inside.
#[derive(Debug, Default)]
pub(super) struct Gate {
    /// The VMM that has not answered the last snapshot: until it is dead, the newest layer may be written by it.
    pub(super) in_doubt: Option<Watched>,
}

/// Proof that nobody else is at the volume's files.
pub(super) type Entered = OwnedMutexGuard<Gate>;

impl Default for VolumeGate {
    fn default() -> Self {
        Self { inside: Arc::default(), wanted: watch::channel(0).0 }
    }
}

/// Takes one off the count, also when the wait is broken off.
struct Waiting<'a>(&'a watch::Sender<u32>);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count = count.saturating_sub(1));
    }
}

impl VolumeGate {
    async fn enter(&self) -> Entered {
        self.wanted.send_modify(|count| *count = count.saturating_add(1));
        let _waiting = Waiting(&self.wanted);
        Arc::clone(&self.inside).lock_owned().await
    }

    /// For a merge: nobody is sent away, and it learns when somebody wants to enter.
    pub(super) async fn enter_humbly(&self) -> (Entered, watch::Receiver<u32>) {
        let entered = Arc::clone(&self.inside).lock_owned().await;
        (entered, self.wanted.subscribe())
    }
}

impl Inner {
    pub(super) fn volume_gate(&self, volume: Uuid) -> Arc<VolumeGate> {
        Arc::clone(self.gates.lock().unwrap_or_else(PoisonError::into_inner).entry(volume).or_default())
    }

    pub(super) fn forget_volume(&self, volume: Uuid) {
        self.gates.lock().unwrap_or_else(PoisonError::into_inner).remove(&volume);
    }

    /// Waits until nobody else is at the volume.
    pub(super) async fn enter(&self, volume: Uuid) -> Entered {
        self.volume_gate(volume).enter().await
    }

    /// As [`Inner::enter`]; refused while a VMM that did not answer may still be at the files.
    pub(super) async fn enter_sure(&self, volume: Uuid) -> Result<Entered, JobError> {
        let mut entered = self.enter(volume).await;
        settle_doubt(&mut entered, volume)?;
        Ok(entered)
    }

    /// All of these volumes.
    pub(super) async fn enter_all(&self, volumes: impl Iterator<Item = Uuid>) -> Vec<(Uuid, Entered)> {
        let mut sorted: Vec<Uuid> = volumes.collect();
        sorted.sort_unstable();
        sorted.dedup();
        let mut entered = Vec::with_capacity(sorted.len());
        for volume in sorted {
            entered.push((volume, self.enter(volume).await));
        }
        entered
    }
}

/// Forgets a doubt whose VMM is dead.
pub(super) fn settle_doubt(gate: &mut Gate, volume: Uuid) -> Result<(), JobError> {
    if gate.in_doubt.as_ref().is_some_and(|vmm| vmm.exit_now().is_none()) {
        return Err(JobError::InDoubt(volume));
    }
    gate.in_doubt = None;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_merge_hears_who_waits_and_leaves() {
        let gate = Arc::new(VolumeGate::default());
        let (inside, mut wanted) = gate.enter_humbly().await;
        let waiter = tokio::spawn({
            let gate = Arc::clone(&gate);
            async move { drop(gate.enter().await) }
        });
        wanted.wait_for(|count| *count > 0).await.unwrap();
        drop(inside);
        waiter.await.unwrap();
        // Who gives up waiting is not counted any more.
        let (inside, mut wanted) = gate.enter_humbly().await;
        let waiter = tokio::spawn({
            let gate = Arc::clone(&gate);
            async move { drop(gate.enter().await) }
        });
        wanted.wait_for(|count| *count > 0).await.unwrap();
        waiter.abort();
        wanted.wait_for(|count| *count == 0).await.unwrap();
        drop(inside);
    }
}
