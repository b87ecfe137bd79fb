//! A simulated node: the real ledger, and what an agent would say of it. No sockets here.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::Mutex,
    time::Instant,
};

use serio_api::v1::{
    Allocation, AllocationClass, AllocationState, Allocations, Amount, Answer, Done, Hello, Inventory,
    NumaNode, Refused, RefusedKind, Reserve, Reserved, SchedulerMessage, StoragePool, answer,
    scheduler_message::What,
};
use serio_types::{Quota, resource};
use serio_vdc::ledger::{Ask, Capacity, Class, Ledger, NumaLimit, Stage, Veto, Want, Wish};

use super::agent::Peer;

/// How large each node is.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// That may be promised.
    pub vcpus: u64,
    /// Bytes.
    pub memory: u64,
    /// Bytes.
    pub storage: u64,
    /// Bytes of a VMM.
    pub overhead: u64,
}

impl Default for Size {
    fn default() -> Self {
        Self { vcpus: 128, memory: 256 << 30, storage: 4 << 40, overhead: 16 << 20 }
    }
}

/// See the head of this file.
#[derive(Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    site: String,
    rack: String,
    size: Size,
    /// Its clock runs that much faster; 1 is right.
    rate: f64,
    start: Instant,
    state: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    ledger: Ledger,
    boots: u64,
    /// Of the next token.
    tokens: u64,
    inventory: u64,
}

impl Node {
    /// The `number`th of a region with three sites.
    #[must_use]
    pub fn new(number: usize, size: Size, rate: f64) -> Self {
        let sites = ["milano", "roma", "torino"];
        let capacity = Capacity {
            generation: 1,
            total: Quota { vcpus: size.vcpus, memory_bytes: size.memory, storage_bytes: size.storage },
            nodes: vec![NumaLimit { id: 0, vcpus: size.vcpus, memory_bytes: size.memory }],
            vm_overhead_bytes: size.overhead,
        };
        Self {
            name: format!("sim-{number}"),
            site: sites.get(number % sites.len()).copied().unwrap_or_default().to_owned(),
            rack: format!("rack-{}", number / 16),
            size,
            rate,
            start: Instant::now(),
            state: Mutex::new(Held { ledger: Ledger::new(capacity), boots: 1, tokens: 0, inventory: 1 }),
        }
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Held> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a clock"
    )]
    fn now(&self) -> u64 {
        (self.start.elapsed().as_millis() as f64 * self.rate) as u64
    }

    /// What is promised in all, overhead included, and what may be.
    #[must_use]
    pub fn filled(&self) -> (Quota, Quota) {
        let held = self.held();
        (held.ledger.open(None), held.ledger.capacity().total)
    }

    /// Keys of what is committed.
    #[must_use]
    pub fn committed(&self) -> Vec<String> {
        let held = self.held();
        let kept = held.ledger.promises().filter(|promise| matches!(promise.stage, Stage::Committed));
        kept.map(|promise| promise.want.key.clone()).collect()
    }
}

impl Peer for Node {
    fn name(&self) -> &str {
        &self.name
    }

    fn hello(&self) -> Hello {
        Hello {
            node_id: self.name.clone(),
            node_uid: format!("uid-{}", self.name),
            boot_id: format!("boot-{}", self.held().boots),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            site: self.site.clone(),
            failure_domain: format!("{}/{}", self.site, self.rack),
        }
    }

    fn inventory(&self) -> Inventory {
        let amount = |total| Some(Amount { total, allocatable: total, ..Amount::default() });
        let held = self.held();
        Inventory {
            generation: held.inventory,
            numa_nodes: vec![NumaNode {
                id: 0,
                cpus: amount(self.size.vcpus),
                memory: amount(self.size.memory),
                hugepages: None,
            }],
            storage_pools: vec![StoragePool {
                name: "pool".to_owned(),
                physical_bytes: self.size.storage,
                ..StoragePool::default()
            }],
            cpu_baseline: "x86-64-v3".to_owned(),
            images: vec!["tiny".to_owned()],
            vm_overhead_bytes: self.size.overhead,
            fence_generation: held.ledger.fence_generation(),
            ..Inventory::default()
        }
    }

    fn allocations(&self, complete: bool) -> Allocations {
        let now = self.now();
        let mut held = self.held();
        held.ledger.expire(now);
        let list: Vec<Allocation> = held.ledger.promises().map(allocation).collect();
        drop(held);
        let mut hash = DefaultHasher::new();
        for one in &list {
            (&one.id, one.state, one.class).hash(&mut hash);
        }
        let digest = format!("{:016x}", hash.finish());
        Allocations { digest, allocations: if complete { list } else { Vec::new() }, complete }
    }

