//! A node as the agents, the looks and the faults of the checker see it: the simulated one with its real ledger, or one
//! that is broken in a way which a real one could be.

use std::sync::{Mutex, PoisonError};

use serio_api::v1::{
    Allocation, AllocationState, Allocations, Answer, Hello, Inventory, Release, SchedulerMessage,
    scheduler_message::What,
};
use serio_scheduler::simulate::{
    Chance,
    agent::Peer,
    node::{Node, Size},
};

use crate::judge::Held;

/// How a node is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// What it commits it books a second time.
    BooksTwice,
    /// Its agent keeps nothing over a restart.
    Forgets,
    /// It promises far more than it has.
    Overbooks,
}

/// See the head of this file.
pub(crate) struct Party {
    node: Node,
    /// What it really has.
    pub(crate) vcpus: u64,
    fault: Option<Fault>,
    twice: Mutex<Vec<Allocation>>,
}

impl Party {
    pub(crate) fn new(number: usize, vcpus: u64, fault: Option<Fault>, chance: &mut Chance) -> Self {
        let says = if fault == Some(Fault::Overbooks) { vcpus * 4 } else { vcpus };
        let size = Size { vcpus: says, memory: 1 << 40, storage: 1 << 40, overhead: 0 };
        // Its clock is up to five per cent off.
        let rate = f64::from(u32::try_from(95 + chance.below(11)).unwrap()) / 100.0;
        // So little that single requests are too large, however few are under way at once.
        let vcpus = if fault == Some(Fault::Overbooks) { 1 } else { vcpus };
        Self { node: Node::new(number, size, rate), vcpus, fault, twice: Mutex::default() }
    }

    /// All that it holds now.
    pub(crate) fn held(&self) -> Vec<Held> {
        let held = |allocation: Allocation| Held {
            committed: allocation.state() == AllocationState::Reserved,
            vcpus: u64::from(allocation.vcpus),
            key: allocation.key,
            token: allocation.token,
        };
        self.allocations(true).allocations.into_iter().map(held).collect()
    }

    fn twice(&self) -> std::sync::MutexGuard<'_, Vec<Allocation>> {
        self.twice.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Peer for Party {
    fn name(&self) -> &str {
        self.node.name()
    }

    fn hello(&self) -> Hello {
        self.node.hello()
    }

    fn inventory(&self) -> Inventory {
        self.node.inventory()
    }

    fn allocations(&self, complete: bool) -> Allocations {
        let mut all = self.node.allocations(complete);
        if complete {
            all.allocations.extend(self.twice().iter().cloned());
        }
        all
    }

    fn order(&self, message: SchedulerMessage) -> Option<Answer> {
        let committed = match &message.what {
            Some(What::Commit(commit)) if self.fault == Some(Fault::BooksTwice) => Some(commit.token.clone()),
            _ => None,
        };
        let answer = self.node.order(message);
        let all = self.node.allocations(true).allocations;
        if let Some(again) = all.into_iter().find(|one| Some(&one.token) == committed.as_ref()) {
            let token = format!("{}-again", again.token);
            self.twice().push(Allocation { id: token.clone(), token, ..again });
        }
        answer
    }

    fn restart(&self) {
        self.node.restart();
        if self.fault == Some(Fault::Forgets) {
            for held in self.held() {
                let release = What::Release(Release { call: 0, token: held.token });
                // Nobody asked for it.
                let _ = self.node.order(SchedulerMessage { what: Some(release) });
            }
        }
    }
}
