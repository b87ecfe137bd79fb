//! Orders that need a node: each is a short conversation between the owner and one agent after the other.
//!
//! ```text
//!  begin ─▶ choose (asks the node) ─▶ answer ─▶ settle (durable) ─▶ caller
//!              ▲          no, or silent │
//!              └────────────────────────┘  five times at most, each time without those that refused
//! ```
//! They run in tasks of their own: a caller that hangs up does not stop one in the middle.

use std::time::Duration;

use serio_api::v1::{PlaceRequest, Placement, RefusedKind, Veto, answer::What};
use serio_types::Name;
use tokio::{sync::oneshot, time::timeout};
use tonic::Status;

use crate::{
    error::OrderError,
    owner::{
        Handle,
        place::{Asked, Begin},
    },
};

/// Nodes that are asked for one request.
const ATTEMPTS_MAX: usize = 5;
/// What a node gets to answer: it only looks at its ledger.
const ANSWER_WAIT: Duration = Duration::from_secs(3);

/// What a node said; none when it did not within its time, or is gone.
async fn heard(answer: oneshot::Receiver<What>) -> Option<What> {
    timeout(ANSWER_WAIT, answer).await.ok().and_then(Result::ok)
}

/// Finds a node and reserves there.
pub(super) async fn place(
    owner: &Handle,
    id: Name,
    request: PlaceRequest,
    seed: u64,
) -> Result<Placement, Status> {
    let begun = {
        let (id, request) = (id.clone(), request.clone());
        owner.ask(move |core| core.begin(&id, &request)).await??
    };
    if let Begin::Done(placement) = begun {
        return Ok(*placement);
    }
    let placed = attempts(owner, &id, request, seed).await;
    if placed.is_err() {
        owner.ask(move |core| core.abandon(&id)).await?;
    }
    placed
}

async fn attempts(owner: &Handle, id: &Name, request: PlaceRequest, seed: u64) -> Result<Placement, Status> {
    let mut vetoes: Vec<Veto> = Vec::new();
    loop {
        let asked: Asked = {
            let (id, request, vetoes) = (id.clone(), request.clone(), vetoes.clone());
            owner.ask(move |core| core.choose(&id, &request, &vetoes, seed)).await??
        };
        let (node, plan, generation) = (asked.node, asked.plan, asked.fence_generation);
        let what = heard(asked.answer).await;
        if let Some(What::Reserved(reserved)) = &what {
            let (id, reserved) = (id.clone(), reserved.clone());
            let settled = owner
                .ask(move |core| core.settle(&id, request, (&node, &plan, generation), &reserved, vetoes));
            return Ok(settled.await??);
        }
        vetoes.push(veto(&node, what.as_ref()));
        tracing::info!(request = %id, node = %node, why = vetoes.last().map(|veto| &veto.message), "a node refused");
        let (key, silent) = (id.clone(), what.is_none());
        owner.ask(move |core| core.refused_by(&key, &node, silent)).await?;
        if vetoes.len() >= ATTEMPTS_MAX {
            let refused: Vec<String> =
                vetoes.iter().map(|veto| format!("{}: {}", veto.node, veto.message)).collect();
            return Err(Status::resource_exhausted(format!(
                "{ATTEMPTS_MAX} nodes were asked and refused; try again. {}",
                refused.join("; ")
            )));
        }
    }
}

fn veto(node: &Name, what: Option<&What>) -> Veto {
    let (kind, message) = match what {
        Some(What::Refused(refused)) => (refused.kind(), refused.message.clone()),
        Some(_) => (RefusedKind::Invalid, "it answered something else".to_owned()),
        None => (RefusedKind::Unspecified, "it did not answer".to_owned()),
    };
    Veto { node: format!("nodes/{node}"), kind: kind.into(), message }
}

/// Lets the node keep it.
pub(super) async fn commit(owner: &Handle, id: Name) -> Result<Placement, Status> {
    let key = id.clone();
    let Some((node, answer)) = owner.ask(move |core| core.commit_order(&key)).await?? else {
        return Ok(owner.ask(move |core| core.outcome(&id)).await??);
    };
    let what = heard(answer).await.ok_or(OrderError::Silent(node))?;
    Ok(owner.ask(move |core| core.commit_answered(&id, &what)).await??)
}

/// Lets the node have it back; when that cannot be said now, it is told later.
pub(super) async fn release(owner: &Handle, id: Name) -> Result<Placement, Status> {
    let key = id.clone();
    if let Some(answer) = owner.ask(move |core| core.release_order(&key)).await??
        && let Some(what) = heard(answer).await
    {
        let key = id.clone();
        owner.ask(move |core| core.released(&key, &what)).await?;
    }
    Ok(owner.ask(move |core| core.outcome(&id)).await??)
}
