//! A whole node for tests of the state: the state over a store in a file, the host, and what is under way between them.

use std::{path::PathBuf, time::Duration};

use serio_store::{Change, Store, record::Millis};
use serio_types::{Name, Quota, VdcLimits, VmSpec};
use tokio::sync::oneshot;

use super::{
    State,
    command::{Answer, Command, ImportedFiles, Mutation, Query, Request, VmView},
    effect::{Effect, Input, Timer},
    model::Model,
    recover::Found,
    world_test::World,
};
use crate::{
    clock::{Clock, Moment, Reading},
    error::Error,
};

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
    /// All timers that were ever asked for, and how long they were to take.
    pub(super) asked: Vec<(Timer, Duration)>,
    /// What the host shows.
    pub(super) host: Reading,
    clock: Clock,
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
        let host = Reading { boot_id: "boot".to_owned(), boot_ms: 60_000, wall: Millis(1_900_000_000_000) };
        let mut sim = Self {
            dir,
            state: None,
            world: World::default(),
            todo: vec![],
            ready: vec![],
            timers: vec![],
            asked: vec![],
            clock: Clock::go_on(None, &host).0,
            host,
        };
        sim.start();
        sim
    }

    /// A new seriod over the same store and host.
    pub(super) fn start(&mut self) {
        let (mut store, contents) = Store::open(&self.dir.path().join("state.db")).unwrap();
        let (clock, kept) = Clock::go_on(contents.clock.as_ref(), &self.host);
        store.commit(&[Change::Clock(kept)]).unwrap();
        self.clock = clock;
        let mut state = State::new(store, Model::new(contents), capacity());
        let found = Found {
            vms: self.world.run_files.iter().copied().collect(),
            exports: self.world.exports.keys().map(Name::to_string).collect(),
        };
        self.todo = state.recover(self.now(), &found);
        self.state = Some(state);
        self.sort_timers();
    }

    fn sort_timers(&mut self) {
        let (timers, todo) =
            std::mem::take(&mut self.todo).into_iter().partition(|e| matches!(e, Effect::Timer { .. }));
        self.todo = todo;
        let timers: Vec<Effect> = timers;
        self.timers.extend(timers.into_iter().filter_map(|e| match e {
            Effect::Timer { timer, after } => {
                self.asked.push((timer.clone(), after));
                Some(timer)
            }
            _ => None,
        }));
    }

    fn now(&self) -> Moment {
        self.clock.at(self.host.boot_ms, self.host.wall)
    }

    /// Time goes by.
    pub(super) fn later(&mut self, ms: i64) {
        self.host.boot_ms += ms;
        self.host.wall.0 += ms;
    }

    /// Somebody sets the clock.
    pub(super) fn set_wall_by(&mut self, ms: i64) {
        self.host.wall.0 += ms;
    }

    pub(super) fn state(&self) -> &State {
        self.state.as_ref().unwrap()
    }

    /// Delivers an input.
    pub(super) fn input(&mut self, input: Input) {
        let now = self.now();
        let effects = self.state.as_mut().unwrap().step(now, input);
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
        let files = ImportedFiles {
            uid,
            size_bytes: 1 << 20,
            blake3: String::new(),
            has_kernel: true,
            has_initrd: false,
        };
        let (reply, mut waiting) = oneshot::channel();
        self.input(Input::Command(Command::FinishImport(files), reply));
        waiting.try_recv().unwrap().unwrap();
        let quota = Quota { vcpus: 8, memory_bytes: 256 << 20, storage_bytes: 1 << 30 };
        let (name, limits) = ("ardesio".parse().unwrap(), VdcLimits::default());
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
        machine: serio_types::MachineSpec::default(),
    })
}
