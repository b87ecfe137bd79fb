//! How an order is taken, and answered: carried out once, however often the same request comes, over a restart too.
//!
//! What was ordered by others since the first time stands: a repetition changes nothing and says what is so now. What an order
//! does is in [`super::orders`].

use std::collections::BTreeSet;

use serio_store::Change;
use uuid::Uuid;

use super::{
    State,
    command::{Answer, Reply, Request},
    orders::{Fencing, Order, Ordered},
};
use crate::error::Error;

/// How an order is answered.
enum Outcome {
    /// At once.
    Now(Ordered),
    /// With these ids, when these VMs have ended.
    WhenEnded(Vec<String>, BTreeSet<Uuid>),
}

impl State {
    pub(super) fn order(&mut self, order: Order, request: Option<&Request>, reply: Reply) {
        let result = match self.is_repeated(request) {
            Err(error) => Err(error),
            Ok(true) => self.repeat(&order),
            Ok(false) => {
                let remember = request.map(|r| Change::Request(r.record("node".to_owned(), self.steady)));
                self.carry_out(order, remember)
            }
        };
        match result {
            Ok(Outcome::Now(ordered)) => super::answer(reply, Ok(Answer::Ordered(ordered))),
            Ok(Outcome::WhenEnded(ended, vms)) => self.fencings.push(Fencing { vms, ended, reply }),
            Err(error) => super::answer(reply, Err(error)),
        }
    }

    /// Whether it was carried out already, perhaps by an earlier seriod.
    fn is_repeated(&self, request: Option<&Request>) -> Result<bool, Error> {
        let Some(request) = request else { return Ok(false) };
        let known = self.store.request(request.id)?;
        known.as_ref().map_or(Ok(()), |known| request.same_as(known))?;
        Ok(known.is_some())
    }

    /// Answers an order that was carried out: what has been ordered since stands.
    fn repeat(&mut self, order: &Order) -> Result<Outcome, Error> {
        Ok(match order {
            Order::Drain(_) => Outcome::Now(Ordered::Blocking(self.blocking())),
            Order::Undrain => Outcome::Now(Ordered::Done),
            Order::Fence { id, generation } => {
                let of_it = |uid: &Uuid| id.as_ref().is_none_or(|id| *id == uid.to_string());
                let vms: BTreeSet<Uuid> = self.ended_by(*generation).filter(of_it).collect();
                Outcome::WhenEnded(vms.iter().map(Uuid::to_string).collect(), vms)
            }
            // Their keys and tokens make them what they are, however often they come.
            Order::Reserve(_) | Order::Commit(_) | Order::Release(_) => {
                return self.carry_out(order.clone(), None);
            }
        })
    }

    fn carry_out(&mut self, order: Order, remember: Option<Change>) -> Result<Outcome, Error> {
        Ok(Outcome::Now(match order {
            Order::Reserve(ask) => self.reserve(*ask)?,
            Order::Commit(token) => self.commit_promise(&token)?,
            Order::Release(token) => self.release(&token)?,
            Order::Drain(reason) => self.drain(&reason, remember)?,
            Order::Undrain => self.undrain(remember)?,
            Order::Fence { id, generation } => {
                let (ended, vms) = self.fence(id.as_deref(), generation, remember)?;
                return Ok(Outcome::WhenEnded(ended, vms));
            }
        }))
    }
}
