//! A host made of sets, for tests of the state: effects change it, fail, are cut short. It panics at what must never be.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use serio_store::{Store, record::PointClass};
use serio_types::{Name, Quota, VdcLimits, VmSpec};
use tokio::sync::oneshot;
use uuid::Uuid;

use super::{
    State,
    command::{Answer, Command, ImportedFiles, Mutation, Query, Request, VmView},
    effect::{Adopted, Effect, Goal, Input, Launch, Merged, Part, SealedPart, Started, Timer},
    model::{Model, now},
    recover::Found,
};
use crate::{
    error::Error,
    supervise::{EndKind, EndRecord, PointInfo, VolumeInfo},
};

/// A VMM.
#[derive(Debug, Clone)]
pub(super) struct Process {
    pub(super) pid: u32,
    pub(super) from_disk: bool,
    volumes: Vec<Uuid>,
}

/// A merge that goes on.
#[derive(Debug, Clone)]
pub(super) struct Merging {
    operation: Uuid,
    goal: Goal,
    vm: Option<Uuid>,
}

/// The host.
#[derive(Debug, Default)]
pub(super) struct World {
    pub(super) processes: BTreeMap<Uuid, Process>,
    pub(super) run_files: BTreeSet<Uuid>,
    ends: BTreeMap<Uuid, EndRecord>,
    pub(super) volumes: BTreeSet<Uuid>,
    pub(super) points: BTreeMap<Uuid, Vec<Name>>,
    /// What a guest would see.
    pub(super) sizes: BTreeMap<Uuid, u64>,
    /// Merges that go on, by volume.
    pub(super) merges: BTreeMap<Uuid, Merging>,
    /// Inputs that an effect caused besides its own.
    pub(super) aside: Vec<Input>,
    /// With the volume whose head it has open.
    pub(super) exports: BTreeMap<Name, Option<Uuid>>,
    pub(super) images: BTreeSet<Uuid>,
    pids: u32,
    /// The next effect that can fail does.
    pub(super) fail: bool,
}

impl World {
    pub(super) fn failure(&mut self) -> Result<(), Error> {
        if std::mem::take(&mut self.fail) {
            return Err(Error::Failed { doing: "the test", why: "a failure was asked for".to_owned() });
        }
        Ok(())
    }

    /// A merge gives way.
    pub(super) fn interrupt(&mut self, volume: Uuid) {
        if let Some(merge) = self.merges.remove(&volume) {
            let (operation, outcome) = (merge.operation, Merged::Interrupted);
            self.aside.push(Input::Merged { volume, operation, outcome });
        }
    }

    /// A merge comes to its end.
    pub(super) fn finish_merge(&mut self, volume: Uuid) -> Option<Input> {
        let merge = self.merges.remove(&volume)?;
        let outcome = match self.failure() {
            Err(error) => Merged::Failed(error),
            Ok(()) => {
                if let Goal::Snapshot(name) = &merge.goal {
                    self.points.entry(volume).or_default().retain(|point| point != name);
                }
                Merged::Done
            }
        };
        Some(Input::Merged { volume, operation: merge.operation, outcome })
    }

    fn begin_merge(&mut self, volume: Uuid, merge: Merging) -> Option<Input> {
        let operation = merge.operation;
        let answer = |outcome| Some(Input::Merged { volume, operation, outcome });
        assert!(!self.merges.contains_key(&volume), "a volume has two merges");
        match merge.vm {
            Some(vm) if !self.processes.contains_key(&vm) => return answer(Merged::Interrupted),
            // The lock says so: somebody was faster.
            None if self.is_open(volume) => return answer(Merged::Busy("in the test".to_owned())),
            _ => {}
        }
        self.merges.insert(volume, merge);
        None
    }

    fn is_open(&self, volume: Uuid) -> bool {
        self.processes.values().any(|p| p.volumes.contains(&volume))
            || self.exports.values().any(|head| *head == Some(volume))
    }

    /// Seals all, some, or none.
    pub(super) fn seal_parts(
        &mut self,
        name: &Name,
        parts: &[Part],
        whole: bool,
    ) -> Result<Vec<SealedPart>, Error> {
        let mut sealed = Vec::new();
        for (index, part) in parts.iter().enumerate() {
            self.interrupt(part.volume);
            if !whole && index * 2 >= parts.len() {
                return Err(Error::Ending);
            }
            match part.vm {
                Some(vm) if !self.processes.contains_key(&vm) => return Err(Error::Ending),
                Some(_) => {}
                None => self.assert_closed(part.volume),
            }
            self.points.entry(part.volume).or_default().push(name.clone());
            sealed.push(SealedPart { volume: part.volume, class: PointClass::Crash, reason: String::new() });
        }
        Ok(sealed)
    }

