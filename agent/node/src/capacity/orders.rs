//! The scheduler's orders, from the wire to the state and back. Owns: the conversion, and that those which change the node
//! itself (drain, undrain, fence) are in the audit log before they are done, as those of people are. Promises are not: they
//! come by the dozen each second, the scheduler keeps them, and the VM that takes one is in the log.
//! Never: a decision.

use serio_api::v1::{
    AllocationClass, Answer, Done, Refused, RefusedKind, Reserve, Reserved, answer,
    scheduler_message::What as Said,
};
use serio_types::Quota;
use serio_vdc::ledger::{Ask, Class, Shortage, Veto, Want, Wish};
use uuid::Uuid;

use crate::{
    audit::{self, Caller, Detail, Trail},
    error::{Error, chain},
    state::{
        command::{Answer as StateAnswer, Command, Order, Ordered},
        owner::Client,
    },
};

/// The call's number and what it orders; none for what is no order.
pub(super) fn parse(said: Said) -> Option<(u64, Result<Order, Error>)> {
    Some(match said {
        Said::Reserve(r) => (r.call, reserve(r)),
        Said::Commit(r) => (r.call, Ok(Order::Commit(r.token))),
        Said::Release(r) => (r.call, Ok(Order::Release(r.token))),
        Said::Drain(r) => (r.call, Ok(Order::Drain(r.reason))),
        Said::Undrain(r) => (r.call, Ok(Order::Undrain)),
        Said::Fence(r) => {
            let id = (!r.allocation_id.is_empty()).then_some(r.allocation_id);
            (r.call, Ok(Order::Fence { id, generation: r.generation }))
        }
        Said::Welcome(_) | Said::SendAllocations(_) => return None,
    })
}

fn reserve(r: Reserve) -> Result<Order, Error> {
    let class = match AllocationClass::try_from(r.class) {
        Ok(AllocationClass::Unspecified | AllocationClass::Normal) => Class::Normal,
        Ok(AllocationClass::DrHeld) => Class::DrHeld,
        Err(_) => return Err(Error::invalid("class", format!("{} is not known here", r.class))),
    };
    let wish = match (r.numa_node, r.one_numa_node) {
        (Some(id), _) => Wish::Node(id),
        (None, true) => Wish::OneNode,
        (None, false) => Wish::Any,
    };
    let amount =
        Quota { vcpus: u64::from(r.vcpus), memory_bytes: r.memory_bytes, storage_bytes: r.storage_bytes };
    let want = Want { key: r.key, resource: r.resource, amount, class, wish, fence: r.fence_generation };
    Ok(Order::Reserve(Box::new(Ask {
        want,
        ttl_ms: u64::from(r.ttl_ms),
        expected_generation: r.expected_generation,
        token: Uuid::new_v4().to_string(),
    })))
}

/// Who carries orders out, and who gave them.
#[derive(Debug, Clone)]
pub(super) struct Carrier {
    pub(super) state: Option<Client>,
    pub(super) trail: Option<Trail>,
    /// "nodes/a".
    pub(super) node: String,
    /// "scheduler ID at URL".
    pub(super) who: String,
}

/// The method that a person would call for it, what it is about, and what else is to be known.
fn noted(order: &Order, node: &str) -> Option<(&'static str, String, Detail)> {
    match order {
        Order::Drain(reason) => Some(("DrainNode", node.to_owned(), vec![("reason", reason.clone())])),
        Order::Undrain => Some(("UndrainNode", node.to_owned(), Vec::new())),
        Order::Fence { id, generation } => {
            let on = id.as_ref().map_or_else(|| node.to_owned(), |id| format!("allocations/{id}"));
            Some(("FenceNode", on, vec![("generation", generation.to_string())]))
        }
        _ => None,
    }
}

impl Carrier {
    async fn order(&self, order: Order) -> Result<StateAnswer, Error> {
        let state = self.state.as_ref().ok_or(Error::Ending)?;
        let asked = match (&self.trail, noted(&order, &self.node)) {
            (Some(trail), Some((what, on, detail))) => {
                let caller = Caller { who: self.who.clone(), role: "scheduler", what: what.to_owned() };
                Some((trail, trail.asked(caller, on, detail).await?))
            }
            _ => None,
        };
        let answer = state.ask(Command::Order(order, None)).await;
        if let Some((trail, asked)) = asked {
            trail.ended(asked, audit::result(&answer)).await;
        }
        answer
    }
}

/// Carries an order out; `generation` is the inventory's, for a refusal.
pub(super) async fn carry_out(
    carrier: Carrier,
    (call, order): (u64, Result<Order, Error>),
    generation: u64,
) -> Answer {
    let result = match order {
        Ok(order) => carrier.order(order).await,
        Err(error) => Err(error),
    };
    let what = match result {
        Ok(StateAnswer::Ordered(ordered)) => done(ordered),
        Ok(_) => answer::What::Done(Done::default()),
        Err(error) => answer::What::Refused(Refused { generation, ..refused(&error) }),
    };
    Answer { call, what: Some(what) }
}

fn done(ordered: Ordered) -> answer::What {
    match ordered {
        Ordered::Reserved { promise, left_ms, generation } => answer::What::Reserved(Reserved {
            token: promise.token,
            ttl_ms: u32::try_from(left_ms).unwrap_or(u32::MAX),
            numa_node: promise.numa_node,
            generation,
        }),
        Ordered::Done | Ordered::Blocking(_) => answer::What::Done(Done::default()),
        Ordered::Ended(ended) => answer::What::Done(Done { ended }),
    }
}

fn refused(error: &Error) -> Refused {
    let kind = match error {
        Error::Veto(veto) => kind(veto),
        Error::Invalid(_) => RefusedKind::Invalid,
        // The state cannot be kept, or the agent ends: nothing about the order itself.
        _ => RefusedKind::Unspecified,
    };
    let refused = Refused { kind: kind.into(), message: chain(error), ..Refused::default() };
    match error {
        Error::Veto(Veto::Full(Shortage { resource, asked, limit, used, .. })) => Refused {
            resource: resource.name().to_owned(),
            asked: *asked,
            limit: *limit,
            used: *used,
            ..refused
        },
        _ => refused,
    }
}

fn kind(veto: &Veto) -> RefusedKind {
    match veto {
        Veto::Stale { .. } => RefusedKind::Stale,
        Veto::Full(_) | Veto::TooMany { .. } => RefusedKind::Full,
        Veto::Drained { .. } => RefusedKind::Drained,
        Veto::Fenced { .. } => RefusedKind::Fenced,
        Veto::UnknownToken { .. } => RefusedKind::UnknownToken,
        Veto::Expired { .. } => RefusedKind::Expired,
        Veto::Invalid { .. } => RefusedKind::Invalid,
        Veto::Taken { .. } => RefusedKind::Taken,
    }
}
