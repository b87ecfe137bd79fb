//! What must hold between the rows and the host of a test when all has settled.

use std::collections::BTreeSet;

use serio_types::{MacAddr, Name};
use uuid::Uuid;

use super::sim_test::Sim;

impl Sim {
    /// Compares rows with the host; call it when all has settled.
    pub(super) fn assert_agreement(&self) {
        use serio_store::record::{Made, Run};
        let model = self.state().model();
        for vm in model.vms.values() {
            let process = self.world.processes.get(&vm.uid);
            match vm.run {
                Run::Paused => assert!(process.is_some(), "a paused VM has a process"),
                Run::Running => {
                    assert!(!process.is_some_and(|p| p.paused), "a VM that runs stands still");
                    let view = self.state().vm_view(vm);
                    assert_eq!(view.pid, Some(process.expect("a running VM has a process").pid));
                }
                Run::Off | Run::Failed => {
                    assert!(process.is_none(), "a VM that is off has a process");
                    assert!(!self.world.run_files.contains(&vm.uid), "a VM that is off has run files");
                }
                other => panic!("a VM stays {other}"),
            }
        }
        self.assert_own_devices();
        for uid in self.world.run_files.iter().chain(self.world.processes.keys()) {
            assert!(model.vms.contains_key(uid), "an orphan");
        }
        assert!(model.volumes.values().all(|v| v.state == Made::Ready), "a half-made volume");
        assert_eq!(
            model.volumes.keys().copied().collect::<BTreeSet<_>>(),
            self.world.volumes,
            "volumes and rows differ"
        );
        for volume in model.volumes.values() {
            assert!(volume.vm.is_none_or(|vm| model.vms.contains_key(&vm)), "a volume of no VM");
            // Of a whole whose deletion failed or waits nobody says what is there.
            let unclear = |name: &Name| {
                let group = model.snapshot(volume.uid, name).and_then(|s| model.vdc_snapshots.get(&s.group?));
                group.is_some_and(|group| group.state != Made::Ready)
            };
            let rows = model.snapshots_of(volume.uid).map(|s| s.name.clone());
            let rows: Vec<Name> = rows.filter(|name| !unclear(name)).collect();
            let mut points = self.world.points.get(&volume.uid).cloned().unwrap_or_default();
            points.retain(|name| !unclear(name));
            assert_eq!(rows, points, "points and rows differ");
            assert_eq!(Some(&volume.size_bytes), self.world.sizes.get(&volume.uid), "sizes differ");
            assert!(!volume.unsure, "nobody has looked");
        }
        for group in model.vdc_snapshots.values() {
            assert_ne!(group.state, Made::Creating, "a whole is neither there nor undone");
            if group.state == Made::Ready {
                let mut parts = model.parts_of(group.uid).peekable();
                assert!(
                    parts.peek().is_some() && parts.all(|p| p.state == Made::Ready),
                    "a whole without parts"
                );
            }
        }
        for operation in model.operations.values().filter(|o| o.end_time.is_none()) {
            // A head that is exported is merged when the export has ended.
            let subject = operation.subject.unwrap();
            let mut volumes = model.parts_of(subject).map(|p| p.volume).chain([subject]);
            assert!(volumes.any(|v| model.head_export(v).is_some()), "{operation:?} does not end");
        }
        assert_eq!(model.exports.keys().collect::<Vec<_>>(), self.world.exports.keys().collect::<Vec<_>>());
        assert_eq!(model.images.keys().copied().collect::<BTreeSet<_>>(), self.world.images);
        for vdc in model.vdcs.values() {
            let used = model.used(Some(vdc.uid));
            assert!(serio_vdc::admit_quota("", &vdc.quota, &used).is_ok(), "over quota");
        }
    }

    /// No guest has a device that is not in its VM's rows.
    fn assert_own_devices(&self) {
        let model = self.state().model();
        for (uid, process) in &self.world.processes {
            let vm = model.vms.get(uid).expect("a process is of a VM");
            let is_its = |volume: &Uuid| model.volumes.get(volume).is_some_and(|row| row.vm == Some(*uid));
            assert!(process.volumes.iter().all(is_its), "a guest has a volume that its row does not have");
            let is_its = |mac: &MacAddr| vm.spec.nics.iter().any(|nic| nic.mac == Some(*mac));
            assert!(process.nics.iter().all(is_its), "a guest has a card that its row does not have");
        }
    }
}