    fn order(&self, message: SchedulerMessage) -> Option<Answer> {
        let now = self.now();
        let mut held = self.held();
        let generation = held.inventory;
        let (call, done) = match message.what? {
            What::Reserve(reserve) => (reserve.call, held.reserve(now, &self.name, reserve)),
            What::Commit(order) => (
                order.call,
                held.ledger.commit(now, &order.token).map(|_| answer::What::Done(Done::default())),
            ),
            What::Release(order) => (
                order.call,
                held.ledger.release(now, &order.token).map(|()| answer::What::Done(Done::default())),
            ),
            What::Drain(order) => {
                (order.call, held.ledger.drain(&order.reason).map(|()| answer::What::Done(Done::default())))
            }
            What::Undrain(order) => {
                held.ledger.undrain();
                (order.call, Ok(answer::What::Done(Done::default())))
            }
            What::Fence(order) => {
                let ended = held.ledger.fence(order.generation);
                held.inventory = held.inventory.wrapping_add(1);
                (order.call, ended.map(|ended| answer::What::Done(Done { ended: ended.tokens })))
            }
            What::Welcome(_) | What::SendAllocations(_) => return None,
        };
        let what = done.unwrap_or_else(|veto| answer::What::Refused(refused(&veto, generation)));
        Some(Answer { call, what: Some(what) })
    }

    /// What was not committed is lost, the rest is kept.
    fn restart(&self) {
        let mut held = self.held();
        let kept =
            held.ledger.promises().filter(|promise| !matches!(promise.stage, Stage::Pending { .. })).cloned();
        let kept: Vec<_> = kept.collect();
        let (capacity, fence) = (held.ledger.capacity().clone(), held.ledger.fence_generation());
        held.ledger = Ledger::new(capacity);
        held.ledger.restore(kept, None, fence);
        held.boots = held.boots.wrapping_add(1);
    }
}

impl Held {
    fn reserve(&mut self, now: u64, name: &str, order: Reserve) -> Result<answer::What, Veto> {
        // As seriod does.
        resource::parse_vm(&order.resource)
            .map_err(|error| Veto::Invalid { what: "resource", problem: error.to_string() })?;
        self.tokens = self.tokens.wrapping_add(1);
        let dr_held = order.class() == AllocationClass::DrHeld;
        let ask = Ask {
            want: Want {
                key: order.key,
                resource: order.resource,
                amount: Quota {
                    vcpus: u64::from(order.vcpus),
                    memory_bytes: order.memory_bytes,
                    storage_bytes: order.storage_bytes,
                },
                class: if dr_held { Class::DrHeld } else { Class::Normal },
                wish: Wish::Any,
                fence: order.fence_generation,
            },
            ttl_ms: u64::from(order.ttl_ms),
            expected_generation: order.expected_generation,
            token: format!("{name}-{}-{}", self.boots, self.tokens),
        };
        let generation = self.inventory;
        let outside = self.ledger.taken();
        let promise = self.ledger.reserve(now, &outside, ask)?;
        Ok(answer::What::Reserved(Reserved {
            token: promise.token.clone(),
            ttl_ms: u32::try_from(promise.left(now)).unwrap_or(u32::MAX),
            numa_node: promise.numa_node,
            generation,
        }))
    }
}

fn allocation(promise: &serio_vdc::ledger::Promise) -> Allocation {
    let state = match promise.stage {
        Stage::Pending { .. } => AllocationState::Pending,
        Stage::Committed => AllocationState::Reserved,
        Stage::Taken(_) => AllocationState::Active,
    };
    let class = match promise.want.class {
        Class::Normal => AllocationClass::Normal,
        Class::DrHeld => AllocationClass::DrHeld,
    };
    Allocation {
        id: promise.token.clone(),
        generation: 0,
        resource: promise.want.resource.clone(),
        state: state.into(),
        class: class.into(),
        vcpus: u32::try_from(promise.want.amount.vcpus).unwrap_or(u32::MAX),
        memory_bytes: promise.want.amount.memory_bytes,
        storage_bytes: promise.want.amount.storage_bytes,
        numa_node: promise.numa_node,
        token: promise.token.clone(),
        key: promise.want.key.clone(),
        fence_generation: promise.want.fence,
    }
}

fn refused(veto: &Veto, generation: u64) -> Refused {
    let kind = match veto {
        Veto::Stale { .. } => RefusedKind::Stale,
        Veto::Full(_) | Veto::TooMany { .. } => RefusedKind::Full,
        Veto::Drained { .. } => RefusedKind::Drained,
        Veto::Fenced { .. } => RefusedKind::Fenced,
        Veto::UnknownToken { .. } => RefusedKind::UnknownToken,
        Veto::Expired { .. } => RefusedKind::Expired,
        Veto::Invalid { .. } => RefusedKind::Invalid,
        Veto::Taken { .. } => RefusedKind::Taken,
    };
    let numbers = match veto {
        Veto::Full(short) => (short.resource.name().to_owned(), short.asked, short.limit, short.used),
        _ => Default::default(),
    };
    let (resource, asked, limit, used) = numbers;
    Refused { kind: kind.into(), message: veto.to_string(), resource, asked, limit, used, generation }
}
