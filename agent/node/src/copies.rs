//! Copies of the state's database: made now and then while seriod runs, put back when somebody says so.
//!
//! Owns: when. Never: how (that is [`serio_store::copies`]). Threads: a copy is made on a blocking thread, beside the one that
//! writes.

use std::{fmt::Write as _, path::PathBuf, time::Duration};

use anyhow::Context as _;
use serio_store::copies;
use tokio::time::{MissedTickBehavior, interval};

use crate::{
    config::Config,
    daemon,
    error::{Error, chain},
    state::{command::Command, owner::Client},
};

/// The database below a state directory.
pub(crate) const DATABASE: &str = "state.db";

/// What is copied, and how often.
#[derive(Debug, Clone)]
pub struct CopySettings {
    /// The database.
    pub database: PathBuf,
    /// Between two copies; one is made of what has changed only.
    pub every: Duration,
    /// The node as events name it: "nodes/a".
    pub resource: String,
}

/// Makes copies until the state is gone. That one cannot be made is an event: with nobody looking there would be no way back.
pub async fn run(settings: CopySettings, state: Client) {
    let mut tick = interval(settings.every);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let database = settings.database.clone();
        let Ok(made) = tokio::task::spawn_blocking(move || copies::make(&database)).await else { return };
        let error = match made {
            Ok(Some(copy)) => {
                tracing::info!(copy = %copy.display(), "a copy of the state was made");
                continue;
            }
            Ok(None) => continue,
            Err(error) => chain(&error),
        };
        tracing::error!("no copy of the state was made: {error}");
        let message = format!("no copy of the state was made: {error}");
        let note = Command::Note { resource: settings.resource.clone(), kind: "unhealthy", message };
        if let Err(Error::Ending) = state.ask(note).await {
            return;
        }
    }
}

/// Puts the newest good copy in the database's place; gives what to tell the operator.
///
/// # Errors
/// A seriod runs on this state, or there is no good copy.
pub fn restore_state(config: &Config) -> anyhow::Result<String> {
    let _lock = daemon::lock(&config.state_dir)?;
    let database = config.state_dir.join(DATABASE);
    let done = copies::restore(&database).context("the state was not restored")?;
    let mut text = format!("{} is {} again", database.display(), done.copy.display());
    if let Some(aside) = &done.aside {
        write!(text, "; what was there is {}", aside.display())?;
    }
    for why in &done.passed_over {
        write!(text, "\na newer copy was passed over: {why}")?;
    }
    text.push_str(
        "\nWhen seriod starts, VMs that were made since that copy are ended; the files of their volumes stay below state_dir.",
    );
    Ok(text)
}
