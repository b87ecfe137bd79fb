//! Volumes and cards that a running VM gets or gives back. Owns: the descriptors on their way. Never: their content.
//!
//! A card's bridge is in the run's `meta` before its tap is made: whoever cleans up after the VM looks at it.

use std::time::Duration;

use serio_control::message::{Body, Disk, Plug, Unplug};
use serio_types::MacAddr;
use uuid::Uuid;

use super::{
    DevicePlan, JobError, NicPlan, VmHandle, error::FileError, files::Descriptors, jobs, machine, rundir,
};

/// For opening a volume in a VMM: its maps are read.
const PLUG_WAIT: Duration = Duration::from_secs(60);
/// What it may take beyond the guest's time: its I/O is finished, its map is written.
const UNPLUG_MARGIN: Duration = Duration::from_secs(60);

impl VmHandle {
    /// Gives the guest a volume, at that place among its disks.
    ///
    /// # Errors
    /// [`JobError`]; [`JobError::Talk`] without a refusal: it may have it or not.
    pub async fn plug(&self, volume: Uuid, position: u32, limits: &DevicePlan) -> Result<(), JobError> {
        let inner = self.inner();
        let _entered = inner.enter_sure(volume).await?;
        let mut descriptors = Descriptors::default();
        let layers = descriptors.push_volume(&inner.volume_dir(volume), volume, false)?;
        let key = inner.key_of(volume).await?;
        let direct = inner.settings.direct_io.wants(key.is_some());
        let limits = limits.disk(volume).and_then(machine::limits);
        let disk = Disk { volume_id: volume.to_string(), layers, read_only: false, key, limits, direct };
        let body = Body::Plug(Plug { disk: Some(disk), nic: None, position });
        jobs::done(&self.ask(body, descriptors.as_slice(), PLUG_WAIT).await?)
    }

    /// Asks the guest to let go of a volume; it is closed then.
    ///
    /// # Errors
    /// [`JobError`]: it has it still.
    pub async fn unplug(&self, volume: Uuid, wait: Duration) -> Result<(), JobError> {
        let _entered = self.inner().enter_sure(volume).await?;
        let wait_ms = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX);
        let body = Body::Unplug(Unplug { volume_id: volume.to_string(), mac: Vec::new(), wait_ms });
        jobs::done(&self.ask(body, &[], wait.saturating_add(UNPLUG_MARGIN)).await?)
    }

    /// Gives the guest a card, at that place among its cards. The plan's tap is a first choice: a card that came before may have it.
    ///
    /// # Errors
    /// [`JobError`]; [`JobError::Talk`] without a refusal: it may have it or not.
    pub async fn plug_nic(&self, plan: &NicPlan, position: u32, limits: &DevicePlan) -> Result<(), JobError> {
        let inner = self.inner();
        self.remember_bridge(&plan.bridge)?;
        let taps = inner.net.attach(&plan.bridge, &plan.tap, plan.mtu, plan.pairs).await?;
        let mut descriptors = Descriptors::default();
        let mut nic = descriptors.push_nic(plan, taps, limits);
        if inner.settings.vhost_net {
            descriptors.push_vhosts(&mut nic);
        }
        let body = Body::Plug(Plug { disk: None, nic: Some(nic), position });
        let answer = self.ask(body, descriptors.as_slice(), PLUG_WAIT).await;
        // Without them nobody has the tap who does not want it.
        drop(descriptors);
        let done = answer.map_err(JobError::from).and_then(|answer| jobs::done(&answer));
        if done.is_err() {
            inner.net.release(std::slice::from_ref(&plan.bridge)).await;
        }
        done
    }

    /// Asks the guest to let go of a card; its tap is gone then, and a bridge that was for it alone.
    ///
    /// # Errors
    /// [`JobError`]: it has it still.
    pub async fn unplug_nic(&self, mac: MacAddr, bridge: String, wait: Duration) -> Result<(), JobError> {
        let wait_ms = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX);
        let body = Body::Unplug(Unplug { volume_id: String::new(), mac: mac.bytes().to_vec(), wait_ms });
        jobs::done(&self.ask(body, &[], wait.saturating_add(UNPLUG_MARGIN)).await?)?;
        self.inner().net.release(&[bridge]).await;
        Ok(())
    }

    fn remember_bridge(&self, bridge: &str) -> Result<(), FileError> {
        let path = self.run().meta();
        match rundir::read_meta(&path) {
            Some(mut meta) if !meta.bridges.iter().any(|known| known == bridge) => {
                meta.bridges.push(bridge.to_owned());
                rundir::write_meta(&path, &meta)
            }
            _ => Ok(()),
        }
    }
}
