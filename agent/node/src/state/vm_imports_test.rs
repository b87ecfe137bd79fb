//! VMs that come with a snapshot: whole, refused, or broken off at every step.

use serio_store::record::{Made, Millis, Run};
use serio_types::{DeviceLimits, IoLimits, LimitedDevice, Name, VdcName};
use tokio::sync::oneshot;
use uuid::Uuid;

use super::{
    command::{Answer, Command, Mutation, Request, VmImport, VmImportPlan, VmState},
    effect::Input,
    sim_test::{Sim, spec},
};
use crate::error::Error;

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn web() -> VdcName {
    "ardesio/web".parse().unwrap()
}

/// A VM of two disks, whose point goes on from two others.
fn import() -> VmImport {
    let mut spec = *spec(1);
    spec.volumes.push(name("data"));
    let limits = IoLimits { operations_per_second: 9, ..IoLimits::default() };
    spec.machine.device_limits = vec![DeviceLimits { device: LimitedDevice::Volume(name("data")), limits }];
    spec.nics[0].mac = Some("52:54:00:00:00:01".parse().unwrap());
    let size = (1u64 << 20).try_into().unwrap();
    VmImport {
        name: web(),
        point: name("friday"),
        create_time: Millis(1_800_000_000_000),
        spec,
        image_blake3: Some(String::new()),
        new_macs: false,
        volumes: vec![(name("web-root"), size), (name("data"), size)],
        rename: false,
        bases: 2,
        held_bytes: 5,
        paused_ns: 7,
    }
}

fn begin(sim: &mut Sim, import: VmImport) -> Result<VmImportPlan, Error> {
    match sim.ask(Mutation::BeginVmImport(Box::new(import)))? {
        Answer::VmImport(plan) => Ok(plan),
        other => panic!("{other:?}"),
    }
}

/// What the gRPC side does of it, as far as `parts` go.
fn fill(sim: &mut Sim, plan: &VmImportPlan, parts: usize) {
    sim.world.saved.extend(plan.points.iter().take(parts));
    for (volume, size) in plan.volumes.iter().take(parts.saturating_sub(plan.points.len())) {
        sim.world.volumes.insert(*volume);
        sim.world.sizes.insert(*volume, *size);
        sim.world.points.entry(*volume).or_default().push(name("friday"));
    }
}

fn command(sim: &mut Sim, command: Command) -> Result<Answer, Error> {
    let (reply, mut waiting) = oneshot::channel();
    sim.input(Input::Command(command, reply));
    sim.settle();
    waiting.try_recv().expect("each command is answered")
}

fn furnished() -> Sim {
    let mut sim = Sim::new();
    sim.furnish();
    sim
}

/// Nothing of it, in rows and files, and its name is free.
fn is_empty(sim: &mut Sim) {
    let model = sim.state().model();
    assert!(model.vms.is_empty() && model.volumes.is_empty(), "{:?}", model.volumes);
    assert!(model.vdc_snapshots.is_empty() && model.snapshots.is_empty());
    assert!(sim.world.volumes.is_empty(), "{:?}", sim.world.volumes);
    sim.assert_agreement();
    begin(sim, import()).unwrap();
}

