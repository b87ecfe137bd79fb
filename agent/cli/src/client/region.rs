//! A region has several schedulers, and one leads: a call that comes to another one goes to the one that it names. While the
//! region finds its next leader, the call waits for it, a few seconds.
//!
//! Owns: the repetition of calls, and what several hosts may be. Never: which scheduler is next: that is [`Route`].

use std::{future::Future, time::Duration};

use serio_types::route::{Next, Route};
use tokio::time::Instant;
use tonic::{Request, Response, Status, transport::Channel};
use tonic_types::StatusExt;

use super::{Client, Target, is_broken, open};

/// A region that loses its leader has the next one after 5 s.
const LEADER_WAIT: Duration = Duration::from_secs(10);
/// Between two questions for the next leader.
const PAUSE: Duration = Duration::from_millis(300);

/// HOST:PORT of the one that leads, when the answer is that another one does; empty: nobody at the moment.
fn leader_of(status: &Status) -> Option<String> {
    let info = status.get_details_error_info().filter(|info| info.reason == "NOT_LEADER")?;
    Some(info.metadata.get("leader").cloned().unwrap_or_default())
}

/// One, or several schedulers with commas between them.
pub(super) fn targets(hosts: &str) -> Result<Vec<Target>, String> {
    let targets: Vec<Target> =
        hosts.split(',').map(|host| host.trim().parse()).collect::<Result<_, String>>()?;
    if targets.len() > 1 && targets.iter().any(|target| matches!(target, Target::Unix(_))) {
        return Err(format!(
            "`{hosts}` names a socket beside others: several hosts are the schedulers of a region"
        ));
    }
    Ok(targets)
}

impl Client {
    /// Whether another scheduler may do what this one does not.
    pub(super) fn goes_elsewhere(&self, status: &Status) -> bool {
        leader_of(status).is_some() || (self.global.host.contains(',') && is_broken(status))
    }

    /// Repeats a call with the one that leads, as soon as one does.
    pub(super) async fn elsewhere<Q, A, F, R>(
        &self,
        mut status: Status,
        request: &Q,
        send: &F,
    ) -> Result<A, Status>
    where
        Q: Clone,
        F: Fn(Channel, Request<Q>) -> R,
        R: Future<Output = Result<Response<A>, Status>>,
    {
        let until = Instant::now() + LEADER_WAIT;
        let mut route = self.route.clone();
        let Some(mut next) = after(&mut route, &status) else { return Err(status) };
        while Instant::now() < until {
            if next != Next::AtOnce {
                tokio::time::sleep(PAUSE).await;
            }
            let Ok(target) = route.url().parse::<Target>() else { return Err(status) };
            let Ok(channel) = open(&self.global, &target).await else {
                next = route.failed();
                continue;
            };
            match send(channel, Request::new(request.clone())).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(failed) => status = failed,
            }
            match after(&mut route, &status) {
                Some(again) => next = again,
                None => return Err(status),
            }
        }
        Err(status)
    }
}

/// When to ask whom after that answer; none: it is the answer.
fn after(route: &mut Route, status: &Status) -> Option<Next> {
    match leader_of(status) {
        Some(leader) => Some(route.named(&leader)),
        None => is_broken(status).then(|| route.failed()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_hosts_are_schedulers() {
        let two = targets("https://a:7450, https://b:7450").unwrap();
        assert_eq!(
            two.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["https://a:7450", "https://b:7450"]
        );
        assert_eq!(targets("unix:/run/x").unwrap().len(), 1);
        for wrong in ["https://a,", ",", "https://a,unix:/run/x", "https://a,b"] {
            assert!(targets(wrong).is_err(), "{wrong}");
        }
    }
}
