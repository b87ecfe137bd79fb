//! Gives each vdc the cgroup that it is promised: whenever the state's picture changes, and once for all at each start.
//!
//! Owns: the comparison of what is wanted with what was applied. Never: the cgroups themselves (`supervise::cgroup`). What was
//! asked for and this host cannot enforce is an event of the vdc, once until that changes.

use std::collections::BTreeMap;

use serio_types::{Name, resource};
use tokio::sync::watch;

use crate::{
    state::{
        command::Command,
        holdings::{Holdings, VdcHolding},
        owner::Client,
    },
    supervise::{Supervisor, VdcGroup},
};

/// Applies shares.
#[derive(Debug, Clone)]
pub struct Shares {
    /// Makes the groups.
    pub supervisor: Supervisor,
    /// Hears what cannot be enforced.
    pub state: Client,
}

fn group(vdc: &VdcHolding) -> VdcGroup {
    VdcGroup { name: vdc.name.clone(), quota: vdc.quota, limits: vdc.limits }
}

/// The groups that differ from what was applied.
fn changed(applied: &BTreeMap<Name, VdcGroup>, holdings: &Holdings) -> Vec<VdcGroup> {
    holdings.vdcs.iter().map(group).filter(|group| applied.get(&group.name) != Some(group)).collect()
}

impl Shares {
    /// Runs until the state ends.
    pub async fn run(self, mut holdings: watch::Receiver<Holdings>) {
        let mut applied: BTreeMap<Name, VdcGroup> = BTreeMap::new();
        let mut told: BTreeMap<Name, Vec<String>> = BTreeMap::new();
        let first = holdings.borrow().clone();
        self.blocking(move |supervisor| {
            for vdc in &first.vdcs {
                vdc.vms.iter().for_each(|vm| supervisor.place(vm.uid, &vdc.name, vm.vcpus));
            }
        })
        .await;
        loop {
            let now = holdings.borrow_and_update().clone();
            let groups = changed(&applied, &now);
            let names: Vec<Name> = now.vdcs.iter().map(|vdc| vdc.name.clone()).collect();
            let gone = applied.keys().any(|name| !names.contains(name)) || applied.is_empty();
            applied.retain(|name, _| names.contains(name));
            told.retain(|name, _| names.contains(name));
            let work = groups.clone();
            let missing = self
                .blocking(move |supervisor| {
                    if gone {
                        supervisor.keep_vdcs(&names);
                    }
                    work.iter().map(|group| supervisor.share(group)).collect::<Vec<_>>()
                })
                .await
                .unwrap_or_default();
            for (group, missing) in groups.into_iter().zip(missing) {
                self.tell(&group.name, missing, &mut told).await;
                applied.insert(group.name.clone(), group);
            }
            if holdings.changed().await.is_err() {
                return;
            }
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Supervisor) -> T + Send + 'static,
    ) -> Option<T> {
        let supervisor = self.supervisor.clone();
        tokio::task::spawn_blocking(move || work(&supervisor)).await.ok()
    }

    async fn tell(&self, vdc: &Name, missing: Vec<String>, told: &mut BTreeMap<Name, Vec<String>>) {
        if told.get(vdc).map_or(missing.is_empty(), |before| *before == missing) {
            return;
        }
        let (kind, message) = match missing.is_empty() {
            true => ("enforced", "all limits are enforced again".to_owned()),
            false => ("not-enforced", format!("not enforced on this host: {}", missing.join("; "))),
        };
        let note = Command::Note { resource: resource::vdc(vdc), kind, message };
        if let Err(error) = self.state.ask(note).await {
            tracing::warn!(%vdc, %error, "an event could not be written");
        }
        told.insert(vdc.clone(), missing);
    }
}
