//! One agent's side of its stream: what it says is handed to the owner, in order.

use std::time::Duration;

use serio_api::v1::{AgentMessage, Answer, SchedulerMessage, agent_message::What};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tonic::{Status, Streaming};

use crate::{
    auth::Speaker,
    inventory::{Input, SessionId},
    owner::Handle,
};

/// An agent says Hello at once.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// An agent that says nothing for that long, not even a lease, is ended.
const SILENCE_MAX: Duration = Duration::from_secs(120);

/// Hands on what one agent says.
pub(super) struct Listener {
    pub(super) owner: Handle,
    pub(super) session: SessionId,
    pub(super) speaker: Speaker,
    pub(super) to_agent: mpsc::WeakSender<Result<SchedulerMessage, Status>>,
    pub(super) _permit: OwnedSemaphorePermit,
}

impl Listener {
    /// Until the agent hangs up or is silent for too long, or the owner ends the session.
    pub(super) async fn run(self, mut inbound: Streaming<AgentMessage>, mut ended: oneshot::Receiver<()>) {
        let mut patience = HELLO_TIMEOUT;
        loop {
            let heard = tokio::select! {
                heard = tokio::time::timeout(patience, inbound.message()) => heard,
                _ = &mut ended => break,
            };
            let message = match heard {
                Ok(Ok(Some(message))) => message,
                Ok(Ok(None)) => break,
                Ok(Err(status)) => {
                    tracing::debug!(session = self.session.0, %status, "an agent's stream broke");
                    break;
                }
                Err(_) => {
                    self.tell_silent(patience);
                    break;
                }
            };
            patience = SILENCE_MAX;
            // What a newer agent says may be unknown here.
            let Some(what) = message.what else { continue };
            if let What::Hello(hello) = &what
                && let Err(refused) = self.speaker.speaks_for(&hello.node_id)
            {
                tracing::warn!(session = self.session.0, %refused, "an agent was refused");
                self.tell(refused);
                break;
            }
            let handed_on = match input(self.session, what) {
                Heard::Input(input) => self.owner.input(input).await,
                Heard::Answer(answer) => self.owner.answer(self.session, answer).await,
            };
            if handed_on.is_err() {
                break;
            }
        }
        // When the owner is gone, so is the session.
        let _ = self.owner.input(Input::Gone(self.session)).await;
    }

    fn tell_silent(&self, patience: Duration) {
        self.tell(Status::deadline_exceeded(format!("nothing was said for {} s", patience.as_secs())));
    }

    /// The last word to this agent. One that does not read learns nothing.
    fn tell(&self, status: Status) {
        let _ = self.to_agent.upgrade().map(|sender| sender.try_send(Err(status)));
    }
}

enum Heard {
    Input(Input),
    Answer(Answer),
}

fn input(session: SessionId, what: What) -> Heard {
    Heard::Input(match what {
        What::Hello(hello) => Input::Hello(session, hello),
        What::Inventory(inventory) => Input::Inventory(session, inventory),
        What::Usage(usage) => Input::Usage(session, usage),
        What::Lease(lease) => Input::Lease(session, lease),
        What::Allocations(allocations) => Input::Allocations(session, allocations),
        What::Answer(answer) => return Heard::Answer(answer),
    })
}
