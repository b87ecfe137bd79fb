//! What each vdc holds now, for those who act on it beside the state: the cgroups' limits, the meter, energy.
//!
//! Owns: the picture. Never: decisions. Sent whenever it has changed, as a whole, so that a reader that misses one is right
//! with the next.

use std::collections::BTreeMap;

use serio_store::record::{Made, VdcRecord};
use serio_types::{Name, Quota, VdcLimits};
use uuid::Uuid;

use super::{State, command::VmState};

/// All vdcs, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Holdings {
    /// In the order of their names.
    pub vdcs: Vec<VdcHolding>,
}

/// A vdc.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VdcHolding {
    /// Its id.
    pub uid: Uuid,
    /// Its name.
    pub name: Name,
    /// What it may use.
    pub quota: Quota,
    /// Its share and caps.
    pub limits: VdcLimits,
    /// Promised to its volumes.
    pub storage_bytes: u64,
    /// Its VMs.
    pub vms: Vec<VmHolding>,
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmHolding {
    /// Its id.
    pub uid: Uuid,
    /// Its name in the vdc.
    pub name: Name,
    /// Of its guest.
    pub vcpus: u32,
    /// Of its guest.
    pub memory_bytes: u64,
    /// Its cards.
    pub nics: usize,
    /// The process that runs it.
    pub pid: Option<u32>,
}

impl State {
    /// What each vdc holds now.
    #[must_use]
    pub fn holdings(&self) -> Holdings {
        let model = self.model();
        let holding = |vdc: &VdcRecord| VdcHolding {
            uid: vdc.uid,
            name: vdc.name.clone(),
            quota: vdc.quota,
            limits: vdc.limits,
            storage_bytes: 0,
            vms: Vec::new(),
        };
        let mut vdcs: BTreeMap<Uuid, VdcHolding> =
            model.vdcs.values().map(|vdc| (vdc.uid, holding(vdc))).collect();
        for vm in model.vms.values() {
            let (state, pid) = self.standing(vm);
            let Some(vdc) = vdcs.get_mut(&vm.vdc) else { continue };
            vdc.vms.push(VmHolding {
                uid: vm.uid,
                name: vm.name.clone(),
                vcpus: vm.spec.vcpus.get(),
                memory_bytes: vm.spec.memory.bytes(),
                nics: vm.spec.nics.len(),
                pid: pid.filter(|_| !matches!(state, VmState::Stopped | VmState::Failed)),
            });
        }
        for volume in model.volumes.values().filter(|volume| volume.state == Made::Ready) {
            let Some(vdc) = vdcs.get_mut(&volume.vdc) else { continue };
            vdc.storage_bytes = vdc.storage_bytes.saturating_add(volume.size_bytes);
        }
        let mut vdcs: Vec<VdcHolding> = vdcs.into_values().collect();
        vdcs.sort_by(|a, b| a.name.cmp(&b.name));
        Holdings { vdcs }
    }
}