    /// Panics if somebody has the volume open.
    fn assert_closed(&self, volume: Uuid) {
        assert!(
            !self.processes.values().any(|p| p.volumes.contains(&volume)),
            "a volume of a running VM is opened again"
        );
        assert!(
            !self.exports.values().any(|head| *head == Some(volume)),
            "a volume with an exported head is opened again"
        );
    }

    pub(super) fn launch(&mut self, launch: &Launch) -> u32 {
        assert!(!self.processes.contains_key(&launch.vm), "a VM is started twice");
        for volume in &launch.volumes {
            self.interrupt(*volume);
            assert!(self.volumes.contains(volume), "a VM is started without its volume");
            self.assert_closed(*volume);
        }
        self.pids += 1;
        self.run_files.insert(launch.vm);
        self.ends.remove(&launch.vm);
        let (pid, from_disk, volumes) = (self.pids, launch.from_disk, launch.volumes.clone());
        self.processes.insert(launch.vm, Process { pid, from_disk, volumes });
        self.pids
    }

    /// A process ends, with its word. Its run files stay.
    pub(super) fn end(&mut self, vm: Uuid, kind: EndKind) -> Option<Input> {
        let process = self.processes.remove(&vm)?;
        for volume in &process.volumes {
            self.interrupt(*volume);
        }
        let end = EndRecord { kind, reason: "in the test".to_owned() };
        self.ends.insert(vm, end.clone());
        Some(Input::Ended { vm, pid: process.pid, end })
    }

    /// Does an effect; `None` when its answer is another input's, or none.
    pub(super) fn perform(&mut self, effect: Effect) -> Option<Input> {
        Some(match effect {
            Effect::CreateVolume { volume, size_bytes, .. } => {
                let result = self.failure().map(|()| self.make(volume, size_bytes));
                Input::VolumeCreated { volume, result }
            }
            Effect::CloneVolume { volume, size_bytes, source, point } => {
                let known = self.points.get(&source).is_some_and(|points| points.contains(&point));
                assert!(known, "a clone of a point that is not there");
                self.interrupt(source);
                let result = self.failure().map(|()| self.make(volume, size_bytes));
                Input::VolumeCreated { volume, result }
            }
            Effect::Resize { volume, size_bytes, vm } => {
                Input::Resized { volume, result: self.resize(volume, size_bytes, vm) }
            }
            Effect::Rollback { volume, point, .. } => {
                Input::RolledBack { volume, result: self.rollback(volume, &point) }
            }
            Effect::Merge { volume, operation, goal, vm } => {
                return self.begin_merge(volume, Merging { operation, goal, vm });
            }
            Effect::CancelOperation { operation } => {
                let volumes: Vec<Uuid> =
                    self.merges.iter().filter(|(_, m)| m.operation == operation).map(|(v, _)| *v).collect();
                volumes.into_iter().for_each(|volume| self.interrupt(volume));
                return None;
            }
            Effect::VdcSnapshot { group, name, parts, .. } => {
                let whole = self.failure().is_ok();
                Input::VdcSnapshotted { group, result: self.seal_parts(&name, &parts, whole) }
            }
            Effect::DeleteVolume { volume } => Input::VolumeDeleted { volume, result: self.delete(volume) },
            Effect::Launch(launch) => {
                let result = self.failure().map(|()| Started { pid: self.launch(&launch), kernel: None });
                Input::Launched { vm: launch.vm, result }
            }
            Effect::Adopt { vm } => Input::Adopted { vm, found: self.adopt(vm) },
            Effect::PowerButton { .. } | Effect::Timer { .. } => return None,
            Effect::Stop { vm } => return self.end(vm, EndKind::Stopped),
            Effect::Reset { vm } => Input::Reset { vm, result: self.reset(vm) },
            Effect::Clean { vm } => {
                // Its watcher would tell of the end: the state does not wait for it here.
                let process = self.processes.remove(&vm);
                process.iter().flat_map(|p| p.volumes.clone()).for_each(|volume| self.interrupt(volume));
                self.run_files.remove(&vm);
                Input::Cleaned { vm }
            }
            Effect::RemoveVm { vm, volume } => {
                Input::VmRemoved { vm, result: volume.map_or(Ok(()), |volume| self.delete(volume)) }
            }
            Effect::Snapshot { volume, name, vm } => {
                Input::Snapshotted { volume, result: self.snapshot(volume, name, vm) }
            }
            Effect::Inspect { volume } => Input::Inspected { volume, result: Ok(self.inspect(volume)) },
            Effect::StartExport { id, volume, snapshot, .. } => {
                let result = self.failure().map(|()| self.start_export(&id, volume, snapshot.is_none()));
                Input::ExportStarted { id, result }
            }
            Effect::AdoptExport { id } => Input::ExportAdopted { runs: self.exports.contains_key(&id), id },
            Effect::EndExport { id } => {
                self.exports.remove(&id);
                Input::ExportEnded { id }
            }
            Effect::RemoveImage { image } => {
                self.images.remove(&image);
                Input::ImageRemoved { image, result: Ok(()) }
            }
        })
    }

