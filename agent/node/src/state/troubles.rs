//! What of running VMs does not work now, because of the host. Kept in memory: the VMMs tell it again after a start.

use serio_store::record::Millis;
use serio_types::resource;
use uuid::Uuid;

use super::{State, phase::Phase};
use crate::supervise::TroubleReport;

/// A trouble, and since when it is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TroubleView {
    /// What.
    pub report: TroubleReport,
    /// "vdcs/ardesio/volumes/web-root", or a card's address.
    pub device: String,
    /// Since when.
    pub since: Millis,
}

impl State {
    /// A VMM says what does not work now: all of it.
    pub(super) fn troubled(&mut self, vm: Uuid, pid: u32, reports: Vec<TroubleReport>) {
        if !self.has_process(vm, pid) {
            return;
        }
        let resource = self.model.vm_resource(vm);
        let before = self.troubles.remove(&vm).unwrap_or_default();
        let same = |a: &TroubleReport, b: &TroubleReport| (a.kind, &a.device) == (b.kind, &b.device);
        let mut notes = Vec::new();
        for old in before.iter().filter(|old| !reports.iter().any(|new| same(&old.report, new))) {
            let message = format!("{} works again; it was {}", old.device, old.report.reason);
            notes.push(self.event(resource.clone(), "recovered", message));
        }
        let mut now = Vec::with_capacity(reports.len());
        for report in reports {
            let old = before.iter().find(|old| same(&old.report, &report));
            let device = self.device_name(&report.device);
            if old.is_none() {
                let message = format!("{device}: {}", report.reason);
                notes.push(self.event(resource.clone(), report.kind.as_str(), message));
            }
            now.push(TroubleView { device, since: old.map_or(self.now, |old| old.since), report });
        }
        if !now.is_empty() {
            self.troubles.insert(vm, now);
        }
        if !notes.is_empty() {
            self.record(notes);
        }
    }

    /// Whether the VM runs in that process.
    pub(super) fn has_process(&self, vm: Uuid, pid: u32) -> bool {
        match self.phases.get(&vm) {
            Some(Phase::Running { pid: its } | Phase::Stopping { pid: its, .. }) => *its == pid,
            _ => false,
        }
    }

    /// A volume's name for its uid; everything else is its own name.
    fn device_name(&self, device: &str) -> String {
        let volume = device.parse().ok().and_then(|uid: Uuid| self.model.volumes.get(&uid));
        volume.map_or_else(|| device.to_owned(), |row| resource::volume(&self.model.volume_name(row)))
    }
}