#[test]
fn a_vm_that_came_whole_goes_on_from_its_point() {
    let mut sim = furnished();
    let plan = begin(&mut sim, import()).unwrap();
    assert_eq!((plan.points.len(), plan.volumes.len(), plan.key_owner), (3, 2, None));
    assert!(matches!(sim.ask(Mutation::StartVm { name: web() }), Err(Error::Busy { .. })));
    assert!(matches!(begin(&mut sim, import()), Err(Error::Exists { .. })));
    let restore = Mutation::RestoreVm { name: web(), point: name("friday"), discard_later: false };
    assert!(sim.ask(restore.clone()).is_err(), "it is not whole");
    fill(&mut sim, &plan, 5);
    let made = command(&mut sim, Command::FinishVmImport(plan.vm)).unwrap();
    let Answer::VdcSnapshot(view) = made else { panic!("{made:?}") };
    assert_eq!(view.resource, "vdcs/ardesio/vms/web/snapshots/friday");
    let saved = view.record.saved.unwrap();
    assert_eq!(view.record.create_time, import().create_time);
    assert_eq!((saved.bases.as_slice(), saved.memory_bytes, saved.paused_ns), (&plan.points[1..], 5, 7));
    assert!(view.parts.iter().all(|part| part.record.state == Made::Ready));
    let vm = sim.vm("ardesio/web").unwrap();
    assert_eq!(
        (vm.state, vm.record.run, vm.record.spec.clone()),
        (VmState::Stopped, Run::Off, import().spec)
    );
    sim.assert_agreement();
    assert!(command(&mut sim, Command::FinishVmImport(plan.vm)).is_err(), "it is done");
    let why = Error::invalid("data", "too late");
    assert!(command(&mut sim, Command::AbortVmImport(plan.vm, why)).is_err());
    // Whole, it survives a restart, and a late word about it.
    sim.kill();
    sim.start();
    sim.settle();
    sim.ask(restore).unwrap();
    assert_eq!(sim.vm("ardesio/web").unwrap().state, VmState::Running);
    sim.ask(Mutation::DeleteVm { name: web(), keep_root_volume: false, force: true }).unwrap();
    sim.settle();
    assert!(sim.world.saved.is_empty(), "with what it goes on from");
    sim.assert_agreement();
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_made() {
    let refused = |change: &dyn Fn(&mut VmImport)| {
        let mut sim = furnished();
        let mut import = import();
        change(&mut import);
        let error = begin(&mut sim, import).unwrap_err();
        is_empty(&mut sim);
        error.to_string()
    };
    let size = |bytes: u64| bytes.try_into().unwrap();
    assert!(refused(&|i| i.spec.memory = (512 << 20).try_into().unwrap()).contains("memory"));
    assert!(refused(&|i| i.volumes[1].1 = size(1 << 31)).contains("storage"));
    assert!(refused(&|i| i.spec.image = name("other")).contains("images/other"));
    assert!(refused(&|i| i.image_blake3 = Some("ab".to_owned())).contains("another disk"));
    assert!(refused(&|i| i.name = "none/web".parse().unwrap()).contains("vdcs/none"));
    assert!(refused(&|i| i.volumes[1].0 = name("web-root")).contains("web-root exists"));
    let long = format!("ardesio/{}", "a".repeat(60));
    assert!(refused(&|i| (i.name, i.rename) = (long.parse().unwrap(), true)).contains("too long"));
    // A volume that is called `root` would get the root's name.
    assert!(
        refused(&|i| {
            (i.rename, i.volumes[1].0) = (true, name("root"));
            i.spec.volumes = vec![name("root")];
        })
        .contains("web-root exists")
    );
}

#[test]
fn another_name_and_other_addresses_make_room_beside_it() {
    let mut sim = furnished();
    let plan = begin(&mut sim, import()).unwrap();
    fill(&mut sim, &plan, 5);
    command(&mut sim, Command::FinishVmImport(plan.vm)).unwrap();
    let beside = VmImport { name: "ardesio/web2".parse().unwrap(), rename: true, ..import() };
    let taken = begin(&mut sim, beside.clone()).unwrap_err().to_string();
    assert!(taken.contains("52:54:00:00:00:01"), "{taken}");
    let plan = begin(&mut sim, VmImport { new_macs: true, ..beside }).unwrap();
    fill(&mut sim, &plan, 5);
    command(&mut sim, Command::FinishVmImport(plan.vm)).unwrap();
    let vm = sim.vm("ardesio/web2").unwrap();
    assert_eq!(vm.root_volume.unwrap().to_string(), "ardesio/web2-root");
    assert_eq!(vm.record.spec.volumes, [name("web2-data")]);
    let limited = &vm.record.spec.machine.device_limits[0].device;
    assert_eq!(*limited, LimitedDevice::Volume(name("web2-data")));
    assert_ne!(vm.record.spec.nics[0].mac, import().spec.nics[0].mac);
    sim.assert_agreement();
}

/// After each part that came: given up, or seriod dies, also while it gives up.
#[test]
fn what_breaks_off_anywhere_leaves_nothing() {
    for parts in 0..6 {
        let mut sim = furnished();
        let plan = begin(&mut sim, import()).unwrap();
        fill(&mut sim, &plan, parts);
        let error =
            command(&mut sim, Command::AbortVmImport(plan.vm, Error::invalid("data", "cut"))).unwrap_err();
        assert!(error.to_string().contains("cut"), "{error}");
        is_empty(&mut sim);

        let mut sim = furnished();
        let plan = begin(&mut sim, import()).unwrap();
        fill(&mut sim, &plan, parts);
        sim.kill();
        sim.start();
        sim.settle();
        is_empty(&mut sim);

        for steps in 0..4 {
            let mut sim = furnished();
            let plan = begin(&mut sim, import()).unwrap();
            fill(&mut sim, &plan, parts);
            let (reply, _waiting) = oneshot::channel();
            sim.input(Input::Command(Command::AbortVmImport(plan.vm, Error::Ending), reply));
            for _ in 0..steps {
                let Some(effect) = sim.todo.pop() else { break };
                if let Some(input) = sim.world.perform(effect) {
                    sim.input(input);
                }
            }
            sim.kill();
            sim.start();
            sim.settle();
            is_empty(&mut sim);
        }
    }
}

#[test]
fn the_same_request_again_is_not_another_import() {
    let mut sim = furnished();
    let request =
        |id: u128| Request { id: Uuid::from_u128(id), method: "ImportVmSnapshot", digest: String::new() };
    let begin = |sim: &mut Sim| {
        let mut waiting = sim.send(Mutation::BeginVmImport(Box::new(import())), Some(request(1)));
        sim.settle();
        waiting.try_recv().unwrap()
    };
    let Ok(Answer::VmImport(plan)) = begin(&mut sim) else { panic!("not begun") };
    assert!(matches!(begin(&mut sim), Err(Error::Busy { .. })));
    let _ = command(&mut sim, Command::AbortVmImport(plan.vm, Error::Ending));
    let Ok(Answer::VmImport(plan)) = begin(&mut sim) else {
        panic!("it was undone, so it may be tried again")
    };
    fill(&mut sim, &plan, 5);
    command(&mut sim, Command::FinishVmImport(plan.vm)).unwrap();
    assert!(matches!(begin(&mut sim), Ok(Answer::VdcSnapshot(_))));
}