    pub(super) fn make(&mut self, volume: Uuid, size_bytes: u64) {
        self.volumes.insert(volume);
        self.sizes.insert(volume, size_bytes);
    }

    fn resize(&mut self, volume: Uuid, size_bytes: u64, vm: Option<Uuid>) -> Result<(), Error> {
        self.interrupt(volume);
        match vm {
            Some(vm) if !self.processes.contains_key(&vm) => return Err(Error::Ending),
            Some(_) => {}
            None => self.assert_closed(volume),
        }
        self.failure()?;
        assert!(
            self.sizes.insert(volume, size_bytes).is_some_and(|before| before < size_bytes),
            "a volume shrinks"
        );
        Ok(())
    }

    fn rollback(&mut self, volume: Uuid, point: &Name) -> Result<VolumeInfo, Error> {
        self.interrupt(volume);
        self.assert_closed(volume);
        self.failure()?;
        let points = self.points.entry(volume).or_default();
        let at = points.iter().position(|p| p == point).expect("the point is there");
        points.truncate(at + 1);
        Ok(self.inspect(volume))
    }

    fn delete(&mut self, volume: Uuid) -> Result<(), Error> {
        self.interrupt(volume);
        self.assert_closed(volume);
        self.sizes.remove(&volume);
        self.points.remove(&volume);
        self.volumes.remove(&volume);
        Ok(())
    }

    fn adopt(&mut self, vm: Uuid) -> Adopted {
        if let Err(error) = self.failure() {
            return Adopted::Silent(error.to_string());
        }
        match self.processes.get(&vm) {
            Some(process) => Adopted::Runs { pid: process.pid },
            None => Adopted::Gone(self.ends.get(&vm).cloned().filter(|_| self.run_files.contains(&vm))),
        }
    }

    fn snapshot(&mut self, volume: Uuid, name: Name, vm: Option<Uuid>) -> Result<(), Error> {
        self.interrupt(volume);
        match vm {
            Some(vm) if !self.processes.contains_key(&vm) => return Err(Error::Ending),
            Some(_) => {}
            None => self.assert_closed(volume),
        }
        self.failure()?;
        self.points.entry(volume).or_default().push(name);
        Ok(())
    }

    fn inspect(&self, volume: Uuid) -> VolumeInfo {
        let points = self.points.get(&volume).into_iter().flatten();
        let point = |(layer, name): (u64, &Name)| PointInfo { name: name.to_string(), layer, create_time: 0 };
        let size_bytes = self.sizes.get(&volume).copied().unwrap_or_default();
        VolumeInfo { size_bytes, snapshots: (0..).zip(points).map(point).collect(), chain: vec![0] }
    }

    fn start_export(&mut self, id: &Name, volume: Uuid, head: bool) {
        self.interrupt(volume);
        if head {
            self.assert_closed(volume);
        }
        self.exports.insert(id.clone(), head.then_some(volume));
    }
}

/// A state over a store in a file, the host, and what is under way between them.
pub(super) struct Sim {
    dir: tempfile::TempDir,
    pub(super) state: Option<State>,
    pub(super) world: World,
    /// Effects that were handed out and not begun.
    pub(super) todo: Vec<Effect>,
    /// Inputs on their way.
    pub(super) ready: Vec<Input>,
    /// Timers that run.
    pub(super) timers: Vec<Timer>,
}

/// What a client waits for.
pub(super) type Waiting = oneshot::Receiver<Result<Answer, Error>>;

pub(super) fn capacity() -> Quota {
    Quota { vcpus: 12, memory_bytes: 1 << 30, storage_bytes: 1 << 40 }
}

impl Sim {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir_in(if PathBuf::from("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" })
            .unwrap();
        let mut sim =
            Self { dir, state: None, world: World::default(), todo: vec![], ready: vec![], timers: vec![] };
        sim.start();
        sim
    }

    /// A new seriod over the same store and host.
    pub(super) fn start(&mut self) {
        let (store, contents) = Store::open(&self.dir.path().join("state.db")).unwrap();
        let mut state = State::new(store, Model::new(contents), capacity());
        let found = Found {
            vms: self.world.run_files.iter().copied().collect(),
            exports: self.world.exports.keys().map(Name::to_string).collect(),
        };
        self.todo = state.recover(now(), &found);
        self.state = Some(state);
        self.sort_timers();
    }

    fn sort_timers(&mut self) {
        let (timers, todo) =
            std::mem::take(&mut self.todo).into_iter().partition(|e| matches!(e, Effect::Timer { .. }));
        self.todo = todo;
        let timers: Vec<Effect> = timers;
        self.timers.extend(timers.into_iter().filter_map(|e| match e {
            Effect::Timer { timer, .. } => Some(timer),
            _ => None,
        }));
    }

    pub(super) fn state(&self) -> &State {
        self.state.as_ref().unwrap()
    }

    /// Delivers an input.
    pub(super) fn input(&mut self, input: Input) {
        let effects = self.state.as_mut().unwrap().step(now(), input);
        self.todo.extend(effects);
        self.sort_timers();
    }

    /// Kills seriod: nothing that was not begun will be, and what was on its way is lost.
    pub(super) fn kill(&mut self) {
        self.state = None;
        self.todo.clear();
        self.ready.clear();
        self.timers.clear();
        // Jobs end with their connection; a VMM merges on, and is asked again.
        self.world.merges.clear();
        self.world.aside.clear();
    }

    /// Begins and finishes everything that is under way; timers too, but those of exports.
    pub(super) fn settle(&mut self) {
        for _ in 0..10_000 {
            self.ready.append(&mut self.world.aside);
            if let Some(effect) = self.todo.pop() {
                let input = self.world.perform(effect);
                self.ready.extend(input);
            } else if let Some(volume) = self.world.merges.keys().next().copied() {
                let input = self.world.finish_merge(volume);
                self.ready.extend(input);
            } else if !self.ready.is_empty() {
                let input = self.ready.remove(0);
                self.input(input);
            } else if let Some(at) =
                self.timers.iter().position(|t| !matches!(t, Timer::ExportExpired { .. }))
            {
                let timer = self.timers.remove(at);
                self.input(Input::Timer(timer));
            } else {
                return;
            }
        }
        panic!("the state does not come to rest");
    }

    pub(super) fn settle_without_timers(&mut self) {
        let timers = std::mem::take(&mut self.timers);
        while !(self.todo.is_empty() && self.ready.is_empty() && self.world.aside.is_empty()) {
            self.ready.append(&mut self.world.aside);
            if let Some(effect) = self.todo.pop() {
                let input = self.world.perform(effect);
                self.ready.extend(input);
            } else if !self.ready.is_empty() {
                let input = self.ready.remove(0);
                self.input(input);
            }
        }
        self.timers.extend(timers);
    }

    pub(super) fn send(&mut self, mutation: Mutation, request: Option<Request>) -> Waiting {
        let (reply, waiting) = oneshot::channel();
        self.input(Input::Command(Command::Mutate(mutation, request), reply));
        waiting
    }

    /// Asks and does all that follows (but timers).
    pub(super) fn ask(&mut self, mutation: Mutation) -> Result<Answer, Error> {
        let mut waiting = self.send(mutation, None);
        self.settle_without_timers();
        waiting.try_recv().expect("each command is answered")
    }

    pub(super) fn query(&mut self, query: Query) -> Result<Answer, Error> {
        let (reply, mut waiting) = oneshot::channel();
        self.input(Input::Command(Command::Query(query), reply));
        waiting.try_recv().expect("a question is answered at once")
    }

    pub(super) fn vm(&mut self, name: &str) -> Option<VmView> {
        match self.query(Query::Vm(name.parse().unwrap())) {
            Ok(Answer::Vms(mut views)) => views.pop(),
            _ => None,
        }
    }

    /// An image and a vdc to work with.
    pub(super) fn furnish(&mut self) {
        let begin = Mutation::BeginImport { name: "tiny".parse().unwrap(), cmdline: Default::default() };
        let Ok(Answer::Import(uid)) = self.ask(begin) else { panic!("no import") };
        self.world.images.insert(uid);
        let blake3 = String::new();
        let files = ImportedFiles { uid, size_bytes: 1 << 20, blake3, has_kernel: true, has_initrd: false };
        let (reply, mut waiting) = oneshot::channel();
        self.input(Input::Command(Command::FinishImport(files), reply));
        waiting.try_recv().unwrap().unwrap();
        let (name, limits) = ("ardesio".parse().unwrap(), VdcLimits::default());
        let quota = Quota { vcpus: 8, memory_bytes: 256 << 20, storage_bytes: 1 << 30 };
        self.ask(Mutation::CreateVdc { name, quota, limits, encrypted: false }).unwrap();
    }
}

/// A small VM.
pub(super) fn spec(vcpus: u32) -> Box<VmSpec> {
    Box::new(VmSpec {
        vcpus: vcpus.try_into().unwrap(),
        memory: (32 << 20).try_into().unwrap(),
        image: "tiny".parse().unwrap(),
        root_disk: None,
        volumes: Vec::new(),
        nics: vec![serio_types::NicSpec::default()],
        cmdline: None,
        cloud_init: None,
        restart_policy: serio_types::RestartPolicy::OnFailure,
        boot: serio_types::BootFrom::Auto,
    })
}
